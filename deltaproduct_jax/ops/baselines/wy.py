"""The WY form of a chunk: writes that depend on one another, and what all of them leave.

Shape suffixes as in ``chunks``; M writes that depend on one another.
"""

from collections.abc import Iterable

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.ops.baselines.chunks import DiagonalDecays, decayed_products
from deltaproduct_jax.ops.precision import Matmul
from deltaproduct_jax.ops.triangular import unit_lower_inverse


def solve_writes(
    system_BHMM: jax.Array, right_BHMV: jax.Array, exact: Matmul, matmul: Matmul
) -> jax.Array:
    """``u`` with ``u + L u = right``, L the system below its diagonal: the values of the writes.

    Args:
        system_BHMM: how much of write s write m reads, at (m, s); only s < m counts.
        right_BHMV: what the writes would be if none read another.
        exact: products within the inverse.
        matmul: the product with it.
    """
    M = system_BHMM.shape[-1]
    strict = np.tri(M, k=-1, dtype=bool).reshape(1, 1, M, M)
    inverse_BHMM = unit_lower_inverse(jnp.where(strict, system_BHMM, 0), exact)
    return matmul("bhms,bhsv->bhmv", inverse_BHMM, right_BHMV)


def read_and_write(
    state_BHKV: jax.Array,
    q_BHCK: jax.Array,
    writes: Iterable[tuple[jax.Array, jax.Array]],
    decays: DiagonalDecays,
    matmul: Matmul,
) -> tuple[jax.Array, jax.Array]:
    """What queries read of state and writes, and the state after the chunk.

    Args:
        state_BHKV: before the chunk.
        q_BHCK: queries; each reads the writes of its own token as well.
        writes: keys ``[B, H, C, K]`` and values ``[B, H, C, V]``.
        decays: of the chunk.
        matmul: takes the products.
    """
    wide = state_BHKV.dtype
    o_BHCV = matmul("bhck,bhkv->bhcv", q_BHCK.astype(wide) * decays.into, state_BHKV)
    next_BHKV = decays.through[..., None] * state_BHKV
    for keys, values in writes:
        scores_BHCC = decayed_products(q_BHCK, keys, decays, matmul)
        o_BHCV += matmul("bhcs,bhsv->bhcv", scores_BHCC, values)
        next_BHKV += matmul("bhck,bhcv->bhkv", keys.astype(wide) * decays.out, values)
    return o_BHCV, next_BHKV
