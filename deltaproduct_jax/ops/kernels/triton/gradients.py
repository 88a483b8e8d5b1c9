"""The GPU kernel of the cotangents of the inputs, in Triton. Letters as in kernels.py."""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.ids import program_ids, program_ids_again
from deltaproduct_jax.ops.kernels.triton.parts import (
    head,
    kept_state,
    kept_sums,
    products,
    put_tile,
    row_decay,
    square,
    tile,
)


@triton.jit
def put_diagonal(ptr, x, row, hv, m, updates, R: tl.constexpr, HV: tl.constexpr):
    """Writes the diagonal of [M, M], a number per update."""
    diagonal = tl.sum(tl.where(m[:, None] == m[None, :], x, 0.0), axis=1)
    tl.store(ptr + (row * R + m) * HV + hv, diagonal, mask=updates)


@triton.jit
def over_values(
    e_ptr, w_ptr, do_ptr, before_ptr, dafter_ptr, dv_ptr, beta, part, n, b, hv, chunk, row, tokens,
    B: tl.constexpr, R: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    V: tl.constexpr, BV: tl.constexpr, CP: tl.constexpr, M: tl.constexpr, SPAN: tl.constexpr,
    NARROW: tl.constexpr, HAS_G: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Products over the values of a chunk that the cotangents of q, k and beta are made of.

    Of errors e, written w, cotangents do and states before and after, all of them unscaled: e do,
    w e, do and states, w and states, e and cotangents of states, and states and their cotangents
    entry by entry, added up by eights. Writes this part's share of dv.
    """
    PARTS: tl.constexpr = (K + BK - 1) // BK
    ALL_K: tl.constexpr = K % BK == 0
    ALL_V: tl.constexpr = V % BV == 0
    dtype = dafter_ptr.dtype.element_ty
    m, c, rows = tl.arange(0, M), tl.arange(0, CP), part * BK + tl.arange(0, BK)
    updates = m < tokens * R

    # Tokens are columns in what is made here: chunks of few tokens have too few rows for the
    # products of a whole warp group.
    e_do = tl.zeros([M, CP], tl.float32)
    w_e = tl.zeros([M, M], tl.float32)
    dq = tl.zeros([BK, CP], tl.float32)
    dk_read = tl.zeros([M, BK], tl.float32)
    dk_written = tl.zeros([M, BK], tl.float32)
    before_after = tl.zeros([BK, BV // 8], tl.float32)
    for values in range(0, tl.cdiv(V, BV)):
        columns = values * BV + tl.arange(0, BV)
        e = tile(e_ptr, row * R, hv, m, columns, updates, HV, V, ALL_V)
        w = tile(w_ptr, row * R, hv, m, columns, updates, HV, V, ALL_V)
        do = tile(do_ptr, row, hv, c, columns, c < tokens, HV, V, ALL_V).to(dtype)
        if NARROW:
            before_pointers = kept_state(
                before_ptr, n, b, hv, rows, columns, B, HV, K, V, SPAN, True, dtype
            )
        else:
            before_pointers = square(before_ptr, chunk, rows, columns, K, V)
        after_pointers = square(dafter_ptr, chunk, rows, columns, K, V)
        if ALL_K and ALL_V:
            before, after = tl.load(before_pointers), tl.load(after_pointers)
        else:
            inside = (rows < K)[:, None] & (columns < V)[None, :]
            before = tl.load(before_pointers, mask=inside, other=0.0)
            after = tl.load(after_pointers, mask=inside, other=0.0)
        e_do = tl.dot(e, tl.trans(do), e_do, input_precision=PRECISION)
        w_e = tl.dot(w, tl.trans(e), w_e, input_precision=PRECISION)
        dq = tl.dot(before, tl.trans(do), dq, input_precision=PRECISION)
        dk_read = tl.dot(w, tl.trans(before), dk_read, input_precision=PRECISION)
        dk_written = tl.dot(e, tl.trans(after), dk_written, input_precision=PRECISION)
        dv = beta[:, None] * w.to(tl.float32)
        here = updates & (values % PARTS == part)  # each part of the keys writes its share
        put_tile(dv_ptr, dv, row * R, hv, m, columns, here, HV, V, ALL_V)
        if HAS_G:
            # Sums over eight columns, which a thread has anyway: an eighth of the registers.
            both = before.to(tl.float32) * after.to(tl.float32)
            before_after += tl.sum(tl.reshape(both, [BK, BV // 8, 8]), axis=2)
    return e_do, w_e, dq, dk_read, dk_written, before_after


@triton.jit
def gradients(
    q_ptr, k_ptr, beta_ptr, into_ptr, out_ptr, sums_ptr, do_ptr,
    e_ptr, w_ptr, before_ptr, dafter_ptr,
    dq_ptr, dk_ptr, dv_ptr, dbeta_ptr, of_decays_ptr, of_chunks_ptr,
    SCALE: tl.constexpr, B: tl.constexpr, T: tl.constexpr, R: tl.constexpr, H: tl.constexpr,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    C: tl.constexpr, CP: tl.constexpr, M: tl.constexpr, N: tl.constexpr, SPAN: tl.constexpr,
    NARROW: tl.constexpr, DECAYS: tl.constexpr, HAS_G: tl.constexpr, HAS_RESETS: tl.constexpr,
    PRECISION: tl.constexpr, GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """Cotangents of the inputs, every chunk on its own; dq and dk are those of one value head.

    A program has BK columns of the keys, and all that is a sum over them is added up afterwards.
    The products over values, which every part needs, are made again: with all of K in one program,
    registers do not suffice.

    Of g only the terms are found, ``[B, HV, N, parts, 2 M + CP]``: for every row of updates what
    counts from its token on and what counts after it, and for every token what counts from it on.
    What counts for all of a chunk, but for the decay over it, is ``[B, HV, N, parts]``.
    """
    part, n, pid = program_ids(GX, GY)
    PARTS: tl.constexpr = (K + BK - 1) // BK
    ALL_K: tl.constexpr = K % BK == 0
    b, hv, h = head(pid, H, HV)
    chunk = pid.to(tl.int64) * N + n
    dtype = dafter_ptr.dtype.element_ty
    m, c, rows = tl.arange(0, M), tl.arange(0, CP), part * BK + tl.arange(0, BK)
    tokens = tl.minimum(C, T - n * C)
    row = b * T + n * C
    updates = m < tokens * R
    beta = tl.load(beta_ptr + (row * R + m) * HV + hv, mask=updates, other=0.0).to(tl.float32)

    e_do, w_e, dq, dk_read, dk_written, before_after = over_values(
        e_ptr, w_ptr, do_ptr, before_ptr, dafter_ptr, dv_ptr, beta, part, n, b, hv, chunk, row,
        tokens, B, R, HV, K, BK, V, BV, CP, M, SPAN, NARROW, HAS_G, PRECISION,
    )  # fmt: skip

    # What registers hold through this last part decides whether they suffice. With gates, which
    # need more, it reads the program's ids anew, stores what it can at once, and loads a second
    # time what it had before, behind a barrier that the compiler moves no load over.
    begins = tl.minimum(c * R, M - 1)  # the row that a token begins with
    if HAS_G:
        part, n, pid = program_ids_again(GX, GY)
        b, hv, h = head(pid, H, HV)
        chunk = pid.to(tl.int64) * N + n
        row = b * T + n * C
        of_chunk = tl.sum(tl.sum(before_after, axis=1), axis=0)
        tl.store(of_chunks_ptr + chunk * PARTS + part, of_chunk)
        of_decays_ptr += (chunk * PARTS + part) * (2 * M + CP)
    # With one factor here, else further down: with one, or with two, the other way spills.
    if R == 1 and part == 0:
        put_diagonal(dbeta_ptr, w_e, row, hv, m, updates, R, HV)
    k = tile(k_ptr, row * R, h, m, rows, updates, H, K, ALL_K).to(dtype)
    if not HAS_G:
        q = tile(q_ptr, row, h, c, rows, c < tokens, H, K, ALL_K).to(dtype)
    beta = tl.load(beta_ptr + (row * R + m) * HV + hv, mask=updates, other=0.0).to(tl.float32)
    into = row_decay(into_ptr, chunk, m, M, DECAYS)
    out = row_decay(out_ptr, chunk, m, M, DECAYS)
    dq *= (SCALE * row_decay(into_ptr, chunk, begins, M, DECAYS))[None, :]
    dk_read *= (-into * beta)[:, None]
    dk_written *= (out * beta)[:, None]
    if HAS_G:
        # Cotangents of the logarithms of the decays. A term counts for the tokens that it spans:
        # from one on, and no longer from another on. So it is added at the one and taken away at
        # the other, and what would cancel there, as it spans none, is left out. Sums of terms over
        # rows or columns of products of keys are sums over the keys that these make of keys.
        of_updates = tl.sum(k.to(tl.float32) * dk_read, axis=1)
        of_out = tl.sum(k.to(tl.float32) * dk_written, axis=1)
    dk = dk_read + dk_written

    high, low, segments = kept_sums(sums_ptr, chunk, m, M, HAS_G, HAS_RESETS)
    c_high, c_low, c_segments = kept_sums(sums_ptr, chunk, begins, M, HAS_G, HAS_RESETS)
    upto = c[None, :] >= (m // R)[:, None]
    dqk = products(-high, -low, segments, -c_high, -c_low, c_segments, upto, HAS_G, HAS_RESETS)
    dqk *= e_do * (SCALE * beta)[:, None]
    if HAS_G:
        q = tile(q_ptr, row, h, c, rows, c < tokens, H, K, ALL_K).to(dtype)
        spans = c[None, :] > (m // R)[:, None]
        spanning = tl.where(spans, dqk, 0.0).to(dtype)
        if R == 1:  # what spans nothing is one number per row
            own = tl.sum(tl.where(c[None, :] == m[:, None], dqk, 0.0), axis=1)
        else:
            dqk = tl.where(spans, 0.0, dqk)
        dq = tl.dot(tl.trans(k), spanning, dq, input_precision=PRECISION)
        of_tokens = tl.sum(tl.trans(q).to(tl.float32) * dq, axis=0)
        tl.store(of_decays_ptr + 2 * M + c, of_tokens)
        if R == 1:
            dqk = tl.where(c[None, :] == m[:, None], own[:, None], 0.0)
    narrow = dqk.to(dtype)
    dq = tl.dot(tl.trans(k), narrow, dq, input_precision=PRECISION)
    put_tile(dq_ptr, tl.trans(dq), row, hv, c, rows, c < tokens, HV, K, ALL_K)
    if HAS_G:
        some = tl.dot(spanning, q, input_precision=PRECISION)
    dk = tl.dot(narrow, q, dk, input_precision=PRECISION)

    if R > 1 and part == 0:
        put_diagonal(dbeta_ptr, w_e, row, hv, m, updates, R, HV)
    if HAS_G:
        tl.debug_barrier()
        high, low, segments = kept_sums(sums_ptr, chunk, m, M, HAS_G, HAS_RESETS)
        beta = tl.load(beta_ptr + (row * R + m) * HV + hv, mask=updates, other=0.0)
        beta = beta.to(tl.float32)
    earlier = m[:, None] > m[None, :]
    dkk = products(high, low, segments, high, low, segments, earlier, HAS_G, HAS_RESETS)
    dkk *= -w_e * beta[:, None] * beta[None, :]
    if HAS_G:
        spans = (m // R)[:, None] > (m // R)[None, :]
        spanning = tl.where(spans, dkk, 0.0).to(dtype)
        dkk = tl.where(spans, 0.0, dkk)
        some = tl.dot(tl.trans(spanning), k, some, input_precision=PRECISION)
        of_updates -= tl.sum(k.to(tl.float32) * some, axis=1)
        dk += some
        some = tl.dot(spanning, k, input_precision=PRECISION)
        of_updates += tl.sum(k.to(tl.float32) * some, axis=1)
        dk += some
        pairs = 2 * m[:, None] + tl.arange(0, 2)[None, :]
        tl.store(of_decays_ptr + pairs, tl.join(of_updates, of_out))
    if not HAS_G or R > 1:  # of one token
        narrow = dkk.to(dtype)
        dk = tl.dot(narrow, k, dk, input_precision=PRECISION)
        dk = tl.dot(tl.trans(narrow), k, dk, input_precision=PRECISION)
    put_tile(dk_ptr, dk, row * R, hv, m, rows, updates, HV, K, ALL_K)
