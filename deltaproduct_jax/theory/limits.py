"""What products of Householder factors cannot do, as checks that compute.

Proposition 1 of the DeltaProduct paper (https://arxiv.org/abs/2502.10297) on spectra; Grazzi et al.
(https://arxiv.org/abs/2411.12537), Theorem 2, on counting with one factor; and the argument of
Complex KDA (https://arxiv.org/abs/2609.24797) that S5 takes four. Float64 NumPy. Dimension key:
``R`` factors, ``K`` key width, ``T`` tokens.
"""

import itertools

import numpy as np

from deltaproduct_jax.tasks.finite_groups import finite_group
from deltaproduct_jax.theory.reflections import product
from deltaproduct_jax.theory.representations import permutation_matrices

CLOSE = 1e-7


def has_non_real_eigenvalues(beta: np.ndarray, cosine: float) -> bool:
    """Whether two factors, betas ``[2]``, keys at an angle of that cosine, turn the plane.

    With ``a = 1 - beta_1``, ``b = 1 - beta_2`` the plane's trace is ``a + b + beta_1 beta_2 c^2``
    and its determinant ``a b``; the eigenvalues are not real where trace^2 < 4 determinant. That
    takes both betas above 1: below 1 the trace is at least ``a + b >= 2 sqrt(a b)``.
    """
    a, b = 1 - np.asarray(beta)
    trace = a + b + (1 - a) * (1 - b) * cosine**2
    return bool(a < 0 and b < 0 and trace**2 < 4 * a * b)


def worst_violations(num_products: int, seed: int) -> dict[str, float]:
    """Proposition 1 on random products: by how much each statement fails at worst.

    Args:
        num_products: products that are drawn, 1 to 5 factors, 2 to 8 wide, betas in [0, 2].
        seed: draws them.

    Returns:
        Rounding errors, all of them: ``norm`` (of the product above 1), ``determinant`` (from
        prod(1 - beta)), ``rank`` (of the product less the identity, above R), ``equal_keys`` (from
        one factor with 1 - prod(1 - beta)), ``orthogonal_keys`` (asymmetry), ``small_betas``
        (imaginary parts of two factors' eigenvalues with betas up to 1), and ``two_factors``
        (pairs for which `has_non_real_eigenvalues` is wrong).
    """
    rng, worst = np.random.default_rng(seed), {}

    def note(name: str, size: float) -> None:
        worst[name] = max(worst.get(name, 0.0), float(size))

    for _ in range(num_products):
        R, K = rng.integers(1, 6), rng.integers(2, 9)
        k = rng.normal(size=(R, K))
        k /= np.linalg.norm(k, axis=-1, keepdims=True)
        beta = rng.uniform(0, 2, R)
        A = product(k, beta)
        note("norm", np.linalg.norm(A, 2) - 1)
        note("determinant", abs(np.linalg.det(A) - np.prod(1 - beta)))
        note("rank", np.linalg.svd(A - np.eye(K), compute_uv=False)[R:].max(initial=0))
        together = product(k[:1], np.array([1 - np.prod(1 - beta)]))
        note("equal_keys", np.abs(product(np.repeat(k[:1], R, axis=0), beta) - together).max())
        basis = np.linalg.qr(rng.normal(size=(K, K)))[0][: min(R, K)]
        apart = product(basis, beta[: len(basis)])
        note("orthogonal_keys", np.abs(apart - apart.T).max())
        pair = k[:1].repeat(2, axis=0) if R < 2 else k[:2]
        two = product(pair, rng.uniform(0, 1, 2))
        note("small_betas", np.abs(np.linalg.eigvals(two).imag).max())
        note("two_factors", _wrong_about(pair, rng.uniform(0, 2, 2)))
    return worst


def _wrong_about(k: np.ndarray, beta: np.ndarray) -> bool:
    found = np.abs(np.linalg.eigvals(product(k, beta)).imag).max()
    # Where the discriminant vanishes, rounding decides.
    return (1e-6 < found and not has_non_real_eigenvalues(beta, k[0] @ k[1])) or (
        found == 0 and has_non_real_eigenvalues(beta, k[0] @ k[1])
    )


