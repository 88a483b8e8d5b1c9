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
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.ops.precision import Matmul, accumulator_dtype
from deltaproduct_jax.ops.triangular import unit_lower_inverse
from deltaproduct_jax.ops.varying import zeros_varying_as


@dataclasses.dataclass(frozen=True)
class Settings:
    """What is fixed when the program is traced."""

    scale: float
    chunk_size: int
    precision: str | None


class Tokens(NamedTuple):
    """The inputs that run along T: of a sequence, or of one chunk in the layout named below."""

    q: jax.Array  # BHCK
    k: jax.Array  # BHMK
    v: jax.Array  # BHGMV
    beta: jax.Array  # BHGM, float32 at least
    g: jax.Array | None  # BHGC, float32 at least
    resets: jax.Array | None  # BC


class Decays(NamedTuple):
    """Products of decays, 0 across a segment boundary; axes that do not vary have size 1."""

    within: jax.Array  # BHGCC: from after token s to after token c, for s <= c
    into: jax.Array  # BHGC: from the start of the chunk to after token c
    out: jax.Array  # BHGC: from after token c to the end of the chunk
    through: jax.Array  # BHG: from the start of the chunk to its end


class Solved(NamedTuple):
    """The triangular system of a chunk and its solution: what both passes need."""

    kk: jax.Array  # BHMM
    decay: jax.Array  # BHGMM, strictly causal over updates
    inverse: jax.Array  # BHGMM
    from_state: jax.Array  # BHGMV: what the keys read from the state that enters the chunk
    pseudo_v: jax.Array  # BHGMV


