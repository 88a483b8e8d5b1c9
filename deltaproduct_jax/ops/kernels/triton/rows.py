"""Bodies of the GPU kernels of a block outside its mixer, in Triton: norms of rows, and SwiGLU.

A norm and its cotangents want sums over a row before they can be written, and XLA reads everything
twice for it. Arrays are [N, D] and contiguous.
"""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.ids import program_ids


@triton.jit
def norm_forward(
    x_ptr, more_ptr, reached_ptr, scale_ptr,
    sum_ptr, y_ptr, mean_square_ptr, bad_ptr,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
    EPSILON: tl.constexpr, ADDS: tl.constexpr, LOOKS: tl.constexpr,
):  # fmt: skip
    """The norm of a row and its mean square.

    If it ADDS of the sum of x and of what is more, NaN in rows that are reached, and that sum too.
    If it LOOKS what is not finite becomes 0, and bad tells of the row.
    """
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BD)
    there = columns < D
    inside = (rows < N)[:, None] & there[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    dtype = y_ptr.dtype.element_ty
    scale = tl.load(scale_ptr + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if ADDS:
        more = tl.load(more_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        reached = tl.load(reached_ptr + rows, mask=rows < N, other=0) != 0
        more = tl.where(reached[:, None] & inside, float("nan"), more)
        x = (x + more).to(dtype)
        tl.store(sum_ptr + offsets, x, mask=inside)
        x = x.to(tl.float32)
    mean_square = tl.sum(x * x, axis=1) / D
    tl.store(mean_square_ptr + rows, mean_square, mask=rows < N)
    y = (x * tl.rsqrt(mean_square + EPSILON)[:, None] * scale).to(dtype)
    if LOOKS:
        wrong = tl.where(is_finite(y), 0, 1)
        y = tl.where(wrong != 0, 0.0, y).to(dtype)
        tl.store(bad_ptr + rows, tl.max(wrong, axis=1).to(tl.int8), mask=rows < N)
    tl.store(y_ptr + offsets, y, mask=inside)


@triton.jit
def is_finite(x):
    """False for NaN too."""
    return tl.abs(x.to(tl.float32)) < float("inf")


@triton.jit
def norm_back(
    x_ptr, mean_square_ptr, scale_ptr, dy_ptr, dx_after_ptr, reached_ptr,
    dx_ptr, dscale_ptr, y_ptr,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, TIMES: tl.constexpr,
    EPSILON: tl.constexpr, AGAIN: tl.constexpr, FORKED: tl.constexpr, HAS_REACHED: tl.constexpr,
):  # fmt: skip
    """Cotangent of x: that of the norm, and if FORKED that of what else reads x.

    In rows that are reached what is not 0 is NaN. The norm again if AGAIN. A program has TIMES
    times ROWS rows, and says what they add to the cotangent of the scale.
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    there = columns < D
    scale = tl.load(scale_ptr + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    dscale = tl.zeros([ROWS, BD], tl.float32)
    rows = program * TIMES * ROWS + tl.arange(0, ROWS)
    offsets = rows[:, None] * D + columns[None, :]
    inside = (rows < N)[:, None] & there[None, :]
    next_x = tl.load(x_ptr + offsets, mask=inside, other=0.0)
    next_dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0)
    next_after = next_x
    if FORKED:
        next_after = tl.load(dx_after_ptr + offsets, mask=inside, other=0.0)
    for time in range(0, TIMES):
        x, dy, after = next_x.to(tl.float32), next_dy.to(tl.float32), next_after.to(tl.float32)
        # What comes next is under way meanwhile.
        ahead = (rows + ROWS < N)[:, None] & there[None, :] & (time + 1 < TIMES)
        ahead_offsets = offsets + ROWS * D
        next_x = tl.load(x_ptr + ahead_offsets, mask=ahead, other=0.0)
        next_dy = tl.load(dy_ptr + ahead_offsets, mask=ahead, other=0.0)
        if FORKED:
            next_after = tl.load(dx_after_ptr + ahead_offsets, mask=ahead, other=0.0)
        inside = (rows < N)[:, None] & there[None, :]
        mean_square = tl.load(mean_square_ptr + rows, mask=rows < N, other=1.0)
        inverse = tl.rsqrt(mean_square + EPSILON)[:, None]
        unit = x * inverse
        dscale += dy * unit
        if AGAIN:
            tl.store(y_ptr + offsets, (unit * scale).to(y_ptr.dtype.element_ty), mask=inside)
        dunit = dy * scale
        along = tl.sum(dunit * unit, axis=1, keep_dims=True) / D
        dx = inverse * (dunit - unit * along)
        if FORKED:
            dx += after
        dx = dx.to(dx_ptr.dtype.element_ty)
        if HAS_REACHED:
            reached = tl.load(reached_ptr + rows, mask=rows < N, other=0) != 0
            dx = tl.where(reached[:, None] & (dx != 0), float("nan"), dx).to(dx.dtype)
        tl.store(dx_ptr + offsets, dx, mask=inside)
        offsets = ahead_offsets
        rows += ROWS
    tl.store(dscale_ptr + program * D + columns, tl.sum(dscale, axis=0), mask=there)


@triton.jit
def swiglu(
    hidden_ptr,
    h_ptr,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
    GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """silu(first half) * second half of ``hidden`` [N, 2 D]."""
    one, first, inside = halves(N, D, BD, ROWS, GX, GY)
    gate = tl.load(hidden_ptr + first, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden_ptr + first + D, mask=inside, other=0.0).to(tl.float32)
    h = gate * tl.sigmoid(gate) * up
    tl.store(h_ptr + one, h.to(h_ptr.dtype.element_ty), mask=inside)


@triton.jit
def swiglu_back(
    hidden_ptr, dh_ptr,
    dhidden_ptr, h_ptr,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, AGAIN: tl.constexpr,
    GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """Cotangents of both halves of ``hidden`` [N, 2 D]; what `swiglu` makes again if AGAIN."""
    one, first, inside = halves(N, D, BD, ROWS, GX, GY)
    gate = tl.load(hidden_ptr + first, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden_ptr + first + D, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + one, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    dtype = dhidden_ptr.dtype.element_ty
    if AGAIN:
        tl.store(h_ptr + one, (silu * up).to(dtype), mask=inside)
    tl.store(dhidden_ptr + first + D, (dh * silu).to(dtype), mask=inside)
    dgate = dh * up * (s * (1 + gate * (1 - s)))
    tl.store(dhidden_ptr + first, dgate.to(dtype), mask=inside)


@triton.jit
def halves(
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, GX: tl.constexpr,
    GY: tl.constexpr,
):  # fmt: skip
    """Where a program's numbers stand in rows of D, and in the first halves of rows of 2 D."""
    program, part, _ = program_ids(GX, GY)
    rows = program.to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = part * BD + tl.arange(0, BD)
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    one = rows[:, None] * D + columns[None, :]
    return one, rows[:, None] * (2 * D) + columns[None, :], inside
