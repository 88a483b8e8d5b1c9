"""What commands leave whose measurements need other machines or minutes, and what they refuse."""

import itertools
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.ops.kernels.triton.tiling import Launch
from experiments.hardware import fla_check, gpu_compile, gpu_launches
from experiments.language import data_speed
from experiments.lib import flags
from experiments.lib.bench import gpu_kernels, training_steps
from experiments.lib.bench.peers import fla
from experiments.op import generation_speed, step_compile


def cells(text):
    """The cells of the first table of a page, without its head."""
    lines = [line for line in text.splitlines() if line.startswith("|")]
    assert len({line.count("|") for line in lines}) == 1
    return [[cell.strip() for cell in line.strip("|").split("|")] for line in lines[2:]]


def record_in(folder, name):
    return json.loads((folder / f"{name}.json").read_text())


@pytest.fixture
def no_peer(monkeypatch):
    """flash-linear-attention as if it were there, never called."""
    for name in ("check_peer", "take_first_launches"):
        monkeypatch.setattr(fla_check, name, lambda: None)


@pytest.mark.usefixtures("no_peer")
def test_models_are_compared_of_every_kind(tmp_path, monkeypatch, capsys):
    asked = []

    def errors(R, gated, dtype, options):
        asked.append((R, gated, dtype, options.seed))
        return {"ours_there": 1e-3 * R, "theirs_here": 2e-3}

    monkeypatch.setattr(fla_check, "_errors", errors)
    fla_check.command([f"--workdir={tmp_path}", "--num_householder=2,1", "--seed=5"])
    kinds = list(itertools.product((2, 1), (False, True), ("float32", "bfloat16")))
    assert asked == [(*kind, 5) for kind in kinds]
    found = cells(capsys.readouterr().out)
    assert [line[:3] for line in found] == [[str(part) for part in kind] for kind in kinds]
    assert found[0][3:] == ["2.0e-03", "2.0e-03"]
    assert found == cells((tmp_path / "fla_check.md").read_text())


@pytest.mark.usefixtures("no_peer")
def test_what_was_compared_stays_when_the_peer_breaks_down(tmp_path, monkeypatch):
    def errors(R, gated, dtype, options):
        if gated:
            raise RuntimeError("an illegal memory access was encountered")
        return {"ours_there": 0.5, "theirs_here": 0.25}

    monkeypatch.setattr(fla_check, "_errors", errors)
    with pytest.raises(RuntimeError, match="illegal memory access"):
        fla_check.command([f"--workdir={tmp_path}", "--num_householder=1"])
    assert [row["dtype"] for row in record_in(tmp_path, "fla_check")["rows"]] == [
        "float32", "bfloat16",
    ]  # fmt: skip


SHAPE = ["--batch_size=1", "--length=64", "--num_heads=1", "--num_householder=2", "--head_dim=16"]


def call(launch):
    array = jax.ShapeDtypeStruct((2, 8), jnp.bfloat16)
    meta = {"M": 4, "CP": 2, "BK": 16}
    return gpu_kernels.KernelCall("prepare", (array,), (array,), (3, 2), launch, meta)


@pytest.fixture
def launched(monkeypatch):
    """Kernels that take as many milliseconds as warps, and not more than eight of these."""

    def call_of(config, R, K, kernel, launch):
        return call(launch or Launch(4, 1, 32))

    def time_call(call, repeats):
        if call.launch.warps > 8:
            raise RuntimeError("out of shared memory:\n" + "x" * 200)
        return float(call.launch.warps), float(call.launch.warps + repeats)

    monkeypatch.setattr(gpu_launches, "require_gpu", lambda script: None)
    monkeypatch.setattr(gpu_launches, "call_of", call_of)
    monkeypatch.setattr(gpu_launches, "time_call", time_call)


