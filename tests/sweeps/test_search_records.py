"""A search that goes on from records: older ones, damaged ones, those of another run."""

import json
import shutil

import pytest
from sweeps.helpers import names, starts
from sweeps.search_stand_in import argv, ends

from experiments import search
from experiments.lib.sweeps.running import LaunchConfig, Sweep, run_sweep

MORE = ["--settings=2", "--seeds=1", "--fresh=2"]


def rate(settings):
    return float(settings["learning_rate"]) * 50


@pytest.fixture(scope="module")
def ended(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("search")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(search, "run_sweep", ends(rate, rate))
        assert search.main(argv(workdir, *MORE)) == 0
    return workdir


@pytest.fixture
def searched(ended, tmp_path, monkeypatch):
    """A search that has ended; its runs may be made again."""
    monkeypatch.setattr(search, "run_sweep", ends(rate, rate))
    return shutil.copytree(ended, tmp_path / "search")


def found(workdir):
    """What came of a search, wherever it lies."""
    record = json.loads((workdir / "search.json").read_text())
    return {name: value for name, value in record.items() if name != "command"}


def test_a_list_of_an_older_version_lacks_fields(searched):
    before = found(searched)
    for part in ("tried", "chosen"):
        path = searched / part / "runs.json"
        saved = json.loads(path.read_text())
        for run in saved["runs"]:
            del run["config"]["train"]["max_skipped_steps"]
        path.write_text(json.dumps(saved))
    assert search.main(argv(searched, *MORE)) == 0
    assert found(searched) == before


def break_results(run):
    (run / "results.json").write_bytes((run / "results.json").read_bytes()[:40])


def break_metrics(run):
    (run / "metrics.jsonl").write_bytes((run / "metrics.jsonl").read_bytes()[:-40])


def swap(run):
    config = json.loads((run.parents[1] / "runs.json").read_text())["runs"][0]["config"]
    config["train"]["learning_rate"] = 0.5
    (run / "config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    ("part", "harm", "says"),
    [
        ("tried", break_results, "results.json is not valid JSON"),
        ("chosen", break_results, "results.json is not valid JSON"),
        ("tried", break_metrics, "metrics.jsonl has no scores of step 4, the best by results.json"),
        ("tried", swap, "holds another run, differing in learning_rate (0.5 there, "),
        ("chosen", swap, "holds another run, differing in learning_rate (0.5 there, "),
    ],
)
def test_a_damaged_record_is_no_run_that_failed(part, harm, says, searched, capsys):
    before = found(searched)
    harm(min((searched / part / "runs").iterdir()))
    assert search.main(argv(searched, *MORE)) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ")
    assert says in error
    assert found(searched) == before


def test_what_is_no_choice_any_more_is_not_run(tmp_path, monkeypatch):
    """A look at the table half-way chooses the lower rate, the end of the search the higher one."""
    half = lambda settings: 0.5 if settings["learning_rate"] == "0.0001" else None
    nothing, half_way = ends(lambda s: None, half), ends(half, half)
    sweeps = iter([half_way, nothing])
    monkeypatch.setattr(search, "run_sweep", lambda *given: next(sweeps)(*given))
    assert search.main(argv(tmp_path, *MORE, "--launcher=none")) == 0
    monkeypatch.setattr(search, "run_sweep", ends(rate, rate))
    # Those that are there already are not taken for more than there may be.
    assert search.main(argv(tmp_path, *MORE, "--max_runs=4")) == 0
    made = [path.name for path in (tmp_path / "chosen" / "runs").iterdir()]
    assert len(made) == 4
    assert all("learning_rate=0.01," in name for name in made)
    assert len(names(tmp_path / "chosen")) == 8
    assert found(tmp_path)["missing"] == 0


def test_kept_runs_of_a_sweep_are_in_its_list_and_not_begun(tmp_path, capsys):
    sweep = Sweep("tests.stand_in", ["seed=0"], "", kept=["seed=0:3"])
    assert run_sweep(tmp_path, sweep, LaunchConfig())
    assert names(tmp_path) == ["seed=0", "seed=1", "seed=2"]
    assert starts(tmp_path) == {"seed=0": 1}
    assert "1 runs: 1 done" in capsys.readouterr().out
