"""Parts of a block as JAX has them: what they mean, and what runs wherever no kernel does.

Everything is computed in float32 at least, and rounded where it is written.

Shape suffixes: B batch, T tokens, D channels, F channels between the products of a SwiGLU.
"""

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deltaproduct_jax.ops.debug import nan_if
from deltaproduct_jax.ops.linear import inner, scaled
from deltaproduct_jax.ops.precision import accumulator_dtype

# Names for policies of `jax.checkpoint`: mean squares of rows, what stands between mixer and MLP,
# and both widened products.
NORM_POINT, MIDDLE, HIDDEN_POINT = "norm_of_rows", "block_middle", "mlp_hidden"


def norm(x: jax.Array, scale: jax.Array, eps: float, dtype: jnp.dtype) -> jax.Array:
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, rounded once."""
    return norm_and_square(x, scale, eps, dtype)[0]


def norm_and_square(x, scale, eps, dtype):
    """`norm`, and the mean square of every row."""
    wide = accumulator_dtype(dtype)
    x = x.astype(wide)
    # Kept for the way back, a number a row saves it a pass over the array.
    mean_square = checkpoint_name(jnp.mean(x * x, axis=-1, keepdims=True), NORM_POINT)
    return normed(x, mean_square, scale, eps, dtype), mean_square


def normed(x, mean_square, scale, eps, dtype):
    """`norm` of which mean squares are known."""
    wide = accumulator_dtype(dtype)
    scale = scale.astype(wide).reshape((1,) * (x.ndim - 1) + (-1,))
    return (scaled(x.astype(wide), jax.lax.rsqrt(mean_square + eps)[..., 0]) * scale).astype(dtype)


def norm_back(eps, again, x, mean_square, scale, dy, dx_after=None, reached=None):
    """What `row_passes.norm_back` returns, of arrays of any rank; the norm only if ``again``."""
    wide = accumulator_dtype(x.dtype)
    x_wide, dy = x.astype(wide), dy.astype(wide)
    inverse = jax.lax.rsqrt(mean_square + eps)
    unit = x_wide * inverse
    dscale = jnp.sum(dy * unit, axis=tuple(range(x.ndim - 1)))
    dunit = dy * scale.astype(wide).reshape((1,) * (x.ndim - 1) + (-1,))
    along = inner(dunit, unit)[..., None] / x.shape[-1]
    dx = inverse * (dunit - unit * along)
    dx = (dx if dx_after is None else dx_after.astype(wide) + dx).astype(x.dtype)
    if reached is not None:
        dx = nan_if(reached[..., None] & (dx != 0), dx)
    return dx, dscale, *((normed(x, mean_square, scale, eps, x.dtype),) if again else ())


def activated(hidden: jax.Array) -> jax.Array:
    """silu(gate) * up of both, [B, T, 2 F] or [B, T, 2, F]."""
    gate, up = (x.reshape(*x.shape[:2], -1) for x in jnp.split(hidden, 2, axis=2))
    return jax.nn.silu(gate) * up


def matrix_back(x: jax.Array, dy: jax.Array) -> jax.Array:
    """The cotangent of a matrix, from tokens [B, T, ...] that it multiplies and that of these."""
    return jnp.tensordot(x, dy, ((0, 1), (0, 1)))
