"""The chunked form: matmuls within a chunk of tokens, a scan over chunks, and its backward pass.

README.md beside this file derives both. Everything is token-level: one readout and one decay per
token, although a chunk of C tokens holds M = C * R rank-one updates.

Shape suffixes: B batch, T tokens, N chunks, C tokens in a chunk, R Householder factors per token,
M = C * R updates in a chunk (token-major), H key heads, G value heads per key head (Hv = H * G), K
key width, V value width. In einsums "c" and "s" are two positions on C, "m" and "n" two on M.

Sources: the WY form of products of Householder matrices (Bischof and Van Loan, 1987); DeltaNet's
chunked form (Yang et al., 2024, section 3) and its gated form (Yang et al., 2025); DeltaProduct
(Siems et al., 2025), section 3. The backward pass is derived in README.md.
"""

import dataclasses
import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.cut import Cut
from deltaproduct_jax.ops.decays import Decays, decays_backward, decays_of
from deltaproduct_jax.ops.gram import gram
from deltaproduct_jax.ops.layout import (
    ChunkedTokens,
    MergedTokens,
    Tokens,
    from_chunks,
    merge_updates,
    outputs_from_chunks,
    outputs_to_chunks,
    pad,
    put,
    split_updates,
    to_chunks,
)
from deltaproduct_jax.ops.linear import spread
from deltaproduct_jax.ops.precision import Matmul, accumulator_dtype
from deltaproduct_jax.ops.triangular import unit_lower_inverse
from deltaproduct_jax.ops.varying import zeros_varying_as


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed before anything runs."""

    scale: float
    precision: str | None  # as the caller named it, for the recurrence
    cut: Cut
    matmul: Matmul
    inverse_matmul: Matmul
    gate_matmul: Matmul  # of sums of gates
    widen: bool  # inputs before the loop over chunks, outputs after it
    refine: bool = False  # the inverse, by one step of Newton's


class ChunkMatrices(NamedTuple):
    """What does not depend on the state, so that it is computed for all chunks at once."""

    gram: jax.Array  # NBHGMM: products of keys with the decay between them, strictly causal
    inverse: jax.Array  # NBHGMM: of I + L, L_mn = gram_mn beta_n
    scores: jax.Array  # NBHGCM: what a token reads of every update, without beta
    decays: Decays


class Recomputed(NamedTuple):
    """Chunks on the way back."""

    x: ChunkedTokens
    p: ChunkMatrices
    states: jax.Array  # NBHGKV: before every chunk
    key_state: jax.Array  # NBHGMV: what keys read from it
    errors: jax.Array  # NBHGMV: what values differ by from what keys read, at their update


def chunked(tokens: Tokens, initial_state: jax.Array, settings: Settings, *, keep_states: bool):
    """Forward pass.

    Args:
      tokens: q [B, T, H, K], k [B, T, R, H, K], v [B, T, R, Hv, V], beta [B, T, R, Hv], g
        [B, T, Hv] or None, resets [B, T] bool or None; T at least 1.
      initial_state: [B, Hv, K, V] in float32 or float64.
      settings: scale, precision, and how the sequence is cut.
      keep_states: return the state before every span too, as the backward pass needs it.

    Returns:
      ``(o, final_state, states)``: [B, T, Hv, V], [B, Hv, K, V] and, with N the number of spans,
      [N, B, H, G, K, V] or None.
    """
    B, T, _, H, K = tokens.k.shape
    Hv, V = tokens.v.shape[-2:]
    C, cut = settings.cut.chunk_size, settings.cut
    chunks_per_span = cut.span // C
    one_by_one = cut.spans_at_once == 1
    N = 1 if one_by_one else cut.chunks_at_once
    nested = keep_states and one_by_one and chunks_per_span > 1
    padded = _looped(tokens, C if one_by_one and not keep_states else cut.span, settings)

    def group(carry, n):
        state_BHGKV, o_BTHGV = carry
        x = to_chunks(padded, n, C, N, H, by_case=settings.widen)
        o_NBHGCV, state_BHGKV, states = _forward_of_chunks(x, state_BHGKV, settings)
        # Written in place: a scan's stacking would put N first and cost a copy of the sequence.
        o_BTHGV = put(o_BTHGV, outputs_from_chunks(o_NBHGCV).astype(o_BTHGV.dtype), n)
        return (state_BHGKV, o_BTHGV), states[::chunks_per_span] if keep_states else None

    def span(carry, n):
        chunks = n * chunks_per_span + jnp.arange(chunks_per_span)
        after, states = jax.lax.scan(group, carry, chunks)
        return after, states[0] if keep_states else None

    state_BHGKV = initial_state.reshape(B, H, Hv // H, K, V)
    o_BTHGV = zeros_varying_as((B, padded.q.shape[1], H, Hv // H, V), padded.v)
    steps = jnp.arange(padded.q.shape[1] // (cut.span if nested else N * C))
    body = span if nested else group
    (state_BHGKV, o_BTHGV), states = jax.lax.scan(body, (state_BHGKV, o_BTHGV), steps)
    o = o_BTHGV[:, :T].reshape(B, T, Hv, V).astype(tokens.v.dtype)
    if keep_states:
        states = states.reshape(-1, *state_BHGKV.shape)
    return o, state_BHGKV.reshape(initial_state.shape), states


def chunked_backward(tokens: Tokens, states: jax.Array, do, dfinal_state, settings: Settings):
    """Cotangents of the inputs, from those of ``o`` and ``final_state`` and the kept states.

    Walks the sequence backwards and recomputes it, a span or several, from the kept states.

    Returns:
      ``(dtokens, dinitial_state)``: shapes and dtypes of the inputs; no cotangent for resets.
    """
    H, K = tokens.k.shape[-2:]
    B, _, Hv, V = do.shape
    cut = settings.cut
    C, N = cut.chunk_size, cut.chunks_at_once
    padded = _looped(tokens, cut.span, settings)
    do_BTHGV = pad(do, cut.span).reshape(B, -1, H, Hv // H, V).astype(padded.v.dtype)

    def body(carry, item):
        dstate_BHGKV, gradients = carry
        n, states_NBHGKV = item
        r = _recompute(
            to_chunks(padded, n, C, N, H, by_case=settings.widen), states_NBHGKV, settings
        )
        do_NBHGCV = outputs_to_chunks(do_BTHGV, n, C, N).astype(states.dtype)
        dchunks, dstate_BHGKV = _backward_of_chunks(r, do_NBHGCV, dstate_BHGKV, settings)
        parts = from_chunks(dchunks, padded)
        return (dstate_BHGKV, jax.tree.map(functools.partial(put, n=n), gradients, parts)), None

    differentiable = padded._replace(resets=None)
    gradients = jax.tree.map(lambda x: zeros_varying_as(x.shape, x), differentiable)
    dstate_BHGKV = dfinal_state.reshape(B, H, Hv // H, K, V)
    states = states.reshape(-1, cut.spans_at_once, *states.shape[1:])
    (dstate_BHGKV, gradients), _ = jax.lax.scan(
        body, (dstate_BHGKV, gradients), (jnp.arange(len(states)), states), reverse=True
    )
    gradients = split_updates(gradients, tokens)
    return gradients, dstate_BHGKV.reshape(dfinal_state.shape)


def _looped(tokens: Tokens, multiple: int, settings: Settings) -> MergedTokens:
    """The inputs as the loop over chunks reads them."""
    if settings.widen:
        wide = jax.tree.map(
            lambda x: x.astype(accumulator_dtype(x.dtype)), tokens._replace(resets=None)
        )
        tokens = wide._replace(resets=tokens.resets)
    return merge_updates(pad(tokens, multiple))


def _forward_of_chunks(x: ChunkedTokens, state_BHGKV, settings: Settings):
    """Outputs of a group of chunks, the state after it, and the state before each of its chunks."""
    matmul = settings.matmul
    p = _chunk_matrices(x, settings)
    state_BHGKV, states_NBHGKV, _, error_NBHGMV = _walk(x, p, state_BHGKV, settings)
    qk_scores_NBHGCM = spread(x.beta, -2, x.q.shape[-2]) * p.scores
    o_NBHGCV = matmul("...cm,...mv->...cv", qk_scores_NBHGCM, error_NBHGMV)
    read_NBHGCV = matmul("...hck,...hgkv->...hgcv", x.q, states_NBHGKV)
    o_NBHGCV += settings.scale * p.decays.into[..., None] * read_NBHGCV
    return o_NBHGCV, state_BHGKV, states_NBHGKV


def _chunk_matrices(x: ChunkedTokens, settings: Settings) -> ChunkMatrices:
    """All that does not depend on the state, for every chunk of a group at once."""
    matmul = settings.matmul
    C, M = x.q.shape[-2], x.k.shape[-2]
    of_gates = (x.g, x.resets, C, M // C, settings.gate_matmul)
    decays = decays_of(*of_gates, by_token=settings.widen)
    kk_NBHMM = gram(x.k, matmul)
    qk_NBHCM = matmul("...ck,...mk->...cm", x.q, x.k)
    G = x.v.shape[3]
    gram_NBHGMM = decays.between * spread(kk_NBHMM, 3, G)
    lower_NBHGMM = gram_NBHGMM * spread(x.beta, -2, M)
    inverse_NBHGMM = unit_lower_inverse(
        lower_NBHGMM,
        settings.inverse_matmul,
        half_rows=settings.cut.spans_at_once > 1,
        refine=settings.refine,
    )
    scores_NBHGCM = settings.scale * decays.within * spread(qk_NBHCM, 3, G)
    return ChunkMatrices(gram_NBHGMM, inverse_NBHGMM, scores_NBHGCM, decays)


def _walk(x: ChunkedTokens, p: ChunkMatrices, state_BHGKV, settings: Settings):
    """State after the chunks; state before, what keys read from it, and errors, of each chunk.

    The errors are (I + L)^-1 (v - into (k S)). Several spans at once take them as from_v -
    from_state S, and weight the keys that write them beforehand: then only the product with S and
    the update of S go chunk by chunk, at the price of one more rounding of bfloat16 operands (on
    the way back the same product is taken in two passes, or errors of dv and dbeta would grow).
    """
    matmul = settings.matmul
    into_NBHGM = jnp.broadcast_to(p.decays.into_update, x.beta.shape)
    out_NBHGM = x.beta * p.decays.out

    if settings.cut.spans_at_once > 1:
        weighted_NBHGMM = p.inverse * spread(into_NBHGM, -2, into_NBHGM.shape[-1])
        from_v_NBHGMV = matmul.in_two_passes("...mn,...nv->...mv", p.inverse, x.v)
        from_state_NBHGMK = matmul.in_two_passes("...hgmn,...hnk->...hgmk", weighted_NBHGMM, x.k)

        def step(state_BHGKV, chunk):
            error_BHGMV, from_state_BHGMK, keys_out_BHGMK, through_BHG1V = chunk
            error_BHGMV -= matmul("...mk,...kv->...mv", from_state_BHGMK, state_BHGKV)
            next_BHGKV = matmul("...mk,...mv->...kv", keys_out_BHGMK, error_BHGMV)
            next_BHGKV += _by_rows(through_BHG1V, state_BHGKV)
            return next_BHGKV, (state_BHGKV, None, error_BHGMV)

        from_state_NBHGMK = from_state_NBHGMK.astype(matmul.operand)
        keys_out_NBHGMK = _weighted_keys(x, out_NBHGM, matmul)
        chunks = (from_v_NBHGMV, from_state_NBHGMK, keys_out_NBHGMK, _through_rows(x, p))
    else:

        def step(state_BHGKV, chunk):
            v_BHGMV, k_BHMK, into_BHGM, inverse_BHGMM, out_BHGM, through_BHG1V = chunk
            key_state_BHGMV = matmul("...hmk,...hgkv->...hgmv", k_BHMK, state_BHGKV)
            rhs_BHGMV = v_BHGMV.astype(state_BHGKV.dtype) - into_BHGM[..., None] * key_state_BHGMV
            error_BHGMV = matmul.in_two_passes("...mn,...nv->...mv", inverse_BHGMM, rhs_BHGMV)
            left_BHGMV = out_BHGM[..., None] * error_BHGMV
            next_BHGKV = matmul("...hmk,...hgmv->...hgkv", k_BHMK, left_BHGMV)
            next_BHGKV += _by_rows(through_BHG1V, state_BHGKV)
            return next_BHGKV, (state_BHGKV, key_state_BHGMV, error_BHGMV)

        chunks = (x.v, x.k, into_NBHGM, p.inverse, out_NBHGM, _through_rows(x, p))

    state_BHGKV, (states_NBHGKV, key_state_NBHGMV, error_NBHGMV) = _scan(step, state_BHGKV, chunks)
    return state_BHGKV, states_NBHGKV, key_state_NBHGMV, error_NBHGMV


def _walk_back(x: ChunkedTokens, p: ChunkMatrices, do_NBHGCV, dnext_BHGKV, settings: Settings):
    """Cotangents of the state before the chunks, after each, and of v - into (k S) in each.

    The transposed system gives the last from those of the errors, scores^T do + out (k dS').
    Several spans at once share out the work as in `_walk`.
    """
    matmul = settings.matmul
    into_NBHGM = jnp.broadcast_to(p.decays.into_update, x.beta.shape)
    out_NBHGM = x.beta * p.decays.out
    qk_scores_NBHGCM = spread(x.beta, -2, x.q.shape[-2]) * p.scores
    derror_NBHGMV = matmul("...cm,...cv->...mv", qk_scores_NBHGCM, do_NBHGCV)
    do_into_NBHGCV = settings.scale * p.decays.into[..., None] * do_NBHGCV
    dread_NBHGKV = matmul("...hck,...hgcv->...hgkv", x.q, do_into_NBHGCV)

    if settings.cut.spans_at_once > 1:
        weighted_NBHGMM = p.inverse * out_NBHGM[..., :, None]
        drhs_NBHGMV = matmul.in_two_passes("...nm,...nv->...mv", p.inverse, derror_NBHGMV)
        from_next_NBHGMK = matmul.in_two_passes("...hgnm,...hnk->...hgmk", weighted_NBHGMM, x.k)

        def step(dnext_BHGKV, chunk):
            drhs_BHGMV, from_next_BHGMK, keys_into_BHGMK, dread_BHGKV, through_BHG1V = chunk
            drhs_BHGMV += matmul.in_two_passes("...mk,...kv->...mv", from_next_BHGMK, dnext_BHGKV)
            dstate_BHGKV = dread_BHGKV + _by_rows(through_BHG1V, dnext_BHGKV)
            dstate_BHGKV -= matmul("...mk,...mv->...kv", keys_into_BHGMK, drhs_BHGMV)
            return dstate_BHGKV, (dnext_BHGKV, drhs_BHGMV)

        own = (drhs_NBHGMV, from_next_NBHGMK, _weighted_keys(x, into_NBHGM, matmul))
    else:

        def step(dnext_BHGKV, chunk):
            derror_BHGMV, out_BHGM, inverse_BHGMM, k_BHMK, into_BHGM, *rest = chunk
            dread_BHGKV, through_BHG1V = rest
            from_next_BHGMV = matmul("...hmk,...hgkv->...hgmv", k_BHMK, dnext_BHGKV)
            derror_BHGMV += out_BHGM[..., None] * from_next_BHGMV
            drhs_BHGMV = matmul.in_two_passes("...nm,...nv->...mv", inverse_BHGMM, derror_BHGMV)
            dstate_BHGKV = dread_BHGKV + _by_rows(through_BHG1V, dnext_BHGKV)
            reads_BHGMV = into_BHGM[..., None] * drhs_BHGMV
            dstate_BHGKV -= matmul("...hmk,...hgmv->...hgkv", k_BHMK, reads_BHGMV)
            return dstate_BHGKV, (dnext_BHGKV, drhs_BHGMV)

        own = (derror_NBHGMV, out_NBHGM, p.inverse, x.k, into_NBHGM)

    chunks = (*own, dread_NBHGKV, _through_rows(x, p))
    dstate_BHGKV, (dnext_NBHGKV, drhs_NBHGMV) = _scan(step, dnext_BHGKV, chunks, reverse=True)
    return dstate_BHGKV, dnext_NBHGKV, drhs_NBHGMV


def _weighted_keys(x: ChunkedTokens, weights_NBHGM, matmul: Matmul):
    keys_NBHGMK = spread(x.k.astype(weights_NBHGM.dtype), 3, weights_NBHGM.shape[3])
    return (weights_NBHGM[..., None] * keys_NBHGMK).astype(matmul.operand)


def _by_rows(rows_BHG1V, state_BHGKV):
    """The state, every row of it times the same one."""
    return spread(rows_BHG1V[..., 0, :], -2, state_BHGKV.shape[-2]) * state_BHGKV


def _through_rows(x: ChunkedTokens, p: ChunkMatrices):
    """``through`` as [N, B, H, G, 1, V]: a TPU takes rows from it faster than scalars."""
    through_NBHG11 = p.decays.through[..., None, None]
    return jnp.broadcast_to(through_NBHG11, (*x.v.shape[:4], 1, x.v.shape[-1]))


def _scan(body, carry, xs, reverse=False):
    """A scan, but straight-line code for a few steps."""
    few = jax.tree.leaves(xs)[0].shape[0] <= 4
    return jax.lax.scan(body, carry, xs, reverse=reverse, unroll=few)


def _recompute(x: ChunkedTokens, states_NBHGKV, settings: Settings) -> Recomputed:
    """What the forward pass computed in chunks, given the states before their spans."""
    p = _chunk_matrices(x, settings)
    if settings.cut.chunks_at_once > settings.cut.spans_at_once:
        _, states_NBHGKV, *rest = _walk(x, p, states_NBHGKV[0], settings)
        if settings.cut.spans_at_once == 1:
            return Recomputed(x, p, states_NBHGKV, *rest)
    matmul = settings.matmul
    key_state_NBHGMV = matmul("...hmk,...hgkv->...hgmv", x.k, states_NBHGKV)
    rhs_NBHGMV = x.v.astype(x.beta.dtype) - p.decays.into_update[..., None] * key_state_NBHGMV
    error_NBHGMV = matmul.in_two_passes("...mn,...nv->...mv", p.inverse, rhs_NBHGMV)
    return Recomputed(x, p, states_NBHGKV, key_state_NBHGMV, error_NBHGMV)


def _backward_of_chunks(r: Recomputed, do_NBHGCV, dnext_BHGKV, settings: Settings):
    """Cotangents of the inputs of chunks, in their layout, and of the state that entered them."""
    x, p, states_NBHGKV, key_state_NBHGMV, error_NBHGMV = r
    matmul = settings.matmul
    scale, R = settings.scale, x.k.shape[-2] // x.q.shape[-2]
    decays = p.decays
    beta_NBHGCM, beta_NBHGMM = (spread(x.beta, -2, y.shape[-2]) for y in (x.q, x.k))
    dstate_BHGKV, dnext_NBHGKV, drhs_NBHGMV = _walk_back(x, p, do_NBHGCV, dnext_BHGKV, settings)

    dlower_NBHGMM = -matmul("...mv,...nv->...mn", drhs_NBHGMV, error_NBHGMV)
    dscores_NBHGCM = matmul("...cv,...mv->...cm", do_NBHGCV, error_NBHGMV)
    dwritten_NBHGMK = matmul("...mv,...kv->...mk", error_NBHGMV, dnext_NBHGKV)
    do_into_NBHGCV = scale * decays.into[..., None] * do_NBHGCV
    drhs_into_NBHGMV = decays.into_update[..., None] * drhs_NBHGMV

    # Sums over the value heads G of a key head come before the products with q and k.
    dqk_NBHCM = _sum_of_group(scale * decays.within * beta_NBHGCM * dscores_NBHGCM)
    dkk_NBHMM = _sum_of_group(decays.between * beta_NBHGMM * dlower_NBHGMM)
    dkk_NBHMM += jnp.swapaxes(dkk_NBHMM, -1, -2)
    dq_NBHCK = matmul("...cm,...mk->...ck", dqk_NBHCM, x.k)
    dq_NBHCK += matmul("...hgcv,...hgkv->...hck", do_into_NBHGCV, states_NBHGKV)
    dk_NBHMK = matmul("...cm,...ck->...mk", dqk_NBHCM, x.q)
    dk_NBHMK += matmul("...mn,...nk->...mk", dkk_NBHMM, x.k)
    dk_NBHMK += _sum_of_group((x.beta * decays.out)[..., None] * dwritten_NBHGMK)
    dk_NBHMK -= matmul("...hgmv,...hgkv->...hmk", drhs_into_NBHGMV, states_NBHGKV)

    # Beta scales the columns of scores and gram and what is written to the state.
    of_scores_NBHGCM = dscores_NBHGCM * p.scores
    of_gram_NBHGMM = dlower_NBHGMM * p.gram
    keys_NBHGMK = spread(x.k.astype(x.beta.dtype), 3, x.v.shape[3])
    of_keys_NBHGM = decays.out * jnp.sum(dwritten_NBHGMK * keys_NBHGMK, axis=-1)
    sum_of_rows = _sum_of_rows if settings.widen else functools.partial(jnp.sum, axis=-2)
    dbeta_NBHGM = sum_of_rows(of_scores_NBHGCM) + sum_of_rows(of_gram_NBHGMM)
    dbeta_NBHGM += of_keys_NBHGM

    dg_NBHGC = None
    if x.g is not None:
        # Cotangents of the logarithm of every decay product.
        read_NBHGCV = matmul("...hck,...hgkv->...hgcv", x.q, states_NBHGKV)
        dlogs = Decays(
            within=beta_NBHGCM * of_scores_NBHGCM,
            between=beta_NBHGMM * of_gram_NBHGMM,
            into=jnp.sum(do_into_NBHGCV * read_NBHGCV, axis=-1),
            into_update=-jnp.sum(drhs_into_NBHGMV * key_state_NBHGMV, axis=-1),
            out=x.beta * of_keys_NBHGM,
            through=decays.through * jnp.sum(dnext_NBHGKV * states_NBHGKV, axis=(-1, -2)),
        )
        dg_NBHGC = decays_backward(dlogs, R, settings.gate_matmul)
    dx = ChunkedTokens(dq_NBHCK, dk_NBHMK, drhs_NBHGMV, dbeta_NBHGM, dg_NBHGC, None)
    return dx, dstate_BHGKV


def _sum_of_group(x_NBHGXY):
    """Sum over the value heads of a key head, term by term.

    As a reduction it would end the process on a CPU under `jax.vmap`; `spread` says why.
    """
    return functools.reduce(jnp.add, (x_NBHGXY[:, :, :, i] for i in range(x_NBHGXY.shape[3])))


def _sum_of_rows(x_NBHGXY):
    """Sum over the axis before the last on a CPU, as a product with ones for the same reason."""
    ones = jnp.ones(x_NBHGXY.shape[-2], x_NBHGXY.dtype)
    return jnp.einsum("...xy,x->...y", x_NBHGXY, ones, precision=jax.lax.Precision.HIGHEST)
