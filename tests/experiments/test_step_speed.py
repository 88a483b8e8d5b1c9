"""Whole training steps: the published sizes, a table at a tiny size, and a peer that may fail."""

import dataclasses
import json
import os
import threading
from pathlib import Path

import pytest
from flax import nnx

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.models import SequenceModel, count_parameters
from experiments import state_tracking
from experiments.lib import flags
from experiments.lib.bench import training_steps
from experiments.lib.bench.device_time import by_kind
from experiments.lib.bench.peers.fla_model import peer_config
from experiments.op import step_speed

TINY = ["--preset=small", "--length=8", "--num_layers=1", "--num_householder=2", "--num_heads=2"]
TINY += ["--steps=2", "--repeats=2"]


@pytest.fixture
def inline(monkeypatch):
    """Everything in this process."""
    monkeypatch.setattr(training_steps, "apart", lambda function, *arguments: function(*arguments))


def rows_of(path):
    return json.loads((path / "step.json").read_text())["rows"]


@pytest.mark.slow
def test_the_models_have_the_published_sizes():
    config = step_speed.StepConfig()
    counts = []
    for model in map(config.model, config.models):
        abstract = nnx.eval_shape(lambda model=model: SequenceModel(model, rngs=nnx.Rngs(0)))
        counts.append(count_parameters(abstract)["total"])
    assert counts == [341_594_112, 316_379_136]


@pytest.mark.slow
def test_a_table_of_whole_steps(tmp_path, capsys):
    step_speed.command([f"--workdir={tmp_path}", *TINY])
    (row,) = rows_of(tmp_path)
    assert row["implementation"] == step_speed.OURS
    assert (row["num_householder"], row["num_heads"]) == (2, 2)
    assert row["min_ms"] <= row["median_ms"] <= row["max_ms"]
    assert row["tokens_per_s"] == pytest.approx(1e3 * 2 * 8 / row["median_ms"])
    assert row["steps"] == 2 * (2 + 1)
    assert 0 < row["last_loss"] < row["first_loss"]
    assert row["parameters"] > 0
    assert row["compile_s"] > 0
    assert row["temp_mib"] > 0
    assert row["moved_mib"] > 0
    assert (row["device_ms"], row["kernels_ms"], row["mfu"]) == (None, {}, None)  # of no GPU
    printed = capsys.readouterr().out
    assert (tmp_path / "step.md").read_text().strip() == printed.strip()
    assert "| 2 | 2 | deltaproduct_jax | data:1 |" in printed


def test_what_the_peer_refuses_is_a_line_below_the_table(tmp_path, inline, monkeypatch, capsys):
    asked = []

    def refuses(*arguments):
        asked.append(arguments)
        if len(asked) == 1:
            raise RuntimeError("no such\nkernel")
        timed = {"parameters": 7, "median_ms": 3.0, "min_ms": 2.0, "max_ms": 4.0, "compile_s": 1.0}
        timed |= {"temp_mib": None, "peak_mib": 1.0, "first_loss": 5.0, "last_loss": 4.0}
        return [{"implementation": "fla, masters", **timed}]

    ours = {"implementation": step_speed.OURS, "parameters": 7, "median_ms": 1.5, "min_ms": 1.0}
    ours |= {"max_ms": 2.0, "compile_s": 1.0, "temp_mib": 0.0, "peak_mib": None}
    ours |= {"first_loss": 5.0, "last_loss": 4.0}
    monkeypatch.setattr(step_speed, "our_rows", lambda *_: [dict(ours)])
    monkeypatch.setattr(step_speed, "check_peer", lambda: None)
    monkeypatch.setattr(step_speed, "peer_rows", refuses)
    arguments = ["--preset=small", "--peer=fla", "--peer_precisions=masters", "--budget_s=7"]
    step_speed.command([f"--workdir={tmp_path}", *arguments])
    printed = capsys.readouterr().out
    assert "\nn_h = 1, fla over data:1 did not run: RuntimeError: no such kernel\n" in printed
    assert [row.get("ours_times_faster") for row in rows_of(tmp_path)] == [None, None, None, 2]
    _, model, precisions, tokens, *timing = asked[1]
    assert (model.num_householder, precisions, tokens.shape) == (2, ["masters"], (2, 65))
    assert timing == [4, 3, 7.0]


