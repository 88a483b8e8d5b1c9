"""What stands where an implementation has no code for a platform: an error when it is lowered.

Tracing does not know the platform, and one program may be lowered for several.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
from jax.interpreters import batching, mlir

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
