"""Whole runs of a model that compiles at once: what they record, select, report and refuse."""

import errno
import json
import os
import re
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest
import tiny_run
from flax import nnx
from quick import quick
from tiny_run import curve, lasting, outcome, rows_in, run_config, snapshot

from deltaproduct_jax import files
from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.tasks.task import batch_key
from deltaproduct_jax.training import loop, progress
from deltaproduct_jax.training.checkpoints import Checkpoints
from deltaproduct_jax.training.optimizer import make_optimizer, make_schedule
from deltaproduct_jax.training.progress import Progress, Stopwatch
from deltaproduct_jax.training.step import (
    init_state,
    loss_and_correct,
    make_train_step,
    split_model,
)
from deltaproduct_jax.training.together import group

pytestmark = pytest.mark.usefixtures("compiled_once", "tiny_model")


def train(workdir, **fields):
    return loop.train(run_config(**fields), workdir, ["test"])


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled_once, tiny_model):
    """A run that nobody disturbed; tests only read it."""
    workdir = tmp_path_factory.mktemp("finished")
    train(workdir)
    return workdir


def test_a_run_leaves_its_records(finished):
    assert {path.name for path in finished.iterdir()} == {
        "config.json", "run.json", "metrics.jsonl", "results.json", "checkpoints",
        "events.out.tfevents.0.run",
    }  # fmt: skip
    assert json.loads((finished / "config.json").read_text()) == run_config().to_dict()
    rows = rows_in(finished)
    assert [row["step"] for row in rows] == [2, 4, 6, 8, 10, 12]
    assert [row["step"] for row in rows if "valid_loss" in row] == [4, 8, 12]
    assert [row["tokens"] for row in rows] == [step * 8 * 4 for step in (2, 4, 6, 8, 10, 12)]
    assert all(row["tokens_per_second"] > 0 for row in rows)
    (start,) = json.loads((finished / "run.json").read_text())["starts"]
    assert start["argv"] == ["test"]
    assert start["seeds"] == run_config().seeds()
    assert start["versions"]["jax"] == jax.__version__
    assert start["device_kind"] == jax.devices()[0].device_kind
    assert start["device_count"] == jax.device_count()
    assert start["resumed_from"] is None


def test_checkpoints_are_saved_as_often_as_said(tmp_path, monkeypatch):
    saved, save = [], Checkpoints.save
    noted = lambda self, state, step, *of: saved.append(step) or save(self, state, step, *of)
    monkeypatch.setattr(Checkpoints, "save", noted)
    train(tmp_path, steps=10, checkpoint_every=3, eval_every=10)
    assert saved == [3, 6, 9, 10]


def test_the_final_step_and_the_best_have_checkpoints(finished):
    results = json.loads((finished / "results.json").read_text())
    evaluated = {
        row["step"]: (row["valid_sequence_accuracy"], row["valid_token_accuracy"], row["step"])
        for row in rows_in(finished)
        if "valid_loss" in row
    }
    assert results["best_step"] == max(evaluated, key=evaluated.get)
    kept = {int(path.name) for path in (finished / "checkpoints").iterdir()}
    assert kept == {12, results["best_step"]}


def train_and_check_losses(workdir, fields, batch_of):
    """The rows of four steps, whose losses are those of the batches ``batch_of(draw, index)``."""
    train(workdir, **fields)
    config = run_config(**fields)
    definition, params = initial(config)
    optimizer = make_optimizer(config.train)
    update = jax.jit(make_train_step(definition, optimizer, make_schedule(config.train), 1))
    state, losses = init_state(params, optimizer), []
    batch = jax.jit(config.task.batch, static_argnums=(1, 2))
    draw = lambda index, length: batch(batch_key(data_key(config), "train", index), 8, length)
    for index in range(4):
        state, metrics = update(state, batch_of(draw, index))
        losses.append(float(metrics["loss"]))
    rows = rows_in(workdir)
    assert [row["loss"] for row in rows] == pytest.approx(losses, rel=1e-5)
    return rows


