"""Commands of ours as child processes: they save and end with this one, however it ends."""

import contextlib
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import BinaryIO

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import errors_as_one_line
from deltaproduct_jax.training.locks import Lock, held
from deltaproduct_jax.training.stopping import Stopped, exit_code, stop_on_signals
from experiments.lib import flags
from experiments.lib.parent import marked
from experiments.lib.sweeps.attempts import wait_or_kill
from experiments.lib.sweeps.records import last_line, size_of

# What computes nothing leaves GPUs to others.
ON_CPU = MappingProxyType({"JAX_PLATFORMS": "cpu"})
# Of a child that was told to end; the second, while it is still starting.
STOPPED = (exit_code(signal.SIGTERM), -signal.SIGTERM)
# Of one that ended with a line of its own, or a trace.
SAID_WHY = (flags.USAGE_ERROR, 1)
POLL_S = 0.1
LOCK_VARIABLE = "EXPERIMENTS_LOCK"  # of a child: the descriptor of the lock that it holds too


class Child:
    """A command that runs, in a session of its own: Ctrl-C on a terminal reaches this process.

    Args:
        command: the program and its arguments.
        variables: of its environment, beside those of this process.
        log: what it prints is added there; None for where this process prints.
        output: what it prints on standard output goes there instead, once it has ended well.
        lock: held by this process, and by the child as long as that lives.

    Raises:
        RunDirectoryError: the log or the output cannot be written.
    """

    def __init__(
        self,
        command: Sequence[str],
        *,
        variables: Mapping[str, str] = MappingProxyType({}),
        log: Path | None = None,
        output: Path | None = None,
        lock: Lock | None = None,
    ):
        self.was_asked = False
        self._log, self._log_size = log, 0 if log is None else size_of(log)
        self._output = output
        self._partial = None if output is None else output.with_name(f".{output.name}.partial")
        with contextlib.ExitStack() as files:
            passed = () if lock is None else lock.inherited
            own = {LOCK_VARIABLE: str(passed[0])} if passed else {}
            errors = None if log is None else files.enter_context(_opened(log, "ab"))
            to_file = self._partial is not None
            self._process = subprocess.Popen(
                command,
                env=marked(dict(os.environ) | dict(variables) | own),
                stdin=subprocess.DEVNULL,
                stdout=files.enter_context(_opened(self._partial, "wb")) if to_file else errors,
                stderr=errors,
                pass_fds=passed,
                start_new_session=True,
            )

    def last_line(self) -> str:
        """The last that it has printed to its log."""
        return "" if self._log is None else last_line(self._log, self._log_size)

    def poll(self) -> int | None:
        """Its exit code, None while it runs."""
        code = self._process.poll()
        if code is not None and self._partial is not None and self._partial.exists():
            if code:
                self._partial.unlink()
            else:
                self._partial.rename(self._output)
        return code

    def has_failed(self) -> bool:
        """Whether it ended otherwise than well, or as it was told to."""
        code = self.poll()
        return bool(code) and not (self.was_asked and code in STOPPED)

    def ask_to_stop(self) -> None:
        """Tells it to save and end; once, as a second time would not let it save."""
        if self.poll() is None and not self.was_asked:
            self.was_asked = True
            self._process.terminate()

    def kill(self) -> None:
        """Ends it at once, with what it has begun itself."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def stop(self) -> None:
        """Ends it, if it still runs, saved if it does so in time."""
        self.ask_to_stop()
        wait_or_kill(self._process)


@contextlib.contextmanager
def held_or_inherited(lock: Lock) -> Iterator[Lock]:
    """A lock that is held, or was by whoever began this process with it, for children as well.

    Raises:
        RunDirectoryError: another process has it.
    """
    inherited = os.environ.get(LOCK_VARIABLE)
    if inherited is not None:
        with contextlib.suppress(OSError):  # of an ancestor's, and there is none of it here
            if os.path.samestat(os.fstat(int(inherited)), os.stat(lock.path)):
                lock.descriptor = int(inherited)
    if lock.descriptor is not None:
        yield lock
        return
    with held(lock):
        yield lock


def _opened(path: Path, mode: str) -> BinaryIO:
    with errors_as_one_line(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        return open(path, mode)


def run(
    command: Sequence[str],
    *,
    variables: Mapping[str, str] = MappingProxyType({}),
    limit_s: float | None = None,
    log: Path | None = None,
    output: Path | None = None,
    lock: Lock | None = None,
    beside: Callable[[], bool] = lambda: False,
) -> None:
    """Runs a command to its end, or until its time is over, when it is told to save and end.

    Args:
        command: the program and its arguments.
        variables: as of `Child`.
        limit_s: seconds that it may take.
        log: as of `Child`.
        output: as of `Child`.
        lock: as of `Child`.
        beside: called again and again meanwhile, and then as long as it says that there is more to
            do.

    Raises:
        ConfigError: it failed; the log, whose last line is named, says why.
        SystemExit: it failed, and has said why where this process prints; with its exit code.
        Stopped: by a signal to this process, when the command has ended.
    """
    shown_as = " ".join(command[1:])
    print(shown_as, file=sys.stderr, flush=True)
    end = float("inf") if limit_s is None else time.monotonic() + limit_s
    with stop_on_signals() as request:
        child = Child(command, variables=variables, log=log, output=output, lock=lock)
        try:
            more = True
            while more and not child.poll() and not request.is_set() and time.monotonic() < end:
                more = beside() or child.poll() is None
                request.wait(POLL_S if more else 0)
        finally:
            child.stop()
    if request.is_set():
        text = f"stopped by {request.name}; the same command goes on"
        raise Stopped(text, request.signal_number)
    if child.has_failed():
        if log is None and child.poll() in SAID_WHY:
            raise SystemExit(child.poll())
        where = "above" if log is None else str(log)
        why = child.last_line() or shown_as
        raise ConfigError(f"a part failed with {child.poll()}, see {where}: {why}")
