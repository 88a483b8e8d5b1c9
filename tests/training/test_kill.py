"""Processes killed with SIGKILL: the same command goes on to the same numbers, bit for bit."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from event_files import read_events, scalars
from tiny_run import curve, flags_for, outcome, rows_in

ROOT = Path(__file__).resolve().parents[2]
MODEL = {"num_heads": 1, "head_dim": 8, "intermediate_size": 8, "implementation": "recurrent"}


# A process whose files may not grow beyond so many bytes; a limit set between fork and exec would
# fork a process of many threads.
LIMITED = """
import resource, runpy, sys
resource.setrlimit(resource.RLIMIT_FSIZE, (int(sys.argv[1]),) * 2)
del sys.argv[1]
runpy.run_module("experiments.state_tracking", run_name="__main__")
"""


def start(workdir: Path, *, largest_file: int | None = None, **fields) -> subprocess.Popen:
    """Starts a run of the real model, its compilation kept short."""
    fields = {"eval_lengths": (4,), "curriculum": (2,), "curriculum_fraction": 0.3} | MODEL | fields
    program = ["-m", "experiments.state_tracking"]
    if largest_file is not None:
        program = ["-c", LIMITED, str(largest_file)]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "JAX_DISABLE_MOST_OPTIMIZATIONS": "1"}
    return subprocess.Popen(
        [sys.executable, *program, *flags_for(workdir, **fields)], cwd=ROOT, env=environment,
        text=True, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip


def finish(workdir: Path, **fields) -> str:
    process = start(workdir, **fields)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 0, stderr
    return stdout


def kill_when(process: subprocess.Popen, condition) -> bool:
    """Kills the process once the condition holds; False if it ended before."""
    while process.poll() is None:
        if condition():
            process.send_signal(signal.SIGKILL)
            process.communicate()
            return True
        time.sleep(0.002)
    process.communicate()
    return False


def lines_in(workdir: Path) -> int:
    path = workdir / "metrics.jsonl"
    return path.read_bytes().count(b"\n") if path.exists() else 0


def checkpoints_in(workdir: Path) -> set[str]:
    path = workdir / "checkpoints"
    return {entry.name for entry in path.iterdir()} if path.exists() else set()


def check_same(workdir: Path, undisturbed: Path) -> None:
    """Curve, events, results and kept checkpoints are those of the run that nobody killed."""
    rows = rows_in(workdir)
    assert curve(rows) == curve(rows_in(undisturbed))
    events = scalars(read_events(workdir / "events.out.tfevents.0.run"))
    assert [step for step, _ in events] == [row["step"] for row in rows]
    assert [values["train/loss"] for _, values in events] == [row["loss"] for row in rows]
    assert outcome(workdir) == outcome(undisturbed)
    assert checkpoints_in(workdir) == checkpoints_in(undisturbed)


FAST = {"steps": 40, "log_every": 1, "eval_every": 10, "checkpoint_every": 8}


@pytest.mark.slow
def test_killed_twice(tmp_path):
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    # Before the first checkpoint, then after one, with a torn line and a torn save left behind.
    assert kill_when(start(killed, **FAST), lambda: lines_in(killed) >= 3)
    assert kill_when(start(killed, **FAST), lambda: lines_in(killed) >= 18)
    with open(killed / "metrics.jsonl", "ab") as file:
        file.write(b'{"step": 1')
    newest = max(int(name) for name in checkpoints_in(killed) if name.isdigit())
    torn = killed / "checkpoints" / f"{newest + 1}.orbax-checkpoint-tmp"
    shutil.copytree(killed / "checkpoints" / str(newest), torn)
    (torn / "_CHECKPOINT_METADATA").unlink()
    finish(killed, **FAST)
    printed = finish(undisturbed, **FAST)
    check_same(killed, undisturbed)
    starts = json.loads((killed / "run.json").read_text())["starts"]
    assert [entry["resumed_from"] for entry in starts] == [None, None, newest]
    # Finished: the same command says the same again and changes nothing.
    before = {path: path.stat().st_mtime_ns for path in killed.rglob("*")}
    assert finish(killed, **FAST) == printed
    assert {path: path.stat().st_mtime_ns for path in killed.rglob("*")} == before


@pytest.mark.slow
def test_a_save_that_really_fails_is_one_line(tmp_path):
    # Small files may be written, a checkpoint's data may not: the disk is full for Orbax alone.
    process = start(tmp_path, largest_file=5000, **FAST)
    stdout, stderr = process.communicate(timeout=300)
    assert process.returncode == 2
    assert stdout == ""
    progress = ("step ", "compiling ")
    lines = [line for line in stderr.splitlines() if not line.startswith(progress)]
    assert len(lines) == 1, lines
    line = lines[0]
    assert re.match(r"error: checkpoints in .* cannot be written: .*File too large", line)
    assert [row["step"] for row in rows_in(tmp_path)] == list(range(1, len(rows_in(tmp_path)) + 1))


@pytest.mark.slow
@pytest.mark.parametrize("seed", [0, 1])
def test_killed_at_random_moments(tmp_path, seed):
    fields = {"steps": 400, "log_every": 5, "eval_every": 20, "checkpoint_every": 7, "seed": seed}
    killed, undisturbed = tmp_path / "killed", tmp_path / "undisturbed"
    began = time.time()
    finish(undisturbed, **fields)
    whole, chance = time.time() - began, random.Random(seed)
    kills = torn_saves = 0

    def saving() -> bool:
        return any("tmp" in name for name in checkpoints_in(killed))

    while kills < 30:
        lines, end = (
            lines_in(killed) + chance.randrange(1, 8),
            time.time() + chance.uniform(0.05, 0.5) * whole,
        )
        moments = [
            lambda: lines_in(killed) > 0 and saving(),  # in the middle of a save
            lambda end=end: time.time() > end,  # at any moment, starting up included
            lambda lines=lines: lines_in(killed) >= lines,  # after some progress
        ]
        if not kill_when(start(killed, **fields), moments[kills % 3]):
            break
        kills += 1
        torn_saves += saving()
    assert kills >= 5
    assert torn_saves >= 1
    finish(killed, **fields)
    check_same(killed, undisturbed)
