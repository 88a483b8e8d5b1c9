"""Root-mean-square normalisation."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deltaproduct_jax.ops.precision import accumulator_dtype


class RMSNorm(nnx.Module):
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis (Zhang and Sennrich, 2019).

    The whole of it is computed in float32 at least and rounded once. Flax's own cannot run in
    bfloat16 where JAX is told to be strict about dtype promotion.

    Args:
        width: size of the last axis.
        eps: added to the mean square, inside the root.
        dtype: dtype of the result.
        param_dtype: dtype of the scale.
    """

    def __init__(
        self,
        width: int,
        *,
        eps: float = 1e-6,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.eps = eps
        self.dtype = jnp.dtype(dtype)
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalises ``x``."""
        wide = accumulator_dtype(self.dtype)
        x = x.astype(wide)
        mean_square = jnp.mean(x * x, axis=-1, keepdims=True)
        scale = self.scale[...].astype(wide).reshape((1,) * (x.ndim - 1) + (-1,))
        return (x * jax.lax.rsqrt(mean_square + self.eps) * scale).astype(self.dtype)
