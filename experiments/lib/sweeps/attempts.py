"""Attempts at runs as child processes: begun once nobody else is at the run, ended with the sweep.

An attempt is ``python -m SCRIPT --workdir=... --key=value ...``, whose output goes to the run's
log, or one process for several runs together. Before it begins, the claims of its runs are locked;
parent and child both hold those locks, so that no other sweep begins the same runs while either
lives.
"""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

from deltaproduct_jax.data.workers import cores
from deltaproduct_jax.files import write_file
from deltaproduct_jax.training.locks import RUN_LOCK, Lock
from experiments.lib.parent import marked
from experiments.lib.sweeps.grid import module_name
from experiments.lib.sweeps.records import LOG, RunFolder, last_line, size_of

CLAIM = ".claim"
ROOT = Path(__file__).resolve().parents[3]
SAVING_S = 120.0  # for a step, an evaluation and a checkpoint, or for compiling them
NO_RESULTS = "ended without results.json"


def environment(workers: int = 1, gpus: Sequence[str] = ()) -> dict[str, str]:
    """The environment of an attempt that shares a machine with others; what is set already stays.

    Args:
        workers: attempts at a time.
        gpus: that it is to see, as CUDA_VISIBLE_DEVICES names them; empty for what this process
            sees.
    """
    variables = dict(os.environ)
    paths = [str(ROOT), variables.get("PYTHONPATH", "")]
    variables["PYTHONPATH"] = os.pathsep.join(filter(None, paths))
    if workers > 1:
        share = str(max(1, cores() // workers))
        # XLA makes its pools of threads as large as NPROC says.
        for name in ("NPROC", "OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS"):
            variables.setdefault(name, share)
        variables.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
    if gpus:
        variables["CUDA_VISIBLE_DEVICES"] = ",".join(gpus)
    return variables


class Claims:
    """The locks on runs that an attempt is to begin with: of those that nobody else is at.

    Raises:
        RunDirectoryError: a run's folder cannot be written.
    """

    def __init__(self, folders: Sequence[RunFolder]):
        self.folders: list[RunFolder] = []
        self._locks: list[Lock] = []
        for folder in folders:
            lock = Lock(folder.path / CLAIM)
            if not lock.acquire():
                continue
            if folder.results() is not None or Lock(folder.path / RUN_LOCK).is_held():
                lock.release()
                continue
            self.folders.append(folder)
            self._locks.append(lock)

    @property
    def descriptors(self) -> list[int]:
        """What a child inherits in order to hold them too."""
        return [descriptor for lock in self._locks for descriptor in lock.inherited]

    def release(self) -> None:
        """Gives them back."""
        for lock in self._locks:
            lock.release()


class Attempt:
    """A child process that runs one run or several; made by :func:`begin`.

    Args:
        claims: of the runs.
        process: the child.
        log: what it prints.
    """

    def __init__(self, claims: Claims, process: subprocess.Popen, log: Path):
        self.folders = claims.folders
        self.process = process
        self._claims = claims
        self._log, self._log_size = log, size_of(log)
        self._sizes = [size_of(folder.path / LOG) for folder in self.folders]
        self._began = time.monotonic()
        self._was_asked = False

    def poll(self) -> list[str] | None:
        """None while it runs; then, once, what went wrong with each run, empty if nothing did."""
        code = self.process.poll()
        if code is None:
            return None
        errors = []
        for folder, size in zip(self.folders, self._sizes, strict=True):
            error = "" if folder.results() is not None else self._error(folder, size, code)
            folder.add_attempt(code, time.monotonic() - self._began, error)
            errors.append(error)
        self._claims.release()
        return errors

    def _error(self, folder: RunFolder, size: int, code: int) -> str:
        if folder.path / LOG != self._log and (own := last_line(folder.path / LOG, size)):
            return own  # of this run among several
        if code < 0:
            return f"killed by {signal.Signals(-code).name}"
        error = last_line(self._log, self._log_size)
        return error if code and error else f"{NO_RESULTS}, with exit code {code}"

    def ask_to_stop(self) -> None:
        """Tells the process to finish its step and save; once, as a second time would end it."""
        if self.process.poll() is None and not self._was_asked:
            self._was_asked = True
            self.process.terminate()

    def stop(self) -> None:
        """Ends the process; the runs can go on later, and the attempt does not count."""
        self.ask_to_stop()
        wait_or_kill(self.process)
        self._claims.release()


def wait_or_kill(process: subprocess.Popen) -> None:
    """Waits for a process that was told to save and end; too long, and it ends at once."""
    try:
        process.wait(SAVING_S)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def begin(
    script: str,
    folder: RunFolder,
    variables: dict[str, str],
    devices: Sequence[str] = (),
    *,
    new_session: bool,
) -> Attempt | None:
    """Begins an attempt at a run, with flags that say on which ``devices``.

    None if another process is at it, or it is done.

    Raises:
        RunDirectoryError: the run's folder cannot be written.
    """
    claims = Claims([folder])
    if not claims.folders:
        return None
    command = [module_name(script), f"--workdir={folder.path}", *folder.run.argv(), *devices]
    log = folder.path / LOG
    return begin_process(claims, command, log, variables, new_session=new_session)


def begin_process(
    claims: Claims, command: list[str], log: Path, variables: dict[str, str], *, new_session: bool
) -> Attempt:
    """Begins an attempt at claimed runs.

    Args:
        claims: of the runs.
        command: a module and its arguments.
        log: where its output goes.
        variables: its environment.
        new_session: of its own, so that Ctrl-C on a terminal reaches the sweep alone, which ends
            it.
    """
    header = f"$ -m {' '.join(command)}\n".encode()
    for path in dict.fromkeys([log, *(folder.path / LOG for folder in claims.folders)]):
        write_file(path, header, append=True)
    with open(log, "ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", *command],
            env=marked(variables),
            stdin=subprocess.DEVNULL,
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=claims.descriptors,
            start_new_session=new_session,
        )
        return Attempt(claims, process, log)
