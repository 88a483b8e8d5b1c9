"""What of gates is found outside of the kernels: which groups matter.

Letters as in prepare.py.
"""

import jax
import jax.numpy as jnp

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
