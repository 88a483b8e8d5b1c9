"""What q, k and v go through before the op: SiLU, and the length of q and k.

Kernels of narrow heads do it themselves, of what they read anyway; everywhere else it is done here.
"""

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops import kernels
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.linear import unit_vectors
from deltaproduct_jax.ops.precision import accumulator_dtype


def l2_normalise(x: jax.Array, rounded: bool = True) -> jax.Array:
    """``x`` divided by its length along the last axis; in its own dtype if ``rounded``."""
    wide = x.astype(accumulator_dtype(x.dtype))
    normalised = unit_vectors(wide)
    return normalised.astype(x.dtype) if rounded else normalised


def silu(x: jax.Array) -> jax.Array:
    """x sigmoid(x), rounded once."""
    return jax.nn.silu(x.astype(accumulator_dtype(x.dtype))).astype(x.dtype)


def entered(tokens: Tokens) -> Tokens:
    """SiLU of q, k and v, and q and k divided by their lengths; each is rounded once."""

    def unit(x):
        return l2_normalise(jax.nn.silu(x.astype(accumulator_dtype(x.dtype)))).astype(x.dtype)

    return tokens._replace(q=unit(tokens.q), k=unit(tokens.k), v=silu(tokens.v))


def takes_raw(*, B: int, T: int, R: int, H: int, Hv: int, K: int, V: int, dtype) -> bool:
    """Whether a GPU's kernel does all of it where the op runs by "triton" and is differentiated.

    Args:
      B, T, R, H, Hv, K, V: lengths of dimensions, see `delta_product`.
      dtype: of q, k and v.
    """
    if not kernels.is_installed("triton") or not all(isinstance(size, int) for size in (B, T)):
        return False
    shapes = (B, T, H, K), (B, T, R, H, K), (B, T, R, Hv, V)
    q, k, v = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    beta = jax.ShapeDtypeStruct((B, T, R, Hv), jnp.float32)
    tokens = Tokens(q, k, v, beta, None, None)
    options = kernels.Options(1.0, None, 1, interpret=False, more=True)
    return kernels.load("triton").takes_raw(tokens, options)
