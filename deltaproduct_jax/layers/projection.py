"""Linear maps and convolutions of a mixer, all drawn and computed alike."""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers.initializers import conv_init, projection_init
from deltaproduct_jax.layers.short_conv import ShortConv
from deltaproduct_jax.ops.parts import placement
from deltaproduct_jax.ops.precision import accumulator_dtype


def projections(
    initializer: str,
    initializer_range: float,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> Callable[..., nnx.Linear]:
    """A function ``(in_features, out_features, use_bias=, wide=, parts=)`` that makes linear maps.

    ``wide`` ones compute in float32 at least, as gates do; ``parts`` as in :func:`projection_init`.
    """

    def project(
        in_features: int,
        out_features: int,
        use_bias: bool = False,
        wide: bool = False,
        parts: int = 1,
    ) -> nnx.Linear:
        init = projection_init(initializer, initializer_range, in_features, out_features, parts)
        return nnx.Linear(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=init,
            dtype=accumulator_dtype(dtype) if wide else jnp.dtype(dtype),
            param_dtype=param_dtype,
            rngs=rngs,
        )

    return project


def in_parts(linear: nnx.Linear, x: jax.Array, parts: int) -> jax.Array:
    """``linear(x)`` of ``[B, T, D]`` without a bias, ``[B, T, parts, width]``.

    Cut along ``width`` over a mesh, the columns of a part that belong to one device do not lie
    together in the kernel; so it is the kernel that is laid out anew, once, and no activations.
    """
    kernel = linear.kernel[...]
    kernel = kernel.reshape(kernel.shape[0], parts, -1)
    spread = placement()
    if spread is not None:
        kernel = spread.heads(kernel)
    x, kernel = (a.astype(linear.dtype) for a in (x, kernel))
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1,))
def apart(x: jax.Array, number: int) -> jax.Array:
    """``x``, which a compiler takes for another array than of other numbers.

    XLA makes one matrix product of some that read the same array. Where kernels read the results,
    each whole, the parts of that product are copied out of it, and their cotangents into one.
    """
    return jax.lax.optimization_barrier((x, jnp.int32(number)))[0]


@apart.defjvp
def _apart_jvp(number, primals, tangents):
    return apart(primals[0], number), tangents[0]


def convolutions(
    initializer: str,
    initializer_range: float,
    conv_size: int,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> Callable[..., ShortConv]:
    """A function ``(channels, activation=silu)`` that makes short convolutions."""
    taps = conv_init(initializer, initializer_range, conv_size)

    def convolve(
        channels: int, activation: Callable[[jax.Array], jax.Array] = nnx.silu
    ) -> ShortConv:
        return ShortConv(
            channels,
            conv_size,
            activation=activation,
            kernel_init=taps,
            param_dtype=param_dtype,
            rngs=rngs,
        )

    return convolve


def value_width(
    num_heads: int, head_dim: int, *, num_v_heads: int | None = None, expand_v: float = 1.0
) -> int:
    """The value width ``V``.

    Raises:
        ConfigError: the value heads, or their width, do not fit the others.
    """
    num_v_heads = num_heads if num_v_heads is None else num_v_heads
    if num_v_heads < num_heads or num_v_heads % num_heads:
        raise ConfigError(
            f"num_v_heads={num_v_heads} must be a positive multiple of num_heads={num_heads}"
        )
    value_dim = head_dim * expand_v
    if round(value_dim) < 1 or abs(value_dim - round(value_dim)) > 1e-6:
        raise ConfigError(
            f"expand_v={expand_v} times head_dim={head_dim} is {value_dim}; the value width must "
            "be a whole number of at least 1"
        )
    return round(value_dim)
