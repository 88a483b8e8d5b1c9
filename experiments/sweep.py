"""Many runs of one script: a grid written as flags, run here or on a cluster, and resumed.

    python -m experiments.sweep --workdir=runs/groups --script=state_tracking --workers=2 \\
        --grid="group=S3,S4;num_householder=1,2;seed=0:3" --fixed="steps=2000"

The runs are expanded, checked and saved in ``runs.json`` before the first is started; each is a
child process with its folder under ``runs/`` (``lib/sweeps/grid.py`` has the syntax of grids). What
is done is skipped, what died is tried again from its last checkpoint, and no run is ever run twice
at once: the same command, or only ``--workdir``, goes on after a kill, and several may share a
folder.
``results.csv`` and ``results.parquet`` hold every run with its settings and outcome; with
``--launcher=none`` they are made from the records without starting anything.

Ctrl-C and SIGTERM tell the runs to finish their step and save; a second one ends the sweep at once.

The exit code is 0 if all runs are done, 1 if one has failed for good, 130 after Ctrl-C, 143 after
SIGTERM.

Source: this project; grids and seeds as the papers behind ``--script`` have them.
Expect: a line of results.csv for every run; experiments/results/state_tracking/ has several sweeps.
Takes: what its runs take, by the number of ``--workers``.
"""

import dataclasses
import sys
import time
from collections import deque
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Protocol

import jax

from deltaproduct_jax.errors import ConfigError, require_at_least, require_one_of
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.training.stopping import Stopped, stop_on_signals
from experiments.lib import flags
from experiments.lib.sweeps.grid import MOST_RUNS, claim, read_list
from experiments.lib.sweeps.launchers import LocalLauncher, SubmititLauncher
from experiments.lib.sweeps.records import CSV, Row, RunFolder, has_parquet, write_tables
from experiments.lib.sweeps.view import Entry, View

LAUNCHERS = ("local", "slurm", "none")
POLL_S = 0.1
# Runs that another process is at are looked at again after so long.
ELSEWHERE_S = 2.0


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """What is swept, and where; raises ConfigError where the fields make no sense."""

    script: str | None = setting(
        None, "script of experiments whose runs these are; none: that of the folder's sweep"
    )
    grid: tuple[str, ...] = setting(
        (),
        "settings and their values, as group=S3,S4;seed=0:5; given several times, the runs of all "
        "grids are run; without any, the folder's sweep goes on",
        repeated=True,
    )
    fixed: str = setting("", "settings that all runs share, as steps=2000;batch_size=64")
    launcher: str = setting(
        "local", "local: processes here; slurm: jobs through submitit; none: only the tables"
    )
    workers: int = setting(1, "runs at a time (slurm: jobs queued or running)")
    retries: int = setting(1, "times that a run which died is tried again")
    max_runs: int = setting(MOST_RUNS, "runs that the grids may make; more is taken for a slip")
    gpus: tuple[int, ...] = setting(
        (), "numbers of GPUs handed round to local workers; empty: every worker sees all"
    )
    slurm: str = setting(
        "", "submitit's parameters of a job, as slurm_partition=gpu;gpus_per_node=1;timeout_min=240"
    )

    def __post_init__(self):
        check_fields(self)
        require_one_of("launcher", self.launcher, LAUNCHERS)
        require_at_least("max_runs", self.max_runs, 1)
        require_at_least("workers", self.workers, 1)
        require_at_least("retries", self.retries, 0)
        for number in self.gpus:
            require_at_least("gpus", number, 0)
        if self.slurm and self.launcher != "slurm":
            raise ConfigError(f"slurm={self.slurm!r} needs launcher=slurm, got {self.launcher!r}")
        if self.gpus and self.launcher != "local":
            raise ConfigError(f"gpus={self.gpus} needs launcher=local, got {self.launcher!r}")


class Running(Protocol):
    """An attempt at a run that is under way."""

    def poll(self) -> str | None:
        """None while it runs; then what went wrong, empty if nothing did."""

    def ask_to_stop(self) -> None:
        """Tells it to end, without waiting for that."""

    def stop(self) -> None:
        """Ends it so that the run can go on later."""


