"""Which leg goes to which GPU and when, in a world of its own clock."""

import dataclasses
from pathlib import Path

import pytest

from experiments.lib.legs.leg import SECONDS, Leg
from experiments.lib.legs.schedule import Progress, Schedule, Terms

TOKENS = 1000


def leg(name, seed=0):
    """A leg of no folder."""
    return Leg(name, seed, Path("nowhere"))


class World:
    """A clock, and legs that train at their rates after a start of 10 s; measuring takes 20 s."""

    def __init__(self, rates, failing=(), there=(), still_at=None):
        self.now, self.events, self.said = 0.0, [], []
        self._rates, self._failing, self._there = rates, failing, set(there)
        self._begun, self._still_at = {}, still_at or {}

    def schedule(self, order, slots, **terms):
        """A schedule in this world."""
        values = {"tokens": TOKENS, "overlap_s": 10, "measure_s": 20} | terms
        hooks = {"look": self.look, "train": self.train, "measure": self.measure}
        hooks |= {"say": self.said.append, "clock": lambda: self.now, "fit": self.fit}
        return Schedule(order, slots, Terms(**values), **hooks)

    def run(self, schedule):
        """Steps of a second to the end; what began and ended, with when and where."""
        while schedule.step():
            self.now += 1
            assert self.now < 10_000
        return self.events

    def look(self, of):
        """How far a leg is."""
        if of in self._there:
            return Progress(TOKENS, 1.0, 1.0, is_done=True)
        trained = max(0.0, self.now - self._begun.get(of, self.now) - 10)
        rate = self._rates[of.name]
        tokens = min(TOKENS, int(trained * rate), self._still_at.get(of, TOKENS))
        return Progress(tokens, rate if tokens else None, None, is_done=tokens == TOKENS)

    def fit(self, of, other):
        """Gated ones need a GPU of their own."""
        return not {of.name, other.name} & {"36m_2_gated"}

    def train(self, of, slot):
        """Begins."""
        self._begun[of] = self.now
        self.events.append(("train", of.label, slot, self.now))
        return Work(self, of, lambda: self.look(of).is_done)

    def measure(self, of, slot):
        """Begins, unless its records are there."""
        self.events.append(("measure", of.label, slot, self.now))
        end = self.now + 20
        return Work(self, of, lambda: self.now >= end)

    def has_failed(self, of):
        """Whether a leg's training breaks: as it has begun to train."""
        return of.name in self._failing and self.look(of).tokens > 0


@dataclasses.dataclass
class Work:
    """What runs in that world."""

    world: World
    of: Leg
    ends: object
    asked: bool = False
    killed: bool = False

    def poll(self):
        """As `Parts.poll`."""
        if self.killed:
            return [f"{self.of.label} was killed"]
        if self.world.has_failed(self.of):
            return [f"{self.of.label} failed"]
        return [] if self.asked or self.ends() else None

    def ask_to_stop(self):
        """Notes it."""
        if self.poll() is None:
            self.world.events.append(("stop", self.of.label, None, self.world.now))
        self.asked = True

    def stop(self):
        """Is told before."""
        assert self.asked

    def kill(self):
        """Notes it."""
        self.world.events.append(("kill", self.of.label, None, self.world.now))
        self.killed = True


def test_the_next_leg_goes_where_one_ends_first_and_begins_before_that():
    world = World({"213m_3": 5, "36m_1": 10, "36m_2": 20})
    order = [leg("213m_3"), leg("36m_1"), leg("36m_2"), leg("36m_2", 1)]
    assert world.run(world.schedule(order, 2)) == [
        ("train", "213m_3_seed0", 0, 0),
        ("train", "36m_1_seed0", 1, 0),
        ("train", "36m_2_seed0", 1, 100),  # 36m_1 ends at 110
        ("measure", "36m_1_seed0", 1, 110),
        ("train", "36m_2_seed1", 1, 150),
        ("measure", "36m_2_seed0", 1, 160),
        ("measure", "213m_3_seed0", 0, 210),
        ("measure", "36m_2_seed1", 1, 210),
    ]


def test_a_leg_without_time_is_left_out_for_a_shorter_one():
    world = World({"36m_1": 10, "213m_2": 3, "36m_2": 10})
    order = [leg("36m_1"), leg("213m_2"), leg("36m_2")]
    # By the rate of 36m_1, at 100 s: 10 to start, what it costs beside that, 20 to measure.
    needed = 10 + 100 * SECONDS["213m_2"] / SECONDS["36m_1"] + 20
    schedule = world.schedule(order, 1, deadline=100 + needed - 1)
    assert [event[1] for event in world.run(schedule) if event[0] == "train"] == [
        "36m_1_seed0",
        "36m_2_seed0",
    ]
    assert schedule.not_begun() == [leg("213m_2")]
    left = 100 * SECONDS["213m_2"] / SECONDS["36m_2"]  # by the last that was seen
    assert schedule.seconds_left(leg("213m_2")) == pytest.approx(left)
    world = World({"36m_1": 10, "213m_2": 3, "36m_2": 10})
    schedule = world.schedule(order, 1, deadline=100 + needed + 1)
    assert world.run(schedule)[1] == ("train", "213m_2_seed0", 0, 100)


