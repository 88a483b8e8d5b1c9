"""What the GPU kernels tell of rows that are not finite, with what they have in registers.

No kernel chooses between numbers by a mask, so what is bad once stays in a state until the end: it
tells of keys, values, step sizes, decays and the state before, the cotangent of one of cotangents.
A query reaches no state. Of its products with keys none is finite, so that one of each tells.
"""

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.kernels import Options
from deltaproduct_jax.ops.layout import Tokens

# Whether walks over whole sequences ever tell; never changed but to time what that costs.
LOOKS = True


def looks(tokens: Tokens, options: Options) -> bool:
    """Whether a call looks: of packed rows, whose segments must not reach each other.

    The host waits for what is found, and few calls take as long as that. Rows and heads are apart
    anyway, and layers replace what is bad before.
    """
    return LOOKS and tokens.resets is not None and not options.known_finite


def of_pieces(seen: jax.Array, pieces: int) -> jax.Array:
    """Flags [B, Hv, pieces, ...], in the shape that they have in the call as it is written."""
    if seen.ndim < 3 or seen.shape[2] == pieces:  # there are none of pieces, or as many
        return seen
    shape = (*seen.shape[:2], pieces, *seen.shape[3:])
    return jnp.broadcast_to(jnp.sum(seen, axis=2, keepdims=True), shape)


def whole(tokens: Tokens, options: Options) -> Tokens:
    """Shapes of the call that these are rows of: what is kept of one is cut as that is."""
    rows = options.rows or tokens.q.shape[0]
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((rows, *x.shape[1:]), x.dtype), tokens)
