"""Who works on which runs of a made-up sweep: workers, deaths, and others at the same runs."""

import dataclasses
import itertools
import types

import pytest
from campaign.damage import cases
from hypothesis import given
from hypothesis import strategies as st

from deltaproduct_jax.errors import RunDirectoryError
from experiments.lib.sweeps import scheduler, view

MOST_STEPS = 2000


class Clock:
    """Seconds that pass only when a test says so; in the place of module time."""

    def __init__(self):
        self.now = 1000.0

    def time(self):
        return self.now

    monotonic = time


@dataclasses.dataclass
class Plan:
    """What becomes of a run: it dies so often, and for so many looks others are at it."""

    deaths: int = 0
    looks_elsewhere: int = 0
    ended_elsewhere: bool = False
    is_broken: bool = False


class Folder:
    """In the place of a run's folder: what the plan says happens to it."""

    def __init__(self, number, plan):
        config = {"train": {"steps": 3}}
        self.run = types.SimpleNamespace(name=f"run{number}", config=config)
        self.plan, self.starts, self.ends = plan, 0, []
        self.is_running = self.is_done = False

    def results(self):
        return {"steps": 3} if self.is_done else None

    def seconds(self):
        return float(self.starts)


class Running:
    """An attempt that takes a few looks and then ends as planned."""

    def __init__(self, folders, looks):
        self.folders, self.looks, self.asked = folders, looks, False
        for folder in folders:
            assert not folder.is_running
            assert not folder.is_done
            folder.is_running = True
            folder.starts += 1

    def poll(self):
        self.looks -= 1
        if self.looks >= 0:
            return None
        return [self._end(folder) for folder in self.folders]

    @staticmethod
    def _end(folder):
        folder.is_running = False
        folder.is_done = folder.starts > folder.plan.deaths
        return "" if folder.is_done else f"died of attempt {folder.starts}"

    def ask_to_stop(self):
        self.asked = True

    def stop(self):
        assert self.asked  # all are asked before any is waited for
        for folder in self.folders:
            folder.is_running = False


class Machine:
    """Begins attempts, as a launcher does, and notes what it was asked."""

    def __init__(self, workers, looks):
        self.workers, self.looks, self.order = workers, itertools.cycle(looks), []
        self.slots = {}

    def start(self, folders, slot):
        assert 0 <= slot < self.workers
        assert slot not in self.slots or self.slots[slot].looks < 0
        if any(folder.plan.is_broken for folder in folders):
            raise RunDirectoryError(f"{folders[0].run.name} cannot be written")
        free = []
        for folder in folders:
            if folder.plan.looks_elsewhere:
                folder.plan.looks_elsewhere -= 1
                folder.is_done = folder.plan.ended_elsewhere and not folder.plan.looks_elsewhere
            else:
                free.append(folder)
        if not free:
            return None
        self.order += [folder.run.name for folder in free]
        self.slots[slot] = Running(free, next(self.looks))
        return self.slots[slot]


def units_of(plans, sizes):
    """Entries of the runs, so many to a unit."""
    entries = [view.Entry(Folder(number, plan)) for number, plan in enumerate(plans)]
    left, size = iter(entries), itertools.cycle(sizes)
    return entries, list(iter(lambda: list(itertools.islice(left, next(size))), []))


def run(made, clock):
    """Steps until nothing is left to do."""
    for _ in range(MOST_STEPS):
        clock.now += 0.5
        if not made.step():
            return
    raise AssertionError("it does not come to an end")


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    for module in (scheduler, view):
        monkeypatch.setattr(module, "time", clock)
    return clock


PLANS = st.builds(Plan, st.integers(0, 4), st.integers(0, 3), st.booleans(), st.sampled_from(
    [False, False, False, True]
))  # fmt: skip


@cases(80)
@given(
    st.lists(PLANS, max_size=8),
    st.lists(st.integers(1, 3), min_size=1, max_size=3),
    st.lists(st.integers(0, 3), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(0, 2),
)
def test_every_run_comes_to_its_end_and_none_runs_twice_at_once(
    plans, sizes, looks, workers, retries
):
    with pytest.MonkeyPatch.context() as patch:
        clock, machine, ended = Clock(), Machine(workers, looks), []
        for module in (scheduler, view):
            patch.setattr(module, "time", clock)
        elsewhere = [plan.looks_elsewhere > 0 and plan.ended_elsewhere for plan in plans]
        entries, units = units_of(plans, sizes)
        made = scheduler.Scheduler(
            units, machine.start, workers, retries, lambda: ended.append(clock.now)
        )
        run(made, clock)
    assert bool(ended) == bool(plans)  # tables are made whenever something has ended
    for entry, by_others in zip(entries, elsewhere, strict=True):
        folder, plan = entry.folder, entry.folder.plan
        assert not folder.is_running
        if plan.is_broken:
            assert (entry.state, folder.starts) == ("failed", 0)
            assert entry.error == f"{entry.name} cannot be written"
        elif by_others:
            assert (entry.state, folder.starts, entry.error) == ("done", 0, "")
        elif plan.deaths > retries:
            assert (entry.state, entry.failures, folder.starts) == ("failed", *[retries + 1] * 2)
            assert entry.error == f"died of attempt {retries + 1}"
        else:
            assert (entry.state, entry.failures, entry.error) == ("done", plan.deaths, "")
            assert folder.starts == plan.deaths + 1
        assert entry.seconds == folder.starts


def test_runs_are_started_in_order_and_what_died_comes_last(clock):
    machine = Machine(2, [1])
    _, units = units_of([Plan(deaths=1), Plan(), Plan(), Plan()], [1])
    run(scheduler.Scheduler(units, machine.start, 2, 1, lambda: None), clock)
    assert machine.order == ["run0", "run1", "run2", "run3", "run0"]


def test_a_run_that_others_are_at_is_looked_at_again_after_a_while(clock):
    machine = Machine(1, [0])
    (first, second), units = units_of([Plan(looks_elsewhere=2), Plan()], [1])
    made = scheduler.Scheduler(units, machine.start, 1, 0, lambda: None)
    made.step()
    assert (first.state, second.state) == ("elsewhere", "running")
    made.step()
    assert first.folder.plan.looks_elsewhere == 1  # not asked again yet
    clock.now += scheduler.ELSEWHERE_S
    made.step()
    assert (first.folder.plan.looks_elsewhere, second.state) == (0, "done")
    clock.now += scheduler.ELSEWHERE_S
    assert made.step()
    assert first.state == "running"


def test_of_several_runs_only_the_broken_one_is_refused(clock):
    machine = Machine(1, [0])
    entries, units = units_of([Plan(), Plan(is_broken=True), Plan()], [3])
    run(scheduler.Scheduler(units, machine.start, 1, 0, lambda: None), clock)
    assert [entry.state for entry in entries] == ["done", "failed", "done"]


def test_what_is_stopped_waits_for_another_time(clock):
    machine = Machine(2, [9])
    entries, units = units_of([Plan(), Plan(), Plan()], [2, 1])
    made = scheduler.Scheduler(units, machine.start, 2, 0, lambda: None)
    made.step()
    assert [entry.state for entry in entries] == ["running"] * 3
    made.stop()
    assert [entry.state for entry in entries] == ["waiting"] * 3
    assert [entry.failures for entry in entries] == [0] * 3
    assert not any(entry.folder.is_running for entry in entries)
    assert not made.step()
