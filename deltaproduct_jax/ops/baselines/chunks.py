"""Scans over tokens and over chunks of them, and the products of diagonal decays within a chunk.

Shape suffixes: B batch, H heads, C tokens in a chunk, N sub-chunks of P tokens, K key width (of a
decay: or 1, where one gate serves all key channels), V value width. "c" reads, "s" was written.

A decay is always the exponential of a sum of log-gates over its own tokens, at most 0 each, so none
overflows, and none is a quotient that has lost its digits. Between single tokens that takes
[C, C, K] numbers where the gates are diagonal; as in GLA (Yang et al., 2024, "secondary chunking")
they are written out within sub-chunks only, and tokens of different sub-chunks meet by way of the
bounds between them.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.ops.linear import inner
from deltaproduct_jax.ops.packing import starts_of_segments
from deltaproduct_jax.ops.precision import Matmul, accumulator_dtype
from deltaproduct_jax.ops.varying import mark_all_varying

DEFAULT_CHUNK = 64
SUB_CHUNK = 16


class DiagonalDecays(NamedTuple):
    """Products of decays in a chunk; the last four are 0 across a segment boundary."""

    pair: jax.Array  # BHNPPK: from after token s to after token c of a sub-chunk, for s <= c
    start: jax.Array  # BHNPK: from the start of the sub-chunk to after token c
    end: jax.Array  # BHNPK: from after token s to the end of the sub-chunk
    between: jax.Array  # BHNNK: over the sub-chunks between two
    visible: jax.Array  # B1CC, bool: s <= c, in one segment
    into: jax.Array  # BHCK: from the start of the chunk to after token c
    out: jax.Array  # BHCK: from after token s to the end of the chunk
    through: jax.Array  # BHK: over the whole chunk


def start(initial_state: jax.Array | None, k: jax.Array, v: jax.Array) -> jax.Array:
    """The state ``[B, H, K, V]`` before the first token: the given one, or zeros."""
    if initial_state is not None:
        return initial_state
    return jnp.zeros((k.shape[0], *k.shape[2:], v.shape[-1]), accumulator_dtype(k.dtype))


def resets_of(segment_ids: jax.Array | None) -> jax.Array | None:
    """``[B, T]``, True at the first token of every segment but a row's first; None for none."""
    return None if segment_ids is None else starts_of_segments(segment_ids)


def scan_tokens(
    step: Callable[..., tuple[jax.Array, Any]],
    state: Any,
    empty: Any,
    inputs: Sequence[jax.Array | None],
    segment_ids: jax.Array | None,
) -> tuple[jax.Array, Any]:
    """Applies ``step(state, *inputs of a token) -> (o, state)`` to one token after the other.

    Args:
        step: the recurrence.
        state: arrays before the first token, ``[B, ...]`` each.
        empty: what they are at the start of a later segment.
        inputs: ``[B, T, ...]`` each, or None.
        segment_ids: ``[B, T]``, or None.

    Returns:
        The outputs ``[B, T, ...]`` and the state after the last token.
    """

    def body(state, token):
        inputs, reset = token
        if reset is not None:
            state = where_rows(reset, empty, state)
        o, state = step(state, *inputs)
        return state, o

    along_T = (tuple(inputs), resets_of(segment_ids))
    state, along_T = mark_all_varying((state, along_T))
    tokens = jax.tree.map(lambda x: jnp.moveaxis(x, 1, 0), along_T)
    state, o = jax.lax.scan(body, state, tokens)
    return jnp.moveaxis(o, 0, 1), state


def where_rows(use: jax.Array, these: Any, others: Any) -> Any:
    """Arrays ``[B, ...]`` of ``these`` in the rows where ``use [B]``, else of ``others``."""
    where = lambda a, b: jnp.where(use.reshape(-1, *[1] * (b.ndim - 1)), a, b)
    return jax.tree.map(where, these, others)


