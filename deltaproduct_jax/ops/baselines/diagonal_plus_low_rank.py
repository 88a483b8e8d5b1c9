"""Transitions that are diagonal plus a matrix of rank one: the recurrence of RWKV-7.

    S_t = diag(exp(g_t)) S_{t-1} + b_t (S_{t-1}^T a_t)^T + k_t v_t^T,    o_t = scale * S_t^T q_t

Chunked: with u_t = S_{t-1}^T a_t known, this is linear attention with two writes per token, k v^T
and b u^T. What a token reads of earlier writes makes u the solution of a unit lower-triangular
system, as in the WY form of the delta rule. Sources: RWKV-7 (Peng et al., 2025); the chunked form
is that of DPLR in flash-linear-attention, derived anew.
"""

import functools

import jax.numpy as jnp
from jaxtyping import Array, Float, Integer

from deltaproduct_jax.ops.baselines import chunks
from deltaproduct_jax.ops.baselines.sequences import check_together, run_checked
from deltaproduct_jax.ops.baselines.wy import read_and_write, solve_writes
from deltaproduct_jax.ops.checks import check_scale
from deltaproduct_jax.ops.containment import contained, only_finite
from deltaproduct_jax.ops.decays import forgets
from deltaproduct_jax.ops.precision import Matmul, accumulator_dtype

# Layout of every array along T.
_LAYOUTS = {name: ("B", "T", "H", "V" if name == "v" else "K") for name in "qkvabg"}


def diagonal_plus_low_rank(
    q: Float[Array, "B T H K"],
    k: Float[Array, "B T H K"],
    v: Float[Array, "B T H V"],
    a: Float[Array, "B T H K"],
    b: Float[Array, "B T H K"],
    g: Float[Array, "B T H K"],
    *,
    scale: float | None = None,
    initial_state: Float[Array, "B H K V"] | None = None,
    segment_ids: Integer[Array, "B T"] | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
) -> tuple[Float[Array, "B T H V"], Float[Array, "B H K V"]]:
    """The recurrence over whole sequences.

    Args:
        q: queries.
        k: keys.
        v: values.
        a: what the rank-one part reads the state with. RWKV-7's is the unit key.
        b: where the rank-one part writes. RWKV-7's is minus the key times its learning rate.
        g: log of the diagonal gate, at most 0.
        scale, initial_state, segment_ids, implementation, chunk_size: as
            :func:`gated_linear_attention` takes them.

    Returns:
        ``(o, final_state)``, in the dtype of ``v``, and in float32 at least.

    Raises:
        ValueError: naming the argument, what it got and what it may be.
    """
    arrays = {"q": q, "k": k, "v": v, "a": a, "b": b, "g": g}
    options = {"scale": scale, "implementation": implementation, "chunk_size": chunk_size}
    return run_checked(_run, arrays, _LAYOUTS, initial_state, segment_ids, **options)


def _run(arrays, *, scale, implementation, chunk_size):
    q, k, v, a, b, g, initial_state, segment_ids = arrays.values()
    state = chunks.start(initial_state, k, v)
    if 0 in v.shape:
        return v, state

    def run(tokens, state):
        tokens = only_finite(tokens)
        if implementation == "recurrent":
            step = functools.partial(_step, scale=scale)
            return chunks.scan_tokens(step, state, jnp.zeros_like(state), tokens, segment_ids)
        return _chunked(*tokens, state, segment_ids, scale, chunk_size)

    settings = {"head_axes": (2,) * 6, "check_state": initial_state is not None}
    resets = chunks.resets_of(segment_ids)
    return contained(run, (q, k, v, a, b, forgets(g)), state, resets, **settings)


def diagonal_plus_low_rank_step(
    state: Float[Array, "B H K V"],
    q: Float[Array, "B H K"],
    k: Float[Array, "B H K"],
    v: Float[Array, "B H V"],
    a: Float[Array, "B H K"],
    b: Float[Array, "B H K"],
    g: Float[Array, "B H K"],
    *,
    scale: float | None = None,
) -> tuple[Float[Array, "B H V"], Float[Array, "B H K V"]]:
    """One token: returns the output and the state after it; see :func:`diagonal_plus_low_rank`."""
    arrays = {"q": q, "k": k, "v": v, "a": a, "b": b, "g": g}
    check_together(arrays, _LAYOUTS, state, one_token=True)
    return _step(state, q, k, v, a, b, g, check_scale(scale, q.shape[-1]))


def _step(state_BHKV, q, k, v, a, b, g, scale):
    wide = accumulator_dtype(q.dtype)
    matmul = Matmul.wide(q.dtype, None)
    read_BHV = matmul("bhk,bhkv->bhv", a, state_BHKV)
    state_BHKV = jnp.exp(g.astype(wide))[..., None] * state_BHKV
    state_BHKV += b.astype(wide)[..., None] * read_BHV[..., None, :]
    state_BHKV += k.astype(wide)[..., None] * v.astype(wide)[..., None, :]
    o_BHV = scale * matmul("bhk,bhkv->bhv", q, state_BHKV)
    return o_BHV.astype(v.dtype), state_BHKV


def _chunked(q, k, v, a, b, g, state, segment_ids, scale, chunk_size):
    wide = accumulator_dtype(q.dtype)
    matmul, exact = Matmul.of(q.dtype, None), Matmul.wide(q.dtype, None)
    resets = chunks.resets_of(segment_ids)
    if resets is not None:  # the first token of a segment has no state to read
        a = jnp.where(resets[:, :, None, None], 0, a)

    def body(state_BHKV, chunk):
        q, k, v, a, b, g, resets_BC = chunk
        C = q.shape[2]
        decays = chunks.diagonal_decays(g, resets_BC)

        # Token c reads with a the state before it, that is, after token c - 1.
        def before(x, first):
            return jnp.concatenate([first, x[:, :, :-1]], axis=2)

        a_next = jnp.concatenate([a[:, :, 1:], jnp.zeros_like(a[:, :, :1])], axis=2)
        nothing = jnp.zeros((*a.shape[:2], 1, C), wide)
        system_BHCC = before(chunks.decayed_products(a_next, b, decays, exact), nothing)
        reads_BHCC = before(chunks.decayed_products(a_next, k, decays, matmul), nothing)
        into_before = before(decays.into, jnp.ones_like(decays.into[:, :, :1]))
        u_BHCV = matmul("bhck,bhkv->bhcv", a.astype(wide) * into_before, state_BHKV)
        u_BHCV += matmul("bhcs,bhsv->bhcv", reads_BHCC, v)
        u_BHCV = solve_writes(-system_BHCC, u_BHCV, exact, matmul)
        writes = ((k, v), (b, u_BHCV))
        o_BHCV, next_BHKV = read_and_write(state_BHKV, q, writes, decays, matmul)
        return next_BHKV, (scale * o_BHCV).astype(v.dtype)

    inputs = (q, k, v, a, b, g.astype(wide))
    return chunks.scan_chunks(body, state, inputs, segment_ids, chunk_size)
