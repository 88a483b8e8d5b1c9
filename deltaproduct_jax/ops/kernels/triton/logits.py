"""Bodies of the GPU kernels of what a cross entropy reads logits for, in Triton."""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.ids import program_ids

LOG2_E = tl.constexpr(1.4426950408889634)


@triton.jit
def logit_sums(
    logits_ptr, targets_ptr, mask_ptr,
    log_sum_ptr, of_target_ptr, correct_ptr,
    V: tl.constexpr, BV: tl.constexpr,
):  # fmt: skip
    """Of a row of logits [N, V] the logarithm of the sum of exponentials, the target's logit, and
    whether that is the first of the largest.

    Read once: the sum is scaled anew wherever a larger logit comes by. Rows that are masked count
    as zeros.
    """
    row = tl.program_id(0).to(tl.int64)
    base = logits_ptr + row * V
    target = tl.load(targets_ptr + row)
    target = tl.where(target < 0, target + V, target)
    known = (target >= 0) & (target < V)
    of_target = tl.load(base + target, mask=known, other=float("nan")).to(tl.float32)
    highest, shift, total, wrong = float("-inf"), 0.0, 0.0, 0
    for start in range(0, V, BV):
        ids = start + tl.arange(0, BV)
        x = tl.load(base + ids, mask=ids < V, other=float("-inf")).to(tl.float32)
        here = tl.max(x, axis=0)
        if here == of_target:  # seldom: then it matters who comes first
            first = tl.min(tl.where((x == here) & (ids < V), ids, V), axis=0)
            wrong = tl.where(first < target, 1, wrong)
        wrong = tl.where(here > of_target, 1, wrong)
        before, is_first = shift, highest == float("-inf")
        highest = tl.maximum(highest, here)
        # Of an infinite highest logit the difference would be NaN.
        shift = tl.where(tl.abs(highest) < float("inf"), highest, 0.0)
        total *= tl.where(is_first, 0.0, tl.exp(before - shift))
        total += tl.sum(tl.exp2(x * LOG2_E - shift * LOG2_E), axis=0)
    wrong = tl.where((total == total) & (of_target == of_target), wrong, 1)  # NaN is no answer
    counted = tl.load(mask_ptr + row) != 0
    log_sum = tl.where(counted, shift + tl.log(total), tl.log(V * 1.0))
    tl.store(log_sum_ptr + row, log_sum)
    tl.store(of_target_ptr + row, tl.where(counted, of_target, 0.0))
    tl.store(correct_ptr + row, tl.where(wrong == 0, 1, 0).to(tl.int8))


@triton.jit
def logit_back(
    logits_ptr, targets_ptr, mask_ptr, log_sum_ptr, dlog_sum_ptr, dof_target_ptr,
    dlogits_ptr,
    V: tl.constexpr, BV: tl.constexpr, GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """The cotangent of logits [N, V], 0 in rows that are masked."""
    part, row, _ = program_ids(GX, GY)
    row, ids = row.to(tl.int64), part * BV + tl.arange(0, BV)
    target = tl.load(targets_ptr + row)
    target = tl.where(target < 0, target + V, target)
    x = tl.load(logits_ptr + row * V + ids, mask=ids < V, other=0.0).to(tl.float32)
    probabilities = tl.exp2((x - tl.load(log_sum_ptr + row)) * LOG2_E)
    dx = probabilities * tl.load(dlog_sum_ptr + row)
    dx += tl.where(ids == target, tl.load(dof_target_ptr + row), 0.0)
    dx = tl.where(tl.load(mask_ptr + row) != 0, dx, 0.0)
    tl.store(dlogits_ptr + row * V + ids, dx.to(dlogits_ptr.dtype.element_ty), mask=ids < V)
