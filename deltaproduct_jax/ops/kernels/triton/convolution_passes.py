"""The GPU kernels of short convolutions: what they take, and what is launched on which arrays.

The bodies are in `convolution`, which needs Triton and is imported at the first launch. Letters: B
sequences, T tokens, C channels, W taps, G sets of taps.
"""

from typing import Any

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.convolution.plain import ACTIVATIONS, EPSILON, Form
from deltaproduct_jax.ops.kernels.triton import passes, tiling
from deltaproduct_jax.ops.kernels.triton.batching import batched
from deltaproduct_jax.ops.kernels.triton.tiling import Launch

MOST_TAPS = 4
MOST_WIDTH = 1024


def unsupported(*, dtype, B: int, conv_size: int, activation: str | None, unit_width: int | None):
    """Why the kernels cannot run these, as the end of a sentence, or None."""
    if jnp.dtype(dtype) not in (*passes.NARROW, jnp.dtype(jnp.float32)):
        return f"the dtype is {jnp.dtype(dtype)}; it takes bfloat16, float16 and float32"
    if activation not in ACTIVATIONS:
        return f"the activation is a function of its own; it takes {' and '.join(ACTIVATIONS)}"
    width = unit_width or 1
    for name, size, most in (
        ("conv_size", conv_size, MOST_TAPS),
        ("the width of a head", width, MOST_WIDTH),
        ("B", B, 65535),
    ):
        if size > most:
            return f"{name} is {size}; it takes at most {most}"
    return None


def forward(form: Form, u, before, taps, run, past) -> jax.Array:
    """The convolution [B, T, C] in the dtype of ``u``.

    Args:
      form: what is done to the sum of taps.
      u: inputs [B, T, C].
      before: the W - 1 inputs before them [B, W - 1, C].
      taps: [G, W, C], float32; sequences are shared out to the G sets in order.
      run: numbers of segments [B, T], int32, or None.
      past: those of ``before`` [B, W - 1], or None.
    """
    return batched(_forward, form)(u, before, taps, run, past)


def backward(form: Form, u, before, taps, run, past, dy) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Cotangents of ``u``, ``before`` and ``taps``, from that of `forward`."""
    return batched(_backward, form)(u, before, taps, run, past, dy)


def _forward(form: Form, u, *others):
    out = jax.ShapeDtypeStruct(u.shape, u.dtype)
    (y,) = _launch("convolve", form, (u, *others), lambda pieces: (out,))
    return y


def _backward(form: Form, u, before, taps, run, past, dy):
    B, C, (G, W) = u.shape[0], u.shape[2], taps.shape[:2]
    # With one tap there is nothing before, and a kernel is given no empty array.
    of_before = before if W > 1 else passes.PLACEHOLDER

    def outs(pieces: int) -> tuple[jax.ShapeDtypeStruct, ...]:
        likes = (u, of_before, jax.ShapeDtypeStruct((B, pieces, W, C), jnp.float32))
        return tuple(jax.ShapeDtypeStruct(x.shape, x.dtype) for x in likes)

    arrays = (u, before, taps, run, past)
    du, dbefore, parts = _launch("convolve_back", form, arrays, outs, dy.astype(u.dtype))
    # Summed in one order, whatever ran first.
    dtaps = jnp.sum(parts.reshape(G, -1, W, C), axis=1)
    return du, dbefore if W > 1 else jnp.zeros_like(before), dtaps


def _launch(name: str, form: Form, arrays, outs, *more) -> tuple[jax.Array, ...]:
    u, before, taps, run, past = arrays
    (B, T, C), (G, W) = u.shape, taps.shape[:2]
    cut = tiling.convolution_for(C, form.unit_width, backward=bool(more))
    has_run = run is not None
    meta: dict[str, Any] = {"B": B, "T": T, "C": C, "G": G, "W": W, "HAS_RUN": has_run}
    meta |= {"ROWS": cut.rows, "WIDTH": cut.width, "BW": cut.columns, "PIECE": cut.piece}
    meta |= {"EPSILON": EPSILON, "SILU": form.activation == "silu", "UNIT": form.unit_width is not None}
    pieces = -(-T // cut.piece)
    grid = (-(-C // (cut.width * cut.rows)), pieces, B)
    before = before if W > 1 else u
    inputs = (u, before, taps, run if has_run else u, past if has_run and W > 1 else u, *more)
    return passes.call(
        name, inputs, outs(pieces), grid, Launch(cut.warps, stages=1), meta=meta
    )
