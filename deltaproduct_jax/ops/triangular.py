"""Inverse of a unit lower-triangular matrix by matmuls, as accurate as substitution.

Two other ways were left out on purpose. A Neumann series, or doubling by powers of the strictly
lower part, overflows when beta is near 2 and keys agree, although the inverse itself is bounded by
2. A triangular solve becomes a slow custom call on TPU and a slow loop on CPU.
"""

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.ops.precision import Matmul


def unit_lower_inverse(lower: jax.Array, matmul: Matmul) -> jax.Array:
    """(I + lower)^-1 by masked doubling.

    Once X holds the inverses of the diagonal blocks of width s, the blocks of width 2s follow from
    inv([[A, 0], [L, B]]) = [[inv A, 0], [-inv(B) L inv(A), inv B]] for all blocks at once:
    X <- X - X (lower o M_s) X, where M_s keeps the lower left quarter of every block of width 2s.
    Every X along the way is the inverse of a block-diagonal part, so nothing grows that the result
    does not hold. The first level needs no matmul.

    Args:
      lower: [..., M, M], strictly lower triangular (other entries must be 0), any M.
      matmul: rule for the products; float32 at least.

    Returns:
      The inverse, [..., M, M].
    """
    M = lower.shape[-1]
    index = np.arange(M)
    batch_rank = lower.ndim - 2
    inverse = jnp.broadcast_to(jnp.eye(M, dtype=lower.dtype), lower.shape)
    width = 1
    while width < M:
        block, odd = index // (2 * width), (index // width) % 2 == 1
        quarter = (block[:, None] == block[None, :]) & odd[:, None] & ~odd[None, :]
        correction = jnp.where(quarter.reshape((1,) * batch_rank + (M, M)), lower, 0)
        if 2 * width >= M > 2:
            # A single block: its quarter alone, which is half of every product or less.
            correction = matmul(
                "...ij,...jk->...ik", inverse[..., width:, width:], lower[..., width:, :width]
            )
            correction = matmul("...ij,...jk->...ik", correction, inverse[..., :width, :width])
            edges = [(0, 0)] * batch_rank + [(width, 0), (0, M - width)]
            correction = jnp.pad(correction, edges)
        elif width > 1:
            correction = matmul("...ij,...jk->...ik", inverse, correction)
            correction = matmul("...ij,...jk->...ik", correction, inverse)
        inverse = inverse - correction
        width *= 2
    return inverse
