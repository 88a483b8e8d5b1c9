"""Parts of a block that are bound by memory, both ways of which read everything once.

A norm of rows whose input goes on beside it, one in front of a product, and a whole residual
SwiGLU. What is not products runs by a kernel on a GPU and plainly elsewhere; the way back is a
custom one. Over a mesh every device runs the kernel on its own tokens. There is no forward mode.

What is not finite is looked for where a norm is written, and put into a sum where that is made, so
that neither takes a pass of its own (`ops/containment.py`).

Shape suffixes: B batch, T tokens, D channels, F channels between the products of a SwiGLU.
"""

import functools
import math
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deltaproduct_jax.ops import kernels
from deltaproduct_jax.ops.kernels.triton import row_passes as of_triton
from deltaproduct_jax.ops.linear import inner, scaled
from deltaproduct_jax.ops.parts import OnTokens, explicit_names, placement
from deltaproduct_jax.ops.precision import accumulator_dtype
from deltaproduct_jax.ops.varying import mark_all_varying

# Names for policies of `jax.checkpoint`: mean squares of rows, what stands between mixer and MLP,
# and both widened products.
NORM_POINT, MIDDLE, HIDDEN_POINT = "norm_of_rows", "block_middle", "mlp_hidden"


def may_run(x: jax.Array, F: int = 0) -> bool:
    """Whether the kernels take tokens [B, T, D] and an MLP's width, on devices with whole rows."""
    sizes = {"dtype": x.dtype, "D": max(x.shape[-1], F)}
    return (
        kernels.is_installed("triton")
        and all(isinstance(size, int) for size in x.shape)
        and of_triton.unsupported(**sizes) is None
        and (placement() is None or _on_tokens(x, F) is not None)
        and not any(explicit_names(x))
    )


def _on_tokens(x: jax.Array, F: int = 0) -> OnTokens | None:
    """What runs a kernel on each device's tokens of a mesh, if there is one.

    To be asked on the way forward: the way back is traced where nothing is placed any more.
    """
    spread = placement()
    return None if spread is None else spread.own_tokens(*x.shape[:2], F)


