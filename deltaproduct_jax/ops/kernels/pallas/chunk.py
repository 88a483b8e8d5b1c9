"""One chunk inside the TPU kernel, forward and backward, for several heads at once.

The formulas are those of ops/README.md; only the order of work differs from chunked.py. A
weight of an update is needed as a row [1, M] or a column [M, 1], which a TPU does not turn into
each other for free: here each decay is summed in the direction in which it is used.

Shape suffixes: h key heads, g value heads (G per key head), C tokens, M = C * R updates, K key
width, V value width.
"""

import functools
from collections.abc import Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.kernels.pallas.products import (
    Passes,
    column_of,
    iota,
    row_of,
    unit_lower_inverse,
)


class Chunk(NamedTuple):
    """Inputs of a chunk in float32; segment numbers count the boundaries since it began."""

    q: jax.Array  # hCK
    k: jax.Array  # hMK
    v: jax.Array  # gMV
    beta: jax.Array  # g1M
    g: jax.Array | None  # g1C
    segment: jax.Array | None  # 11C
    segment_of_update: jax.Array | None  # 11M


class Weights(NamedTuple):
    """Products of decays, as `Decays`; a weight that is 1 throughout is None."""

    within: jax.Array  # gCM
    between: jax.Array  # gMM
    into: jax.Array | None  # gC1
    into_update: jax.Array | None  # gM1
    out: jax.Array | None  # gM1
    through: jax.Array | None  # g11


class Prepared(NamedTuple):
    """What does not depend on the state."""

    weights: Weights
    gram: jax.Array  # gMM
    scores: jax.Array  # gCM
    inverse: jax.Array  # gMM
    beta: jax.Array  # gM1
    q: jax.Array  # gCK
    k: jax.Array  # gMK


def joined(chunks: Sequence[Chunk]) -> Chunk:
    """Several chunks as one of so many more heads: nothing here passes from one to the next."""
    if len(chunks) == 1:
        return chunks[0]
    g = chunks[0].v.shape[0]
    per_head = [x._replace(**_repeated(x, g)) for x in chunks]
    return Chunk(
        *(None if xs[0] is None else jnp.concatenate(xs) for xs in zip(*per_head, strict=True))
    )


def _repeated(x: Chunk, g: int) -> dict[str, jax.Array]:
    if x.segment is None:
        return {}
    rows = {"segment": x.segment, "segment_of_update": x.segment_of_update}
    return {name: jnp.broadcast_to(row, (g, *row.shape[1:])) for name, row in rows.items()}


def parted(p: Prepared, n: int) -> list[Prepared]:
    """What `prepare` gave for n chunks joined, apart again; masks that all share stay whole."""

    def part(i, x):
        size = x.shape[0] // n
        return x[i * size : (i + 1) * size] if size else x

    return [jax.tree.map(functools.partial(part, i), p) for i in range(n)] if n > 1 else [p]


def prepare(x: Chunk, scale: float, passes: Passes, inverse_gMM=None) -> Prepared:
    """Decays, scores, and the inverse of I + L unless it is given."""
    G = x.v.shape[0] // x.q.shape[0]
    weights = _weights(x, passes)
    kk_hMM = passes("hmk,hnk->hmn", x.k, x.k)
    qk_hCM = passes("hck,hmk->hcm", x.q, x.k)
    gram_gMM = weights.between * _per_value_head(kk_hMM, G)
    if inverse_gMM is None:
        inverse_gMM = unit_lower_inverse(gram_gMM * x.beta, passes)
    scores_gCM = scale * weights.within * _per_value_head(qk_hCM, G)
    q_gCK, k_gMK = _per_value_head(x.q, G), _per_value_head(x.k, G)
    return Prepared(weights, gram_gMM, scores_gCM, inverse_gMM, column_of(x.beta), q_gCK, k_gMK)


def read_by_keys(p: Prepared, state_gKV, passes: Passes):
    """What keys read from the state, gMV, before the chunk changes it."""
    return passes("gmk,gkv->gmv", p.k, state_gKV)


