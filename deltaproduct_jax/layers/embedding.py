"""Embeddings whose gradient is summed in float32: `ops/blocks/lookup.py`."""

import jax
from flax import nnx

from deltaproduct_jax.ops.blocks import lookup, rows


class Embed(nnx.Embed):
    """`nnx.Embed` with the gradient of which `lookup.embedding_gradient` tells; same outputs."""

    def __call__(self, inputs: jax.Array, out_sharding=None) -> jax.Array:
        """Rows of the table, ``[*ids, features]``; NaN for ids that no row has."""
        if self.num_embeddings == 1 or not inputs.size:
            return super().__call__(inputs, out_sharding)
        (table,) = self.promote_dtype((self.embedding[...],), dtype=self.dtype, inexact=False)
        if out_sharding is None:
            return rows.lookup(table, inputs)
        return jax.sharding.auto_axes(lookup.plain, out_sharding=out_sharding)(table, inputs)
