"""What the kernels of narrow heads make of what they read, in Triton: SiLU and unit length.

Letters as in narrow_forward.py.
"""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.convolution import sigmoid
from deltaproduct_jax.ops.kernels.triton.narrow_parts import block

# Of two numbers u of bfloat16, in float32: u / 2, and its hyperbolic tangent to 2^-11 of itself.
# What that lacks is much of a SiLU far below 0: see NARROW.md.
TANH = tl.constexpr(
    "{.reg .b32 u, c, z; mov.b32 c, 0x3F003F00; mov.b32 z, 0x80008000; "
    "fma.rn.bf16x2 u, $4, c, z; shl.b32 $0, u, 16; and.b32 $1, u, 0xffff0000; "
    "tanh.approx.f32 $2, $0; tanh.approx.f32 $3, $1;}"
)


@triton.jit
def swished(u):
    """SiLU of u and its derivative, in float32."""
    if u.dtype == tl.bfloat16:
        half, t = tl.inline_asm_elementwise(
            TANH, "=f,=f,=f,=f,r", [u], (tl.float32, tl.float32), is_pure=True, pack=2
        )
        y, s = half * t + half, 0.5 * t + 0.5
    else:
        z = u.to(tl.float32)
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
