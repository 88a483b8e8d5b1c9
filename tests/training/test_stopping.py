"""Ctrl-C and SIGTERM save and say how to go on; a finished run goes further where that is right."""

import functools
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import jax
import pytest
import tiny_run
from tiny_run import curve, outcome, rows_in, run_config, snapshot

from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.training import loop, records
from deltaproduct_jax.training.compiled import CompiledByLength
from deltaproduct_jax.training.progress import Progress
from deltaproduct_jax.training.stopping import (
    Stopped,
    StopRequest,
    interrupted_by_signals,
    stop_on_signals,
)
from deltaproduct_jax.training.together.group import train_together

ROOT = Path(__file__).parents[2]
SLOW = functools.partial(pytest.param, marks=pytest.mark.slow)


pytestmark = pytest.mark.usefixtures("compiled_once", "tiny_model")


@pytest.fixture(scope="module")
def finished(tmp_path_factory, compiled_once, tiny_model):
    workdir = tmp_path_factory.mktemp("finished") / "run"
    train(workdir)
    return workdir


def train(workdir, **fields):
    return loop.train(run_config(**fields), workdir, ["test"])


def signal_after(patch, number, step):
    """Sends this process a signal when the record of ``step`` is shown."""
    show = Progress.show

    def shown(self, row):
        show(self, row)
        if row["step"] == step:
            os.kill(os.getpid(), number)
            time.sleep(0.1)  # until the thread that waits for signals has had its turn

    patch.setattr(Progress, "show", shown)


@pytest.mark.parametrize(
    ("name", "shown", "stops_after", "code"),
    # The record of step 2 is shown while step 3, which has none, is under way.
    [("SIGINT", 2, 3, 130), ("SIGTERM", 4, 5, 143), SLOW("SIGHUP", 10, 11, 129)],
)
def test_a_signal_finishes_the_step_and_saves(
    name, shown, stops_after, code, tmp_path, finished, request, capfd
):
    if name == "SIGHUP":  # which nohup ignores, and what is ignored stays so
        before = signal.signal(signal.SIGHUP, signal.SIG_DFL)
        request.addfinalizer(functools.partial(signal.signal, signal.SIGHUP, before))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SequenceModel", tiny_run.TinyModel)
        signal_after(patch, getattr(signal, name), shown)
        with pytest.raises(Stopped) as stopped:
            train(tmp_path)
    spoken = "Ctrl-C" if name == "SIGINT" else name
    says = f"stopped by {spoken} after step {stops_after} of 12; the same command goes on in"
    assert str(stopped.value) == f"{says} {tmp_path}"
    assert stopped.value.exit_code == code
    assert (tmp_path / "checkpoints" / str(stops_after)).is_dir()
    assert [row["step"] for row in rows_in(tmp_path)][-1] <= stops_after
    assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL
    answer = f"{spoken}: the run ends after what it is doing now, and is saved"
    answer += "; a second one ends it at once"
    assert answer in capfd.readouterr().err.splitlines()
    train(tmp_path)
    assert curve(rows_in(tmp_path)) == curve(rows_in(finished))
    assert outcome(tmp_path) == outcome(finished)
    kept = {path.name for path in (tmp_path / "checkpoints").iterdir()}
    assert kept == {path.name for path in (finished / "checkpoints").iterdir()}
    starts = json.loads((tmp_path / "run.json").read_text())["starts"]
    assert [start["resumed_from"] for start in starts] == [None, stops_after]


@pytest.mark.parametrize("is_together", [False, True])
def test_a_loop_is_two_steps_ahead_at_most(is_together, tmp_path, monkeypatch):
    """Though nothing is recorded in between; all that is ahead is waited for before a stop."""
    ahead, most = [0], []
    call, wait = CompiledByLength.__call__, jax.block_until_ready

    def begun(self, *arguments):
        ahead[0] += 1
        most.append(ahead[0])
        return call(self, *arguments)

    def ended(result):
        ahead[0] -= 1
        return wait(result)

    monkeypatch.setattr(CompiledByLength, "__call__", begun)
    monkeypatch.setattr(jax, "block_until_ready", ended)
    config = run_config(**dict.fromkeys(("log_every", "eval_every", "checkpoint_every"), 12))
    if is_together:
        train_together([config], [tmp_path], ["test"])
    else:
        loop.train(config, tmp_path, ["test"])
    assert most[:12] == [1, 2, *[3] * 10]  # the third waits for the first


