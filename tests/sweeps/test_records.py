"""What is read off the records of a sweep, whatever their length, and written into its tables."""

import csv
import io
import itertools
import json

import pytest
from campaign.damage import cases
from hypothesis import given
from hypothesis import strategies as st
from sweeps.helpers import SCRIPT

from deltaproduct_jax.errors import RunDirectoryError
from experiments.lib import searches
from experiments.lib.sweeps import grid, records


def run_of(name="seed=0", config=None, **settings):
    return grid.Run(name, settings, tuple(settings), config or {"train": {"seed": 0}})


def folder_of(tmp_path, **files):
    """A run's folder with the text of its files."""
    folder = records.RunFolder(tmp_path, run_of())
    folder.path.mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder.path / name.replace("_", ".")).write_text(text)
    return folder


@pytest.mark.parametrize("rows", [0, 1, 2, 3000])  # the last are more than is read of a file's end
@pytest.mark.parametrize("torn", ["", '{"step": 1', "{"])
def test_the_last_row_is_the_last_whole_line(rows, torn, tmp_path):
    lines = [
        json.dumps({"step": step, "loss": step / 7, "tokens": 8.0 * step}) for step in range(rows)
    ]
    folder = folder_of(tmp_path, metrics_jsonl="".join(f"{line}\n" for line in lines) + torn)
    assert folder.last_row() == (json.loads(lines[-1]) if lines else {})


def test_a_damaged_last_row_is_named(tmp_path):
    folder = folder_of(tmp_path, metrics_jsonl='{"step": 1}\n{"step": "2"}\n')
    with pytest.raises(RunDirectoryError, match=r"metrics\.jsonl, last line: step='2' must be a"):
        folder.last_row()
    assert records.RunFolder(tmp_path, run_of("seed=1")).last_row() == {}


