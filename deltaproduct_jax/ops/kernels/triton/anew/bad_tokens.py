"""Where something is not finite, and numbers written there, in Triton. Letters as in kernels.py."""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.parts import forgets


@triton.jit
def _rows(base, rows, end, HEADS: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr):
    """Pointers to rows of one head of an array [rows, HEADS, WIDTH], and which of them are any."""
    columns = tl.arange(0, BW)
    pointers = base + rows[:, None].to(tl.int64) * (HEADS * WIDTH) + columns[None, :]
    return pointers, (rows < end)[:, None] & (columns < WIDTH)[None, :]


@triton.jit
def first_bad(
    base, begin, end, HEADS: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr,
    ARE_GATES: tl.constexpr = False,
):  # fmt: skip
    """The first row from ``begin`` on of which anything is not finite, or ``end``.

    Of gates -inf is not bad.
    """
    ROWS: tl.constexpr = 1024 // BW
    first = end
    for at in range(begin, end, ROWS):
        rows = at + tl.arange(0, ROWS)
        pointers, inside = _rows(base, rows, end, HEADS, WIDTH, BW)
        x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        if ARE_GATES:
            x = forgets(x)
        is_bad = tl.sum(x - x, axis=1) != 0.0
        first = tl.minimum(first, tl.min(tl.where(is_bad, rows, end), axis=0))
    return first


@triton.jit
def last_asking(base, begin, end, s, HEADS: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr):
    """The last row that is not finite, or from s on not 0; ``begin`` - 1 if there is none."""
    ROWS: tl.constexpr = 1024 // BW
    last = begin - 1
    for at in range(begin, end, ROWS):
        rows = at + tl.arange(0, ROWS)
        pointers, inside = _rows(base, rows, end, HEADS, WIDTH, BW)
        x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
        asks = tl.sum((x != 0.0).to(tl.int32), axis=1) > 0
        asks = (tl.sum(x - x, axis=1) != 0.0) | (asks & (rows >= s))
        last = tl.maximum(last, tl.max(tl.where(asks, rows, begin - 1), axis=0))
    return last


@triton.jit
def fill(base, begin, end, value, HEADS: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr):
    """Writes one number into rows."""
    ROWS: tl.constexpr = 1024 // BW
    for at in range(begin, end, ROWS):
        rows = at + tl.arange(0, ROWS)
        pointers, inside = _rows(base, rows, end, HEADS, WIDTH, BW)
        x = tl.zeros([ROWS, BW], tl.float32) + value
        tl.store(pointers, x.to(base.dtype.element_ty), mask=inside)


@triton.jit
def is_bad_or_not_zero(base, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr):
    """Whether anything of a state is not finite, and whether anything is not 0."""
    VALUES: tl.constexpr = 1024 // BK
    bad, some = 0.0, 0
    for at in range(0, V, VALUES):
        keys, columns = tl.arange(0, BK), at + tl.arange(0, VALUES)
        inside = (keys < K)[:, None] & (columns < V)[None, :]
        x = tl.load(base + keys[:, None] * V + columns[None, :], mask=inside, other=0.0)
        x = x.to(tl.float32)
        bad += tl.sum(tl.sum(x - x, axis=1), axis=0)
        some += tl.sum(tl.sum((x != 0.0).to(tl.int32), axis=1), axis=0)
    return bad != 0.0, some != 0


@triton.jit
def segment_start(resets, end, T: tl.constexpr, HAS_RESETS: tl.constexpr):
    """Where the segment begins of which the last token is the one before ``end``."""
    start = end * 0
    if HAS_RESETS:
        for at in range(0, end, 256):
            t = at + tl.arange(0, 256)
            is_start = tl.load(resets + t, mask=t < end, other=0) != 0
            start = tl.maximum(start, tl.max(tl.where(is_start, t, 0), axis=0))
    return start
