"""Sweeps of the stand-in script, in this process and in others, and what they leave."""

import csv
import importlib.util
import io
import json
import subprocess
import sys
import time
from pathlib import Path

import pytest

from experiments import sweep

ROOT = Path(__file__).resolve().parents[2]
SCRIPT = "tests.stand_in"


# Importing it here would let it set up logging, in the middle of pytest's.
needs_submitit = pytest.mark.skipif(
    importlib.util.find_spec("submitit") is None, reason="needs submitit"
)


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
    files = sorted(workdir.glob("runs/*/starts.txt"))
    counts = {path.parent.name: len(path.read_text().splitlines()) for path in files}
    return {name: count for name, count in counts.items() if count}  # a file is there before a line


def table(workdir):
    return {
        row["run"]: row
        for row in csv.DictReader(io.StringIO((workdir / "results.csv").read_text()))
    }


def never_twice(workdir):
    return not list(workdir.glob("runs/*/twice.txt"))


def process(workdir, *grids, **others):
    """A sweep in a process of its own."""
    command = [sys.executable, "-m", "experiments.sweep", *flags_of(workdir, *grids, **others)]
    return subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )


def wait_until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def rows_in(workdir):
    return sum(len(p.read_text().splitlines()) for p in workdir.glob("runs/*/metrics.jsonl"))