def errors(x: Chunk, p: Prepared, key_state_gMV, passes: Passes):
    """What values differ by from the state at their update, gMV."""
    rhs_gMV = x.v - _times(p.weights.into_update, key_state_gMV)
    return passes.in_two_passes("gmn,gnv->gmv", p.inverse, rhs_gMV)


def next_state(p: Prepared, error_gMV, state_gKV, passes: Passes):
    """The state after the chunk."""
    left_gMV = _times(p.weights.out, p.beta * error_gMV)
    kept_gKV = _times(p.weights.through, state_gKV)
    return kept_gKV + passes("gmk,gmv->gkv", p.k, left_gMV)


def outputs(p: Prepared, error_gMV, state_gKV, scale: float, passes: Passes):
    """What the tokens read, gCV."""
    read_gCV = _times(p.weights.into, passes("gck,gkv->gcv", p.q, state_gKV))
    return scale * read_gCV + passes("gcm,gmv->gcv", p.scores, p.beta * error_gMV)


def chunk_backward(
    x: Chunk, p: Prepared, error_gMV, state_gKV, do_gCV, dnext_gKV, scale: float, passes: Passes
):
    """Cotangents ``(q, k, v, beta, g)`` as in `Chunk` (g or None), and of the state before it."""
    w, h = p.weights, x.q.shape[0]
    written_gMV = p.beta * error_gMV

    from_next_gMV = _times(w.out, passes("gmk,gkv->gmv", p.k, dnext_gKV))
    dwritten_gMV = passes("gcm,gcv->gmv", p.scores, do_gCV) + from_next_gMV
    drhs_gMV = passes.in_two_passes("gnm,gnv->gmv", p.inverse, p.beta * dwritten_gMV)
    dlower_gMM = -passes("gmv,gnv->gmn", drhs_gMV, error_gMV)
    do_written_gCM = passes("gcv,gmv->gcm", do_gCV, written_gMV)

    do_into_gCV = _times(w.into, scale * do_gCV)
    drhs_into_gMV = _times(w.into_update, drhs_gMV)
    dstate_gKV = _times(w.through, dnext_gKV) + passes("gck,gcv->gkv", p.q, do_into_gCV)
    dstate_gKV -= passes("gmk,gmv->gkv", p.k, drhs_into_gMV)

    # Sums over the value heads of a key head come before the products with q and k.
    dqk_hCM = _per_key_head(scale * w.within * do_written_gCM, h)
    dkk_hMM = _per_key_head(w.between * x.beta * dlower_gMM, h)
    dkk_hMM += jnp.swapaxes(dkk_hMM, 1, 2)
    dread_gCK = passes("gcv,gkv->gck", do_into_gCV, state_gKV)
    dq_hCK = passes("hcm,hmk->hck", dqk_hCM, x.k) + _per_key_head(dread_gCK, h)
    dk_gMK = passes("gmv,gkv->gmk", _times(w.out, written_gMV), dnext_gKV)
    dk_gMK -= passes("gmv,gkv->gmk", drhs_into_gMV, state_gKV)
    dk_hMK = passes("hcm,hck->hmk", dqk_hCM, x.q) + passes("hmn,hnk->hmk", dkk_hMM, x.k)
    dk_hMK += _per_key_head(dk_gMK, h)

    of_gram_gMM = dlower_gMM * p.gram
    dbeta_g1M = row_of(jnp.sum(error_gMV * dwritten_gMV, axis=-1, keepdims=True))
    dbeta_g1M += jnp.sum(of_gram_gMM, axis=-2, keepdims=True)
    dg_g1C = None
    if x.g is not None:
        key_state_gMV = read_by_keys(p, state_gKV, passes)
        through_gKV = _times(w.through, dnext_gKV * state_gKV)
        dg_g1C = _dg(
            do_written_gCM * p.scores,
            of_gram_gMM * x.beta,
            jnp.sum(dread_gCK * p.q, axis=-1, keepdims=True),
            -jnp.sum(drhs_into_gMV * key_state_gMV, axis=-1, keepdims=True),
            jnp.sum(written_gMV * from_next_gMV, axis=-1, keepdims=True),
            jnp.sum(jnp.sum(through_gKV, axis=-1, keepdims=True), axis=-2, keepdims=True),
            passes,
        )
    return (dq_hCK, dk_hMK, drhs_gMV, dbeta_g1M, dg_g1C), dstate_gKV


