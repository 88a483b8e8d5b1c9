"""The GPU kernel of narrow heads, forward, in Triton. NARROW.md has the design.

A program walks one value head of a sequence in blocks of M rows of updates, of which C tokens fill
C * R, with the state in registers. What holds columns of V in its rows is kept transposed, [V, ...]
(the code ends its name with t): what a product leaves in registers is then what the next one takes.

Letters: C tokens of a block, CP the same rounded up to what products take, M rows for updates, K
and V widths of keys and values, BK and BV these rounded up, H and HV key and value heads, N blocks.
PARTS is the number of terms that a factor is cut into (`parts`).
"""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.narrow_activation import entered, queries
from deltaproduct_jax.ops.kernels.triton.narrow_parts import (
    added,
    applied,
    block,
    gram,
    numbers,
    of_pairs,
    parts,
    place,
    product,
    put_block,
    put_series,
    rounded,
    series,
    sums_and_decays,
    to_pairs,
    told_by,
    turned,
    turned_parts,
    two_terms,
)
from deltaproduct_jax.ops.kernels.triton.parts import head


@triton.jit
def narrow_forward(
    q_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, resets_ptr, initial_ptr,
    o_ptr, final_ptr, states_ptr, x_ptr, slots_ptr, told_ptr,
    SCALE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, C: tl.constexpr,
    CQ: tl.constexpr, M: tl.constexpr, N: tl.constexpr, KEEPS: tl.constexpr,
    HAS_G: tl.constexpr, HAS_RESETS: tl.constexpr, PARTS: tl.constexpr, RAW: tl.constexpr,
    EPSILON: tl.constexpr,
):  # fmt: skip
    """Outputs and the final state; where it KEEPS them also X and the state before every block.

    And NaN for a head of which a query has something that is not finite, else 0.
    ``slots_ptr`` is memory that the op sets aside, in which nothing is written.
    """
    DECAYS: tl.constexpr = HAS_G or HAS_RESETS
    pid = tl.program_id(0)
    b, hv, h = head(pid, H, HV)
    dtype = q_ptr.dtype.element_ty
    # Of bfloat16 unit queries have the scale, so that products do not need it.
    SCALED: tl.constexpr = RAW and q_ptr.dtype.element_ty == tl.bfloat16
    FACTOR: tl.constexpr = SCALE if SCALED else 1.0
    REST: tl.constexpr = 1.0 if SCALED else SCALE
    m, c = tl.arange(0, M), tl.arange(0, CQ)
    keys, values = tl.arange(0, BK), tl.arange(0, BV)
    within = (values < V)[:, None] & (keys < K)[None, :]
    offsets = keys[None, :] * V + values[:, None]
    St = tl.load(initial_ptr + pid.to(tl.int64) * (K * V) + offsets, mask=within, other=0.0)
    told = tl.zeros([8, 4], tl.float32)
    for n in range(0, N):
        tokens = tl.minimum(C, T - n * C)
        row = b * T + n * C
        updates, is_token = m < tokens * R, c < tokens
        k = block(place(k_ptr, row * R, h, H, K), m, keys, updates, H, K, BK)
        q = queries(place(q_ptr, row, h, H, K), c, keys, tokens, H, K, BK, RAW, EPSILON, FACTOR)
        v = block(place(v_ptr, row * R, hv, HV, V), m, values, updates, HV, V, BV)
        k, v = entered(k, EPSILON, RAW, True), entered(v, EPSILON, RAW, False)
        beta = numbers(beta_ptr, row * R, hv, m, updates, HV)
        k, q = parts(k, dtype, PARTS), parts(q, dtype, PARTS)
        earlier = m[:, None] > m[None, :]
        upto = c[:, None] >= (m // R)[None, :]
        if DECAYS:
            rows, of_tokens, into, out, into_tokens, through = sums_and_decays(
                g_ptr, resets_ptr, row, hv, m, c, tokens, R, M, HV, HAS_G, HAS_RESETS
            )
            decays = of_pairs(rows, rows, earlier, HAS_G, HAS_RESETS)
            later = m[:, None] < m[None, :]
            decays_turned = to_pairs(rows, rows, later, HAS_G, HAS_RESETS)
            of_scores = of_pairs(of_tokens, rows, upto, HAS_G, HAS_RESETS)
        else:
            decays, decays_turned = 1.0, 1.0
            of_scores = tl.where(upto, 1.0, 0.0)
        X = series(gram(k, k, PARTS), decays, decays_turned, beta, m, M, PARTS, RAW and PARTS == 1)
        scores = gram(q, k, PARTS)
        told = told_by(scores, told)
        scores *= of_scores * REST
        if KEEPS:
            index = pid.to(tl.int64) * N + n
            put_series(x_ptr + index * (M * M), X, m, M, PARTS)
            kept = values[:, None] * K + keys[None, :]
            kept = states_ptr + index * (K * V) + kept
            tl.store(kept, St.to(states_ptr.dtype.element_ty), mask=within)
        S_parts = parts(St, dtype, PARTS)
        kSt = product(S_parts, turned(k), PARTS)
        ot = product(S_parts, turned(q), PARTS)
        if DECAYS:
            kSt *= into[None, :]
            ot *= (REST * into_tokens)[None, :]
        else:
            ot *= REST
        yt = (tl.trans(v).to(tl.float32) - kSt) * beta[None, :]
        y_parts = parts(yt, dtype, PARTS)
        if PARTS == 1:
            yt = rounded(yt, dtype)
        X_parts = turned(two_terms(X, dtype, PARTS))
        ut = yt - applied(y_parts, X_parts, PARTS) * beta[None, :]
        u_parts = parts(ut, dtype, PARTS)
        ot = added(u_parts, turned_parts(scores, dtype, PARTS), ot, PARTS)
        o_base = place(o_ptr, row, hv, HV, V)
        put_block(o_base, tl.trans(ot), c, values, is_token, HV, V, BV)
        if DECAYS:
            u_parts = parts(ut * out[None, :], dtype, PARTS)
            St *= through
        St = added(u_parts, k, St, PARTS)
    tl.store(told_ptr + pid, tl.sum(told))
    tl.store(final_ptr + pid.to(tl.int64) * (K * V) + offsets, St, mask=within)
