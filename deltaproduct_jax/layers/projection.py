"""The parts of a mixer, linear maps, convolutions and norms, all drawn and computed alike."""

import dataclasses
import functools
import math
from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers.initializers import conv_init, projection_init
from deltaproduct_jax.layers.norm import HeadNorm, RMSNorm
from deltaproduct_jax.layers.short_conv import ShortConv
from deltaproduct_jax.ops.parts import explicit_names, placement, side_by_side
from deltaproduct_jax.ops.precision import accumulator_dtype


@dataclasses.dataclass(frozen=True)
class Parts:
    """Makes the parts of one mixer, all drawn and computed as its constructor was told.

    Attributes:
        initializer: ``"paper"`` or ``"fla"``, see ``layers/initializers.py``.
        initializer_range: standard deviation of ``"fla"``.
        dtype: dtype of the computation.
        param_dtype: dtype of the parameters.
        rngs: source of the parameter keys.
        norm_eps: epsilon of norms.
        initial_gate: where forget gates start; None for as published.
    """

    initializer: str
    initializer_range: float
    dtype: DTypeLike
    param_dtype: DTypeLike
    rngs: nnx.Rngs
    norm_eps: float = 1e-5
    initial_gate: float | None = None

    def project(
        self,
        in_features: int,
        out_features: int,
        use_bias: bool = False,
        wide: bool = False,
        parts: int = 1,
    ) -> nnx.Linear:
        """A linear map.

        Args:
            in_features: width of the input.
            out_features: width of the output.
            use_bias: add a learnt bias.
            wide: compute in float32 at least, as gates do.
            parts: as in :func:`projection_init`.
        """
        how = self.initializer, self.initializer_range
        return nnx.Linear(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=projection_init(*how, in_features, out_features, parts),
            dtype=accumulator_dtype(self.dtype) if wide else jnp.dtype(self.dtype),
            param_dtype=self.param_dtype,
            dot_general=over_tokens,
            rngs=self.rngs,
        )

    def convolve(self, channels: int, conv_size: int, activation: str = "silu") -> ShortConv:
        """A short convolution of ``conv_size`` taps."""
        return ShortConv(
            channels,
            conv_size,
            activation=activation,
            kernel_init=conv_init(self.initializer, self.initializer_range, conv_size),
            param_dtype=self.param_dtype,
            rngs=self.rngs,
        )

    def rms_norm(self, width: int) -> RMSNorm:
        """A norm of the last axis, of this width."""
        return RMSNorm(width, eps=self.norm_eps, dtype=self.dtype, param_dtype=self.param_dtype)

    def head_norm(
        self, num_heads: int, width: int, *, eps: float | None = None, use_bias: bool = False
    ) -> HeadNorm:
        """A norm of every head; ``eps`` is ``norm_eps`` unless given."""
        eps = self.norm_eps if eps is None else eps
        kinds = {"dtype": self.dtype, "param_dtype": self.param_dtype}
        return HeadNorm(num_heads, width, eps=eps, use_bias=use_bias, **kinds)


def over_tokens(
    x: jax.Array, kernel: jax.Array, dimension_numbers: Any, **options: Any
) -> jax.Array:
    """``x @ kernel`` for `nnx.Linear`, of all tokens as the rows of one matrix.

    For the kernel's gradient of ``[B, T, D]`` XLA writes the cotangent once more, transposed, and
    on a CPU that takes as long as the products themselves. Over a mesh, whose axes may cut ``B``
    and ``T`` alike, they stay apart.
    """
    multiply = functools.partial(jax.lax.dot_general, **options)
    lies = any(explicit_names(x)) or any(explicit_names(kernel)) or options.get("out_sharding")
    if x.ndim < 3 or lies or placement() is not None:
        return multiply(x, kernel, dimension_numbers)
    *before, width = x.shape
    rows = x.reshape(math.prod(before), width)
    return multiply(rows, kernel, (((1,), (0,)), ((), ()))).reshape(*before, kernel.shape[1])


def in_parts(linear: nnx.Linear, x: jax.Array, parts: int) -> jax.Array:
    """``linear(x)`` of ``[B, T, D]`` without a bias, ``[B, T, parts, width]``.

    Cut along ``width`` over a mesh, the columns of a part that belong to one device do not lie
    together in the kernel; so it is the kernel that is laid out anew, once, and no activations.
    """
    spread = placement()
    kernel = linear.kernel[...]
    kernel = kernel.reshape(kernel.shape[0], parts, -1)
    if spread is None and not any(explicit_names(x)):
        return linear(x).reshape(*x.shape[:-1], *kernel.shape[1:])
    if spread is not None:
        kernel = spread.heads(kernel)
    x, kernel = (a.astype(linear.dtype) for a in (x, kernel))
    return jax.lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))


def head_devices() -> int:
    """Over how many devices a mesh cuts heads."""
    spread = placement()
    return 1 if spread is None else spread.head_devices


def by_devices(arrays: Iterable[jax.Array], sizes: Sequence[tuple[int, int]]) -> jax.Array:
    """Arrays ``[..., parts * width]`` of such ``sizes`` as one, what a device has together."""
    parts = [x.reshape(*x.shape[:-1], *size) for x, size in zip(arrays, sizes, strict=False)]
    return side_by_side(parts, head_devices())


def joined_kernel(
    maps: Sequence[nnx.Linear], sizes: Sequence[tuple[int, int]], dtype: DTypeLike
) -> jax.Array:
    """The kernels of maps of ``(parts, width)`` each, as one product reads them ``[D, columns]``.

    Behind them are zeros, so that rows are whole sectors of memory, 32 bytes in bfloat16.
    """
    spread, devices = placement(), head_devices()
    kernels = [m.kernel[...] for m in maps]
    kernels = [w.reshape(len(w), *size) for w, size in zip(kernels, sizes, strict=True)]
    if spread is not None:
        kernels = [
            spread.heads(w) if n > 1 else w for w, (n, _) in zip(kernels, sizes, strict=True)
        ]
    columns = sum(m.out_features for m in maps) // devices
    filling = jnp.zeros((len(kernels[0]), 1, devices * (-columns % 16)), dtype)
    return side_by_side([*(w.astype(dtype) for w in kernels), filling], devices)


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
