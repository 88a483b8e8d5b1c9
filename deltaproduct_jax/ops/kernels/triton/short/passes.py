"""The GPU kernels of short rows: what they take, what is launched on which arrays.

A row of at most 128 channels meets a whole matrix while it is in registers, so that nothing wider
than itself need be written. Products are summed in float32. Letters: N rows, D channels, F of a
SwiGLU, H heads of V values; where there are no heads V counts ids.
"""

import dataclasses

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.kernels.triton import passes, tiling
from deltaproduct_jax.ops.kernels.triton.tiling import Launch

MOST_CHANNELS = 128  # of a row that a program has in registers, and ids of a model's head
PROGRAMS = 132  # of what sums over all rows, each with a sum of its own


@dataclasses.dataclass(frozen=True)
class Cut:
    """Rows of a program, columns of a wide product that it has at a time, and its launch."""

    rows: int
    columns: int
    launch: Launch


CUTS = {
    "short_mlp": Cut(64, 64, Launch(4, stages=2)),
    "short_mlp_back": Cut(128, 64, Launch(8, stages=2)),
    "short_output": Cut(64, 0, Launch(4, stages=3)),
    "short_output_back": Cut(64, 0, Launch(4, stages=1)),
    "short_inputs_back": Cut(128, 64, Launch(8, stages=3)),
    "short_head": Cut(64, 0, Launch(4, stages=1)),
    "short_head_back": Cut(64, 0, Launch(8, stages=2)),
    "short_lookup_back": Cut(128, 0, Launch(8, stages=3)),
}


def unsupported(*, dtype, D: int, V: int = 1) -> str | None:
    """Why the kernels cannot run these, as the end of a sentence, or None."""
    if jnp.dtype(dtype) not in passes.NARROW:
        return f"the dtype is {jnp.dtype(dtype)}; it takes bfloat16 and float16"
    for name, size in {"D": D, "V": V}.items():
        if size > MOST_CHANNELS:
            return f"{name} is {size}; it takes at most {MOST_CHANNELS}"
    return None


def mlp(x, more, reached, scale, first, down, *, eps: float):
    """A residual SwiGLU.

    Args:
      x, more: [N, D].
      reached: [N] bool, rows in which ``more`` is NaN.
      scale: of the norm in front of it, [D].
      first: [D, 2 F].
      down: [F, D].
      eps: added to the mean square.

    Returns:
      The sum of both, the mean square of each row [N] in float32, and the output.
    """
    arrays = x, more.astype(x.dtype), reached.astype(jnp.int8), scale, first, down
    outs = x, jax.ShapeDtypeStruct(x.shape[:1], jnp.float32), x
    return _launched("short_mlp", arrays, outs, x, F=len(down), eps=eps)


def mlp_back(z, mean_square, reached, scale, first, down, dout, *, eps: float):
    """Its cotangents, from the sum and mean squares that `mlp` returns.

    Returns:
      That of the sum, NaN in rows that are reached unless it is 0, that of ``scale`` in float32,
      and the norm [N, D], what SwiGLU makes [N, F] and the cotangent of its inputs [N, 2 F].
    """
    N, F = len(z), len(down)
    arrays = z, mean_square, reached.astype(jnp.int8), scale, first, down, dout.astype(z.dtype)
    wide = [jax.ShapeDtypeStruct((N, width), z.dtype) for width in (F, 2 * F)]
    outs = z, _sums("short_mlp_back", z, z.shape[1]), z, *wide
    dz, dscale, *others = _launched("short_mlp_back", arrays, outs, z, F=F, eps=eps)
    return dz, jnp.sum(dscale, axis=0), *others


def output(o, scale, kernel, *, eps: float):
    """The product of the norms of heads [N, H, V] with a matrix [H V, D], [N, D]."""
    out = jax.ShapeDtypeStruct((len(o), kernel.shape[1]), o.dtype)
    return _launched("short_output", (o, scale, kernel), (out,), out, o=o, eps=eps)[0]


def output_back(o, scale, kernel, dout, *, eps: float):
    """Cotangents of ``o`` and of ``scale``, the latter in float32, and the norms."""
    arrays = o, scale, kernel, dout.astype(o.dtype)
    outs = o, _sums("short_output_back", dout, o.shape[2]), o
    do, dscale, y = _launched("short_output_back", arrays, outs, dout, o=o, eps=eps)
    return do, jnp.sum(dscale, axis=0), y