def most_apart(tokens: int) -> float:
    """Bound on what two more of the same letter change after so many, with one factor.

    ``A = e^g (I - beta k k^T)`` is symmetric with eigenvalues s in [-1, 1], so that the state
    ``S_t = S* + A^t (S_0 - S*)`` has ``|S_(t+2) - S_t| <= max s^t (1 - s^2) |S_0 - S*|``, and the
    maximum is ``2 / (t + 2) (t / (t + 2))^(t / 2)``. Modulo 3 (or any m > 2) t and t + 2 differ for
    every t, so no decoder of finite precision counts for long, whatever beta, g, k and v.
    """
    t = tokens
    return 2 / (t + 2) * (t / (t + 2)) ** (t / 2)


def two_step_changes(
    k: np.ndarray, v: np.ndarray, beta: float, g: float, state: np.ndarray, T: int
) -> np.ndarray:
    """``|S_(t+2) - S_t| / |S_0 - S*|`` for t < T, of one letter repeated.

    Args:
        k: unit key ``[K]``.
        v: value ``[V]``.
        beta: in [0, 2].
        g: log decay, at most 0.
        state: ``[K, V]`` before the first.
        T: how many.
    """
    A, B = np.exp(g) * product(k[None], np.array([beta])), beta * np.outer(k, v)
    still = np.linalg.lstsq(np.eye(len(k)) - A, B, rcond=None)[0]
    # Directions that the letter does not move belong to the point at rest nearest to the state.
    free = np.linalg.eigh(A)
    kept = free.eigenvectors[:, free.eigenvalues > 1 - 1e-12]
    still = still + kept @ kept.T @ (state - still)
    states = [state]
    for _ in range(T + 1):
        states.append(A @ states[-1] + B)
    steps = np.linalg.norm(np.array(states[2:]) - np.array(states[:-2]), axis=(1, 2))
    return steps / max(np.linalg.norm(state - still), 1e-300)


def least_factors_of_permutations(group: str) -> int:
    """Factors that the letters of Sn or An take as permutation matrices: rank(P - I) at most."""
    matrices = permutation_matrices(group)
    n = matrices.shape[-1]
    return max(int(np.linalg.matrix_rank(matrix - np.eye(n))) for matrix in matrices)


def commutators_in_s5() -> list[int]:
    """Orders of ``c b c^-1 b^-1`` for the 5-cycle c and ``b = t c t^-1``, a transposition t each.

    With up to three factors a token's transition has at most one pair of eigenvalues off the real
    line. Were S5 tracked in finitely many states, the images of c and b, which t makes conjugate,
    would have powers that rotate one plane each by the same angle, of order divisible by 5, and
    the commutator of those has an order that divides 10 (`commutators_of_rotations`). Here it is 3.
    """
    group = finite_group("S5")
    perms = permutation_matrices("S5").argmax(1)
    index = {tuple(perm): number for number, perm in enumerate(perms.tolist())}
    table = group.table
    inverse = table.argmin(1)  # 0 is the identity
    c = index[1, 2, 3, 4, 0]
    orders = []
    for i, j in itertools.combinations(range(5), 2):
        swap = list(range(5))
        swap[i], swap[j] = j, i
        t = index[tuple(swap)]
        b = table[table[t, c], inverse[t]]
        product_, order = table[table[c, b], table[inverse[c], inverse[b]]], 1
        power = product_
        while power != 0:
            power, order = table[power, product_], order + 1
        orders.append(order)
    return orders


def commutators_of_rotations(matrices: np.ndarray, *, same_angle: bool) -> set[int]:
    """Orders of the commutators of a finite group's rotations of one plane whose order 5 divides.

    Args:
        matrices: ``[G, K, K]``, the group.
        same_angle: only pairs that rotate by the same angle, as conjugate ones do; else only
            pairs that do not.
    """
    K = matrices.shape[-1]
    fives = [
        matrix
        for matrix in matrices
        if np.linalg.matrix_rank(matrix - np.eye(K), CLOSE) == 2 and order_of(matrix) % 5 == 0
    ]
    found = set()
    for left, right in itertools.product(fives, repeat=2):
        if (abs(np.trace(left) - np.trace(right)) < CLOSE) == same_angle:
            found.add(order_of(left @ right @ left.T @ right.T))
    return found


def order_of(matrix: np.ndarray, most: int = 1000) -> int:
    """The smallest power that is the identity; ValueError where none up to ``most`` is."""
    power = matrix
    for order in range(1, most + 1):
        if np.abs(power - np.eye(len(matrix))).max() < CLOSE:
            return order
        power = power @ matrix
    raise ValueError(f"matrix={matrix.tolist()} has no order up to {most}")
