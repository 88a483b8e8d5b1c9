"""The GPU kernels of a block's way back: what they take, and what is launched on which arrays.

The bodies are in `rows`, which needs Triton and is imported at the first launch. Letters: N rows,
D channels.
"""

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.kernels.triton import passes, tiling
from deltaproduct_jax.ops.kernels.triton.tiling import Launch

MOST_CHANNELS = 8192  # of a row that a norm has in registers
AT_ONCE = 2048  # numbers of a program, of one array
PROGRAMS = 4 * 132  # of a norm, each with a sum of its own for the scale


def unsupported(*, dtype, D: int) -> str | None:
    """Why the kernels cannot run these, as the end of a sentence, or None."""
    if jnp.dtype(dtype) not in (*passes.NARROW, jnp.dtype(jnp.float32)):
        return f"the dtype is {jnp.dtype(dtype)}; it takes bfloat16, float16 and float32"
    if D > MOST_CHANNELS:
        return f"D is {D}; it takes at most {MOST_CHANNELS}"
    return None


def norm_back(x, mean_square, scale, dy, dx_after, *, eps: float, again: bool):
    """Cotangents of a norm of rows whose input something else reads too.

    Args:
      x: inputs [N, D].
      mean_square: of each row [N], float32.
      scale: [D].
      dy: cotangent of the norm, [N, D].
      dx_after: that of ``x`` from all else that reads it, [N, D].
      eps: added to the mean square.
      again: make the norm again too.

    Returns:
      The cotangent of ``x``, that of ``scale`` in float32, and the norm or None.
    """
    N, D = x.shape
    columns = tiling.power_of_two(D)
    rows = max(1, AT_ONCE // columns)
    times = -(-N // (rows * PROGRAMS))
    programs = -(-N // (rows * times))
    meta = {"N": N, "D": D, "BD": columns, "ROWS": rows, "TIMES": times}
    meta |= {"EPSILON": eps, "AGAIN": again}
    outs = [x, jax.ShapeDtypeStruct((programs, D), jnp.float32)]
    outs.append(x if again else jax.ShapeDtypeStruct((1,), x.dtype))
    outs = tuple(jax.ShapeDtypeStruct(out.shape, out.dtype) for out in outs)
    arrays = (x, mean_square, scale, *(a.astype(x.dtype) for a in (dy, dx_after)))
    launch = Launch(max(4, columns // 512), stages=1)
    dx, parts, y = passes.call("norm_back", arrays, outs, (programs,), launch, meta=meta)
    # Summed in one order, whatever ran first.
    return dx, jnp.sum(parts, axis=0), y if again else None


def swiglu_back(hidden, dh):
    """Cotangent of ``hidden`` [N, 2 D] from that of silu(first half) * second half [N, D].

    Returns it and the product itself.
    """
    N, D = dh.shape
    columns = min(tiling.power_of_two(D), max(128, min(1024, D & -D)))
    rows = max(1, AT_ONCE // columns)
    meta = {"N": N, "D": D, "BD": columns, "ROWS": rows}
    outs = tuple(jax.ShapeDtypeStruct(x.shape, hidden.dtype) for x in (hidden, dh))
    grid = (-(-N // rows), -(-D // columns))
    arrays = (hidden, dh.astype(hidden.dtype))
    return passes.call("swiglu_back", arrays, outs, grid, Launch(4, stages=1), meta=meta)
