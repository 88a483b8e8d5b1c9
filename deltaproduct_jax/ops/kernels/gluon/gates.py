"""What of gates is found outside of the kernels: which groups matter, and their cotangents.

Letters as in prepare.py.
"""

import jax
import jax.numpy as jnp
import numpy as np

GROUP = 64  # tokens
# Where gates of a group add up to no less, `exp` of a sum, and what undoes it, are float32's.
MILD = -60.0
# The share of a state, as a logarithm, of which float32 keeps nothing beside what is as large.
FORGOTTEN = -40.0


def needed(growth: jax.Array, pieces: int) -> jax.Array:
    """How many groups of a piece matter, [B, Hv, pieces, 3].

    Of its last to the state that it ends with; all or none to what it makes of the state that it
    begins with; of its first to the cotangent of that. Whatever is beyond so many groups they make
    FORGOTTEN.

    Args:
      growth: [B, Hv, groups], by how much they make a state longer, at most: logarithms.
      pieces: of equal numbers of groups, but for the last.
    """
    steps = -(-growth.shape[2] // pieces)
    growth = jnp.pad(growth, ((0, 0), (0, 0), (0, pieces * steps - growth.shape[2])))
    growth = growth.reshape(*growth.shape[:2], pieces, steps)

    def until_forgotten(growth):
        forgotten = jnp.cumsum(growth, axis=-1) <= FORGOTTEN
        return jnp.where(jnp.any(forgotten, axis=-1), jnp.argmax(forgotten, axis=-1) + 1, steps + 1)

    of_end, of_start = until_forgotten(growth[..., ::-1]), until_forgotten(growth)
    of_map = jnp.where(of_end > steps, steps, 0)
    return jnp.minimum(jnp.stack([of_end, of_map, of_start], axis=-1), steps).astype(jnp.int32)


def summed_terms(terms: jax.Array, wholes: jax.Array, sums: jax.Array, T: int) -> jax.Array:
    """The cotangent of g [B, T, Hv]: every term of a decay counts for the tokens that it spans.

    Args:
      terms: [B, Hv, groups, R, 4, 64], as `find_cotangents` writes them.
      wholes: [B, Hv, groups, R + 1, V / 64]; states before blocks times the cotangents of those
        behind, with the decay between, and at last states before groups times their cotangents.
      sums: of gates, as `gate_sums` writes them.
      T: tokens.
    """
    R = terms.shape[3]
    every = {"precision": jax.lax.Precision.HIGHEST}
    spans = np.stack([_spans(r, R) for r in range(R)])
    dg = jnp.einsum("bhnrpi,rpiu->bhnu", terms, spans, **every)
    # What decays over the whole block; or, of groups with mild gates, all that leaves the group.
    wholes = jnp.sum(wholes, axis=-1)
    at_end = wholes[:, :, -1:, R] - jnp.sum(terms[:, :, -1:, :, 2:], axis=(-3, -2, -1))
    after = jnp.concatenate([wholes[:, :, 1:, R], at_end], axis=2)
    of_blocks = jnp.einsum("bhnr,ru->bhnu", wholes[..., :R], _inside(R), **every)
    mild = sums[:, :, :, 0, -1:] >= MILD
    dg += jnp.where(mild, after[..., None], of_blocks)
    return jnp.moveaxis(dg.reshape(*dg.shape[:2], -1), 1, 2)[:, :T]


def _inside(R: int) -> np.ndarray:
    """Which tokens of a group begin or go on within a block: [R, 64] of 0 and 1."""
    r, u = np.arange(R)[:, None], np.arange(GROUP)[None, :]
    inside = (u > (r * GROUP - 1) // R) & (u <= (r * GROUP + GROUP - 1) // R)
    return inside.astype(np.float32)


def _spans(r: int, R: int) -> np.ndarray:
    """For which tokens the terms of block r of a group count: [4, 64, 64 tokens] of 0 and 1."""
    token = (r * GROUP + np.arange(GROUP))[:, None] // R  # of every update
    before = (r * GROUP - 1) // R  # that the block before ends with
    i, u = np.arange(GROUP)[:, None], np.arange(GROUP)[None, :]
    kinds = (u > before) & (u <= token), (u > token) & (u <= token[-1]), u <= token, u <= i
    return np.stack(kinds).astype(np.float32)
