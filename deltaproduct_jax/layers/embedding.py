"""Embeddings whose gradient is summed in float32, and by a matmul where few rows are met by all.

The gradient of a lookup adds the cotangents of all tokens into the rows of the table. In bfloat16 a
sum of thousands stops growing: of text, whose most frequent ids stand in every twentieth place,
gradients were a tenth off. With a hundred rows and half a million tokens, thousands of additions
meet in every row, and an accelerator makes them one after another, in an order of its own. As a
product with the one-hot matrix of the ids they are a matmul, always in the same order.
"""

import functools
import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from flax import nnx

from deltaproduct_jax.ops.blocks import short_rows
from deltaproduct_jax.ops.blocks.rows import by_kernel_or_plain
from deltaproduct_jax.ops.kernels.triton.short import passes as of_triton
from deltaproduct_jax.ops.linear import linear
from deltaproduct_jax.ops.varying import mark_all_varying, zeros_varying_as

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
    # Of few rows and channels a GPU's kernel makes this product: `short_lookup`.
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
            rows = jax.ShapeDtypeStruct((*inputs.shape, table.shape[1]), table.dtype)
            by_kernel = short_rows.takes(rows, len(table), table, inputs)
            return (short_lookup if by_kernel else lookup)(table, inputs)
        return jax.sharding.auto_axes(lookup, out_sharding=out_sharding)(table, inputs)


@jax.custom_jvp
def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """``table[ids]``: ``[rows, D]`` and ``[*ids]`` to ``[*ids, D]``; NaN for ids out of range."""
    return jnp.take(table, ids, axis=0)


@lookup.defjvp
def _lookup_jvp(primals, tangents):
    # Only ids are kept for the way back, not the one-hot matrix.
    rows = jax.checkpoint(_rows, prevent_cse=False)(tangents[0], primals[1])
    return lookup(*primals), rows


def _rows(table: jax.Array, ids: jax.Array) -> jax.Array:
    if len(table) > FEW_ROWS:  # as `embedding_gradient` says
        return _taken(table, ids)
    return jax.lax.platform_dependent(table, ids, cpu=_taken, default=_multiplied)


@jax.custom_jvp
def short_lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """`lookup` of rows that `short_rows.takes`: a GPU's kernel makes its gradient."""
    return lookup(table, ids)


@short_lookup.defjvp
def _short_lookup_jvp(primals, tangents):
    table, ids = primals
    nothing = jnp.zeros((*ids.shape, table.shape[1]), table.dtype)
    # What is linear gives arrays of the types that it takes.
    ids, *arrays = mark_all_varying((ids, tangents[0], nothing))
    return short_lookup(table, ids), linear(_read, _read_back, ids, tuple(arrays))[1]


def _read(ids, arrays):
    return jnp.zeros_like(arrays[0]), _taken(arrays[0], ids)


def _read_back(ids, cotangents):
    dtable, drows = cotangents
    [summed] = _summed(len(dtable))(None, ids, drows)
    return summed, jnp.zeros_like(drows)


@functools.cache
def _summed(rows: int) -> Callable:
    """(ids, cotangents of the rows that they name) -> that of the table."""

    def by_kernel(ids, drows):
        drows = drows.reshape(-1, drows.shape[-1])
        return (of_triton.lookup_back(ids.reshape(-1), drows, rows).astype(drows.dtype),)

    def plain(ids, drows):
        table = zeros_varying_as((rows, drows.shape[-1]), drows)
        return jax.vjp(lambda table: _rows(table, ids), table)[1](drows)

    return by_kernel_or_plain(by_kernel, plain, (), ())


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