def test_models_are_shared_out_and_come_in_order(tmp_path, monkeypatch):
    """Each has one of the GPUs, and a turn on it; peers come later and have none."""
    asked, timed = [], {"parameters": 7, "compile_s": 1.0, "first_loss": 5.0, "last_loss": 4.0}

    def ours(_, model, tokens, *timing, mesh, turn):
        assert not asked or asked[-1][0] != "peer"
        asked.append((os.environ["CUDA_VISIBLE_DEVICES"], Path(turn).name))
        times = dict.fromkeys(("median_ms", "min_ms", "max_ms"), float(model.num_householder))
        return [{"implementation": step_speed.OURS, **timed, **times}]

    def peer(_, model, *others):
        asked.append(("peer", os.environ["CUDA_VISIBLE_DEVICES"]))
        return [{"implementation": "fla", **timed, "median_ms": 8.0, "min_ms": 8.0, "max_ms": 8.0}]

    def late(function, *arguments):
        with lock, pytest.MonkeyPatch.context() as patch:  # of a process of its own
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
            return function(*arguments)

    lock = threading.Lock()
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "5,7")
    monkeypatch.setattr(training_steps, "apart", late)
    monkeypatch.setattr(step_speed, "our_rows", lambda *x: ours(*x[:-2], mesh=x[-2], turn=x[-1]))
    monkeypatch.setattr(step_speed, "check_peer", lambda: None)
    monkeypatch.setattr(step_speed, "peer_rows", peer)
    sizes = ["--num_householder=1,2,3,2", "--num_heads=2,2,2,2", "--gated=0,0,0,1", "--length=8"]
    more = ["--preset=small", "--gpus=2", "--at_once=2", "--peer=fla"]
    step_speed.command([f"--workdir={tmp_path}", *sizes, *more])
    assert sorted(asked[:4]) == [("5", "0"), ("5", "0"), ("7", "1"), ("7", "1")]
    assert sorted(asked[4:]) == [("peer", "5"), ("peer", "5"), ("peer", "7"), ("peer", "7")]
    rows = rows_of(tmp_path)
    found = [(r["num_householder"], r["gated"], r["ours_times_faster"]) for r in rows]
    expected = [(1, 0, 8), (2, 0, 4), (3, 0, 8 / 3), (2, 1, 4)]
    assert found[1::2] == [(*known, pytest.approx(times)) for *known, times in expected]
    assert "| 3 | 2 | no | fla |" in (tmp_path / "step.md").read_text()


def test_a_device_of_each_mesh_is_held_against_one_of_the_first(tmp_path, inline, monkeypatch):
    asked = []

    def timed(_, model, tokens, steps, repeats, budget_s, mesh):
        asked.append((mesh, tokens.shape))
        devices = {"data:1": 1, "data:2,fsdp:2": 4, "sequence:2": 2}[mesh]
        row = {"implementation": step_speed.OURS, "parameters": 7, "devices": devices}
        row |= dict.fromkeys(("median_ms", "min_ms", "max_ms"), 10.0 if devices == 1 else 12.5)
        return [row | {"compile_s": 1.0, "first_loss": 5.0, "last_loss": 4.0}]

    monkeypatch.setattr(step_speed, "our_rows", timed)
    meshes = "data:1;data:2,fsdp:2;sequence:2"
    step_speed.command([f"--workdir={tmp_path}", *TINY, f"--meshes={meshes}"])
    rows = rows_of(tmp_path)
    assert asked == [("data:1", (2, 9)), ("data:2,fsdp:2", (8, 9)), ("sequence:2", (2, 9))]
    assert [row["tokens_per_s"] for row in rows] == [1600, 5120, 1280]
    assert [row["of_the_first"] for row in rows] == pytest.approx([1, 0.8, 0.4])
    assert f'--meshes="{meshes}"' in (tmp_path / "step.md").read_text().replace(" \\\n   ", "")


@pytest.mark.parametrize(
    ("argument", "line"),
    [
        ("--meshes=data:2;rows:2", "mesh='rows:2' is not known"),
        ("--meshes=data:-1", "meshes='data:-1' must give sizes"),
        ("--meshes=data:2 --peer=fla", "peer='fla' runs on one device"),
    ],
)
def test_meshes_that_make_no_sense_are_one_line(tmp_path, argument, line, capsys):
    argv = [f"--workdir={tmp_path}", *TINY, *argument.split()]
    assert flags.run(step_speed.command, argv) == 2
    (told,) = capsys.readouterr().err.strip().splitlines()
    assert line in told