class Scheduler:
    """Keeps the workers busy until every run is done or has failed for good.

    Args:
        entries: the runs, in the order in which they are started.
        start: begins an attempt at a run as worker number ``slot``; None if another process is at
            the run.
        workers: attempts at a time.
        retries: times that a run which died is tried again.
        changed: called whenever a run has come to an end.
    """

    def __init__(
        self,
        entries: Sequence[Entry],
        start: Callable[[RunFolder, int], Running | None],
        workers: int,
        retries: int,
        changed: Callable[[], None],
    ):
        self._start = start
        self._retries = retries
        self._changed = changed
        self._slots: list[tuple[Entry, Running] | None] = [None] * min(workers, len(entries))
        self._queue: deque[Entry] = deque()
        for entry in entries:
            if not self._is_done(entry):
                self._queue.append(entry)

    def _is_done(self, entry: Entry) -> bool:
        if entry.folder.results() is None:
            return False
        entry.state, entry.error = "done", ""
        return True

    def step(self) -> bool:
        """Looks at what runs and starts what can be started; False once nothing is left to do."""
        for slot, busy in enumerate(self._slots):
            if busy is not None and (error := busy[1].poll()) is not None:
                self._slots[slot] = None
                self._ended(busy[0], error)
        for slot, busy in enumerate(self._slots):
            if busy is None:
                self._fill(slot)
        return bool(self._queue) or any(self._slots)

    def _ended(self, entry: Entry, error: str) -> None:
        entry.seconds = entry.folder.seconds()
        if not self._is_done(entry):
            entry.failures += 1
            entry.error = error
            again = entry.failures <= self._retries
            entry.state = "waiting" if again else "failed"
            if again:
                self._queue.append(entry)
        self._changed()

    def _fill(self, slot: int) -> None:
        """Starts the first run in the queue that nobody is at."""
        for _ in range(len(self._queue)):
            entry = self._queue.popleft()
            if time.monotonic() < entry.look_again:
                self._queue.append(entry)
                continue
            running = self._start(entry.folder, slot)
            if running is not None:
                entry.state, entry.began = "running", time.monotonic()
                self._slots[slot] = entry, running
                return
            if self._is_done(entry):  # by another process
                self._changed()
                continue
            entry.state, entry.look_again = "elsewhere", time.monotonic() + ELSEWHERE_S
            self._queue.append(entry)

    def stop(self) -> None:
        """Ends what runs, all at the same time."""
        for busy in filter(None, self._slots):
            busy[1].ask_to_stop()
        for busy in filter(None, self._slots):
            busy[1].stop()
            busy[0].state = "waiting"
        self._slots = [None] * len(self._slots)


def command(argv: Sequence[str]) -> None:
    """Runs the sweep; SystemExit with 1, or Stopped by a signal, unless all runs are done."""
    parsed = flags.parse(argv, {"sweep": SweepConfig}, {"default": {}})
    config, workdir = SweepConfig(**parsed.sections["sweep"]), parsed.workdir.absolute()
    # The sweep itself computes nothing; an accelerator is for its runs.
    jax.config.update("jax_platforms", "cpu")
    runs = claim(workdir, config.script, config.grid, config.fixed, config.max_runs)
    if not has_parquet():
        print("results.parquet needs the package pyarrow; only results.csv is written")
    if config.launcher == "none":
        summarize(workdir)
        return
    launcher = make_launcher(config, workdir)
    entries = [Entry(RunFolder(workdir, run)) for run in runs]

    finished: dict[str, Row] = {}

    def changed() -> None:
        write_tables(workdir, finished)

    changed()
    scheduler = Scheduler(entries, launcher.start, config.workers, config.retries, changed)
    view = View(entries)
    with stop_on_signals() as request:
        try:
            while not request.is_set() and scheduler.step():
                view.update()
                request.wait(POLL_S)
            if request.is_set():
                print("stopping; runs finish their step and save", file=sys.stderr, flush=True)
        finally:
            scheduler.stop()  # nothing is left to stop where all has ended
        write_tables(workdir)
        view.close()
        print(f"results: {workdir / CSV}", flush=True)
    if request.is_set():
        text = f"stopped by {request.name}; the same command goes on in {workdir}"
        raise Stopped(text, request.signal_number)
    if any(entry.state == "failed" for entry in entries):
        raise SystemExit(1)


def make_launcher(config: SweepConfig, workdir: Path) -> LocalLauncher | SubmititLauncher:
    """Where the runs are started."""
    script, _ = read_list(workdir)
    if config.launcher == "slurm":
        return SubmititLauncher(script, config.slurm, workdir)
    return LocalLauncher(script, config.workers, config.gpus)


def summarize(workdir: Path) -> None:
    """Makes the tables anew and prints how the runs stand, by the records alone."""
    rows = write_tables(workdir)
    for row in rows:
        print("  ".join(filter(None, (row["run"], row["state"], row["error"]))))
    print(f"results: {workdir / CSV}")


def main(argv: Sequence[str]) -> int:
    """Exit code of the command; ``argv`` without the program's name."""
    return flags.run(command, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
