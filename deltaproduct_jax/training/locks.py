"""Locks between processes that vanish with the process that holds them, however it ends.

They are locks of the kernel on a file (flock), so that a file left behind by a killed process
means nothing. On a network file system they hold between machines if it passes locks on. Windows
has no such lock: there every lock is granted.
"""

import contextlib
import os
import platform
import time
from collections.abc import Iterator
from pathlib import Path

import jax

from deltaproduct_jax.errors import RunDirectoryError

if os.name != "nt":
    import fcntl

RUN_LOCK = ".lock"
# Someone who only asks whether a lock is held has it for a moment; so a refusal is tried again.
TRIES, PAUSE_S = 5, 0.05


class Lock:
    """A lock named by a file, which says who holds it and is removed by the last on release.

    A child process that inherits the descriptor keeps the lock after its parent's death.

    Args:
        path: of the file.
        shared: with others that share it, instead of exclusively.
    """

    def __init__(self, path: Path, *, shared: bool = False):
        self.path = path
        self.shared = shared
        self.descriptor: int | None = None

    def acquire(self) -> bool:
        """Takes the lock, without waiting for others to finish; False if another process has it.

        One that is shared is had by others only where they do not share it.

        Raises:
            RunDirectoryError: the file cannot be created or locked.
        """
        for attempt in range(TRIES):
            if attempt:
                time.sleep(PAUSE_S)
            if self._try():
                return True
        return False

    def _try(self) -> bool:
        with _errors(self.path):
            self.path.parent.mkdir(parents=True, exist_ok=True)
            descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT, 0o666)
            try:
                is_alone = _flock(descriptor)
                has_it = _flock(descriptor, shared=True) if self.shared else is_alone
                # A holder removes the file on release; a lock on what was removed is worth nothing.
                if has_it and _is_at(descriptor, self.path):
                    others = [] if is_alone else self._owners()
                    _write(descriptor, [*others, _this_process()])
                    self.descriptor, descriptor = descriptor, None
            finally:
                if descriptor is not None:
                    os.close(descriptor)
        return self.descriptor is not None

    def release(self) -> None:
        """Gives the lock back; nothing if it is not held."""
        if self.descriptor is not None:
            with contextlib.suppress(OSError):  # a read-only disk keeps the file, which is harmless
                if not self.shared or _flock(self.descriptor):
                    self.path.unlink()
                else:
                    others = self._owners()
                    with contextlib.suppress(ValueError):
                        others.remove(_this_process())
                    _write(self.descriptor, others)
            os.close(self.descriptor)
            self.descriptor = None

    def is_held(self) -> bool:
        """Whether some process has the lock now."""
        try:
            descriptor = os.open(self.path, os.O_RDWR)
        except OSError:
            return False
        try:
            return not _flock(descriptor) and _is_at(descriptor, self.path)
        finally:
            os.close(descriptor)

    @property
    def inherited(self) -> list[int]:
        """What a child process inherits in order to hold it too; nothing if it is not held."""
        return [] if os.name == "nt" or self.descriptor is None else [self.descriptor]

    def owner(self) -> str:
        """Who has, or had, the lock."""
        try:
            return " and ".join(self._owners()) or "another process"
        except OSError:
            return "another process"

    def _owners(self) -> list[str]:
        return self.path.read_text(errors="replace").splitlines()


def _this_process() -> str:
    return f"process {os.getpid()} on {platform.node()}"


def _write(descriptor: int, owners: list[str]) -> None:
    os.truncate(descriptor, 0)
    os.lseek(descriptor, 0, os.SEEK_SET)
    os.write(descriptor, "\n".join(owners).encode())


def _flock(descriptor: int, *, shared: bool = False) -> bool:
    if os.name == "nt":
        return True
    try:
        fcntl.flock(descriptor, (fcntl.LOCK_SH if shared else fcntl.LOCK_EX) | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _is_at(descriptor: int, path: Path) -> bool:
    try:
        there = os.stat(path)
    except FileNotFoundError:
        return False
    return os.path.samestat(there, os.fstat(descriptor))


@contextlib.contextmanager
def _errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be locked: {error.strerror}") from error


@contextlib.contextmanager
def run_lock(directory: Path) -> Iterator[None]:
    """The right to write in a run directory; of a pod's processes only the first, which writes.

    Raises:
        RunDirectoryError: another process trains in ``directory``, or it cannot be written.
    """
    if jax.process_index() != 0:
        yield
        return
    with held(Lock(directory / RUN_LOCK)):
        yield


@contextlib.contextmanager
def held(lock: Lock) -> Iterator[Lock]:
    """A lock on the folder that its file lies in; RunDirectoryError if another process has it."""
    if not lock.acquire():
        raise RunDirectoryError(
            f"{lock.path.parent} is in use by {lock.owner()}; wait for its end, or give another "
            "workdir"
        )
    try:
        yield lock
    finally:
        lock.release()
