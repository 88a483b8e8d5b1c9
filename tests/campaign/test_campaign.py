"""Bad flags, configurations and damaged directories at random: one line each, and nothing lost.

1,150 cases by hypothesis, in this process, with a model that compiles at once. A case may end in
success, or in one line on standard error and a directory that is as it was; a traceback, a lost
file, a hang or a dead process fails the test.
"""

import contextlib
import dataclasses
import faulthandler
import shutil
import tempfile
from pathlib import Path

import pytest
import tiny_run
from campaign.damage import (
    NUMBERS,
    TEXTS,
    AcceptedError,
    cases,
    check,
    damage,
    files,
    files_in,
    outcome,
)
from hypothesis import given
from hypothesis import strategies as st
from sweeps.helpers import run as run_sweep
from tiny_run import flags_for, run_config

from deltaproduct_jax.training import loop
from experiments import figures, formal_languages, recall, state_tracking, sweep

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("unchecked")]


@pytest.fixture(scope="module", autouse=True)
def quick(tmp_path_factory):
    """The tiny model, each of its programs compiled once, and an end to whatever hangs."""
    with (
        tiny_run.compiled_once(tmp_path_factory.mktemp("compiled")),
        pytest.MonkeyPatch.context() as patch,
    ):
        patch.setattr(loop, "SequenceModel", tiny_run.TinyModel)
        yield
    faulthandler.cancel_dump_traceback_later()


VALUES = st.one_of(st.sampled_from(NUMBERS + TEXTS), st.text(max_size=6), st.floats().map(str))

TASKS = {
    "state_tracking": state_tracking.EXPERIMENT,
    "recall": recall.EXPERIMENT,
    "formal_languages": formal_languages.EXPERIMENT,
}


def names_of(experiment):
    fields = [
        f.name for section in experiment.sections.values() for f in dataclasses.fields(section)
    ]
    return [name for name in fields if name != "plugins"] + ["config", "preset", "resume_from", "x"]


@cases(500)
@given(data=st.data())
def test_flags(data):
    name = data.draw(st.sampled_from(sorted(TASKS)))
    experiment = TASKS[name]
    chosen = data.draw(st.lists(st.sampled_from(names_of(experiment)), min_size=1, max_size=3))
    flags = [f"--{flag}={data.draw(VALUES)}" for flag in chosen]

    def begins(*_, **__):
        raise AcceptedError

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        # All that is checked before a run begins is checked; then it would train.
        patch.setattr(loop, "run_lock", begins)
        workdir = Path(folder) / "run"
        with contextlib.suppress(AcceptedError):
            code, lines = outcome(experiment.main, [f"--workdir={workdir}", *flags])
            check(code, lines)
            assert code == 2, flags
        assert not workdir.exists()


@cases(60)
@given(workdir=st.one_of(st.sampled_from(TEXTS), st.text(min_size=1, max_size=8)))
def test_workdirs(workdir):
    def begins(*_, **__):
        raise AcceptedError

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.setenv("HOME", folder)
        patch.setattr(loop, "run_lock", begins)
        (Path(folder) / "file").write_text("mine")
        for path in (workdir, f"file/{workdir}"):
            with contextlib.suppress(AcceptedError):
                check(*outcome(TASKS["recall"].main, [f"--workdir={path}", "--group=S3"]))
                check(*outcome(TASKS["state_tracking"].main, [f"--workdir={path}", "--steps=2"]))
        assert [path.name for path in Path(folder).iterdir()] == ["file"]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, quick):
    """A finished run whose best checkpoint is not its newest."""
    workdir = tmp_path_factory.mktemp("trained") / "run"
    with pytest.MonkeyPatch.context() as patch:
        selection = lambda row, _: (1 / row["step"],) if "valid_loss" in row else None
        patch.setattr(loop, "selection_of", selection)
        loop.train(run_config(), workdir, ["test"])
    assert {path.name for path in (workdir / "checkpoints").iterdir()} == {"4", "12"}
    return workdir


RUN = dataclasses.replace(state_tracking.EXPERIMENT, figure=None)


