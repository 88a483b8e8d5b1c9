"""Finite groups as NumPy multiplication tables, elements numbered as in the published data sets.

``table[p, q]`` is the index of p * q, for permutations i -> p(q(i)); 0 is the identity.
The order of the elements of S_n, A_n, Z_n and of products is that of Merrill et al., "The Illusion
of State in State-Space Models", https://arxiv.org/abs/2404.08819, whose data the DeltaProduct paper
(https://arxiv.org/abs/2502.10297) uses. They have no dihedral groups; that order is ours.
"""

import dataclasses
import functools
import itertools
import re

import numpy as np

from deltaproduct_jax.errors import ConfigError

MAX_ORDER = 5040  # S7; the table has MAX_ORDER**2 entries
SMALLEST = {"S": 2, "A": 3, "Z": 2, "D": 2}


@dataclasses.dataclass(frozen=True, eq=False)
class FiniteGroup:
    """A group by its table.

    Attributes:
        table: ``[G, G]`` int32, ``table[p, q]`` the index of p * q; read-only.
        displaced: ``[G]`` how many points each permutation moves; None unless S_n or A_n.
    """

    table: np.ndarray
    displaced: np.ndarray | None = None

    @property
    def order(self) -> int:
        """How many elements the group has."""
        return self.table.shape[0]


@functools.cache
def finite_group(name: str) -> FiniteGroup:
    """The group called ``name``: S5, A5, Z60, D4, or a direct product such as ``A5_x_Z9``.

    Raises:
        ConfigError: the name is not of this form, or the group is too large for a table.
    """
    group = functools.reduce(_direct_product, (_build(kind, n) for kind, n in parts_of(name)))
    group.table.setflags(write=False)
    return group


def parts_of(name: str) -> list[tuple[str, int]]:
    """The factors of a direct product: S, A, Z or D, and n. ConfigError as `finite_group`."""
    parts = [_parse(part, name) for part in name.split("_x_")]
    order = int(np.prod([_order(kind, n) for kind, n in parts], dtype=object))
    if order > MAX_ORDER:
        raise ConfigError(f"group={name!r} has too many elements; it may have up to {MAX_ORDER}")
    return parts


def _parse(part: str, name: str) -> tuple[str, int]:
    match = re.fullmatch(r"([SAZD])([0-9]{1,4})", part)
    if match is None or int(match[2]) < SMALLEST[match[1]]:
        known = ", ".join(f"{kind}n (n >= {smallest})" for kind, smallest in SMALLEST.items())
        raise ConfigError(
            f"group={name!r} is not known; it may be one of {known}, or a product such as A5_x_Z9"
        )
    return match[1], int(match[2])


def _order(kind: str, n: int) -> int:
    if kind in "SA":
        # Factorials beyond the limit are cut short: S9999 has 35,656 digits.
        order = int(np.prod(range(1, min(n, 20) + 1), dtype=object))
        return order if kind == "S" else order // 2
    return n if kind == "Z" else 2 * n


def _build(kind: str, n: int) -> FiniteGroup:
    if kind == "Z":
        return FiniteGroup(np.add.outer(np.arange(n), np.arange(n)).astype(np.int32) % n)
    if kind == "D":
        return _dihedral(n)
    return _permutations(n, even_only=kind == "A")


def _permutations(n: int, *, even_only: bool) -> FiniteGroup:
    """S_n, or A_n, in the lexicographic order of the images of 0..n-1."""
    perms_GN = np.array(list(itertools.permutations(range(n))), dtype=np.int8)
    if even_only:
        i, j = np.triu_indices(n, k=1)
        inversions_G = (perms_GN[:, i] > perms_GN[:, j]).sum(axis=1)
        perms_GN = perms_GN[inversions_G % 2 == 0]
    # A permutation read as a number in base n; lexicographic order makes these codes ascend.
    weights_N = n ** np.arange(n - 1, -1, -1)
    codes_G = perms_GN @ weights_N
    rows = [np.searchsorted(codes_G, p_N[perms_GN] @ weights_N) for p_N in perms_GN]
    displaced_G = (perms_GN != np.arange(n)).sum(axis=1)
    return FiniteGroup(np.array(rows, dtype=np.int32), displaced_G)


def _dihedral(n: int) -> FiniteGroup:
    """The 2n symmetries of the n-gon: r^0..r^(n-1), then r^0 s..r^(n-1) s, with s r = r^-1 s."""
    turn_G = np.tile(np.arange(n), 2)
    flip_G = np.repeat([0, 1], n)
    sign_G = 1 - 2 * flip_G
    turn_GG = (turn_G[:, None] + sign_G[:, None] * turn_G[None, :]) % n
    flip_GG = (flip_G[:, None] + flip_G[None, :]) % 2
    return FiniteGroup((turn_GG + n * flip_GG).astype(np.int32))


def _direct_product(left: FiniteGroup, right: FiniteGroup) -> FiniteGroup:
    """Pairs (a, b) in lexicographic order: the index of a pair is ``a * right.order + b``."""
    table = left.table[:, None, :, None] * right.order + right.table[None, :, None, :]
    order = left.order * right.order
    return FiniteGroup(table.reshape(order, order))
