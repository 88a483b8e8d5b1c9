"""Groups of orthogonal matrices, numbered as the word problems number their elements.

``matrices[p] @ matrices[q] == matrices[table[p, q]]`` for the table of ``tasks.finite_groups``.
Float64 NumPy. Dimension key: ``G`` elements, ``K`` width of the representation.
"""

import itertools

import numpy as np

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.tasks.finite_groups import finite_group, parts_of

GOLDEN = (1 + 5**0.5) / 2


def rotation(axis: np.ndarray, angle: float) -> np.ndarray:
    """The rotation of three dimensions about ``axis`` ``[3]`` by ``angle``."""
    x, y, z = axis / np.linalg.norm(axis)
    cross = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    return np.eye(3) + np.sin(angle) * cross + (1 - np.cos(angle)) * cross @ cross


def plane_rotation(angle: float) -> np.ndarray:
    """The rotation of the plane by ``angle``."""
    return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])


# Rotations that generate the group of the cube (S4) and of the icosahedron (A5).
SOLIDS = {
    "S4": [rotation(np.array([0, 0, 1]), np.pi / 2), rotation(np.ones(3), 2 * np.pi / 3)],
    "A5": [
        rotation(np.array([0, 1, GOLDEN]), 2 * np.pi / 5),
        rotation(np.ones(3), 2 * np.pi / 3),
    ],
}


def _kind_of(group: str, kinds: str, otherwise: str) -> tuple[str, int]:
    """The letter and the number of a group; ConfigError unless the letter is one of ``kinds``."""
    parts = parts_of(group)
    if len(parts) > 1 or parts[0][0] not in kinds:
        raise ConfigError(f"group={group!r} {otherwise}")
    return parts[0]


def permutation_matrices(group: str) -> np.ndarray:
    """``[n!, n, n]`` with ``P e_i = e_p(i)`` for ``group`` Sn, ``[n!/2, n, n]`` for An.

    Raises:
        ConfigError: the group is no Sn or An, or too large for a table.
    """
    kind, n = _kind_of(group, "SA", "has no permutation matrices; it may be Sn or An")
    perms = np.array(list(itertools.permutations(range(n))))
    matrices = np.eye(n)[perms].swapaxes(1, 2)
    return matrices if kind == "S" else matrices[np.linalg.det(matrices) > 0]


def subgroup_matrices(group: str, p: int) -> np.ndarray:
    """``[G, n, n]``: how conjugation permutes the n subgroups of the prime order ``p``.

    S5 has six of order 5, on which it acts as PGL(2, 5) on the projective line.

    Raises:
        ConfigError: the group is not known, or ``p`` is no prime that divides its order.
    """
    table = finite_group(group).table
    if p < 2 or any(p % smaller == 0 for smaller in range(2, p)) or len(table) % p:
        raise ConfigError(
            f"p={p} must be a prime that divides the order of group={group!r}, {len(table)}"
        )
    every = np.arange(len(table))
    powers = [np.zeros_like(every)]  # element 0 is the identity
    for _ in range(p):
        powers.append(table[powers[-1], every])
    of_order = every[(powers[p] == 0) & (every != 0)]
    subgroups = sorted(
        {frozenset([0, *(int(power[g]) for power in powers[1:p])]) for g in of_order}, key=sorted
    )
    inverse = (table == 0).argmax(1)
    matrices = np.zeros((len(table), len(subgroups), len(subgroups)))
    for column, subgroup in enumerate(subgroups):
        member = min(subgroup - {0})
        moved = table[table[every, member], inverse]
        for row, image in enumerate(subgroups):
            matrices[np.isin(moved, list(image)), row, column] = 1
    return matrices


def plane_matrices(group: str) -> np.ndarray:
    """``[G, 2, 2]``, the rotations and reflections of the plane that are Zm or Dm.

    Raises:
        ConfigError: the group is no Zm or Dm, or too large for a table.
    """
    kind, m = _kind_of(group, "ZD", "does not act on the plane; it may be Zm or Dm")
    turns = np.array([plane_rotation(2 * np.pi * i / m) for i in range(m)])
    if kind == "Z":
        return turns
    return np.concatenate([turns, turns @ np.diag([1.0, -1.0])])


def solid_matrices(group: str) -> np.ndarray:
    """``[G, 3, 3]``, the rotations of the cube for S4 and of the icosahedron for A5.

    Raises:
        ConfigError: the group is another.
    """
    if group not in SOLIDS:
        raise ConfigError(f"group={group!r} is no solid's; it may be one of {list(SOLIDS)}")
    return numbered(finite_group(group).table, closure(SOLIDS[group]))


def closure(generators: list[np.ndarray]) -> np.ndarray:
    """All products of the generators ``[K, K]``, the identity first."""
    found = [np.eye(len(generators[0]))]
    for matrix in found:
        for generator in generators:
            new = generator @ matrix
            if min(np.abs(np.array(found) - new).max((1, 2))) > 1e-6:
                found.append(new)
    return np.array(found)


def numbered(table: np.ndarray, matrices: np.ndarray) -> np.ndarray:
    """The matrices in an order in which they multiply as ``table`` says.

    Tries the images of two elements that generate the group, until they respect the table.

    Raises:
        ValueError: the matrices ``[G, K, K]`` are not a group with this table.
    """
    G = len(table)
    of_product = _table(matrices)
    for pair in itertools.combinations(range(G), 2):
        if len(_spread(table, {pair[0]: 0, pair[1]: 0}, None)) == G:
            break
    for images in itertools.product(range(len(matrices)), repeat=2):
        found = _spread(table, dict(zip(pair, images, strict=True)), of_product)
        if len(found) == G == len(set(found.values())):
            order = np.array([found[p] for p in range(G)])
            if (of_product[order[:, None], order[None]] == order[table]).all():
                return matrices[order]
    raise ValueError(f"{len(matrices)} matrices do not multiply like the group's {G} elements")


def _spread(table: np.ndarray, images: dict[int, int], of_product: np.ndarray | None) -> dict:
    """Images of all elements that those of ``images`` generate; element 0 goes to matrix 0."""
    found = {0: 0}
    queue = [0]
    for p in queue:
        for q, image in images.items():
            if (new := int(table[p, q])) not in found:
                found[new] = 0 if of_product is None else int(of_product[found[p], image])
                queue.append(new)
    return found


def _table(matrices: np.ndarray) -> np.ndarray:
    """``[G, G]``, the number of every product; the matrices differ, so nearest is enough."""
    products = np.einsum("pij,qjk->pqik", matrices, matrices).reshape(len(matrices) ** 2, 1, -1)
    flat = matrices.reshape(1, len(matrices), -1)
    return ((products - flat) ** 2).sum(-1).argmin(1).reshape(len(matrices), -1)