@cases(250)
@given(data=st.data())
def test_run_directories(trained, data):
    with tempfile.TemporaryDirectory() as folder:
        workdir = shutil.copytree(trained, Path(folder) / "run")
        if data.draw(st.integers(0, 3)):
            (workdir / "results.json").unlink()
        for _ in range(data.draw(st.integers(1, 2))):
            top = [path for path in workdir.iterdir() if path.is_file()]
            everything = st.sampled_from(files(workdir))
            damage(data, data.draw(st.one_of(st.sampled_from(sorted(top)), everything)))
        if not data.draw(st.integers(0, 4)):
            (workdir / "checkpoints" / "14").mkdir()
        before = files_in(workdir)
        flags = data.draw(st.sampled_from([[], [], ["--resume_from=4"], ["--resume_from=0"]]))
        code, lines = outcome(RUN.main, [*flags_for(workdir), *flags])
        check(code, lines)
        after = files_in(workdir)
        if code == 2 and not any("is kept as" in line or "begins again" in line for line in lines):
            grown = {"run.json", "metrics.jsonl", "events.out.tfevents.0.run"}
            late = any("at the end" in line or "checkpoint 4 " in line for line in lines)
            same = before.keys() - (grown if late else set())
            assert {name: after.get(name) for name in same} == {n: before[n] for n in same}
        kept = {name for name in before if not name.startswith(("checkpoints", ".", "events"))}
        renamed = {name.replace(".aside1", "") for name in after}
        assert kept <= renamed | after.keys(), kept - renamed


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    folder = tmp_path_factory.mktemp("swept") / "s"
    assert run_sweep(folder, "seed=0:2;failures=0,9", retries=0, workers=2) == 1
    return folder


@cases(150)
@given(data=st.data())
def test_sweeps_and_their_figures(swept, data):
    with tempfile.TemporaryDirectory() as folder:
        workdir = shutil.copytree(swept, Path(folder) / "s")
        for _ in range(data.draw(st.integers(1, 2))):
            damage(
                data,
                data.draw(st.sampled_from(files(workdir, "*.json*") + files(workdir, "*.csv"))),
            )
        before = files_in(workdir)
        source = data.draw(st.sampled_from([workdir, workdir / "results.csv", workdir / "runs"]))
        figure = [f"--workdir={folder}/out", f"--source={source}", "--x=seed", "--by=rate"]
        check(
            *outcome(figures.main, [*figure, "--kind=table", "--metric=strict.sequence_accuracy"])
        )
        assert files_in(workdir) == before
        code, lines = outcome(sweep.main, [f"--workdir={workdir}", "--launcher=none"])
        check(code, lines)
        after = files_in(workdir)
        same = before.keys() - {"results.csv", "results.parquet"}
        assert {name: after.get(name) for name in same} == {n: before[n] for n in same}


GRIDS = ["seed=0:3", "seed=0:999999999", "seed=", ";", "=", "seed=(", "a=b", "steps=0", "rate=nan"]
GRIDS += ["seed=0:99;steps=1:999", "group=" + "x" * 4000, "seed=1;seed=1", "seed=-1:5", "seed=५:७"]


@cases(90)
@given(grid=st.one_of(st.sampled_from(GRIDS), st.text("seed=:;,()0123 ", max_size=12)))
def test_grids(grid):
    with tempfile.TemporaryDirectory() as folder:
        workdir = Path(folder) / "s"
        argv = [f"--workdir={workdir}", "--script=tests.stand_in", f"--grid={grid}"]
        code, lines = outcome(sweep.main, [*argv, "--launcher=none"])
        check(code, lines)
        assert workdir.exists() == (code == 0)


@cases(100)
@given(data=st.data())
def test_configs(trained, data):
    def begins(*_, **__):
        raise AcceptedError

    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "run_lock", begins)
        path = shutil.copy(trained / "config.json", folder)
        damage(data, Path(path))
        with contextlib.suppress(AcceptedError):
            argv = [f"--workdir={folder}/run", f"--config={path}"]
            check(*outcome(state_tracking.main, argv))
        assert not (Path(folder) / "run").exists()
