"""Runs with --bucket, for which a folder does as well: what is there, and who goes on from it."""

import json
import sys

import pytest
import tiny_run
from tiny_run import curve, leaves_equal, outcome, rows_in, run_config, snapshot

from deltaproduct_jax import files
from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.training import loop, resume, runs
from deltaproduct_jax.training.buckets import Bucket
from deltaproduct_jax.training.checkpoints import Checkpoints
from deltaproduct_jax.training.records import RunRecords
from experiments import state_tracking

CONSTANT = {"schedule": "constant"}
RECORDS = ("config.json", "run.json", "metrics.jsonl", "results.json")


pytestmark = pytest.mark.usefixtures("compiled_once", "tiny_model")


def train(workdir, bucket, **fields):
    where = None if bucket is None else str(bucket)
    return loop.train(run_config(**CONSTANT | fields), workdir, ["test"], bucket=where)


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, compiled_once, tiny_model):
    """A run without a bucket; tests only read it."""
    workdir = tmp_path_factory.mktemp("undisturbed")
    train(workdir, None)
    return workdir


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled_once, tiny_model):
    """Workdir and bucket of a run that the command line has made; tests only read them."""
    workdir, bucket = tmp_path_factory.mktemp("own"), tmp_path_factory.mktemp("bucket") / "run"
    flags = tiny_run.flags_for(workdir, **CONSTANT)
    assert state_tracking.main([*flags, f"--bucket={bucket}"]) == 0
    return workdir, bucket


class LostMachineError(Exception):
    """Stands for a machine that is gone, its disk with it."""


@pytest.fixture
def lost(tmp_path, monkeypatch):
    """The bucket of a run whose machine was lost at step 10, its newest checkpoint of step 8."""

    def fail(self, row):
        if row["step"] == 10:
            raise LostMachineError
        append(self, row)

    append, bucket = RunRecords.append, tmp_path / "bucket"
    monkeypatch.setattr(RunRecords, "append", fail)
    with pytest.raises(LostMachineError):
        train(tmp_path / "lost", bucket)
    monkeypatch.undo()
    return bucket


def steps_in(bucket):
    return sorted(int(path.name) for path in (bucket / "checkpoints").iterdir())


def check_same(directory, undisturbed):
    assert curve(rows_in(directory)) == curve(rows_in(undisturbed))
    assert outcome(directory) == outcome(undisturbed)


def test_checkpoints_are_in_the_bucket_and_records_in_both(finished, undisturbed):
    workdir, bucket = finished
    assert not (workdir / "checkpoints").exists()
    assert steps_in(bucket) == steps_in(undisturbed)
    for name in RECORDS:
        assert (bucket / name).read_bytes() == (workdir / name).read_bytes()
    check_same(workdir, undisturbed)
    assert {path.name for path in bucket.iterdir()} == {*RECORDS, "checkpoints", "owner.json"}


def test_a_machine_that_knows_nothing_goes_on_bit_for_bit(tmp_path, lost, undisturbed, capsys):
    assert steps_in(lost)[-1] == 8
    train(tmp_path / "new", lost)
    assert "taken over from process" in capsys.readouterr().err
    for directory in (tmp_path / "new", lost):
        check_same(directory, undisturbed)
    assert steps_in(lost) == steps_in(undisturbed)
    starts = json.loads((lost / "run.json").read_text())["starts"]
    assert [start["resumed_from"] for start in starts] == [None, 8]
    # The lost machine comes back, its rows of steps that were made again since.
    train(tmp_path / "lost", lost)
    check_same(tmp_path / "lost", undisturbed)


def test_records_are_never_behind_a_checkpoint(tmp_path, undisturbed, monkeypatch):
    """A machine may be lost right before or right behind the moment when a save is whole."""
    save, moments = Checkpoints.save, []

    def fail(self, state, step, *rest):
        moments.append(step)
        if len(moments) == 1:
            raise LostMachineError
        save(self, state, step, *rest)
        if len(moments) == 2:
            self.wait()
            raise LostMachineError

    monkeypatch.setattr(Checkpoints, "save", fail)
    for number in range(2):
        with pytest.raises(LostMachineError):
            train(tmp_path / str(number), tmp_path / "bucket")
    assert moments == [4, 4]
    train(tmp_path / "last", tmp_path / "bucket")
    check_same(tmp_path / "last", undisturbed)


def test_of_two_runs_at_once_the_later_goes_on(tmp_path, monkeypatch):
    bucket, append = tmp_path / "bucket", RunRecords.append

    def start_another(self, row):
        append(self, row)
        if row["step"] == 10:
            Bucket(bucket).take_over()

    monkeypatch.setattr(RunRecords, "append", start_another)
    with pytest.raises(RunDirectoryError, match=r"taken over by process .* so this run stops"):
        train(tmp_path / "first", bucket)
    assert steps_in(bucket)[-1] == 8
    assert rows_in(bucket)[-1]["step"] == 8


