"""The processes of one run: how they find each other, take turns, agree to stop, fail together."""

import contextlib
import itertools
import json
import math
import os
import signal
import sys
import threading
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.files import any_path, require_bucket
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.settings import shown

# Without a sign of life for so long a process is given up, and all others with it.
HEARTBEAT_TIMEOUT_S = 30
# Until all have come. Some start minutes later than others where a scheduler starts them.
INITIALIZATION_TIMEOUT_S = 300
# JAX, whose own end is a trace of its C++, comes so much later.
GRACE_S = 60
# The first waits so long for others to come to the same end, and these until it has been told.
LEAVING_S, TOLD_S = 10, 1
LISTENING_S = 0.5  # at a time, for a process that was asked to stop
GIVEN_UP = 2  # exit code, as of a setting that cannot be honoured


def keep_programs(config: DeviceConfig) -> None:
    """Has JAX keep every program that it compiles, where the settings say so.

    Raises:
        ConfigError: it cannot: JAX itself would go on without.
    """
    if config.compilation_cache is not None:
        folder = any_path(config.compilation_cache, "compilation_cache")
        try:
            require_bucket(folder)
            if isinstance(folder, Path):
                folder.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            reason = error.strerror or error
            raise ConfigError(
                f"compilation_cache={config.compilation_cache!r} cannot be used: {reason}; "
                "it may be a directory, or gs://BUCKET/FOLDER"
            ) from error
        jax.config.update("jax_compilation_cache_dir", str(folder))
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


def join(config: DeviceConfig) -> None:
    """Joins the other processes, if there are to be any; before JAX is asked for a device.

    Raises:
        ConfigError: there is no cluster, or the address cannot be used. Where the others do not
            come, which nothing can interrupt, the process ends with a line and `GIVEN_UP`.
    """
    if not config.distributed and config.coordinator_address is None:
        return
    given = {
        "coordinator_address": config.coordinator_address,
        "num_processes": config.num_processes,
        "process_id": config.process_id,
    }
    which = f"coordinator_address={config.coordinator_address!r}"
    if config.coordinator_address is None:
        which = "distributed=True, without coordinator_address,"
    try:
        with _at_most(INITIALIZATION_TIMEOUT_S, which):
            jax.distributed.initialize(
                **(given if config.coordinator_address is not None else {}),
                heartbeat_timeout_seconds=HEARTBEAT_TIMEOUT_S,
                initialization_timeout=INITIALIZATION_TIMEOUT_S + GRACE_S,
            )
    except (RuntimeError, ValueError) as error:
        raise ConfigError(f"{which} does not join any processes: {error}") from error
    if threading.current_thread() is threading.main_thread():
        # JAX has taken SIGTERM, for an agreement of its own (see `Agreement`).
        signal.signal(signal.SIGTERM, signal.getsignal(signal.SIGTERM) or signal.SIG_DFL)


@contextlib.contextmanager
def _at_most(seconds: float, which: str) -> Iterator[None]:
    """Ends the process, if what is inside takes longer: JAX waits where no exception arrives."""

    def give_up() -> None:
        print(
            f"error: {which} has not brought all processes together in {seconds} s; each must be "
            "started, with the same settings but its process_id; see what the others say",
            file=sys.stderr,
            flush=True,
        )
        os._exit(GIVEN_UP)

    timer = threading.Timer(seconds, give_up)
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


def are_joined() -> bool:
    """Whether this process is one of several, or has joined itself alone."""
    return jax.distributed.is_initialized()


def is_first() -> bool:
    """Whether this process is the one that writes records and speaks."""
    return jax.process_index() == 0


_meetings = itertools.count()  # all processes make as many


@contextlib.contextmanager
def first_goes_first(what: str) -> Iterator[None]:
    """The first process does what is inside before all others do, and none goes on alone.

    Where one of them fails, JAX would end the rest with a trace of its own.

    Args:
        what: names the occasion.

    Raises:
        RunDirectoryError: another process raised that or ConfigError inside; the text says which.
    """
    if jax.process_count() == 1:
        yield
        return
    meeting = _Meeting(what)
    if not is_first():
        meeting.wait_for(0)
    try:
        yield
    except (ConfigError, RunDirectoryError) as error:
        meeting.fail(str(error))
        raise
    meeting.say(str(jax.process_index()))
    if is_first():
        for other in range(1, jax.process_count()):
            meeting.wait_for(other)
        meeting.say("all")
    else:
        meeting.wait_for("all")


