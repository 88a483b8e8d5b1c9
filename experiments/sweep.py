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
from collections.abc import Sequence
from pathlib import Path

import jax

from deltaproduct_jax.errors import ConfigError, require_at_least, require_one_of
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.training.stopping import Stopped, stop_on_signals
from experiments.lib import flags
from experiments.lib.sweeps.devices import device_flags
from experiments.lib.sweeps.grid import MOST_RUNS, claim, parse_fixed, read_list
from experiments.lib.sweeps.launchers import (
    LocalLauncher,
    SubmititLauncher,
    TogetherLauncher,
    require_described,
)
from experiments.lib.sweeps.records import CSV, Row, RunFolder, has_parquet, write_tables
from experiments.lib.sweeps.scheduler import Scheduler
from experiments.lib.sweeps.view import Entry, View

LAUNCHERS = ("local", "vmap", "slurm", "none")
POLL_S = 0.1


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
        "local",
        "local: a process here for each run; vmap: one for all runs that differ only in numbers, "
        "which train in one program; slurm: jobs through submitit; none: only the tables",
    )
    workers: int = setting(
        1, "processes at a time (slurm: jobs queued or running), each with a GPU of its own"
    )
    together: int = setting(64, "runs that train in one program at most (launcher=vmap)")
    retries: int = setting(1, "times that a run which died is tried again")
    max_runs: int = setting(MOST_RUNS, "runs that the grids may make; more is taken for a slip")
    gpus: tuple[int, ...] = setting(
        (), "numbers of GPUs handed round to workers here; empty: all, or all to a single worker"
    )
    slurm: str = setting(
        "",
        "submitit's parameters of a job, as slurm_partition=gpu;gpus_per_node=1;timeout_min=240; "
        "cluster=local among them runs the jobs on this machine, without SLURM",
    )
    devices: str = setting(
        "",
        "settings of the devices that each run sees, as mesh=fsdp:-1;compilation_cache=DIR; they "
        "are no part of what a run is",
    )

    def __post_init__(self):
        check_fields(self)
        require_one_of("launcher", self.launcher, LAUNCHERS)
        require_at_least("max_runs", self.max_runs, 1)
        require_at_least("workers", self.workers, 1)
        require_at_least("together", self.together, 1)
        require_at_least("retries", self.retries, 0)
        for number in self.gpus:
            require_at_least("gpus", number, 0)
        if self.slurm and self.launcher != "slurm":
            raise ConfigError(f"slurm={self.slurm!r} needs launcher=slurm, got {self.launcher!r}")
        if self.devices and self.launcher not in ("local", "slurm"):
            raise ConfigError(
                f"devices={self.devices!r} needs launcher=local or launcher=slurm, got "
                f"{self.launcher!r}"
            )
        self.device_flags()
        if self.gpus and self.launcher not in ("local", "vmap"):
            raise ConfigError(
                f"gpus={self.gpus} needs launcher=local or launcher=vmap, got {self.launcher!r}"
            )
        if self.together != type(self).together and self.launcher != "vmap":
            raise ConfigError(
                f"together={self.together} needs launcher=vmap, got {self.launcher!r}"
            )

    def device_flags(self) -> list[str]:
        """Flags of each run; ConfigError where ``devices`` cannot be read."""
        return device_flags(parse_fixed(self.devices, "--devices"))


def command(argv: Sequence[str]) -> None:
    """Runs the sweep; SystemExit with 1, or Stopped by a signal, unless all runs are done."""
    parsed = flags.parse(argv, {"sweep": SweepConfig}, {"default": {}})
    config, workdir = SweepConfig(**parsed.sections["sweep"]), parsed.workdir.absolute()
    # The sweep itself computes nothing; an accelerator is for its runs.
    jax.config.update("jax_platforms", "cpu")
    accept = require_described if config.launcher == "vmap" else lambda run: None
    given = (config.script, config.grid, config.fixed, config.max_runs, accept)
    runs = claim(workdir, *given, to_run=config.launcher != "none")
    if not has_parquet():
        print("results.parquet needs the package pyarrow; only results.csv is written")
    if config.launcher == "none":
        summarize(workdir)
        return
    launcher = make_launcher(config, workdir)
    entries = [Entry(RunFolder(workdir, run)) for run in runs]
    units = launcher.units([entry for entry in entries if not entry.is_done()])

    finished: dict[str, Row] = {}

    def changed() -> None:
        write_tables(workdir, finished)

    changed()
    scheduler = Scheduler(units, launcher.start, config.workers, config.retries, changed)
    view = View(entries, config.workers * max(map(len, units), default=1))
    with stop_on_signals() as request:
        try:
            while not request.is_set() and scheduler.step():
                view.update()
                request.wait(POLL_S)
            if request.is_set():
                view.say("stopping; runs finish their step and save")
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


def make_launcher(
    config: SweepConfig, workdir: Path
) -> LocalLauncher | TogetherLauncher | SubmititLauncher:
    """Where the runs are started."""
    script, _ = read_list(workdir)
    devices = config.device_flags()
    if config.launcher == "vmap":
        return TogetherLauncher(workdir, config.workers, config.gpus, config.together)
    if config.launcher == "slurm":
        return SubmititLauncher(script, config.slurm, workdir, devices)
    return LocalLauncher(script, config.workers, config.gpus, devices)


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