@pytest.mark.parametrize(
    ("flag", "value"),
    quick(
        [
            (jax.threefry_partitionable, False),
            (jax.default_prng_impl, "rbg"),
            (jax.disable_jit, True),
        ],
        [(jax.threefry_partitionable, False)],
        unpack=True,
    ),
)
def test_the_curve_hangs_on_no_mode_of_jax(flag, value, tmp_path, finished):
    with flag(value):
        train(tmp_path)
    expected = [row["loss"] for row in rows_in(finished)]
    assert [row["loss"] for row in rows_in(tmp_path)] == pytest.approx(expected, rel=1e-4)


def test_losses_by_hand(tmp_path):
    """Step n trains on the batch of index n - 1, of the length that the curriculum says."""
    fields = {"steps": 4, "log_every": 1, "curriculum": (2,), "curriculum_fraction": 0.5}
    rows = train_and_check_losses(tmp_path, fields, lambda draw, i: draw(i, (2, 2, 4, 4)[i]))
    assert [row["length"] for row in rows] == [2, 2, 4, 4]


def test_losses_of_a_growing_prefix_by_hand(tmp_path):
    """Sequences have the full length; BOS and a prefix of the answers count."""
    fields = {"steps": 4, "log_every": 1, "grow_from": 2, "curriculum_fraction": 0.75}

    def batch_of(draw, index):
        batch = draw(index, 4)
        return batch._replace(mask=batch.mask.at[:, 1 + (2, 3, 4, 4)[index] :].set(False))

    rows = train_and_check_losses(tmp_path, fields, batch_of)
    assert [row["length"] for row in rows] == [2, 3, 4, 4]
    assert rows[-1]["tokens"] == 4 * 8 * 4


def test_test_scores_by_hand(finished):
    config = run_config()
    results = json.loads((finished / "results.json").read_text())
    definition, params = initial(config)
    like = init_state(params, make_optimizer(config.train))
    with Checkpoints(finished / "checkpoints") as checkpoints:
        best = checkpoints.restore(results["best_step"], like=like).params
    assert [entry["length"] for entry in results["test"]] == [4, 6]
    draw = jax.jit(config.task.batch, static_argnums=(1, 2))
    score = jax.jit(lambda params, batch: loss_and_correct(definition, params, batch)[1])
    for position, entry in enumerate(results["test"]):
        corrects = []
        for index in (2 * position, 2 * position + 1):
            batch = draw(batch_key(data_key(config), "test", index), 16, entry["length"])
            corrects.append(np.asarray(score(best, batch)))
        correct = np.concatenate(corrects)
        assert entry["paper"]["token_accuracy"] == correct.mean()
        assert entry["strict"]["token_accuracy"] == correct[:, 1:].mean()
        assert entry["strict"]["sequence_accuracy"] == correct[:, 1:].all(axis=1).mean()
        assert len(entry["paper"]["cumulative"]) == entry["length"] + 1
    total = sum(leaf.size for leaf in jax.tree.leaves(params))
    assert results["parameters"] == {"total": total, "without_embedding": total - 10 * 8}


def data_key(config):
    return jax.random.key(config.seeds()["data"])


def initial(config):
    return split_model(tiny_run.TinyModel(config.model, rngs=nnx.Rngs(config.seeds()["init"])))


STOPPING = {
    "stop_accuracy": 1e-9,
    "steps": 200,
    "learning_rate": 0.2,
    "eval_every": 20,
    "log_every": 50,
    "checkpoint_every": 70,
}