def scan_chunks(
    body: Callable[..., tuple[jax.Array, jax.Array]],
    state: jax.Array,
    inputs: Sequence[jax.Array],
    segment_ids: jax.Array | None,
    chunk_size: int | None,
) -> tuple[jax.Array, jax.Array]:
    """Applies ``body(state, (*inputs, resets) of a chunk) -> (state, o)`` to every chunk in turn.

    What happens within a chunk is computed again for the backward pass, so that memory grows with
    the number of chunks.

    Args:
        body: takes the inputs as ``[B, H, C, width]`` and the resets as ``[B, C]``, or None.
        state: before the first token.
        inputs: ``[B, T, H, width]`` each.
        segment_ids: ``[B, T]``, or None.
        chunk_size: tokens in a chunk; None for the default.

    Returns:
        The outputs ``[B, T, H, V]`` and the state after the last token.
    """
    T, resets = inputs[0].shape[1], resets_of(segment_ids)
    C = chunk_length(chunk_size, T)
    state, *inputs = mark_all_varying((state, *inputs))
    tokens = [split_heads(x, C) for x in inputs]
    tokens.append(None if resets is None else split(resets, C))
    state, o_NBHCV = jax.lax.scan(jax.checkpoint(body), state, tuple(tokens))
    return join_heads(o_NBHCV, T), state


