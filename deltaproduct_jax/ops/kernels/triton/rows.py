"""Bodies of the GPU kernels of a block's way back, in Triton: a norm of rows, and SwiGLU.

A norm's cotangents want sums over a row before they can be written, and XLA reads everything twice
for it. Arrays are [N, D] and contiguous.
"""

import triton
import triton.language as tl


@triton.jit
def norm_back(
    x_ptr, mean_square_ptr, scale_ptr, dy_ptr, dx_after_ptr,
    dx_ptr, dscale_ptr, y_ptr,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr, TIMES: tl.constexpr,
    EPSILON: tl.constexpr, AGAIN: tl.constexpr,
):  # fmt: skip
    """Cotangent of x: that of what else reads it and that of the norm; the norm again if AGAIN.

    A program has TIMES times ROWS rows, and says what they add to the cotangent of the scale.
    """
    program = tl.program_id(0).to(tl.int64)
    columns = tl.arange(0, BD)
    there = columns < D
    scale = tl.load(scale_ptr + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    dscale = tl.zeros([ROWS, BD], tl.float32)
    for time in range(0, TIMES):
        rows = (program * TIMES + time) * ROWS + tl.arange(0, ROWS)
        inside = (rows < N)[:, None] & there[None, :]
        offsets = rows[:, None] * D + columns[None, :]
        x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        after = tl.load(dx_after_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
        mean_square = tl.load(mean_square_ptr + rows, mask=rows < N, other=1.0)
        inverse = tl.rsqrt(mean_square + EPSILON)[:, None]
        unit = x * inverse
        dscale += dy * unit
        if AGAIN:
            tl.store(y_ptr + offsets, (unit * scale).to(y_ptr.dtype.element_ty), mask=inside)
        dunit = dy * scale
        along = tl.sum(dunit * unit, axis=1, keep_dims=True) / D
        dx = after + inverse * (dunit - unit * along)
        tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)
    tl.store(dscale_ptr + program * D + columns, tl.sum(dscale, axis=0), mask=there)


@triton.jit
def swiglu_back(
    hidden_ptr, dh_ptr,
    dhidden_ptr, h_ptr,
    N: tl.constexpr, D: tl.constexpr, BD: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """Cotangents of both halves of ``hidden`` [N, 2 D], and silu(first) * second [N, D] again."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.program_id(1) * BD + tl.arange(0, BD)
    inside = (rows < N)[:, None] & (columns < D)[None, :]
    one = rows[:, None] * D + columns[None, :]
    first = rows[:, None] * (2 * D) + columns[None, :]
    gate = tl.load(hidden_ptr + first, mask=inside, other=0.0).to(tl.float32)
    up = tl.load(hidden_ptr + first + D, mask=inside, other=0.0).to(tl.float32)
    dh = tl.load(dh_ptr + one, mask=inside, other=0.0).to(tl.float32)
    s = tl.sigmoid(gate)
    silu = gate * s
    dtype = dhidden_ptr.dtype.element_ty
    tl.store(h_ptr + one, (silu * up).to(dtype), mask=inside)
    tl.store(dhidden_ptr + first + D, (dh * silu).to(dtype), mask=inside)
    dgate = dh * up * (s * (1 + gate * (1 - s)))
    tl.store(dhidden_ptr + first, dgate.to(dtype), mask=inside)
