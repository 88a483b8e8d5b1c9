"""The GPU kernel for one token, in Triton. Letters as in kernels.py."""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.ids import program_ids
from deltaproduct_jax.ops.kernels.triton.parts import head, square


@triton.jit
def step(
    q_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, state_ptr,
    o_ptr, next_ptr,
    SCALE: tl.constexpr, R: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, HAS_G: tl.constexpr,
    GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """One token: the state is read and written once."""
    part, pid, _ = program_ids(GX, GY)
    b, hv, h = head(pid, H, HV)
    rows = tl.arange(0, BK)
    columns = part * BV + tl.arange(0, BV)
    inside = (rows < K)[:, None] & (columns < V)[None, :]
    pointers = square(state_ptr, pid.to(tl.int64), rows, columns, K, V)
    S = tl.load(pointers, mask=inside, other=0.0)
    if HAS_G:
        S *= tl.exp(tl.load(g_ptr + b * HV + hv).to(tl.float32))
    for r in range(0, R):
        update = b * R + r
        k = tl.load(k_ptr + (update * H + h) * K + rows, mask=rows < K, other=0.0).to(tl.float32)
        v_pointers = v_ptr + (update * HV + hv) * V + columns
        v = tl.load(v_pointers, mask=columns < V, other=0.0).to(tl.float32)
        beta = tl.load(beta_ptr + update * HV + hv).to(tl.float32)
        error = v - tl.sum(k[:, None] * S, axis=0)
        S += (beta * k)[:, None] * error[None, :]
    q = tl.load(q_ptr + (b * H + h) * K + rows, mask=rows < K, other=0.0).to(tl.float32)
    o = SCALE * tl.sum(q[:, None] * S, axis=0)
    o = o.to(o_ptr.dtype.element_ty)
    tl.store(o_ptr + (b * HV + hv) * V + columns, o, mask=columns < V)
    pointers = square(next_ptr, pid.to(tl.int64), rows, columns, K, V)
    tl.store(pointers, S, mask=inside)


@triton.jit
def step_in_place(
    q_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, state_ptr,
    o_ptr,
    SCALE: tl.constexpr, R: tl.constexpr, H: tl.constexpr, HV: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, HAS_G: tl.constexpr,
    GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """`step` where one pointer stands for the state and what takes its place."""
    step(
        q_ptr, k_ptr, v_ptr, beta_ptr, g_ptr, state_ptr, o_ptr, state_ptr,
        SCALE, R, H, HV, K, BK, V, BV, HAS_G, GX, GY,
    )  # fmt: skip
