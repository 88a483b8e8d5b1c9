"""Damaged run directories: one line that says what is wrong and how to go on, and nothing lost."""

import contextlib
import functools
import json
import shutil

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from quick import quick
from tiny_run import curve, leaves_equal, outcome, rows_in, run_config, snapshot

from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.training import loop, resume
from deltaproduct_jax.training.checkpoints import Checkpoints, DamagedCheckpointError, checksum
from deltaproduct_jax.training.config import TrainConfig
from deltaproduct_jax.training.optimizer import make_optimizer
from deltaproduct_jax.training.step import TrainState, init_state

SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


pytestmark = pytest.mark.usefixtures("compiled_once")


def state_at(step: int) -> TrainState:
    # Large enough for files of its own, and of many values, as trained parameters are.
    kernel = np.random.default_rng(step).normal(size=(30, 100))
    params = {"kernel": jnp.asarray(kernel, jnp.float32), "bias": jnp.ones((4,), jnp.bfloat16)}
    return init_state(params, make_optimizer(TrainConfig()))._replace(step=jnp.int32(step))


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """Checkpoint 2 is the best and 4 the newest; tests work on copies."""
    directory = tmp_path_factory.mktemp("saved")
    with Checkpoints(directory) as checkpoints:
        for step, selection in ((2, (0.9, 0.9)), (4, (0.5, 0.5))):
            checkpoints.save(state_at(step), step, selection)
            checkpoints.wait()
    return directory


@pytest.fixture
def copied(saved, tmp_path):
    return shutil.copytree(saved, tmp_path / "checkpoints")


def newest_state(directory) -> TrainState:
    with Checkpoints(directory) as checkpoints:
        return resume.newest_state(checkpoints, state_at(0))


def flip(data: bytes) -> bytes:
    middle = len(data) // 2
    return data[:middle] + bytes([data[middle] ^ 16]) + data[middle + 1 :]


CHANGES = {"flipped": flip, "cut": lambda data: data[: len(data) // 2], "emptied": lambda data: b""}


@pytest.mark.parametrize("change", quick(CHANGES, ["flipped"]))
def test_a_damaged_file_is_seen_or_does_not_matter(copied, saved, change):
    seen = 0
    files = [path for path in (copied / "4").rglob("*") if path.is_file() and path.stat().st_size]
    for path in files:
        whole = path.read_bytes()
        path.write_bytes(CHANGES[change](whole))
        before = snapshot(copied)
        try:
            assert leaves_equal(newest_state(copied), state_at(4)), path
        except RunDirectoryError as error:
            text = str(error)
            assert f"checkpoint 4 in {copied} is damaged: " in text, path
            assert text.endswith("checkpoint 2 is whole: --resume_from=2 goes on from it"), path
            assert "\n" not in text
            seen += 1
        assert snapshot(copied) == before
        path.write_bytes(whole)
    assert seen >= 4


def test_every_flipped_bit_of_the_numbers_is_seen(copied):
    data = max((copied / "4").rglob("d/*"), key=lambda path: path.stat().st_size)
    whole = data.read_bytes()
    assert len(whole) > 10_000
    for place in np.random.default_rng(0).integers(0, len(whole), 12):
        flipped = bytearray(whole)
        flipped[place] ^= 1 << int(place % 8)
        data.write_bytes(flipped)
        with contextlib.suppress(DamagedCheckpointError), Checkpoints(copied) as checkpoints:
            assert leaves_equal(checkpoints.restore(4, state_at(0)), state_at(4))


def test_the_checksum_changes_with_any_bit_and_the_selection():
    state = state_at(1)
    sums = {checksum(state, (0.5,)), checksum(state, (0.25,)), checksum(state, ())}
    for bit in range(32):
        words = np.array(state.params["kernel"]).view(np.uint32)
        words[3, 7] ^= np.uint32(1 << bit)
        changed = state._replace(params=state.params | {"kernel": jnp.asarray(words.view("f4"))})
        sums.add(checksum(changed, (0.5,)))
    sums |= {checksum(state, (0.5,), {"step": step, "seed": 0}) for step in (1, 2)}
    assert len(sums) == 37
    assert checksum(state, (0.5,), {"seed": 0, "step": 2}) in sums  # as JSON has it
    assert checksum(jax.tree.map(jnp.array, state), [0.5]) == checksum(state, (0.5,))


def test_a_checksum_is_what_it_was():
    """The number was computed once; by another no checkpoint that anybody has would be whole."""
    params = {"kernel": jnp.arange(6.0).reshape(2, 3), "bias": jnp.ones((4,), jnp.bfloat16)}
    state = init_state(params, make_optimizer(TrainConfig()))._replace(step=jnp.int32(7))
    assert checksum(state, (0.5, 0.25), {"step": 7}) == 3481087369


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("metrics/metrics", b"3", "metrics/metrics: 3 must be an object"),
        ("metrics/metrics", b'{"selection": "best"}', "selection='best' must be a list"),
        ("metrics/metrics", b'{"selection": [NaN]}', "NaN is no number of JSON"),
        ("metrics/metrics", None, "it has no metrics/metrics"),
        ("default/_METADATA", None, "it has no default/_METADATA"),
        ("default/_METADATA", b"[]", "damaged: default describes no arrays: AttributeError("),
        ("default/_METADATA", b"{}", "damaged: default describes no arrays: KeyError("),
    ],
)
def test_what_is_wrong_is_said(copied, name, content, says):
    path = copied / "4" / name
    path.unlink() if content is None else path.write_bytes(content)
    with pytest.raises(RunDirectoryError) as error:
        newest_state(copied)
    assert says in str(error.value)
    assert "checkpoint 2 is whole: --resume_from=2" in str(error.value)


