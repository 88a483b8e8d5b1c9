"""The experiment from its command line: results, refusals, and no flag that does nothing."""

import dataclasses
import errno
import functools
import json
import os
import re
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import nnx
from quick import quick
from tiny_run import curve, flags_for, rows_in, snapshot

from deltaproduct_jax import files
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.training import checkpoints, loop, optimizer
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.step import init_state, split_model
from experiments import language_modeling, state_tracking
from experiments.lib import flags

pytestmark = pytest.mark.usefixtures("compiled_once", "tiny_model")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled_once, tiny_model):
    """A run that nobody disturbed; tests only read it."""
    workdir = tmp_path_factory.mktemp("finished")
    assert state_tracking.main(flags_for(workdir)) == 0
    return workdir


def test_a_run_prints_its_table_and_draws_its_curve(finished, capsys):
    before = snapshot(finished)
    assert state_tracking.main(flags_for(finished)) == 0
    assert snapshot(finished) == before
    results = json.loads((finished / "results.json").read_text())
    head, names, *lines = capsys.readouterr().out.splitlines()
    assert head == f"best checkpoint: step {results['best_step']} of 12; test split:"
    columns = ["length", "token", "sequence", "token with BOS", "sequence with BOS"]
    assert re.split("  +", names) == columns
    for line, entry in zip(lines, results["test"], strict=True):
        strict, paper = entry["strict"], entry["paper"]
        want = [strict["token_accuracy"], strict["sequence_accuracy"]]
        want += [paper["token_accuracy"], paper["sequence_accuracy"]]
        assert line.split() == [str(entry["length"]), *(f"{value:.4f}" for value in want)]
    assert (finished / "cumulative.png").read_bytes().startswith(b"\x89PNG")


def test_a_saved_config_runs_again_to_the_same_curve(finished, tmp_path):
    argv = [f"--config={finished / 'config.json'}", f"--workdir={tmp_path}"]
    assert state_tracking.main(argv) == 0
    assert curve(rows_in(tmp_path)) == curve(rows_in(finished))
    assert (tmp_path / "config.json").read_bytes() == (finished / "config.json").read_bytes()


def full_disk(patch, finished):
    def put(path, data, mode):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(files, "_put", put)


def read_only_disk(patch, finished):
    def put(path, data, mode):
        raise OSError(errno.EROFS, os.strerror(errno.EROFS))

    patch.setattr(files, "_put", put)


def full_disk_under_orbax(patch, finished):
    def save(self, *args, **kwargs):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    patch.setattr(checkpoints.ocp.CheckpointManager, "save", save)


def write(name, content):
    return lambda patch, workdir: (workdir / name).write_bytes(content)


def unfinished(*then):
    """The run without its results, so that the command goes on with it."""

    def prepare(patch, workdir):
        (workdir / "results.json").unlink()
        for step in then:
            step(patch, workdir)

    return prepare


def other_model(patch, workdir):
    directory = workdir / "checkpoints"
    newest = max(directory.iterdir(), key=lambda path: int(path.name))
    shutil.rmtree(directory)
    with checkpoints.Checkpoints(directory) as store:
        model = tiny_run.TinyModel(ModelConfig(vocab_size=99, hidden_size=4), rngs=nnx.Rngs(0))
        state = init_state(split_model(model)[1], optimizer.make_optimizer(TrainConfig()))
        store.save(state, int(newest.name), (1.0,))


def damaged_checkpoints(patch, workdir):
    for path in (workdir / "checkpoints").rglob("d/*"):
        path.write_bytes(b"")


def only(name):
    """A directory that holds nothing but ``name``."""

    def prepare(patch, workdir):
        for path in workdir.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
        (workdir / name).write_text("")

    return prepare


