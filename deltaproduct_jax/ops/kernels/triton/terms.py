"""The cotangent of g, which XLA adds up from what the GPU kernel of gradients writes."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np


def summed(meta: Mapping[str, Any], terms, of_chunks, through) -> jax.Array:
    """The cotangent of g [B, T, Hv]: each term counts for the tokens that it spans.

    ``through`` [B, Hv, N] is the decay over each chunk, which ``of_chunks`` still lacks.
    """
    C, CP, M, R, T = (meta[name] for name in ("C", "CP", "M", "R", "T"))
    token = np.arange(C)[:, None]
    of_row = np.arange(M) // R
    pairs = np.stack([of_row >= token, of_row < token], axis=-1).reshape(C, 2 * M)
    spans = np.concatenate([pairs, np.arange(CP) >= token], axis=1).astype(np.float32)
    dg = jnp.einsum("bhnpi,ci->bnch", terms, spans, precision=jax.lax.Precision.HIGHEST)
    of_all = through * jnp.sum(of_chunks, axis=-1)
    dg += jnp.swapaxes(of_all, 1, 2)[:, :, None]
    return dg.reshape(dg.shape[0], -1, dg.shape[-1])[:, :T]
