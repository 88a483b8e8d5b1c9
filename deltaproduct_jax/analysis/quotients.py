"""What a model knows of a group: its answers up to normal subgroups, that is, in its quotients.

The cosets of a normal subgroup N of G multiply as elements do. So a model may follow in which coset
the product is and know nothing finer: it follows the quotient G/N. Guessing evenly among the
elements of that coset it is right on 1 of ``|N|`` answers, at a loss of ``ln |N|`` nats each, and
losses stand at these levels. A simple group, as A5, has none between ``ln |G|`` and 0.

What can be followed at every length? In one layer of n_h factors a letter multiplies states by A of
which ``I - A`` has a rank of n_h at most. So a head whose states keep apart follows a
representation of G in which no letter moves more than n_h dimensions. With n_h = 1 and all elements
as letters each is the identity or a reflection, all in one direction: a sign. Together heads know
the signs, which is G modulo the least normal subgroup whose quotient is a product of Z2. Up to some
length more may be known: nearly all of short words, or sums, taken modulo n where they are read.

That quotients are followed was seen in this project; quotient groups are standard. The task is that
of https://arxiv.org/abs/2502.10297.

Dimension key: ``G`` elements of the group, ``N`` words, ``T`` tokens.
"""

import dataclasses
from collections.abc import Collection

import numpy as np

from deltaproduct_jax.errors import ConfigError

MOST = 100  # normal subgroups; products of many Z2 have more than anyone could look at


@dataclasses.dataclass(frozen=True, eq=False)
class Quotient:
    """A group modulo one of its normal subgroups.

    Attributes:
        normal: elements of the normal subgroup, ascending.
        coset_of: ``[G]``, the coset that each element is in, from 0, that of the subgroup itself.
    """

    normal: np.ndarray
    coset_of: np.ndarray

    @property
    def cosets(self) -> int:
        """How many elements the quotient has; guesses are right on one over that."""
        return len(self.coset_of) // len(self.normal)

    @property
    def loss(self) -> float:
        """Nats an answer of whoever knows the coset and nothing finer."""
        return float(np.log(len(self.normal)))

    def right(self, answers: np.ndarray, targets: np.ndarray) -> np.ndarray:
        """Whether answers are in the cosets of their targets.

        Args:
            answers: ids ``[...]`` from 0; those from G on are no elements, and wrong.
            targets: ids of the same shape; where one is no element, as BOS, the answer is right
                only if it is that id.

        Returns:
            bool ``[...]``.
        """
        answers, targets = np.asarray(answers), np.asarray(targets)
        G = len(self.coset_of)
        a, y = (self.coset_of[np.minimum(ids, G - 1)] for ids in (answers, targets))
        return np.where((answers < G) & (targets < G), a == y, answers == targets)


def quotients(table: np.ndarray) -> list[Quotient]:
    """The quotients by all normal subgroups, from that by the identity to that by all of G.

    Normal subgroups are what conjugacy classes generate, and what these generate together.

    Args:
        table: ``[G, G]`` of a group, ``table[p, q]`` the index of p * q, 0 the identity; as of
            `deltaproduct_jax.tasks.finite_groups`.

    Returns:
        By the size of the subgroup, those of one size by their elements.

    Raises:
        ConfigError: there are more than `MOST` normal subgroups.
    """
    generated = {_generated(table, members) for members in _conjugacy_classes(table)}
    found = {frozenset([0])}
    new = list(found)
    while new:
        subgroup = new.pop()
        for other in generated:
            both = subgroup | other
            if len(both) > max(len(subgroup), len(other)):
                both = frozenset(np.flatnonzero(_products(table, subgroup, other)).tolist())
            if both not in found:
                found.add(both)
                new.append(both)
        if len(found) > MOST:
            raise ConfigError(
                f"a group of {len(table)} elements has more than {MOST} normal subgroups, which "
                "are too many to look at"
            )
    return [_quotient(table, np.array(each)) for each in sorted(map(sorted, found), key=_by_size)]


def _by_size(members: list[int]) -> tuple[int, list[int]]:
    return len(members), members


def _conjugacy_classes(table: np.ndarray) -> list[np.ndarray]:
    """The classes ``{g x g^-1}``, each ascending."""
    inverse_G = np.argmax(table == 0, axis=1)
    classes, seen = [], np.zeros(len(table), bool)
    for x in range(len(table)):
        if not seen[x]:
            classes.append(np.unique(table[table[:, x], inverse_G]))
            seen[classes[-1]] = True
    return classes


def _generated(table: np.ndarray, members: np.ndarray) -> frozenset[int]:
    """All products of the members; in a finite group that is the subgroup they generate."""
    inside, new = np.zeros(len(table), bool), np.array([0])
    while len(new):
        inside[new] = True
        new = np.flatnonzero(_products(table, new, members) & ~inside)
    return frozenset(np.flatnonzero(inside).tolist())


def _products(table: np.ndarray, left: Collection[int], right: Collection[int]) -> np.ndarray:
    """bool ``[G]``, which elements are the product of one of each."""
    reached = np.zeros(len(table), bool)
    reached[table[np.ix_(list(left), list(right))]] = True
    return reached


def _quotient(table: np.ndarray, normal: np.ndarray) -> Quotient:
    least_G = table[:, normal].min(axis=1)  # of each element's coset, stands for it
    return Quotient(normal, np.unique(least_G, return_inverse=True)[1])
