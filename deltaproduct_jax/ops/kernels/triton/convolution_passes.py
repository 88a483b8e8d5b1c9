"""The GPU kernels of short convolutions: what they take, and what is launched on which arrays.

The bodies are in `convolution`, which needs Triton and is imported at the first launch. Letters: B
sequences, T tokens, C channels, W taps, G sets of taps.
"""

from typing import Any

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.convolution.plain import Form, identity
from deltaproduct_jax.ops.kernels.triton import passes, tiling
from deltaproduct_jax.ops.kernels.triton.batching import batched
from deltaproduct_jax.ops.kernels.triton.tiling import Launch
from deltaproduct_jax.ops.precision import L2NORM_EPSILON

MOST_TAPS = 4
MOST_WIDTH = 512
ACTIVATED_AT_ONCE = 2048  # numbers of a program


def unsupported(form: Form, *, B: int, conv_size: int | None, dtype) -> str | None:
    """Why the kernels cannot run these, as the end of a sentence, or None.

    Without a size there is no convolution, and what stands behind it runs alone.
    """
    if jnp.dtype(dtype) not in (*passes.NARROW, jnp.dtype(jnp.float32)):
        return f"the dtype is {jnp.dtype(dtype)}; it takes bfloat16, float16 and float32"
    if form.activation not in (jax.nn.silu, identity):
        return f"the activation is {form.activation.__name__}; it takes silu and none"
    if conv_size is not None and not 2 <= conv_size <= MOST_TAPS:
        return f"conv_size is {conv_size}; it takes 2 to {MOST_TAPS}"
    if (width := form.unit_width or 1) > MOST_WIDTH:
        return f"the width of a head is {width}; it takes at most {MOST_WIDTH}"
    return None


def forward(u, before, taps, run, past, *, form: Form) -> jax.Array:
    """The convolution [B, T, C] in the dtype of ``u``.

    Args:
      u: inputs [B, T, C].
      before: the W - 1 inputs before them [B, W - 1, C].
      taps: [G, W, C], float32; sequences are shared out to the G sets in order.
      run: numbers of segments [B, T], int32, or None.
      past: those of ``before`` [B, W - 1], or None.
      form: what is done to the sum of taps.
    """
    return batched(_convolve, form)(u, before, taps, run, past)


def backward(u, before, taps, run, past, dy, *, form: Form) -> tuple[jax.Array, ...]:
    """Cotangents of ``u``, ``before`` and ``taps``, from that of `forward`."""
    return batched(_convolve_back, form)(u, before, taps, run, past, dy)


def _convolve(form: Form, u, *others):
    out = jax.ShapeDtypeStruct(u.shape, u.dtype)
    (y,) = _launch("convolve", form, (u, *others), lambda pieces: (out,))
    return y


def _convolve_back(form: Form, u, before, taps, run, past, dy):
    B, C, (G, W) = u.shape[0], u.shape[2], taps.shape[:2]

    def outs(pieces: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        likes = (u, before, jax.ShapeDtypeStruct((B, pieces, W, C), jnp.float32))
        return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in likes)

    arrays = (u, before, taps, run, past)
    du, dbefore, parts = _launch("convolve_back", form, arrays, outs, dy.astype(u.dtype))
    # Summed in one order, whatever ran first.
    dtaps = jnp.sum(parts.reshape(G, -1, W, C), axis=1)
    return du, dbefore, dtaps


def forward_parts(u, before, taps, run, past, *, parts: tuple[Form, ...], widths: tuple[int, ...]):
    """The convolutions of what stands side by side in a token, each an array of its own.

    Args:
      u: inputs [B, T, CU], of which the first C channels are convolved.
      before: the W - 1 inputs before them [B, W - 1, C].
      taps: [G, W, C], as in `forward`.
      run, past: as in `forward`.
      parts: of q, k and v; the first two alike, with a unit width, and the last without.
      widths: channels of each, C in all; multiples of the unit width.
    """
    return batched(_forward_parts, (parts, widths))(u, before, taps, run, past)


def backward_parts(u, before, taps, run, past, cotangents, rest, *, parts, widths):
    """Cotangents of ``u``, ``before`` and ``taps``.

    Args:
      u, before, taps, run, past, parts, widths: as in `forward_parts`.
      cotangents: of its results.
      rest: of the channels of ``u`` behind the first C [B, T, CU - C].
    """
    fixed = parts, widths
    return batched(_backward_parts, fixed)(u, before, taps, run, past, *cotangents, rest)


