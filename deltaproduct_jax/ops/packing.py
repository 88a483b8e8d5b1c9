"""Several sequences in one row: segment ids, their boundaries, and states at a cut or at ends."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from deltaproduct_jax.ops.checks import as_array, check_segment_dtype, check_shape, check_size
from deltaproduct_jax.ops.debug import nan_if
from deltaproduct_jax.ops.parts import on_each_row

# Tokens of a segment that are read at once, where the state after every segment is wanted.
PIECE = 64


def starts_of_segments(segment_ids: Integer[Array, "B T"]) -> Bool[Array, "B T"]:
    """True where the id differs from the token before; never at the first token of a row.

    Only changes count, so an id that returns later in the row starts a new segment.
    """
    changed = segment_ids[:, 1:] != segment_ids[:, :-1]
    return jnp.pad(changed, ((0, 0), (min(1, segment_ids.shape[1]), 0)))


def segment_ids_from_cu_seqlens(
    cu_seqlens: Integer[Array | np.ndarray, "bounds"], num_tokens: int
) -> Integer[Array, "1 T"]:
    """Segment ids of one packed row from cumulative lengths ``[0, l_1, l_1 + l_2, ...]``.

    Args:
      cu_seqlens: bounds in tokens from 0 to at most T, not decreasing; may be traced, and then no
        value is looked at.
      num_tokens: T, the length of the row; tokens past the last bound get an id of their own.

    Raises:
      ValueError: the bounds are no integers in one dimension, or not as said, or ``num_tokens`` is
        no size.

    Returns:
      ids [1, T], int32: the index of the sequence that each token belongs to.
    """
    is_array = isinstance(cu_seqlens, jax.Array)
    cu_seqlens = as_array("cu_seqlens", cu_seqlens if is_array else np.asarray(cu_seqlens))
    if cu_seqlens.ndim != 1 or not jnp.issubdtype(cu_seqlens.dtype, jnp.integer):
        raise ValueError(
            "cu_seqlens must be integers in one dimension, [0, l_1, l_1 + l_2, ...], got "
            f"{cu_seqlens.dtype.name} of shape {cu_seqlens.shape}"
        )
    num_tokens = check_size("num_tokens", num_tokens, 0)
    is_known = not isinstance(cu_seqlens, jax.core.Tracer) and cu_seqlens.is_fully_addressable
    if is_known and isinstance(num_tokens, int):
        _check_bounds(jax.device_get(cu_seqlens), num_tokens)
    if cu_seqlens.dtype.itemsize < 4:  # which may not hold the positions
        cu_seqlens = cu_seqlens.astype(jnp.int32)
    positions = jnp.arange(num_tokens, dtype=cu_seqlens.dtype)
    ids = jnp.searchsorted(cu_seqlens, positions, side="right") - 1
    return ids.astype(jnp.int32)[None]


def _check_bounds(bounds: np.ndarray, num_tokens: int) -> None:
    """ValueError unless these are bounds of sequences in a row of so many tokens."""
    wide = bounds.astype(np.int64)
    if not len(wide) or wide[0] or np.any(wide[1:] < wide[:-1]) or wide[-1] > num_tokens:
        raise ValueError(
            f"cu_seqlens must begin with 0, never decrease, and end at num_tokens={num_tokens} at "
            f"most, got {np.array2string(bounds, separator=', ', threshold=8)}"
        )


def cu_seqlens_from_segment_ids(
    segment_ids: Integer[Array | np.ndarray, "1 T"],
) -> Integer[np.ndarray, "bounds"]:
    """Cumulative lengths ``[0, l_1, l_1 + l_2, ..., T]`` of one packed row.

    Runs on the host: how many segments there are depends on the values.

    Raises:
      ValueError: the ids are being traced, or are not those of one row, or no integers.
    """
    if isinstance(segment_ids, jax.core.Tracer):
        raise ValueError(
            "cu_seqlens_from_segment_ids needs concrete ids: the length of its result depends on "
            "them; call it outside jit"
        )
    ids = np.asarray(segment_ids)
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ValueError(f"segment_ids must be those of one row, [1, T], got shape {ids.shape}")
    check_segment_dtype(ids.dtype)
    if ids.size == 0:
        return np.zeros(1, np.int32)
    starts = np.flatnonzero(ids[0, 1:] != ids[0, :-1]) + 1
    return np.concatenate([[0], starts, [ids.size]]).astype(np.int32)


def carry_state(
    state: Float[Array, "B Hv K V"],
    last_ids: Integer[Array | np.ndarray, "B"],
    next_ids: Integer[Array | np.ndarray, "B"],
) -> Float[Array, "B Hv K V"]:
    """The state to start the next piece of packed rows with.

    A piece cannot see the id before its first token, so whoever cuts a packed row passes the final
    state of one piece through this function: rows whose segment ends at the cut get a zero state.

    Args:
      state: final state of the earlier piece.
      last_ids: id of each row's last token before the cut.
      next_ids: id of each row's first token after it.

    Raises:
      ValueError: an argument is no array of its shape, or an id no integer.
    """
    sizes: dict[str, int] = {}
    state = as_array("state", state)
    check_shape("state", state.shape, ("B", "Hv", "K", "V"), sizes)
    ids = [as_array("last_ids", last_ids), as_array("next_ids", next_ids)]
    for name, array in zip(("last_ids", "next_ids"), ids, strict=True):
        check_shape(name, array.shape, ("B",), sizes)
        check_segment_dtype(array.dtype, name)
    same = ids[0] == ids[1]
    return jnp.where(same[:, None, None, None], state, 0)


class _Pieces(NamedTuple):
    """How packed rows are cut: N pieces of P tokens, none of which holds a boundary.

    Attributes:
      tokens: [B, N, P], which token of the row stands there; any where none counts.
      counts: [B, N, P], whether it counts.
      segment: [B, N], number of the segment that a piece belongs to, from 0.
      place: [B, T], where among the N P each token of a row is.
      segment_of_token: [B, T], number of its segment.
    """

    tokens: jax.Array
    counts: jax.Array
    segment: jax.Array
    place: jax.Array
    segment_of_token: jax.Array


def by_segment(
    run: Callable[[Any, Any, jax.Array], tuple[Any, Any]],
    tokens: Any,
    states: Any,
    segment_ids: Integer[Array, "B T"],
    *,
    piece: int = PIECE,
) -> tuple[Any, Any]:
    """Reads packed rows, each segment from a state of its own, and gives the state after each.

    ``run`` gets every segment in pieces, one after another, those of all rows at once. A row of T
    tokens takes at most ``T / piece + S`` of them.

    Args:
      run: (tokens [B, P, ...], state [B, ...], which of them count [B, P]) -> outputs [B, P, ...]
        and the state after those that count. The others are 0, and must change nothing.
      tokens: a tree of arrays [B, T, ...].
      states: a tree of arrays [B, S, ...], before each of a row's first S segments.
      segment_ids: which segment each token belongs to.
      piece: P, tokens of a piece at most.

    Returns:
      The outputs [B, T, ...], NaN in a row's segments beyond the first S, and the states [B, S,
      ...] after each; that of a segment without a token is as it was.
    """
    B, T = segment_ids.shape
    S = jax.tree.leaves(states)[0].shape[1]
    if not T:
        first = jax.tree.map(lambda x: x[:, 0], states)
        return run(tokens, first, jnp.zeros((B, 0), bool))[0], states
    P = min(piece, T)
    cut = _cut(segment_ids, S, P)
    N = cut.segment.shape[1]

    def pieces_of(x: jax.Array) -> jax.Array:
        pieces = _along(x, cut.tokens.reshape(B, N * P)).reshape(B, N, P, *x.shape[2:])
        pieces = jnp.where(_like(cut.counts, pieces), pieces, jnp.zeros((), x.dtype))
        return jnp.moveaxis(pieces, 1, 0)

    def one(states: Any, given: Any) -> tuple[Any, Any]:
        tokens, counts_BP, segment_B = given
        slot_B1 = jnp.minimum(segment_B, S - 1)[:, None]
        outputs, after = run(
            tokens, jax.tree.map(lambda x: _along(x, slot_B1)[:, 0], states), counts_BP
        )
        is_here_BS = jnp.arange(S)[None] == segment_B[:, None]
        is_here_BS &= jnp.any(counts_BP, axis=1)[:, None]
        write = lambda x, new: jnp.where(_like(is_here_BS, x), new[:, None], x)
        return jax.tree.map(write, states, after), outputs

    counts_NBP, segment_NB = (jnp.moveaxis(x, 1, 0) for x in (cut.counts, cut.segment))
    given = (jax.tree.map(pieces_of, tokens), counts_NBP, segment_NB)
    states, outputs = jax.lax.scan(one, states, given)

    def in_rows(x: jax.Array) -> jax.Array:
        x = jnp.moveaxis(x, 0, 1)
        x = _along(x.reshape(B, N * P, *x.shape[3:]), cut.place)
        return nan_if(_like(cut.segment_of_token >= S, x), x)

    return jax.tree.map(in_rows, outputs), states


def _cut(segment_ids: jax.Array, S: int, P: int) -> _Pieces:
    T = segment_ids.shape[1]
    starts_BT = starts_of_segments(segment_ids)
    segment_BT = jnp.cumsum(starts_BT, axis=1, dtype=jnp.int32)
    time_1T = jnp.arange(T, dtype=jnp.int32)[None]
    since_BT = time_1T - jax.lax.cummax(jnp.where(starts_BT, time_1T, 0), axis=1)
    is_first_BT = since_BT % P == 0
    number_BT = jnp.cumsum(is_first_BT, axis=1, dtype=jnp.int32) - 1
    N = min(T, (T + S * (P - 1)) // P)
    first_BN = jnp.argsort(~is_first_BT, axis=1, stable=True)[:, :N].astype(jnp.int32)
    token_BNP = first_BN[:, :, None] + jnp.arange(P, dtype=jnp.int32)[None, None]
    is_there_BNP = (token_BNP < T) & (jnp.arange(N)[None] <= number_BT[:, -1:])[..., None]
    token_BNP = jnp.minimum(token_BNP, T - 1)
    segment_BN = _along(segment_BT, first_BN)
    of_token_BNP = _along(segment_BT, token_BNP.reshape(-1, N * P)).reshape(token_BNP.shape)
    counts_BNP = is_there_BNP & (of_token_BNP == segment_BN[..., None])
    place_BT = jnp.minimum(number_BT * P + since_BT % P, N * P - 1)
    return _Pieces(token_BNP, counts_BNP, segment_BN, place_BT, segment_BT)


def _along(x: jax.Array, index_BN: jax.Array) -> jax.Array:
    """Positions ``index`` of every row of ``x`` [B, M, ...]."""

    def gather(x: jax.Array, index: jax.Array) -> jax.Array:
        return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)

    return on_each_row(gather, x, index_BN)


def _like(flags: jax.Array, x: jax.Array) -> jax.Array:
    """Flags with axes of size 1 behind, to the rank of ``x``."""
    return flags.reshape(*flags.shape, *[1] * (x.ndim - flags.ndim))
