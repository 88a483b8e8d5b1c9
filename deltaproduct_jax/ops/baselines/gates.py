"""Gates below 0: their range as magnitude and sign, and a recurrence that needs no signs."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from deltaproduct_jax.ops.precision import accumulator_dtype

# Stands for a gate of exactly 0: its log is finite, and so is the gradient through it.
_ZERO = 1e-20


def extended_gate(
    log_alpha: Float[Array, "*shape"],
) -> tuple[Float[Array, "*shape"], Bool[Array, "*shape"]]:
    """The gate ``2 alpha - 1`` in (-1, 1) from ``log alpha <= 0`` (Grazzi et al., ICLR 2025).

    Returns:
        ``(g, negative)``: the log of its magnitude, in float32 at least, and True where it is below
        0. Its sign never passes through a logarithm. A gate of exactly 0 comes out as 1e-20, with
        the gradient that belongs to 0.
    """
    a = log_alpha.astype(accumulator_dtype(log_alpha.dtype))
    rise = 2 * jnp.expm1(a)
    negative = rise < -1
    # The magnitude is 1 + u; near both ends of the range log1p(u) keeps what log(1 + u) loses.
    u = jnp.where(negative, -2 * jnp.exp(a), rise)
    zero = u <= -1
    at_zero = jnp.log(_ZERO) + (u - jax.lax.stop_gradient(u)) / _ZERO
    return jnp.where(zero, at_zero, jnp.log1p(jnp.where(zero, -0.5, u))), negative


def fold_signs(
    negative: Bool[Array, "B T H"] | Bool[Array, "B T H K"], *arrays: Float[Array, "B T H K"]
) -> tuple[list[Float[Array, "B T H K"]], Int[Array, "B H #K 1"]]:
    """Queries and keys under which gates of their magnitude alone give the same outputs.

    With s_t the product of all signs up to token t, s_t S_t obeys the recurrence of the magnitudes
    if the keys are s_t k_t, and reads the same if the queries are s_t q_t; s_t is 1 or -1, exactly.
    Transitions (I - beta k k^T) diag(gate) become those of s_t k_t.

    Returns:
        ``(arrays, sign)``; the latter is s_T, which turns the last state back.
    """
    if negative.ndim == 3:
        negative = negative[..., None]
    flips = negative.astype(jnp.int32)
    sign = 1 - 2 * (jnp.cumsum(flips, axis=1) % 2)
    last = 1 - 2 * (jnp.sum(flips, axis=1) % 2)
    return [x * sign.astype(x.dtype) for x in arrays], last[..., None]
