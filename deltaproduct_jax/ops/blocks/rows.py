"""Parts of a block that are bound by memory, with a way back that reads everything once.

A norm of rows whose input goes on beside it, and a whole residual SwiGLU. On the way forward they
are what JAX makes of them; the way back is a custom one, by a kernel on a GPU and plainly
elsewhere. Over a mesh every device runs the kernel on its own tokens. There is no forward mode.

Shape suffixes: B batch, T tokens, D channels, F channels between the products of a SwiGLU.
"""

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deltaproduct_jax.ops import kernels
from deltaproduct_jax.ops.kernels.triton import row_passes as of_triton
from deltaproduct_jax.ops.parts import OnTokens, explicit_names, placement
from deltaproduct_jax.ops.precision import accumulator_dtype
from deltaproduct_jax.ops.varying import mark_all_varying

# Names for policies of `jax.checkpoint`: mean squares of rows, and both widened products.
NORM_POINT, HIDDEN_POINT = "norm_of_rows", "mlp_hidden"


def may_run(x: jax.Array, F: int) -> bool:
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
    return _forked(eps, _on_tokens(x), *mark_all_varying((x, scale)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _forked(eps, on_tokens, x, scale):
    del on_tokens
    return x, _norm(x, scale, eps, x.dtype)[0]


def _forked_forward(eps, on_tokens, x, scale):
    del on_tokens
    y, mean_square = _norm(x, scale, eps, x.dtype)
    return (x, y), (x, mean_square, scale)


def _forked_backward(eps, on_tokens, residuals, cotangents):
    dx_after, dy = cotangents
    dx, dscale, _ = _norm_back(eps, False)(on_tokens, *residuals, dy, dx_after)
    return dx, dscale.astype(residuals[2].dtype)


_forked.defvjp(_forked_forward, _forked_backward)


def residual_swiglu(
    x: jax.Array, scale: jax.Array, gate: jax.Array, up: jax.Array, down: jax.Array, eps: float
) -> jax.Array:
    """``x + (silu(y gate) * (y up)) down``, with y the norm of ``x``.

    Args:
      x: [B, T, D].
      scale: of the norm, [D].
      gate: [D, F], in the dtype of ``x``.
      up: the same.
      down: [F, D], in that dtype too.
      eps: added to the mean square.
    """
    on_tokens = _on_tokens(x, down.shape[0])
    # One matrix, but where a mesh cuts F: there an axis of its own keeps gate and up apart.
    join = jnp.concatenate if on_tokens is None else jnp.stack
    first = join([gate, up], axis=1)
    return _swiglu(eps, on_tokens, *mark_all_varying((x, scale, first, down)))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _swiglu(eps, on_tokens, x, scale, first, down):
    return _swiglu_forward(eps, on_tokens, x, scale, first, down)[0]


def _swiglu_forward(eps, on_tokens, x, scale, first, down):
    del on_tokens
    y, mean_square = _norm(x, scale, eps, x.dtype)
    hidden = checkpoint_name(jnp.tensordot(y, first, 1), HIDDEN_POINT)
    out = x + _activated(hidden) @ down
    return out, (x, mean_square, scale, hidden, first, down)


def _activated(hidden):
    gate, up = (x.reshape(*x.shape[:2], -1) for x in jnp.split(hidden, 2, axis=2))
    return jax.nn.silu(gate) * up


def _swiglu_backward(eps, on_tokens, residuals, dout):
    x, mean_square, scale, hidden, first, down = residuals
    dhidden, h = _activated_back(on_tokens, hidden, dout @ down.T)
    wide = [*range(2, hidden.ndim)], [*range(1, first.ndim)]
    dy = jnp.tensordot(dhidden, first, wide)
    dx, dscale, y = _norm_back(eps, True)(on_tokens, x, mean_square, scale, dy, dout)
    of_tokens = functools.partial(jnp.tensordot, axes=((0, 1), (0, 1)))
    return dx, dscale.astype(scale.dtype), of_tokens(y, dhidden), of_tokens(h, dout)


_swiglu.defvjp(_swiglu_forward, _swiglu_backward)


def _by_kernel_or_plain(
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

    layouts = ("BTD", "BT1", "D", "BTD", "BTD")
    return _by_kernel_or_plain(by_kernel, plain, layouts, ("BTD", "D", "BTD"))


def _activated_back_by_kernel(hidden, dh):
    F = dh.shape[-1]
    dhidden, h = of_triton.swiglu_back(hidden.reshape(-1, 2 * F), dh.reshape(-1, F))
    return dhidden.reshape(hidden.shape), h.reshape(dh.shape)


def _activated_back_plain(hidden, dh):
    h, pull = jax.vjp(_activated, hidden)
    return pull(dh)[0], h


_activated_back = _by_kernel_or_plain(
    _activated_back_by_kernel, _activated_back_plain, ("BT2F", "BTF"), ("BT2F", "BTF")
)