@pytest.mark.usefixtures("launched")
def test_variants_stand_beside_what_is_chosen_and_one_that_cannot_run_says_why(tmp_path, capsys):
    argv = [*SHAPE, "--kernels=prepare", "--variants=2:1:64,16:3:16:32", "--repeats=3"]
    gpu_launches.command([f"--workdir={tmp_path}", *argv])
    chosen, slim, wide = cells(capsys.readouterr().out)
    assert chosen[:9] == ["2", "16", "prepare", "yes", "4", "1", "32", "-", "4.00"]
    assert slim[3:10] == ["no", "2", "1", "64", "-", "2.00", "5.00"]
    assert wide[3:8] == ["no", "16", "3", "16", "32"]
    assert wide[8:10] == ["out of shared memory:", "-"]
    rows = record_in(tmp_path, "launches")["rows"]
    assert [row["chosen"] for row in rows] == [True, False, False]
    assert [row.get("most_ms") for row in rows] == [7.0, 5.0, None]


@pytest.mark.usefixtures("launched")
def test_what_the_tiling_says_must_run(monkeypatch):
    def broken(call, repeats):
        raise RuntimeError("no kernel image")

    monkeypatch.setattr(gpu_launches, "time_call", broken)
    config = gpu_launches.LaunchesConfig(kernels=("prepare",))
    with pytest.raises(RuntimeError, match="no kernel image"):
        gpu_launches.rows_of(config, 1, 64, "prepare")


@pytest.mark.parametrize("text", [
    "", "4", "4:2", "4:2:64:32:1", "3:2:64", "0:2:64", "4:2:48", "4:2:x", "4:2:-64", "4::64",
    "4:2:²", f"4:2:{'1' * 5000}",
])  # fmt: skip
def test_a_launch_that_is_none(text):
    with pytest.raises(ConfigError, match=r"variants=.* is not warps:stages:columns"):
        gpu_kernels.as_launch(text)
    assert gpu_kernels.as_launch("4:3:64") == Launch(4, 3, 64)
    assert gpu_kernels.as_launch("8:1:64:32") == Launch(8, 1, 64, 32)


def test_launches_need_a_gpu_and_known_kernels(tmp_path, capsys):
    assert flags.run(gpu_launches.command, [f"--workdir={tmp_path}", *SHAPE]) == 2
    assert "gpu_launches needs a GPU; JAX runs on cpu" in capsys.readouterr().err
    assert flags.run(gpu_launches.command, [f"--workdir={tmp_path}", "--kernels=walk,run"]) == 2
    assert "kernels='run' is not known" in capsys.readouterr().err
    assert not list(tmp_path.iterdir())


