"""Work shared by threads and processes: results in order, progress, ends that are no success."""

import os
import time

import pytest

from deltaproduct_jax.data import workers
from deltaproduct_jax.errors import RunDirectoryError


def slow_square(number):
    time.sleep(0.02 * (3 - number))  # the first is done last
    return number**2


@pytest.mark.parametrize("processes", [1, 4])
def test_results_are_in_order(processes):
    results = workers.run(slow_square, range(4), [1] * 4, processes, "squares", in_threads=True)
    assert results == [0, 1, 4, 9]
    assert workers.run(slow_square, [], [], processes, "squares") == []


def test_progress_is_shown_now_and_then(monkeypatch, capsys):
    monkeypatch.setattr(workers, "LINE_EVERY_S", 0.0)
    workers.run(slow_square, range(4), [10**6] * 4, 1, "squares")
    shown = capsys.readouterr().err.splitlines()
    assert [line.split("  ")[0] for line in shown] == [f"squares {n}/4 MB" for n in (1, 2, 3, 4)]
    assert "left 0 s" in shown[-1]


def test_what_is_raised_comes_out_and_nothing_more_is_begun():
    begun = []

    def fails(number):
        begun.append(number)
        time.sleep(0.05)
        raise ValueError("no square")

    with pytest.raises(ValueError, match="no square"):
        workers.run(fails, range(100), [1] * 100, 2, "squares", in_threads=True)
    assert len(begun) < 10


@pytest.mark.slow
def test_a_killed_worker_is_one_line():
    """As the kernel kills one for want of memory."""
    with pytest.raises(RunDirectoryError, match="a worker process was killed") as error:
        workers.run(os._exit, [1, 1], [1, 1], 2, "work")
    assert "\n" not in str(error.value)