@cases(60)
@given(st.lists(st.text("ab \r", max_size=6), max_size=6), st.integers(0, 12))
def test_the_last_line_of_a_log_is_what_was_drawn_last(lines, since):
    text = "\n".join(lines)
    shown = [line.rpartition("\r")[2].strip() for line in text[since:].split("\n")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("builtins.open", lambda path, mode: io.BytesIO(text.encode()))
        patch.setattr(records.os.path, "getsize", lambda path: len(text))
        assert records.last_line("log.txt", since) == ["", *filter(None, shown)][-1]


@cases(40)
@given(st.lists(st.tuples(st.integers(1, 100), st.floats(0.5, 1e4)), max_size=6))
def test_seconds_of_training_are_those_of_all_rows(steps):
    tokens = list(itertools.accumulate(tokens for tokens, _ in steps))
    rows = [
        {"step": n, "tokens": float(total), "tokens_per_second": speed}
        for n, (total, (_, speed)) in enumerate(zip(tokens, steps, strict=True), 1)
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "read_lines", lambda path, schema: rows)
        found = records.train_seconds("metrics.jsonl")
    assert found == (pytest.approx(sum(n / speed for n, speed in steps)) if steps else None)


def test_metrics_of_other_scripts_may_say_less_and_never_stand_still(tmp_path):
    path = folder_of(tmp_path, metrics_jsonl='{"step": 1, "loss": 2.0}\n').path / "metrics.jsonl"
    assert records.train_seconds(path) is None
    path.write_text(
        '{"tokens": 8, "tokens_per_second": 4}\n{"tokens": 9, "tokens_per_second": 0}\n'
    )
    with pytest.raises(RunDirectoryError, match="line 2: tokens_per_second must be above 0"):
        records.train_seconds(path)


def test_a_run_is_what_its_records_tell(tmp_path):
    folder = folder_of(tmp_path)
    assert folder.state() == "pending"
    (folder.path / "config.json").write_text("{}")
    assert folder.state() == "started"
    folder.add_attempt(1, 2.0, "error: out of memory")
    assert folder.state() == "failed"
    row = folder.row()
    assert (row["run"], row["state"], row["attempts"]) == ("seed=0", "failed", 1)
    assert row["error"] == "error: out of memory"
    folder.add_attempt(0, 3.0, "")
    assert (folder.state(), folder.seconds()) == ("started", 5.0)
    score = {"sequence_accuracy": 1.0, "cumulative": [1]}
    results = {"steps": 3, "best_step": 2, "parameters": {"total": 7}}
    results["test"] = [{"length": 8, "loss": 0.5, "strict": score}]
    (folder.path / "results.json").write_text(json.dumps(results))
    row = records.RunFolder(tmp_path, run_of()).row()
    assert (row["state"], row["attempts"], row["error"]) == ("done", 2, None)
    assert row["results.test.8.strict.sequence_accuracy"] == 1.0
    assert "results.test.8.strict.cumulative" not in row


def test_a_run_from_elsewhere_says_where_it_was_made(tmp_path):
    starts = [
        {"commit": "0123456789", "dirty": False, "device_kind": "H", "device_count": 1},
        {"commit": "0123456789", "dirty": True, "device_kind": "H", "device_count": 2},
        {"commit": None, "dirty": None},
    ]
    folder = folder_of(tmp_path, run_json=json.dumps({"starts": starts}), config_json="{}")
    row = folder.row()
    assert row["commits"] == ["0123456", "0123456-dirty"]
    assert (row["hardware"], row["attempts"]) == (["1 x H", "2 x H"], 3)
    # Another version's configuration may say less or more, and text may lie elsewhere since.
    run = run_of(config={"train": {"seed": 0, "new": 1}, "task": {"data": "here"}})
    folder = records.RunFolder(tmp_path, run)
    (folder.path / "config.json").write_text(
        '{"train": {"seed": 0, "old": 2}, "task": {"data": "there"}}'
    )
    assert folder.row()["state"] == "started"
    (folder.path / "config.json").write_text('{"train": {"seed": 1}}')
    row = folder.row()
    assert row["state"] == "damaged"
    assert row["error"].endswith("holds another run, differing in seed (1 there, 0 in runs.json)")
    results = {"steps": 3, "best_step": 2, "parameters": {"total": 7}, "test": []}
    (folder.path / "results.json").write_text(json.dumps(results))
    assert folder.results() is None  # so that the run is begun, and says why it is not
    (folder.path / "config.json").write_text('{"train": {"seed": 0}}')
    assert folder.results() == results


def test_hours_are_shared_by_those_that_trained_together_at_the_time(tmp_path):
    starts = [
        {"time": "1970-01-01T00:00:10Z", "runs_together": 4},
        {"time": "1970-01-01T00:01:40Z"},
    ]
    line = '{{"tokens": {}, "tokens_per_second": 1, "time": {}}}\n'
    folder = folder_of(
        tmp_path,
        run_json=json.dumps({"starts": starts}),
        metrics_jsonl=line.format(3600, 50) + line.format(7200, 100) + line.format(10800, 200),
    )
    assert searches.hours_of([folder]) == pytest.approx(1 / 4 + 1 + 1)
    (folder.path / "run.json").unlink()
    assert searches.hours_of([folder]) == pytest.approx(3)
    assert records.train_seconds(folder.path / "metrics.jsonl") == pytest.approx(3 * 3600)


def test_tables_are_of_what_has_come_of_runs_by_now(tmp_path):
    """Of those that are done alone nothing new is read."""
    first, _ = grid.claim(tmp_path, SCRIPT, ["seed=0:2"], "")
    folder, finished = records.RunFolder(tmp_path, first), {}
    states = lambda: [row["state"] for row in records.write_tables(tmp_path, finished)]
    assert states() == ["pending", "pending"]
    folder.add_attempt(1, 2.0, "error: out of memory")
    assert states() == ["failed", "pending"]
    score = {"length": 8, "strict": {"sequence_accuracy": 1.0}}
    results = {"steps": 3, "best_step": 2, "parameters": {"total": 7}, "test": [score]}
    (folder.path / "results.json").write_text(json.dumps(results))
    assert states() == ["done", "pending"]
    (folder.path / "results.json").unlink()
    assert states() == ["done", "pending"]
    assert "done" in (tmp_path / records.CSV).read_text()


def test_numbers_of_results_go_by_their_path():
    results = {
        "steps": 3, "mfu": None, "name": "x", "curve": [1.0, 2.0], "none": [],
        "test": [{"length": 4, "loss": 1.5}, {"length": 8, "loss": 2.5, "by": {"a": True}}],
    }  # fmt: skip
    assert records.outcomes("results", results) == {
        "results.steps": 3, "results.name": "x", "results.test.4.loss": 1.5,
        "results.test.8.loss": 2.5, "results.test.8.by.a": True,
    }  # fmt: skip


VALUES = st.none() | st.booleans() | st.integers() | st.text('a",\n', max_size=4) | st.lists(
    st.integers(0, 9), min_size=2, max_size=3
)  # fmt: skip


@cases(60)
@given(st.lists(st.dictionaries(st.sampled_from(["run", "seed", "results.a", "error"]), VALUES)))
def test_a_table_has_every_value_in_its_column(rows):
    columns = records.columns_of(rows)
    assert columns[:2] == ["run", "state"]
    last = ["train_seconds", "hardware", "commits", "attempts", "error"]
    assert columns[-len(last) :] == last
    if {"seed", "results.a"} <= set(columns):
        assert columns.index("seed") < columns.index("results.a")
    read = list(csv.DictReader(io.StringIO(records.to_csv(rows, columns).decode(), newline="")))
    assert len(read) == len(rows)
    for line, row in zip(read, rows, strict=True):
        assert line == {column: records.spell(row.get(column)) for column in columns}


def test_values_are_spelled_as_flags_are():
    assert [records.spell(value) for value in (None, True, 4, (4, 8), [False], 1e-3, "x")] == [
        "", "true", "4", "4,8", "false", "0.001", "x",
    ]  # fmt: skip


@cases(60)
@given(st.lists(st.text("aB/ ~é.=(,)", max_size=200), max_size=6))
def test_folders_of_runs_have_names_that_differ_and_can_be_read_back(values):
    taken = set()
    for value in values:
        name = grid.name_of({"group": value, "seed": "0"}, taken)
        assert name not in taken
        assert grid.is_run_name(name)
        assert len(name) <= grid.LONGEST_NAME + 12
        taken.add(name)


@pytest.mark.parametrize("name", ["", ".", "..", ".hidden", "a/b", "a b", "a\n", "ä"])
def test_what_is_no_name_of_a_run(name):
    assert not grid.is_run_name(name)


def test_a_folder_that_stays_in_use_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(grid, "LOCK_WAIT_S", 0.0)
    with (
        grid.folder_lock(tmp_path),
        pytest.raises(RunDirectoryError, match=r"is in use by process .* for too long"),
        grid.folder_lock(tmp_path),
    ):
        pass
    with grid.folder_lock(tmp_path):  # and is free again
        pass


@cases(60)
@given(st.lists(st.integers(0, 6), max_size=6), st.lists(st.integers(0, 9), max_size=8))
def test_a_sweep_grows_and_never_forgets(saved, wanted):
    """Names of saved runs, of other settings, are those that new ones would have."""

    def runs(numbers):
        return [run_of(f"seed={n}", {"seed": n}, seed=str(n)) for n in dict.fromkeys(numbers)]

    named = [
        run_of(f"seed={place}", run.config, **run.settings) for place, run in enumerate(runs(saved))
    ]
    if set(saved) - set(wanted):
        with pytest.raises(RunDirectoryError, match=r"holds another sweep: .* such as seed="):
            grid.merge("folder", named, runs(wanted))
        return
    merged = grid.merge("folder", named, runs(wanted))
    assert merged[: len(named)] == named
    assert {run.config["seed"] for run in merged} == set(wanted)
    assert len({run.name for run in merged}) == len(merged) == len(set(wanted))
    taken = {run.name for run in named}
    for run in merged[len(named) :]:
        usual = f"seed={run.config['seed']}"
        assert run.name == (f"{usual}~2" if usual in taken else usual)
