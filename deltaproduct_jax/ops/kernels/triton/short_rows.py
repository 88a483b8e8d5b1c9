"""Bodies of the GPU kernels of short rows, in Triton: products with what stands around them.

A row of at most 128 channels meets a whole matrix while it is in registers, so that nothing wider
than itself need be written. Arrays are [N, D] and contiguous; products are summed in float32.
"""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def short_mlp(
    x_ptr, more_ptr, reached_ptr, scale_ptr, first_ptr, down_ptr,
    z_ptr, mean_square_ptr, out_ptr,
    N: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
    ROWS: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """z + (silu(y gate) * (y up)) down, with y the norm of z = x + more.

    In rows that are reached, what is more is NaN. ``first`` is [D, 2 F], ``down`` [F, D].
    """
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BD)
    is_row, there = rows < N - first_row, columns < D
    inside = is_row[:, None] & there[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    dtype = out_ptr.dtype.element_ty
    x_ptr, more_ptr = x_ptr + first_row * D, more_ptr + first_row * D
    reached_ptr += first_row
    z_ptr, out_ptr = z_ptr + first_row * D, out_ptr + first_row * D
    mean_square_ptr += first_row
    x = tl.load(x_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    more = tl.load(more_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    reached = tl.load(reached_ptr + rows, mask=is_row, other=0) != 0
    z = (x + tl.where(reached[:, None] & inside, float("nan"), more)).to(dtype)
    tl.store(z_ptr + offsets, z, mask=inside)
    z = z.to(tl.float32)
    mean_square = tl.sum(z * z, axis=1) / D
    tl.store(mean_square_ptr + rows, mean_square, mask=is_row)
    scale = tl.load(scale_ptr + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    y = (z * tl.rsqrt(mean_square + EPSILON)[:, None] * scale).to(dtype)
    out = tl.zeros([ROWS, BD], tl.float32)
    for start in range(0, F, BF):
        wide = start + tl.arange(0, BF)
        of_first = first_ptr + columns[:, None] * (2 * F) + wide[None, :]
        within = there[:, None] & (wide < F)[None, :]
        gate = tl.dot(y, tl.load(of_first, mask=within, other=0.0))
        up = tl.dot(y, tl.load(of_first + F, mask=within, other=0.0))
        h = (gate * tl.sigmoid(gate) * up).to(dtype)
        of_down = down_ptr + wide[:, None] * D + columns[None, :]
        within = (wide < F)[:, None] & there[None, :]
        out = tl.dot(h, tl.load(of_down, mask=within, other=0.0), out)
    z = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    tl.store(out_ptr + offsets, (z + out).to(dtype), mask=inside)


@triton.jit
def short_mlp_back(
    z_ptr, mean_square_ptr, reached_ptr, scale_ptr, first_ptr, down_ptr, dout_ptr,
    dz_ptr, dscale_ptr, y_ptr, h_ptr, dhidden_ptr,
    N: tl.constexpr, D: tl.constexpr, F: tl.constexpr, BD: tl.constexpr, BF: tl.constexpr,
    ROWS: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Cotangents of z and of y first, and what those of first and down are products with.

    In rows that are reached a cotangent of z that is not 0 is NaN. A program says what its rows add
    to the cotangent of the scale.
    """
    program = tl.program_id(0).to(tl.int64)
    first_row = program * ROWS
    rows, columns = tl.arange(0, ROWS), tl.arange(0, BD)
    is_row, there = rows < N - first_row, columns < D
    inside = is_row[:, None] & there[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    dtype = dz_ptr.dtype.element_ty
    z_ptr, dout_ptr = z_ptr + first_row * D, dout_ptr + first_row * D
    dz_ptr, y_ptr = dz_ptr + first_row * D, y_ptr + first_row * D
    h_ptr, dhidden_ptr = h_ptr + first_row * F, dhidden_ptr + first_row * 2 * F
    mean_square_ptr, reached_ptr = mean_square_ptr + first_row, reached_ptr + first_row
    scale = tl.load(scale_ptr + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    mean_square = tl.load(mean_square_ptr + rows, mask=is_row, other=1.0)
    inverse = tl.rsqrt(mean_square + EPSILON)[:, None]
    z = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = (z * inverse * scale).to(dtype)
    tl.store(y_ptr + offsets, y, mask=inside)
    dout = tl.load(dout_ptr + offsets, mask=inside, other=0.0)
    dy = tl.zeros([ROWS, BD], tl.float32)
    for start in range(0, F, BF):
        wide = start + tl.arange(0, BF)
        of_first = first_ptr + columns[:, None] * (2 * F) + wide[None, :]
        within = there[:, None] & (wide < F)[None, :]
        of_gate = tl.load(of_first, mask=within, other=0.0)
        of_up = tl.load(of_first + F, mask=within, other=0.0)
        of_down = down_ptr + wide[:, None] * D + columns[None, :]
        of_down = tl.load(of_down, mask=(wide < F)[:, None] & there[None, :], other=0.0)
        gate, up = tl.dot(y, of_gate), tl.dot(y, of_up)
        dh = tl.dot(dout, tl.trans(of_down))
        s = tl.sigmoid(gate)
        silu = gate * s
        within = is_row[:, None] & (wide < F)[None, :]
        tl.store(h_ptr + rows[:, None] * F + wide[None, :], (silu * up).to(dtype), mask=within)
        dgate = (dh * up * (s + silu * (1 - s))).to(dtype)
        dup = (dh * silu).to(dtype)
        of_hidden = dhidden_ptr + rows[:, None] * (2 * F) + wide[None, :]
        tl.store(of_hidden, dgate, mask=within)
        tl.store(of_hidden + F, dup, mask=within)
        dy = tl.dot(dgate, tl.trans(of_gate), dy)
        dy = tl.dot(dup, tl.trans(of_up), dy)
    unit = tl.load(z_ptr + offsets, mask=inside, other=0.0).to(tl.float32) * inverse
    tl.store(dscale_ptr + program * D + columns, tl.sum(dy * unit, axis=0), mask=there)
    dunit = dy * scale
    along = tl.sum(dunit * unit, axis=1, keep_dims=True) / D
    dz = inverse * (dunit - unit * along)
    dz = (dz + tl.load(dout_ptr + offsets, mask=inside, other=0.0).to(tl.float32)).to(dtype)
    reached = tl.load(reached_ptr + rows, mask=is_row, other=0) != 0
    dz = tl.where(reached[:, None] & (dz != 0), float("nan"), dz).to(dtype)
    tl.store(dz_ptr + offsets, dz, mask=inside)


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
def short_head(
    x_ptr, scale_ptr, kernel_ptr, targets_ptr, mask_ptr,
    log_sum_ptr, of_target_ptr, correct_ptr,
    N: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    ROWS: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """What `logit_sums` finds of the logits that a norm and ``kernel`` [D, BV] make of rows."""
    first_row = tl.program_id(0).to(tl.int64) * ROWS
    rows, columns, ids = tl.arange(0, ROWS), tl.arange(0, BD), tl.arange(0, BV)
    is_row, there, is_id = rows < N - first_row, columns < D, (ids < V)[None, :]
    places = columns[:, None] * BV + ids[None, :]
    kernel = tl.load(kernel_ptr + places, mask=there[:, None], other=0.0)
    scale = tl.load(scale_ptr + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    offsets, inside = rows[:, None] * D + columns[None, :], is_row[:, None] & there[None, :]
    x = tl.load(x_ptr + first_row * D + offsets, mask=inside, other=0.0).to(tl.float32)
    dtype = x_ptr.dtype.element_ty
    inverse = tl.rsqrt(tl.sum(x * x, axis=1) / D + EPSILON)[:, None]
    logits = tl.dot((x * inverse * scale).to(dtype), kernel).to(dtype).to(tl.float32)
    targets = tl.load(targets_ptr + first_row + rows, mask=is_row, other=0)
    targets = tl.where(targets < 0, targets + V, targets)
    known = (targets >= 0) & (targets < V)
    of_target = tl.sum(tl.where(ids[None, :] == targets[:, None], logits, 0.0), axis=1)
    of_target = tl.where(known, of_target, float("nan"))
    before = (ids[None, :] < targets[:, None]) & (logits == of_target[:, None])
    wrong = tl.where(((logits > of_target[:, None]) | before) & is_id, 1, 0)
    wrong = tl.max(wrong, axis=1)
    highest = tl.max(tl.where(is_id, logits, float("-inf")), axis=1)
    # Of an infinite highest logit the difference would be NaN.
    shift = tl.where(tl.abs(highest) < float("inf"), highest, 0.0)
    summed = tl.where(is_id, tl.exp2((logits - shift[:, None]) * LOG2_E), 0.0)
    total = tl.sum(summed, axis=1)
    wrong = tl.where((total == total) & (of_target == of_target), wrong, 1)  # NaN is no answer
    counted = tl.load(mask_ptr + first_row + rows, mask=is_row, other=0) != 0
    log_sum = tl.where(counted, shift + tl.log(total), tl.log(V * 1.0))
    tl.store(log_sum_ptr + first_row + rows, log_sum, mask=is_row)
    tl.store(of_target_ptr + first_row + rows, tl.where(counted, of_target, 0.0), mask=is_row)
    right = tl.where(wrong == 0, 1, 0).to(tl.int8)
    tl.store(correct_ptr + first_row + rows, right, mask=is_row)


@triton.jit
def short_head_back(
    x_ptr, scale_ptr, kernel_ptr, targets_ptr, mask_ptr, log_sum_ptr, dlog_sum_ptr, dof_target_ptr,
    dx_ptr, dkernel_ptr,
    N: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    ROWS: tl.constexpr, TIMES: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Cotangents of rows, and what a program's rows of length one add to that of ``kernel``.

    A program has TIMES times ROWS rows.
    """
    program = tl.program_id(0).to(tl.int64)
    rows, columns, ids = tl.arange(0, ROWS), tl.arange(0, BD), tl.arange(0, BV)
    there, is_id = columns < D, (ids < V)[None, :]
    places = columns[:, None] * BV + ids[None, :]
    kernel = tl.load(kernel_ptr + places, mask=there[:, None], other=0.0)
    scale = tl.load(scale_ptr + columns, mask=there, other=0.0).to(tl.float32)[None, :]
    offsets = rows[:, None] * D + columns[None, :]
    dtype = x_ptr.dtype.element_ty
    dkernel = tl.zeros([BD, BV], tl.float32)
    for time in range(0, TIMES):
        first_row = (program * TIMES + time) * ROWS
        is_row = rows < N - first_row
        inside = is_row[:, None] & there[None, :]
        x = tl.load(x_ptr + first_row * D + offsets, mask=inside, other=0.0)
        wide = x.to(tl.float32)
        inverse = tl.rsqrt(tl.sum(wide * wide, axis=1) / D + EPSILON)[:, None]
        unit = wide * inverse
        logits = tl.dot((unit * scale).to(dtype), kernel).to(dtype).to(tl.float32)
        targets = tl.load(targets_ptr + first_row + rows, mask=is_row, other=0)
        targets = tl.where(targets < 0, targets + V, targets)
        log_sum = tl.load(log_sum_ptr + first_row + rows, mask=is_row, other=0.0)
        dlog_sum = tl.load(dlog_sum_ptr + first_row + rows, mask=is_row, other=0.0)
        dof_target = tl.load(dof_target_ptr + first_row + rows, mask=is_row, other=0.0)
        counted = tl.load(mask_ptr + first_row + rows, mask=is_row, other=0) != 0
        dlogits = tl.exp2((logits - log_sum[:, None]) * LOG2_E) * dlog_sum[:, None]
        dlogits += tl.where(ids[None, :] == targets[:, None], dof_target[:, None], 0.0)
        dlogits = tl.where(counted[:, None] & is_id, dlogits, 0.0).to(dtype)
        dkernel = tl.dot(tl.trans(unit.to(dtype)), dlogits, dkernel)
        dunit = tl.dot(dlogits, tl.trans(kernel)) * scale
        unit = x.to(tl.float32) * inverse
        along = tl.sum(dunit * unit, axis=1, keep_dims=True) / D
        dx = (inverse * (dunit - unit * along)).to(dtype)
        tl.store(dx_ptr + first_row * D + offsets, dx, mask=inside)
    tl.store(dkernel_ptr + program * D * BV + places, dkernel, mask=there[:, None])


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


@triton.jit
def short_lookup_back(
    ids_ptr, dx_ptr,
    dtable_ptr,
    N: tl.constexpr, D: tl.constexpr, V: tl.constexpr, BD: tl.constexpr, BV: tl.constexpr,
    ROWS: tl.constexpr, TIMES: tl.constexpr,
):  # fmt: skip
    """What a program's rows, TIMES times ROWS, add to the rows of a table [V, D] that ids name."""
    program = tl.program_id(0).to(tl.int64)
    rows, columns, known = tl.arange(0, ROWS), tl.arange(0, BD), tl.arange(0, BV)
    there = columns < D
    offsets = rows[:, None] * D + columns[None, :]
    dtype = dx_ptr.dtype.element_ty
    dtable = tl.zeros([BV, BD], tl.float32)
    for time in range(0, TIMES):
        first_row = (program * TIMES + time) * ROWS
        is_row = rows < N - first_row
        ids = tl.load(ids_ptr + first_row + rows, mask=is_row, other=-1)
        inside = is_row[:, None] & there[None, :]
        dx = tl.load(dx_ptr + first_row * D + offsets, mask=inside, other=0.0)
        dtable = tl.dot((known[:, None] == ids[None, :]).to(dtype), dx, dtable)
    places = known[:, None] * D + columns[None, :]
    inside = (known < V)[:, None] & there[None, :]
    tl.store(dtable_ptr + program * V * D + places, dtable, mask=inside)
