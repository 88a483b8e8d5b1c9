"""Sweeps of the stand-in script, in this process and in others, and what they leave."""

import csv
import importlib.util
import io
import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import sweep, sweep_grid, sweep_launchers

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = "stand_in"
CHILD_PATH = os.pathsep.join([str(ROOT / "tests"), *filter(None, [os.environ.get("PYTHONPATH")])])


# Importing it here would let it set up logging, in the middle of pytest's.
needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="needs submitit"
)


def find_stand_in(monkeypatch):
    """A name with a dot is taken as it is, others are of experiments; the stand-in is neither."""
    monkeypatch.setenv("PYTHONPATH", CHILD_PATH)
    monkeypatch.setattr(sweep_grid, "module_name", lambda script: script)
    monkeypatch.setattr(sweep_launchers, "module_name", lambda script: script)


def flags_of(workdir, *grids, **others):
    flags = [f"--workdir={workdir}", f"--script={SCRIPT}", *(f"--grid={grid}" for grid in grids)]
    return flags + [f"--{name}={value}" for name, value in others.items()]


def run(workdir, *grids, **others):
    """Exit code of a sweep in this process."""
    try:
        return sweep.main(flags_of(workdir, *grids, **others))
    except SystemExit as stopped:
        return stopped.code


def names(workdir):
    return [run["name"] for run in json.loads((workdir / "runs.json").read_text())["runs"]]


def starts(workdir):
    """How often each run was started."""
    return {
        path.parent.name: len(path.read_text().splitlines())
        for path in sorted(workdir.glob("runs/*/starts.txt"))
    }


def table(workdir):
    return {
        row["run"]: row
        for row in csv.DictReader(io.StringIO((workdir / "results.csv").read_text()))
    }


def never_twice(workdir):
    return not list(workdir.glob("runs/*/twice.txt"))


def process(workdir, *grids, **others):
    """A sweep in a process of its own; its scripts stand outside experiments."""
    program = (
        "import sys; from experiments import sweep, sweep_grid, sweep_launchers; "
        "sweep_grid.module_name = sweep_launchers.module_name = lambda script: script; "
        "sys.exit(sweep.main(sys.argv[1:]))"
    )
    return subprocess.Popen(
        [sys.executable, "-c", program, *flags_of(workdir, *grids, **others)],
        cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
        env=os.environ | {"PYTHONPATH": CHILD_PATH},
    )  # fmt: skip


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def rows_in(workdir):
    return sum(len(p.read_text().splitlines()) for p in workdir.glob("runs/*/metrics.jsonl"))
