"""Linear maps of a mixer, all drawn and computed alike."""

from collections.abc import Callable

import jax.numpy as jnp
from flax import nnx
from jax.typing import DTypeLike

from deltaproduct_jax.errors import require_at_least, require_one_of
from deltaproduct_jax.layers.delta_product import check_heads
from deltaproduct_jax.layers.initializers import INITIALIZERS, projection_init
from deltaproduct_jax.ops.precision import accumulator_dtype


def projections(
    initializer: str,
    initializer_range: float,
    dtype: DTypeLike,
    param_dtype: DTypeLike,
    rngs: nnx.Rngs,
) -> Callable[..., nnx.Linear]:
    """A function ``(in_features, out_features, use_bias=False, wide=False)`` that makes them.

    ``wide`` ones compute in float32 at least, as gates do.
    """

    def project(
        in_features: int, out_features: int, use_bias: bool = False, wide: bool = False
    ) -> nnx.Linear:
        return nnx.Linear(
            in_features,
            out_features,
            use_bias=use_bias,
            kernel_init=projection_init(initializer, initializer_range, in_features, out_features),
            dtype=accumulator_dtype(dtype) if wide else jnp.dtype(dtype),
            param_dtype=param_dtype,
            rngs=rngs,
        )

    return project


def check_sizes(
    hidden_size: int,
    num_heads: int,
    head_dim: int,
    initializer: str,
    *,
    num_v_heads: int | None = None,
    expand_v: float = 1.0,
) -> int:
    """Checks what all mixers are told, and returns the value width ``V``.

    Raises:
        ConfigError: naming the argument, when one is out of range or does not fit another.
    """
    require_at_least("hidden_size", hidden_size, 1)
    require_one_of("initializer", initializer, INITIALIZERS)
    check_heads(num_heads, num_heads if num_v_heads is None else num_v_heads, head_dim, expand_v)
    return round(head_dim * expand_v)
