"""Bodies of the GPU kernels of what stands behind a projection: SiLU and unit length, in Triton.

Arrays are rows of WIDTH numbers, [N, WIDTH] and contiguous. A program has ROWS of them, in a tile
of BW columns.
"""

import triton
import triton.language as tl


@triton.jit
def activate(
    u_ptr, y_ptr,
    N: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, ROWS: tl.constexpr,
    SILU: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """act(u) divided by its length."""
    offsets, inside = places(N, WIDTH, BW, ROWS)
    y = tl.load(u_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    if SILU:
        y *= tl.sigmoid(y)
    y *= tl.rsqrt(tl.sum(y * y, axis=1, keep_dims=True) + EPSILON)
    tl.store(y_ptr + offsets, y.to(y_ptr.dtype.element_ty), mask=inside)


@triton.jit
def activate_back(
    u_ptr, dy_ptr, du_ptr,
    N: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, ROWS: tl.constexpr,
    SILU: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """The cotangent of u; what `activate` makes is made again."""
    offsets, inside = places(N, WIDTH, BW, ROWS)
    z = tl.load(u_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    dy = tl.load(dy_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    y = z
    if SILU:
        s = tl.sigmoid(z)
        y = z * s
    inverse = tl.rsqrt(tl.sum(y * y, axis=1, keep_dims=True) + EPSILON)
    unit = y * inverse
    dz = inverse * (dy - unit * tl.sum(unit * dy, axis=1, keep_dims=True))
    if SILU:
        dz *= s * (1 + z * (1 - s))
    tl.store(du_ptr + offsets, dz.to(du_ptr.dtype.element_ty), mask=inside)


@triton.jit
def places(N: tl.constexpr, WIDTH: tl.constexpr, BW: tl.constexpr, ROWS: tl.constexpr):
    """Where a program's numbers [ROWS, BW] stand, and which there are."""
    rows = tl.program_id(0).to(tl.int64) * ROWS + tl.arange(0, ROWS)
    columns = tl.arange(0, BW)
    inside = (rows < N)[:, None] & (columns < WIDTH)[None, :]
    return rows[:, None] * WIDTH + columns[None, :], inside
