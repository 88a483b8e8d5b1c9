"""Linear maps whose transpose is another than JAX would derive.

`linear` maps arrays onto themselves, and both ways are written out. What spoils outputs on the way
forward has to spoil gradients on the way back, by another rule than JAX would derive:
`jax.custom_derivatives.linear_call` says so, but cannot be mapped by `jax.vmap`.

`spread` and `scaled` keep what XLA for CPUs of jaxlib 0.10 gets wrong out of gradients that are
mapped.
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.extend.core
import jax.numpy as jnp
from jax.interpreters import ad, batching, mlir

from deltaproduct_jax.ops.precision import L2NORM_EPSILON

_linear_p = jax.extend.core.Primitive("delta_product_linear")
_linear_p.multiple_results = True


def linear(run: Callable, transposed: Callable, fixed: Any, arrays: Any) -> Any:
    """``run(fixed, arrays)``, linear in ``arrays``; its transpose is ``transposed``.

    Args:
      run, transposed: functions without closures, as they are compared by identity. Both return
        what ``arrays`` is: the same tree of the same shapes and dtypes.
      fixed: a tree of integers and booleans.
      arrays: a tree of floating-point arrays.
    """
    fixed, fixed_tree = jax.tree.flatten(fixed)
    arrays, tree = jax.tree.flatten(arrays)
    trees = (fixed_tree, tree)
    out = _linear_p.bind(*fixed, *arrays, run=run, transposed=transposed, trees=trees, mapped=0)
    return jax.tree.unflatten(tree, out)


def _evaluate(*operands, run, transposed, trees, mapped):
    del transposed
    fixed_tree, tree = trees

    def flat(*operands):
        number = fixed_tree.num_leaves
        fixed = jax.tree.unflatten(fixed_tree, operands[:number])
        return jax.tree.leaves(run(fixed, jax.tree.unflatten(tree, operands[number:])))

    for _ in range(mapped):
        flat = jax.vmap(flat)
    return flat(*operands)


def _jvp(primals, tangents, *, trees, **parameters):
    number = trees[0].num_leaves
    pushed = (
        ad.instantiate_zeros(tangent) if index >= number else None
        for index, tangent in enumerate(tangents)
    )
    pushed = [x for x in pushed if x is not None]
    run = lambda arrays: _linear_p.bind(*primals[:number], *arrays, trees=trees, **parameters)
    return run(primals[number:]), run(pushed)


def _transpose(cotangents, *operands, run, transposed, trees, mapped):
    number = trees[0].num_leaves
    cotangents = map(ad.instantiate_zeros, cotangents)
    pulled = _linear_p.bind(
        *operands[:number], *cotangents, run=transposed, transposed=run, trees=trees, mapped=mapped
    )
    unknown = map(ad.is_undefined_primal, operands[number:])
    pulled = [x if of_interest else None for x, of_interest in zip(pulled, unknown, strict=True)]
    return [None] * number + pulled


def _batch(operands, axes, *, mapped, **parameters):
    size = next(x.shape[a] for x, a in zip(operands, axes, strict=True) if a is not None)
    operands = (batching.bdim_at_front(x, a, size) for x, a in zip(operands, axes, strict=True))
    out = _linear_p.bind(*operands, mapped=mapped + 1, **parameters)
    return out, [0] * len(out)


_linear_p.def_impl(_evaluate)
_linear_p.def_abstract_eval(lambda *operands, trees, **_: list(operands[trees[0].num_leaves :]))
ad.primitive_jvps[_linear_p] = _jvp
ad.primitive_transposes[_linear_p] = _transpose
batching.primitive_batchers[_linear_p] = _batch
mlir.register_lowering(_linear_p, mlir.lower_fun(_evaluate, multiple_results=True))


@functools.partial(jax.custom_jvp, nondiff_argnums=(1, 2))
def spread(x: jax.Array, axis: int, size: int) -> jax.Array:
    """``x`` with a new axis, along which all is the same; its transpose is a product with ones.

    JAX would sum over the axis, and on a CPU XLA of jaxlib 0.10.2 fuses such a sum with the product
    before it: at rank 7, as under `jax.vmap`, and in front of the last axis, that writes beside
    its buffers. tests/ops/test_mapped.py has the smallest such program.

    Args:
      x: any shape.
      axis: of the result, the new one.
      size: along it.
    """
    x = jnp.expand_dims(x, axis)
    axis %= x.ndim
    return jnp.broadcast_to(x, (*x.shape[:axis], size, *x.shape[axis + 1 :]))


@spread.defjvp
def _spread_jvp(axis, size, primals, tangents):
    (x,), (tangent,) = primals, tangents
    ones = jnp.ones(size, tangent.dtype)
    outer = jnp.einsum("...,s->...s", tangent, ones, precision=jax.lax.Precision.HIGHEST)
    return spread(x, axis, size), jnp.moveaxis(outer, -1, axis)


@jax.custom_jvp
def scaled(x: jax.Array, factor: jax.Array) -> jax.Array:
    """``x`` [..., K] times ``factor`` [...]; the cotangent of that is a product of matrices.

    JAX would sum ``x`` times the cotangent over K. Where only the latter is mapped, as in
    `jax.jacrev`, and the sum goes into another product, XLA for CPUs of jaxlib 0.10.2 adds up other
    numbers once there are some thousands of rows. tests/ops/test_mapped.py has the smallest such
    program.
    """
    return x * factor[..., None]


@scaled.defjvp
def _scaled_jvp(primals, tangents):
    (x, factor), (dx, dfactor) = primals, tangents
    of_factor = jnp.einsum("...k,...->...k", x, dfactor, precision=jax.lax.Precision.HIGHEST)
    return scaled(x, factor), dx * factor[..., None] + of_factor


def inner(x: jax.Array, y: jax.Array) -> jax.Array:
    """Sums over the last axis of ``x y`` [..., K], as a product of matrices: see `scaled`."""
    return jnp.einsum("...k,...k->...", x, y, precision=jax.lax.Precision.HIGHEST)


def unit_vectors(x: jax.Array, epsilon: float = L2NORM_EPSILON) -> jax.Array:
    """``x / sqrt(sum(x**2) + epsilon)`` along the last axis, in its own dtype."""
    return scaled(x, jax.lax.rsqrt(jnp.sum(x * x, axis=-1) + epsilon))
