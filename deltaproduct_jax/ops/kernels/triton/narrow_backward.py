"""The GPU kernel of narrow heads, backward, in Triton. Letters as in narrow_forward.py."""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.narrow_activation import entered, left, queries
from deltaproduct_jax.ops.kernels.triton.narrow_parts import (
    added,
    all_padded,
    applied,
    block,
    flipped,
    gram,
    kept_series,
    numbers,
    of_pairs,
    padded,
    padded_columns,
    parts,
    place,
    product,
    put_block,
    rounded,
    summed_to,
    sums_and_decays,
    turned,
    turned_parts,
)
from deltaproduct_jax.ops.kernels.triton.parts import head


@triton.jit
def _errors(
    k_ptr, v_ptr, beta_ptr, g_ptr, resets_ptr, x_ptr, S, tokens, row, hv, h, m, c, keys, values,
    updates, R: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    V: tl.constexpr, BV: tl.constexpr, M: tl.constexpr, HAS_G: tl.constexpr,
    HAS_RESETS: tl.constexpr, PARTS: tl.constexpr, RAW: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Those of a block [V, M], again from the state before it."""
    DECAYS: tl.constexpr = HAS_G or HAS_RESETS
    dtype = k_ptr.dtype.element_ty
    k = block(place(k_ptr, row * R, h, H, K), m, keys, updates, H, K, BK)
    v = block(place(v_ptr, row * R, hv, HV, V), m, values, updates, HV, V, BV)
    k, v = entered(k, EPSILON, RAW, True), entered(v, EPSILON, RAW, False)
    beta = numbers(beta_ptr, row * R, hv, m, updates, HV)
    k = parts(k, dtype, PARTS)
    X = kept_series(x_ptr, m, M, PARTS)
    S_parts = parts(S, dtype, PARTS)
    kSt = product(S_parts, turned(k), PARTS)
    if DECAYS:
        _, _, into, _, _, _ = sums_and_decays(
            g_ptr, resets_ptr, row, hv, m, c, tokens, R, M, HV, HAS_G, HAS_RESETS
        )
        kSt *= into[None, :]
    rt = tl.trans(v).to(tl.float32) - kSt
    yt = rt * beta[None, :]
    if PARTS == 1:
        yt = rounded(yt, dtype)
    Xyt = applied(parts(yt, dtype, PARTS), turned(X), PARTS)
    return rt - Xyt


@triton.jit
def _gates(
    k, q, of_scores, of_gram, dk_read, dk_written, dq, S, dSt, through, c, m, R: tl.constexpr,
    TERMS: tl.constexpr,
):  # fmt: skip
    """Cotangents of g by token, from what counts for each decay of a block."""
    begun = tl.where(c[:, None] <= c[None, :], 1.0, 0.0).to(tl.bfloat16)
    begun_rows = c[:, None] <= (m // R)[None, :]
    wP = parts(of_scores, tl.bfloat16, TERMS)
    wF = parts(of_gram, tl.bfloat16, TERMS)
    x = summed_to(begun, wP, TERMS)
    x += summed_to(tl.where(begun_rows, 1.0, 0.0).to(tl.bfloat16), wF, TERMS)
    k_wide = k.to(tl.float32)
    of_rows = tl.sum(k_wide * dk_read, axis=1)
    of_out = tl.sum(k_wide * dk_written, axis=1)
    of_tokens_in = tl.sum(q.to(tl.float32) * dq, axis=1)
    x = tl.where(begun_rows, of_rows[None, :], x + of_out[None, :])
    dg = tl.sum(x, axis=1)
    dg += tl.sum(tl.where(c[:, None] <= c[None, :], of_tokens_in[None, :], 0.0), axis=1)
    all_of_it = tl.sum(tl.sum(S.to(tl.float32) * dSt, axis=1), axis=0)
    dg += through * all_of_it
    return dg


@triton.jit
def narrow_backward(
    q_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, resets_ptr, states_ptr, x_ptr, do_ptr, dfinal_ptr,
    dq_ptr, dk_ptr, dv_ptr, dbeta_ptr, dg_ptr, dinitial_ptr,
    SCALE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    CP: tl.constexpr, CQ: tl.constexpr, M: tl.constexpr, N: tl.constexpr, HAS_G: tl.constexpr,
    HAS_RESETS: tl.constexpr, PARTS: tl.constexpr, RAW: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Cotangents of the inputs and of the initial state; dq and dk are those of one value head.

    Block after block, from the last: its errors again from the kept state, then what counts for it.
    What both halves need is read twice, as registers are what there is least of.
    """
    DECAYS: tl.constexpr = HAS_G or HAS_RESETS
    TERMS: tl.constexpr = 2 if PARTS == 1 else PARTS
    # Of bfloat16 unit queries have the scale, so that products do not need it.
    SCALED: tl.constexpr = RAW and q_ptr.dtype.element_ty == tl.bfloat16
    FACTOR: tl.constexpr = SCALE if SCALED else 1.0
    REST: tl.constexpr = 1.0 if SCALED else SCALE
    pid = tl.program_id(0)
    b, hv, h = head(pid, H, HV)
    dtype = q_ptr.dtype.element_ty
    m, c = tl.arange(0, M), tl.arange(0, CQ)
    keys, values = tl.arange(0, BK), tl.arange(0, BV)
    within = (values < V)[:, None] & (keys < K)[None, :]
    offsets = keys[None, :] * V + values[:, None]
    dSt = tl.load(dfinal_ptr + pid.to(tl.int64) * (K * V) + offsets, mask=within, other=0.0)
    earlier = m[:, None] > m[None, :]
    upto = c[:, None] >= (m // R)[None, :]
    for back in range(0, N):
        n = N - 1 - back
        kept = values[:, None] * K + keys[None, :]
        kept = states_ptr + (pid.to(tl.int64) * N + n) * (K * V) + kept
        S = tl.load(kept, mask=within, other=0.0)
        tokens = tl.minimum(C, T - n * C)
        row = b * T + n * C
        updates = m < tokens * R
        et = _errors(
            k_ptr, v_ptr, beta_ptr, g_ptr, resets_ptr, x_ptr + (pid.to(tl.int64) * N + n) * (M * M),
            S, tokens, row, hv, h, m, c, keys, values, updates, R, H, HV, K, BK, V, BV, M, HAS_G,
            HAS_RESETS, PARTS, RAW, EPSILON,
        )  # fmt: skip
        _, e_t, e = flipped(et, m, dtype, M, PARTS)
        is_token = c < tokens
        k_in = block(place(k_ptr, row * R, h, H, K), m, keys, updates, H, K, BK)
        k_in = entered(k_in, EPSILON, RAW, True)
        q_in = queries(place(q_ptr, row, h, H, K), c, keys, tokens, H, K, BK, RAW, EPSILON, FACTOR)
        do = block(place(do_ptr, row, hv, HV, V), c, values, is_token, HV, V, BV)
        beta = numbers(beta_ptr, row * R, hv, m, updates, HV)
        k, q = parts(k_in, dtype, PARTS), parts(q_in, dtype, PARTS)
        if DECAYS:
            rows, of_tokens, into, out, into_tokens, through = sums_and_decays(
                g_ptr, resets_ptr, row, hv, m, c, tokens, R, M, HV, HAS_G, HAS_RESETS
            )
            decays = of_pairs(rows, rows, earlier, HAS_G, HAS_RESETS)
            of_scores = of_pairs(of_tokens, rows, upto, HAS_G, HAS_RESETS) * REST
            do_in = do.to(tl.float32) * (REST * into_tokens)[:, None]
        else:
            decays = tl.where(earlier, 1.0, 0.0)
            of_scores = tl.where(upto, REST, 0.0)
            do_in = do.to(tl.float32) * REST if REST != 1.0 else do
        do, do_in = parts(do, dtype, PARTS), parts(do_in, dtype, PARTS)
        turned_scores = tl.trans(of_scores)
        scores_t = gram(k, q, PARTS) * turned_scores
        X = kept_series(x_ptr + (pid.to(tl.int64) * N + n) * (M * M), m, M, PARTS)
        dS_parts = parts(dSt, dtype, PARTS)
        dut = product(dS_parts, turned(k), PARTS)
        if DECAYS:
            dut *= out[None, :]
        scores = turned_parts(padded_columns(scores_t, CP), dtype, PARTS)
        dut = added(turned(all_padded(do, CP)), scores, dut, PARTS)
        yt = dut * beta[None, :]
        if PARTS == 1:
            yt = rounded(yt, dtype)
        Xyt = applied(parts(yt, dtype, PARTS), X, PARTS)
        # Cotangents of errors, with the other sign; of r = v - S k they are these times beta.
        wt, removed = Xyt - dut, Xyt * beta[None, :] - yt
        dv, w_t, _ = flipped(wt, m, dtype, M, PARTS)
        pairs = product(w_t, e, PARTS)
        dbeta = -tl.sum(tl.where(m[:, None] == m[None, :], pairs, 0.0), axis=1)
        tl.store(dbeta_ptr + row * R * HV + hv + m * HV, dbeta, mask=updates)
        dv *= -beta[:, None]
        if RAW:
            v = block(place(v_ptr, row * R, hv, HV, V), m, values, updates, HV, V, BV)
            dv = left(dv, v, EPSILON, False)
        put_block(place(dv_ptr, row * R, hv, HV, V), dv, m, values, updates, HV, V, BV)
        S = tl.load(kept, mask=within, other=0.0)
        S_parts = parts(S, dtype, PARTS)

        do_u = product(do, e, PARTS) * beta[None, :]
        do_u_t = product(e_t, turned(do), PARTS) * beta[:, None]
        of_betas = beta[:, None] * beta[None, :]
        dF = pairs * (of_betas * decays)
        dF_t, _, _ = flipped(dF, m, dtype, M, PARTS)
        dF_both = dF + dF_t
        dq = product(do_in, S_parts, PARTS)
        if DECAYS:
            dk_read = product(w_t, S_parts, PARTS) * (beta * into)[:, None]
            dk_written = product(e_t, dS_parts, PARTS) * (beta * out)[:, None]
            dk = dk_read + dk_written
        else:
            dk = added(w_t, S_parts, product(e_t, dS_parts, PARTS), PARTS)
            dk *= beta[:, None]
        if HAS_G:
            wF = gram(k, k, PARTS) * dF  # dF has the decays
            dg = _gates(
                k_in, padded(q_in, CP), padded(tl.trans(scores_t) * do_u, CP), wF, dk_read,
                dk_written, padded(dq, CP), S, dSt, through, tl.arange(0, CP), m, R, TERMS,
            )  # fmt: skip
            rows_of_g = tl.arange(0, CP)
            tl.store(dg_ptr + row * HV + hv + rows_of_g * HV, dg, mask=rows_of_g < tokens)
        dq = added(parts(do_u * of_scores, dtype, PARTS), k, dq, PARTS)
        d_parts = parts(padded_columns(do_u_t * turned_scores, CP), dtype, PARTS)
        q = all_padded(q, CP)
        dk = added(d_parts, q, dk, PARTS)
        dk = added(parts(dF_both, dtype, PARTS), k, dk, PARTS)
        if RAW:
            k_in = block(place(k_ptr, row * R, h, H, K), m, keys, updates, H, K, BK)
            q_in = block(place(q_ptr, row, h, H, K), c, keys, is_token, H, K, BK)
            dq = left(dq, q_in, EPSILON, True, FACTOR)
            dk = left(dk, k_in, EPSILON, True)
        put_block(place(dq_ptr, row, hv, HV, K), dq, c, keys, is_token, HV, K, BK)
        put_block(place(dk_ptr, row * R, hv, HV, K), dk, m, keys, updates, HV, K, BK)
        if DECAYS:
            dSt *= through
        dSt = added(turned(all_padded(do_in, CP)), q, dSt, PARTS)
        if DECAYS:
            removed *= into[None, :]
        dSt = added(parts(removed, dtype, PARTS), k, dSt, PARTS)
    tl.store(dinitial_ptr + pid.to(tl.int64) * (K * V) + offsets, dSt, mask=within)