def test_a_signal_before_the_first_step_leaves_nothing(tmp_path, monkeypatch):
    prepare = loop.Trainer.prepare

    def interrupted(self, *arguments):
        os.kill(os.getpid(), signal.SIGINT)
        prepare(self, *arguments)
        time.sleep(0.1)

    monkeypatch.setattr(loop.Trainer, "prepare", interrupted)
    with pytest.raises(Stopped, match="stopped by Ctrl-C before the first step"):
        train(tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="module")
def stopped_at_3(tmp_path_factory, compiled_once, tiny_model):
    workdir = tmp_path_factory.mktemp("stopped") / "run"
    with pytest.MonkeyPatch.context() as patch:
        signal_after(patch, signal.SIGINT, 2)
        with pytest.raises(Stopped):
            train(workdir)
    return workdir


@pytest.mark.parametrize("is_begun", [False, True])
@pytest.mark.parametrize("is_together", [False, True])
def test_a_signal_while_programs_compile_is_answered_and_no_further_one_begun(
    is_together, is_begun, stopped_at_3, tmp_path, capfd
):
    workdir = tmp_path / "run"
    if is_begun:
        shutil.copytree(stopped_at_3, workdir)
    before, compiled, answers = snapshot(workdir), [], []
    capfd.readouterr()

    def interrupted(self, length, lowered):
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep(0.1)
        answers.append(capfd.readouterr().err)  # while it compiles
        compiled.append(length)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CompiledByLength, "compile", interrupted)
        where = "after step 3 of 12" if is_begun and not is_together else "before the first step"
        with pytest.raises(Stopped, match=f"stopped by Ctrl-C {where}"):
            train_together([run_config()], [workdir], ["t"]) if is_together else train(workdir)
    assert len(compiled) == 1
    answer = "Ctrl-C: the run ends once what compiles now has compiled, and what was saved stays"
    assert answers == [f"{answer}; a second one ends it at once\n"]
    left = snapshot(workdir)
    assert left.keys() == before.keys()  # of a run that had not begun there is nothing
    kept = [name for name in before if "checkpoints" in name or name == "metrics.jsonl"]
    assert [left[name] for name in kept] == [before[name] for name in kept]


TWICE = """
import signal, time
from deltaproduct_jax.training.stopping import stop_on_signals
with stop_on_signals() as request:
    print("ready", flush=True)
    while not request.is_set():
        time.sleep(0.01)
    print(request.name, flush=True)
    time.sleep(60)
"""


