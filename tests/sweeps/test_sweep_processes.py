"""Sweeps that are killed, interrupted, doubled or sent to a cluster: none lost, none run twice."""

import contextlib
import json
import os
import random
import re
import signal
import subprocess
import sys
import time

import pytest
from sweeps.helpers import (
    ROOT,
    names,
    needs_submitit,
    never_twice,
    process,
    rows_in,
    run,
    starts,
    table,
    wait_until,
)
from tiny_run import outcome, run_config

from deltaproduct_jax.training.locks import Lock
from experiments.lib.sweeps import attempts

SLOW_STEPS = "steps=20;step_ms=20"


@pytest.mark.slow
def test_two_sweeps_share_a_folder(tmp_path):
    other = process(tmp_path, "seed=0:8", fixed=SLOW_STEPS, workers=2)
    wait_until(lambda: rows_in(tmp_path) > 0)
    assert run(tmp_path, "seed=0:10", fixed=SLOW_STEPS, workers=2) == 0  # two more than the other
    assert other.wait(60) == 0, other.communicate()
    out = other.communicate()[0]
    assert set(starts(tmp_path).values()) == {1}
    assert len(starts(tmp_path)) == 10
    assert never_twice(tmp_path)
    assert {row["state"] for row in table(tmp_path).values()} == {"done"}
    assert "8 runs: 8 done" in out


def test_killed_twice_and_resumed_without_loss(tmp_path):
    arguments = {"fixed": "steps=150;step_ms=20", "workers": 2}
    first = process(tmp_path, "seed=0:4", **arguments)
    wait_until(lambda: rows_in(tmp_path) > 5)
    first.kill()  # its two runs go on without it
    first.wait()
    second = process(tmp_path, "seed=0:4", **arguments)
    wait_until(lambda: "seed=2" in starts(tmp_path))  # the others are left in peace
    second.kill()
    second.wait()
    assert set(starts(tmp_path).values()) == {1}
    for path in tmp_path.glob("runs/*/at_work"):  # and now the runs themselves
        if not (path.parent / "results.json").exists():
            os.kill(int(path.read_text()), signal.SIGKILL)
    assert run(tmp_path, "seed=0:4", **arguments) == 0
    assert never_twice(tmp_path)
    assert {row["state"] for row in table(tmp_path).values()} == {"done"}
    for name in names(tmp_path):  # every step was made once
        rows = (tmp_path / "runs" / name / "metrics.jsonl").read_text().splitlines()
        assert [json.loads(row)["step"] for row in rows] == list(range(1, 151))


@pytest.mark.parametrize(("name", "code"), [("SIGINT", 130), ("SIGTERM", 143)])
def test_ctrl_c_stops_the_children(name, code, tmp_path):
    sweeping = process(tmp_path, "seed=0:3", fixed="steps=2000;step_ms=20", workers=2)
    wait_until(lambda: len(starts(tmp_path)) == 2 and rows_in(tmp_path) > 1)
    pids = [int(path.read_text()) for path in tmp_path.glob("runs/*/at_work")]
    sweeping.send_signal(getattr(signal, name))
    out = sweeping.communicate(timeout=30)[0]
    assert sweeping.returncode == code
    assert "stopping; runs finish their step and save" in out
    spoken = "Ctrl-C" if name == "SIGINT" else name
    last = f"stopped by {spoken}; the same command goes on in {tmp_path}"
    assert out.splitlines()[-1] == last
    for pid in pids:
        with pytest.raises(ProcessLookupError):
            os.kill(pid, 0)
    states = {row["run"]: row["state"] for row in table(tmp_path).values()}
    assert states == {"seed=0": "started", "seed=1": "started", "seed=2": "pending"}
    # What was stopped on purpose has not failed.
    assert not list(tmp_path.glob("runs/*/attempts.jsonl"))


# Says what it hears, and saves for a while.
SAVES = """
import signal, time
heard = []
signal.signal(signal.SIGTERM, lambda *_: (heard.append(0), print("heard", flush=True)))
print("ready", flush=True)
while not heard:
    time.sleep(0.01)
time.sleep(0.3)
"""


