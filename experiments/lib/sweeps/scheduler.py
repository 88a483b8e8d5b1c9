"""Who works on which runs: attempts start as workers are free, and are made again if they die."""

import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Protocol

from deltaproduct_jax.errors import RunDirectoryError
from experiments.lib.sweeps.records import RunFolder
from experiments.lib.sweeps.view import Entry

# Runs that another process is at are looked at again after so long.
ELSEWHERE_S = 2.0
Unit = list[Entry]  # runs that one worker takes at once


class Running(Protocol):
    """An attempt at one run, or at several together, that is under way."""

    folders: Sequence[RunFolder]

    def poll(self) -> list[str] | None:
        """None while it runs; then what went wrong with each run, empty if nothing did."""

    def ask_to_stop(self) -> None:
        """Tells it to end, without waiting for that."""

    def stop(self) -> None:
        """Ends it so that the runs can go on later."""


class Scheduler:
    """Keeps the workers busy until every run is done or has failed for good.

    Args:
        units: the runs, in the order in which they are started, those that go together in one.
        start: begins an attempt at runs as worker number ``slot``, those left out at which another
            process is; None if there is one at all of them.
        workers: attempts at a time.
        retries: times that a run which died is tried again.
        changed: called whenever a run has come to an end.
    """

    def __init__(
        self,
        units: Sequence[Unit],
        start: Callable[[Sequence[RunFolder], int], Running | None],
        workers: int,
        retries: int,
        changed: Callable[[], None],
    ):
        self._start = start
        self._retries = retries
        self._changed = changed
        self._queue = deque((0.0, unit) for unit in units)  # not before when, and what
        self._slots: list[tuple[Unit, Running] | None] = [None] * min(workers, len(units))

    def step(self) -> bool:
        """Looks at what runs and starts what can be started; False once nothing is left to do."""
        for slot, busy in enumerate(self._slots):
            if busy is not None and (errors := busy[1].poll()) is not None:
                self._slots[slot] = None
                self._ended(busy[0], errors)
        for slot, busy in enumerate(self._slots):
            if busy is None:
                self._fill(slot)
        return bool(self._queue) or any(self._slots)

    def _ended(self, unit: Unit, errors: Sequence[str]) -> None:
        again = []
        for entry, error in zip(unit, errors, strict=True):
            entry.seconds = entry.folder.seconds()
            if entry.is_done():
                continue
            entry.failures += 1
            entry.error = error
            entry.state = "waiting" if entry.failures <= self._retries else "failed"
            if entry.state == "waiting":
                again.append(entry)
        if again:
            self._queue.append((0.0, again))
        self._changed()

    def _fill(self, slot: int) -> None:
        """Starts the first of the queue at which nobody is."""
        for _ in range(len(self._queue)):
            not_before, unit = self._queue.popleft()
            if time.monotonic() < not_before:
                self._queue.append((not_before, unit))
                continue
            began = time.time()
            try:
                running = self._start([entry.folder for entry in unit], slot)
            except RunDirectoryError as error:
                self._refuse(unit, str(error))
                continue
            taken = [] if running is None else list(running.folders)
            self._put_back([entry for entry in unit if entry.folder not in taken])
            if running is not None:
                ours = [entry for entry in unit if entry.folder in taken]
                for entry in ours:
                    entry.begin(began)
                self._slots[slot] = ours, running
                return

    def _refuse(self, unit: Unit, error: str) -> None:
        """Fails a run whose folder cannot be used; of several, each is tried alone."""
        if len(unit) > 1:
            self._queue.extend((0.0, [entry]) for entry in unit)
            return
        unit[0].state, unit[0].error = "failed", error
        self._changed()

    def _put_back(self, unit: Unit) -> None:
        """Queues runs that another process is at, or notes that it has ended them."""
        elsewhere = [entry for entry in unit if not entry.is_done()]
        for entry in elsewhere:
            entry.state = "elsewhere"
        if elsewhere:
            self._queue.append((time.monotonic() + ELSEWHERE_S, elsewhere))
        if len(elsewhere) < len(unit):
            self._changed()

    def stop(self) -> None:
        """Ends what runs, all at the same time."""
        for busy in filter(None, self._slots):
            busy[1].ask_to_stop()
        for busy in filter(None, self._slots):
            busy[1].stop()
            for entry in busy[0]:
                entry.state = "waiting"
        self._slots = [None] * len(self._slots)
