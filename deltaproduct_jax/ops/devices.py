"""How many devices a program is spread over by the compiler, which is known when it is lowered."""

import math
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import batching, mlir


def devices_left(axis_context: Any) -> int:
    """Devices over which the compiler cuts arrays by itself: those of axes that are not manual.

    Args:
      axis_context: JAX's account of the axes, as a lowering rule has it.
    """
    mesh = getattr(axis_context, "mesh", None)  # of a shard_map
    if mesh is None:
        return getattr(axis_context, "num_devices", 1) or 1
    return math.prod(n for x, n in mesh.shape.items() if x not in axis_context.manual_axes)


_unless_spread_p = jax.extend.core.Primitive("delta_product_unless_spread")
_unless_spread_p.def_impl(lambda x: x)
_unless_spread_p.def_abstract_eval(lambda x: x)
batching.primitive_batchers[_unless_spread_p] = lambda operands, axes: (
    _unless_spread_p.bind(*operands),
    axes[0],
)


def _lower(ctx, x):
    if devices_left(ctx.module_context.axis_context) == 1:
        return [x]
    return mlir.lower_fun(lambda x: jnp.ones_like(x), multiple_results=False)(ctx, x)


mlir.register_lowering(_unless_spread_p, _lower)


def unless_spread(found: jax.Array) -> jax.Array:
    """A bool that says whether to look closer; True where all devices would have to be asked."""
    return _unless_spread_p.bind(found)
