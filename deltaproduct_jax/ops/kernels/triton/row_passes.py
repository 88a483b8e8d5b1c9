"""The GPU kernels of a block outside its mixer: what they take, what is launched on which arrays.

The bodies are in `rows`, which needs Triton and is imported at the first launch. Letters: N rows,
D channels.
"""

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.kernels.triton import passes, tiling
from deltaproduct_jax.ops.kernels.triton.tiling import Launch

MOST_CHANNELS = 8192  # of a row that a norm has in registers
AT_ONCE = 2048  # numbers of a program, of one array
LOGITS_AT_ONCE = 8192
PROGRAMS = 4 * 132  # of a norm, each with a sum of its own for the scale


def unsupported(*, dtype, D: int) -> str | None:
    """Why the kernels cannot run these, as the end of a sentence, or None."""
    if jnp.dtype(dtype) not in (*passes.NARROW, jnp.dtype(jnp.float32)):
        return f"the dtype is {jnp.dtype(dtype)}; it takes bfloat16, float16 and float32"
    if D > MOST_CHANNELS:
        return f"D is {D}; it takes at most {MOST_CHANNELS}"
    return None


def norm_forward(x, scale, *, eps: float, more=None, reached=None, looks: bool = False):
    """A norm of rows, with the sum in front of it, and a look for what is not finite.

    Args:
      x: inputs [N, D].
      scale: [D].
      eps: added to the mean square.
      more: added to ``x``, [N, D], or None.
      reached: [N] bool, rows in which ``more`` is NaN; wanted where there is more.
      looks: replace what is not finite in the norm by 0, and say in which rows there was any.

    Returns:
      The sum or None, the norm, the mean square of each row [N] in float32, and rows with anything
      that is not finite [N] bool or None.
    """
    N, D = x.shape
    adds = more is not None
    columns = tiling.power_of_two(D)
    rows = max(1, AT_ONCE // columns)
    meta = {"N": N, "D": D, "BD": columns, "ROWS": rows, "EPSILON": eps}
    meta |= {"ADDS": adds, "LOOKS": looks}
    shape = jax.ShapeDtypeStruct
    outs = (
        shape(x.shape if adds else (1,), x.dtype),
        shape(x.shape, x.dtype),
        shape((N,), jnp.float32),
        shape((N if looks else 1,), jnp.int8),
    )
    arrays = (x, more.astype(x.dtype), reached.astype(jnp.int8)) if adds else (x, x, x)
    launch = Launch(max(4, columns // 512), stages=1)
    arrays, grid = (*arrays, scale), (-(-N // rows),)
    total, y, mean_square, bad = passes.call("norm_forward", arrays, outs, grid, launch, meta=meta)
    return total if adds else None, y, mean_square, bad != 0 if looks else None


def norm_back(
    x, mean_square, scale, dy, dx_after=None, reached=None, *, eps: float, again: bool = False
):
    """Cotangents of a norm of rows whose input something else may read too.

    Args:
      x: inputs [N, D].
      mean_square: of each row [N], float32.
      scale: [D].
      dy: cotangent of the norm, [N, D].
      dx_after: that of ``x`` from all else that reads it, [N, D], or None.
      reached: [N] bool, rows in which the cotangent of ``x`` is NaN unless it is 0, or None.
      eps: added to the mean square.
      again: make the norm again too.

    Returns:
      The cotangent of ``x``, that of ``scale`` in float32, and the norm or None.
    """
    N, D = x.shape
    columns = tiling.power_of_two(D)
    rows = max(1, AT_ONCE // columns)
    # Short rows leave less under way, but sums for a short scale.
    times = -(-N // (rows * PROGRAMS * max(1, min(4, AT_ONCE // (2 * columns)))))
    programs = -(-N // (rows * times))
    forked, has_reached = dx_after is not None, reached is not None
    meta = {"N": N, "D": D, "BD": columns, "ROWS": rows, "TIMES": times}
    meta |= {"EPSILON": eps, "AGAIN": again, "FORKED": forked, "HAS_REACHED": has_reached}
    outs = [x, jax.ShapeDtypeStruct((programs, D), jnp.float32)]
    outs.append(x if again else jax.ShapeDtypeStruct((1,), x.dtype))
    outs = tuple(jax.ShapeDtypeStruct(out.shape, out.dtype) for out in outs)
    arrays = [x, mean_square, scale, dy.astype(x.dtype)]
    arrays.append(dx_after.astype(x.dtype) if forked else x)
    arrays.append(reached.astype(jnp.int8) if has_reached else x)
    launch = Launch(max(4, columns // 512), stages=1)
    dx, parts, y = passes.call("norm_back", arrays, outs, (programs,), launch, meta=meta)
    # Summed in one order, whatever ran first.
    return dx, jnp.sum(parts, axis=0), y if again else None


def swiglu(hidden):
    """silu(first half) * second half of ``hidden`` [N, 2 D], in its dtype."""
    [h] = _on_halves("swiglu", (hidden,), ((hidden.shape[0], hidden.shape[1] // 2),))
    return h


def swiglu_back(hidden, dh, *, again: bool = True):
    """Cotangent of ``hidden`` [N, 2 D] from that of what `swiglu` makes of it [N, D].

    Returns it, and that itself if ``again``, else None.
    """
    arrays, shapes = (hidden, dh.astype(hidden.dtype)), (hidden.shape, dh.shape if again else (1,))
    dhidden, h = _on_halves("swiglu_back", arrays, shapes, AGAIN=again)
    return dhidden, h if again else None


def logit_sums(logits, targets, mask):
    """What a cross entropy reads logits for, read once.

    Args:
      logits: [N, V].
      targets: ids [N].
      mask: [N] bool; where it is False all logits count as 0.

    Returns:
      The logarithm of the sum of exponentials and the target's logit, [N] float32, and whether the
      target is the first of the largest, [N] bool.
    """
    N, V = logits.shape
    columns = min(LOGITS_AT_ONCE, tiling.power_of_two(V))
    outs = [jax.ShapeDtypeStruct((N,), dtype) for dtype in (jnp.float32, jnp.float32, jnp.int8)]
    arrays = logits, targets.astype(jnp.int32), mask.astype(jnp.int8)
    launch = Launch(max(1, columns // 1024), stages=1)
    meta = {"V": V, "BV": columns}
    *sums, correct = passes.call("logit_sums", arrays, tuple(outs), (N,), launch, meta=meta)
    return *sums, correct != 0


def logit_back(logits, targets, mask, log_sum, dlog_sum, dof_target):
    """The cotangent of logits [N, V], from those of what `logit_sums` returns."""
    N, V = logits.shape
    columns = min(LOGITS_AT_ONCE // 2, tiling.power_of_two(V))
    arrays = logits, targets.astype(jnp.int32), mask.astype(jnp.int8), log_sum, dlog_sum, dof_target
    launch, grid = Launch(max(1, columns // 1024), stages=1), (-(-V // columns), N)
    out = jax.ShapeDtypeStruct(logits.shape, logits.dtype)
    meta = {"V": V, "BV": columns}
    return passes.call("logit_back", arrays, (out,), grid, launch, meta=meta)[0]


def _on_halves(name: str, arrays, shapes, **more):
    N, D = arrays[0].shape[0], arrays[0].shape[1] // 2
    columns = min(tiling.power_of_two(D), max(128, min(1024, D & -D)))
    rows = max(1, AT_ONCE // columns)
    meta = {"N": N, "D": D, "BD": columns, "ROWS": rows, **more}
    outs = tuple(jax.ShapeDtypeStruct(shape, arrays[0].dtype) for shape in shapes)
    grid = (-(-N // rows), -(-D // columns))
    return passes.call(name, arrays, outs, grid, Launch(4, stages=1), meta=meta)
