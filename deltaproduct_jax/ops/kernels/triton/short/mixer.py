"""Bodies of the kernels of what stands around a mixer's op of short rows, in Triton."""

import triton
import triton.language as tl


@triton.jit
def short_output(
    o_ptr, scale_ptr, kernel_ptr,
    out_ptr,
    N: tl.constexpr, H: tl.constexpr, V: tl.constexpr, D: tl.constexpr, BV: tl.constexpr,
    BD: tl.constexpr, ROWS: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """The product of the norms of heads, o [N, H, V], with ``kernel`` [H V, D]."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    rows, values, columns = tl.arange(0, ROWS), tl.arange(0, BV), tl.arange(0, BD)
    is_row, is_value, there = rows < N - first_row, values < V, columns < D
    dtype = out_ptr.dtype.element_ty
    scale = tl.load(scale_ptr + values, mask=is_value, other=0.0).to(tl.float32)[None, :]
    of_o = o_ptr + first_row * H * V + rows[:, None] * (H * V) + values[None, :]
    of_kernel = kernel_ptr + values[:, None] * D + columns[None, :]
    out = tl.zeros([ROWS, BD], tl.float32)
    for head in range(0, H):
        inside = is_row[:, None] & is_value[None, :]
        o = tl.load(of_o + head * V, mask=inside, other=0.0).to(tl.float32)
        inside = is_value[:, None] & there[None, :]
        kernel = tl.load(of_kernel + head * V * D, mask=inside, other=0.0)
        inverse = tl.rsqrt(tl.sum(o * o, axis=1) / V + EPSILON)[:, None]
        out = tl.dot((o * inverse * scale).to(dtype), kernel, out)
    offsets, inside = rows[:, None] * D + columns[None, :], is_row[:, None] & there[None, :]
    tl.store(out_ptr + first_row * D + offsets, out.to(dtype), mask=inside)


@triton.jit
def short_output_back(
    o_ptr, scale_ptr, kernel_ptr, dout_ptr,
    do_ptr, dscale_ptr, y_ptr,
    N: tl.constexpr, H: tl.constexpr, V: tl.constexpr, D: tl.constexpr, BV: tl.constexpr,
    BD: tl.constexpr, ROWS: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Cotangents of o and of the scale, the latter of a program's rows, and the norms again."""
    program = tl.program_id(0).to(tl.int64)
    first_row = program * ROWS
    rows, values, columns = tl.arange(0, ROWS), tl.arange(0, BV), tl.arange(0, BD)
    is_row, is_value, there = rows < N - first_row, values < V, columns < D
    dtype = do_ptr.dtype.element_ty
    scale = tl.load(scale_ptr + values, mask=is_value, other=0.0).to(tl.float32)[None, :]
    offsets, inside = rows[:, None] * D + columns[None, :], is_row[:, None] & there[None, :]
    dout = tl.load(dout_ptr + first_row * D + offsets, mask=inside, other=0.0)
    offsets, inside = rows[:, None] * (H * V) + values[None, :], is_row[:, None] & is_value[None, :]
    of_o = o_ptr + first_row * H * V + offsets
    of_do, of_y = do_ptr + first_row * H * V + offsets, y_ptr + first_row * H * V + offsets
    of_kernel = kernel_ptr + values[:, None] * D + columns[None, :]
    dscale = tl.zeros([ROWS, BV], tl.float32)
    for head in range(0, H):
        o = tl.load(of_o + head * V, mask=inside, other=0.0).to(tl.float32)
        within = is_value[:, None] & there[None, :]
        kernel = tl.load(of_kernel + head * V * D, mask=within, other=0.0)
        inverse = tl.rsqrt(tl.sum(o * o, axis=1) / V + EPSILON)[:, None]
        unit = o * inverse
        tl.store(of_y + head * V, (unit * scale).to(dtype), mask=inside)
        dy = tl.dot(dout, tl.trans(kernel))
        dscale += dy * unit
        dunit = dy * scale
        along = tl.sum(dunit * unit, axis=1, keep_dims=True) / V
        do = inverse * (dunit - unit * along)
        tl.store(of_do + head * V, do.to(dtype), mask=inside)
    tl.store(dscale_ptr + program * V + values, tl.sum(dscale, axis=0), mask=is_value)


@triton.jit
def short_inputs_back(
    dq_ptr, dk_ptr, dv_ptr, db_ptr, of_q_ptr, of_k_ptr, of_v_ptr, of_b_ptr,
    dx_ptr,
    N: tl.constexpr, D: tl.constexpr, Q: tl.constexpr, K: tl.constexpr, V: tl.constexpr,
    B: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """The cotangent of rows that four matrices, [D, Q], [D, K], [D, V] and [D, B], were read by."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BD)
    is_row, there = rows < N - first_row, columns < D
    dx = tl.zeros([ROWS, BD], tl.float32)
    dx = added_product(dx, dk_ptr + first_row * K, of_k_ptr, is_row, D, K, BD, BW, ROWS)
    dx = added_product(dx, dv_ptr + first_row * V, of_v_ptr, is_row, D, V, BD, BW, ROWS)
    dx = added_product(dx, dq_ptr + first_row * Q, of_q_ptr, is_row, D, Q, BD, BW, ROWS)
    dx = added_product(dx, db_ptr + first_row * B, of_b_ptr, is_row, D, B, BD, BW, ROWS)
    offsets, inside = rows[:, None] * D + columns[None, :], is_row[:, None] & there[None, :]
    dx_ptr += first_row * D
    tl.store(dx_ptr + offsets, dx.to(dx_ptr.dtype.element_ty), mask=inside)


@triton.jit
def added_product(
    total, dy_ptr, kernel_ptr, is_row,
    D: tl.constexpr, W: tl.constexpr, BD: tl.constexpr, BW: tl.constexpr, ROWS: tl.constexpr,
):  # fmt: skip
    """``total`` and dy [ROWS, W] times the transposed matrix [D, W]."""
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BD)
    for start in range(0, W, BW):
        wide = start + tl.arange(0, BW)
        within = is_row[:, None] & (wide < W)[None, :]
        dy = tl.load(dy_ptr + rows[:, None] * W + wide[None, :], mask=within, other=0.0)
        within = (columns < D)[:, None] & (wide < W)[None, :]
        kernel = tl.load(kernel_ptr + columns[:, None] * W + wide[None, :], mask=within, other=0.0)
        total = tl.dot(dy, tl.trans(kernel), total)
    return total
