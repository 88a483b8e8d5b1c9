"""Cross entropy of tokens against float64, its derivatives, and what it keeps for the way back."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaproduct_jax.ops.blocks import logits as logits_of_blocks
from deltaproduct_jax.training import cross_entropy

LOGITS = np.random.default_rng(0).normal(size=(2, 5, 7)) * 3
TARGETS = np.random.default_rng(1).integers(7, size=(2, 5))
MASK = np.array([[True, True, False, True, True], [True, False, True, True, True]])
WEIGHTS = np.random.default_rng(2).normal(size=(2, 2, 5))


def expected(logits):
    """Cross entropy, log-sum and the gradient of both, weighted, in float64."""
    largest = logits.max(axis=-1, keepdims=True)
    exponentials = np.exp(logits - largest)
    log_sum = np.log(exponentials.sum(axis=-1)) + largest[..., 0]
    one_hot = np.eye(7)[TARGETS]
    probabilities = exponentials / exponentials.sum(axis=-1, keepdims=True)
    first, second = WEIGHTS * MASK
    gradient = probabilities * (first + second)[..., None] - one_hot * first[..., None]
    return log_sum - (one_hot * logits).sum(axis=-1), log_sum, gradient


def weighted(logits):
    found = cross_entropy.of_tokens(logits, jnp.asarray(TARGETS), jnp.asarray(MASK))
    numbers = jnp.stack([found.cross_entropy, found.log_sum]) * WEIGHTS.astype(np.float32)
    return jnp.sum(numbers, where=jnp.asarray(MASK)), found


@pytest.mark.parametrize("by_kernels", [False, True])
@pytest.mark.parametrize(("dtype", "bar"), [("float32", 1e-5), ("bfloat16", 8e-3)])
def test_values_and_gradients_are_those_of_float64(dtype, bar, by_kernels, monkeypatch):
    monkeypatch.setattr(logits_of_blocks, "takes_kernel", lambda _: by_kernels)
    logits = jnp.asarray(LOGITS, dtype)
    gradient, found = jax.grad(weighted, has_aux=True)(logits)
    *want, dwant = expected(np.asarray(logits, np.float64))
    assert found.cross_entropy.dtype == found.log_sum.dtype == jnp.float32
    for x, reference in zip(found, want, strict=False):
        np.testing.assert_allclose(x[MASK], reference[MASK], rtol=1e-5, atol=1e-5)
    assert gradient.dtype == logits.dtype
    np.testing.assert_allclose(np.asarray(gradient, np.float64), dwant, rtol=bar, atol=bar / 10)
    correct = np.asarray(logits, np.float64).argmax(-1) == TARGETS
    np.testing.assert_array_equal(found.correct, correct)


def test_forward_mode_and_second_derivatives_are_those_of_reverse_mode():
    logits, along = jnp.asarray(LOGITS, jnp.float32), jnp.asarray(LOGITS[::-1], jnp.float32)
    value = lambda logits: weighted(logits)[0]
    pushed = jax.jvp(value, (logits,), (along,))[1]
    np.testing.assert_allclose(pushed, jnp.sum(jax.grad(value)(logits) * along), rtol=1e-5)
    twice = jax.jvp(jax.grad(value), (logits,), (along,))[1]
    shifted = [jax.grad(value)(logits + sign * 1e-2 * along) for sign in (1, -1)]
    np.testing.assert_allclose(twice, (shifted[0] - shifted[1]) / 2e-2, rtol=2e-2, atol=2e-3)


def test_of_equal_logits_the_smallest_id_is_the_answer():
    logits = jnp.asarray([[[1.0, 3, 3, 0]], [[3.0, 1, 3, 0]], [[jnp.nan, 1, 3, 0]]])
    mask = jnp.ones((3, 1), bool)
    targets = [jnp.full((3, 1), i) for i in range(3)]
    answers = [cross_entropy.of_tokens(logits, x, mask).correct for x in targets]
    np.testing.assert_array_equal(
        np.stack(answers)[..., 0], [[False, True, False], [True, False, False], [False] * 3]
    )


def test_what_does_not_count_has_no_cotangent_whatever_it_is():
    logits = jnp.asarray(LOGITS, jnp.float32).at[0, 2].set(jnp.nan).at[1, 1].set(jnp.inf)
    gradient = jax.grad(lambda x: weighted(x)[0])(logits)
    np.testing.assert_allclose(gradient, expected(LOGITS)[2], rtol=1e-5, atol=1e-6)


def test_nothing_of_the_size_of_the_logits_is_kept_in_float32():
    logits = jnp.asarray(LOGITS, jnp.bfloat16)
    _, pull = jax.vjp(lambda x: weighted(x)[0], logits)
    kept = [x for x in jax.tree.leaves(pull) if x.size >= logits.size]
    assert kept
    assert {x.dtype for x in kept} == {jnp.dtype("bfloat16")}