def chunked(tokens: Tokens, initial_state: jax.Array, settings: Settings, *, keep_states: bool):
    """Forward pass.

    Args:
      tokens: q [B, T, H, K], k [B, T, R, H, K], v [B, T, R, Hv, V], beta [B, T, R, Hv], g
        [B, T, Hv] or None, resets [B, T] bool or None; T at least 1.
      initial_state: [B, Hv, K, V] in float32 or float64.
      settings: scale, chunk size, precision.
      keep_states: return the state before every chunk too, as the backward pass needs it.

    Returns:
      ``(o, final_state, states)``: [B, T, Hv, V], [B, Hv, K, V] and [N, B, H, G, K, V] or None.
    """
    B, T, _, H, K = tokens.k.shape
    Hv, V = tokens.v.shape[-2:]
    C = settings.chunk_size
    padded = _pad(tokens, C)
    N = padded.q.shape[1] // C

    def body(carry, n):
        state_BHGKV, o_BTHGV = carry
        chunk = _chunk(padded, n, C, H)
        o_BHGCV, next_BHGKV = _chunk_forward(chunk, state_BHGKV, settings)
        # Written in place: a scan's own stacking would put N first and cost a copy of the sequence.
        o_BCHGV = jnp.transpose(o_BHGCV, (0, 3, 1, 2, 4)).astype(o_BTHGV.dtype)
        o_BTHGV = _put(o_BTHGV, o_BCHGV, n)
        return (next_BHGKV, o_BTHGV), state_BHGKV if keep_states else None

    state_BHGKV = initial_state.reshape(B, H, Hv // H, K, V)
    o_BTHGV = zeros_varying_as((B, N * C, H, Hv // H, V), tokens.v)
    (state_BHGKV, o_BTHGV), states = jax.lax.scan(body, (state_BHGKV, o_BTHGV), jnp.arange(N))
    o = o_BTHGV[:, :T].reshape(B, T, Hv, V)
    return o, state_BHGKV.reshape(initial_state.shape), states


def chunked_backward(tokens: Tokens, states: jax.Array, do, dfinal_state, settings: Settings):
    """Cotangents of the inputs, from those of ``o`` and ``final_state`` and the kept states.

    Walks the chunks backwards and recomputes each from the state that entered it.

    Returns:
      ``(dtokens, dinitial_state)``: shapes and dtypes of the inputs; no cotangent for resets.
    """
    H, K = tokens.k.shape[-2:]
    C = settings.chunk_size
    B, T, Hv, V = do.shape
    padded = _pad(tokens, C)
    do_BTHGV = _pad_time(do, C).reshape(B, -1, H, Hv // H, V)

    def body(carry, item):
        dstate_BHGKV, gradients = carry
        n, state_BHGKV = item
        do_BHGCV = jnp.transpose(_take(do_BTHGV, n, C), (0, 2, 3, 1, 4)).astype(states.dtype)
        dchunk, dstate_BHGKV = _chunk_backward(
            _chunk(padded, n, C, H), state_BHGKV, do_BHGCV, dstate_BHGKV, settings
        )
        dchunk = _unchunk(dchunk, padded)
        gradients = jax.tree.map(lambda whole, part: _put(whole, part, n), gradients, dchunk)
        return (dstate_BHGKV, gradients), None

    differentiable = padded._replace(resets=None)
    gradients = jax.tree.map(lambda x: zeros_varying_as(x.shape, x), differentiable)
    dstate_BHGKV = dfinal_state.reshape(B, H, Hv // H, K, V)
    steps = (jnp.arange(states.shape[0]), states)
    (dstate_BHGKV, gradients), _ = jax.lax.scan(
        body, (dstate_BHGKV, gradients), steps, reverse=True
    )
    return jax.tree.map(lambda x: x[:, :T], gradients), dstate_BHGKV.reshape(dfinal_state.shape)


def _chunk_forward(x: Tokens, state_BHGKV, settings: Settings):
    """Outputs of one chunk and the state after it."""
    matmul = Matmul.of(x.q.dtype, settings.precision)
    decays = _decays(x.g, x.resets, x.q)
    solved = _solve(x, decays, state_BHGKV, settings)
    scores_BHGCM = _scores(x, decays, settings, matmul("bhck,bhmk->bhcm", x.q, x.k))
    o_BHGCV = matmul("bhgcm,bhgmv->bhgcv", scores_BHGCM, solved.pseudo_v)
    read_BHGCV = matmul("bhck,bhgkv->bhgcv", x.q, state_BHGKV)
    o_BHGCV += settings.scale * decays.into[..., None] * read_BHGCV
    next_BHGKV = decays.through[..., None, None] * state_BHGKV
    next_BHGKV += matmul("bhgmk,bhgmv->bhgkv", _keys_out(x, decays), solved.pseudo_v)
    return o_BHGCV, next_BHGKV


def _chunk_backward(x: Tokens, state_BHGKV, do_BHGCV, dnext_BHGKV, settings: Settings):
    """Cotangents of one chunk's inputs, in the chunk's layout, and of the state that entered it."""
    matmul = Matmul.of(x.q.dtype, settings.precision)
    scale, C = settings.scale, x.q.shape[2]
    R = x.k.shape[2] // C
    decays = _decays(x.g, x.resets, x.q)
    solved = _solve(x, decays, state_BHGKV, settings)
    u_BHGMV, from_state_BHGMV = solved.pseudo_v, solved.from_state
    scores_BHGCM = _scores(x, decays, settings, matmul("bhck,bhmk->bhcm", x.q, x.k))
    keys_out_BHGMK = _keys_out(x, decays)
    into_BHGM = _per_update(decays.into, R)
    out_BHGM = _per_update(decays.out, R)
    do_into_BHGCV = scale * decays.into[..., None] * do_BHGCV

    # Through o = scores u + scale into (q S) and S' = through S + keys_out^T u, to u.
    du_BHGMV = matmul("bhgcm,bhgcv->bhgmv", scores_BHGCM, do_BHGCV)
    du_BHGMV += matmul("bhgmk,bhgkv->bhgmv", keys_out_BHGMK, dnext_BHGKV)
    # Through (I + L) u = rhs: the transposed system gives the right-hand side, an outer product L.
    drhs_BHGMV = matmul("bhgnm,bhgnv->bhgmv", solved.inverse, du_BHGMV)
    dlower_BHGMM = -matmul("bhgmv,bhgnv->bhgmn", drhs_BHGMV, u_BHGMV) * solved.decay
    dscores_BHGCM = matmul("bhgcv,bhgmv->bhgcm", do_BHGCV, u_BHGMV)

    beta_into_drhs_BHGMV = (x.beta * into_BHGM)[..., None] * drhs_BHGMV
    dstate_BHGKV = decays.through[..., None, None] * dnext_BHGKV
    dstate_BHGKV += matmul("bhck,bhgcv->bhgkv", x.q, do_into_BHGCV)
    dstate_BHGKV -= matmul("bhmk,bhgmv->bhgkv", x.k, beta_into_drhs_BHGMV)

    # Sums over the value heads G of a key head come before the products with q and k.
    decay_BHGCM = scale * _per_update(decays.within, R)
    dqk_BHCM = jnp.sum(decay_BHGCM * dscores_BHGCM, axis=2)
    dkk_BHMM = jnp.sum(x.beta[..., None] * dlower_BHGMM, axis=2)
    dkk_BHMM += jnp.swapaxes(dkk_BHMM, -1, -2)
    dq_BHCK = matmul("bhcm,bhmk->bhck", dqk_BHCM, x.k)
    dq_BHCK += matmul("bhgcv,bhgkv->bhck", do_into_BHGCV, state_BHGKV)
    dk_BHMK = matmul("bhcm,bhck->bhmk", dqk_BHCM, x.q)
    dk_BHMK += matmul("bhmn,bhnk->bhmk", dkk_BHMM, x.k)
    dk_BHMK += matmul("bhgmv,bhgkv->bhmk", out_BHGM[..., None] * u_BHGMV, dnext_BHGKV)
    dk_BHMK -= matmul("bhgmv,bhgkv->bhmk", beta_into_drhs_BHGMV, state_BHGKV)

    dlower_kk_BHGMM = dlower_BHGMM * solved.kk[:, :, None]
    dbeta_BHGM = jnp.sum(
        drhs_BHGMV * (x.v.astype(drhs_BHGMV.dtype) - into_BHGM[..., None] * from_state_BHGMV), -1
    )
    dbeta_BHGM += jnp.sum(dlower_kk_BHGMM, axis=-1)

    dg_BHGC = None
    if x.g is not None:
        # Cotangents of the logarithm of every decay product.
        dwithin_BHGCC = _sum_updates(dscores_BHGCM * scores_BHGCM, R)
        dlower_lower_BHGMM = x.beta[..., None] * dlower_kk_BHGMM
        dwithin_BHGCC += _sum_updates(_sum_updates(dlower_lower_BHGMM, R), R, axis=-2)
        read_BHGCV = matmul("bhck,bhgkv->bhgcv", x.q, state_BHGKV)
        dinto_BHGC = jnp.sum(do_into_BHGCV * read_BHGCV, axis=-1)
        dinto_BHGC -= _sum_updates(jnp.sum(beta_into_drhs_BHGMV * from_state_BHGMV, -1), R)
        dkeys_out_BHGMV = matmul("bhgmk,bhgkv->bhgmv", keys_out_BHGMK, dnext_BHGKV)
        dout_BHGC = _sum_updates(jnp.sum(dkeys_out_BHGMV * u_BHGMV, axis=-1), R)
        dthrough_BHG = decays.through * jnp.sum(dnext_BHGKV * state_BHGKV, axis=(-1, -2))
        dg_BHGC = _decays_backward(dwithin_BHGCC, dinto_BHGC, dout_BHGC, dthrough_BHG)
    dv_BHGMV = x.beta[..., None] * drhs_BHGMV
    return Tokens(dq_BHCK, dk_BHMK, dv_BHGMV, dbeta_BHGM, dg_BHGC, None), dstate_BHGKV


def _solve(x: Tokens, decays: Decays, state_BHGKV, settings: Settings) -> Solved:
    """The pseudo-values u of a chunk: (I + L) u = beta (v - into (k S)).

    L_mn = beta_m decay_mn (k_m . k_n) for n < m; the chunk's updates add k_m u_m^T to the state.
    """
    matmul = Matmul.of(x.q.dtype, settings.precision)
    C, M = x.q.shape[2], x.k.shape[2]
    kk_BHMM = matmul("bhmk,bhnk->bhmn", x.k, x.k)
    decay_BHGMM = _per_update(_per_update(decays.within, M // C), M // C, axis=-2)
    strict = np.tri(M, k=-1, dtype=bool).reshape(1, 1, 1, M, M)
    decay_BHGMM = jnp.where(strict, decay_BHGMM, 0)
    lower_BHGMM = x.beta[..., None] * decay_BHGMM * kk_BHMM[:, :, None]
    inverse_BHGMM = unit_lower_inverse(lower_BHGMM, Matmul.wide(x.q.dtype, settings.precision))
    from_state_BHGMV = matmul("bhmk,bhgkv->bhgmv", x.k, state_BHGKV)
    into_BHGM = _per_update(decays.into, M // C)
    rhs_BHGMV = x.v.astype(x.beta.dtype) - into_BHGM[..., None] * from_state_BHGMV
    u_BHGMV = matmul("bhgmn,bhgnv->bhgmv", inverse_BHGMM, x.beta[..., None] * rhs_BHGMV)
    return Solved(kk_BHMM, decay_BHGMM, inverse_BHGMM, from_state_BHGMV, u_BHGMV)


def _scores(x: Tokens, decays: Decays, settings: Settings, qk_BHCM):
    """How much of every pseudo-value a token reads: causal over tokens, its own R included."""
    R = x.k.shape[2] // x.q.shape[2]
    return settings.scale * _per_update(decays.within, R) * qk_BHCM[:, :, None]


def _keys_out(x: Tokens, decays: Decays):
    """Keys with the decay from their token to the end of the chunk."""
    out_BHGM = _per_update(decays.out, x.k.shape[2] // x.q.shape[2])
    return out_BHGM[..., None] * x.k[:, :, None].astype(out_BHGM.dtype)


def _decays(g_BHGC, resets_BC, q_BHCK) -> Decays:
    """Products of decays between tokens, each the exponential of a sum over its own tokens.

    A difference of two cumulative sums would lose the answer under strong decay. The mask comes
    before exp: outside it the sums mean nothing, and exp of them could overflow.
    """
    C, dtype = q_BHCK.shape[2], accumulator_dtype(q_BHCK.dtype)
    causal = np.tri(C, dtype=bool)
    within_mask = jnp.asarray(causal).reshape(1, 1, 1, C, C)
    into_mask = jnp.ones((1, 1, 1, C), bool)
    if resets_BC is not None:
        segment_BHGC = jnp.cumsum(resets_BC, axis=1)[:, None, None, :]
        within_mask &= segment_BHGC[..., :, None] == segment_BHGC[..., None, :]
        into_mask = segment_BHGC == 0
    if g_BHGC is None:
        within, into = within_mask.astype(dtype), into_mask.astype(dtype)
    else:
        # Entry (c, s) of the masked matrix summed down to row c: g over the tokens s < u <= c.
        after_BHGCC = jnp.where(np.tri(C, k=-1, dtype=bool), g_BHGC[..., None], 0)
        sums_BHGCC = _gate_matmul(dtype)("cu,bhgus->bhgcs", jnp.asarray(causal), after_BHGCC)
        within = _masked_exp(within_mask, sums_BHGCC)
        into = _masked_exp(into_mask, sums_BHGCC[..., 0] + g_BHGC[..., :1])
    return Decays(within, into, out=within[..., -1, :], through=into[..., -1])


def _decays_backward(dwithin_BHGCC, dinto_BHGC, dout_BHGC, dthrough_BHG):
    """Cotangent of g from those of the logarithms of the decays: the same sums, transposed."""
    C, dtype = dinto_BHGC.shape[-1], dinto_BHGC.dtype
    # out is the last row of within, through the last entry of into.
    dwithin_BHGCC = dwithin_BHGCC.at[..., -1, :].add(dout_BHGC)
    dinto_BHGC = dinto_BHGC.at[..., -1].add(dthrough_BHG)
    later = jnp.asarray(np.tri(C, dtype=bool))
    from_BHGCC = _gate_matmul(dtype)("cu,bhgcs->bhgus", later, dwithin_BHGCC)
    earlier = np.tri(C, k=-1, dtype=bool)
    dg_BHGC = jnp.sum(jnp.where(earlier, from_BHGCC, 0), axis=-1)
    return dg_BHGC + jax.lax.cumsum(dinto_BHGC, axis=3, reverse=True)


def _gate_matmul(dtype) -> Matmul:
    """Sums of gates are exact on every platform, whatever ``precision`` says."""
    return Matmul.wide(dtype, "highest")


def _masked_exp(mask, x):
    return jnp.where(mask, jnp.exp(jnp.where(mask, x, 0)), 0)


def _per_update(x, R: int, axis: int = -1):
    """Repeats an axis over tokens for each of a token's R updates."""
    return jnp.repeat(x, R, axis=axis)


def _sum_updates(x, R: int, axis: int = -1):
    """Sums each token's R updates: the transpose of `_per_update`."""
    axis %= x.ndim
    return jnp.sum(x.reshape(*x.shape[:axis], -1, R, *x.shape[axis + 1 :]), axis=axis + 1)


def _chunk(tokens: Tokens, n, C: int, H: int) -> Tokens:
    """Chunk n in the layout of `Tokens`: heads before positions."""
    q, k, v, beta, g, resets = jax.tree.map(lambda x: _take(x, n, C), tokens)
    B, _, R, _, K = k.shape
    Hv, V = v.shape[-2:]
    G, dtype = Hv // H, accumulator_dtype(q.dtype)
    v = v.reshape(B, C * R, H, G, V)
    beta = beta.astype(dtype).reshape(B, C * R, H, G)
    return Tokens(
        jnp.transpose(q, (0, 2, 1, 3)),
        jnp.transpose(k.reshape(B, C * R, H, K), (0, 2, 1, 3)),
        jnp.transpose(v, (0, 2, 3, 1, 4)),
        jnp.transpose(beta, (0, 2, 3, 1)),
        None if g is None else jnp.transpose(g.astype(dtype).reshape(B, C, H, G), (0, 2, 3, 1)),
        resets,
    )


def _unchunk(chunk: Tokens, like: Tokens) -> Tokens:
    """The inverse of `_chunk`, in the dtypes of ``like``."""
    C = chunk.q.shape[2]
    parts = Tokens(
        jnp.transpose(chunk.q, (0, 2, 1, 3)),
        jnp.transpose(chunk.k, (0, 2, 1, 3)),
        jnp.transpose(chunk.v, (0, 3, 1, 2, 4)),
        jnp.transpose(chunk.beta, (0, 3, 1, 2)),
        None if chunk.g is None else jnp.transpose(chunk.g, (0, 3, 1, 2)),
        None,
    )

    def as_in(part, whole):
        return part.reshape(whole.shape[0], C, *whole.shape[2:]).astype(whole.dtype)

    return jax.tree.map(as_in, parts, like._replace(resets=None))


def _pad(tokens: Tokens, C: int) -> Tokens:
    """Fills the last chunk: zero keys and step sizes write nothing, and g = 0 decays nothing."""
    return jax.tree.map(lambda x: _pad_time(x, C), tokens)


def _pad_time(x, C: int):
    missing = -x.shape[1] % C
    return jnp.pad(x, [(0, missing if axis == 1 else 0) for axis in range(x.ndim)])


def _take(x, n, C: int):
    return jax.lax.dynamic_slice_in_dim(x, n * C, C, axis=1)


def _put(whole, part, n):
    return jax.lax.dynamic_update_slice_in_dim(whole, part, n * part.shape[1], axis=1)
