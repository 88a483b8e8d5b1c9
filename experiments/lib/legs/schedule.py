"""Which leg goes to which GPU, and when: decisions alone, made by a clock and the legs' own rates.

A leg is trained, then measured. A GPU trains one at a time, but for the end of one, beside which
the next starts and compiles; measuring a leg goes on beside the training of others.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Protocol

from experiments.lib.legs.leg import SECONDS, Leg

AT_ONCE = 2  # legs that train on a GPU: one ends, one starts


@dataclasses.dataclass(frozen=True)
class Progress:
    """How far a leg's training has come.

    Attributes:
        tokens: trained on.
        rate: tokens of a second; None before the first records.
        loss: the last.
        is_validated: there is a record of that.
        is_done: it is trained.
    """

    tokens: int = 0
    rate: float | None = None
    loss: float | None = None
    is_validated: bool = False
    is_done: bool = False


@dataclasses.dataclass(frozen=True)
class Terms:
    """What legs are begun by.

    Attributes:
        tokens: of every leg.
        overlap_s: seconds that a leg's start takes, so long before another ends it begins.
        measure_s: seconds that measuring a leg takes.
        deadline: on the clock; no leg begins that would not be measured by then.
        still_s: seconds without a token more after which a leg's training is ended.
    """

    tokens: int
    overlap_s: float
    measure_s: float
    deadline: float = math.inf
    still_s: float = math.inf


class LegJob(Protocol):
    """Child processes that train or measure a leg."""

    def poll(self) -> list[str] | None:
        """None while they run; then a line for each that failed."""

    def ask_to_stop(self) -> None:
        """Tells them to save and end, without waiting for that."""

    def stop(self) -> None:
        """Ends them, saved."""

    def kill(self) -> None:
        """Ends them at once."""


@dataclasses.dataclass
class Slot:
    """A GPU: the legs that train there, the oldest first, and the one that is measured."""

    number: int
    training: list[tuple[Leg, LegJob]] = dataclasses.field(default_factory=list)
    measuring: tuple[Leg, LegJob] | None = None

    def jobs(self) -> list[tuple[Leg, LegJob]]:
        """All of them."""
        return self.training + ([] if self.measuring is None else [self.measuring])


class Schedule:
    """Keeps the GPUs busy until every leg is trained and measured, has failed, or has no time.

    Args:
        legs: in the order of importance.
        slots: GPUs.
        terms: of all legs.
        look: how far a leg is.
        train: begins a leg's training on a slot of a number.
        measure: likewise its measuring; None where all of that is there.
        fit: whether two legs can train on a GPU at the same time.
        say: takes the lines that tell of failures and of legs that are not begun.
        clock: seconds.
    """

    def __init__(
        self,
        legs: Sequence[Leg],
        slots: int,
        terms: Terms,
        *,
        look: Callable[[Leg], Progress],
        train: Callable[[Leg, int], LegJob],
        measure: Callable[[Leg, int], LegJob | None],
        fit: Callable[[Leg, Leg], bool],
        say: Callable[[str], None],
        clock: Callable[[], float],
    ):
        self.slots = [Slot(number) for number in range(slots)]
        self.failures = 0
        self._terms = terms
        self._look, self._train, self._measure = look, train, measure
        self._fit, self._say, self._clock = fit, say, clock
        self._queue = [leg for leg in legs if not look(leg).is_done]
        # And the slot that trained it, None where that was an earlier start.
        self._unmeasured: list[tuple[Leg, int | None]] = [
            (leg, None) for leg in legs if leg not in self._queue
        ]
        self._rates: dict[str, float] = {}  # of legs seen to train, by name, the last one last
        self._moved: dict[Leg, tuple[int, float]] = {}  # tokens, and since when there are as many
        for leg in legs:
            self._note_rate(leg)

    def step(self) -> bool:
        """Looks at what runs and begins what can begin; False once nothing is left to do.

        At the deadline all that runs saves and ends.
        """
        self._reap()
        if self._clock() >= self._terms.deadline:
            self.stop()
            return False
        # Whoever is free goes first.
        for slot in sorted(self.slots, key=lambda slot: len(slot.training)):
            self._fill(slot)
        return any(slot.jobs() for slot in self.slots)

    def stop(self) -> None:
        """Ends what runs, all at the same time."""
        jobs = [job for slot in self.slots for _, job in slot.jobs()]
        for job in jobs:
            job.ask_to_stop()
        for job in jobs:
            job.stop()
        self._reap()

    def not_begun(self) -> list[Leg]:
        """Legs that there was no time for."""
        return list(self._queue)

    def seconds_left(self, leg: Leg) -> float | None:
        """Of a leg's training from where it is, by its own rate or others'; None if unknown."""
        progress = self._look(leg)
        rate = progress.rate or self._rate(leg.name)
        return None if rate is None else max(0, self._terms.tokens - progress.tokens) / rate

    def _rate(self, name: str) -> float | None:
        """Of a leg of that name, or of the last that was seen, by what they cost."""
        if name in self._rates or not self._rates:
            return self._rates.get(name)
        other, rate = list(self._rates.items())[-1]
        return rate * SECONDS[other] / SECONDS[name]

    def _reap(self) -> None:
        for slot in self.slots:
            for leg, job in list(slot.training):
                self._note_rate(leg)
                self._end_if_still(leg, job)
                if self._ended(job):
                    slot.training.remove((leg, job))
                    if self._look(leg).is_done:
                        self._unmeasured.append((leg, slot.number))
            if slot.measuring is not None and self._ended(slot.measuring[1]):
                slot.measuring = None

    def _note_rate(self, leg: Leg) -> None:
        rate = self._look(leg).rate
        if rate is not None:
            self._rates.pop(leg.name, None)
            self._rates[leg.name] = rate

    def _end_if_still(self, leg: Leg, job: LegJob) -> None:
        """A GPU whose kernel never ends does not hear that its leg is to stop."""
        tokens, now = self._look(leg).tokens, self._clock()
        if self._moved.get(leg, (None,))[0] != tokens:
            self._moved[leg] = tokens, now
        still = now - self._moved[leg][1]
        if still >= self._terms.still_s:
            self._say(f"{leg.label}: no token more in {still:.0f} s, it is ended")
            job.kill()

    def _ended(self, job: LegJob) -> bool:
        errors = job.poll()
        for error in errors or ():
            self.failures += 1
            self._say(error)
        return errors is not None

    def _fill(self, slot: Slot) -> None:
        while slot.measuring is None and (found := self._to_measure(slot)) is not None:
            self._unmeasured.remove(found)
            job = self._measure(found[0], slot.number)
            slot.measuring = None if job is None else (found[0], job)
        while (leg := self._next(slot)) is not None:
            self._queue.remove(leg)
            slot.training.append((leg, self._train(leg, slot.number)))

    def _to_measure(self, slot: Slot) -> tuple[Leg, int | None] | None:
        """A leg that was trained here, or where nothing trains any; None without one."""
        mine = (None, slot.number) if slot.training else (None, *range(len(self.slots)))
        own_first = sorted(self._unmeasured, key=lambda entry: entry[1] != slot.number)
        return next((entry for entry in own_first if entry[1] in mine), None)

    def _next(self, slot: Slot) -> Leg | None:
        """The first leg that this GPU has room and time for."""
        if len(slot.training) == AT_ONCE:
            return None
        if slot.training:
            running = self._look(slot.training[0][0])
            if running.rate is None:  # it has only begun
                return None
            left = (self._terms.tokens - running.tokens) / running.rate
            if left > self._terms.overlap_s:
                return None
        # Its start takes that long, on a free GPU as beside the end of another leg.
        begins = self._clock() + self._terms.overlap_s
        room = self._terms.deadline - begins - self._terms.measure_s
        for leg in self._queue:
            needed = self.seconds_left(leg)
            if needed is None or needed <= room:
                # One that does not fit waits for the GPU, and no lesser one goes before it.
                beside = [other for other, _ in slot.training]
                return leg if all(self._fit(other, leg) for other in beside) else None
        return None