def test_enough_accuracy_ends_a_run(tmp_path):
    results = train(tmp_path, **STOPPING)
    rows = rows_in(tmp_path)
    assert results["steps"] == rows[-1]["step"] < 200
    assert rows[-1]["valid_sequence_accuracy"] > 0
    assert all(row.get("valid_sequence_accuracy", 0) == 0 for row in rows[:-1])
    assert str(results["steps"]) in {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert train(tmp_path, **STOPPING) == results


def test_a_stopped_run_does_not_go_on_when_killed_before_its_results(tmp_path):
    results = train(tmp_path, **STOPPING)
    rows = rows_in(tmp_path)
    (tmp_path / "results.json").unlink()
    assert lasting(train(tmp_path, **STOPPING)) == lasting(results)
    assert rows_in(tmp_path) == rows


def test_a_finished_run_is_left_alone(finished):
    before = snapshot(finished)
    assert train(finished) == json.loads(before["results.json"])
    assert snapshot(finished) == before


def test_another_configuration_is_refused_by_name(finished):
    before = snapshot(finished)
    with pytest.raises(RunDirectoryError) as error:
        train(finished, learning_rate=0.5, group="Z4")
    assert "learning_rate (0.03 there, 0.5 here)" in str(error.value)
    assert 'group ("Z3" there, "Z4" here)' in str(error.value)
    assert "seed" not in str(error.value)
    assert "\n" not in str(error.value)
    assert snapshot(finished) == before


def test_a_loss_that_is_no_number_stops_the_run(tmp_path):
    with pytest.raises(FloatingPointError, match=r"training broke down in steps \d+ to \d+"):
        train(tmp_path, learning_rate=1e30, schedule="constant")
    # What was recorded before is whole, and the same command fails in the same way again.
    before = curve(rows_in(tmp_path))
    with pytest.raises(FloatingPointError):
        train(tmp_path, learning_rate=1e30, schedule="constant")
    assert curve(rows_in(tmp_path)) == before


class BrokenDisk:
    """Lets some writes pass, then fails every one half-way, as a full disk does."""

    def __init__(self, patch, number, writes_before):
        self._put, self._number, self._left = files._put, number, writes_before
        patch.setattr(files, "_put", self)

    def __call__(self, path, data, mode):
        self._left -= 1
        if self._left < 0:
            if self._number == errno.ENOSPC:
                self._put(path, data[: len(data) // 2], mode)
            raise OSError(self._number, os.strerror(self._number))
        self._put(path, data, mode)


@pytest.mark.parametrize(
    ("number", "writes_before"),
    quick(
        [
            *((errno.ENOSPC, n) for n in (0, 1, 2, 3, 5, 8, 12, 15)),
            (errno.EROFS, 0),
            (errno.EROFS, 9),
        ],
        [(errno.ENOSPC, 0), (errno.EROFS, 9)],
        unpack=True,
    ),
)
def test_a_failed_write_is_one_line_and_the_run_goes_on_later(
    tmp_path, finished, number, writes_before
):
    with pytest.MonkeyPatch.context() as patch:
        BrokenDisk(patch, number, writes_before)
        with pytest.raises(RunDirectoryError) as error:
            train(tmp_path)
    assert re.fullmatch(rf".+ cannot be written: {os.strerror(number)}", str(error.value))
    train(tmp_path)
    assert curve(rows_in(tmp_path)) == curve(rows_in(finished))
    assert outcome(tmp_path) == outcome(finished)


def no_room(**_):
    return open("/dev/full", "wb")


def untraced(*_, **__):
    raise AssertionError("something was traced")


@pytest.mark.parametrize("begin", [loop.train, group.train_together])
def test_a_place_that_takes_no_files_is_refused_before_anything_is_traced(
    begin, tmp_path, monkeypatch
):
    monkeypatch.setattr(loop, "SequenceModel", untraced)
    several = begin is group.train_together
    start = lambda workdir: begin(
        [run_config()] if several else run_config(), [workdir] if several else workdir, ["test"]
    )
    for folder in (Path("/proc/a/b"), Path("/sys/a")):
        with pytest.raises(RunDirectoryError, match=rf"{folder} cannot be written: (No such|Perm)"):
            start(folder)
    if not several:
        with pytest.raises(RunDirectoryError, match="/proc/a cannot be written: No such"):
            loop.train(run_config(), tmp_path, ["test"], bucket="/proc/a")
    monkeypatch.setattr(files.tempfile, "TemporaryFile", no_room)
    with pytest.raises(RunDirectoryError, match=r"/new cannot be written: No space left"):
        start(tmp_path / "new")
    assert not list(tmp_path.iterdir())


def test_a_finished_run_is_shown_where_nothing_can_be_written(finished, monkeypatch):
    monkeypatch.setattr(files.tempfile, "TemporaryFile", no_room)
    assert train(finished)["steps"] == 12


def test_a_new_version_or_commit_only_adds_a_start(tmp_path, finished):
    with pytest.MonkeyPatch.context() as patch:
        BrokenDisk(patch, errno.ENOSPC, 12)
        with pytest.raises(RunDirectoryError):
            train(tmp_path)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "describe_start", lambda *start: {"commit": "other", "from": start[2]})
        train(tmp_path)
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert len(starts) == 2
    assert starts[1] == {"commit": "other", "from": 8}
    assert curve(rows_in(tmp_path)) == curve(rows_in(finished))


def test_checkpoints_of_another_model_are_refused(tmp_path, finished):
    train(tmp_path / "wide", hidden_size=16)
    for name in ("config.json", "run.json", "metrics.jsonl"):
        (tmp_path / name).write_bytes((finished / name).read_bytes())
    (tmp_path / "wide" / "checkpoints").rename(tmp_path / "checkpoints")
    before = snapshot(tmp_path)
    with pytest.raises(RunDirectoryError, match=r"embeddings/embedding is float32\[10, 16\] there"):
        train(tmp_path)
    assert snapshot(tmp_path) == before


def test_only_the_first_process_writes(tmp_path, monkeypatch):
    monkeypatch.setattr(jax, "process_index", lambda: 1)
    files.write_file(tmp_path / "new" / "file", b"text")
    files.write_file(tmp_path / "line", b"text", append=True)
    assert not list(tmp_path.iterdir())


def test_progress_is_plain_lines_when_piped(tmp_path, capsys):
    train(tmp_path)
    said = capsys.readouterr().err.splitlines()
    *lines, summary = (line for line in said if not line.startswith("compiling"))
    assert re.match(r"step 2/12  loss \d\.\d+  accuracy \d\.\d+  tokens/s [\d,]+  left", lines[0])
    assert "valid" in lines[1]
    assert len(lines) == 6
    assert re.fullmatch(r"1 device \(cpu\): [\d,]+ tokens/s each, MFU .*, goodput \d+%", summary)


def test_progress_is_a_bar_on_a_terminal(monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    shower = Progress(3, 10)
    shower.show({"step": 5, "loss": 1.0, "accuracy": 0.5, "tokens_per_second": 1234.0})
    shower.close()
    shown = capsys.readouterr().err
    assert "5/10" in shown
    assert "loss=1.0000" in shown
    assert "tokens/s=1,234" in shown


@pytest.mark.parametrize("on_terminal", [True, False])
def test_a_compilation_that_takes_long_is_shown(on_terminal, monkeypatch, capsys):
    monkeypatch.setattr(sys.stderr, "isatty", lambda: on_terminal, raising=False)
    monkeypatch.setitem(progress.NOTICES_S, on_terminal, (0.05, 0.05))
    with progress.compiling("the step"):
        time.sleep(0.4)
    shown = capsys.readouterr().err
    assert shown.count("compiling the step, 0 s so far") > 1
    assert shown.endswith(progress.CLEAR_LINE if on_terminal else "so far\n")
    monkeypatch.setitem(progress.NOTICES_S, on_terminal, (60.0, 60.0))
    with progress.compiling("the step"):
        pass
    assert capsys.readouterr().err == ""


def test_pauses_are_left_out_of_the_time():
    watch = Stopwatch()
    with watch.paused(), watch.paused():
        time.sleep(0.2)
    assert 0 <= watch.lap() < 0.1
    time.sleep(0.05)
    assert watch.lap() >= 0.05