def test_floors_count_what_is_read_and_multiplied():
    found = gpu_kernels.floors("prepare", call(None).arrays, (3, 2), call(None).meta)
    products = 6 * (4 * 4 * 16 + 2 * 4 * 16 + 4**3 // 2)
    assert (found["bytes"], found["operations"]) == (2 * 8 * 2, 2 * products)
    assert found["floor_bytes_ms"] == pytest.approx(1e3 * 32 / gpu_kernels.BANDWIDTH)
    assert found["floor_operations_ms"] == pytest.approx(1e3 * 2 * products / gpu_kernels.PEAK)


def test_a_summary_reads_no_queries_and_is_no_program_of_the_last_piece():
    arrays = [jax.ShapeDtypeStruct((4,), jnp.float32)] * 7
    meta = {"M": 4, "CP": 2, "BK": 16, "BV": 8, "V": 8, "TWO": False, "STEPS": 5}
    whole = gpu_kernels.floors("walk", arrays, (2, 3, 7), meta | {"SUMMARY": False})
    part = gpu_kernels.floors("walk", arrays, (2, 3, 7), meta | {"SUMMARY": True})
    assert (whole["bytes"], part["bytes"]) == (7 * 16, 5 * 16)
    state, read = 2 * 4 * 16 * 8 + 4 * 4 * 8, 2 * 16 * 8 + 2 * 4 * 8  # products of a chunk
    assert whole["operations"] == 2 * 5 * (state + read) * (2 * 3 * 7)
    assert part["operations"] == 2 * 5 * state * (1 * 2 + 1 * 1) * 7


def test_a_row_of_compiled_kernels_has_its_cells():
    row = {
        "num_householder": 2, "head_dim": 64, "kernel": "walk (summary)", "grid": [2, 4, 8],
        "warps": 4, "registers": 255, "spilt_bytes": 16, "spills_in_loops": 3,
        "shared_bytes": 100 * 1024, "programs_a_multiprocessor": 2, "bytes": 5e6,
        "operations": 7e9, "floor_bytes_ms": 0.125, "floor_operations_ms": 1.5,
    }  # fmt: skip
    assert cells(gpu_compile.table([row])) == [
        ["2", "64", "walk (summary)", "2x4x8", "4", "255", "16", "3", "100", "2", "5", "7",
         "0.12", "1.50"],
    ]  # fmt: skip


def test_reading_rows_is_held_against_one_batch_that_is_kept():
    found = {data_speed.WITH: [900.0, 1100.0, 990.0], data_speed.WITHOUT: [1000.0, 1100.0, 900.0]}
    assert cells(data_speed.table(found)) == [
        ["rows from disk", "990", "900", "1,100", "0.990"],
        ["one batch, kept", "1,000", "900", "1,100", "1.000"],
    ]
    with pytest.raises(ConfigError, match="steps_a_round=0 is too small"):
        data_speed.RoundConfig(steps_a_round=0)


@pytest.mark.parametrize(
    ("sizes", "says"),
    [
        (
            ["--batch_size=2000000000"],
            "^train_length=32 and batch_size=2000000000 need at least .* GiB",
        ),
        (
            ["--eval_lengths=16,900000000", "--eval_batch_size=2"],
            "^eval_lengths=900000000 and eval_batch_size=2 need at least .* GiB",
        ),
        (
            ["--select_length=800000000", "--eval_batch_size=2"],
            "^select_length=800000000 and eval_batch_size=2 need at least .* GiB",
        ),
        (["--intermediate_size=100000000000"], "^num_layers=1 and hidden_size=16 need at least"),
        (["--num_heads=4000000000"], "^parameters of this size need at least .* GiB"),
    ],
)
def test_reading_rows_is_not_timed_where_there_is_no_memory_for_it(sizes, says, tmp_path):
    argv = ["--hidden_size=16", "--head_dim=8", "--train_length=32", "--eval_lengths=32"]
    with pytest.raises(ConfigError, match=says):
        data_speed.command([f"--workdir={tmp_path}", "--preset=small", *argv, *sizes])


@pytest.mark.slow
def test_reading_rows_is_timed_in_a_real_run(tmp_path):
    sizes = (
        "hidden_size=16;num_heads=2;head_dim=8;intermediate_size=16;train_length=32;batch_size=2"
    )
    argv = [f"--{size}" for size in sizes.split(";")]
    argv += ["--eval_lengths=32", "--select_length=32", "--rounds=2", "--steps_a_round=2"]
    data_speed.command([f"--workdir={tmp_path}", "--preset=small", *argv])
    found = record_in(tmp_path, "data_speed")["tokens_per_s"]
    assert {name: len(speeds) for name, speeds in found.items()} == {
        data_speed.WITH: 2, data_speed.WITHOUT: 2,
    }  # fmt: skip
    assert min(itertools.chain(*found.values())) > 0


@pytest.mark.slow
def test_a_step_is_compiled_with_and_without_a_scan(tmp_path):
    argv = ["--model=tiny", "--num_layers=2", "--rows=1", "--length=32", "--vocab_size=64"]
    step_compile.command([f"--workdir={tmp_path}", *argv, "--chunks=0,16"])
    rows = record_in(tmp_path, "compile")["rows"]
    assert [(row["scan_layers"], row["loss_chunk_size"]) for row in rows] == [
        (True, None), (True, 16), (False, None), (False, 16),
    ]  # fmt: skip
    assert all(row["compile_s"] > 0 and row["temporary_mib"] > 0 for row in rows)


def test_compiling_is_timed_of_every_form(tmp_path, monkeypatch, capsys):
    asked = []

    def compiled(config, scanned, chunk):
        asked.append((scanned, chunk))
        times = {"compile_s": 12.4, "process_s": 20.6, "temporary_mib": 3.2}
        return {"scan_layers": scanned, "loss_chunk_size": chunk or None, **times}

    monkeypatch.setattr(step_compile, "compiled_row", compiled)
    step_compile.command([f"--workdir={tmp_path}", "--chunks=0,64", "--num_layers=2"])
    assert asked == [(True, 0), (True, 64), (False, 0), (False, 64)]
    found = cells(capsys.readouterr().out)
    assert [line[:2] for line in found] == [
        ["a scan", "all"], ["a scan", "64"], ["one by one", "all"], ["one by one", "64"],
    ]  # fmt: skip
    assert found[0][2:] == ["12", "21", "3"]
    assert len(record_in(tmp_path, "compile")["rows"]) == 4


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        (
            {"model": "340m"},
            "model='340m' is not known; it may be one of .'default', 'tiny', '213m_1'",
        ),
        ({"chunks": ()}, "chunks is empty; give one entry at least"),
        ({"chunks": (-1,)}, "chunks=-1 is too small; it must be at least 0"),
        ({"scans": (2,)}, r"scans=2 is not known; it may be one of \[0, 1\]"),
        ({"rows": 0}, "rows=0 is too small"),
    ],
)
def test_what_cannot_be_compiled(fields, says):
    with pytest.raises(ConfigError, match=says):
        step_compile.CompileConfig(**fields)


