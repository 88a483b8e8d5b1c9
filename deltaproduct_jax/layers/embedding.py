"""Embeddings whose gradient is exact and does not wait.

The gradient of a lookup adds the cotangents of all tokens into the rows of the table. Text repeats
a few ids thousands of times, tasks have few ids at all: thousands of additions meet in one row,
which a GPU makes one after another, and in bfloat16 a sum of thousands stops growing. Here sums
are float32 everywhere, and accelerators first add what meets by products of matrices.
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
# Tokens among which equal ids are added first, where rows are many. The matrix that says which are
# equal has as many float32 to a token.
WINDOW = 512


def embedding_gradient(platform: str, rows: int) -> str:
    """How the gradient of an `Embed` is summed, in float32.

    Returns:
        ``"matmul"``: by a product with the one-hot matrix of the ids. ``"merged"``: equal ids of
        `WINDOW` tokens by a product, then row by row. ``"scatter"``: row by row.

    Args:
        platform: what the program is lowered for: "cpu", "cuda", "rocm" or "tpu".
        rows: of the table, the size of the vocabulary.
    """
    # A CPU adds row by row as fast as it reads them, up to 20 times faster than by a matmul.
    if platform == "cpu":
        return "scatter"
    if rows <= FEW_ROWS:
        return "matmul"
    # A TPU's additions do not contend: it makes all of them in turn.
    return "scatter" if platform == "tpu" else "merged"


class Embed(nnx.Embed):
    """`nnx.Embed` with the gradient that `embedding_gradient` names. Outputs are the same.

    Tables that lie over explicit axes of a mesh keep JAX's gradient.
    """

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Rows of the table, ``[*ids, features]``; NaN for ids that no row has."""
        if out_sharding is not None or self.num_embeddings == 1 or not inputs.size:
            return super().__call__(inputs, out_sharding)
        (table,) = self.promote_dtype((self.embedding[...],), dtype=self.dtype, inexact=False)
        return lookup(table, inputs)


@jax.custom_jvp
def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """``table[ids]``: ``[rows, D]`` and ``[*ids]`` to ``[*ids, D]``; NaN for ids out of range."""
    return jnp.take(table, ids, axis=0)


@lookup.defjvp
def _lookup_jvp(primals, tangents):
    table, ids = primals
    forms = {platform: FORMS[embedding_gradient(platform, len(table))] for platform in PLATFORMS}
    by_platform = functools.partial(jax.lax.platform_dependent, **forms)
    # Only ids are kept for the way back, not which are equal.
    rows = jax.checkpoint(by_platform, prevent_cse=False)(tangents[0], ids)
    return lookup(table, ids), rows


def _taken(table: jax.Array, ids: jax.Array) -> jax.Array:
    return jnp.take(table.astype(jnp.float32), ids, axis=0, fill_value=0).astype(table.dtype)


def _merged(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The same, each row taken once for all equal ids of a window; the transpose adds those first.

    A window is a piece of a row of tokens, or several whole rows, so that tokens which lie over
    devices need not move.
    """
    rows, length = math.prod(ids.shape[:-1]), ids.shape[-1] if ids.shape else 1
    pieces = math.ceil(length / WINDOW)
    width = math.ceil(length / pieces)
    together = max(n for n in range(1, max(1, WINDOW // width) + 1) if rows % n == 0)
    padding = ((0, 0), (0, pieces * width - length))
    padded = jnp.pad(ids.reshape(rows, length), padding, constant_values=len(table))
    windows = padded.reshape(-1, together * width)
    equal = windows[:, :, None] == windows[:, None, :]
    first = jnp.logical_not(jnp.tril(equal, -1).any(-1))
    once = jnp.where(first, windows, len(table))
    taken = jnp.take(table.astype(jnp.float32), once, axis=0, fill_value=0)
    found = jnp.einsum(
        "wij,wjd->wid", equal.astype(jnp.float32), taken, precision=_exact(table.dtype)
    )
    found = found.reshape(rows, pieces * width, -1)[:, :length]
    return found.astype(table.dtype).reshape(*ids.shape, -1)


def _multiplied(table: jax.Array, ids: jax.Array) -> jax.Array:
    """The same as a matmul, whose transpose is the one to the table."""
    groups = _groups(ids.shape)
    one_hot = jax.nn.one_hot(ids.reshape(groups, -1), len(table), dtype=table.dtype)
    tables = jnp.broadcast_to(table.astype(jnp.float32), (groups, *table.shape))
    rows = jnp.einsum(
        "gnr,grd->gnd",
        one_hot,
        tables,
        precision=_exact(table.dtype),
        preferred_element_type=jnp.float32,
    )
    return rows.astype(table.dtype).reshape(*ids.shape, -1)


def _exact(dtype) -> jax.lax.Precision | None:
    """Of products with 1 or 0; of bfloat16 one pass is."""
    return None if dtype == jnp.bfloat16 else jax.lax.Precision.HIGHEST


FORMS = {"scatter": _taken, "merged": _merged, "matmul": _multiplied}
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")


def _groups(shape: tuple[int, ...]) -> int:
    """Into how many groups of whole rows the tokens are cut: each has about `TOKENS_OF_A_SUM`.

    Rows stay whole, so that a batch that lies over devices need not move.
    """
    rows = shape[0] if shape else 1
    most = max(1, min(rows, math.prod(shape) // TOKENS_OF_A_SUM))
    return max(groups for groups in range(1, most + 1) if rows % groups == 0)
