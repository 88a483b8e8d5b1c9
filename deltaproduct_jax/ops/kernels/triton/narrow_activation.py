"""What the kernels of narrow heads make of what they read, in Triton: SiLU and unit length.

Letters as in narrow_forward.py.
"""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.convolution import sigmoid
from deltaproduct_jax.ops.kernels.triton.narrow_parts import block, wide


@triton.jit
def swished(u):
    """SiLU of u and its derivative, in float32."""
    z = wide(u)
    s = sigmoid(z)
    y = z * s
    return y, s + (y - y * s)


@triton.jit
def entered(u, EPSILON: tl.constexpr, RAW: tl.constexpr, UNIT: tl.constexpr,
            FACTOR: tl.constexpr = 1.0):  # fmt: skip
    """SiLU of a block if it is RAW, of length FACTOR of rows if UNIT, in its own dtype."""
    if RAW:
        y, _ = swished(u)
        if UNIT:
            y *= tl.rsqrt(tl.sum(y * y, axis=1, keep_dims=True) + EPSILON) * FACTOR
        u = y.to(u.dtype)
    return u


@triton.jit
def queries(
    q_base, few, keys, tokens, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr,
    RAW: tl.constexpr, EPSILON: tl.constexpr, FACTOR: tl.constexpr,
):  # fmt: skip
    """Queries of ``tokens`` tokens in as many rows as ``few`` has."""
    q = block(q_base, few, keys, few < tokens, H, K, BK)
    return entered(q, EPSILON, RAW, True, FACTOR)


@triton.jit
def left(dy, u, EPSILON: tl.constexpr, UNIT: tl.constexpr, FACTOR: tl.constexpr = 1.0):
    """The cotangent of a block u from that of what `entered` makes of it, in float32."""
    y, slope = swished(u)
    if UNIT:
        inverse = tl.rsqrt(tl.sum(y * y, axis=1, keep_dims=True) + EPSILON)
        along = tl.sum(y * dy, axis=1, keep_dims=True) * inverse * inverse
        dy = (inverse * FACTOR) * (dy - y * along)
    return dy * slope
