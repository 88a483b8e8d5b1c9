"""Rows of any width: norms, activations and residuals by kernels, products between them by XLA.

Over a mesh every device runs the kernels on its own tokens.

What is not finite is looked for where a norm is written, and put into a sum where that is made, so
that neither takes a pass of its own (`ops/containment.py`).

Shape suffixes: B batch, T tokens, D channels, F channels between the products of a SwiGLU.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deltaproduct_jax.ops.blocks.dispatch import by_kernel_or_plain, flat, may_launch
from deltaproduct_jax.ops.blocks.plain import (
    HIDDEN_POINT,
    MIDDLE,
    NORM_POINT,
    activated,
    matrix_back,
    norm_and_square,
    norm_back,
)
from deltaproduct_jax.ops.debug import nan_if
from deltaproduct_jax.ops.kernels.triton import row_passes as of_triton
from deltaproduct_jax.ops.parts import OnTokens, placement
from deltaproduct_jax.ops.varying import mark_all_varying


def takes(x: jax.Array, F: int = 0) -> bool:
    """Whether the kernels take tokens [B, T, D] and an MLP's width, on devices with whole rows."""
    return (
        may_launch(x)
        and of_triton.unsupported(dtype=x.dtype, D=max(x.shape[-1], F)) is None
        and (placement() is None or _on_tokens(x, F) is not None)
    )


def _on_tokens(x: jax.Array, F: int = 0) -> OnTokens | None:
    """What runs a kernel on each device's tokens of a mesh, if there is one.

    To be asked on the way forward: the way back is traced where nothing is placed any more.
    """
    spread = placement()
    return None if spread is None else spread.own_tokens(*x.shape[:2], F)


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
    """`rows.norm_product`: the norms by a kernel."""
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
    return do, dscale.astype(scale.dtype), matrix_back(y.reshape(*y.shape[:2], -1), dout)


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
    """`rows.residual_swiglu`: norm and activation by a kernel each way."""
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
    return dz, dz, None, dscale, matrix_back(y, dhidden), matrix_back(h, dout)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


@functools.cache
def _norm_alone(eps: float) -> Callable:
    """(x, scale) -> the norm, mean squares."""

    def by_kernel(x, scale):
        _, y, mean_square, _ = of_triton.norm_forward(flat(x), scale, eps=eps)
        return y.reshape(x.shape), mean_square.reshape(*x.shape[:-1], 1)

    plain = lambda x, scale: norm_and_square(x, scale, eps, x.dtype)
    return by_kernel_or_plain(by_kernel, plain, ("BTHD", "D"), ("BTHD", "BTH1"))


@functools.cache
def _norm_looking(eps: float) -> Callable:
    """(x, scale) -> the norm with 0 for what is not finite, mean squares, tokens with any of it."""

    def by_kernel(x, scale):
        _, y, mean_square, bad = of_triton.norm_forward(flat(x), scale, eps=eps, looks=True)
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
        how = {"eps": eps, "more": flat(more), "reached": reached.reshape(-1)}
        z, y, mean_square, _ = of_triton.norm_forward(flat(x), scale, **how)
        return z.reshape(x.shape), y.reshape(x.shape), mean_square.reshape(*x.shape[:-1], 1)

    def plain(x, more, reached, scale):
        z = x + nan_if(reached[..., None], more)
        return z, *norm_and_square(z, scale, eps, x.dtype)

    layouts = ("BTD", "BTD", "BT", "D")
    return by_kernel_or_plain(by_kernel, plain, layouts, ("BTD", "BTD", "BT1"))


def _back_by_kernel(eps, again, x, mean_square, scale, dy, dx_after=None, reached=None):
    arrays = flat(x), mean_square.reshape(-1), scale, flat(dy)
    dx_after = None if dx_after is None else flat(dx_after)
    reached = None if reached is None else reached.reshape(-1)
    how = {"eps": eps, "again": again}
    dx, dscale, y = of_triton.norm_back(*arrays, dx_after, reached, **how)
    return (dx.reshape(x.shape), dscale, *((y.reshape(x.shape),) if again else ()))


def _back(eps, again, layouts, out_layouts):
    of_both = (functools.partial(f, eps, again) for f in (_back_by_kernel, norm_back))
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
        arrays = hidden.reshape(*_sizes(hidden)), flat(dh)
        dhidden, h = of_triton.swiglu_back(*arrays, again=again)
        return dhidden.reshape(hidden.shape), h.reshape(dh.shape) if again else None

    def plain(hidden, dh):
        h, pull = jax.vjp(activated, hidden)
        return pull(dh)[0], h if again else None

    return by_kernel_or_plain(by_kernel, plain, ("BT2F", "BTF"), ("BT2F", "BTF"))