def inputs_back(dq, dk, dv, db, *kernels):
    """The cotangent of rows [N, D] from those of their products with four matrices [D, ...]."""
    out = jax.ShapeDtypeStruct((len(dq), len(kernels[0])), dq.dtype)
    arrays = *(dy.astype(dq.dtype) for dy in (dq, dk, dv, db)), *kernels
    return _launched("short_inputs_back", arrays, (out,), out, **_widths(kernels))[0]


def _widths(kernels):
    return dict(zip("QKVB", (w.shape[1] for w in kernels), strict=True))


def head(x, scale, kernel, targets, mask, *, eps: float):
    """What a cross entropy reads logits for, of those that a norm and a matrix make of rows.

    Args:
      x: [N, D].
      scale: of the norm, [D].
      kernel: [D, V].
      targets, mask: as of `row_passes.logit_sums`, whose results are returned.
      eps: added to the mean square.
    """
    arrays = (*_of_head(x, scale, kernel, targets, mask),)
    outs = [
        jax.ShapeDtypeStruct(x.shape[:1], kind) for kind in (jnp.float32, jnp.float32, jnp.int8)
    ]
    *sums, correct = _launched("short_head", arrays, outs, x, V=kernel.shape[1], eps=eps)
    return *sums, correct != 0


def head_back(x, scale, kernel, targets, mask, log_sum, dlog_sum, dof_target, *, eps: float):
    """Cotangents of ``x``, and in float32 of ``scale`` and ``kernel``."""
    V = kernel.shape[1]
    times, parts = _parts("short_head_back", x, (x.shape[1], tiling.power_of_two(V)))
    arrays = *_of_head(x, scale, kernel, targets, mask), log_sum, dlog_sum, dof_target
    more = {"V": V, "TIMES": times, "eps": eps}
    dx, parts = _launched("short_head_back", arrays, (x, parts), x, **more)
    # Of rows of length one, so that the scale's is a sum over its columns.
    dkernel = jnp.sum(parts, axis=0)[:, :V]
    dscale = jnp.sum(dkernel * kernel.astype(jnp.float32), axis=1)
    return dx, dscale, dkernel * scale.astype(jnp.float32)[:, None]


def lookup_back(ids, dx, rows: int):
    """The cotangent of a table of so many rows in float32, from that of those that ``ids`` name.

    Args:
      ids: [N]; of no row those that are out of range.
      dx: [N, D].
      rows: of the table.
    """
    times, parts = _parts("short_lookup_back", dx, (rows, dx.shape[1]))
    arrays, more = (ids.astype(jnp.int32), dx), {"V": rows, "TIMES": times}
    return jnp.sum(_launched("short_lookup_back", arrays, (parts,), dx, **more)[0], axis=0)


def _parts(name: str, x, shape: tuple[int, int]):
    """Rounds of a program over the rows of ``x``, and what programs find, a matrix each."""
    rows = CUTS[name].rows
    times = -(-len(x) // (rows * PROGRAMS))
    programs = -(-len(x) // (rows * times))
    return times, jax.ShapeDtypeStruct((programs, *shape), jnp.float32)


def _of_head(x, scale, kernel, targets, mask):
    # Whole lines of memory.
    padding = tiling.power_of_two(kernel.shape[1]) - kernel.shape[1]
    kernel = jnp.pad(kernel, ((0, 0), (0, padding)))
    return x, scale, kernel, targets.astype(jnp.int32), mask.astype(jnp.int8)


def _sums(name: str, x, width: int):
    """Of each program of a kernel, a row of float32."""
    return jax.ShapeDtypeStruct((-(-len(x) // CUTS[name].rows), width), jnp.float32)


def _launched(name: str, arrays, outs, x, *, o=None, eps: float = 0.0, **meta):
    cut, (N, D) = CUTS[name], x.shape
    meta |= {"N": N, "D": D, "BD": tiling.power_of_two(D), "EPSILON": eps, "ROWS": cut.rows}
    meta |= {"BF": cut.columns, "BW": cut.columns}
    if o is not None:
        meta |= {"H": o.shape[1], "V": o.shape[2]}
    if "V" in meta:
        meta["BV"] = tiling.power_of_two(meta["V"])
    outs = tuple(jax.ShapeDtypeStruct(out.shape, out.dtype) for out in outs)
    grid = (-(-N // (cut.rows * meta.get("TIMES", 1))),)
    return passes.call(name, arrays, outs, grid, cut.launch, meta=meta)
