"""Embeddings whose gradient is summed in float32, and by a matmul where few rows are met by all.

The gradient of a lookup adds the cotangents of all tokens into the rows of the table. In bfloat16 a
sum of thousands stops growing: of text, whose most frequent ids stand in every twentieth place,
gradients were a tenth off. With a hundred rows and half a million tokens, thousands of additions
meet in every row, and an accelerator makes them one after another, in an order of its own. As a
product with the one-hot matrix of the ids they are a matmul, always in the same order.
"""

import functools
import math

import jax
import jax.numpy as jnp
from flax import nnx

# Rows of a table up to which its gradient is a matmul with a one-hot matrix. Beyond, that matrix,
# tokens by rows, takes more memory and time than what it spares.
FEW_ROWS = 512
# Tokens of one matmul; of more, partial sums are added afterwards. The result is too small for one
# matmul over all tokens to occupy a GPU.
TOKENS_OF_A_SUM = 4096


def embedding_gradient(platform: str, rows: int) -> str:
    """How the gradient of an `Embed` is summed, in float32 at least: ``"matmul"`` or ``"scatter"``.

    Args:
        platform: what the program is lowered for: "cpu", "cuda", "rocm" or "tpu".
        rows: of the table, the size of the vocabulary.
    """
    # A CPU adds row by row as fast as it reads them, up to 20 times faster than by a matmul.
    return "matmul" if platform != "cpu" and rows <= FEW_ROWS else "scatter"


class Embed(nnx.Embed):
    """`nnx.Embed` with the gradient that `embedding_gradient` names. Outputs are the same."""

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Rows of the table, ``[*ids, features]``; NaN for ids that no row has."""
        if self.num_embeddings == 1 or not inputs.size:
            return super().__call__(inputs, out_sharding)
        (table,) = self.promote_dtype((self.embedding[...],), dtype=self.dtype, inexact=False)
        if out_sharding is None:
            return lookup(table, inputs)
        return jax.sharding.auto_axes(lookup, out_sharding=out_sharding)(table, inputs)


@jax.custom_jvp
def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """``table[ids]``: ``[rows, D]`` and ``[*ids]`` to ``[*ids, D]``; NaN for ids out of range."""
    return jnp.take(table, ids, axis=0)


@lookup.defjvp
def _lookup_jvp(primals, tangents):
    table, ids = primals
    take = _taken
    if len(table) <= FEW_ROWS:  # as `embedding_gradient` says
        take = functools.partial(jax.lax.platform_dependent, cpu=_taken, default=_multiplied)
    # Only ids are kept for the way back, not the one-hot matrix.
    rows = jax.checkpoint(take, prevent_cse=False)(tangents[0], ids)
    return lookup(table, ids), rows


def _taken(table: jax.Array, ids: jax.Array) -> jax.Array:
    summed = jnp.promote_types(table.dtype, jnp.float32)
    return jnp.take(table.astype(summed), ids, axis=0, fill_value=0).astype(table.dtype)


def _multiplied(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The same as a matmul, whose transpose is the one to the table."""
    groups = _groups(ids.shape)
    # No two axes become one: a mesh may cut tokens too.
    grouped = ids.reshape(groups, -1, *ids.shape[1:])
    one_hot = jax.nn.one_hot(grouped, len(table), dtype=table.dtype)
    summed = jnp.promote_types(table.dtype, jnp.float32)
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