def test_rates_of_an_earlier_start_are_known():
    world = World({"36m_1": 10, "213m_2": 3}, there=[leg("36m_1")])
    schedule = world.schedule([leg("36m_1"), leg("213m_2")], 1, deadline=1000)
    assert schedule.seconds_left(leg("213m_2")) == pytest.approx(
        TOKENS * SECONDS["213m_2"] / SECONDS["36m_1"]
    )
    assert world.run(schedule) == [("measure", "36m_1_seed0", 0, 0)]
    assert schedule.not_begun() == [leg("213m_2")]


def test_what_does_not_fit_beside_another_waits_and_lets_none_go_first():
    world = World({"36m_1": 10, "36m_2_gated": 10, "36m_2": 10})
    order = [leg("36m_1"), leg("36m_2_gated"), leg("36m_2")]
    begun = [event[1::2] for event in world.run(world.schedule(order, 1)) if event[0] == "train"]
    assert begun == [("36m_1_seed0", 0), ("36m_2_gated_seed0", 110), ("36m_2_seed0", 220)]


def test_at_the_deadline_all_is_told_to_end_and_nothing_begins():
    world = World({"36m_1": 10, "36m_2": 1})
    order = [leg("36m_1"), leg("36m_2"), leg("36m_1", 1)]
    schedule = world.schedule(order, 2, deadline=115)
    events = world.run(schedule)
    assert events[-2:] == [("stop", "36m_1_seed0", None, 115), ("stop", "36m_2_seed0", None, 115)]
    assert (world.now, schedule.failures) == (115, 0)
    assert schedule.not_begun() == [leg("36m_1", 1)]


def test_a_leg_that_fails_ends_no_other_and_is_not_measured():
    world = World({"36m_1": 10, "36m_2": 10}, failing=("36m_1",))
    schedule = world.schedule([leg("36m_1"), leg("36m_2")], 1)
    assert world.run(schedule) == [
        ("train", "36m_1_seed0", 0, 0),
        ("train", "36m_2_seed0", 0, 11),
        ("measure", "36m_2_seed0", 0, 121),
    ]
    assert (schedule.failures, world.said) == (1, ["36m_1_seed0 failed"])


def test_legs_that_are_trained_are_measured_one_at_a_time_beside_training():
    there = [leg("36m_1"), leg("36m_1", 1)]
    world = World({"36m_1": 10, "36m_2": 10}, there=there)
    assert world.run(world.schedule([*there, leg("36m_2")], 1)) == [
        ("measure", "36m_1_seed0", 0, 0),
        ("train", "36m_2_seed0", 0, 0),
        ("measure", "36m_1_seed1", 0, 20),
        ("measure", "36m_2_seed0", 0, 110),
    ]


def test_a_gpu_that_trains_nothing_measures_legs_of_others():
    world = World({"36m_1": 10, "36m_2": 100})
    order = [leg("36m_2"), leg("36m_1"), leg("36m_2", 1), leg("36m_2", 2)]
    events = world.run(world.schedule(order, 2, overlap_s=0))
    # GPU 0 ends them at 20, 40 and 60, and measures from 20 to 80; GPU 1 trains until 110.
    assert [event[1:] for event in events if event[0] == "measure"] == [
        ("36m_2_seed0", 0, 20),
        ("36m_2_seed1", 0, 40),
        ("36m_2_seed2", 0, 60),
        ("36m_1_seed0", 0, 110),
    ]


def test_a_leg_that_stands_still_is_ended_and_the_next_begins():
    world = World({"213m_3": 5, "36m_1": 10}, still_at={leg("213m_3"): 300})
    schedule = world.schedule([leg("213m_3"), leg("36m_1")], 1, still_s=40)
    assert world.run(schedule) == [
        ("train", "213m_3_seed0", 0, 0),
        ("kill", "213m_3_seed0", None, 110),  # it has come to 300 at 70
        ("train", "36m_1_seed0", 0, 110),
        ("measure", "36m_1_seed0", 0, 220),
    ]
    assert world.said == [
        "213m_3_seed0: no token more in 40 s, it is ended",
        "213m_3_seed0 was killed",
    ]
    assert schedule.failures == 1
