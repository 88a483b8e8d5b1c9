"""Bodies of the GPU kernels, in Triton. README.md beside it: what each reads, writes and holds.

Every kernel works on chunks of C tokens, M >= C * R rows of updates (token-major), and one value
head. In a chunk, with S the state before it and F the strictly lower gram of ops/README.md, the
errors e solve

    e + F (beta e) = r,   r = v - into * (k S)

so e = r - X (beta r) with X = F - F beta F + ..., and on the way back w = du - X^T (beta du).
`prepare` computes X once per chunk.

Letters: C tokens of a chunk, CP the same rounded up to a size of `tl.arange`, M rows for updates, K
and V widths of keys and values, BK the width K rounded up, BV the part of V that one program has, H
and HV key and value heads, N chunks. Every array is contiguous in the layout of the public op, the
axes T and R merged; arrays that only kernels see are ``[B, HV, N, ...]``.
"""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.activation import activate as activate  # by their names
from deltaproduct_jax.ops.kernels.triton.activation import activate_back as activate_back
from deltaproduct_jax.ops.kernels.triton.anew.gradients import mend_back as mend_back
from deltaproduct_jax.ops.kernels.triton.anew.gradients import (
    mend_back_in_place as mend_back_in_place,
)
from deltaproduct_jax.ops.kernels.triton.anew.outputs import mend as mend
from deltaproduct_jax.ops.kernels.triton.anew.outputs import mend_in_place as mend_in_place
from deltaproduct_jax.ops.kernels.triton.convolution import convolve as convolve
from deltaproduct_jax.ops.kernels.triton.convolution import convolve_back as convolve_back
from deltaproduct_jax.ops.kernels.triton.convolution import convolve_parts as convolve_parts
from deltaproduct_jax.ops.kernels.triton.convolution import (
    convolve_parts_back as convolve_parts_back,
)
from deltaproduct_jax.ops.kernels.triton.gradients import gradients as gradients
from deltaproduct_jax.ops.kernels.triton.ids import program_ids, program_ids_again
from deltaproduct_jax.ops.kernels.triton.logits import logit_back as logit_back
from deltaproduct_jax.ops.kernels.triton.logits import logit_sums as logit_sums
from deltaproduct_jax.ops.kernels.triton.narrow_backward import narrow_backward as narrow_backward
from deltaproduct_jax.ops.kernels.triton.narrow_forward import narrow_forward as narrow_forward
from deltaproduct_jax.ops.kernels.triton.parts import (
    chunk_decay,
    head,
    kept_state,
    products,
    put_series,
    put_sums,
    put_tile,
    row_decay,
    solved,
    square,
    strictly_lower_series,
    sums,
    tile,
    told_by,
    wide_products,
)
from deltaproduct_jax.ops.kernels.triton.pieces import compose as compose
from deltaproduct_jax.ops.kernels.triton.pieces import is_asked_for, start
from deltaproduct_jax.ops.kernels.triton.rows import norm_back as norm_back
from deltaproduct_jax.ops.kernels.triton.rows import norm_forward as norm_forward
from deltaproduct_jax.ops.kernels.triton.rows import swiglu as swiglu
from deltaproduct_jax.ops.kernels.triton.rows import swiglu_back as swiglu_back
from deltaproduct_jax.ops.kernels.triton.short.mixer import short_inputs_back as short_inputs_back
from deltaproduct_jax.ops.kernels.triton.short.mixer import short_output as short_output
from deltaproduct_jax.ops.kernels.triton.short.mixer import short_output_back as short_output_back
from deltaproduct_jax.ops.kernels.triton.short.mlp import short_mlp as short_mlp
from deltaproduct_jax.ops.kernels.triton.short.mlp import short_mlp_back as short_mlp_back
from deltaproduct_jax.ops.kernels.triton.short.vocabulary import short_head as short_head
from deltaproduct_jax.ops.kernels.triton.short.vocabulary import short_head_back as short_head_back
from deltaproduct_jax.ops.kernels.triton.short.vocabulary import (
    short_lookup_back as short_lookup_back,
)
from deltaproduct_jax.ops.kernels.triton.step import step as step
from deltaproduct_jax.ops.kernels.triton.step import step_in_place as step_in_place


