"""Where the runs of a sweep are run: in processes of this machine, or as jobs through submitit.

An attempt at a run is a child process ``python -m SCRIPT --workdir=... --key=value ...`` whose
output goes to the run's log. Before it begins, the run's claim is locked; parent and child both
hold that lock, so that no other sweep begins the same run while either lives.
"""

import importlib
import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypedDict

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import read_json, write_file
from deltaproduct_jax.training.locks import RUN_LOCK, Lock
from deltaproduct_jax.training.stopping import exit_code
from experiments.lib.sweeps.grid import module_name, parse_fixed
from experiments.lib.sweeps.records import LOG, RunFolder

CLAIM, JOB = ".claim", "job.json"
ROOT = Path(__file__).resolve().parents[3]
GRACE_S = 10.0
SAVING_S = 120.0  # for a step, an evaluation and a checkpoint, or for compiling them
# How a process ends that a signal asked to: it takes the signal itself, or dies of it.
ENDED_BY_SIGTERM = (-signal.SIGTERM, exit_code(signal.SIGTERM))
NO_RESULTS = "ended without results.json"


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def environment(workers: int = 1, gpu: int | None = None) -> dict[str, str]:
    """The environment of a run that shares a machine with others; what is set already stays."""
    variables = dict(os.environ)
    paths = [str(ROOT), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if workers > 1:
        share = str(max(1, cores() // workers))
        # XLA makes its pools of threads as large as NPROC says.
        for name in ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            variables.setdefault(name, share)
        variables.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if gpu is not None:
        variables["CUDA_VISIBLE_DEVICES"] = str(gpu)
    return variables


class Attempt:
    """A child process that runs one run; made by :func:`begin`."""

    def __init__(self, folder: RunFolder, lock: Lock, process: subprocess.Popen, log_size: int):
        self.folder = folder
        self._lock = lock
        self.process = process
        self._log_size = log_size
        self._began = time.monotonic()

    def poll(self) -> str | None:
        """None while it runs; then, once, what went wrong, empty if nothing did."""
        code = self.process.poll()
        if code is None:
            return None
        error = ""
        if self.folder.results() is None:
            error = self.folder.last_line(self._log_size)
            if code < 0:
                error = f"killed by {signal.Signals(-code).name}"
            elif code == 0 or not error:
                error = f"{NO_RESULTS}, with exit code {code}"
        self.folder.add_attempt(code, time.monotonic() - self._began, error)
        self._lock.release()
        return error

    def ask_to_stop(self) -> None:
        """Tells the process to finish its step and save."""
        if self.process.poll() is None:
            self.process.terminate()

    def stop(self) -> None:
        """Ends the process; the run can go on later, and the attempt does not count."""
        self.ask_to_stop()
        try:
            self.process.wait(SAVING_S)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        self._lock.release()


def begin(
    script: str, folder: RunFolder, variables: dict[str, str], *, new_session: bool
) -> Attempt | None:
    """Begins an attempt at a run; None if another process is at it, or it is done.

    Raises:
        RunDirectoryError: the run's folder cannot be written.
    """
    lock = Lock(folder.path / CLAIM)
    if not lock.acquire():
        return None
    if folder.results() is not None or Lock(folder.path / RUN_LOCK).is_held():
        lock.release()
        return None
    command = [sys.executable, "-m", module_name(script)]
    command += [f"--workdir={folder.path}", *folder.run.argv()]
    header = f"$ {' '.join(command[1:])}\n".encode()
    write_file(folder.path / LOG, header, append=True)
    with open(folder.path / LOG, "ab") as log:
        process = subprocess.Popen(
            command,
            env=variables,
            stdin=subprocess.DEVNULL,
            stdout=log,
            stderr=subprocess.STDOUT,
            pass_fds=[lock.descriptor] if os.name != "nt" else [],
            # Of its own, so that Ctrl-C on a terminal reaches the sweep alone, which ends it.
            start_new_session=new_session,
        )
        return Attempt(folder, lock, process, os.path.getsize(folder.path / LOG))


class LocalLauncher:
    """Processes of this machine; ``gpus`` are handed round, one a worker."""

    def __init__(self, script: str, workers: int, gpus: Sequence[int]):
        self._script = script
        self._workers = workers
        self._gpus = gpus

    def start(self, folder: RunFolder, slot: int) -> Attempt | None:
        """Begins an attempt at a run as worker number ``slot``; None if somebody else is at it."""
        gpu = self._gpus[slot % len(self._gpus)] if self._gpus else None
        variables = environment(self._workers, gpu)
        return begin(self._script, folder, variables, new_session=True)


class _JobFile(TypedDict):
    job_id: str


class Job:
    """A job of a cluster that makes one attempt at a run."""

    def __init__(self, folder: RunFolder, job: Any):
        self.folder = folder
        self._job = job
        self._attempts = len(folder.attempts())

    def poll(self) -> str | None:
        """None while it is queued or runs; then what went wrong, empty if nothing did."""
        if not self._job.done():
            return None
        (self.folder.path / JOB).unlink(missing_ok=True)
        attempts = self.folder.attempts()
        if self.folder.results() is not None:
            return ""
        if len(attempts) > self._attempts:
            return attempts[-1]["error"]
        # The cluster ended it before it could say so: out of time or memory, a node lost.
        error = f"job {self._job.job_id} ended without a record: {self._job.state}"
        self.folder.add_attempt(1, 0.0, error)
        return error

    def ask_to_stop(self) -> None:
        """Nothing: a cluster sends its signals when the job is cancelled."""

    def stop(self) -> None:
        """Cancels the job; the run can go on later."""
        self._job.cancel(check=False)
        (self.folder.path / JOB).unlink(missing_ok=True)


class SubmititLauncher:
    """Jobs of SLURM, or of what ``cluster=`` among the parameters names, say local.

    Raises:
        ConfigError: submitit is not installed, or does not know a parameter.
    """

    def __init__(self, script: str, parameters: str, folder: Path):
        # Else it configures logging for the whole process, and closes others' streams as it does.
        os.environ.setdefault("SUBMITIT_LOG_LEVEL", "NOCONFIG")
        try:
            submitit = importlib.import_module("submitit")
        except ModuleNotFoundError as error:
            raise ConfigError(
                "launcher=slurm needs the package submitit; install it with: pip install submitit"
            ) from error
        self._script = script
        given = {"timeout_min": "1440"} | parse_fixed(parameters, "--slurm")
        cluster = given.pop("cluster", "slurm")
        values = {key: int(v) if v.isdigit() else v for key, v in given.items()}
        try:
            self._executor = submitit.AutoExecutor(folder / "jobs", cluster=cluster)
            self._executor.update_parameters(name=script, **values)
        except (ValueError, NameError, AssertionError, RuntimeError) as error:
            raise ConfigError(f"slurm={parameters!r} is refused by submitit: {error}") from error

    def start(self, folder: RunFolder, slot: int) -> Job | None:
        """Submits a job for a run, or takes up the one that another sweep has submitted."""
        job = self._submitted(folder)
        if job is None:
            job = self._submit(folder)
        return None if job is None else Job(folder, job)

    def _submit(self, folder: RunFolder) -> Any | None:
        lock = Lock(folder.path / CLAIM)
        if not lock.acquire():
            return None
        try:
            if folder.results() is not None or Lock(folder.path / RUN_LOCK).is_held():
                return None
            job = self._submitted(folder)  # or another sweep has, since
            if job is None:
                job = self._executor.submit(run_in_job, self._script, folder)
                content = json.dumps({"job_id": job.job_id})
                write_file(folder.path / JOB, content.encode() + b"\n")
            return job
        finally:
            lock.release()

    def _submitted(self, folder: RunFolder) -> Any | None:
        """The job that some sweep has submitted, if it is queued or runs still."""
        path = folder.path / JOB
        if not path.exists():
            return None
        executor = self._executor._executor
        job = executor.job_class(executor.folder, read_json(path, _JobFile)["job_id"])
        return None if job.done() else job


def run_in_job(script: str, folder: RunFolder) -> str | None:
    """What a job does: one attempt, to its end."""
    end, attempt = time.monotonic() + GRACE_S, None
    while attempt is None and time.monotonic() < end:  # the sweep may be writing the job's number
        attempt = begin(script, folder, environment(), new_session=False)
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
        return attempt.poll()
    finally:
        attempt.stop()