def _weights(x: Chunk, passes: Passes) -> Weights:
    """As `decays_of`: exponentials of direct sums of gates, masked before exp."""
    C, M = x.q.shape[1], x.k.shape[1]
    R = M // C
    token, update = iota((1, C, M), 1), iota((1, C, M), 2)
    later, earlier = iota((1, M, M), 1), iota((1, M, M), 2)
    # Whether token u is at or before that of update m is u * R <= m.
    causal, strict = update < (token + 1) * R, earlier < later
    first = first_of_update = last = None
    if x.segment is not None:
        segment_1C1, update_1M1 = column_of(x.segment), column_of(x.segment_of_update)
        causal &= segment_1C1 == x.segment_of_update
        strict &= update_1M1 == x.segment_of_update
        first, first_of_update = segment_1C1 == 0, update_1M1 == 0
        last = update_1M1 == segment_1C1[:, C - 1 :]
    if x.g is None:
        masks = (causal, strict, first, first_of_update, last)
        weights = [None if mask is None else mask.astype(jnp.float32) for mask in masks]
        return Weights(*weights, through=None if first is None else weights[2][:, C - 1 :])
    after_CM = (iota((C, M), 0) * R > iota((C, M), 1)).astype(jnp.float32)
    upto_gCC = jnp.where(iota((1, C, C), 1) >= iota((1, C, C), 2), x.g, 0)
    upto_update = iota((1, M, C), 1) >= iota((1, M, C), 2) * R
    upto_gMC = jnp.where(upto_update, x.g, 0)
    after_gMC = jnp.where(upto_update, 0, x.g)

    def total(g):
        return jnp.sum(g, axis=-1, keepdims=True)

    into_gC1 = _masked_exp(first, total(upto_gCC))
    return Weights(
        within=_masked_exp(causal, passes.over_gates("gcu,um->gcm", upto_gCC, after_CM)),
        between=_masked_exp(strict, passes.over_gates("gmu,un->gmn", upto_gMC, after_CM)),
        into=into_gC1,
        into_update=_masked_exp(first_of_update, total(upto_gMC)),
        out=_masked_exp(last, total(after_gMC)),
        through=into_gC1[:, C - 1 :],
    )


def _dg(within_gCM, between_gMM, into_gC1, into_update_gM1, out_gM1, through_g11, passes: Passes):
    """Cotangent of g, g1C, from those of the logarithms of the weights: the sums transposed."""
    C, M = within_gCM.shape[-2:]
    R = M // C
    after_MC = (iota((M, C), 1) * R > iota((M, C), 0)).astype(jnp.float32)
    of_tokens_gCC = passes.over_gates("gcm,mu->gcu", within_gCM, after_MC) + into_gC1
    of_updates_gMC = passes.over_gates("gmn,nu->gmu", between_gMM, after_MC) + into_update_gM1
    upto = iota((1, C, C), 1) >= iota((1, C, C), 2)
    upto_update = iota((1, M, C), 1) >= iota((1, M, C), 2) * R
    dg_g1C = jnp.sum(jnp.where(upto, of_tokens_gCC, 0), axis=1, keepdims=True)
    dg_g1C += jnp.sum(jnp.where(upto_update, of_updates_gMC, out_gM1), axis=1, keepdims=True)
    return dg_g1C + through_g11


def _masked_exp(mask, x):
    return jnp.exp(x) if mask is None else jnp.where(mask, jnp.exp(jnp.where(mask, x, 0)), 0)


def _times(weight, x):
    return x if weight is None else weight * x


def _per_value_head(x, G: int):
    if G == 1:
        return x
    return jnp.concatenate([x[i : i + 1] for i in range(x.shape[0]) for _ in range(G)])


def _per_key_head(x, heads: int):
    """Sums over the value heads of each key head."""
    G = x.shape[0] // heads
    if G == 1:
        return x
    groups = (x[i * G : (i + 1) * G] for i in range(heads))
    return jnp.concatenate([jnp.sum(group, axis=0, keepdims=True) for group in groups])
