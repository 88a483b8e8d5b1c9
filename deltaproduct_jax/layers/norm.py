"""Normalisation: by the root mean square, and of each head on its own."""

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike
from jaxtyping import Array, Float

from deltaproduct_jax.layers.checks import check_width, checks_arguments
from deltaproduct_jax.ops.blocks import rows
from deltaproduct_jax.ops.linear import scaled, spread
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

    @checks_arguments
    def __init__(
        self,
        width: int,
        *,
        eps: float = 1e-6,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.width, self.eps = width, eps
        self.dtype = jnp.dtype(dtype)
        self.scale = nnx.Param(jnp.ones((width,), param_dtype))

    def __call__(self, x: Float[Array, "*batch width"]) -> Float[Array, "*batch width"]:
        """Normalises ``x``."""
        check_width("x", x, self.width)
        return rows.norm(x, self.scale[...], self.eps, self.dtype)

    def forked(self, x: Float[Array, "B T width"]) -> tuple[jax.Array, ...]:
        """``x`` itself, its finite norm, tokens where that is not: ``ops/blocks/rows.py``.

        ``x`` has the dtype of the result.
        """
        return rows.forked_norm(x, self.scale[...], self.eps)


class HeadNorm(nnx.Module):
    """``(x - mean) / sqrt(variance + eps) * scale [+ bias]`` within every head: a group norm.

    Computed in float32 at least and rounded once.

    Args:
        num_heads: heads ``H``, axis -2.
        width: size of the last axis.
        eps: added to the variance, inside the root.
        use_bias: add a learnt bias.
        dtype: dtype of the result.
        param_dtype: dtype of scale and bias, each ``[H, width]``.
    """

    @checks_arguments
    def __init__(
        self,
        num_heads: int,
        width: int,
        *,
        eps: float = 1e-5,
        use_bias: bool = False,
        dtype: DTypeLike = jnp.float32,
        param_dtype: DTypeLike = jnp.float32,
    ):
        self.eps, self.use_bias = eps, use_bias
        self.dtype = jnp.dtype(dtype)
        self.scale = nnx.Param(jnp.ones((num_heads, width), param_dtype))
        if use_bias:
            self.bias = nnx.Param(jnp.zeros((num_heads, width), param_dtype))

    def __call__(self, x: Float[Array, "*batch H width"]) -> Float[Array, "*batch H width"]:
        """Normalises ``x``."""
        wide = accumulator_dtype(self.dtype)
        x = x.astype(wide)
        param = lambda p: p[...].astype(wide).reshape((1,) * (x.ndim - 2) + p.shape)
        x = x - spread(jnp.mean(x, axis=-1), -1, x.shape[-1])
        variance = jnp.mean(x * x, axis=-1)
        x = scaled(x, jax.lax.rsqrt(variance + self.eps)) * param(self.scale)
        return (x + param(self.bias) if self.use_bias else x).astype(self.dtype)
