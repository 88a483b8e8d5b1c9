"""The short convolution as JAX has it: what it means, and what runs wherever no kernel does.

    y[t] = unit(act(sum_w taps[w] u[t - W + 1 + w])),    unit(a) = a / sqrt(sum(a^2) + 1e-6)

The last tap multiplies the current token. A tap whose token belongs to another segment counts as
zero. Products and sums are taken in float32 at least, and rounded once.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.linear import unit_vectors
from deltaproduct_jax.ops.precision import accumulator_dtype


class Form(NamedTuple):
    """What is done to the sum of taps before it is rounded.

    Attributes:
      activation: a function of one number, such as `jax.nn.silu` or `identity`.
      unit_width: channels that are divided by their length together; None: none are.
    """

    activation: Callable[[jax.Array], jax.Array]
    unit_width: int | None = None


def identity(x: jax.Array) -> jax.Array:
    """The activation that does nothing."""
    return x


def plain(
    form: Form,
    u: jax.Array,
    before: jax.Array,
    taps: jax.Array,
    run: jax.Array | None,
    past: jax.Array | None,
) -> jax.Array:
    """The convolution of ``u``, in its shape and dtype.

    Args:
      form: what is done to the sum of taps; a unit width divides the last axis of ``u``.
      u: inputs [B, T, *channels].
      before: the W - 1 inputs before them [B, W - 1, *channels].
      taps: [W, *channels], in float32 at least.
      run: numbers of segments [B, T], or None.
      past: those of ``before`` [B, W - 1], or None.
    """
    extended = jnp.concatenate([before, u], axis=1)
    if run is not None:
        run = jnp.concatenate([past, run], axis=1)
    return behind(form, sum_of_taps(extended, run, taps)).astype(u.dtype)


def plain_activated(form: Form, u: jax.Array) -> jax.Array:
    """What stands behind the taps alone, of ``u`` [B, T, *channels], rounded once."""
    return behind(form, u.astype(accumulator_dtype(u.dtype))).astype(u.dtype)


def behind(form: Form, y: jax.Array) -> jax.Array:
    """What is done to the sum of taps."""
    y = form.activation(y)
    return y if form.unit_width is None else unit(y, form.unit_width)


def sum_of_taps(extended: jax.Array, run: jax.Array | None, taps: jax.Array) -> jax.Array:
    """The sum of taps [B, T, *channels] of inputs [B, W - 1 + T, *channels].

    Beside the inputs stand the numbers of their segments [B, W - 1 + T], or None.
    """
    tail = taps.shape[0] - 1
    T = extended.shape[1] - tail
    y = jnp.zeros((extended.shape[0], T, *extended.shape[2:]), taps.dtype)
    for tap in range(tail + 1):
        shifted = extended[:, tap : tap + T].astype(taps.dtype)
        if run is not None:
            same = run[:, tap : tap + T] == run[:, tail:]
            shifted = jnp.where(beside(same, shifted), shifted, 0)
        y = y + shifted * taps[tap][None, None]
    return y


def unit(y: jax.Array, width: int) -> jax.Array:
    """Every ``width`` numbers along the last axis divided by their length."""
    wide = y.astype(accumulator_dtype(y.dtype)).reshape(*y.shape[:-1], -1, width)
    return unit_vectors(wide).reshape(y.shape)


def beside(tokens: jax.Array, u: jax.Array) -> jax.Array:
    """What is the same for all channels of ``u``, with their axes."""
    return tokens.reshape(*tokens.shape, *[1] * (u.ndim - 2))
