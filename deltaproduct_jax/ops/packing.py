"""Several sequences in one row: segment ids, their boundaries, and states carried across a cut."""

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Integer

from deltaproduct_jax.ops.checks import check_shape, check_size


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
      cu_seqlens: bounds in tokens, not decreasing; may be traced.
      num_tokens: T, the length of the row; tokens past the last bound get an id of their own.

    Raises:
      ValueError: the bounds are no integers in one dimension, or ``num_tokens`` is no size.

    Returns:
      ids [1, T], int32: the index of the sequence that each token belongs to.
    """
    cu_seqlens = jnp.asarray(cu_seqlens)
    if cu_seqlens.ndim != 1 or not jnp.issubdtype(cu_seqlens.dtype, jnp.integer):
        raise ValueError(
            "cu_seqlens must be integers in one dimension, [0, l_1, l_1 + l_2, ...], got "
            f"{cu_seqlens.dtype.name} of shape {cu_seqlens.shape}"
        )
    check_size("num_tokens", num_tokens, 0)
    positions = jnp.arange(num_tokens)
    ids = jnp.searchsorted(cu_seqlens, positions, side="right") - 1
    return ids.astype(jnp.int32)[None]


def cu_seqlens_from_segment_ids(
    segment_ids: Integer[Array | np.ndarray, "1 T"],
) -> Integer[np.ndarray, "bounds"]:
    """Cumulative lengths ``[0, l_1, l_1 + l_2, ..., T]`` of one packed row.

    Runs on the host: how many segments there are depends on the values.

    Raises:
      ValueError: the ids are being traced, or are not those of one row.
    """
    if isinstance(segment_ids, jax.core.Tracer):
        raise ValueError(
            "cu_seqlens_from_segment_ids needs concrete ids: the length of its result depends on "
            "them; call it outside jit"
        )
    ids = np.asarray(segment_ids)
    if ids.ndim != 2 or ids.shape[0] != 1:
        raise ValueError(f"segment_ids must be those of one row, [1, T], got shape {ids.shape}")
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
      ValueError: there is not one id a row.
    """
    sizes: dict[str, int] = {}
    check_shape("state", state.shape, ("B", "Hv", "K", "V"), sizes)
    for name, ids in (("last_ids", last_ids), ("next_ids", next_ids)):
        check_shape(name, ids.shape, ("B",), sizes)
    same = jnp.asarray(last_ids) == jnp.asarray(next_ids)
    return jnp.where(same[:, None, None, None], state, 0)
