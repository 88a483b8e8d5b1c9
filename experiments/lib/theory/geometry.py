"""Whether a model's first layer holds the construction of its group; see `describe`."""

from collections.abc import Sequence
from typing import Any

import numpy as np

from deltaproduct_jax.analysis.householder_geometry import (
    factors_of_tokens,
    geometry,
    transitions,
)
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.tasks.finite_groups import finite_group
from deltaproduct_jax.theory import CATALOGUE
from deltaproduct_jax.theory.one_layer import representation
from deltaproduct_jax.theory.representations import permutation_matrices, subgroup_matrices

ONE_LAYER = tuple(
    name
    for name in CATALOGUE
    if name.split("_")[0] in ("permutations", "cube", "icosahedron", "plane")
)
COMPONENTS = 0.95
CLOSE = 0.1
# Group -> kind of the one-layer construction with the fewest factors.
KINDS = {"cube": "solid", "icosahedron": "solid"}
CONSTRUCTED = {name.split("_")[1]: name.split("_")[0] for name in ONE_LAYER}


def exponent(group: str) -> int:
    """The smallest number of times that every element, multiplied, is the identity."""
    table = finite_group(group).table
    elements = np.arange(len(table))
    power, count = elements, 1
    while power.any():
        power, count = table[power, elements], count + 1
    return count


def spectra(group: str) -> list[np.ndarray]:
    """Eigenvalues ``[G, d]`` of every element in the construction's and related representations.

    Empty where the catalogue has no construction of the group in one layer.
    """
    if group not in CONSTRUCTED:
        return []
    kind = CONSTRUCTED[group]
    matrices = representation(group, KINDS.get(kind, kind))[0]
    E = exponent(group)
    values = np.linalg.eigvals(matrices)
    found = [values**k for k in range(1, E) if np.gcd(k, E) == 1]
    signs = np.linalg.det(matrices)[:, None]
    found.append(np.concatenate([values, signs], axis=-1))
    if kind == "permutations":
        # The sign turns all but the one direction that every permutation fixes.
        order = np.argsort(np.abs(values - 1), axis=-1)
        found.append(signs * np.take_along_axis(values, order, 1)[:, 1:])
    return found


def share_as_constructed(values: np.ndarray, group: str, letters: Sequence[int]) -> float | None:
    """``as_constructed`` of a head with eigenvalues ``[L, K]``; None without a construction."""
    shares = []
    for wanted in spectra(group):
        width = max(values.shape[1], wanted.shape[1])
        ours, theirs = (_by_turn(each, width) for each in (values, wanted[list(letters)]))
        off = np.abs(ours - theirs).max(-1)
        shares.append(float((off <= CLOSE)[np.array(letters) != 0].mean()))
    return max(shares, default=None)


def _by_turn(values: np.ndarray, width: int) -> np.ndarray:
    """Eigenvalues and ones up to ``width``, conjugates folded on each other, by their angle."""
    values = np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=1)
    values = values.real + 1j * np.abs(values.imag)
    return np.take_along_axis(values, np.argsort(np.angle(values), axis=-1), axis=-1)


def copies(group: str) -> dict[str, np.ndarray]:
    """The construction's representation and relatives, each ``[G, d, d]``; {} without one."""
    if group not in CONSTRUCTED:
        return {}
    kind = CONSTRUCTED[group]
    matrices = representation(group, KINDS.get(kind, kind))[0]
    if kind == "plane":
        # Further turns are mirror images of these; powers of Dm's mirrors are no copies.
        half = exponent(group) // 2 if group[0] == "Z" else 1
        powers = [k for k in range(1, half + 1) if np.gcd(k, exponent(group)) == 1]
        return {f"turns x {k}": np.linalg.matrix_power(matrices, k) for k in powers}
    permutations = permutation_matrices(group)
    found = {"itself": matrices if kind != "permutations" else without_ones(matrices)}
    if group == "S5":
        found["on six points"] = without_ones(subgroup_matrices(group, 5))
    if group[0] == "S":
        signs = np.linalg.det(permutations)[:, None, None]
        return found | {f"{name}, signed": signs * made for name, made in found.items()}
    swap = np.eye(permutations.shape[-1])
    swap[[0, 1]] = swap[[1, 0]]
    moved = (swap @ permutations @ swap)[:, None] == permutations
    return found | {"letters renamed": matrices[moved.all((2, 3)).argmax(1)]}


def without_ones(permutations: np.ndarray) -> np.ndarray:
    """Permutations ``[G, n, n]`` on what is orthogonal to the vector of ones, which they fix."""
    rest = np.linalg.svd(np.ones((1, permutations.shape[-1])))[2][1:]
    return rest @ permutations @ rest.T


def closest_copy(
    acts: np.ndarray, group: str, letters: Sequence[int]
) -> tuple[float | None, str | None]:
    """``off_copy`` of a head with transitions ``[L, K, K]`` and of what; None, None without one."""
    K, found = acts.shape[-1], []
    for name, matrices in copies(group).items():
        d = matrices.shape[-1]
        # What a letter does to T, its columns one after the other; with R^T as `off_copy` has it.
        square = np.zeros((K * d, K * d))
        for act, letter in zip(acts, letters, strict=True):
            row = np.kron(np.eye(d), act) - np.kron(matrices[letter], np.eye(K))
            square += row.T @ row
        smallest = max(np.linalg.eigvalsh(square)[0], 0.0)
        found.append((float(np.sqrt(smallest / len(letters))), name))
    return min(found, default=(None, None))


def describe(
    name: str, group: str, model: SequenceModel, letters: Sequence[int], bos: int
) -> dict[str, Any]:
    """What `experiments.analysis.theory_geometry` lists, of one model."""
    factors = factors_of_tokens(model, letters, before=bos)
    heads, acts = geometry(factors)["heads"], transitions(factors)
    E = exponent(group)
    for index, head in enumerate(heads):
        beta = np.array(head["beta"])
        values = np.array(head["eigenvalues"]) @ [1, 1j]
        turns = np.angle(values) / (2 * np.pi) * E
        moving = beta[beta >= 1]
        head["smallest_beta"] = float(moving.min()) if len(moving) else None
        about_zero = np.array(head["explained_about_zero"])
        head["dimensions"] = int(np.searchsorted(about_zero, COMPONENTS) + 1)
        head["off_circle"] = float(np.abs(np.abs(values) - 1).max())
        head["as_constructed"] = share_as_constructed(values, group, letters)
        head["off_copy"], head["copy_of"] = closest_copy(acts[:, index], group, letters)
        head["off_angle"] = float(np.abs(turns - np.round(turns)).max() / E)
    return {"name": name, "group": group, "exponent": E, "heads": heads}
