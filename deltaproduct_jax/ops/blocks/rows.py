"""Parts of a block that are bound by memory, with a way back that reads everything once.

A norm of rows whose input goes on beside it, and a whole residual SwiGLU. On the way forward they
are what JAX makes of them; the way back is a custom one, by a kernel on a GPU and plainly
elsewhere. There is no forward mode.

Shape suffixes: B batch, T tokens, D channels, F channels between the products of a SwiGLU.
"""

import functools
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deltaproduct_jax.ops import kernels
from deltaproduct_jax.ops.kernels.triton import row_passes as of_triton
from deltaproduct_jax.ops.parts import explicit_names, placement
from deltaproduct_jax.ops.precision import accumulator_dtype
from deltaproduct_jax.ops.varying import mark_all_varying

# Names for policies of `jax.checkpoint`: mean squares of rows, and both widened products.
NORM_POINT, HIDDEN_POINT = "norm_of_rows", "mlp_hidden"


def may_run(x: jax.Array, *widths: int) -> bool:
    """Whether the kernels take rows of these widths, on devices that have them whole."""
    sizes = {"dtype": x.dtype, "D": max(widths)}
    return (
        kernels.is_installed("triton")
        and all(isinstance(size, int) for size in x.shape)
        and of_triton.unsupported(**sizes) is None
        and placement() is None
        and not any(explicit_names(x))
    )


def norm(x: jax.Array, scale: jax.Array, eps: float, dtype: jnp.dtype) -> jax.Array:
    """``x / sqrt(mean(x^2) + eps) * scale`` over the last axis, rounded once."""
    return _norm(x, scale, eps, dtype)[0]


def _norm(x, scale, eps, dtype):
    wide = accumulator_dtype(dtype)
    x = x.astype(wide)
    # Kept for the way back, a number a row saves it a pass over the array.
    mean_square = checkpoint_name(jnp.mean(x * x, axis=-1, keepdims=True), NORM_POINT)
    return _scaled(x, mean_square, scale, eps, dtype), mean_square


def _scaled(x, mean_square, scale, eps, dtype):
    wide = accumulator_dtype(dtype)
    scale = scale.astype(wide).reshape((1,) * (x.ndim - 1) + (-1,))
    return (x.astype(wide) * jax.lax.rsqrt(mean_square + eps) * scale).astype(dtype)


def forked_norm(x: jax.Array, scale: jax.Array, eps: float) -> tuple[jax.Array, jax.Array]:
    """``x`` itself, to go on with, and its norm: both cotangents are read in one pass.

    Args:
      x: [B, T, D].
      scale: [D].
      eps: added to the mean square.
    """
    return _forked(eps, *mark_all_varying((x, scale)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _forked(eps, x, scale):
    return x, _norm(x, scale, eps, x.dtype)[0]


def _forked_forward(eps, x, scale):
    y, mean_square = _norm(x, scale, eps, x.dtype)
    return (x, y), (x, mean_square, scale)


def _forked_backward(eps, residuals, cotangents):
    dx_after, dy = cotangents
    dx, dscale, _ = _norm_back(eps, False)(*residuals, dy, dx_after)
    return dx, dscale.astype(residuals[2].dtype)


_forked.defvjp(_forked_forward, _forked_backward)


def residual_swiglu(
    x: jax.Array, scale: jax.Array, first: jax.Array, down: jax.Array, eps: float
) -> jax.Array:
    """``x + (silu(y gate) * (y up)) down``, with y the norm of ``x``.

    Args:
      x: [B, T, D].
      scale: of the norm, [D].
      first: gate and up side by side, [D, 2 F], in the dtype of ``x``.
      down: [F, D], the same.
      eps: added to the mean square.
    """
    return _swiglu(eps, *mark_all_varying((x, scale, first, down)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _swiglu(eps, x, scale, first, down):
    return _swiglu_forward(eps, x, scale, first, down)[0]


def _swiglu_forward(eps, x, scale, first, down):
    y, mean_square = _norm(x, scale, eps, x.dtype)
    hidden = checkpoint_name(y @ first, HIDDEN_POINT)
    out = x + _activated(hidden) @ down
    return out, (x, mean_square, scale, hidden, first, down)


def _activated(hidden):
    gate, up = jnp.split(hidden, 2, axis=-1)
    return jax.nn.silu(gate) * up


def _swiglu_backward(eps, residuals, dout):
    x, mean_square, scale, hidden, first, down = residuals
    dhidden, h = _activated_back(hidden, dout @ down.T)
    dx, dscale, y = _norm_back(eps, True)(x, mean_square, scale, dhidden @ first.T, dout)
    tokens = "btx,bty->xy"
    dfirst = jnp.einsum(tokens, y, dhidden)
    return dx, dscale.astype(scale.dtype), dfirst, jnp.einsum(tokens, h, dout)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _by_kernel_or_plain(by_kernel: Callable, plain: Callable) -> Callable:
    """A kernel on a GPU, plainly elsewhere, where it is mapped and where it is differentiated."""

    @jax.custom_batching.custom_vmap
    def of_gpu(*arrays):
        return by_kernel(*arrays)

    @of_gpu.def_vmap
    def _mapped(axis_size, in_batched, *arrays):
        del axis_size
        outs = jax.vmap(plain, [0 if batched else None for batched in in_batched])(*arrays)
        return outs, jax.tree.map(lambda _: True, outs)

    @jax.custom_jvp
    def run(*arrays):
        runs = {"cuda": of_gpu} if kernels.is_installed("triton") else {}
        return jax.lax.platform_dependent(*arrays, **runs, default=plain)

    @run.defjvp
    def _differentiated(primals, tangents):
        return run(*primals), jax.jvp(plain, primals, tangents)[1]

    return run


@functools.cache
def _norm_back(eps: float, again: bool) -> Callable:
    def by_kernel(x, mean_square, scale, dy, dx_after):
        flat = (a.reshape(-1, x.shape[-1]) for a in (dy, dx_after))
        dx, dscale, y = of_triton.norm_back(
            x.reshape(-1, x.shape[-1]), mean_square.reshape(-1), scale, *flat, eps=eps, again=again
        )
        return dx.reshape(x.shape), dscale, y.reshape(x.shape) if again else None

    def plain(x, mean_square, scale, dy, dx_after):
        wide = accumulator_dtype(x.dtype)
        x_wide, dy, after = (a.astype(wide) for a in (x, dy, dx_after))
        inverse = jax.lax.rsqrt(mean_square + eps)
        unit = x_wide * inverse
        dscale = jnp.sum(dy * unit, axis=tuple(range(x.ndim - 1)))
        dunit = dy * scale.astype(wide).reshape((1,) * (x.ndim - 1) + (-1,))
        along = jnp.mean(dunit * unit, axis=-1, keepdims=True)
        dx = after + inverse * (dunit - unit * along)
        y = _scaled(x, mean_square, scale, eps, x.dtype) if again else None
        return dx.astype(x.dtype), dscale, y

    return _by_kernel_or_plain(by_kernel, plain)


def _activated_back_by_kernel(hidden, dh):
    rows = lambda a: a.reshape(-1, a.shape[-1])
    dhidden, h = of_triton.swiglu_back(rows(hidden), rows(dh))
    return dhidden.reshape(hidden.shape), h.reshape(dh.shape)


def _activated_back_plain(hidden, dh):
    h, pull = jax.vjp(_activated, hidden)
    return pull(dh)[0], h


_activated_back = _by_kernel_or_plain(_activated_back_by_kernel, _activated_back_plain)