def test_what_is_compiled_is_the_presets_model():
    run = step_compile.CompileConfig(num_layers=3, length=64, rows=2).run(True, 32)
    assert (run.model.hidden_size, run.model.num_layers, run.model.scan_layers) == (1024, 3, True)
    assert (run.train.batch_size, run.train.loss_chunk_size) == (2, 32)
    assert run.task.train_length == run.task.test_lengths[0] == 64


def test_speeds_of_writing_are_medians_beside_the_loop(monkeypatch):
    seconds = {"loop": [2.0, 4.0, 8.0], "scan": [1.0, 0.5, 2.0]}
    loop, scan = generation_speed._rows("write", 3, 24, seconds)
    assert (loop["tokens_per_s"], loop["least"], loop["most"]) == (6.0, 3.0, 12.0)
    assert (scan["tokens_per_s"], scan["times_loop"]) == (24.0, 4.0)
    assert cells(generation_speed.table([loop, scan])) == [
        ["write", "3", "loop", "6", "3", "12", "1.00"],
        ["write", "3", "scan", "24", "12", "48", "4.00"],
    ]
    clock, order = itertools.count(), []
    monkeypatch.setattr(generation_speed.time, "perf_counter", lambda: float(next(clock)))
    runs = {name: lambda name=name: order.append(name) for name in "ab"}
    assert generation_speed.timed(runs, 2) == {"a": [1.0, 1.0], "b": [1.0, 1.0]}
    assert order == ["a", "b"] * 3  # once to warm up


def test_texts_that_differ_are_not_timed(monkeypatch):
    written = {name: np.full((1, 10), name == "loop_unread") for name in generation_speed.NAMES}
    runs = {name: lambda text=text: text for name, text in written.items()}
    monkeypatch.setattr(generation_speed, "writers", lambda *_: runs)
    with pytest.raises(ConfigError, match="loop_unread writes other texts than scan: 0% are the"):
        list(generation_speed.measure(None, generation_speed.SpeedConfig(rows=(1,)), None))


def test_what_a_peer_refuses_is_one_line_that_names_the_shape():
    def refuses():
        raise RuntimeError("PassManager::run failed")

    with pytest.raises(ConfigError, match=r"the peer cannot run forward at .*K=4.*: PassManager"):
        fla._refusals_named(refuses, "forward", "Shape(K=4)")()
    assert fla._refusals_named(lambda: 7, "forward", None)() == 7


def test_what_stops_a_measurement_apart_becomes_its_row(monkeypatch, capsys):
    def fails(error):
        raise error

    monkeypatch.setattr(training_steps, "apart", lambda function, *arguments: function(*arguments))
    case = lambda error: training_steps.Case(fails, "fla", (error,), {"mesh": "data:1"})
    [row] = training_steps.measured([case(ValueError("a\n  b " + "x" * 400))])
    known = {"implementation": "fla", "mesh": "data:1"}
    assert row == [known | {"error": "ValueError: a b " + "x" * 296}]
    assert "Traceback" in capsys.readouterr().err
    [row] = training_steps.measured([case(ConfigError("no GPU"))])
    assert row == [known | {"error": "ConfigError: no GPU"}]
    assert "Traceback" not in capsys.readouterr().err
    silent = types.SimpleNamespace(cost_analysis=dict)
    assert training_steps.moved_bytes(silent) == 0.0
