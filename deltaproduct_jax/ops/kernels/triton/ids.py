"""Ids of programs, in Triton, whose grid may lie in a line (`deltaproduct_jax.ops.kernels.grids`).

GX and GY are the lengths of its first two axes then, else 0.
"""

import triton
import triton.language as tl


@triton.jit
def program_ids(GX: tl.constexpr, GY: tl.constexpr):
    """Those of all three axes."""
    if GX == 0:
        x, y, z = tl.program_id(0), tl.program_id(1), tl.program_id(2)
    else:
        x, y, z = of_line(tl.program_id(0), GX, GY)
    return x, y, z


@triton.jit
def program_ids_again(GX: tl.constexpr, GY: tl.constexpr):
    """The same, read anew where it stands."""
    if GX == 0:
        x, y, z = program_id_again("x"), program_id_again("y"), program_id_again("z")
    else:
        x, y, z = of_line(program_id_again("x"), GX, GY)
    return x, y, z


@triton.jit
def of_line(pid, GX: tl.constexpr, GY: tl.constexpr):
    """Ids of the program with this number."""
    return pid % GX, pid // GX % GY, pid // (GX * GY)


@triton.jit
def program_id_again(AXIS: tl.constexpr):
    """`tl.program_id` of axis "x", "y" or "z", read anew where it stands."""
    nothing = tl.full([], 0, tl.int32)
    code: tl.constexpr = "mov.u32 $0, %ctaid." + AXIS + ";"
    return tl.inline_asm_elementwise(code, "=r,r", [nothing], tl.int32, is_pure=False, pack=1)
