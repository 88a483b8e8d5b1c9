"""Parts of a model of few channels, whose products are bound by memory as all else is.

What `rows` has and more, in kernels that hold a whole row: products, with what stands in front of
them and behind. What they would keep is wider than what it is made of, so they make it again on the
way back. By kernels on a GPU and plainly elsewhere, never over a mesh; there is no forward mode.

Shape suffixes: B batch, T tokens, D channels, F channels between the products of a SwiGLU.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deltaproduct_jax.ops import kernels
from deltaproduct_jax.ops.blocks import logits as of_logits
from deltaproduct_jax.ops.blocks import rows
from deltaproduct_jax.ops.blocks.rows import by_kernel_or_plain
from deltaproduct_jax.ops.kernels.triton.short import passes as of_triton
from deltaproduct_jax.ops.parts import explicit_names, placement
from deltaproduct_jax.ops.varying import mark_all_varying


def takes(x: jax.Array, width: int = 1, *sources: jax.Array) -> bool:
    """Whether the kernels take tokens [B, T, D], beside values of a head or ids of so many.

    Of an ``x`` that is yet to be made only shape and dtype are known; ``sources`` are what it is
    made of, and tell whether it will lie over explicit axes.
    """
    return (
        kernels.is_installed("triton")
        and kernels.load("triton").is_ready()
        and all(isinstance(size, int) and size > 0 for size in x.shape)
        and of_triton.unsupported(dtype=x.dtype, D=x.shape[-1], V=width) is None
        and placement() is None
        and not any(any(explicit_names(a)) for a in (x, *sources))
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
    """`rows.residual_swiglu` of tokens that `takes` says yes to, ``first`` [D, 2 F]."""
    return _swiglu(eps, *mark_all_varying((x, more, reached, scale, first, down)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(eps, *arrays):
    return _swiglu_forward(eps, *arrays)[0]


def _swiglu_forward(eps, *arrays):
    z, mean_square, out = _mlp(eps)(None, *arrays)
    kept = checkpoint_name(z, rows.MIDDLE), checkpoint_name(mean_square, rows.NORM_POINT)
    return out, (*kept, *arrays[2:])


def _swiglu_backward(eps, residuals, dout):
    scale = residuals[3]
    dz, dscale, y, h, dhidden = _mlp_back(eps)(None, *residuals, dout)
    dkernels = rows.of_tokens(y, dhidden), rows.of_tokens(h, dout)
    return dz, dz, None, dscale.astype(scale.dtype), *dkernels


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@functools.cache
def _mlp(eps: float) -> Callable:
    """(x, more, reached, scale, first, down) -> the sum, mean squares, the output."""

    def by_kernel(x, more, reached, *weights):
        arrays = _flat(x), _flat(more), reached.reshape(-1), *weights
        z, mean_square, out = of_triton.mlp(*arrays, eps=eps)
        return z.reshape(x.shape), mean_square.reshape(*x.shape[:-1], 1), out.reshape(x.shape)

    def plain(x, more, reached, scale, first, down):
        z = x + jnp.where(reached[..., None], jnp.nan, more)
        y, mean_square = rows.norm_and_square(z, scale, eps, x.dtype)
        return z, mean_square, z + rows.activated(jnp.tensordot(y, first, 1)) @ down

    return by_kernel_or_plain(by_kernel, plain, (), ())


@functools.cache
def _mlp_back(eps: float) -> Callable:
    """(the sum, mean squares, reached, scale, first, down, dout) -> as `of_triton.mlp_back`."""

    def by_kernel(z, mean_square, reached, *weights):
        *weights, dout = weights
        arrays = _flat(z), mean_square.reshape(-1), reached.reshape(-1), *weights, _flat(dout)
        dz, dscale, *others = of_triton.mlp_back(*arrays, eps=eps)
        in_rows = lambda x: x.reshape(*z.shape[:-1], -1)
        return in_rows(dz), dscale, *map(in_rows, others)

    def plain(z, mean_square, reached, scale, first, down, dout):
        y = rows.normed(z, mean_square, scale, eps, z.dtype)
        h, pull = jax.vjp(rows.activated, jnp.tensordot(y, first, 1))
        [dhidden] = pull(dout @ down.T)
        arrays = z, mean_square, scale, dhidden @ first.T, dout, reached
        dz, dscale = rows.back_plain(eps, False, *arrays)
        return dz, dscale, y, h, dhidden

    return by_kernel_or_plain(by_kernel, plain, (), ())


def norm_product(o: jax.Array, scale: jax.Array, kernel: jax.Array, eps: float) -> jax.Array:
    """`rows.norm_product` with a product of few channels."""
    return _norm_product(eps, *mark_all_varying((o, scale, kernel)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_product(eps, *arrays):
    return _output(eps)(None, *arrays)[0]


def _norm_product_forward(eps, *arrays):
    return _norm_product(eps, *arrays), arrays


def _norm_product_backward(eps, residuals, dout):
    scale = residuals[1]
    do, dscale, y = _output_back(eps)(None, *residuals, dout)
    dkernel = rows.of_tokens(y.reshape(*y.shape[:2], -1), dout)
    return do, dscale.astype(scale.dtype), dkernel


_norm_product.defvjp(_norm_product_forward, _norm_product_backward)


@functools.cache
def _output(eps: float) -> Callable:
    """(o, scale, kernel) -> the product of norms."""

    def by_kernel(o, scale, kernel):
        out = of_triton.output(o.reshape(-1, *o.shape[2:]), scale, kernel, eps=eps)
        return (out.reshape(*o.shape[:2], -1),)

    def plain(o, scale, kernel):
        y = rows.norm(o, scale, eps, o.dtype)
        return (y.reshape(*y.shape[:2], -1) @ kernel,)

    return by_kernel_or_plain(by_kernel, plain, (), ())


@functools.cache
def _output_back(eps: float) -> Callable:
    """(o, scale, kernel, dout) -> do, dscale, the norms."""

    def by_kernel(o, scale, kernel, dout):
        flat = o.reshape(-1, *o.shape[2:])
        do, dscale, y = of_triton.output_back(flat, scale, kernel, _flat(dout), eps=eps)
        return do.reshape(o.shape), dscale, y.reshape(o.shape)

    def plain(o, scale, kernel, dout):
        y, mean_square = rows.norm_and_square(o, scale, eps, o.dtype)
        dy = (dout @ kernel.T).reshape(o.shape)
        return *rows.back_plain(eps, False, o, mean_square, scale, dy), y

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
    return dx, *(rows.of_tokens(a, dy) for a, dy in zip(each, cotangents, strict=True))


_products.defvjp(_products_forward, _products_backward)


def _apart(x, copies):
    """So many, that XLA does not make one product of several and copy what they are of together."""
    return [jax.lax.optimization_barrier((x, jnp.int32(i)))[0] for i in range(copies)]


def _inputs_back_by_kernel(*arrays):
    cotangents, matrices = arrays[:4], arrays[4:]
    dx = of_triton.inputs_back(*map(_flat, cotangents), *matrices)
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
        found = of_triton.head(_flat(x), scale, kernel, *of_tokens, eps=eps)
        return tuple(a.reshape(x.shape[:-1]) for a in found)

    def plain(x, scale, kernel, *of_tokens):
        return of_logits.plain(rows.norm(x, scale, eps, x.dtype) @ kernel, *of_tokens)

    return by_kernel_or_plain(by_kernel, plain, (), ())


@functools.cache
def _head_back(eps: float) -> Callable:
    """Those, log-sums and the cotangents of what `_head` returns -> dx, dscale, dkernel."""

    def by_kernel(x, scale, kernel, *of_tokens):
        of_tokens = [a.reshape(-1) for a in of_tokens]
        dx, *others = of_triton.head_back(_flat(x), scale, kernel, *of_tokens, eps=eps)
        return dx.reshape(x.shape), *others

    def plain(x, scale, kernel, *of_tokens):
        y, mean_square = rows.norm_and_square(x, scale, eps, x.dtype)
        [dlogits] = of_logits.plain_back(y @ kernel, *of_tokens)
        dx, dscale = rows.back_plain(eps, False, x, mean_square, scale, dlogits @ kernel.T)
        return dx, dscale, rows.of_tokens(y, dlogits).astype(jnp.float32)

    return by_kernel_or_plain(by_kernel, plain, (), ())


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])
