"""A run that version 0.1 (commit d63036b) began goes on here as it would have gone on there.

``tests/data/run_v01`` was made by that commit: ``killed`` is the run directory after a kill behind
step 7 of 12, with checkpoints at 4 (the best) and 6; beside it stand the metrics and results that
the same command then gave there.
"""

import json
import shutil
from pathlib import Path

import pytest
from tiny_run import compiled_once, outcome

from deltaproduct_jax import load_run
from experiments import state_tracking

DATA = Path(__file__).parents[1] / "data" / "run_v01"
CLOCK = ("time", "tokens_per_second")


def rows_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


@pytest.fixture(scope="module")
def resumed(tmp_path_factory):
    """The run after the command of version 0.1, given again."""
    workdir = tmp_path_factory.mktemp("v01") / "run"
    shutil.copytree(DATA / "killed", workdir)
    (start,) = json.loads((workdir / "run.json").read_text())["starts"]
    name, where, *flags = start["argv"]
    assert (name, where) == ("experiments.state_tracking", "--workdir=runs/v01")
    with compiled_once(tmp_path_factory.mktemp("compiled")):  # with little optimisation
        assert state_tracking.main([f"--workdir={workdir}", *flags]) == 0
    return workdir


def test_it_goes_on_from_its_newest_checkpoint(resumed):
    starts = json.loads((resumed / "run.json").read_text())["starts"]
    assert [start["resumed_from"] for start in starts] == [None, 6]
    assert (resumed / "config.json").read_bytes() == (DATA / "killed/config.json").read_bytes()


def test_its_numbers_are_those_of_version_0_1(resumed):
    rows, wanted = rows_of(resumed / "metrics.jsonl"), rows_of(DATA / "metrics.jsonl")
    assert rows[:6] == wanted[:6]  # of before the kill, untouched
    assert [row["step"] for row in rows] == list(range(1, 13))
    for row, want in zip(rows[6:], wanted[6:], strict=True):
        assert row.keys() == want.keys() | {"skipped_steps", "goodput"}
        assert row["skipped_steps"] == 0
        for name in want.keys() - set(CLOCK):
            assert row[name] == pytest.approx(want[name], rel=2e-5), (row["step"], name)


def test_its_results_are_those_of_version_0_1(resumed):
    results = outcome(resumed)
    assert results.pop("skipped_steps") == 0
    wanted = json.loads((DATA / "results.json").read_text())
    (entry,), (want,) = results.pop("test"), wanted.pop("test")
    assert results == wanted
    assert entry.pop("loss") == pytest.approx(want.pop("loss"), rel=2e-5)
    assert entry == want


def test_it_loads(resumed):
    assert [load_run(resumed, which).step for which in ("best", "newest")] == [8, 12]
