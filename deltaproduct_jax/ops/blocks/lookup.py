"""Rows of a table, whose gradient is summed in float32, by a matmul where few are met by all.

The gradient of a lookup adds the cotangents of all tokens into the rows of the table. In bfloat16 a
sum of thousands stops growing: of text, whose most frequent ids stand in every twentieth place,
gradients were a tenth off. With a hundred rows and half a million tokens, thousands of additions
meet in every row, and an accelerator makes them one after another, in an order of its own. As a
product with the one-hot matrix of the ids they are a matmul, always in the same order.
"""

import math

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.precision import accumulator_dtype
from deltaproduct_jax.ops.varying import zeros_varying_as

# Rows of a table up to which its gradient is a matmul with a one-hot matrix. Beyond, that matrix,
# tokens by rows, takes more memory and time than what it spares.
FEW_ROWS = 512
# Tokens of one matmul; of more, partial sums are added afterwards. The result is too small for one
# matmul over all tokens to occupy a GPU.
TOKENS_OF_A_SUM = 4096


def embedding_gradient(platform: str, rows: int) -> str:
    """How the gradient of a table is summed, in float32 at least: ``"matmul"`` or ``"scatter"``.

    Args:
      platform: what the program is lowered for: "cpu", "cuda", "rocm" or "tpu".
      rows: of the table, the size of the vocabulary.
    """
    # Of few rows and channels a GPU's kernel makes this product: `short.lookup`.
    # A CPU adds row by row as fast as it reads them, up to 20 times faster than by a matmul.
    return "matmul" if platform != "cpu" and rows <= FEW_ROWS else "scatter"


@jax.custom_jvp
def plain(table: jax.Array, ids: jax.Array) -> jax.Array:
    """``table[ids]``: ``[rows, D]`` and ``[*ids]`` to ``[*ids, D]``; NaN for ids out of range."""
    return jnp.take(table, ids, axis=0)


@plain.defjvp
def _plain_jvp(primals, tangents):
    # Only ids are kept for the way back, not the one-hot matrix.
    rows = jax.checkpoint(_rows, prevent_cse=False)(tangents[0], primals[1])
    return plain(*primals), rows


def plain_back(ids: jax.Array, drows: jax.Array, rows: int) -> tuple[jax.Array]:
    """The cotangent of a table of so many rows, from those of the rows that ``ids`` name."""
    table = zeros_varying_as((rows, drows.shape[-1]), drows)
    return jax.vjp(lambda table: _rows(table, ids), table)[1](drows)


def _rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    if len(table) > FEW_ROWS:  # as `embedding_gradient` says
        return taken(table, ids)
    return jax.lax.platform_dependent(table, ids, cpu=taken, default=multiplied)


def taken(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The rows, 0 for ids out of range; the transpose adds them up in float32 at least."""
    summed = accumulator_dtype(table.dtype)
    return jnp.take(table.astype(summed), ids, axis=0, fill_value=0).astype(table.dtype)


def multiplied(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The same as a matmul, whose transpose is the one to the table."""
    groups = _groups(ids.shape)
    # No two axes become one: a mesh may cut tokens too.
    grouped = ids.reshape(groups, -1, *ids.shape[1:])
    one_hot = jax.nn.one_hot(grouped, len(table), dtype=table.dtype)
    summed = accumulator_dtype(table.dtype)
    tables = jnp.broadcast_to(table.astype(summed), (groups, *table.shape))
    # Of bfloat16 one pass is exact: every product is with 1 or 0.
    exact = None if table.dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST
    rows = jnp.einsum(
        "g...r,grd->g...d", one_hot, tables, precision=exact, preferred_element_type=summed
    )
    return rows.astype(table.dtype).reshape(*ids.shape, -1)


def _groups(shape: tuple[int, ...]) -> int:
    """Into how many groups of whole rows the tokens are cut: each has about `TOKENS_OF_A_SUM`.

    Rows stay whole, so that a batch that lies over devices need not move.
    """
    rows = shape[0] if shape else 1
    most = max(1, min(rows, math.prod(shape) // TOKENS_OF_A_SUM))
    return max(groups for groups in range(1, most + 1) if rows % groups == 0)