def test_another_configuration_is_refused(tmp_path, finished):
    _, bucket = finished
    before = snapshot(bucket)
    with pytest.raises(RunDirectoryError) as error:
        train(tmp_path / "new", bucket, batch_size=16)
    assert str(error.value) == (
        f"{bucket} holds a run with another configuration, differing in batch_size (8 there, 16 "
        "here); give another bucket"
    )
    assert snapshot(bucket) == before
    assert not (tmp_path / "new").exists()


def test_what_a_workdir_has_alone_is_refused(tmp_path, undisturbed, finished, lost):
    workdir, bucket = finished
    before = [snapshot(folder) for folder in (undisturbed, workdir, lost)]
    for where in (tmp_path / "empty", bucket):
        with pytest.raises(RunDirectoryError, match="has checkpoints of its own"):
            train(undisturbed, where)
    with pytest.raises(RunDirectoryError, match="holds a run that is not in bucket="):
        train(workdir, tmp_path / "empty")
    assert not (tmp_path / "empty").exists()
    assert [snapshot(folder) for folder in (undisturbed, workdir, lost)] == before


def test_a_finished_run_comes_to_an_empty_workdir(tmp_path, finished):
    _, bucket = finished
    before = snapshot(bucket)
    assert train(tmp_path / "new", bucket) == json.loads(before["results.json"])
    assert snapshot(bucket) == before
    assert snapshot(tmp_path / "new") == {name: before[name] for name in RECORDS}


@pytest.mark.slow
def test_more_steps(tmp_path):
    """A run that ended goes further elsewhere, and then where its end is on the disk."""
    workdir, bucket = tmp_path / "old", tmp_path / "bucket"
    train(workdir, bucket, steps=8)
    ended = (bucket / "results.json").read_bytes()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(resume, "best_state", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            train(tmp_path / "new", bucket, steps=12)
    assert not (bucket / "results.json").exists()
    assert (bucket / "results.aside1.json").read_bytes() == ended
    train(workdir, bucket, steps=12)
    assert json.loads((bucket / "results.json").read_text())["steps"] == 12
    assert (bucket / "results.aside1.json").read_bytes() == ended
    assert [row["step"] for row in rows_in(bucket)] == [2, 4, 6, 8, 10, 12]


def test_models_are_read_from_there(finished, undisturbed, monkeypatch):
    monkeypatch.setattr(runs, "SequenceModel", tiny_run.TinyModel)
    here, there = (runs.load_run(folder, "newest") for folder in (undisturbed, finished[1]))
    assert (here.step, here.config) == (there.step, there.config)
    kernels = [run.model.head.kernel[...] for run in (here, there)]
    assert leaves_equal(*kernels)


@pytest.mark.slow
def test_a_damaged_bucket_begins_again_beside_what_is_left(tmp_path, undisturbed, capsys):
    bucket = tmp_path / "bucket"
    train(tmp_path / "old", bucket)
    (bucket / "results.json").unlink()
    (bucket / "checkpoints").rename(tmp_path / "lost")
    rows = (bucket / "metrics.jsonl").read_bytes()
    train(tmp_path / "new", bucket)
    assert "checkpoints is missing, so the run begins again" in capsys.readouterr().err
    assert (bucket / "metrics.aside1.jsonl").read_bytes() == rows
    check_same(bucket, undisturbed)


@pytest.mark.parametrize(
    "text",
    [
        "s3://bucket/run", "gs://", "gs:///", "gs://a\0b", "gs:/a/b", "", "gs:///run", "gs:////",
        "gs://bucket//run", "gs://bucket/run//", "gs://bucket/../run", "gs://./run", "gs://bucket/.",
    ],
)  # fmt: skip
def test_what_is_no_bucket_is_named(tmp_path, text):
    with pytest.raises(ConfigError, match=r"is not known; it may be a directory, or gs://"):
        train(tmp_path / "new", text)
    assert not (tmp_path / "new").exists()


def test_the_workdir_is_no_bucket(tmp_path):
    with pytest.raises(ConfigError, match="is the workdir, where all is saved without it"):
        train(tmp_path / "new", tmp_path / "new")


def test_a_missing_package_is_named_with_its_command(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "gcsfs", None)
    with pytest.raises(ConfigError) as error:
        files.any_path("gs://bucket/run", "bucket")
    assert str(error.value) == (
        "bucket=gs://bucket/run needs the package gcsfs; pip install 'deltaproduct_jax[gcs]' "
        "installs it"
    )
