"""Orthogonal matrices as products of the reflections that Householder factors are.

With ``beta = 2`` and a unit key a factor is the reflection ``I - 2 k k^T``. An orthogonal matrix
``M`` is a product of rank(M - I) reflections and of no fewer (Cartan, Dieudonne, Scherk).
Float64 NumPy. Dimension key: ``R`` factors, ``K`` key width.
"""

import itertools

import numpy as np

TOLERANCE = 1e-9


def reflection(k: np.ndarray, beta: float = 2.0) -> np.ndarray:
    """``I - beta k k^T`` ``[K, K]`` for a key ``[K]``."""
    return np.eye(len(k)) - beta * np.outer(k, k)


def product(k: np.ndarray, beta: np.ndarray) -> np.ndarray:
    """``(I - beta_R k_R k_R^T) ... (I - beta_1 k_1 k_1^T)`` for keys ``[R, K]``, betas ``[R]``."""
    found = np.eye(k.shape[-1])
    for key, step in zip(k, beta, strict=True):
        found = reflection(key, step) @ found
    return found


def reflections(matrix: np.ndarray) -> np.ndarray:
    """Unit keys ``[rank(M - I), K]`` whose reflections, the first acting first, make ``M``.

    Of a permutation matrix every key is ``(e_a - e_b) / sqrt(2)``: the factors are transpositions.

    Raises:
        ValueError: the matrix is not orthogonal.
    """
    matrix = np.asarray(matrix)
    K = len(matrix)
    # What is not a number is not within any tolerance.
    if matrix.shape != (K, K) or not np.abs(matrix @ matrix.T - np.eye(K)).max() <= TOLERANCE:
        raise ValueError(f"matrix={matrix.tolist()} must be orthogonal")
    rest, keys = matrix, []
    # A reflection that takes x to M x leaves all fixed that M fixes, and then M x as well.
    for axis in range(K):
        moved = rest[:, axis] - np.eye(K)[axis]
        if np.linalg.norm(moved) > TOLERANCE:
            keys.append(moved / np.linalg.norm(moved))
            rest = reflection(keys[-1]) @ rest
    return np.array(keys[::-1]).reshape(-1, K)


def factors(matrix: np.ndarray, num_householder: int) -> tuple[np.ndarray, np.ndarray]:
    """Keys ``[R, K]`` and betas ``[R]``, 2 or 0, of a token that acts as ``matrix``.

    Raises:
        ValueError: the matrix is not orthogonal, or takes more than ``num_householder`` factors.
    """
    keys = reflections(matrix)
    R, needed = num_householder, len(keys)
    if needed > R:
        raise ValueError(f"num_householder={R} is too small: a letter takes {needed} reflections")
    # A factor that does nothing has beta = 0, whatever its key.
    idle = np.zeros((R - needed, len(matrix)))
    return np.concatenate([keys, idle]), np.repeat([2.0, 0.0], [needed, R - needed])


def completion(squares: int, at_least: int = 1) -> list[int]:
    """The fewest whole numbers whose squares bring ``squares`` up to a power of 4, ``at_least``.

    A key of small whole numbers with these appended has a length that is a power of 2, so that its
    normalised entries are exact in every binary float. Four always suffice (Lagrange).
    """
    power = 1
    while power < max(squares, at_least):
        power *= 4
    missing, most = power - squares, int(power**0.5)
    for count in range(5):
        for pads in itertools.combinations_with_replacement(range(most, 0, -1), count):
            if sum(pad * pad for pad in pads) == missing:
                return list(pads)
    raise AssertionError("every natural number is a sum of four squares")
