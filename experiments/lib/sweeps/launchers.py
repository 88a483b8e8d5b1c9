"""Where the runs of a sweep are run: in processes of this machine, or as jobs through submitit."""

import contextlib
import itertools
import json
import os
import signal
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from deltaproduct_jax.errors import ConfigError, require_package
from deltaproduct_jax.files import read_json, write_file
from deltaproduct_jax.settings import whole_number
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.stopping import exit_code
from deltaproduct_jax.training.together.numbers import program_of
from experiments.lib.sweeps.attempts import Attempt, Claims, begin, begin_process, environment
from experiments.lib.sweeps.gpus import gpu_of, share_of, visible_gpus
from experiments.lib.sweeps.grid import Run, parse_fixed
from experiments.lib.sweeps.records import RunFolder
from experiments.lib.sweeps.scheduler import Unit
from experiments.lib.sweeps.view import Entry

JOB = "job.json"
TOGETHER = "experiments.together"  # the script that trains several runs in one process
GRACE_S = 10.0
# Parameters of submitit that make a job several processes.
PROCESSES = {"nodes", "tasks_per_node", "slurm_ntasks_per_node"}
# How a process ends that a signal asked to: it takes the signal itself, or dies of it.
ENDED_BY_SIGTERM = (-signal.SIGTERM, exit_code(signal.SIGTERM))


class LocalLauncher:
    """A process of this machine for each run.

    Args:
        script: whose runs they are.
        workers: processes at a time.
        gpus: handed round, one a worker. Without any, several workers get one each of those that
            are there, and a single worker sees them all.
        devices: flags of each run that say how it uses what it sees.
    """

    def __init__(self, script: str, workers: int, gpus: Sequence[int], devices: Sequence[str] = ()):
        self._script = script
        self._devices = devices
        self._workers = workers
        self._gpus = list(map(str, gpus)) or (visible_gpus() if workers > 1 else [])

    def units(self, entries: Sequence[Entry]) -> list[Unit]:
        """Each run alone."""
        return [[entry] for entry in entries]

    def start(self, folders: Sequence[RunFolder], slot: int) -> Attempt | None:
        """Begins an attempt at a run as worker number ``slot``; None if somebody else is at it."""
        (folder,) = folders
        variables = environment(self._workers, gpu_of(slot, self._gpus))
        return begin(self._script, folder, variables, self._devices, new_session=True)


class TogetherLauncher:
    """A process of this machine for all runs that differ only in numbers (launcher=vmap).

    Args:
        workdir: of the sweep.
        workers: processes at a time.
        gpus: shared out among the workers; without any, those that are there.
        most: runs in a process.
    """

    def __init__(self, workdir: Path, workers: int, gpus: Sequence[int], most: int):
        self._workdir = workdir
        self._workers = workers
        self._gpus = list(map(str, gpus)) or (visible_gpus() if workers > 1 else [])
        self._most = most

    def units(self, entries: Sequence[Entry]) -> list[Unit]:
        """Runs of one program, in as few parts of equal size as the most allows."""
        groups: dict[str, list[Entry]] = {}
        for entry in entries:
            groups.setdefault(program_of(entry.folder.run.config), []).append(entry)
        return [part for group in groups.values() for part in _parts(group, self._most)]

    def start(self, folders: Sequence[RunFolder], slot: int) -> Attempt | None:
        """Begins an attempt at those of the runs that nobody is at; None if there are none."""
        claims = Claims(folders)
        if not claims.folders:
            return None
        names = [folder.run.name for folder in claims.folders]
        command = [TOGETHER, f"--workdir={self._workdir}", *(f"--run={name}" for name in names)]
        variables = environment(self._workers, share_of(slot, self._workers, self._gpus))
        log = self._workdir / "groups" / f"{names[0]}.txt"
        return begin_process(claims, command, log, variables, new_session=True)


def require_described(run: Run) -> None:
    """Raises ConfigError unless a run's configuration says all of it, to the project's own loop."""
    try:
        RunConfig.from_dict(run.config)
    except (KeyError, TypeError, ConfigError) as error:
        raise ConfigError(
            f"launcher=vmap is for scripts whose runs a config.json describes; of {run.name} it "
            f"does not: {error}; give launcher=local"
        ) from error