@triton.jit
def prepare(
    q_ptr, k_ptr, beta_ptr, g_ptr, resets_ptr,
    x_ptr, scores_ptr, told_ptr, into_ptr, out_ptr, sums_ptr,
    SCALE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, C: tl.constexpr, CP: tl.constexpr, M: tl.constexpr,
    N: tl.constexpr, TWO: tl.constexpr, HAS_G: tl.constexpr, HAS_RESETS: tl.constexpr,
    PRECISION: tl.constexpr, GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """X [M, M], scores [CP, M] and, by row of updates, the decays into and out of a chunk.

    And NaN for a chunk of which a query has something that is not finite, else 0.
    """
    n, pid, _ = program_ids(GX, GY)
    b, hv, h = head(pid, H, HV)
    chunk = pid.to(tl.int64) * N + n
    dtype = x_ptr.dtype.element_ty
    m, c, columns = tl.arange(0, M), tl.arange(0, CP), tl.arange(0, BK)
    tokens = tl.minimum(C, T - n * C)
    row = b * T + n * C
    if dtype == tl.float32:
        F, scores = wide_products(q_ptr, k_ptr, row, h, m, c, tokens, R, H, K, BK, M, CP, PRECISION)
    else:
        k = tile(k_ptr, row * R, h, m, columns, m < tokens * R, H, K).to(dtype)
        q = tile(q_ptr, row, h, c, columns, c < tokens, H, K).to(dtype)
        F = tl.dot(k, tl.trans(k), input_precision=PRECISION)
    beta = tl.load(beta_ptr + (row * R + m) * HV + hv, mask=m < tokens * R, other=0.0)
    beta = beta.to(tl.float32)

    starts = (m % R == 0) & (m < tokens * R)
    of_m = sums(g_ptr, resets_ptr, row, hv, m // R, starts, HV, HAS_G, HAS_RESETS)
    high, low, segments = of_m

    earlier = m[:, None] > m[None, :]
    F *= products(high, low, segments, high, low, segments, earlier, HAS_G, HAS_RESETS)
    X = strictly_lower_series(F, beta, M, PRECISION)
    put_series(x_ptr, X, chunk, m, M, TWO)

    upto = c[:, None] >= (m // R)[None, :]
    of_c = sums(g_ptr, resets_ptr, row, hv, c, c < tokens, HV, HAS_G, HAS_RESETS)
    c_high, c_low, c_segments = of_c
    if dtype != tl.float32:
        if R == 1:  # as many tokens as updates: no registers keep both tiles while X is found
            tl.debug_barrier()
            k = tile(k_ptr, row * R, h, m, columns, m < tokens * R, H, K).to(dtype)
            q = tile(q_ptr, row, h, c, columns, c < tokens, H, K).to(dtype)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
    # Of a bad query all products with keys are.
    tl.store(told_ptr + chunk, told_by(scores, CP, M))
    scores *= SCALE
    scores *= products(c_high, c_low, c_segments, high, low, segments, upto, HAS_G, HAS_RESETS)
    pointers = square(scores_ptr, chunk, c, m, CP, M)
    tl.store(pointers, scores.to(dtype))

    if HAS_G or HAS_RESETS:
        # Of rows, one token's alike; those past the last token are as the last.
        last = m == M - 1
        last_high = tl.sum(tl.where(last, high, 0.0), axis=0)
        last_low = tl.sum(tl.where(last, low, 0.0), axis=0)
        last_segment = tl.sum(tl.where(last, segments, 0), axis=0)
        into = tl.where(segments == 0, tl.exp(high + low), 0.0)
        out = tl.exp((last_high - high) + (last_low - low))
        out = tl.where(segments == last_segment, out, 0.0)
        tl.store(into_ptr + chunk * M + m, into)
        tl.store(out_ptr + chunk * M + m, out)
        put_sums(sums_ptr, chunk, m, M, high, low, segments)


@triton.jit
def walk(
    q_ptr, k_ptr, v_ptr, beta_ptr, x_ptr, scores_ptr, into_ptr, out_ptr, initial_ptr,
    o_ptr, final_ptr, states_ptr, maps_ptr,
    SCALE: tl.constexpr, B: tl.constexpr, T: tl.constexpr, R: tl.constexpr, H: tl.constexpr,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TWO: tl.constexpr,
    STEPS: tl.constexpr, PIECES: tl.constexpr, DECAYS: tl.constexpr, SPAN: tl.constexpr,
    NARROW: tl.constexpr, SUMMARY: tl.constexpr, PRECISION: tl.constexpr,
    GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """Outputs and states, chunk after chunk, of a piece of STEPS chunks.

    With SPAN > 0 the state before every SPAN chunks, or every one, is kept. With SUMMARY there is
    no output, only what the piece does to any state, S -> A S + B: B stands among the final states,
    A, which further programs find, among the maps.
    """
    part, piece, pid = program_ids(GX, GY)
    if SUMMARY and not is_asked_for(part, piece, 0, V, BV, PIECES):
        return
    b, hv, h = head(pid, H, HV)
    dtype = x_ptr.dtype.element_ty
    m, c, rows = tl.arange(0, M), tl.arange(0, CP), tl.arange(0, BK)
    begins = tl.minimum(c * R, M - 1)  # the row that a token begins with
    columns = part * BV + tl.arange(0, BV)
    S = start(initial_ptr, pid, piece, 0, rows, columns, K, V, BV, PIECES, SUMMARY)
    for i in range(0, STEPS):
        # The last piece may have fewer chunks: past them nothing is read, written or changed.
        n = piece * STEPS + i
        chunk = pid.to(tl.int64) * N + tl.minimum(n, N - 1)
        tokens = tl.minimum(C, T - n * C)
        row = b * T + n * C
        updates = m < tokens * R
        k = tile(k_ptr, row * R, h, m, rows, updates, H, K).to(dtype)
        v = tile(v_ptr, row * R, hv, m, columns, updates, HV, V).to(tl.float32)
        beta = tl.load(beta_ptr + (row * R + m) * HV + hv, mask=updates, other=0.0).to(tl.float32)
        out = row_decay(out_ptr, chunk, m, M, DECAYS)
        through = tl.where(n < N, chunk_decay(into_ptr, chunk, M, DECAYS), 1.0)
        narrow = S.to(dtype)
        if SPAN > 0:
            pointers = kept_state(
                states_ptr, n, b, hv, rows, columns, B, HV, K, V, SPAN, NARROW, dtype
            )
            inside = (rows < K)[:, None] & (columns < V)[None, :] & (n < N)
            if NARROW:
                tl.store(pointers, narrow, mask=inside)
                if N % SPAN or SPAN == 1:  # half a slot that holds nothing
                    empty = inside & ((n == N - 1) | (SPAN == 1))
                    tl.store(pointers + K * V, tl.zeros_like(narrow), mask=empty)
            else:
                tl.store(pointers, S, mask=inside & (n % SPAN == 0))
        into = row_decay(into_ptr, chunk, m, M, DECAYS)
        r = v - into[:, None] * tl.dot(k, narrow, input_precision=PRECISION)
        e = solved(x_ptr, chunk, r, beta, m, M, TWO, False, PRECISION)
        u = beta[:, None] * e
        if not SUMMARY:
            q = tile(q_ptr, row, h, c, rows, c < tokens, H, K).to(dtype)
            scores = tl.load(square(scores_ptr, chunk, c, m, CP, M))
            into_tokens = row_decay(into_ptr, chunk, begins, M, DECAYS)
            if CP < 64:
                o = tl.dot(tl.trans(narrow), tl.trans(q), input_precision=PRECISION)
                o *= (SCALE * into_tokens)[None, :]
                o = tl.dot(tl.trans(u.to(dtype)), tl.trans(scores), o, input_precision=PRECISION)
                o = tl.trans(o)
            else:
                o = tl.dot(q, narrow, input_precision=PRECISION) * (SCALE * into_tokens)[:, None]
                o = tl.dot(scores, u.to(dtype), o, input_precision=PRECISION)
            put_tile(o_ptr, o, row, hv, c, columns, c < tokens, HV, V)
        written = (out[:, None] * u).to(dtype)
        S = tl.dot(tl.trans(k), written, through * S, input_precision=PRECISION)
    # Anew, so that no register holds what only the end needs: the loop has use for all.
    part, piece, pid = program_ids_again(GX, GY)
    columns = part * BV + tl.arange(0, BV)
    index = pid.to(tl.int64) * PIECES + piece
    inside = (rows < K)[:, None] & (columns < V)[None, :]
    tl.store(square(final_ptr, index, rows, columns, K, V), S, mask=inside)
    if SUMMARY:
        columns -= tl.cdiv(V, BV) * BV
        inside = (rows < K)[:, None] & (columns >= 0)[None, :] & (columns < K)[None, :]
        index = pid.to(tl.int64) * (PIECES - 2) + piece - 1
        tl.store(square(maps_ptr, index, rows, columns, K, K), S, mask=inside)


@triton.jit
def errors(
    k_ptr, v_ptr, beta_ptr, x_ptr, into_ptr, out_ptr, states_ptr,
    e_ptr, before_ptr,
    B: tl.constexpr, T: tl.constexpr, R: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    CP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TWO: tl.constexpr, DECAYS: tl.constexpr,
    SPAN: tl.constexpr, NARROW: tl.constexpr, PRECISION: tl.constexpr,
    GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """The errors e again, and, where it was not kept, the state before each chunk.

    Every span on its own, or every chunk, if NARROW.
    """
    STEPS: tl.constexpr = 1 if NARROW else SPAN
    part, span, pid = program_ids(GX, GY)
    b, hv, h = head(pid, H, HV)
    dtype = x_ptr.dtype.element_ty
    m, rows = tl.arange(0, M), tl.arange(0, BK)
    columns = part * BV + tl.arange(0, BV)
    inside = (rows < K)[:, None] & (columns < V)[None, :]
    pointers = kept_state(
        states_ptr, span * STEPS, b, hv, rows, columns, B, HV, K, V, SPAN, NARROW, dtype
    )
    S = tl.load(pointers, mask=inside, other=0.0)
    for i in range(0, STEPS):
        # The last span may have fewer chunks: past them nothing is read or written.
        n = span * STEPS + i
        chunk = pid.to(tl.int64) * N + tl.minimum(n, N - 1)
        row = (b * T + n * C) * R
        updates = m < tl.minimum(C, T - n * C) * R
        k = tile(k_ptr, row, h, m, rows, updates, H, K).to(dtype)
        v = tile(v_ptr, row, hv, m, columns, updates, HV, V).to(tl.float32)
        beta = tl.load(beta_ptr + (row + m) * HV + hv, mask=updates, other=0.0).to(tl.float32)
        into = row_decay(into_ptr, chunk, m, M, DECAYS)
        narrow = S.to(dtype)
        r = v - into[:, None] * tl.dot(k, narrow, input_precision=PRECISION)
        e = solved(x_ptr, chunk, r, beta, m, M, TWO, False, PRECISION)
        put_tile(e_ptr, e, row, hv, m, columns, updates, HV, V)
        if not NARROW:
            before_pointers = square(before_ptr, chunk, rows, columns, K, V)
            tl.store(before_pointers, narrow, mask=inside & (n < N))
            out = row_decay(out_ptr, chunk, m, M, DECAYS)
            through = chunk_decay(into_ptr, chunk, M, DECAYS)
            written = ((out * beta)[:, None] * e).to(dtype)
            S = tl.dot(tl.trans(k), written, through * S, input_precision=PRECISION)


@triton.jit
def walk_back(
    q_ptr, k_ptr, beta_ptr, x_ptr, scores_ptr, into_ptr, out_ptr, do_ptr, dfinal_ptr,
    w_ptr, dafter_ptr, dinitial_ptr,
    SCALE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    CP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, TWO: tl.constexpr, STEPS: tl.constexpr,
    PIECES: tl.constexpr, DECAYS: tl.constexpr, SUMMARY: tl.constexpr, PRECISION: tl.constexpr,
    GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """From the last chunk of a piece to its first: cotangents of what is written (w) and of states.

    With SUMMARY, as in `walk`, what the piece does to any cotangent of the state after it, but for
    its map, which is that of `walk` transposed.
    """
    part, piece, pid = program_ids(GX, GY)
    last = PIECES - 1
    if SUMMARY and not is_asked_for(part, piece, last, V, BV, PIECES):
        return
    b, hv, h = head(pid, H, HV)
    dtype = x_ptr.dtype.element_ty
    m, c, rows = tl.arange(0, M), tl.arange(0, CP), tl.arange(0, BK)
    begins = tl.minimum(c * R, M - 1)  # the row that a token begins with
    columns = part * BV + tl.arange(0, BV)
    dS = start(dfinal_ptr, pid, piece, last, rows, columns, K, V, BV, PIECES, SUMMARY)
    for back in range(0, STEPS):
        n = piece * STEPS + STEPS - 1 - back
        # Without a bound where none is needed, which spares registers.
        chunk = pid.to(tl.int64) * N + (tl.minimum(n, N - 1) if N % STEPS else n)
        tokens = tl.minimum(C, T - n * C)
        row = b * T + n * C
        updates = m < tokens * R
        beta = tl.load(beta_ptr + (row * R + m) * HV + hv, mask=updates, other=0.0).to(tl.float32)
        k = tile(k_ptr, row * R, h, m, rows, updates, H, K).to(dtype)
        q = tile(q_ptr, row, h, c, rows, c < tokens, H, K).to(dtype)
        do = tile(do_ptr, row, hv, c, columns, c < tokens, HV, V).to(dtype)
        scores = tl.load(square(scores_ptr, chunk, c, m, CP, M))
        into = row_decay(into_ptr, chunk, m, M, DECAYS)
        out = row_decay(out_ptr, chunk, m, M, DECAYS)
        into_tokens = row_decay(into_ptr, chunk, begins, M, DECAYS)
        through = tl.where(n < N, chunk_decay(into_ptr, chunk, M, DECAYS), 1.0)
        narrow = dS.to(dtype)
        if not SUMMARY:
            inside = (rows < K)[:, None] & (columns < V)[None, :] & (n < N)
            tl.store(square(dafter_ptr, chunk, rows, columns, K, V), narrow, mask=inside)
        du = out[:, None] * tl.dot(k, narrow, input_precision=PRECISION)
        du = tl.dot(tl.trans(scores), do, du, input_precision=PRECISION)
        w = solved(x_ptr, chunk, du, beta, m, M, TWO, True, PRECISION)
        if not SUMMARY:
            put_tile(w_ptr, w, row * R, hv, m, columns, updates, HV, V)
        into_do = ((SCALE * into_tokens)[:, None] * do.to(tl.float32)).to(dtype)
        dS = tl.dot(tl.trans(q), into_do, through * dS, input_precision=PRECISION)
        removed = ((-into * beta)[:, None] * w).to(dtype)
        dS = tl.dot(tl.trans(k), removed, dS, input_precision=PRECISION)
    # Anew, so that no register holds what only the end needs: the loop has use for all.
    part, piece, pid = program_ids_again(GX, GY)
    columns = part * BV + tl.arange(0, BV)
    index = pid.to(tl.int64) * PIECES + piece
    inside = (rows < K)[:, None] & (columns < V)[None, :]
    tl.store(square(dinitial_ptr, index, rows, columns, K, V), dS, mask=inside)
