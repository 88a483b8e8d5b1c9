"""What is not finite stays where it is, on GPUs: rows and heads that have some are made anew.

No kernel of a pass chooses between numbers by a mask, so what is bad once, in keys, values, step
sizes, decays or the state before, stays in a state until the end: in all of its rows, so that one
tells of all. A query reaches no state: of those the kernels tell that multiply them with keys.
`mend` runs behind every forward pass, and mostly ends at once. Letters as in kernels.py.
"""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.anew.bad_tokens import (
    fill,
    first_bad,
    is_bad_or_not_zero,
)
from deltaproduct_jax.ops.kernels.triton.narrow_activation import entered
from deltaproduct_jax.ops.kernels.triton.narrow_parts import place
from deltaproduct_jax.ops.kernels.triton.parts import forgets, square


@triton.jit
def is_bad(x):
    """Whether anything is not finite, as 0 or 1."""
    x = x.to(tl.float32)
    return (tl.sum(tl.where(x - x == 0.0, 0, 1), axis=0) > 0).to(tl.int32)


@triton.jit
def finite(x):
    """0 for what is not."""
    return tl.where(x - x == 0.0, x, 0.0)


@triton.jit
def vector(ptr, row, head, columns, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """One row of one head of an array [rows, HEADS, WIDTH]."""
    return tl.load(ptr + (row * HEADS + head) * WIDTH + columns, mask=columns < WIDTH, other=0.0)


@triton.jit
def entered_vector(x, RAW: tl.constexpr, UNIT: tl.constexpr, EPSILON: tl.constexpr):
    """A vector with 0 for what is not finite, as the op reads it, in float32."""
    y = finite(x.to(tl.float32))
    if RAW:
        y = tl.sum(entered(y.to(x.dtype)[None, :], EPSILON, RAW, UNIT).to(tl.float32), axis=0)
    return y


@triton.jit
def first_bad_token(
    k_ptr, v_ptr, beta_ptr, g_ptr, row, h, hv, T: tl.constexpr, R: tl.constexpr,
    H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr,
    BV: tl.constexpr, HAS_G: tl.constexpr,
):  # fmt: skip
    """The first token of a head with anything not finite that reaches a state; T if none has.

    Not by its query: those are seen to apart from it.
    """
    begin, end = tl.full([], 0, tl.int32), tl.full([], T * R, tl.int32)
    first = first_bad(place(k_ptr, row * R, h, H, K), begin, end, H, K, BK) // R
    first = first_bad(place(v_ptr, row * R, hv, HV, V), begin, first * R, HV, V, BV) // R
    first = first_bad(place(beta_ptr, row * R, hv, HV, 1), begin, first * R, HV, 1, 1) // R
    if HAS_G:
        first = first_bad(place(g_ptr, row, hv, HV, 1), begin, first, HV, 1, 1, True)
    return first


@triton.jit
def mend(
    q_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, resets_ptr, initial_ptr, told_ptr, o_in_ptr,
    states_in_ptr, o_ptr, states_ptr,
    SCALE: tl.constexpr, HEADS: tl.constexpr, AT_ONCE: tl.constexpr, TOLD: tl.constexpr,
    TOLD_AT_ONCE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, H: tl.constexpr,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    COLUMNS: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr, HAS_G: tl.constexpr,
    HAS_RESETS: tl.constexpr, RAW: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Outputs and final states of those heads of AT_ONCE in which anything is not finite.

    The plain recurrence in float32, a token after the other: outputs from the start of the block of
    C tokens on in which the first one is that spoils a state, NaN from a bad one to the end of its
    segment, and the final state. What overflows although nothing was bad stays as it is. Of a
    sequence in PIECES the states after each tell, as a piece may forget what was before it. Of
    queries tell TOLD numbers a head, looked at TOLD_AT_ONCE at a time.
    """
    begin = tl.program_id(0).to(tl.int64) * AT_ONCE
    heads, values = begin + tl.arange(0, AT_ONCE), tl.arange(0, BV)
    is_head = (heads < HEADS)[:, None]
    told = tl.zeros([AT_ONCE, BV], tl.float32)
    for piece in range(0, PIECES):
        line = ((heads * PIECES + piece) * (K * V))[:, None] + values[None, :]
        told += tl.load(states_in_ptr + line, is_head & (values < V)[None, :], 0.0) * 0.0
    of_states = tl.sum(told, axis=1)
    told = tl.zeros([AT_ONCE, TOLD_AT_ONCE], tl.float32)
    for at in range(0, TOLD, TOLD_AT_ONCE):
        number = (at + tl.arange(0, TOLD_AT_ONCE))[None, :]
        pointers = told_ptr + heads[:, None] * TOLD + number
        told += tl.load(pointers, is_head & (number < TOLD), 0.0) * 0.0
    of_queries = tl.sum(told, axis=1)
    if tl.sum(of_states + of_queries, axis=0) != 0.0:
        for i in range(0, AT_ONCE):
            is_it = tl.arange(0, AT_ONCE) == i
            if tl.sum(tl.where(is_it, of_states, 0.0), axis=0) != 0.0:
                mend_head(
                    q_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, resets_ptr, initial_ptr, o_ptr,
                    states_ptr, begin + i, SCALE, T, R, H, HV, K, BK, V, BV, COLUMNS, C, PIECES,
                    HAS_G, HAS_RESETS, RAW, EPSILON,
                )  # fmt: skip
            if tl.sum(tl.where(is_it, of_queries, 0.0), axis=0) != 0.0:
                spoil_head(
                    q_ptr, resets_ptr, o_ptr, states_ptr, begin + i, T, H, HV, K, BK, V, BV,
                    PIECES, HAS_RESETS,
                )  # fmt: skip


@triton.jit
def mend_in_place(
    q_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, resets_ptr, initial_ptr, told_ptr, o_ptr, states_ptr,
    SCALE: tl.constexpr, HEADS: tl.constexpr, AT_ONCE: tl.constexpr, TOLD: tl.constexpr,
    TOLD_AT_ONCE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, H: tl.constexpr,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    COLUMNS: tl.constexpr, C: tl.constexpr, PIECES: tl.constexpr, HAS_G: tl.constexpr,
    HAS_RESETS: tl.constexpr, RAW: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """`mend` where one pointer stands for an array and what takes its place."""
    mend(
        q_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, resets_ptr, initial_ptr, told_ptr, o_ptr, states_ptr,
        o_ptr, states_ptr, SCALE, HEADS, AT_ONCE, TOLD, TOLD_AT_ONCE, T, R, H, HV, K, BK, V, BV,
        COLUMNS, C, PIECES, HAS_G, HAS_RESETS, RAW, EPSILON,
    )  # fmt: skip


@triton.jit
def mend_head(
    q_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, resets_ptr, initial_ptr,
    o_ptr, states_ptr, pid,
    SCALE: tl.constexpr, T: tl.constexpr, R: tl.constexpr, H: tl.constexpr, HV: tl.constexpr,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, COLUMNS: tl.constexpr,
    C: tl.constexpr, PIECES: tl.constexpr, HAS_G: tl.constexpr, HAS_RESETS: tl.constexpr,
    RAW: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """One head of a sequence, COLUMNS columns of the state at a time."""
    row, hv = pid // HV * T, pid % HV
    h = hv // (HV // H)
    keys, values = tl.arange(0, BK), tl.arange(0, BV)
    bad_state, _ = is_bad_or_not_zero(initial_ptr + pid * (K * V), K, BK, V)
    of_state = bad_state.to(tl.int32)
    first = first_bad_token(
        k_ptr, v_ptr, beta_ptr, g_ptr, row, h, hv, T, R, H, HV, K, BK, V, BV, HAS_G
    )  # fmt: skip
    begin = tl.where(of_state > 0, 0, first // C * C)
    is_any = (of_state > 0) | (first < T)
    for part in range(0, tl.where(is_any, tl.cdiv(V, COLUMNS), 0)):
        columns = part * COLUMNS + tl.arange(0, COLUMNS)
        within = (keys < K)[:, None] & (columns < V)[None, :]
        S = tl.load(square(initial_ptr, pid, keys, columns, K, V), mask=within, other=0.0)
        S = finite(S)
        reached = of_state
        for t in range(0, T):
            token = row + t
            if HAS_RESETS:
                starts = tl.load(resets_ptr + token) != 0
                S = tl.where(starts, 0.0, S)
                reached = tl.where(starts, 0, reached)
            if HAS_G:
                g = forgets(tl.load(g_ptr + token * HV + hv))
                reached = tl.where(g - g == 0.0, reached, 1)
                S *= tl.exp(finite(g))
            for r in range(0, R):
                update = token * R + r
                k = vector(k_ptr, update, h, keys, H, K)
                all_v = vector(v_ptr, update, hv, values, HV, V)
                v = vector(v_ptr, update, hv, columns, HV, V)
                beta = tl.load(beta_ptr + update * HV + hv).to(tl.float32)
                told = tl.maximum(is_bad(k), is_bad(all_v))
                reached = tl.where(beta - beta == 0.0, tl.maximum(reached, told), 1)
                k = entered_vector(k, RAW, True, EPSILON)
                v = entered_vector(v, RAW, False, EPSILON)
                error = v - tl.sum(k[:, None] * S, axis=0)
                S += (finite(beta) * k)[:, None] * error[None, :]
            q = vector(q_ptr, token, h, keys, H, K)
            reached = tl.maximum(reached, is_bad(q))
            o = SCALE * tl.sum(entered_vector(q, RAW, True, EPSILON)[:, None] * S, axis=0)
            o = tl.where(reached > 0, float("nan"), o).to(o_ptr.dtype.element_ty)
            pointers = o_ptr + (token * HV + hv) * V + columns
            tl.store(pointers, o, mask=(columns < V) & (t >= begin))
        S = tl.where(reached > 0, float("nan"), S)
        last = pid * PIECES + PIECES - 1
        tl.store(square(states_ptr, last, keys, columns, K, V), S, mask=within)


@triton.jit
def spoil_head(
    q_ptr, resets_ptr, o_ptr, states_ptr, pid, T: tl.constexpr, H: tl.constexpr,
    HV: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    PIECES: tl.constexpr, HAS_RESETS: tl.constexpr,
):  # fmt: skip
    """NaN for outputs of one head from bad queries to the end of their segments."""
    row, hv = pid // HV * T, pid % HV
    h = hv // (HV // H)
    q_base = place(q_ptr, row, h, H, K)
    begin, end = tl.full([], 0, tl.int32), tl.full([], T, tl.int32)
    first = first_bad(q_base, begin, end, H, K, BK)
    keys, values = tl.arange(0, BK), tl.arange(0, BV)
    reached = tl.full([], 0, tl.int32)
    for t in range(first, T):
        token = row + t
        if HAS_RESETS:
            reached = tl.where(tl.load(resets_ptr + token) != 0, 0, reached)
        reached = tl.maximum(reached, is_bad(vector(q_ptr, token, h, keys, H, K)))
        nan = tl.full([BV], float("nan"), tl.float32).to(o_ptr.dtype.element_ty)
        tl.store(o_ptr + (token * HV + hv) * V + values, nan, mask=(values < V) & (reached > 0))
    last = states_ptr + (pid * PIECES + PIECES - 1) * (K * V)
    fill(last, 0, tl.where(reached > 0, K, 0), float("nan"), 1, V, BV)
