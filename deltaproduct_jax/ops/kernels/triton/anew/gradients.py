"""The GPU kernel that finds gradients of bad rows and heads anew, token by token, in Triton.

Letters as in kernels.py. In a segment, s is the first token of which anything is not finite, e the
last one with a cotangent that is not finite, or not 0 from s on. Up to e gradients are NaN, from s
on, behind e, they are 0. Between the two everything is finite, and so is the state before it: there
the recurrence is walked back update by update. Nothing is chosen by a product.

The state before an update is found again from the last one that was kept before it. States are kept
in the memory of dv, in the rows before their token, which are written later. What is carried back
is kept in the memory of the cotangent of the initial state.
"""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.anew.bad_tokens import (
    fill,
    first_bad,
    is_bad_or_not_zero,
    last_asking,
    segment_start,
)
from deltaproduct_jax.ops.kernels.triton.narrow_activation import entered, left
from deltaproduct_jax.ops.kernels.triton.narrow_parts import place
from deltaproduct_jax.ops.kernels.triton.parts import head

BLOCK: tl.constexpr = tl.constexpr(16)  # updates of a block of narrow heads, at most


@triton.jit
def _vector(
    base, row, columns, HEADS: tl.constexpr, WIDTH: tl.constexpr, RAW: tl.constexpr,
    UNIT: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """A row of one head, as it lies there, [1, W], and as the op takes it, [W] of float32."""
    pointers = base + row.to(tl.int64) * (HEADS * WIDTH) + columns
    raw = tl.load(pointers, mask=columns < WIDTH, other=0.0)[None, :]
    x = entered(raw, EPSILON, RAW, UNIT)
    return raw, tl.sum(x.to(tl.float32), axis=0)


@triton.jit
def _number(base, row, HEADS: tl.constexpr):
    return tl.load(base + row.to(tl.int64) * HEADS).to(tl.float32)


@triton.jit
def _put(base, row, x, columns, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Writes a row."""
    pointers = base + row.to(tl.int64) * (HEADS * WIDTH) + columns
    tl.store(pointers, x.to(base.dtype.element_ty), mask=columns < WIDTH)


@triton.jit
def _put_gradient(
    base, row, dx, raw, columns, HEADS: tl.constexpr, WIDTH: tl.constexpr, RAW: tl.constexpr,
    UNIT: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Writes the cotangent of what `_vector` read as ``raw``, from that of what it made of it."""
    if RAW:
        dx = tl.sum(left(dx[None, :], raw, EPSILON, UNIT), axis=0)
    _put(base, row, dx, columns, HEADS, WIDTH)


@triton.jit
def _decay(g, u, R: tl.constexpr, HV: tl.constexpr, HAS_G: tl.constexpr):
    """What a state is multiplied by before update u."""
    decay = 1.0
    if HAS_G:
        decay = tl.where(u % R == 0, tl.exp(_number(g, u // R, HV)), 1.0)
    return decay


@triton.jit
def _advanced(
    S, arrays, begin, end, keys, columns, R: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, V: tl.constexpr, HAS_G: tl.constexpr, RAW: tl.constexpr,
    EPSILON: tl.constexpr,
):  # fmt: skip
    """The state after the updates from ``begin`` to ``end``, from that before them."""
    for i in range(0, end - begin):
        u = begin + i
        S *= _decay(arrays[4], u, R, HV, HAS_G)
        k = _vector(arrays[1], u, keys, H, K, RAW, True, EPSILON)[1]
        v = _vector(arrays[2], u, columns, HV, V, RAW, False, EPSILON)[1]
        error = v - tl.sum(k[:, None] * S, axis=0)
        S += (_number(arrays[3], u, HV) * k)[:, None] * error[None, :]
    return S


@triton.jit
def _keep(dv, row, S, keys, columns, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    """Writes a state of float32 over rows of dv, of 16 bits in two halves."""
    dtype = dv.dtype.element_ty
    inside = (keys < K)[:, None] & (columns < V)[None, :]
    pointers = dv + (row + keys)[:, None].to(tl.int64) * (HV * V) + columns[None, :]
    if dtype == tl.float32:
        tl.store(pointers, S, mask=inside)
    else:
        bits = S.to(tl.int32, bitcast=True)
        low = bits.to(tl.int16).to(dtype, bitcast=True)
        high = (bits >> 16).to(tl.int16).to(dtype, bitcast=True)
        tl.store(pointers, high, mask=inside)
        tl.store(pointers + K * HV * V, low, mask=inside)


@triton.jit
def _kept(dv, row, keys, columns, HV: tl.constexpr, K: tl.constexpr, V: tl.constexpr):
    """What `_keep` wrote."""
    dtype = dv.dtype.element_ty
    inside = (keys < K)[:, None] & (columns < V)[None, :]
    pointers = dv + (row + keys)[:, None].to(tl.int64) * (HV * V) + columns[None, :]
    S = tl.load(pointers, mask=inside, other=0.0)
    if dtype != tl.float32:
        low = tl.load(pointers + K * HV * V, mask=inside, other=0.0)
        low = low.to(tl.int16, bitcast=True).to(tl.int32) & 0xFFFF
        bits = (S.to(tl.int16, bitcast=True).to(tl.int32) << 16) | low
        S = bits.to(tl.float32, bitcast=True)
    return S


@triton.jit
def _walk_back(
    arrays, outs, initial, dfinal, dinitial, start, low, high, has_state,
    SCALE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, SPAN: tl.constexpr,
    HAS_G: tl.constexpr, RAW: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Gradients of the tokens from ``low`` to ``high`` of a segment that begins at ``start``."""
    q_base, k_base, v_base, beta_base, g_base, do_base = arrays
    dq, dk_base, dv_base, dbeta_base, dg_base = outs
    keys = tl.arange(0, BK)
    for at in range(0, V, BV):
        columns = at + tl.arange(0, BV)
        inside = (keys < K)[:, None] & (columns < V)[None, :]
        offsets = keys[:, None] * V + columns[None, :]
        S = tl.load(initial + offsets, mask=inside & has_state, other=0.0).to(tl.float32)
        for slot in range(0, (high - start - 1) // SPAN):
            begin = (start + slot * SPAN) * R
            S = _advanced(
                S, arrays, begin, begin + SPAN * R, keys, columns, R, H, HV, K, V, HAS_G, RAW,
                EPSILON,
            )  # fmt: skip
            _keep(dv_base, begin, S, keys, columns, HV, K, V)
        dS = tl.load(dfinal + offsets, mask=inside & (high == T), other=0.0).to(tl.float32)
        tl.store(dinitial + offsets, dS.to(dinitial.dtype.element_ty), mask=inside)
    for back in range(0, (high - low) * R):
        u = high * R - 1 - back
        t = u // R
        slot = (t - start) // SPAN
        begin = (start + slot * SPAN) * R
        is_first, is_last = u % R == 0, u % R == R - 1
        raw_k, k = _vector(k_base, u, keys, H, K, RAW, True, EPSILON)
        raw_q, q = _vector(q_base, t, keys, H, K, RAW, True, EPSILON)
        beta, decay = _number(beta_base, u, HV), _decay(g_base, u, R, HV, HAS_G)
        # Two vectors over keys and two numbers, which are sums over all values.
        of_q, of_k = tl.zeros([BK], tl.float32), tl.zeros([BK], tl.float32)
        of_beta, of_g = 0.0, 0.0
        tl.debug_barrier()  # all threads wrote what each of them reads now
        for at in range(0, V, BV):
            columns = at + tl.arange(0, BV)
            inside = (keys < K)[:, None] & (columns < V)[None, :]
            offsets = keys[:, None] * V + columns[None, :]
            if slot > 0:
                S = _kept(dv_base, begin - SPAN * R, keys, columns, HV, K, V)
            else:
                S = tl.load(initial + offsets, mask=inside & has_state, other=0.0)
                S = S.to(tl.float32)
            S = _advanced(
                S, arrays, begin, u, keys, columns, R, H, HV, K, V, HAS_G, RAW, EPSILON
            )  # fmt: skip
            S *= decay
            raw_v, v = _vector(v_base, u, columns, HV, V, RAW, False, EPSILON)
            dS = tl.load(dinitial + offsets, mask=inside, other=0.0).to(tl.float32)
            error = v - tl.sum(k[:, None] * S, axis=0)
            if is_last:
                do = _vector(do_base, t, columns, HV, V, False, False, EPSILON)[1]
                after = S + (beta * k)[:, None] * error[None, :]
                of_q += SCALE * tl.sum(after * do[None, :], axis=1)
                dS += (SCALE * q)[:, None] * do[None, :]
            written = tl.sum(k[:, None] * dS, axis=0)
            of_beta += tl.sum(error * written, axis=0)
            dv = beta * written
            of_k += tl.sum(dS * (beta * error)[None, :] - S * dv[None, :], axis=1)
            _put_gradient(dv_base, u, dv, raw_v, columns, HV, V, RAW, False, EPSILON)
            dS -= k[:, None] * dv[None, :]
            if HAS_G:
                of_g += tl.sum(tl.sum(dS * S, axis=1), axis=0)
            tl.store(dinitial + offsets, (dS * decay).to(dinitial.dtype.element_ty), mask=inside)
        _put_gradient(dk_base, u, of_k, raw_k, keys, HV, K, RAW, True, EPSILON)
        tl.store(dbeta_base + u.to(tl.int64) * HV, of_beta.to(dbeta_base.dtype.element_ty))
        if is_last:
            _put_gradient(dq, t, of_q, raw_q, keys, HV, K, RAW, True, EPSILON)
        if HAS_G and is_first:
            tl.store(dg_base + t.to(tl.int64) * HV, of_g.to(dg_base.dtype.element_ty))
    tl.debug_barrier()  # before anything else is written there


@triton.jit
def _fill_all(
    outs, begin, end, value, R: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    V: tl.constexpr, ALL_V: tl.constexpr, HAS_G: tl.constexpr,
):  # fmt: skip
    """Writes one number into the gradients of the tokens from ``begin`` to ``end``."""
    fill(outs[0], begin, end, value, HV, K, BK)
    fill(outs[1], begin * R, end * R, value, HV, K, BK)
    fill(outs[2], begin * R, end * R, value, HV, V, ALL_V)
    fill(outs[3], begin * R, end * R, value, HV, 1, 1)
    if HAS_G:
        fill(outs[4], begin, end, value, HV, 1, 1)


@triton.jit
def _of_head(
    arrays, resets, outs, initial, dfinal, dinitial,
    SCALE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, ALL_V: tl.constexpr,
    SPAN: tl.constexpr, HAS_G: tl.constexpr, HAS_RESETS: tl.constexpr, RAW: tl.constexpr,
    EPSILON: tl.constexpr,
):  # fmt: skip
    """All gradients of one row and head, from its last segment to its first."""
    q, k, v, beta, g, do = arrays
    nan = float("nan")
    bad_state, _ = is_bad_or_not_zero(initial, K, BK, V)
    bad_dfinal, some_dfinal = is_bad_or_not_zero(dfinal, K, BK, V)
    end = tl.full([], T, tl.int32)
    while end > 0:
        start = segment_start(resets, end, T, HAS_RESETS)
        has_state = start == 0
        if HAS_RESETS:
            has_state = has_state & (tl.load(resets) == 0)
        s = first_bad(q, start, end, H, K, BK)
        s = first_bad(k, start * R, s * R, H, K, BK) // R
        s = first_bad(v, start * R, s * R, HV, V, ALL_V) // R
        s = first_bad(beta, start * R, s * R, HV, 1, 1) // R
        if HAS_G:
            s = first_bad(g, start, s, HV, 1, 1, True)
        s = tl.where(has_state & bad_state, start, s)
        e = last_asking(do, start, end, s, HV, V, ALL_V)
        is_asked = (end == T) & (bad_dfinal | (some_dfinal & (s < end)))
        e = tl.where(is_asked, end - 1, e)
        if e + 1 < s:
            _walk_back(
                arrays, outs, initial, dfinal, dinitial, start, e + 1, s, has_state, SCALE, T, R, H,
                HV, K, BK, V, BV, SPAN, HAS_G, RAW, EPSILON,
            )  # fmt: skip
        _fill_all(outs, start, e + 1, nan, R, HV, K, BK, V, ALL_V, HAS_G)
        _fill_all(outs, tl.maximum(s, e + 1), end, 0.0, R, HV, K, BK, V, ALL_V, HAS_G)
        if start == 0:
            if e >= 0:
                fill(dinitial, 0, K, nan, 1, V, ALL_V)
            elif (s == 0) | (has_state == 0):
                fill(dinitial, 0, K, 0.0, 1, V, ALL_V)
        end = start


@triton.jit
def _seen(of_heads, updates, inside, HV: tl.constexpr):
    """Of each head NaN if any of these numbers is not finite, else 0."""
    pointers = of_heads[None, :] + updates[:, None].to(tl.int64) * HV
    x = tl.load(pointers, mask=inside, other=0.0).to(tl.float32)
    return tl.sum(x - x, axis=0)


@triton.jit
def mend_back_in_place(
    q_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, resets_ptr, initial_ptr, do_ptr, dfinal_ptr,
    dq_ptr, dk_ptr, dv_ptr, dbeta_ptr, dg_ptr, dstates_ptr,
    SCALE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, ALL_V: tl.constexpr,
    SPAN: tl.constexpr, HEADS: tl.constexpr, LOOKS: tl.constexpr, LOOKED_AT: tl.constexpr,
    AT_ONCE: tl.constexpr, PIECES: tl.constexpr, HAS_G: tl.constexpr, HAS_RESETS: tl.constexpr,
    RAW: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Gradients of rows and heads of which anything is not finite; all others stay as they are.

    That is told by dbeta, a sum over values of errors times cotangents of what is written: of the
    last updates of LOOKED_AT tokens, behind what is bad in tokens or in states before, and of the
    first ones, before what is bad in cotangents, queries or tokens behind. Of the last block
    of narrow heads all of it tells.
    """
    first = tl.program_id(0) * LOOKS
    heads = first + tl.arange(0, LOOKS)
    of_heads = dbeta_ptr + (heads // HV).to(tl.int64) * (T * R * HV) + heads % HV
    is_head = (heads < HEADS)[None, :]
    updates = T * R - BLOCK + tl.arange(0, BLOCK)
    seen = _seen(of_heads, updates, is_head & (updates >= 0)[:, None], HV)
    for at in range(0, (T + LOOKED_AT - 1) // LOOKED_AT, AT_ONCE):
        begins = (at + tl.arange(0, AT_ONCE)) * LOOKED_AT
        inside = is_head & (begins < T)[:, None]
        seen += _seen(of_heads, begins * R, inside, HV)
        seen += _seen(of_heads, tl.minimum(begins + LOOKED_AT, T) * R - 1, inside, HV)
    if tl.sum(seen, axis=0) != 0.0:
        for i in range(0, LOOKS):
            if tl.sum(tl.where(heads == first + i, seen, 0.0), axis=0) != 0.0:
                pid = first + i
                b, hv, h = head(pid, H, HV)
                row, state = b * T, pid.to(tl.int64) * (K * V)
                arrays = (
                    place(q_ptr, row, h, H, K),
                    place(k_ptr, row * R, h, H, K),
                    place(v_ptr, row * R, hv, HV, V),
                    place(beta_ptr, row * R, hv, HV, 1),
                    place(g_ptr, row, hv, HV, 1),
                    place(do_ptr, row, hv, HV, V),
                )
                outs = (
                    place(dq_ptr, row, hv, HV, K),
                    place(dk_ptr, row * R, hv, HV, K),
                    place(dv_ptr, row * R, hv, HV, V),
                    place(dbeta_ptr, row * R, hv, HV, 1),
                    place(dg_ptr, row, hv, HV, 1),
                )
                _of_head(
                    arrays, resets_ptr + row, outs, initial_ptr + state, dfinal_ptr + state,
                    dstates_ptr + state * PIECES, SCALE, T, R, H, HV, K, BK, V, BV, ALL_V, SPAN,
                    HAS_G, HAS_RESETS, RAW, EPSILON,
                )  # fmt: skip


@triton.jit
def mend_back(
    q_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, resets_ptr, initial_ptr, do_ptr, dfinal_ptr,
    of_q_ptr, of_k_ptr, of_v_ptr, of_beta_ptr, of_g_ptr, of_states_ptr,
    dq_ptr, dk_ptr, dv_ptr, dbeta_ptr, dg_ptr, dstates_ptr,
    SCALE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, ALL_V: tl.constexpr,
    SPAN: tl.constexpr, HEADS: tl.constexpr, LOOKS: tl.constexpr, LOOKED_AT: tl.constexpr,
    AT_ONCE: tl.constexpr, PIECES: tl.constexpr, HAS_G: tl.constexpr, HAS_RESETS: tl.constexpr,
    RAW: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """`mend_back_in_place` where results have pointers of their own, to the same memory."""
    mend_back_in_place(
        q_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, resets_ptr, initial_ptr, do_ptr, dfinal_ptr,
        dq_ptr, dk_ptr, dv_ptr, dbeta_ptr, dg_ptr, dstates_ptr,
        SCALE, T, R, H, HV, K, BK, V, BV, ALL_V, SPAN, HEADS, LOOKS, LOOKED_AT, AT_ONCE,
        PIECES, HAS_G, HAS_RESETS, RAW, EPSILON,
    )  # fmt: skip