def test_times_of_kernels_are_added_up_by_kind_and_the_largest_shown():
    times = {"fusion_2": 3.0, "nvjet_128x160": 2.0, "fusion.31": 1.5, "walk": 4.0}
    kinds = by_kind(times)
    assert list(kinds.items()) == [("fusion", 4.5), ("walk", 4.0), ("nvjetx", 2.0)]
    row = {"implementation": "ours", "num_householder": 2, "num_heads": 4, "mesh": "data:1"}
    row["error"] = "none"
    shown = step_speed.table([row | {"kernels_ms": kinds}])
    assert shown.endswith("| 2 | `fusion` | 4.5 |\n| 2 | `walk` | 4 |\n| 2 | `nvjetx` | 2 |")
    many = {f"k{chr(97 + i)}": 20.0 - i for i in range(20)}
    assert step_speed.table([row | {"kernels_ms": many}]).endswith("| 2 | `kj` | 11 |")


def test_the_narrow_model_is_that_of_state_tracking():
    config = step_speed.StepConfig(**step_speed.PRESETS["narrow"])
    (model,) = map(config.model, config.models)
    paper = state_tracking.PRESETS["paper"]
    told = {"vocab_size", "initializer", "initializer_range"}  # of the task; of the first step
    for field in dataclasses.fields(model):
        if field.name in paper and field.name not in told:
            assert getattr(model, field.name) == paper[field.name], field.name
    assert not model.value_of("use_short_conv")
    (shape,) = config.models
    assert (shape.batch_size, shape.length) == (paper["batch_size"], paper["train_length"] + 1)


def test_our_own_failure_fails_the_command(tmp_path, inline, monkeypatch, capsys):
    def fails(*_):
        raise ConfigError("out of memory")

    monkeypatch.setattr(step_speed, "our_rows", fails)
    assert flags.run(step_speed.command, [f"--workdir={tmp_path}", *TINY]) == 2
    assert "our own model did not run: ConfigError: out of memory" in capsys.readouterr().err


def test_every_field_of_the_model_is_a_flag_that_reaches_it():
    base = step_speed.StepConfig(**step_speed.PRESETS["small"])
    changes = {
        "vocab_size": 300, "hidden_size": (32,), "num_layers": 1, "num_householder": (3, 2),
        "num_heads": (4, 1), "head_dim": 8, "intermediate_size": (64, 128), "gated": (0, 1),
        "dtype": "float32", "remat": ("none",), "implementation": "chunked",
        "use_short_conv": False, "tie_embeddings": False, "conv_implementation": "plain",
    }  # fmt: skip
    models = lambda config: [config.model(model) for model in config.models]
    for name, value in changes.items():
        assert models(dataclasses.replace(base, **{name: value})) != models(base), name
    for name in ("batch_size", "length"):
        changed = dataclasses.replace(base, **{name: (5,)})
        shapes = [c.tokens(c.models[0]).shape for c in (changed, base)]
        assert shapes[0] != shapes[1]
    # Seen in the tests above.
    told = {"steps", "repeats", "budget_s", "meshes", "peer", "peer_precisions", "gpus", "at_once"}
    known = {*changes, *told, "batch_size", "length"}
    assert known == {field.name for field in dataclasses.fields(step_speed.StepConfig)}


def test_the_peer_is_told_the_shape_of_ours():
    config = step_speed.StepConfig(gated=(0, 1))
    got = peer_config(config.model(config.models[1]))
    assert got == {
        "hidden_size": 1024, "num_hidden_layers": 24, "num_heads": 4, "head_dim": 128,
        "expand_v": 1.0, "num_householder": 2, "intermediate_size": 2816,
        "use_forget_gate": True, "use_output_gate": False, "use_short_conv": True, "conv_size": 4,
        "allow_neg_eigval": True, "norm_eps": 1e-6, "tie_word_embeddings": True,
        "initializer_range": 0.006, "vocab_size": 32000,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("argument", "text"),
    [
        ("--length=0", "length=0 is too small"),
        ("--length=8,8,8", "length=(8, 8, 8) must have one number, or one for each of num_house"),
        ("--gated=2", "gated=2 is not known"),
        ("--meshes=data:1|data:1|data:1", "must have one list, or | between one for each of"),
        ("--gpus=2 --meshes=data:2", "gpus=2 shares out models of one device"),
        ("--num_heads=4", "num_heads=(4,) must have a number for each of num_householder=(1, 2)"),
        ("--remat=all", "remat='all' is not known"),
        ("--dtype=float16", "dtype='float16' is not known"),
        ("--peer=torch", "peer='torch' is not known"),
        ("--peer_precisions=masters,int8", "peer_precisions='int8' is not known"),
        ("--peer=fla", "peer=fla needs torch"),
    ],
)
def test_errors_are_one_line(argument, text, tmp_path, inline, capsys):
    assert flags.run(step_speed.command, [f"--workdir={tmp_path}", *argument.split()]) == 2
    error = capsys.readouterr().err
    assert text in error
    assert error.count("\n") == 1
    assert not list(tmp_path.iterdir())