def test_where_none_is_whole_the_line_says_so(copied):
    for step in (2, 4):
        (copied / str(step) / "metrics" / "metrics").write_bytes(b"3")
    with pytest.raises(RunDirectoryError, match=r"no other one is whole: --resume_from=0 begins"):
        newest_state(copied)


def test_version_0_1_saved_no_checksum(copied):
    path = copied / "4" / "metrics" / "metrics"
    path.write_bytes(b'{"selection": [0.5, 0.5]}')
    assert leaves_equal(newest_state(copied), state_at(4))


def test_a_checkpoint_under_another_number_is_seen(copied):
    (copied / "4").rename(copied / "5")
    text = r"checkpoint 5 in .* is damaged: it holds step 4; checkpoint 2 is whole: --resume_from=2"
    with pytest.raises(RunDirectoryError, match=text):
        newest_state(copied)


def test_empty_and_foreign_folders_are_passed_over_and_stay(copied):
    (copied / "6").mkdir()
    (copied / "8").mkdir()
    (copied / "8" / "photo.jpg").write_bytes(b"mine")
    (copied / "notes").mkdir()
    assert leaves_equal(newest_state(copied), state_at(4))
    with Checkpoints(copied) as checkpoints:
        assert checkpoints.steps() == [2, 4]
        for step in (6, 8, 10):  # the folders are in the way of two of them
            checkpoints.save(state_at(step), step, (step / 10, 0.5))
            checkpoints.wait()
        assert leaves_equal(checkpoints.restore(10, state_at(0)), state_at(10))
    names = {path.name for path in copied.iterdir()}
    assert names == {"6.aside1", "8.aside1", "notes", "10"}
    assert (copied / "8.aside1" / "photo.jpg").read_bytes() == b"mine"


# Whole runs.


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setattr(loop, "SequenceModel", tiny_run.TinyModel)
    # The first evaluation is the best, so that a run keeps checkpoints 4 and 12.
    monkeypatch.setattr(
        loop, "selection_of", lambda row, _: (1 / row["step"],) if "valid_loss" in row else None
    )


def train(workdir, **options):
    return loop.train(run_config(), workdir, ["test"], **options)


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled_once):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    with pytest.MonkeyPatch.context() as patch:
        tiny_model.__wrapped__(patch)
        train(workdir)
    return workdir