def norm(x: jax.Array, scale: jax.Array, eps: float, dtype: jnp.dtype) -> jax.Array:
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, rounded once."""
    return norm_and_square(x, scale, eps, dtype)[0]


def norm_and_square(x, scale, eps, dtype):
    """`norm`, and the mean square of every row."""
    wide = accumulator_dtype(dtype)
    x = x.astype(wide)
    # Kept for the way back, a number a row saves it a pass over the array.
    mean_square = checkpoint_name(jnp.mean(x * x, axis=-1, keepdims=True), NORM_POINT)
    return normed(x, mean_square, scale, eps, dtype), mean_square


def normed(x, mean_square, scale, eps, dtype):
    """`norm` of which mean squares are known."""
    wide = accumulator_dtype(dtype)
    scale = scale.astype(wide).reshape((1,) * (x.ndim - 1) + (-1,))
    return (scaled(x.astype(wide), jax.lax.rsqrt(mean_square + eps)[..., 0]) * scale).astype(dtype)


def forked_norm(x: jax.Array, scale: jax.Array, eps: float) -> tuple[jax.Array, ...]:
    """``x`` itself, to go on with, and its norm: both cotangents are read in one pass.

    Args:
      x: [B, T, D].
      scale: [D].
      eps: added to the mean square.

    Returns:
      ``x``, the norm with 0 for what is not finite, and tokens where anything was not, [B, T] bool.
    """
    return _forked(eps, _on_tokens(x), *mark_all_varying((x, scale)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _forked(eps, on_tokens, x, scale):
    return _forked_forward(eps, on_tokens, x, scale)[0]


def _forked_forward(eps, on_tokens, x, scale):
    y, mean_square, bad = _norm_looking(eps)(on_tokens, x, scale)
    return (x, y, bad), (x, checkpoint_name(mean_square, NORM_POINT), scale)


def _forked_backward(eps, on_tokens, residuals, cotangents):
    dx_after, dy, _ = cotangents
    dx, dscale = _norm_back(eps)(on_tokens, *residuals, dy, dx_after)
    return dx, dscale.astype(residuals[2].dtype)


_forked.defvjp(_forked_forward, _forked_backward)


def norm_product(o: jax.Array, scale: jax.Array, kernel: jax.Array, eps: float) -> jax.Array:
    """The product of norms of heads with a matrix, on devices that have whole arrays.

    Args:
      o: [B, T, H, V].
      scale: [V].
      kernel: [H V, D], in the dtype of ``o``.
      eps: added to the mean square.
    """
    return _norm_product(eps, *mark_all_varying((o, scale, kernel)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _norm_product(eps, o, scale, kernel):
    return _norm_product_forward(eps, o, scale, kernel)[0]


def _norm_product_forward(eps, o, scale, kernel):
    y, mean_square = _norm_alone(eps)(None, o, scale)
    mean_square = checkpoint_name(mean_square, NORM_POINT)
    return y.reshape(*y.shape[:2], -1) @ kernel, (o, mean_square, scale, kernel)


def _norm_product_backward(eps, residuals, dout):
    o, mean_square, scale, kernel = residuals
    dy = (dout @ kernel.T).reshape(o.shape)
    do, dscale, y = _norm_back_again(eps)(None, o, mean_square, scale, dy)
    return do, dscale.astype(scale.dtype), of_tokens(y.reshape(*y.shape[:2], -1), dout)


_norm_product.defvjp(_norm_product_forward, _norm_product_backward)


def residual_swiglu(
    x: jax.Array,
    more: jax.Array,
    reached: jax.Array,
    scale: jax.Array,
    first: jax.Array,
    down: jax.Array,
    eps: float,
    keeps: bool = False,
) -> jax.Array:
    """``z + (silu(y gate) * (y up)) down``, with y the norm of ``z = x + more``.

    Args:
      x: [B, T, D].
      more: the same.
      reached: tokens whose ``more`` is NaN, whatever it is, and so are their cotangents that are
        not 0, [B, T] bool.
      scale: of the norm, [D].
      first: gate and up, in the dtype of ``x``: [D, 2 F], or where a mesh cuts F [D, 2, F].
      down: [F, D], in that dtype too.
      eps: added to the mean square.
      keeps: keep what SwiGLU makes, instead of making it again on the way back.
    """
    on_tokens = _on_tokens(x, down.shape[0])
    arrays = mark_all_varying((x, more, reached, scale, first, down))
    return _swiglu((eps, keeps), on_tokens, *arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _swiglu(how, on_tokens, x, more, reached, scale, first, down):
    return _swiglu_forward(how, on_tokens, x, more, reached, scale, first, down)[0]


def _swiglu_forward(how, on_tokens, x, more, reached, scale, first, down):
    eps, keeps = how
    z, y, mean_square = _norm_of_sum(eps)(on_tokens, x, more, reached, scale)
    z, mean_square = checkpoint_name(z, MIDDLE), checkpoint_name(mean_square, NORM_POINT)
    hidden = checkpoint_name(jnp.tensordot(y, first, 1), HIDDEN_POINT)
    h = _activated(on_tokens, hidden)
    out, kept = z + h @ down, h if keeps else None
    return out, (z, mean_square, reached, scale, hidden, kept, first, down)


def _swiglu_backward(how, on_tokens, residuals, dout):
    eps, _ = how
    z, mean_square, reached, scale, hidden, kept, first, down = residuals
    dhidden, h = _activated_back(kept is None)(on_tokens, hidden, dout @ down.T)
    h = h if kept is None else kept
    wide = [*range(2, hidden.ndim)], [*range(1, first.ndim)]
    dy = jnp.tensordot(dhidden, first, wide)
    back = _norm_back_of_sum(eps)
    dz, dscale, y = back(on_tokens, z, mean_square, scale, dy, dout, reached)
    dscale = dscale.astype(scale.dtype)
    return dz, dz, None, dscale, of_tokens(y, dhidden), of_tokens(h, dout)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)
of_tokens = functools.partial(jnp.tensordot, axes=((0, 1), (0, 1)))


def by_kernel_or_plain(
    by_kernel: Callable, plain: Callable, layouts: Sequence[str], out_layouts: Sequence[str]
) -> Callable:
    """A kernel on a GPU, plainly elsewhere, where it is mapped and where it is differentiated.

    What comes back takes an `OnTokens` or None first, then arrays of these layouts.
    """

    @jax.custom_batching.custom_vmap
    def of_gpu(*arrays):
        return by_kernel(*arrays)

    @of_gpu.def_vmap
    def _mapped(axis_size, in_batched, *arrays):
        del axis_size
        outs = jax.vmap(plain, [0 if batched else None for batched in in_batched])(*arrays)
        return outs, jax.tree.map(lambda _: True, outs)

    @functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
    def run(on_tokens, *arrays):
        kernel = of_gpu
        if on_tokens is not None:
            kernel = functools.partial(on_tokens, of_gpu, layouts, out_layouts)
        runs = {"cuda": kernel} if kernels.is_installed("triton") else {}
        return jax.lax.platform_dependent(*arrays, **runs, default=plain)

    @run.defjvp
    def _differentiated(on_tokens, primals, tangents):
        return run(on_tokens, *primals), jax.jvp(plain, primals, tangents)[1]

    return run


def _rows(x):
    return x.reshape(-1, x.shape[-1])


@functools.cache
def _norm_alone(eps: float) -> Callable:
    """(x, scale) -> the norm, mean squares."""

    def by_kernel(x, scale):
        _, y, mean_square, _ = of_triton.norm_forward(_rows(x), scale, eps=eps)
        return y.reshape(x.shape), mean_square.reshape(*x.shape[:-1], 1)

    plain = lambda x, scale: norm_and_square(x, scale, eps, x.dtype)
    return by_kernel_or_plain(by_kernel, plain, ("BTHD", "D"), ("BTHD", "BTH1"))


@functools.cache
def _norm_looking(eps: float) -> Callable:
    """(x, scale) -> the norm with 0 for what is not finite, mean squares, tokens with any of it."""

    def by_kernel(x, scale):
        _, y, mean_square, bad = of_triton.norm_forward(_rows(x), scale, eps=eps, looks=True)
        of_tokens = x.shape[:-1]
        return y.reshape(x.shape), mean_square.reshape(*of_tokens, 1), bad.reshape(of_tokens)

    def plain(x, scale):
        y, mean_square = norm_and_square(x, scale, eps, x.dtype)
        finite = jnp.isfinite(y)
        return jnp.where(finite, y, 0), mean_square, ~jnp.all(finite, axis=-1)

    return by_kernel_or_plain(by_kernel, plain, ("BTD", "D"), ("BTD", "BT1", "BT"))


@functools.cache
def _norm_of_sum(eps: float) -> Callable:
    """(x, more, reached, scale) -> their sum, its norm, mean squares."""

    def by_kernel(x, more, reached, scale):
        how = {"eps": eps, "more": _rows(more), "reached": reached.reshape(-1)}
        z, y, mean_square, _ = of_triton.norm_forward(_rows(x), scale, **how)
        return z.reshape(x.shape), y.reshape(x.shape), mean_square.reshape(*x.shape[:-1], 1)

    def plain(x, more, reached, scale):
        z = x + jnp.where(reached[..., None], jnp.nan, more)
        return z, *norm_and_square(z, scale, eps, x.dtype)

    layouts = ("BTD", "BTD", "BT", "D")
    return by_kernel_or_plain(by_kernel, plain, layouts, ("BTD", "BTD", "BT1"))


def _back_by_kernel(eps, again, x, mean_square, scale, dy, dx_after=None, reached=None):
    arrays = _rows(x), mean_square.reshape(-1), scale, _rows(dy)
    dx_after = None if dx_after is None else _rows(dx_after)
    reached = None if reached is None else reached.reshape(-1)
    how = {"eps": eps, "again": again}
    dx, dscale, y = of_triton.norm_back(*arrays, dx_after, reached, **how)
    return (dx.reshape(x.shape), dscale, *((y.reshape(x.shape),) if again else ()))


def back_plain(eps, again, x, mean_square, scale, dy, dx_after=None, reached=None):
    """What `row_passes.norm_back` returns, of arrays of any rank."""
    wide = accumulator_dtype(x.dtype)
    x_wide, dy = x.astype(wide), dy.astype(wide)
    inverse = jax.lax.rsqrt(mean_square + eps)
    unit = x_wide * inverse
    dscale = jnp.sum(dy * unit, axis=tuple(range(x.ndim - 1)))
    dunit = dy * scale.astype(wide).reshape((1,) * (x.ndim - 1) + (-1,))
    along = inner(dunit, unit)[..., None] / x.shape[-1]
    dx = inverse * (dunit - unit * along)
    dx = (dx if dx_after is None else dx_after.astype(wide) + dx).astype(x.dtype)
    if reached is not None:
        dx = jnp.where(reached[..., None] & (dx != 0), jnp.nan, dx)
    return dx, dscale, *((normed(x, mean_square, scale, eps, x.dtype),) if again else ())


def _back(eps, again, layouts, out_layouts):
    of_both = (functools.partial(f, eps, again) for f in (_back_by_kernel, back_plain))
    return by_kernel_or_plain(*of_both, layouts, out_layouts)


@functools.cache
def _norm_back(eps: float) -> Callable:
    """(x, mean squares, scale, dy, dx from elsewhere) -> dx, dscale."""
    return _back(eps, False, ("BTD", "BT1", "D", "BTD", "BTD"), ("BTD", "D"))


@functools.cache
def _norm_back_again(eps: float) -> Callable:
    """(x, mean squares, scale, dy) -> dx, dscale, the norm."""
    return _back(eps, True, ("BTHD", "BTH1", "D", "BTHD"), ("BTHD", "D", "BTHD"))


@functools.cache
def _norm_back_of_sum(eps: float) -> Callable:
    """(z, mean squares, scale, dy, dz from elsewhere, reached) -> dz, dscale, the norm."""
    layouts = ("BTD", "BT1", "D", "BTD", "BTD", "BT")
    return _back(eps, True, layouts, ("BTD", "D", "BTD"))


def _activated_by_kernel(hidden):
    return (of_triton.swiglu(hidden.reshape(*_sizes(hidden))).reshape(*hidden.shape[:2], -1),)


def activated(hidden):
    """silu(gate) * up of both, [B, T, 2 F] or [B, T, 2, F]."""
    gate, up = (x.reshape(*x.shape[:2], -1) for x in jnp.split(hidden, 2, axis=2))
    return jax.nn.silu(gate) * up


def _sizes(hidden):
    """Rows and both halves of what stands in [B, T, 2 F] or [B, T, 2, F]."""
    return hidden.shape[0] * hidden.shape[1], math.prod(hidden.shape[2:])


_run_activated = by_kernel_or_plain(
    _activated_by_kernel, lambda x: (activated(x),), ("BT2F",), ("BTF",)
)
_activated = lambda *arrays: _run_activated(*arrays)[0]


@functools.cache
def _activated_back(again: bool) -> Callable:
    """(hidden, dh) -> dhidden, and if ``again`` what `_activated` makes."""

    def by_kernel(hidden, dh):
        arrays = hidden.reshape(*_sizes(hidden)), _rows(dh)
        dhidden, h = of_triton.swiglu_back(*arrays, again=again)
        return dhidden.reshape(hidden.shape), h.reshape(dh.shape) if again else None

    def plain(hidden, dh):
        h, pull = jax.vjp(activated, hidden)
        return pull(dh)[0], h if again else None

    return by_kernel_or_plain(by_kernel, plain, ("BT2F", "BTF"), ("BT2F", "BTF"))
