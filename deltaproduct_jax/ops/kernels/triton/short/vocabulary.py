"""Bodies of the kernels of both ends of a model of short rows, head and embedding, in Triton."""

import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


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
