"""The extended range of a gate, as magnitude and sign."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

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
