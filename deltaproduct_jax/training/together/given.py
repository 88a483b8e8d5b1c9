"""What the programs of a group are given: of the run in each slot what it would be given alone.

A run on a task gives its key, which does for all steps. A run on text gives rows, which are read
anew for each step; runs of the same seed read the same rows, and one stream serves them all. The
slot of a run that is not asked, since it is ahead or has stopped, gets what another run's has, and
nobody looks at what becomes of it.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import Mesh

from deltaproduct_jax.tasks.task import batch_key
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.source import batches_of
from deltaproduct_jax.training.together.mapped import put, stacked
from deltaproduct_jax.training.together.member import Member


class Given(Protocol):
    """What is given to the slots of a program, arrays ``[S, ...]`` on its devices."""

    def training(self, step: int, members: Sequence[Member]) -> Any:
        """For the update after ``step`` of them, which these members make."""

    def evaluation(self, split: str, length: int, members: Sequence[Member]) -> Iterator[Any]:
        """For the evaluation of these members, one batch after another."""


def given_to(config: RunConfig, in_slots: Sequence[Member], mesh: Mesh) -> Given:
    """What the runs in the slots of a program are given.

    Args:
        config: of any of them.
        in_slots: who has each slot; what is left of the slots may repeat one.
        mesh: over which the slots are cut.
    """
    return (Read if config.is_streamed else Drawn)(config, in_slots, mesh)


def share_streams(members: Sequence[Member]) -> None:
    """Has the members whose data are the same read them by the source of the first."""
    sources: dict[int, Any] = {}
    for member in members:
        member.source = sources.setdefault(member.config.seeds()["data"], member.source)


class Drawn:
    """Of a task: keys, of which the programs draw."""

    def __init__(self, config: RunConfig, in_slots: Sequence[Member], mesh: Mesh):
        self._config, self._mesh = config, mesh
        self._keys = put(jnp.stack([member.source.training(0) for member in in_slots]), mesh)

    def training(self, step: int, members: Sequence[Member]) -> jax.Array:
        """The same keys for all steps."""
        return self._keys

    def evaluation(self, split: str, length: int, members: Sequence[Member]) -> Iterator[jax.Array]:
        """The keys of a batch."""
        for index in batches_of(self._config, length):
            keys = jax.vmap(lambda key, index=index: batch_key(key, split, index))(self._keys)
            yield put(keys, self._mesh)


class Read:
    """Of streams: rows, read for the members that ask alone."""

    def __init__(self, config: RunConfig, in_slots: Sequence[Member], mesh: Mesh):
        self._in_slots, self._mesh = in_slots, mesh

    def training(self, step: int, members: Sequence[Member]) -> Any:
        """The next rows of these members; each stream then stands behind them."""
        sources = {id(member.source): member.source for member in members}
        return self._spread({key: source.training(step) for key, source in sources.items()})

    def evaluation(self, split: str, length: int, members: Sequence[Member]) -> Iterator[Any]:
        """The first rows of each run's split."""
        sources = {id(member.source): member.source for member in members}
        for rows in zip(*(s.evaluation(split, length) for s in sources.values()), strict=True):
            yield self._spread(dict(zip(sources, rows, strict=True)))

    def _spread(self, rows: dict[int, Any]) -> Any:
        another = next(iter(rows.values()))
        own = [rows.get(id(member.source), another) for member in self._in_slots]
        return put(stacked(own), self._mesh)
