"""How far a loop is ahead of its devices."""

import collections
from typing import Any

import jax

MOST = 2  # one that runs, and one that begins as soon as it has ended


class UnderWay:
    """The steps that are dispatched and may not have ended.

    JAX lets 32 of them wait. They hide nothing that two would not, and a loop that is asked to stop
    would have all of them before it: too long for those who are given half a minute.
    """

    def __init__(self):
        self._results: collections.deque[Any] = collections.deque()

    def add(self, result: Any) -> None:
        """One more, whose ``result`` nobody donates; waits until no more than `MOST` are left."""
        self._results.append(result)
        while len(self._results) > MOST:
            jax.block_until_ready(self._results.popleft())
