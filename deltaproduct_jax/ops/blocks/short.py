"""Rows of few channels, whose products are bound by memory as all else is.

Kernels that hold a whole row make products too, with what stands in front of them and behind. What
they would keep is wider than what it is made of, so they make it again on the way back. They never
run over a mesh.

Shape suffixes: B batch, T tokens, D channels, F channels between the products of a SwiGLU.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deltaproduct_jax.ops import kernels
from deltaproduct_jax.ops.blocks import logits as of_logits
from deltaproduct_jax.ops.blocks import lookup as of_lookup
from deltaproduct_jax.ops.blocks.dispatch import by_kernel_or_plain, flat, may_launch
from deltaproduct_jax.ops.blocks.plain import (
    MIDDLE,
    NORM_POINT,
    activated,
    matrix_back,
    norm,
    norm_and_square,
    norm_back,
    normed,
)
from deltaproduct_jax.ops.debug import nan_if
from deltaproduct_jax.ops.kernels.triton.short import passes as of_triton
from deltaproduct_jax.ops.linear import linear
from deltaproduct_jax.ops.parts import placement
from deltaproduct_jax.ops.varying import mark_all_varying


def takes(x: jax.Array, width: int = 1, *sources: jax.Array) -> bool:
    """Whether the kernels take tokens [B, T, D], beside values of a head or ids of so many.

    ``sources`` are what an ``x`` that is yet to be made is made of, as `may_launch` has them.
    """
    return (
        may_launch(x, *sources)
        and x.size > 0
        and kernels.load("triton").is_ready()
        and of_triton.unsupported(dtype=x.dtype, D=x.shape[-1], V=width) is None
        and placement() is None
    )


def residual_swiglu(
    x: jax.Array,
    more: jax.Array,
    reached: jax.Array,
    scale: jax.Array,
    first: jax.Array,
    down: jax.Array,
    eps: float,
) -> jax.Array:
    """`rows.residual_swiglu`, ``first`` [D, 2 F]: one kernel each way."""
    return _swiglu(eps, *mark_all_varying((x, more, reached, scale, first, down)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(eps, *arrays):
    return _swiglu_forward(eps, *arrays)[0]


def _swiglu_forward(eps, *arrays):
    z, mean_square, out = _mlp(eps)(None, *arrays)
    kept = checkpoint_name(z, MIDDLE), checkpoint_name(mean_square, NORM_POINT)
    return out, (*kept, *arrays[2:])


def _swiglu_backward(eps, residuals, dout):
    scale = residuals[3]
    dz, dscale, y, h, dhidden = _mlp_back(eps)(None, *residuals, dout)
    dkernels = matrix_back(y, dhidden), matrix_back(h, dout)
    return dz, dz, None, dscale.astype(scale.dtype), *dkernels


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@functools.cache
def _mlp(eps: float) -> Callable:
    """(x, more, reached, scale, first, down) -> the sum, mean squares, the output."""

    def by_kernel(x, more, reached, *weights):
        arrays = flat(x), flat(more), reached.reshape(-1), *weights
        z, mean_square, out = of_triton.mlp(*arrays, eps=eps)
        return z.reshape(x.shape), mean_square.reshape(*x.shape[:-1], 1), out.reshape(x.shape)

    def plain(x, more, reached, scale, first, down):
        z = x + nan_if(reached[..., None], more)
        y, mean_square = norm_and_square(z, scale, eps, x.dtype)
        return z, mean_square, z + activated(jnp.tensordot(y, first, 1)) @ down

    return by_kernel_or_plain(by_kernel, plain, (), ())


@functools.cache
def _mlp_back(eps: float) -> Callable:
    """(the sum, mean squares, reached, scale, first, down, dout) -> as `of_triton.mlp_back`."""

    def by_kernel(z, mean_square, reached, *weights):
        *weights, dout = weights
        arrays = flat(z), mean_square.reshape(-1), reached.reshape(-1), *weights, flat(dout)
        dz, dscale, *others = of_triton.mlp_back(*arrays, eps=eps)
        in_rows = lambda x: x.reshape(*z.shape[:-1], -1)
        return in_rows(dz), dscale, *map(in_rows, others)

    def plain(z, mean_square, reached, scale, first, down, dout):
        y = normed(z, mean_square, scale, eps, z.dtype)
        h, pull = jax.vjp(activated, jnp.tensordot(y, first, 1))
        [dhidden] = pull(dout @ down.T)
        arrays = z, mean_square, scale, dhidden @ first.T, dout, reached
        dz, dscale = norm_back(eps, False, *arrays)
        return dz, dscale, y, h, dhidden

    return by_kernel_or_plain(by_kernel, plain, (), ())


def norm_product(o: jax.Array, scale: jax.Array, kernel: jax.Array, eps: float) -> jax.Array:
    """`rows.norm_product`: one kernel each way."""
    return _norm_product(eps, *mark_all_varying((o, scale, kernel)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_product(eps, *arrays):
    return _output(eps)(None, *arrays)[0]


def _norm_product_forward(eps, *arrays):
    return _norm_product(eps, *arrays), arrays


def _norm_product_backward(eps, residuals, dout):
    scale = residuals[1]
    do, dscale, y = _output_back(eps)(None, *residuals, dout)
    dkernel = matrix_back(y.reshape(*y.shape[:2], -1), dout)
    return do, dscale.astype(scale.dtype), dkernel


_norm_product.defvjp(_norm_product_forward, _norm_product_backward)


@functools.cache
def _output(eps: float) -> Callable:
    """(o, scale, kernel) -> the product of norms."""

    def by_kernel(o, scale, kernel):
        out = of_triton.output(o.reshape(-1, *o.shape[2:]), scale, kernel, eps=eps)
        return (out.reshape(*o.shape[:2], -1),)

    def plain(o, scale, kernel):
        y = norm(o, scale, eps, o.dtype)
        return (y.reshape(*y.shape[:2], -1) @ kernel,)

    return by_kernel_or_plain(by_kernel, plain, (), ())


@functools.cache
def _output_back(eps: float) -> Callable:
    """(o, scale, kernel, dout) -> do, dscale, the norms."""

    def by_kernel(o, scale, kernel, dout):
        heads = o.reshape(-1, *o.shape[2:])
        do, dscale, y = of_triton.output_back(heads, scale, kernel, flat(dout), eps=eps)
        return do.reshape(o.shape), dscale, y.reshape(o.shape)

    def plain(o, scale, kernel, dout):
        y, mean_square = norm_and_square(o, scale, eps, o.dtype)
        dy = (dout @ kernel.T).reshape(o.shape)
        return *norm_back(eps, False, o, mean_square, scale, dy), y

    return by_kernel_or_plain(by_kernel, plain, (), ())


def products(x: jax.Array, matrices: Sequence[jax.Array]) -> list[jax.Array]:
    """Products of tokens [B, T, D] with four matrices [D, ...], read once on the way back."""
    return list(_products(*mark_all_varying((x, *matrices))))


@jax.custom_vjp
def _products(x, *matrices):
    return _products_forward(x, *matrices)[0]


def _products_forward(x, *matrices):
    each = _apart(x, len(matrices))
    return tuple(a @ w for a, w in zip(each, matrices, strict=True)), (x, *matrices)


def _products_backward(residuals, cotangents):
    x, *matrices = residuals
    dx = _inputs_back(None, *cotangents, *matrices)[0]
    each = _apart(x, len(matrices))
    return dx, *(matrix_back(a, dy) for a, dy in zip(each, cotangents, strict=True))


_products.defvjp(_products_forward, _products_backward)


def _apart(x, copies):
    """So many, that XLA does not make one product of several and copy what they are of together."""
    return [jax.lax.optimization_barrier((x, jnp.int32(i)))[0] for i in range(copies)]


def _inputs_back_by_kernel(*arrays):
    cotangents, matrices = arrays[:4], arrays[4:]
    dx = of_triton.inputs_back(*map(flat, cotangents), *matrices)
    return (dx.reshape(*cotangents[0].shape[:-1], -1),)


def _inputs_back_plain(*arrays):
    return (sum(dy @ w.T for dy, w in zip(arrays[:4], arrays[4:], strict=True)),)


_inputs_back = by_kernel_or_plain(_inputs_back_by_kernel, _inputs_back_plain, (), ())


def head_sums(
    x: jax.Array,
    scale: jax.Array,
    kernel: jax.Array,
    targets: jax.Array,
    mask: jax.Array,
    eps: float,
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """`logits.sums` of the logits that a norm and a matrix make of tokens; none are written.

    Args:
      x: [B, T, D].
      scale: of the norm, [D].
      kernel: [D, V], in the dtype of ``x``.
      targets: ids [B, T].
      mask: [B, T] bool.
      eps: added to the mean square.
    """
    return _head_sums(eps, *mark_all_varying((x, scale, kernel, targets, mask)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _head_sums(eps, *arrays):
    return _head(eps)(None, *arrays)


def _head_sums_forward(eps, *arrays):
    found = _head_sums(eps, *arrays)
    return found, (*arrays, found[0])


def _head_sums_backward(eps, residuals, cotangents):
    dlog_sum, dof_target, _ = cotangents
    found = _head_back(eps)(None, *residuals, dlog_sum, dof_target)
    return *(dx.astype(x.dtype) for dx, x in zip(found, residuals, strict=False)), None, None


_head_sums.defvjp(_head_sums_forward, _head_sums_backward)


@functools.cache
def _head(eps: float) -> Callable:
    """(x, scale, kernel, targets, mask) -> log-sums, logits of targets, correct answers."""

    def by_kernel(x, scale, kernel, *of_tokens):
        of_tokens = [a.reshape(-1) for a in of_tokens]
        found = of_triton.head(flat(x), scale, kernel, *of_tokens, eps=eps)
        return tuple(a.reshape(x.shape[:-1]) for a in found)

    def plain(x, scale, kernel, *of_tokens):
        return of_logits.plain(norm(x, scale, eps, x.dtype) @ kernel, *of_tokens)

    return by_kernel_or_plain(by_kernel, plain, (), ())


@functools.cache
def _head_back(eps: float) -> Callable:
    """Those, log-sums and the cotangents of what `_head` returns -> dx, dscale, dkernel."""

    def by_kernel(x, scale, kernel, *of_tokens):
        of_tokens = [a.reshape(-1) for a in of_tokens]
        dx, *others = of_triton.head_back(flat(x), scale, kernel, *of_tokens, eps=eps)
        return dx.reshape(x.shape), *others

    def plain(x, scale, kernel, *of_tokens):
        y, mean_square = norm_and_square(x, scale, eps, x.dtype)
        [dlogits] = of_logits.plain_back(y @ kernel, *of_tokens)
        dx, dscale = norm_back(eps, False, x, mean_square, scale, dlogits @ kernel.T)
        return dx, dscale, matrix_back(y, dlogits).astype(jnp.float32)

    return by_kernel_or_plain(by_kernel, plain, (), ())


@jax.custom_jvp
def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """`lookup.plain`, whose gradient a kernel makes."""
    return of_lookup.plain(table, ids)


@lookup.defjvp
def _lookup_jvp(primals, tangents):
    table, ids = primals
    nothing = jnp.zeros((*ids.shape, table.shape[1]), table.dtype)
    # What is linear gives arrays of the types that it takes.
    ids, *arrays = mark_all_varying((ids, tangents[0], nothing))
    return lookup(table, ids), linear(_read, _read_back, ids, tuple(arrays))[1]


def _read(ids, arrays):
    return jnp.zeros_like(arrays[0]), of_lookup.taken(arrays[0], ids)


def _read_back(ids, cotangents):
    dtable, drows = cotangents
    [summed] = _summed(len(dtable))(None, ids, drows)
    return summed, jnp.zeros_like(drows)


@functools.cache
def _summed(rows: int) -> Callable:
    """(ids, cotangents of the rows that they name) -> that of the table."""

    def by_kernel(ids, drows):
        drows = flat(drows)
        return (of_triton.lookup_back(ids.reshape(-1), drows, rows).astype(drows.dtype),)

    plain = lambda ids, drows: of_lookup.plain_back(ids, drows, rows)
    return by_kernel_or_plain(by_kernel, plain, (), ())