def chunk_length(chunk_size: int | None, T: int, default: int = DEFAULT_CHUNK) -> int:
    """Tokens in a chunk: as asked, else ``default``, or fewer where a sequence is shorter."""
    if chunk_size is not None:
        return chunk_size
    return max(1, min(default, T if T <= SUB_CHUNK else -(-T // SUB_CHUNK) * SUB_CHUNK))


def split(x: jax.Array, C: int) -> jax.Array:
    """``[B, T, ...]`` to ``[T / C, B, C, ...]``, filled with zeros behind."""
    missing = -x.shape[1] % C
    x = jnp.pad(x, [(0, missing if axis == 1 else 0) for axis in range(x.ndim)])
    return jnp.moveaxis(x.reshape(x.shape[0], -1, C, *x.shape[2:]), 1, 0)


def split_heads(x: jax.Array, C: int) -> jax.Array:
    """``[B, T, H, width]`` to ``[T / C, B, H, C, width]``, filled with zeros behind."""
    return jnp.swapaxes(split(x, C), 2, 3)


def join_heads(x_NBHCV: jax.Array, T: int) -> jax.Array:
    """Undoes :func:`split_heads`."""
    x = jnp.transpose(x_NBHCV, (1, 0, 3, 2, 4))
    return x.reshape(x.shape[0], -1, *x.shape[3:])[:, :T]


def diagonal_decays(g_BHCK: jax.Array, resets_BC: jax.Array | None) -> DiagonalDecays:
    """The decays of a chunk with log-gates ``g``; ``resets`` is True at a segment's first token."""
    B, H, C, K = g_BHCK.shape
    P = C if K == 1 or C <= SUB_CHUNK else math.gcd(C, SUB_CHUNK)
    g_BHNPK = g_BHCK.reshape(B, H, C // P, P, K)
    # Entry (c, s) of the masked array summed down to row c: g over the tokens s < u <= c.
    after = np.tri(P, k=-1, dtype=bool).reshape(1, 1, 1, P, P, 1)
    pair = jnp.cumsum(jnp.where(after, g_BHNPK[:, :, :, :, None], 0), axis=3)
    total_BHNK = jnp.sum(g_BHNPK, axis=3)
    index = np.arange(C // P)
    inside = (index[:, None, None] > index) & (index > index[:, None])  # (i, j, l): j < l < i
    between = jnp.where(inside[None, None, ..., None], total_BHNK[:, :, None, None], 0).sum(axis=4)

    visible = jnp.asarray(np.tri(C, dtype=bool).reshape(1, 1, C, C))
    into, out, through = jnp.exp(_sum_to(g_BHCK)), jnp.exp(_sum_after(g_BHCK)), g_BHCK.sum(axis=2)
    through = jnp.exp(through)
    if resets_BC is not None:
        segment_B1C1 = jnp.cumsum(resets_BC, axis=1)[:, None, :, None]
        visible &= segment_B1C1 == jnp.swapaxes(segment_B1C1, 2, 3)
        into = jnp.where(segment_B1C1 == 0, into, 0)
        out = jnp.where(segment_B1C1 == segment_B1C1[:, :, -1:], out, 0)
        through = jnp.where(segment_B1C1[:, :, -1] == 0, through, 0)
    return DiagonalDecays(
        pair=jnp.exp(pair),
        start=jnp.exp(_sum_to(g_BHNPK)),
        end=jnp.exp(_sum_after(g_BHNPK)),
        between=jnp.exp(between),
        visible=visible,
        into=into,
        out=out,
        through=through,
    )


def decayed_products(
    q_BHCK: jax.Array, k_BHCK: jax.Array, decays: DiagonalDecays, matmul: Matmul
) -> jax.Array:
    """``[B, H, C, C]``: sum over K of ``q[c] k[s]`` and the decay between; 0 where s > c."""
    B, H, C, K = q_BHCK.shape
    N, P = decays.pair.shape[2:4]
    if decays.pair.shape[-1] == 1:  # one gate for all channels, and N is 1
        scores_BHCC = matmul("bhck,bhsk->bhcs", q_BHCK, k_BHCK) * decays.pair[:, :, 0, ..., 0]
        return jnp.where(decays.visible, scores_BHCC, 0)
    wide = decays.pair.dtype
    q_BHNPK = q_BHCK.astype(wide).reshape(B, H, N, P, K)
    k_BHNPK = k_BHCK.astype(wide).reshape(B, H, N, P, K)
    scores = _near_products(q_BHNPK, k_BHNPK, decays.pair)[:, :, :, :, None]
    if N > 1:
        # From sub-chunk j to the start of a later sub-chunk i, then on to the token within i.
        bounds_BHNNPK = decays.between[:, :, :, :, None] * (k_BHNPK * decays.end)[:, :, None]
        far = matmul("bhick,bhijsk->bhicjs", q_BHNPK * decays.start, bounds_BHNNPK)
        same = np.eye(N, dtype=bool).reshape(1, 1, N, 1, N, 1)
        scores = jnp.where(same, scores, far)
    return jnp.where(decays.visible, scores.reshape(B, H, C, C), 0)


@jax.custom_jvp
def _near_products(q_BHNPK, k_BHNPK, pair_BHNPPK):
    """Sums over K of q[c] k[s] pair[c, s]; cotangents are products of matrices: see `scaled`."""
    return (pair_BHNPPK * q_BHNPK[:, :, :, :, None] * k_BHNPK[:, :, :, None]).sum(axis=-1)


@_near_products.defjvp
def _near_products_jvp(primals, tangents):
    (q, k, pair), (dq, dk, dpair) = primals, tangents
    q_pairs, k_pairs = q[:, :, :, :, None], k[:, :, :, None]
    dot = functools.partial(jnp.einsum, precision=jax.lax.Precision.HIGHEST)
    pushed = dot("bhnck,bhncsk->bhncs", dq, pair * k_pairs)
    pushed += dot("bhnsk,bhncsk->bhncs", dk, pair * q_pairs)
    return _near_products(*primals), pushed + inner(dpair, q_pairs * k_pairs)


def _sum_to(g: jax.Array) -> jax.Array:
    """Sums over the tokens (axis -2) up to each one, itself included."""
    return jnp.cumsum(g, axis=-2)


def _sum_after(g: jax.Array) -> jax.Array:
    """Sums over the tokens (axis -2) after each one."""
    later = jnp.concatenate([g[..., 1:, :], jnp.zeros_like(g[..., :1, :])], axis=-2)
    return jax.lax.cumsum(later, axis=g.ndim - 2, reverse=True)