# What is wrong: (flags added, what is done to a finished run before, what the line says).
ERRORS = {
    "unknown group": (["--group=S99x"], None, r"group='S99x' is not known; it may be one of Sn"),
    "group too large": (["--group=S9"], None, r"group='S9' has too many elements"),
    "unknown flag": (["--stepz=3"], None, r"command line flag 'stepz'. Did you mean: steps"),
    "not a number": (["--steps=many"], None, r"flag --steps=many: it must be a whole number"),
    "no value": (["--steps"], None, r"Missing value for flag --steps"),
    "not lengths": (["--eval_lengths=4;8"], None, r"flag --eval_lengths=4;8: it must be whole num"),
    "lengths descend": (["--eval_lengths=8,4"], None, r"eval_lengths=\(8, 4\) must ascend"),
    "not a bool": (["--allow_neg_eigval=2"], None, r"flag --allow_neg_eigval=2"),
    "unknown preset": (["--preset=huge"], None, r"flag --preset=huge"),
    "stray argument": (["S3"], None, r"argument 'S3' is no flag"),
    "unknown mixer": (["--mixer=lstm"], None, r"mixer='lstm' is not known; it may be one of"),
    "unknown schedule": (["--schedule=step"], None, r"schedule='step' is not known"),
    "unknown filler": (["--filler=x"], None, r"filler='x' is not known"),
    "no factors": (["--num_householder=0"], None, r"num_householder=0 is too small"),
    "no steps": (["--steps=0"], None, r"steps=0 is too small; it must be at least 1"),
    "parts of a batch": (
        ["--accumulation_steps=3"], None, r"batch_size=8 must be a multiple of accumulation",
    ),
    "parts of an evaluation": (["--eval_batch_size=7"], None, r"eval_sequences=32 must be a mult"),
    "long curriculum": (["--curriculum=9"], None, r"curriculum=\(9,\) must not exceed train"),
    "idle filler": (["--filler=symbol"], None, r"filler='symbol' fills nothing"),
    "points of numbers": (["--max_displaced=2"], None, r"max_displaced=2 counts the points"),
    "no config file": (["--config=absent.json"], None, r"--config=absent\.json cannot be read"),
    "preset and config": (["--preset=paper", "--config=c"], None, r"exclude each other"),
    "another run": (["--seed=5"], None, r"differing in seed \(0 there, 5 here\); give"),
    "torn config": ([], write("config.json", b'{"task'), r"config\.json is not valid JSON"),
    "binary config": ([], write("config.json", b"\xff\xfe\x00"), r"config\.json is not valid JSON"),
    "torn results": ([], write("results.json", b"{"), r"results\.json is not valid JSON"),
    "no config": ([], only("metrics.jsonl"), r"has metrics\.jsonl but no config\.json"),
    "torn run.json": ([], unfinished(write("run.json", b"{")), r"run\.json is not valid JSON"),
    "damaged metrics": (
        [], unfinished(write("metrics.jsonl", b"{}\n")), r"metrics\.jsonl, line 1: step is missing",
    ),
    "lost metrics": (
        [], unfinished(write("metrics.jsonl", b"")), r"does not hold every record up to step 12",
    ),
    "another model": (
        [], unfinished(other_model), r"checkpoint 12 in .* is of another model: .* there, .* here",
    ),
    "damaged checkpoint": (
        [], unfinished(damaged_checkpoints), r"checkpoint 12 .* is damaged: .*--resume_from=",
    ),
    "full disk": ([], unfinished(full_disk), r"cannot be written: No space left on device"),
    "read-only disk": ([], unfinished(read_only_disk), r"cannot be written: Read-only"),
    "full disk at the start": (
        ["--workdir=new"], full_disk, r"new/config\.json cannot be written: No space left",
    ),
    "full disk at a checkpoint": (
        ["--workdir=new"], full_disk_under_orbax, r"new/checkpoints cannot be written: .*No space",
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("error::pytest.PytestUnraisableExceptionWarning")
@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_and_cost_nothing(case, finished, tmp_path, monkeypatch, capsys):
    added, prepare, says = ERRORS[case]
    workdir = tmp_path / "run"
    shutil.copytree(finished, workdir)
    monkeypatch.chdir(tmp_path)
    if prepare is not None:
        prepare(monkeypatch, workdir)
    before = snapshot(workdir)
    capsys.readouterr()
    code = state_tracking.main([*flags_for(workdir), *added])
    shown = capsys.readouterr()
    lines = [line for line in shown.err.splitlines() if not line.startswith("step ")]
    assert code != 0
    assert len(lines) == 1, shown.err
    assert re.match(r"error: ", lines[0])
    assert re.search(says, lines[0])
    assert shown.out == ""
    assert snapshot(workdir) == before


def test_a_missing_workdir_is_one_line(capsys):
    assert state_tracking.main([]) == language_modeling.main(["--workdir="]) == 2
    assert capsys.readouterr().err.count("error: --workdir is missing") == 2


# A base in which every field has something to do, and another value for each.
LIVELY = {
    "group": "S3",
    "eval_lengths": (4,),
    "curriculum": (2,),
    "clip_norm": 1.0,
    "warmup_steps": 2,
}
CHANGES = {
    "group": "Z6",
    "train_length": 5,
    "eval_lengths": (4, 8),
    "max_displaced": 2,
    "merge_elements": 2,
    "repeat_elements": 2,
    "filler": "input_symbol",
    "steps": 11,
    "batch_size": 4,
    "accumulation_steps": 2,
    "learning_rate": 0.02,
    "schedule": "constant",
    "warmup_steps": 3,
    "end_learning_rate": 0.01,
    "weight_decay": 0.1,
    "adam_b1": 0.8,
    "adam_b2": 0.9,
    "adam_eps": 1e-2,
    "clip_norm": 1e-3,
    "curriculum": (3,),
    "curriculum_fraction": 0.2,
    "grow_from": 2,
    "growth": "geometric",
    "optimizer": "muon",
    "muon_momentum": 0.5,
    "decay_fraction": 0.5,
    "decayed": "matrices",
    "z_loss": 0.1,
    "spike_deviations": 0.5,
    "seed": 1,
    "log_every": 1,
    "eval_every": 3,
    "checkpoint_every": 5,
    "eval_sequences": 16,
    "eval_batch_size": 32,
    "select_length": 3,
    "stop_accuracy": 1e-9,
}


def outcome(workdir, **fields):
    """What a run of these fields leaves, the clock and the picture apart."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state_tracking, "plot_cumulative", lambda *_: None)
        assert state_tracking.main(flags_for(workdir, **(LIVELY | fields))) == 0
    kept = {path.name for path in (workdir / "checkpoints").iterdir()}
    return curve(rows_in(workdir)), kept, tiny_run.outcome(workdir)


@pytest.fixture(scope="module")
def lively(tmp_path_factory, compiled_once):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SequenceModel", tiny_run.TinyModel)
        return outcome(tmp_path_factory.mktemp("lively"))


# Of one result to rounding, and of what only broken steps show; both have tests of their own.
UNSEEN = ("loss_chunk_size", "max_skipped_steps")
FIELDS = (*dataclasses.fields(GroupTask), *dataclasses.fields(TrainConfig))
RUN_FIELDS = [field.name for field in FIELDS if field.name not in UNSEEN]
# What gives a field something to do, where the base does not.
NEEDED = {
    "filler": {"repeat_elements": 2},  # fills only what is repeated
    "grow_from": {"curriculum": ()},  # of sequences of the full length
    "growth": {"curriculum": (), "grow_from": 1, "train_length": 8, "curriculum_fraction": 0.9},
    "muon_momentum": {"optimizer": "muon"},
    "decay_fraction": {"schedule": "wsd", "end_learning_rate": 1e-4},
    "decayed": {"weight_decay": 0.5},
    "stop_accuracy": {"group": "Z2", "learning_rate": 0.2, "steps": 60},  # only what has learnt
    "spike_deviations": {"steps": 200},  # after a hundred steps
}
QUICK = ("group", "learning_rate", "seed")


@pytest.mark.parametrize("name", quick(RUN_FIELDS, QUICK))
def test_every_field_of_task_and_training_changes_the_run(name, lively, tmp_path):
    fields = NEEDED.get(name, {})
    base = outcome(tmp_path / "base", **fields) if fields else lively
    assert outcome(tmp_path / "changed", **fields, **{name: CHANGES[name]}) != base


def test_the_same_fields_give_the_same_run(lively, tmp_path):
    assert outcome(tmp_path) == lively


MODEL_CHANGES = {
    "mixer": "gated_delta_product",
    "hidden_size": 24,
    "num_layers": 2,
    "num_heads": 4,
    "num_v_heads": 4,
    "head_dim": 4,
    "expand_v": 2.0,
    "num_householder": 3,
    "allow_neg_eigval": False,
    "qk_activation": "none",
    "beta_bias": 1.0,
    "initial_gate": 0.9,
    "use_output_gate": True,
    "use_short_conv": True,
    "conv_size": 3,
    "max_length": 16,
    "intermediate_size": 24,
    "hidden_ratio": 64.0,
    "norm_eps": 1e-3,
    "tie_embeddings": True,
    "initializer": "fla",
    "initializer_range": 0.1,
    "dtype": "bfloat16",
    "param_dtype": "bfloat16",
    "implementation": "recurrent",
    "chunk_size": 4,
    "remat": "blocks",
    "scan_layers": True,
    "attention_every": 2,
    "attention_layers": 0,
}
OF_ATTENTION = {"attention_heads": 8, "num_kv_heads": 1, "qkv_bias": True, "window_size": 3}
OF_ATTENTION |= {"rope_theta": 100.0}
MODEL_CHANGES |= OF_ATTENTION
# Fields that act only together with another.
MODEL_NEEDS = {
    "initial_gate": ["--mixer=gated_delta_product"],
    "conv_size": ["--use_short_conv"],
    "hidden_ratio": ["--intermediate_size=none"],
    "max_length": ["--mixer=transformer", "--implementation=none", "--qk_activation=auto"],
    "scan_layers": ["--num_layers=2"],
    "attention_every": ["--num_layers=2"],
    "attention_layers": ["--num_layers=2"],
}
MODEL_NEEDS |= {name: ["--num_layers=2", "--attention_layers=1"] for name in OF_ATTENTION}
MODEL_BASE = [
    "--workdir=w", "--hidden_size=16", "--num_heads=2", "--head_dim=8", "--intermediate_size=16",
    "--qk_activation=silu", "--beta_bias=none", "--implementation=chunked",
]  # fmt: skip


def configure(argv) -> RunConfig:
    parsed = flags.parse(
        argv, state_tracking.SECTIONS, state_tracking.PRESETS, exclude=["vocab_size"]
    )
    return state_tracking.configure(parsed.sections)


@functools.cache  # most fields have the same base
def model_of(*argv):
    """The parameters a command starts from, and the program that computes its logits."""
    model = SequenceModel(configure(argv).model, rngs=nnx.Rngs(0))
    definition, params = split_model(model)
    tokens = jnp.zeros((1, 8), dtype=jnp.int32)
    with jax.numpy_dtype_promotion("standard"):  # for Flax's norm of bfloat16
        program = jax.make_jaxpr(lambda params: definition.with_params(params)(tokens))(params)
    leaves = jax.tree_util.tree_flatten_with_path(params)[0]
    return str(program), [(str(path), np.asarray(leaf).tobytes()) for path, leaf in leaves]


# The task has the vocabulary; the others are seen in models/test_stack.py and ops/kernels/.
ELSEWHERE = ("vocab_size", "saved_points", "conv_implementation")
MODEL_FIELDS = [f.name for f in dataclasses.fields(ModelConfig) if f.name not in ELSEWHERE]


@pytest.mark.parametrize("name", MODEL_FIELDS)
def test_every_field_of_the_model_reaches_it(name):
    base = [*MODEL_BASE, *MODEL_NEEDS.get(name, [])]
    changed = [*base, f"--{name}={MODEL_CHANGES[name]}"]
    assert model_of(*changed) != model_of(*base)


@pytest.mark.parametrize("preset", state_tracking.PRESETS)
def test_presets_are_whole_runs(preset):
    config = configure(["--workdir=w", f"--preset={preset}"])
    values = {}
    for section in (config.task, config.model, config.train):
        values |= dataclasses.asdict(section)
    for name, value in state_tracking.PRESETS[preset].items():
        assert values[name] == value


def test_the_paper_preset_is_the_published_setup():
    config = configure(["--workdir=w", "--preset=paper"])
    with_params = nnx.eval_shape(lambda: SequenceModel(config.model, rngs=nnx.Rngs(0)))
    sizes = [leaf.size for leaf in jax.tree.leaves(split_model(with_params)[1])]
    assert sum(sizes) == 561_312  # S5, one layer, 8 heads, n_h = 4
    assert config.train.steps * config.train.batch_size == pytest.approx(100 * 2_000_000, rel=1e-4)