def _parts(group: Unit, most: int) -> list[Unit]:
    parts = -(-len(group) // most)
    bounds = [len(group) * part // parts for part in range(parts + 1)]
    return [group[low:high] for low, high in itertools.pairwise(bounds)]


class _JobFile(TypedDict):
    job_id: str


class Job:
    """A job of a cluster that makes one attempt at a run."""

    def __init__(self, folder: RunFolder, job: Any):
        self.folders = [folder]
        self._folder = folder
        self._job = job
        self._attempts = len(folder.attempts())

    def poll(self) -> list[str] | None:
        """None while it is queued or runs; then what went wrong, empty if nothing did."""
        return [self._error()] if self._job.done() else None

    def _error(self) -> str:
        (self._folder.path / JOB).unlink(missing_ok=True)
        attempts = self._folder.attempts()
        if self._folder.results() is not None:
            return ""
        if len(attempts) > self._attempts:
            return attempts[-1]["error"]
        # The cluster ended it before it could say so: out of time or memory, a node lost.
        error = f"job {self._job.job_id} ended without a record: {self._job.state}"
        self._folder.add_attempt(1, 0.0, error)
        return error

    def ask_to_stop(self) -> None:
        """Nothing: a cluster sends its signals when the job is cancelled."""

    def stop(self) -> None:
        """Cancels the job; the run can go on later."""
        self._job.cancel(check=False)
        (self._folder.path / JOB).unlink(missing_ok=True)


class SubmititLauncher:
    """Jobs of SLURM, or of what ``cluster=`` among the parameters names, say local.

    Raises:
        ConfigError: submitit is not installed, or does not know a parameter; or a job would have
            several processes.
    """

    def __init__(self, script: str, parameters: str, folder: Path, devices: Sequence[str]):
        # Else it configures logging for the whole process, and closes others' streams as it does.
        os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
        submitit = require_package("submitit", "launcher=slurm", "sweeps")
        self._script, self._parameters, self._devices = script, parameters, devices
        given = {"timeout_min": "1440"} | parse_fixed(parameters, "--slurm")
        for name in PROCESSES & given.keys():
            if given[name] != "1":
                raise ConfigError(
                    f"slurm={parameters!r}: {name} may be 1, since a run of a sweep is one process"
                )
        cluster = given.pop("cluster", "slurm")
        values = {key: v if (n := whole_number(v)) is None else n for key, v in given.items()}
        jobs = folder / "jobs"
        try:
            self._executor = submitit.AutoExecutor(jobs, cluster=cluster)
            self._executor.update_parameters(name=script, **values)
        except (ValueError, NameError, AssertionError, RuntimeError) as error:
            with contextlib.suppress(OSError):  # what has files stays
                jobs.rmdir()
            raise ConfigError(f"slurm={parameters!r} is refused by submitit: {error}") from error

    def units(self, entries: Sequence[Entry]) -> list[Unit]:
        """Each run alone."""
        return [[entry] for entry in entries]

    def start(self, folders: Sequence[RunFolder], slot: int) -> Job | None:
        """Submits a job for a run, or takes up the one that another sweep has submitted."""
        (folder,) = folders
        job = self._submitted(folder)
        if job is None:
            job = self._submit(folder)
        return None if job is None else Job(folder, job)

    def _submit(self, folder: RunFolder) -> Any | None:
        claims = Claims([folder])
        try:
            if not claims.folders:
                return None
            job = self._submitted(folder)  # or another sweep has, since
            if job is None:
                job = self._sent(folder)
                content = json.dumps({"job_id": job.job_id})
                write_file(folder.path / JOB, content.encode() + b"\n")
            return job
        finally:
            claims.release()

    def _sent(self, folder: RunFolder) -> Any:
        try:
            return self._executor.submit(run_in_job, self._script, folder, self._devices)
        except RuntimeError as error:  # what sbatch says, in several lines
            raise ConfigError(f"slurm={self._parameters!r}: a job is refused: {error}") from error

    def _submitted(self, folder: RunFolder) -> Any | None:
        """The job that some sweep has submitted, if it is queued or runs still."""
        path = folder.path / JOB
        if not path.exists():
            return None
        executor = self._executor._executor
        job = executor.job_class(executor.folder, read_json(path, _JobFile)["job_id"])
        return None if job.done() else job


def run_in_job(script: str, folder: RunFolder, devices: Sequence[str]) -> str | None:
    """What a job does: one attempt, to its end."""
    end, attempt = time.monotonic() + GRACE_S, None
    while attempt is None and time.monotonic() < end:  # the sweep may be writing the job's number
        attempt = begin(script, folder, environment(), devices, new_session=False)
        if attempt is None and folder.results() is not None:
            return ""
        if attempt is None:
            time.sleep(0.2)
    if attempt is None:
        return None
    try:
        while attempt.process.poll() is None:
            time.sleep(0.2)
        if attempt.process.returncode in ENDED_BY_SIGTERM:
            return None  # cancelled or preempted with the whole job
        return attempt.poll()[0]
    finally:
        attempt.stop()