def _forward_parts(fixed, u, *others):
    outs = [jax.ShapeDtypeStruct((*u.shape[:2], C), u.dtype) for C in fixed[1]]
    return _launch_parts("convolve_parts", fixed, (u, *others), lambda pieces: outs)


def _backward_parts(fixed, u, before, taps, run, past, *cotangents):
    B, C, (G, W) = u.shape[0], before.shape[2], taps.shape[:2]

    def outs(pieces: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        likes = (u, before, jax.ShapeDtypeStruct((B, pieces, W, C), jnp.float32))
        return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in likes)

    cotangents = [x.astype(u.dtype) for x in cotangents]
    arrays = (u, before, taps, run, past)
    name = "convolve_parts_back"
    du, dbefore, parts = _launch_parts(name, fixed, arrays, outs, *cotangents)
    return du, dbefore, jnp.sum(parts.reshape(G, -1, W, C), axis=1)


def _launch_parts(name: str, fixed, arrays, outs, *more) -> tuple[jax.Array, ...]:
    u, before, taps, run, past = arrays
    (form, _, _), widths = fixed
    (B, T, CU), (G, W, C) = u.shape, taps.shape
    width = form.unit_width
    cut = tiling.parts_for(tuple(c // width for c in widths), width, backward=bool(more))
    has_run = run is not None
    meta: dict[str, Any] = {"B": B, "T": T, "C": C, "G": G, "W": W, "HAS_RUN": has_run}
    meta |= {"ROWS": cut.rows, "WIDTH": cut.width, "BW": cut.columns, "PIECE": cut.piece}
    meta |= {"SILU": form.activation is jax.nn.silu, "EPSILON": L2NORM_EPSILON}
    meta |= {"CU": CU, "CQ": widths[0], "CK": widths[1], "BREST": tiling.power_of_two(CU - C)}
    pieces = -(-T // cut.piece)
    columns = C // (cut.width * cut.rows) + (1 if more and CU > C else 0)
    inputs = (u, before, taps, *((run, past) if has_run else (u, u)), *more)
    launch = Launch(cut.warps, stages=1)
    return passes.call(name, inputs, tuple(outs(pieces)), (columns, pieces, B), launch, meta=meta)


def activated(u, *, form: Form) -> jax.Array:
    """``act(u)``, divided by its length over every ``form.unit_width`` channels, [B, T, C]."""
    return batched(_activated, form)(u)


def activated_back(u, dy, *, form: Form) -> jax.Array:
    """The cotangent of ``u``, from that of `activated`."""
    return batched(_activated, form)(u, dy)


def _activated(form: Form, u, *dy):
    width = form.unit_width
    columns = tiling.power_of_two(width)
    rows = max(1, ACTIVATED_AT_ONCE // columns)
    meta = {"N": u.size // width, "WIDTH": width, "BW": columns, "ROWS": rows}
    meta |= {"SILU": form.activation is jax.nn.silu, "EPSILON": L2NORM_EPSILON}
    name, grid = "activate_back" if dy else "activate", (-(-meta["N"] // rows),)
    arrays = (u, *(x.astype(u.dtype) for x in dy))
    out = jax.ShapeDtypeStruct(u.shape, u.dtype)
    return passes.call(name, arrays, (out,), grid, Launch(4, stages=1), meta=meta)[0]


def _launch(name: str, form: Form, arrays, outs, *more) -> tuple[jax.Array, ...]:
    u, before, taps, run, past = arrays
    (B, T, C), (G, W) = u.shape, taps.shape[:2]
    cut = tiling.convolution_for(C, form.unit_width, backward=bool(more))
    has_run = run is not None
    meta: dict[str, Any] = {"B": B, "T": T, "C": C, "G": G, "W": W, "HAS_RUN": has_run}
    meta |= {"ROWS": cut.rows, "WIDTH": cut.width, "BW": cut.columns, "PIECE": cut.piece}
    meta |= {"SILU": form.activation is jax.nn.silu, "UNIT": form.unit_width is not None}
    meta |= {"EPSILON": L2NORM_EPSILON}
    pieces = -(-T // cut.piece)
    grid = (-(-C // (cut.width * cut.rows)), pieces, B)
    inputs = (u, before, taps, *((run, past) if has_run else (u, u)), *more)
    return passes.call(name, inputs, outs(pieces), grid, Launch(cut.warps, stages=1), meta=meta)
