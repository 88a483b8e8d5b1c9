"""Inverse of a unit lower-triangular matrix by matmuls, as accurate as substitution.

Two other ways were left out on purpose. A Neumann series, or doubling by powers of the strictly
lower part, overflows when beta is near 2 and keys are equal, although the inverse itself is bounded
by 2. A triangular solve becomes a slow custom call on TPU and a slow loop on CPU.
"""

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.ops.precision import Matmul

# Rows of a tile of a TPU's registers: narrower blocks of rows are not cut out of a matrix for free.
TILE_ROWS = 8


def unit_lower_inverse(
    lower: jax.Array, matmul: Matmul, *, half_rows: bool = False, refine: bool = False
) -> jax.Array:
    """(I + lower)^-1 by masked doubling.

    Once X holds the inverses of the diagonal blocks of width s, the blocks of width 2s follow from
    inv([[A, 0], [L, B]]) = [[inv A, 0], [-inv(B) L inv(A), inv B]] for all blocks at once:
    X <- X - X (lower o M_s) X, where M_s keeps the lower left quarter of every block of width 2s.
    Every X along the way is the inverse of a block-diagonal part, so nothing grows that the result
    does not hold. The first level needs no matmul.

    Args:
      lower: [..., M, M], strictly lower triangular (other entries must be 0), any M.
      matmul: rule for the products; float32 at least.
      half_rows: multiply only the rows that a level changes, half of them, where blocks are wide
        enough. Fewer products, but more copies, which a TPU's compiler expects to pay off only
        where the matrices stay in vector memory.
      refine: take one step of Newton's, X <- X + X (I - (I + lower) X), of two products. It removes
        what the levels rounded; where keys are equal that adds up over all chunks.

    Returns:
      The inverse, [..., M, M].
    """
    M = lower.shape[-1]
    index = np.arange(M)
    inverse = jnp.broadcast_to(jnp.eye(M, dtype=lower.dtype), lower.shape)
    width = 1
    while width < M:
        block, odd = index // (2 * width), (index // width) % 2 == 1
        quarter = (block[:, None] == block[None, :]) & odd[:, None] & ~odd[None, :]
        quarter = jnp.where(quarter.reshape((1,) * (lower.ndim - 2) + (M, M)), lower, 0)
        if width == 1:
            inverse = inverse - quarter
        elif 2 * width >= M > 2:
            inverse = _last_level(inverse, lower, width, matmul)
        elif half_rows and width >= TILE_ROWS and M % (2 * width) == 0:
            inverse = _level_of_half_rows(inverse, quarter, width, matmul)
        else:
            correction = matmul("...ij,...jk->...ik", inverse, quarter)
            inverse = inverse - matmul("...ij,...jk->...ik", correction, inverse)
        width *= 2
    if refine and M > 2:
        left = jnp.broadcast_to(jnp.eye(M, dtype=lower.dtype), lower.shape) - inverse
        left = left - matmul("...ij,...jk->...ik", lower, inverse)
        inverse = inverse + matmul("...ij,...jk->...ik", inverse, left)
    return inverse


def _last_level(inverse: jax.Array, lower: jax.Array, width: int, matmul: Matmul) -> jax.Array:
    """A single block: its quarter alone, which is half of every product or less."""
    M = lower.shape[-1]
    correction = matmul(
        "...ij,...jk->...ik", inverse[..., width:, width:], lower[..., width:, :width]
    )
    correction = matmul("...ij,...jk->...ik", correction, inverse[..., :width, :width])
    edges = [(0, 0)] * (lower.ndim - 2) + [(width, 0), (0, M - width)]
    return inverse - jnp.pad(correction, edges)


def _level_of_half_rows(
    inverse: jax.Array, quarter: jax.Array, width: int, matmul: Matmul
) -> jax.Array:
    """The lower half of the rows of every block of twice the width; the others stay."""
    *batch, M, _ = inverse.shape
    halves = inverse.reshape(*batch, M // (2 * width), 2, width, M)
    upper, lower = halves[..., 0, :, :], halves[..., 1, :, :]
    rows = matmul("...ij,...jk->...ik", lower.reshape(*batch, M // 2, M), quarter)
    rows = matmul("...ij,...jk->...ik", rows, inverse)
    return jnp.stack([upper, lower - rows.reshape(lower.shape)], axis=-3).reshape(inverse.shape)
