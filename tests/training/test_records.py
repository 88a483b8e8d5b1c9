"""Files of a run directory: cut back, rewritten, refused, always whole."""

import errno
import json
import os

import pytest
from event_files import hyperparameters, read_events, scalars
from tiny_run import run_config, snapshot

from deltaproduct_jax import files, load_run
from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.files import write_file
from deltaproduct_jax.training.events import FILE_NAME
from deltaproduct_jax.training.records import RunRecords, refuse_other_config

CONFIG = run_config(steps=20, log_every=2, eval_every=10, checkpoint_every=10)


def row(step: int) -> dict[str, float]:
    return {
        "step": step,
        "loss": 1 / step,
        "accuracy": step / 100,
        "tokens": 8 * step,
        "tokens_per_second": 4.0,
        "time": 1000.0 + step,
    }


@pytest.fixture
def recorded(tmp_path):
    run = RunRecords(tmp_path, CONFIG)
    run.cut_back(0)
    for step in range(2, 14, 2):
        run.append(row(step))
    return tmp_path


def test_rows_and_events_say_the_same(recorded):
    lines = (recorded / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == [row(step) for step in range(2, 14, 2)]
    events = read_events(recorded / FILE_NAME)
    assert [step for step, _ in scalars(events)] == [2, 4, 6, 8, 10, 12]
    for step, values in scalars(events):
        wanted = {"train/loss": 1 / step, "train/accuracy": step / 100, "train/tokens": 8 * step}
        assert values == pytest.approx(wanted | {"train/tokens_per_second": 4.0})
    assert events[4].wall_time == 1002.0


def test_events_are_grouped_and_begin_with_the_settings(recorded):
    run = RunRecords(recorded, CONFIG)
    run.cut_back(0)
    run.append(row(2) | {"valid_loss": 0.5, "valid_sequence_accuracy": 0.25})
    events = read_events(recorded / FILE_NAME)
    ((_, values),) = scalars(events)
    assert (values["valid/loss"], values["train/loss"]) == (0.5, 0.5)
    assert {name.partition("/")[0] for name in values} == {"train", "valid"}
    settings, outcomes = hyperparameters(events)
    assert settings["learning_rate"] == CONFIG.train.learning_rate
    assert (settings["group"], settings["eval_lengths"]) == ("Z3", "4,6")
    assert settings["tie_embeddings"] is False
    assert set(outcomes) - values.keys() == set()


@pytest.mark.parametrize("torn", [b"", b'{"step": 14, "lo', b'{"step": 14, "loss": 0.1}', b"\x00"])
@pytest.mark.parametrize("step", [10, 12])
def test_cut_back(recorded, torn, step):
    with open(recorded / "metrics.jsonl", "ab") as file:
        file.write(torn)
    with open(recorded / FILE_NAME, "ab") as file:
        file.write(b"torn")
    (recorded / "events.out.tfevents.9.older").write_bytes(b"later events")
    run = RunRecords(recorded, CONFIG)
    run.cut_back(step)
    run.append(row(step + 2) | {"loss": 7.0})
    steps = list(range(2, step + 3, 2))
    lines = (recorded / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == steps
    assert json.loads(lines[-1])["loss"] == 7.0
    (file,) = recorded.glob("events.*")
    events = scalars(read_events(file))
    assert [step for step, _ in events] == steps
    assert events[-1][1]["train/loss"] == 7.0


def test_cut_back_to_the_start(recorded):
    run = RunRecords(recorded, CONFIG)
    run.cut_back(0)
    assert run.rows == []
    assert (recorded / "metrics.jsonl").read_bytes() == b""
    assert scalars(read_events(recorded / FILE_NAME)) == []


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda lines: [*lines[:2], b"{nonsense", *lines[2:]], "line 3 is not valid JSON"),
        (lambda lines: [*lines[:2], b"[]", *lines[2:]], r"line 3: \[\] must be an object"),
        (lambda lines: [*lines[:2], *lines[3:]], "does not hold every record up to step 10"),
        (lambda lines: [lines[0], *lines], "does not hold every record up to step 10"),
        (lambda lines: lines[:2], "does not hold every record up to step 10"),
        (lambda lines: [], "does not hold every record up to step 10"),
    ],
)
def test_damaged_metrics_are_refused_untouched(recorded, damage, message):
    path = recorded / "metrics.jsonl"
    lines = damage(path.read_bytes().splitlines())
    path.write_bytes(b"".join(line + b"\n" for line in lines))
    before = snapshot(recorded)
    with pytest.raises(RunDirectoryError, match=message):
        RunRecords(recorded, CONFIG).cut_back(10)
    assert snapshot(recorded) == before


