"""Limits: the statements hold on random products and on whole groups, and the bounds are met."""

import numpy as np
import pytest

from deltaproduct_jax.tasks.finite_groups import finite_group
from deltaproduct_jax.theory import limits, reflections
from deltaproduct_jax.theory.representations import (
    plane_matrices,
    solid_matrices,
    subgroup_matrices,
)


def test_proposition_1_on_random_products():
    worst = limits.worst_violations(150, seed=0)
    assert set(worst) == {
        "norm", "determinant", "rank", "equal_keys", "orthogonal_keys", "small_betas",
        "two_factors",
    }  # fmt: skip
    assert max(worst.values()) < 1e-13


def test_products_of_which_no_statement_holds_are_noticed(monkeypatch):
    rng = np.random.default_rng(1)
    spoilt = lambda A: A + rng.normal(scale=0.5, size=A.shape)
    monkeypatch.setattr(limits, "product", lambda *of: spoilt(reflections.product(*of)))
    worst = limits.worst_violations(50, seed=0)
    assert min(worst.values()) > 0.1, worst


@pytest.mark.parametrize(
    ("beta", "cosine", "turns"),
    [((2, 2), 0.5, True), ((2, 2), 0, False), ((2, 2), 1, False), ((0.9, 0.9), 0.5, False),
     ((2, 0.5), 0.7, False), ((1.5, 1.5), 0.95, False), ((1.5, 1.5), 0.2, True)],
)  # fmt: skip
def test_two_factors_turn_the_plane_only_with_large_betas(beta, cosine, turns):
    k = np.array([[1, 0], [cosine, (1 - cosine**2) ** 0.5]])
    found = np.linalg.eigvals(reflections.product(k, np.array(beta))).imag
    assert (np.abs(found).max() > 1e-6) == turns
    assert limits.has_non_real_eigenvalues(np.array(beta), cosine) == turns


def test_one_factor_cannot_count_modulo_3():
    rng = np.random.default_rng(0)
    bound = np.array([limits.most_apart(t) for t in range(50)])
    assert bound[-1] < 0.02
    assert (np.diff(bound) < 0).all()
    nearest = 0.0
    for _ in range(100):
        k = rng.normal(size=4)
        k /= np.linalg.norm(k)
        beta, g = rng.uniform(0, 2), rng.choice([0, -0.02, -1])
        changes = limits.two_step_changes(k, rng.normal(size=3), beta, g, rng.normal(size=(4, 3)),
                                          50)  # fmt: skip
        assert (changes <= bound * (1 + 1e-9) + 1e-14).all()
        nearest = max(nearest, (changes / bound)[5:].max())
    assert nearest > 0.9  # the bound is not idle
    # beta = 2 returns after two, whatever was written.
    assert limits.two_step_changes(k, np.ones(3), 2.0, 0.0, np.zeros((4, 3)), 9).max() < 1e-12


def test_s5_takes_four():
    assert limits.commutators_in_s5() == [3] * 10
    icosahedron = solid_matrices("A5")
    same = limits.commutators_of_rotations(icosahedron, same_angle=True)
    assert same == {1, 5}  # orders that divide 10
    assert limits.commutators_of_rotations(icosahedron, same_angle=False) == {1, 3}
    assert limits.commutators_of_rotations(plane_matrices("D10"), same_angle=True) == {1}
    with pytest.raises(ValueError, match="has no order up to 9"):
        limits.order_of(icosahedron[1] * 2, 9)


def test_factors_that_permutation_matrices_take():
    found = [limits.least_factors_of_permutations(group) for group in ("S3", "S4", "S5", "A4")]
    assert found == [2, 3, 4, 2]


@pytest.mark.parametrize(
    ("group", "prime", "subgroups"), [("S3", 2, 3), ("A4", 3, 4), ("S4", 3, 4), ("S5", 5, 6)]
)
def test_conjugation_permutes_the_subgroups_of_a_prime_order(group, prime, subgroups):
    """S5 acts on its six of order 5 as on nothing else of six: no letter is fixed by all."""
    matrices = subgroup_matrices(group, prime)
    table = finite_group(group).table
    assert matrices.shape == (len(table), subgroups, subgroups)
    for axis in (1, 2):
        np.testing.assert_array_equal(matrices.sum(axis), 1)
    np.testing.assert_array_equal(matrices[0], np.eye(subgroups))
    rng = np.random.default_rng(0)
    one, other = rng.integers(0, len(table), (2, 300))
    np.testing.assert_array_equal(matrices[one] @ matrices[other], matrices[table[one, other]])
    assert (matrices.sum(0) > 0).all()  # each goes to each
    fixed = np.einsum("gii->g", matrices)
    assert fixed.mean() == 1  # Burnside: one orbit