class _Meeting:
    """What processes tell each other where they wait for each other, once."""

    def __init__(self, what: str):
        self._client, self._key = _client(), f"deltaproduct_jax/{next(_meetings)}, {what}"

    def say(self, name: str, text: str = "done") -> None:
        """Tells all."""
        self._client.key_value_set(f"{self._key}/{name}", text, allow_overwrite=True)

    def fail(self, why: str) -> None:
        """Tells all that this process ends, and waits until the first knows."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # it has ended, and JAX ends all
            self.say("failed", json.dumps([jax.process_index(), why]))
            if not is_first():
                self._heard("known", LEAVING_S)

    def wait_for(self, name: int | str) -> None:
        """Until it was told; RunDirectoryError if a process failed instead."""
        while self._heard(name, LISTENING_S) is None:
            if (failed := self._heard("failed", 0.001)) is not None:
                if is_first():
                    self.say("known")
                index, why = json.loads(failed)
                raise RunDirectoryError(f"process {index} cannot go on: {why}")

    def _heard(self, name: int | str, seconds: float) -> str | None:
        """What was told by a name; None if nothing was in that time."""
        try:
            return self._client.blocking_key_value_get(f"{self._key}/{name}", int(1000 * seconds))
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):  # a process has ended, and JAX ends all
                raise
            return None


def _client() -> Any:
    """What processes tell each other through."""
    from orbax.checkpoint import multihost  # JAX has no public name for what this gives

    return multihost.get_jax_distributed_client()


def require_same(given: Mapping[str, Any]) -> None:
    """Raises ConfigError, in the first process and in those that differ, unless all say the same.

    Of programs that differ, one waits for what the other does not send, for ever. Also where a
    process that lives has not come to say it in INITIALIZATION_TIMEOUT_S.

    Args:
        given: what this process goes by, by name, as JSON has it.
    """
    if jax.process_count() == 1:
        return
    client, key = _client(), f"deltaproduct_jax/{next(_meetings)}"
    # As JSON gives it back, so that a tuple equals a list.
    own = json.dumps(dict(given))
    client.key_value_set(f"{key}/{jax.process_index()}", own, allow_overwrite=True)
    for other in range(jax.process_count()) if is_first() else (0,):
        try:
            said = client.blocking_key_value_get(f"{key}/{other}", INITIALIZATION_TIMEOUT_S * 1000)
        except jax.errors.JaxRuntimeError as error:
            if "DEADLINE_EXCEEDED" not in str(error):  # it has ended, and JAX ends all
                return
            raise ConfigError(
                f"process {other} has not said in {INITIALIZATION_TIMEOUT_S} seconds what it is to "
                "train; it may stand still, or have been given other flags"
            ) from error
        theirs = json.loads(said)
        for name, value in json.loads(own).items():
            if theirs[name] != value:
                raise ConfigError(
                    f"{name}={shown(value)} here, {shown(theirs[name])} in process {other}; all "
                    "processes take the same flags, but for process_id, and see the same run"
                )


class Agreement:
    """All processes stop behind the same step, whichever of them was asked to.

    Once one was, every process says which step it has reached, and lets no further one pass until
    it knows what the others said: all stop behind the one after the latest. (JAX's own agreement
    lets a step pass meanwhile; who misses it so goes on alone, and the others wait for ever.)
    """

    _numbers = itertools.count()  # of a process's agreements; all have as many

    def __init__(self):
        self._client = _client()
        self._key = f"deltaproduct_jax/stop/{next(self._numbers)}"
        self._index, self._count = jax.process_index(), jax.process_count()
        self._lock = threading.Lock()
        self._step, self._last = 0, math.inf
        self._closed = threading.Event()
        self._watcher = threading.Thread(target=self._watch, daemon=True)
        self._watcher.start()

    def ask(self) -> None:
        """Asks all processes to stop."""
        with contextlib.suppress(jax.errors.JaxRuntimeError):  # nobody is there, and JAX ends all
            self._client.key_value_set(f"{self._key}/asked", "yes", allow_overwrite=True)

    def reached(self, step: int) -> bool:
        """Whether to stop behind ``step``, the number of one that was made; asked at every one."""
        with self._lock:
            self._step = step
            return step >= self._last

    def close(self) -> None:
        """Ends the thread that listens."""
        self._closed.set()
        self._watcher.join()

    def _watch(self) -> None:
        while not self._closed.is_set():
            if self._said("asked", LISTENING_S) is None:
                self._closed.wait(LISTENING_S / 5)
                continue
            with self._lock:
                own = f"{self._key}/{self._index}"
                self._client.key_value_set(own, str(self._step), allow_overwrite=True)
                steps = [self._said(str(n), HEARTBEAT_TIMEOUT_S) for n in range(self._count)]
                if None not in steps:  # or one is gone, and JAX ends all
                    self._last = max(map(int, steps)) + 1
            return

    def _said(self, name: str, seconds: float) -> str | None:
        """What was said under a name, waited for; None if nothing was."""
        try:
            return self._client.blocking_key_value_get(f"{self._key}/{name}", int(1000 * seconds))
        except jax.errors.JaxRuntimeError:
            return None


def leave(code: int) -> None:
    """Ends a joined process if it failed, within seconds; nothing otherwise.

    JAX ends all others as soon as the first is gone. So the first waits for those that fail as it
    does, each with its own line and exit code. Who leaves in order would wait for the rest as well,
    who wait for it in the midst of a step: without its sign of life they end too.
    """
    if code and are_joined():
        sys.stdout.flush()
        sys.stderr.flush()
        leaving = threading.Thread(target=_leave_in_order, daemon=True)
        leaving.start()
        leaving.join(LEAVING_S if is_first() else TOLD_S)
        os._exit(code)


def _leave_in_order() -> None:
    with contextlib.suppress(RuntimeError):  # of others that did not come, or are gone
        jax.distributed.shutdown()