@pytest.mark.parametrize("content", [b"", b"{", b"\xff\xfe", b'{"task": {}'])
@pytest.mark.parametrize("name", ["config.json", "results.json", "run.json"])
def test_damaged_files_are_named(recorded, name, content):
    (recorded / name).write_bytes(content)
    before = snapshot(recorded)

    def read_all():
        run = RunRecords(recorded, CONFIG)
        run.results()
        run.add_start({})

    with pytest.raises(RunDirectoryError, match=rf"{name} is not valid JSON") as error:
        read_all()
    assert "\n" not in str(error.value)
    assert snapshot(recorded) == before


@pytest.mark.parametrize(
    ("keep", "more", "says"),
    [
        ((), {}, "its sections must be"),
        (("train",), {}, "its sections must be"),
        ((), {"more": {"x": 1}}, "section 'more' is not known"),
        (("task", "model", "train"), {"notes": {}}, "section 'notes' is not known"),
        (("task", "model", "train"), {"a": {"steps": 1}}, "section 'a' is not known"),
    ],
)
def test_a_config_of_other_sections_is_no_runs_for_training_and_reading(recorded, keep, more, says):
    path = recorded / "config.json"
    saved = json.loads(path.read_text())
    path.write_text(json.dumps({name: saved[name] for name in keep} | more))
    for read in (lambda: RunRecords(recorded, CONFIG), lambda: load_run(recorded)):
        with pytest.raises(RunDirectoryError) as error:
            read()
        assert str(error.value).startswith(f"{path} describes no run: {says}")


@pytest.mark.parametrize(("steps", "is_told"), [(12, True), (13, False)])
def test_text_that_is_elsewhere_is_said_to_be(steps, is_told):
    there = {"task": {"data": ["old"]}, "train": {"steps": 12}}
    here = {"task": {"data": ["new"]}, "train": {"steps": steps}}
    with pytest.raises(RunDirectoryError, match=r'data \(\["old"\] there') as error:
        refuse_other_config(there, here, "run")
    assert ("move the text back" in str(error.value)) == is_told


def test_unreadable_file_is_named(recorded):
    (recorded / "config.json").unlink()
    (recorded / "config.json").mkdir()
    with pytest.raises(RunDirectoryError, match=r"config\.json cannot be read: Is a directory"):
        RunRecords(recorded, CONFIG)


@pytest.mark.parametrize("name", ["config.json", "run.json"])
def test_a_pipe_or_a_device_is_not_waited_for(recorded, name):
    """Nobody writes into the pipe, and the device never ends."""
    for put in (os.mkfifo, lambda path: path.symlink_to("/dev/zero")):
        (recorded / name).unlink(missing_ok=True)
        put(recorded / name)
        with pytest.raises(RunDirectoryError, match=rf"{name} cannot be read: it is a pipe or a"):
            RunRecords(recorded, CONFIG).add_start({})


@pytest.mark.parametrize(
    ("content", "key"),
    [
        ('{"a": 1, "b": 2, "a": 1}', "a"),
        ('[{"x": {"y": 1, "y": {}}}]', "y"),
        ('{"": 1, "": 2}', ""),
    ],
)
def test_a_key_that_is_there_twice_is_named(tmp_path, content, key):
    (tmp_path / "file").write_text(content)
    with pytest.raises(RunDirectoryError, match=rf"'{key}' is there more than once$"):
        files.read_json(tmp_path / "file")


def test_a_workdir_that_is_a_file_is_named(tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(RunDirectoryError, match="cannot be written"):
        RunRecords(tmp_path / "file" / "run", CONFIG)
    assert (tmp_path / "file").read_text() == "mine"


@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "results.json", "checkpoints"])
def test_records_without_a_config_are_refused(tmp_path, name):
    (tmp_path / name).write_text("")
    with pytest.raises(RunDirectoryError, match=rf"has {name} but no config\.json"):
        RunRecords(tmp_path, CONFIG)
    assert set(snapshot(tmp_path)) == {name}


def test_foreign_files_do_not_matter(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / ".config.json.tmp").write_text("{torn by a kill")
    RunRecords(tmp_path, CONFIG)
    assert set(snapshot(tmp_path)) == {"notes.txt", "config.json"}


def test_a_whole_file_is_replaced_or_stays(tmp_path, monkeypatch):
    path = tmp_path / "file"
    write_file(path, b"old")
    real = files._put

    def full(path, data, mode):
        real(path, data[:1], mode)
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(files, "_put", full)
    with pytest.raises(RunDirectoryError, match="No space left on device"):
        write_file(path, b"new")
    assert path.read_bytes() == b"old"


def test_numbers_that_json_lacks_are_never_written(recorded):
    before = snapshot(recorded)
    with pytest.raises(ValueError, match="not JSON compliant"):
        RunRecords(recorded, CONFIG).append(row(14) | {"loss": float("nan")})
    assert snapshot(recorded) == before


def test_starts_add_up(recorded):
    run = RunRecords(recorded, CONFIG)
    run.add_start({"commit": "a"})
    run.add_start({"commit": "b"})
    starts = json.loads((recorded / "run.json").read_text())["starts"]
    assert [start["commit"] for start in starts] == ["a", "b"]
