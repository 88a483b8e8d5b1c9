"""The runs of a sweep, run here or on a cluster until all of them are done."""

import dataclasses
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.training.stopping import Stopped, stop_on_signals
from experiments.lib.sweeps.devices import device_flags
from experiments.lib.sweeps.grid import (
    MOST_RUNS,
    Run,
    claim,
    expand,
    identity,
    parse_fixed,
)
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


class Sweep(NamedTuple):
    """What is run; of the ``kept`` grids nothing is begun any more."""

    script: str | None
    grids: Sequence[str]
    fixed: str
    most: int = MOST_RUNS
    kept: Sequence[str] = ()

    def claim(
        self, folder: Path, accept: Callable[[str, Sequence[Run]], None], *, to_run: bool = True
    ) -> list[Run]:
        """Its runs, the kept ones too, as `grid.claim` saves them, which raises."""
        grids = [*self.grids, *self.kept]
        return claim(folder, self.script, grids, self.fixed, self.most, accept, to_run=to_run)

    def idle(self) -> set[str]:
        """The `grid.identity` of the runs that are in the kept grids alone."""
        if not self.kept:
            return set()
        kept, wanted = (
            {identity(run.config) for run in expand(self.script, grids, self.fixed, self.most)}
            for grids in (self.kept, self.grids)
        )
        return kept - wanted


@dataclasses.dataclass(frozen=True)
class LaunchConfig:
    """Where runs are run, and how many at once; ConfigError where the fields make no sense."""

    launcher: str = setting(
        "local",
        "local: a process here for each run; vmap: one for all runs that differ only in numbers, "
        "which train in one program; slurm: jobs through submitit; none: only the tables",
        one_of=LAUNCHERS,
    )
    workers: int = setting(
        1,
        "processes at a time (slurm: jobs queued or running), each with a GPU of its own",
        least=1,
    )
    together: int = setting(64, "runs that train in one program at most (launcher=vmap)", least=1)
    retries: int = setting(1, "times that a run which died is tried again", least=0)
    gpus: tuple[int, ...] = setting(
        (),
        "numbers of GPUs handed round to workers here; empty: all, or all to a single worker",
        least=0,
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


def run_sweep(workdir: Path, sweep: Sweep, launch: LaunchConfig) -> bool:
    """Runs what is not done yet, and makes the tables; whether no run has failed for good.

    Args:
        workdir: of the sweep, absolute.
        sweep: its runs.
        launch: where they are run. With the launcher "none" only the tables are made.

    Raises:
        ConfigError, RunDirectoryError: as `grid.claim` does.
        Stopped: by a signal, when the runs have ended or saved.
    """
    launcher = None

    def accept(script: str, wanted: Sequence[Run]) -> None:
        nonlocal launcher  # which is known to work before anything is written
        launcher = make_launcher(launch, workdir, script, wanted)

    runs = sweep.claim(workdir, accept, to_run=launch.launcher != "none")
    if not has_parquet():
        print("results.parquet needs the package pyarrow; only results.csv is written")
    if launcher is None:
        summarize(workdir)
        return True
    idle = sweep.idle()
    entries = [Entry(RunFolder(workdir, r)) for r in runs if identity(r.config) not in idle]
    units = launcher.units([entry for entry in entries if not entry.is_done()])

    finished: dict[str, Row] = {}

    def changed() -> None:
        write_tables(workdir, finished)

    changed()
    scheduler = Scheduler(units, launcher.start, launch.workers, launch.retries, changed)
    view = View(entries, launch.workers * max(map(len, units), default=1))
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
    return all(entry.state != "failed" for entry in entries)


def make_launcher(
    launch: LaunchConfig, workdir: Path, script: str, runs: Sequence[Run]
) -> LocalLauncher | TogetherLauncher | SubmititLauncher | None:
    """Where runs of a script are started; None for nowhere. ConfigError where they cannot be."""
    if launch.launcher == "none":
        return None
    devices = launch.device_flags()
    if launch.launcher == "vmap":
        for run in runs:
            require_described(run)
        return TogetherLauncher(workdir, launch.workers, launch.gpus, launch.together)
    if launch.launcher == "slurm":
        return SubmititLauncher(script, launch.slurm, workdir, devices)
    return LocalLauncher(script, launch.workers, launch.gpus, devices)


def summarize(workdir: Path) -> None:
    """Makes the tables anew and prints how the runs stand, by the records alone."""
    rows = write_tables(workdir)
    for row in rows:
        print("  ".join(filter(None, (row["run"], row["state"], row["error"]))))
    print(f"results: {workdir / CSV}")