@pytest.fixture
def unfinished(finished, tmp_path):
    """As a kill after the last checkpoint leaves a run."""
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "results.json").unlink()
    return workdir


def same_outcome(workdir, finished) -> bool:
    return outcome(workdir) == outcome(finished) and curve(rows_in(workdir)) == curve(
        rows_in(finished)
    )


def test_a_damaged_checkpoint_touches_nothing_and_a_flag_goes_on(unfinished, finished, capsys):
    damaged = unfinished / "checkpoints" / "12" / "metrics" / "metrics"
    damaged.write_bytes(b"3")
    before = snapshot(unfinished)
    with pytest.raises(RunDirectoryError, match=r"checkpoint 12 .* --resume_from=4 goes on"):
        train(unfinished)
    with pytest.raises(RunDirectoryError, match=r"resume_from=5 is no .* be 4, 12, or 0"):
        train(unfinished, resume_from=5)
    with pytest.raises(RunDirectoryError, match=r"checkpoint 12 .* is damaged"):
        train(unfinished, resume_from=12)
    assert snapshot(unfinished) == before
    capsys.readouterr()
    train(unfinished, resume_from=4)
    assert "checkpoint 12 is kept as 12.aside1" in capsys.readouterr().err
    assert same_outcome(unfinished, finished)
    assert (unfinished / "checkpoints" / "12.aside1" / "metrics" / "metrics").read_bytes() == b"3"
    with pytest.raises(RunDirectoryError, match=r"resume_from=4 is of no use: .* is finished"):
        train(unfinished, resume_from=4)


def test_a_removal_that_was_cut_short_is_ended(unfinished):
    """Of a step before the newest; where anything of a user's is, nothing is removed."""
    checkpoints = unfinished / "checkpoints"
    for name in ("5", "8", "9", "14", "notes"):
        (checkpoints / name).mkdir()
    (checkpoints / "8" / "commit_success.txt").touch()
    (checkpoints / "9" / "mine.txt").touch()
    train(unfinished)
    assert {path.name for path in checkpoints.iterdir()} == {"4", "12", "9", "14", "notes"}


def test_a_run_that_is_not_there_is_not_gone_on_with(tmp_path):
    """And nothing is left in its place, which would be taken for another run's."""
    for step in (1, 400):
        with pytest.raises(
            RunDirectoryError, match=rf"resume_from={step} is of no use: .*/new hol"
        ):
            train(tmp_path / "new", resume_from=step)
    assert not (tmp_path / "new").exists()


def test_a_damaged_best_is_named_at_the_end_and_the_newest_goes_on(unfinished, capsys):
    (unfinished / "checkpoints" / "4" / "default" / "_METADATA").unlink()
    with pytest.raises(RunDirectoryError, match=r"checkpoint 4 .* --resume_from=12 goes on"):
        train(unfinished)
    assert train(unfinished, resume_from=12)["best_step"] == 12
    assert (unfinished / "checkpoints" / "4.aside1").is_dir()


def test_checkpoints_on_a_disk_that_is_away_begin_nothing_again(unfinished):
    away = unfinished / "checkpoints"
    away.rename(unfinished.with_name("disk"))
    away.symlink_to(unfinished.with_name("gone"))
    before = {path.name: path.lstat() for path in unfinished.iterdir()}
    for resume_from in (None, 0, 4):
        with pytest.raises(
            RunDirectoryError, match=r"is a link to .*gone, which cannot be reached"
        ):
            train(unfinished, resume_from=resume_from)
    kept = {path.name: path.lstat() for path in unfinished.iterdir()}
    assert kept.keys() == before.keys()
    assert kept["metrics.jsonl"] == before["metrics.jsonl"]
    away.unlink()
    away.symlink_to(unfinished.with_name("disk"))
    assert train(unfinished)["steps"] == 12


