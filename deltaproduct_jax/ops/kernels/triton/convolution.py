"""Bodies of the GPU kernels of short convolutions, in Triton: SiLU and unit length with them.

A program walks along PIECE tokens of one sequence with a tile of channels, ROWS groups of WIDTH,
and keeps the last inputs in registers, so that every input is read from memory once, but for the
W - 1 tokens in front of a piece and, on the way back, behind it. W is 2 to 4: what is kept of
the tokens before has names, x1 of the last, x2 and x3 of those before it. Two tokens are under way
from memory, which Triton's own pipeline refuses to do for values that outlive two turns. A tap
whose token belongs to another segment counts as zero.

Arrays are [B, T, C] and contiguous; ``before`` is [B, W - 1, C], the taps are [G, W, C] in float32,
one set for every B / G sequences. ``run`` and ``past`` hold the numbers of segments [B, T] and
[B, W - 1].
"""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.ids import program_ids

# Tokens of a turn of a loop: what is kept of those before then moves from name to name for free.
AT_ONCE = tl.constexpr(4)
# 1 / (1 + exp(-x)) in four instructions, exact to some units in the last place; the compiler's own
# division, which keeps what is nearly 0 or infinite, takes three times as many.
SIGMOID = tl.constexpr(
    "{.reg .f32 e; mul.f32 e, $1, 0fBFB8AA3B; ex2.approx.ftz.f32 e, e; "
    "add.f32 e, e, 0f3F800000; rcp.approx.ftz.f32 $0, e;}"
)