def test_a_run_is_asked_to_stop_once(tmp_path):
    """A second time would not let it save: a sweep asks all its runs, then waits for each."""
    said = {"stdout": subprocess.PIPE, "text": True}
    process = subprocess.Popen([sys.executable, "-S", "-c", SAVES], **said)
    attempt = attempts.Attempt(attempts.Claims([]), process, tmp_path / "log.txt")
    assert process.stdout.readline() == "ready\n"
    attempt.ask_to_stop()
    assert process.stdout.readline() == "heard\n"
    attempt.stop()
    assert process.communicate() == ("", None)


@needs_submitit
@pytest.mark.slow
def test_jobs_through_submitit(tmp_path):
    others = {"launcher": "slurm", "slurm": "cluster=local;timeout_min=5", "workers": 2}
    assert run(tmp_path, "seed=0;failures=0,1", devices="mesh=data:1", **others) == 0
    (log,) = tmp_path.glob("runs/seed=0,failures=0/log.txt")
    assert log.read_text().splitlines()[0].endswith(" --mesh=data:1")
    assert starts(tmp_path) == {"seed=0,failures=0": 1, "seed=0,failures=1": 2}
    assert {row["state"] for row in table(tmp_path).values()} == {"done"}
    assert not list(tmp_path.glob("runs/*/job.json"))
    assert run(tmp_path, **others) == 0
    assert sum(starts(tmp_path).values()) == 3


TINY = {
    "group": "Z3", "train_length": 4, "eval_lengths": (4,), "hidden_size": 8, "num_heads": 1,
    "head_dim": 8, "intermediate_size": 8, "implementation": "recurrent", "steps": 60,
    "curriculum": (2,), "curriculum_fraction": 0.3, "eval_every": 10, "checkpoint_every": 7,
}  # fmt: skip


def sweep_of(workdir, **fields):
    """A sweep over seeds of real runs that compile quickly."""
    config = run_config(**(TINY | fields)).to_dict()
    values = {name: value for part in config.values() for name, value in part.items()}
    del values["vocab_size"], values["seed"]
    fixed = ";".join(f"{k}={re.sub('[][ ]', '', str(v))}" for k, v in values.items())
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    command = [sys.executable, "-m", "experiments.sweep", f"--workdir={workdir}", "--workers=2"]
    command += ["--script=state_tracking", "--grid=seed=0:3", f"--fixed={fixed}"]
    return subprocess.Popen(command, cwd=ROOT, env=environment, start_new_session=True)


@pytest.mark.slow
def test_children_of_a_stopped_sweep_save_their_last_step(tmp_path):
    sweeping = sweep_of(
        tmp_path, steps=100_000, log_every=1, eval_every=50_000, checkpoint_every=50_000
    )
    wait_until(lambda: rows_in(tmp_path) > 100, 300)
    sweeping.send_signal(signal.SIGTERM)
    assert sweeping.wait(120) == 143
    begun = [path for path in tmp_path.glob("runs/*") if (path / "config.json").exists()]
    assert begun
    for path in begun:
        (saved,) = [int(step.name) for step in (path / "checkpoints").iterdir()]
        last = json.loads((path / "metrics.jsonl").read_text().splitlines()[-1])
        assert last["step"] == saved > 0
        assert not (path / "attempts.jsonl").exists()
        assert "stopped by SIGTERM after step" in (path / "log.txt").read_text()


@pytest.mark.slow
def test_real_runs_killed_at_random_moments(tmp_path):
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    assert sweep_of(undisturbed).wait() == 0
    chance = random.Random(0)
    for _ in range(8):
        sweeping, end = sweep_of(killed), time.monotonic() + chance.uniform(2, 25)
        while sweeping.poll() is None and time.monotonic() < end:
            time.sleep(0.01)
        sweeping.kill()
        sweeping.wait()
        # Its runs were told to save and end; now and then one is killed while it does.
        for path in killed.glob("runs/*/.lock"):
            lock = Lock(path)
            # Who has taken it says so a moment later.
            owner = re.match(r"process (\d+) on ", lock.owner())
            if chance.random() < 0.7 and lock.is_held() and owner:
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(owner[1]), signal.SIGKILL)
    assert sweep_of(killed).wait() == 0
    assert names(killed) == names(undisturbed)
    for name in names(killed):
        runs = [workdir / "runs" / name for workdir in (killed, undisturbed)]
        assert outcome(runs[0]) == outcome(runs[1])
        losses = [
            [json.loads(line)["loss"] for line in (path / "metrics.jsonl").read_text().splitlines()]
            for path in runs
        ]
        assert losses[0] == losses[1]
