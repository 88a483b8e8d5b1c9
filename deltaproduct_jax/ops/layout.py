"""Chunks cut out of a sequence, in the layout in which the chunked form multiplies, and back.

Shape suffixes as in chunked.py: N chunks, B batch, H key heads, G value heads per key head, C
tokens and M = C * R updates in a chunk.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.containment import only_finite
from deltaproduct_jax.ops.debug import nan_if
from deltaproduct_jax.ops.precision import accumulator_dtype
from deltaproduct_jax.ops.unavailable import if_cheap


class Tokens(NamedTuple):
    """The inputs that run along T, as the caller has them; also their cotangents."""

    q: jax.Array  # BTHK
    k: jax.Array  # BTRHK
    v: jax.Array  # BTRHvV
    beta: jax.Array  # BTRHv
    g: jax.Array | None  # BTHv
    resets: jax.Array | None  # BT, bool: a segment starts here


def head_axes(tokens: Tokens) -> Tokens:
    """The axis of heads of each; resets have none."""
    return Tokens(q=2, k=3, v=3, beta=3, g=None if tokens.g is None else 2, resets=None)


class MergedTokens(NamedTuple):
    """The same with T and R merged into one axis of updates, U = T * R."""

    q: jax.Array  # BTHK
    k: jax.Array  # BUHK
    v: jax.Array  # BUHvV
    beta: jax.Array  # BUHv
    g: jax.Array | None  # BTHv
    resets: jax.Array | None  # BT


class ChunkedTokens(NamedTuple):
    """N chunks of the same, heads before positions, as matmuls take them."""

    q: jax.Array  # NBHCK
    k: jax.Array  # NBHMK
    v: jax.Array  # NBHGMV
    beta: jax.Array  # NBHGM, float32 at least
    g: jax.Array | None  # NBHGC, float32 at least
    resets: jax.Array | None  # NBC


def merge_updates(tokens: Tokens) -> MergedTokens:
    """T and R become one axis; inside the scan over chunks this would be a copy on TPU."""
    q, *of_updates, g, resets = tokens
    k, v, beta = (x.reshape(x.shape[0], -1, *x.shape[3:]) for x in of_updates)
    return MergedTokens(q, k, v, beta, g, resets)


def split_updates(merged: MergedTokens, like: Tokens) -> Tokens:
    """The inverse, without padding and in the dtypes of ``like``; resets are left out."""

    def as_in(x, whole):
        B, T, *rest = whole.shape
        return x.reshape(B, -1, *rest)[:, :T].astype(whole.dtype)

    return jax.tree.map(as_in, Tokens(*merged[:5], None), like._replace(resets=None))


def pad(x, multiple: int):
    """Fills the last chunk: zero keys and step sizes write nothing, and g = 0 decays nothing."""
    return jax.tree.map(lambda leaf: _pad_axis(leaf, -leaf.shape[1] % multiple), x)


def _pad_axis(x, missing: int):
    return jnp.pad(x, [(0, missing if axis == 1 else 0) for axis in range(x.ndim)])


def take(x, n, size: int):
    """Positions n * size and on, ``size`` of them, along axis 1."""
    return jax.lax.dynamic_slice_in_dim(x, n * size, size, axis=1)


def put(whole, part, n):
    """Writes what `take` would read."""
    return jax.lax.dynamic_update_slice_in_dim(whole, part, n * part.shape[1], axis=1)


def mark_bad(tokens: Tokens, bad_BTHv: jax.Array) -> Tokens:
    """Tokens whose beta is NaN where anything is not finite: few numbers, quickly looked at."""
    return tokens._replace(beta=nan_if(bad_BTHv[:, :, None], tokens.beta))


def to_chunks(tokens: MergedTokens, n, C: int, N: int, H: int, *, by_case: bool) -> ChunkedTokens:
    """N chunks of C tokens each, the n-th such group of a sequence; 0 for what is not finite.

    Args:
      tokens: as `mark_bad` returned them, merged.
      n, C, N, H: group, tokens in a chunk, chunks in a group, key heads.
      by_case: look first whether there is anything to replace. Selecting among all numbers costs a
        CPU a sixth of its time; elsewhere it is free and a decision is not, nor where it would be
        one of several devices.
    """
    R = tokens.k.shape[1] // tokens.q.shape[1]
    entries_per_token = (1, R, R, R, 1, 1)
    parts = (
        None if x is None else take(x, n, N * C * entries)
        for x, entries in zip(tokens, entries_per_token, strict=True)
    )
    *parts, resets = parts
    if by_case:
        is_bad = if_cheap(jnp.any(jnp.isnan(parts[3])))
        q, k, v, beta, g = jax.lax.cond(is_bad, only_finite, lambda parts: parts, parts)
    else:
        q, k, v, beta, g = only_finite(parts)
    B, M, dtype = q.shape[0], C * R, accumulator_dtype(q.dtype)
    heads = (H, v.shape[2] // H)
    v = v.reshape(B, N, M, *heads, v.shape[-1])
    beta = beta.astype(dtype).reshape(B, N, M, *heads)
    if g is not None:
        g = jnp.transpose(g.astype(dtype).reshape(B, N, C, *heads), (1, 0, 3, 4, 2))
    return ChunkedTokens(
        jnp.transpose(q.reshape(B, N, C, *q.shape[2:]), (1, 0, 3, 2, 4)),
        jnp.transpose(k.reshape(B, N, M, *k.shape[2:]), (1, 0, 3, 2, 4)),
        jnp.transpose(v, (1, 0, 3, 4, 2, 5)),
        jnp.transpose(beta, (1, 0, 3, 4, 2)),
        g,
        None if resets is None else jnp.transpose(resets.reshape(B, N, C), (1, 0, 2)),
    )


def outputs_to_chunks(o_BTHGV, n, C: int, N: int):
    """The same for an array like the outputs: NBHGCV."""
    o_BNCHGV = take(o_BTHGV, n, N * C)
    o_BNCHGV = o_BNCHGV.reshape(o_BNCHGV.shape[0], N, C, *o_BNCHGV.shape[2:])
    return jnp.transpose(o_BNCHGV, (1, 0, 3, 4, 2, 5))


def outputs_from_chunks(o_NBHGCV):
    """The inverse: BTHGV."""
    o_BNCHGV = jnp.transpose(o_NBHGCV, (1, 0, 4, 2, 3, 5))
    return o_BNCHGV.reshape(o_BNCHGV.shape[0], -1, *o_BNCHGV.shape[3:])


def from_chunks(chunks: ChunkedTokens, like: MergedTokens) -> MergedTokens:
    """The inverse of `to_chunks`, in the dtypes of ``like``; resets are left out."""
    parts = MergedTokens(
        jnp.transpose(chunks.q, (1, 0, 3, 2, 4)),
        jnp.transpose(chunks.k, (1, 0, 3, 2, 4)),
        jnp.transpose(chunks.v, (1, 0, 4, 2, 3, 5)),
        jnp.transpose(chunks.beta, (1, 0, 4, 2, 3)),
        None if chunks.g is None else jnp.transpose(chunks.g, (1, 0, 4, 2, 3)),
        None,
    )

    def as_in(part, whole):
        return part.reshape(whole.shape[0], -1, *whole.shape[2:]).astype(whole.dtype)

    return jax.tree.map(as_in, parts, like._replace(resets=None))