@triton.jit
def convolve(
    u_ptr, before_ptr, taps_ptr, run_ptr, past_ptr,
    y_ptr,
    B: tl.constexpr, T: tl.constexpr, C: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, PIECE: tl.constexpr,
    SILU: tl.constexpr, UNIT: tl.constexpr, EPSILON: tl.constexpr, HAS_RUN: tl.constexpr,
    GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """act(sum of taps), divided by its length over every WIDTH channels if UNIT: y [B, T, C]."""
    walk(
        u_ptr, before_ptr, taps_ptr, run_ptr, past_ptr, y_ptr,
        0, C, B, T, C, C, G, W, ROWS, WIDTH, BW, PIECE, SILU, UNIT, EPSILON, HAS_RUN, GX, GY,
    )  # fmt: skip


@triton.jit
def convolve_parts(
    u_ptr, before_ptr, taps_ptr, run_ptr, past_ptr,
    q_ptr, k_ptr, v_ptr,
    B: tl.constexpr, T: tl.constexpr, C: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, PIECE: tl.constexpr,
    SILU: tl.constexpr, EPSILON: tl.constexpr, HAS_RUN: tl.constexpr,
    CU: tl.constexpr, CQ: tl.constexpr, CK: tl.constexpr,
    GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """The same of what lies side by side in a token of CU numbers, into an array for each of three.

    The first CQ + CK of C channels are divided by their lengths; the last have SiLU always.
    """
    program, _, _ = program_ids(GX, GY)
    first = program * (ROWS * WIDTH)
    if first < CQ:
        walk(
            u_ptr, before_ptr, taps_ptr, run_ptr, past_ptr, q_ptr,
            0, CQ, B, T, C, CU, G, W, ROWS, WIDTH, BW, PIECE, SILU, True, EPSILON, HAS_RUN, GX, GY,
        )  # fmt: skip
    elif first < CQ + CK:
        walk(
            u_ptr, before_ptr, taps_ptr, run_ptr, past_ptr, k_ptr,
            CQ, CK, B, T, C, CU, G, W, ROWS, WIDTH, BW, PIECE, SILU, True, EPSILON, HAS_RUN, GX, GY,
        )  # fmt: skip
    else:
        walk(
            u_ptr, before_ptr, taps_ptr, run_ptr, past_ptr, v_ptr,
            CQ + CK, C - CQ - CK, B, T, C, CU, G, W, ROWS, WIDTH, BW, PIECE, True, False, EPSILON,
            HAS_RUN, GX, GY,
        )  # fmt: skip


@triton.jit
def walk(
    u_ptr, before_ptr, taps_ptr, run_ptr, past_ptr, y_ptr,
    FIRST: tl.constexpr, CY: tl.constexpr,
    B: tl.constexpr, T: tl.constexpr, C: tl.constexpr, CU: tl.constexpr, G: tl.constexpr,
    W: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr,
    PIECE: tl.constexpr, SILU: tl.constexpr, UNIT: tl.constexpr, EPSILON: tl.constexpr,
    HAS_RUN: tl.constexpr, GX: tl.constexpr, GY: tl.constexpr,
):  # fmt: skip
    """A piece of some channels; y has CY of them, from number FIRST on."""
    program, piece, b = program_ids(GX, GY)
    b = b.to(tl.int64)
    start = piece * PIECE
    offsets, inside = channels(program, C, ROWS, WIDTH, BW)
    k0, k1, k2, k3 = taps(taps_ptr, b, offsets, inside, B, C, G, W)
    x1, x2, x3, r1, r2, r3 = earlier(
        u_ptr, before_ptr, run_ptr, past_ptr, b, start, offsets, inside, T, C, CU, W, HAS_RUN
    )
    next0 = token(u_ptr, b, start, offsets, inside, T, CU)
    next1 = token(u_ptr, b, start + 1, offsets, inside, T, CU)
    next2 = token(u_ptr, b, start + 2, offsets, inside, T, CU)
    next3 = token(u_ptr, b, start + 3, offsets, inside, T, CU)
    for group in range(0, PIECE, AT_ONCE):
        for i in tl.static_range(AT_ONCE):
            t = start + group + i
            x0 = next0.to(tl.float32)
            next0, next1, next2 = next1, next2, next3
            next3 = token(u_ptr, b, t + 4, offsets, inside, T, CU)
            r0 = number(run_ptr, b, t, r1, T, HAS_RUN)
            y = summed(x0, x1, x2, x3, k0, k1, k2, k3, r0, r1, r2, r3, W, HAS_RUN)
            if SILU:
                y = y * sigmoid(y)
            if UNIT:
                y *= tl.rsqrt(tl.sum(y * y, axis=1, keep_dims=True) + EPSILON)
            pointers = y_ptr + (b * T + t) * CY + (offsets - FIRST)
            tl.store(pointers, y.to(y_ptr.dtype.element_ty), mask=inside & (t < T))
            x3, x2, x1 = x2, x1, x0
            r3, r2, r1 = r2, r1, r0


@triton.jit
def convolve_back(
    u_ptr, before_ptr, taps_ptr, run_ptr, past_ptr, dy_ptr,
    du_ptr, dbefore_ptr, dtaps_ptr,
    B: tl.constexpr, T: tl.constexpr, C: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, PIECE: tl.constexpr,
    SILU: tl.constexpr, UNIT: tl.constexpr, EPSILON: tl.constexpr, HAS_RUN: tl.constexpr,
    GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """Cotangents of u and before, and what the tokens of a piece add to those of the taps."""
    walk_back(
        u_ptr, before_ptr, taps_ptr, run_ptr, past_ptr, dy_ptr, du_ptr, dbefore_ptr, dtaps_ptr,
        0, C, B, T, C, C, G, W, ROWS, WIDTH, BW, PIECE, SILU, UNIT, EPSILON, HAS_RUN, GX, GY,
    )  # fmt: skip


@triton.jit
def convolve_parts_back(
    u_ptr, before_ptr, taps_ptr, run_ptr, past_ptr, dq_ptr, dk_ptr, dv_ptr, drest_ptr,
    du_ptr, dbefore_ptr, dtaps_ptr,
    B: tl.constexpr, T: tl.constexpr, C: tl.constexpr, G: tl.constexpr, W: tl.constexpr,
    ROWS: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, PIECE: tl.constexpr,
    SILU: tl.constexpr, EPSILON: tl.constexpr, HAS_RUN: tl.constexpr,
    CU: tl.constexpr, CQ: tl.constexpr, CK: tl.constexpr, BREST: tl.constexpr,
    GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """The same for `convolve_parts`; what stands behind the C channels is copied to its place."""
    program, piece, b = program_ids(GX, GY)
    first = program * (ROWS * WIDTH)
    if first < CQ:
        walk_back(
            u_ptr, before_ptr, taps_ptr, run_ptr, past_ptr, dq_ptr, du_ptr, dbefore_ptr, dtaps_ptr,
            0, CQ, B, T, C, CU, G, W, ROWS, WIDTH, BW, PIECE, SILU, True, EPSILON, HAS_RUN, GX, GY,
        )  # fmt: skip
    elif first < CQ + CK:
        walk_back(
            u_ptr, before_ptr, taps_ptr, run_ptr, past_ptr, dk_ptr, du_ptr, dbefore_ptr, dtaps_ptr,
            CQ, CK, B, T, C, CU, G, W, ROWS, WIDTH, BW, PIECE, SILU, True, EPSILON, HAS_RUN, GX, GY,
        )  # fmt: skip
    elif first < C:
        walk_back(
            u_ptr, before_ptr, taps_ptr, run_ptr, past_ptr, dv_ptr, du_ptr, dbefore_ptr, dtaps_ptr,
            CQ + CK, C - CQ - CK, B, T, C, CU, G, W, ROWS, WIDTH, BW, PIECE, True, False, EPSILON,
            HAS_RUN, GX, GY,
        )  # fmt: skip
    else:
        t = piece * PIECE + tl.arange(0, PIECE)
        columns = tl.arange(0, BREST)
        inside = (t < T)[:, None] & (columns < CU - C)[None, :]
        rows = (b.to(tl.int64) * T + t)[:, None]
        rest = tl.load(drest_ptr + rows * (CU - C) + columns[None, :], mask=inside)
        tl.store(du_ptr + rows * CU + C + columns[None, :], rest, mask=inside)


@triton.jit
def walk_back(
    u_ptr, before_ptr, taps_ptr, run_ptr, past_ptr, dy_ptr,
    du_ptr, dbefore_ptr, dtaps_ptr,
    FIRST: tl.constexpr, CY: tl.constexpr,
    B: tl.constexpr, T: tl.constexpr, C: tl.constexpr, CU: tl.constexpr, G: tl.constexpr,
    W: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr,
    PIECE: tl.constexpr, SILU: tl.constexpr, UNIT: tl.constexpr, EPSILON: tl.constexpr,
    HAS_RUN: tl.constexpr, GX: tl.constexpr, GY: tl.constexpr,
):  # fmt: skip
    """The way back of `walk`.

    The sum of taps is made again. Cotangents of inputs wait in d1, d2 and d3 until the last token
    that reads them has come by; for those at the end of the piece it stands behind it.
    """
    program, piece, b = program_ids(GX, GY)
    b = b.to(tl.int64)
    start = piece * PIECE
    offsets, inside = channels(program, C, ROWS, WIDTH, BW)
    k0, k1, k2, k3 = taps(taps_ptr, b, offsets, inside, B, C, G, W)
    x1, x2, x3, r1, r2, r3 = earlier(
        u_ptr, before_ptr, run_ptr, past_ptr, b, start, offsets, inside, T, C, CU, W, HAS_RUN
    )
    nothing = tl.zeros([ROWS, BW], tl.float32)
    d1, d2, d3 = nothing, nothing, nothing
    g0, g1, g2, g3 = nothing, nothing, nothing, nothing
    next0 = token(u_ptr, b, start, offsets, inside, T, CU)
    next1 = token(u_ptr, b, start + 1, offsets, inside, T, CU)
    next2 = token(u_ptr, b, start + 2, offsets, inside, T, CU)
    next3 = token(u_ptr, b, start + 3, offsets, inside, T, CU)
    dnext0 = token(dy_ptr, b, start, offsets - FIRST, inside, T, CY)
    dnext1 = token(dy_ptr, b, start + 1, offsets - FIRST, inside, T, CY)
    dnext2 = token(dy_ptr, b, start + 2, offsets - FIRST, inside, T, CY)
    dnext3 = token(dy_ptr, b, start + 3, offsets - FIRST, inside, T, CY)
    for group in range(0, PIECE + W - 1, AT_ONCE):
        for j in tl.static_range(AT_ONCE):
            i = group + j
            t = start + i
            x0, dy = next0.to(tl.float32), dnext0.to(tl.float32)
            next0, next1, next2 = next1, next2, next3
            next3 = token(u_ptr, b, t + 4, offsets, inside, T, CU)
            dnext0, dnext1, dnext2 = dnext1, dnext2, dnext3
            dnext3 = token(dy_ptr, b, t + 4, offsets - FIRST, inside, T, CY)
            r0 = number(run_ptr, b, t, r1, T, HAS_RUN)
            z = summed(x0, x1, x2, x3, k0, k1, k2, k3, r0, r1, r2, r3, W, HAS_RUN)
            y = z
            if SILU:
                s = sigmoid(z)
                y = z * s
            dz = dy
            if UNIT:
                inverse = tl.rsqrt(tl.sum(y * y, axis=1, keep_dims=True) + EPSILON)
                along = tl.sum(y * dy, axis=1, keep_dims=True) * inverse * inverse
                dz = inverse * (dy - y * along)
            if SILU:
                dz *= s * (1 + z * (1 - s))
            counted = tl.where(i < PIECE, dz, 0.0)
            d0 = dz * k0
            g0 += counted * x0
            d1 += same(dz * k1, r0, r1, HAS_RUN)
            g1 += counted * same(x1, r0, r1, HAS_RUN)
            if W > 2:
                d2 += same(dz * k2, r0, r2, HAS_RUN)
                g2 += counted * same(x2, r0, r2, HAS_RUN)
            if W > 3:
                d3 += same(dz * k3, r0, r3, HAS_RUN)
                g3 += counted * same(x3, r0, r3, HAS_RUN)
            done = d1
            if W == 3:
                done = d2
            if W == 4:
                done = d3
            first = t - (W - 1)  # the oldest token that is read here
            done = done.to(du_ptr.dtype.element_ty)
            pointers = du_ptr + (b * T + first) * CU + offsets
            ends = (i >= W - 1) & (i < PIECE + W - 1) & (first < T)
            tl.store(pointers, done, mask=inside & ends)
            pointers = dbefore_ptr + (b * (W - 1) + t) * C + offsets
            tl.store(pointers, done, mask=inside & (first < 0))
            x3, x2, x1 = x2, x1, x0
            r3, r2, r1 = r2, r1, r0
            d3, d2, d1 = d2, d1, d0
    pointers = dtaps_ptr + (b * tl.cdiv(T, PIECE) + piece) * (W * C) + offsets
    tl.store(pointers + (W - 1) * C, g0, mask=inside)
    tl.store(pointers + (W - 2) * C, g1, mask=inside)
    if W > 2:
        tl.store(pointers + (W - 3) * C, g2, mask=inside)
    if W > 3:
        tl.store(pointers, g3, mask=inside)


@triton.jit
def sigmoid(x):
    """Of float32."""
    return tl.inline_asm_elementwise(SIGMOID, "=f,f", [x], tl.float32, is_pure=True, pack=1)


@triton.jit
def number(run_ptr, b, t, before, T: tl.constexpr, HAS_RUN: tl.constexpr):
    """The number of the segment of token t; without any that of the token before."""
    r = before
    if HAS_RUN:
        r = tl.load(run_ptr + b * T + tl.minimum(t, T - 1))
    return r


@triton.jit
def token(ptr, b, t, offsets, inside, T: tl.constexpr, C: tl.constexpr):
    """Channels of token t as they are, zeros behind the last."""
    return tl.load(ptr + (b * T + t) * C + offsets, mask=inside & (t < T), other=0.0)


@triton.jit
def channels(
    program, C: tl.constexpr, ROWS: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr
):  # fmt: skip
    """Where the channels [ROWS, BW] of a program stand in a token, and which there are."""
    rows = program * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BW)
    inside = (rows < C // WIDTH)[:, None] & (columns < WIDTH)[None, :]
    return rows[:, None] * WIDTH + columns[None, :], inside


@triton.jit
def taps(
    taps_ptr, b, offsets, inside, B: tl.constexpr, C: tl.constexpr, G: tl.constexpr,
    W: tl.constexpr,
):  # fmt: skip
    """Of the token itself, and of the three before it; what W does not have is not used."""
    ptr = taps_ptr + (b // (B // G)) * (W * C) + offsets
    k0 = tl.load(ptr + (W - 1) * C, mask=inside, other=0.0)
    k1 = tl.load(ptr + (W - 2) * C, mask=inside, other=0.0)
    k2, k3 = k0, k0
    if W > 2:
        k2 = tl.load(ptr + (W - 3) * C, mask=inside, other=0.0)
    if W > 3:
        k3 = tl.load(ptr, mask=inside, other=0.0)
    return k0, k1, k2, k3


@triton.jit
def earlier(
    u_ptr, before_ptr, run_ptr, past_ptr, b, start, offsets, inside, T: tl.constexpr,
    C: tl.constexpr, CU: tl.constexpr, W: tl.constexpr, HAS_RUN: tl.constexpr,
):  # fmt: skip
    """The inputs in front of a piece, the nearest first, and the numbers of their segments."""
    x1, r1 = one(
        u_ptr, before_ptr, run_ptr, past_ptr, b, start - 1, offsets, inside, T, C, CU, W, HAS_RUN, 1
    )
    x2, r2 = one(
        u_ptr, before_ptr, run_ptr, past_ptr, b, start - 2, offsets, inside, T, C, CU, W, HAS_RUN, 2
    )
    x3, r3 = one(
        u_ptr, before_ptr, run_ptr, past_ptr, b, start - 3, offsets, inside, T, C, CU, W, HAS_RUN, 3
    )
    return x1, x2, x3, r1, r2, r3


@triton.jit
def one(
    u_ptr, before_ptr, run_ptr, past_ptr, b, t, offsets, inside, T: tl.constexpr,
    C: tl.constexpr, CU: tl.constexpr, W: tl.constexpr, HAS_RUN: tl.constexpr, BACK: tl.constexpr,
):  # fmt: skip
    """Token t, maybe of those before the first, as float32, and the number of its segment."""
    x, r = tl.zeros_like(offsets).to(tl.float32), 0
    if W > BACK:
        x = tl.load(u_ptr + (b * T + t) * CU + offsets, mask=inside & (t >= 0), other=0.0)
        place = b * (W - 1) + (W - 1) + t
        past = tl.load(before_ptr + place * C + offsets, mask=inside & (t < 0), other=0.0)
        x = tl.where(t < 0, past, x).to(tl.float32)
        if HAS_RUN:
            r = tl.load(run_ptr + b * T + t, mask=t >= 0, other=0)
            r = tl.where(t < 0, tl.load(past_ptr + place, mask=t < 0, other=0), r)
    return x, r


@triton.jit
def summed(x0, x1, x2, x3, k0, k1, k2, k3, r0, r1, r2, r3, W: tl.constexpr, HAS_RUN: tl.constexpr):
    """The sum of taps of one token, the earliest first."""
    z = tl.zeros_like(x0)
    if W > 3:
        z += k3 * same(x3, r0, r3, HAS_RUN)
    if W > 2:
        z += k2 * same(x2, r0, r2, HAS_RUN)
    z += k1 * same(x1, r0, r1, HAS_RUN)
    return z + k0 * x0


@triton.jit
def same(x, run, other, HAS_RUN: tl.constexpr):
    """``x`` if both segments are one, else zeros."""
    if HAS_RUN:
        x = tl.where(run == other, x, 0.0)
    return x