@pytest.mark.parametrize("what", ["missing", SLOW("a file"), "emptied", SLOW("resume_from=0")])
def test_without_checkpoints_a_run_begins_again_beside_its_records(
    what, unfinished, finished, capsys
):
    checkpoints = unfinished / "checkpoints"
    if what != "resume_from=0":
        shutil.rmtree(checkpoints)
    if what == "a file":
        checkpoints.write_text("mine")
    if what == "emptied":
        checkpoints.mkdir()
    old = (unfinished / "metrics.jsonl").read_bytes()
    train(unfinished, resume_from=0 if what == "resume_from=0" else None)
    err = capsys.readouterr().err
    assert "so the run begins again; what was there is kept as metrics.aside1.jsonl" in err
    assert (unfinished / "metrics.aside1.jsonl").read_bytes() == old
    assert same_outcome(unfinished, finished)
    assert (checkpoints.parent / "checkpoints.aside1").exists() == (what != "missing")


def test_a_run_killed_before_its_first_checkpoint_just_begins(unfinished, finished, capsys):
    shutil.rmtree(unfinished / "checkpoints")
    (unfinished / "checkpoints").mkdir()
    lines = (unfinished / "metrics.jsonl").read_bytes().splitlines(keepends=True)
    (unfinished / "metrics.jsonl").write_bytes(b"".join(lines[:2]))
    train(unfinished)
    assert "begins again" not in capsys.readouterr().err
    assert not list(unfinished.glob("*aside*"))
    assert same_outcome(unfinished, finished)


ROW = {"step": 2, "loss": 1.0, "accuracy": 0.5, "tokens": 64, "tokens_per_second": 9.0, "time": 1.0}
DAMAGE = [
    ("config.json", b"[]", r"config\.json: \[\] must be an object"),
    ("config.json", b'{"task": 3}', r"config\.json: task=3 must be an object"),
    ("config.json", b"[" * 100_000, r"config\.json is nested too deeply"),
    ("run.json", b"{}", r"run\.json: starts is missing"),
    ("run.json", b'{"starts": {}}', r"run\.json: starts=\{\} must be a list"),
    ("run.json", b'{"starts": [7]}', r"run\.json: starts\[0\]=7 must be an object"),
    ("run.json", b'{"starts": [{"extended_from": "x"}]}', r"starts\[0\]\.extended_from='x' must"),
    ("run.json", b'{"starts": [{"a": ' + b"[" * 50 + b"]" * 50 + b"}]}", "is nested too deeply; "),
    ("results.json", b"{}", r"results\.json: \w+ is missing"),
    ("results.json", b'{"steps": NaN}', r"results\.json is not valid JSON: NaN is no number"),
    ("metrics.jsonl", b"{}\n", r"metrics\.jsonl, line 1: step is missing"),
    ("metrics.jsonl", (json.dumps(ROW | {"step": 1.5}) + "\n").encode(), r"line 1: step=1\.5 must"),
    ("metrics.jsonl", (json.dumps(ROW | {"step": True}) + "\n").encode(), r"line 1: step=True m"),
    ("metrics.jsonl", (json.dumps(ROW | {"x": "y"}) + "\n").encode(), r"line 1: x='y' must be a f"),
    ("metrics.jsonl", (json.dumps(ROW | {"tokens": [1]}) + "\n").encode(), r"tokens=\[1\] must be"),
    ("metrics.jsonl", json.dumps(ROW).replace("9.0", "1e999").encode() + b"\n", "than any float"),
    ("metrics.jsonl", (json.dumps(ROW | {"valid_token_accuracy": None}) + "\n").encode(), "accur"),
]  # fmt: skip


@pytest.mark.parametrize(("name", "content", "says"), DAMAGE)
def test_records_of_another_form_are_named_with_their_place(unfinished, name, content, says):
    (unfinished / name).write_bytes(content)
    before = snapshot(unfinished)
    with pytest.raises(RunDirectoryError, match=says) as error:
        train(unfinished)
    assert "\n" not in str(error.value)
    assert str(unfinished / name) in str(error.value)
    assert snapshot(unfinished) == before
