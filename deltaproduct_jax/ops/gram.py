"""Inner products of keys, to the last bit: their rounding adds up where keys are equal.

With beta near 2 and keys that are equal or nearly so, the rounding errors of a chunk's Gram matrix
are all the same, and so the errors of all updates of all chunks have one sign. A dot product of K
terms is wrong by several units in the last place where its terms are added one after another, as on
a GPU.
"""

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.precision import Matmul

# Bits of a key below the power of two above its norm that its first part holds. A product of two
# first parts, and by Cauchy-Schwarz any sum of such products, then fits the 24 bits of a float32.
FIRST_BITS = 11


def gram(k: jax.Array, matmul: Matmul) -> jax.Array:
    """k_m . k_n for all m and n: [..., M, K] to [..., M, M].

    float32 products under precision "highest" are rounded once, to half a unit in the last place,
    in whatever order a platform adds: keys are split into multiples of a power of two, whose
    products add up without any rounding, and a rest, whose own rounding is 2^-12 times smaller.
    Others are what ``matmul`` makes of them.
    """
    if not matmul.is_true_float32:
        return matmul("...mk,...nk->...mn", k, k)
    k = k.astype(jnp.float32)
    _, exponent = jnp.frexp(jnp.linalg.norm(k, axis=-1, keepdims=True))
    unit = jnp.ldexp(jnp.float32(1), exponent - FIRST_BITS)
    first = jax.lax.stop_gradient(jnp.round(k / unit) * unit)
    rest = k - first
    # first rest^T + rest first^T + rest rest^T, symmetric
    mixed = matmul("...mk,...nk->...mn", rest, k - rest / 2)
    mixed += jnp.swapaxes(mixed, -1, -2)
    return matmul("...mk,...nk->...mn", first, first) + mixed
