"""What is known when a program is lowered: where an implementation has no code, an error.

Tracing does not know the platform, and one program may be lowered for several. Nor does it know
over how many devices the compiler spreads a program.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import batching, mlir

from deltaproduct_jax.ops.precision import accumulator_dtype
from deltaproduct_jax.ops.varying import mark_varying_as

_unavailable_p = jax.extend.core.Primitive("delta_product_unavailable")
_unavailable_p.multiple_results = True
_unavailable_p.def_abstract_eval(lambda *_, outs, text: list(outs))


def _lower(ctx, *_, outs, text):
    del outs
    raise ValueError(
        f"{text}; this program is lowered for {', '.join(ctx.module_context.platforms)}"
    )


def _batch(operands, axes, *, outs, text):
    mapped = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    outs = tuple(jax.core.ShapedArray((mapped, *out.shape), out.dtype) for out in outs)
    return _unavailable_p.bind(*operands, outs=outs, text=text), [0] * len(outs)


mlir.register_lowering(_unavailable_p, _lower)
batching.primitive_batchers[_unavailable_p] = _batch


def unavailable(text: str, like):
    """A function that takes and returns what ``like`` does, and cannot be lowered.

    Args:
      text: of the ValueError.
      like: a function of arrays.
    """

    return functools.partial(_run, text, like)


def _run(text, like, *operands):
    shapes, tree = jax.tree.flatten(jax.eval_shape(like, *operands))
    outs = tuple(jax.core.ShapedArray(x.shape, x.dtype) for x in shapes)
    leaves = jax.tree.leaves(operands)
    results = _unavailable_p.bind(*leaves, outs=outs, text=text)
    return jax.tree.unflatten(tree, [mark_varying_as(x, leaves[0]) for x in results])


_asked_p = jax.extend.core.Primitive("delta_product_asked")
_asked_p.def_impl(lambda x, **_: x)
_asked_p.def_abstract_eval(lambda x, **_: x)
batching.primitive_batchers[_asked_p] = lambda operands, axes, **parameters: (
    _asked_p.bind(*operands, **parameters),
    axes[0],
)


def _lower_asked(ctx, x, *, text, reason):
    why = reason(ctx.module_context.axis_context)
    if why is not None:
        platforms = ", ".join(ctx.module_context.platforms)
        raise ValueError(f"{text}: {why}; this program is lowered for {platforms}")
    return [x]


mlir.register_lowering(_asked_p, _lower_asked)


def asked_when_lowered(x: jax.Array, text: str, reason: Callable[[Any], str | None]) -> jax.Array:
    """``x``, of whose way to the machine ``reason`` is asked when the program is lowered.

    Args:
      x: goes into what may not be lowered.
      text: of the ValueError, which goes on with the reason.
      reason: takes JAX's account of the axes that are the compiler's; None where nothing speaks
        against it.
    """
    return _asked_p.bind(x, text=text, reason=reason)


def devices_left(axis_context: Any) -> int:
    """Devices over which the compiler cuts arrays by itself: those of axes that are not manual.

    Args:
      axis_context: JAX's account of the axes, as a lowering rule has it.
    """
    mesh = getattr(axis_context, "mesh", None)  # of a shard_map
    if mesh is None:
        return getattr(axis_context, "num_devices", 1) or 1
    return math.prod(n for x, n in mesh.shape.items() if x not in axis_context.manual_axes)


_if_cheap_p = jax.extend.core.Primitive("delta_product_if_cheap")
_if_cheap_p.def_impl(lambda x: x)
_if_cheap_p.def_abstract_eval(lambda x: x)
# One answer for all that is mapped, or JAX would make a selection of the decision and run both.
batching.primitive_batchers[_if_cheap_p] = lambda operands, axes: (
    _if_cheap_p.bind(jnp.any(operands[0], axis=axes[0])),
    None,
)


def _lower_if_cheap(ctx, x):
    platforms = ctx.platforms or ctx.module_context.platforms
    if tuple(platforms) == ("cpu",) and devices_left(ctx.module_context.axis_context) == 1:
        return [x]
    return mlir.lower_fun(lambda x: jnp.ones_like(x), multiple_results=False)(ctx, x)


mlir.register_lowering(_if_cheap_p, _lower_if_cheap)


def if_cheap(found: jax.Array) -> jax.Array:
    """A scalar bool that says whether to look closer; always True where asking costs more.

    That is where all devices would have to be asked, and on all but CPUs. What `jax.vmap` maps gets
    one answer together.
    """
    return _if_cheap_p.bind(found)


def by_case(
    look: Callable[[Sequence[jax.Array]], jax.Array], arrays: Sequence[jax.Array]
) -> jax.Array:
    """``look(arrays)``, flags of what is bad; a CPU looks only where a sum of squares is.

    The sum is not finite either where large numbers make it overflow, and looking then finds
    nothing. It takes a third of the time.
    """

    def ask(*arrays):
        wide = [jnp.ravel(x).astype(accumulator_dtype(x.dtype)) for x in arrays]
        # A default of the user's for products may be one that no CPU has.
        squares = [jnp.vdot(x, x, precision=jax.lax.Precision.HIGHEST) for x in wide]
        seems_bad = if_cheap(~jnp.isfinite(sum(squares)))
        # Of the type that the flags have, over whatever mesh axes they vary.
        nothing = lambda arrays: look(arrays) & False
        return jax.lax.cond(seems_bad, look, nothing, arrays)

    arrays = jax.lax.stop_gradient(arrays)
    return jax.lax.platform_dependent(*arrays, cpu=ask, default=lambda *arrays: look(arrays))
