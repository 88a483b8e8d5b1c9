"""Takes padding out of rows and puts it back, so that a mixer never sees it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int, Shaped

from deltaproduct_jax.ops.parts import on_each_row


def along_rows(x: Shaped[Array, "B S *rest"], index: Int[Array, "B N"]) -> Array:
    """Positions ``index`` of every row of ``x``: ``[B, N, *rest]``."""

    def gather(x, index):
        return jnp.take_along_axis(x, index.reshape(*index.shape, *[1] * (x.ndim - 2)), axis=1)

    return on_each_row(gather, x, index)


def compact(
    x: Float[Array, "B T D"], segment_ids: Int[Array, "B T"] | None, mask: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T D"], Int[Array, "B T"] | None, Int[Array, " B"]]:
    """Moves the tokens that count to the front of each row, in order.

    Args:
        x: inputs.
        segment_ids: their segments, or None.
        mask: True where a token counts.

    Returns:
        The rows with padding behind, their segment ids (padding carries the last token's, so that
        it starts no segment), and how many tokens of each row count.
    """
    order = on_each_row(lambda mask: jnp.argsort(~mask, axis=1, stable=True), mask)
    length = jnp.sum(mask, axis=1)
    x = along_rows(x, order)
    if segment_ids is not None:
        position = jnp.minimum(jnp.arange(mask.shape[1])[None], jnp.maximum(length, 1)[:, None] - 1)
        segment_ids = along_rows(segment_ids, along_rows(order, position))
    return x, segment_ids, length


def spread(y: Float[Array, "B T D"], mask: Bool[Array, "B T"]) -> Float[Array, "B T D"]:
    """Undoes :func:`compact` on outputs; padding gets zero."""
    position = jnp.maximum(jnp.cumsum(mask, axis=1) - 1, 0)
    y = along_rows(y, position)
    return jnp.where(mask[..., None], y, 0)


def without_padding(
    mix: Callable[[jax.Array, jax.Array | None, jax.Array | None], tuple[jax.Array, Any]],
    x: Float[Array, "B T D"],
    segment_ids: Int[Array, "B T"] | None,
    mask: Bool[Array, "B T"] | None,
) -> tuple[Float[Array, "B T D"], Any]:
    """Runs a mixer on rows whose padding, if any, stands behind the tokens that count.

    Args:
        mix: takes the inputs, their segment ids, and how many leading tokens of each row count
            (None: all); returns the outputs and a state.
        x: inputs.
        segment_ids: their segments, or None.
        mask: True where a token counts; None for everywhere.
    """
    if mask is None:
        return mix(x, segment_ids, None)
    y, state = mix(*compact(x, segment_ids, mask))
    return spread(y, mask), state


def only_counted(
    x: Shaped[Array, "B T *rest"] | None, length: Int[Array, " B"] | None, otherwise: float = 0
) -> Shaped[Array, "B T *rest"] | None:
    """``x`` with ``otherwise`` at the tokens behind the leading ``length`` ones of each row."""
    if x is None or length is None:
        return x
    kept = jnp.arange(x.shape[1])[None] < length[:, None]
    otherwise = jnp.asarray(otherwise, x.dtype)
    return jnp.where(kept.reshape(*kept.shape, *[1] * (x.ndim - 2)), x, otherwise)