def test_a_second_signal_ends_at_once():
    process = subprocess.Popen(
        [sys.executable, "-c", TWICE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "SIGTERM\n"
    process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "")
    assert process.returncode == 130


SLOW_TO_IMPORT = """
import time
print("importing", flush=True)
time.sleep(60)
"""


@pytest.mark.parametrize(
    ("number", "name", "code"), [(signal.SIGINT, "Ctrl-C", 130), (signal.SIGTERM, "SIGTERM", 143)]
)
def test_a_signal_while_jax_is_imported_is_one_line(number, name, code, tmp_path):
    (tmp_path / "jax.py").write_text(SLOW_TO_IMPORT)
    process = subprocess.Popen(
        [sys.executable, "-m", "experiments.train", "--help"],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "importing\n"
    process.send_signal(number)
    text = f"stopped by {name}; the same command begins anew\n"
    assert process.communicate(timeout=20) == ("", text)
    assert process.returncode == code


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM", "SIGHUP"])
def test_what_has_no_steps_is_interrupted(name):
    before = {known: signal.getsignal(known) for known in (signal.SIGINT, signal.SIGTERM)}
    number = getattr(signal, name)
    request = StopRequest()
    with interrupted_by_signals(request, str):
        with stop_on_signals() as inner:  # which takes what is sent inside
            os.kill(os.getpid(), number)
            assert inner.wait(5)
        assert not request.is_set()
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(number)
    assert request.signal_number == number
    assert {known: signal.getsignal(known) for known in before} == before


DEAF = """
import sys, threading, time
from deltaproduct_jax.training import stopping
stopping.GRACE_S = float(sys.argv[1])
request = stopping.StopRequest()
with stopping.interrupted_by_signals(request, lambda: f"ended by {request.name}"):
    word = "ready"
    while True:  # as in a compiler, where no exception arrives
        try:
            print(word, flush=True)
            time.sleep(60)
        except KeyboardInterrupt:
            word = "not heard"
"""


@pytest.mark.parametrize("signals", [1, SLOW(2)])
def test_what_does_not_hear_the_interruption_is_ended(signals):
    process = subprocess.Popen(
        [sys.executable, "-c", DEAF, "0.7" if signals == 1 else "60"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert process.stdout.readline() == "ready\n"
    process.send_signal(signal.SIGTERM)
    assert process.stdout.readline() == "not heard\n"
    if signals == 2:
        process.send_signal(signal.SIGINT)
    assert process.communicate(timeout=20) == ("", "ended by SIGTERM\n")
    assert process.returncode == (143 if signals == 1 else 130)


OUTSIDE = """
from experiments.lib import environment
environment.inside = lambda: True
environment.go_on_inside("m")
"""
INSIDE = """
import sys, time
try:
    print("ready", flush=True)
    time.sleep(60)
except KeyboardInterrupt:
    time.sleep(0.5)
    print("saved", flush=True)
    sys.exit(130)
"""


def test_the_command_around_a_run_waits_for_its_end(tmp_path):
    (tmp_path / "m.py").write_text(INSIDE)
    process = subprocess.Popen(
        [sys.executable, "-c", OUTSIDE],
        cwd=ROOT,
        env=os.environ | {"PYTHONPATH": str(tmp_path)},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    assert process.stdout.readline() == "ready\n"
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    assert process.communicate(timeout=20) == ("saved\n", "")
    assert process.returncode == 130


def test_what_is_ignored_stays_ignored():
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with stop_on_signals() as request:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not request.wait(0.1)
    finally:
        signal.signal(signal.SIGHUP, before)


CONSTANT = {"schedule": "constant", "eval_every": 5, "log_every": 3}


def test_a_finished_run_goes_further_as_if_it_had_never_ended(tmp_path):
    """Except that its old last step was evaluated, and may have been the best."""
    extended, whole = tmp_path / "extended", tmp_path / "whole"
    old = train(extended, **CONSTANT)
    new = train(extended, **CONSTANT, steps=20)
    train(whole, **CONSTANT, steps=20)
    assert (old["steps"], new["steps"]) == (12, 20)
    rows = {row["step"]: row for row in curve(rows_in(extended))}
    assert rows.pop(12)["valid_loss"] > 0  # for the other run a step without an evaluation
    assert list(rows.values()) == [row for row in curve(rows_in(whole)) if row["step"] != 12]
    assert json.loads((extended / "config.json").read_text())["train"]["steps"] == 20
    assert json.loads((extended / "results.aside1.json").read_text()) == old
    starts = json.loads((extended / "run.json").read_text())["starts"]
    assert [start.get("extended_from") for start in starts] == [None, 12]
    with pytest.raises(RunDirectoryError, match=r"steps \(20 there, 12 here\)"):
        train(extended, **CONSTANT)
    assert train(extended, **CONSTANT, steps=20) == new


@pytest.mark.parametrize("writes_before", [SLOW(0), 1, SLOW(2)])
def test_a_kill_while_a_run_is_extended_loses_nothing(writes_before, tmp_path, monkeypatch):
    old = train(tmp_path, **CONSTANT)
    real, left = records.write_file, [writes_before]

    def broken(path, data, **options):
        if path.name in ("run.json", "config.json", "results.json"):
            left[0] -= 1
            if left[0] < 0:
                raise RunDirectoryError("killed")
        real(path, data, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(records, "write_file", broken)
        with pytest.raises(RunDirectoryError, match="killed"):
            train(tmp_path, **CONSTANT, steps=20)
    assert train(tmp_path, **CONSTANT, steps=20)["steps"] == 20
    kept = [json.loads(path.read_text()) for path in tmp_path.glob("results.aside*.json")]
    assert kept == [old]


REFUSED = [
    ({}, "schedule=cosine is spread over all steps"),
    (CONSTANT | {"curriculum": (2,)}, "curriculum is spread"),
    (CONSTANT | {"grow_from": 2}, "grow_from is spread"),
]


@pytest.mark.parametrize(("fields", "says"), REFUSED)
def test_where_steps_made_would_have_been_others_a_line_says_why_not(
    fields, says, tmp_path, finished
):
    workdir = shutil.copytree(finished, tmp_path / "run")
    (workdir / "config.json").write_text(json.dumps(run_config(**fields).to_dict()))
    before = snapshot(workdir)
    with pytest.raises(RunDirectoryError, match=f"steps=24 cannot extend the 12 steps .* {says}"):
        train(workdir, **fields, steps=24)
    assert snapshot(workdir) == before
