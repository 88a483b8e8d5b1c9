"""Products that add up where keys are equal are rounded once, whatever order a platform adds in."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from bars import assert_within_bars, run_as
from helpers import Case

from deltaproduct_jax.ops.gram import gram
from deltaproduct_jax.ops.precision import Matmul
from deltaproduct_jax.ops.triangular import unit_lower_inverse

FLOAT32 = Matmul.of(jnp.float32, None)


class InSequence(Matmul):
    """A product of two matrices whose terms are added one after another, as a GPU adds them."""

    def __call__(self, equation, x, y):
        assert equation == "...mk,...nk->...mn"
        zero = jnp.zeros((*x.shape[:-1], y.shape[-2]), jnp.float32)

        def add(total, terms):
            of_x, of_y = terms
            return total + of_x[..., :, None] * of_y[..., None, :], None

        return jax.lax.scan(add, zero, (jnp.moveaxis(x, -1, 0), jnp.moveaxis(y, -1, 0)))[0]


@pytest.mark.parametrize("norm", [1.0, 1e-3, 37.0])
def test_products_of_keys_are_rounded_once(norm):
    """Plainly added, they are off by up to 6 units of 2^-24 of the norms; norms differ by row."""
    rng = np.random.default_rng(0)
    k = rng.normal(size=(3, 32, 128))
    k[0] = k[0, :1] + 0.01 * k[0]
    k *= norm * rng.uniform(0.5, 2, size=(3, 32, 1)) / np.linalg.norm(k, axis=-1, keepdims=True)
    k[2, 5] = 0
    k = k.astype(np.float32)
    want = np.einsum("bmk,bnk->bmn", k, k, dtype=np.float64)
    norms = np.linalg.norm(k.astype(np.float64), axis=-1)
    got = jax.jit(lambda k: gram(k, InSequence(FLOAT32.operand, FLOAT32.precision)))(k)
    rounding = np.spacing(np.abs(want).astype(np.float32)) / 2
    slack = 2**-28 * norms[:, :, None] * norms[:, None, :]
    assert np.all(np.abs(np.asarray(got, np.float64) - want) <= rounding + slack)


def test_forward_over_reverse_sees_products_of_keys():
    k = np.random.default_rng(0).normal(size=(4, 8)).astype(np.float32)
    dk = np.ones_like(k)
    _, got = jax.jvp(lambda k: gram(k, FLOAT32), (k,), (dk,))
    np.testing.assert_allclose(got, dk @ k.T + k @ dk.T, rtol=1e-5, atol=1e-5)


def test_refinement_removes_what_the_levels_rounded():
    rng = np.random.default_rng(0)
    k = rng.normal(size=(64, 1, 64)) + 0.01 * rng.normal(size=(64, 32, 64))
    k /= np.linalg.norm(k, axis=-1, keepdims=True)
    lower = np.tril(2 * np.einsum("bmk,bnk->bmn", k, k), -1).astype(np.float32)
    want = np.linalg.inv(np.eye(32) + lower.astype(np.float64))

    def error(refine):
        got = unit_lower_inverse(jnp.asarray(lower), FLOAT32, refine=refine)
        return np.linalg.norm(np.asarray(got, np.float64) - want)

    assert 2 * error(refine=True) < error(refine=False)


@pytest.mark.slow
@pytest.mark.parametrize("keys", ["identical", "parallel"])
def test_agreeing_keys_on_other_platforms(keys, monkeypatch):
    """With products of keys that are merely float32, identical keys are over the bar."""
    run_as("default", monkeypatch)
    case = Case(T=512, B=1, H=1, K=64, V=64, beta=(2.0, 2.0), keys=keys, gate=None)
    # Nor may an optimisation take back what is added to them.
    assert_within_bars(case, "chunked", "float32", optimised=True)
    jax.clear_caches()
