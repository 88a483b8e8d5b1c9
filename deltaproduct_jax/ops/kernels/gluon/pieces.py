"""What pieces of a sequence begin with, in Triton, where some of them forget what was before.

What a piece does to any state is S -> A S + B, and on the way back dS -> A^T dS + B'. A summary
finds the ends B and the maps A; the piece from which a walk sets out has its true beginning, and
the first and the last piece need no map. Letters as in prepare.py.
"""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.ids import program_ids
from deltaproduct_jax.ops.kernels.triton.parts import square


@triton.jit
def compose(
    first_ptr, maps_ptr, ends_ptr, needs_ptr,
    starts_ptr,
    K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, PIECES: tl.constexpr,
    REVERSE: tl.constexpr, FORGETS: tl.constexpr, GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """States that pieces begin with, or, REVERSE, cotangents of states, from the last piece on.

    With FORGETS the second of what a piece ``needs`` is 0 where its map is.
    """
    part, pid, _ = program_ids(GX, GY)
    rows, columns = tl.arange(0, K), part * BV + tl.arange(0, BV)
    sequence = pid.to(tl.int64)
    index = sequence * PIECES + (PIECES - 1 if REVERSE else 0)
    map_index = sequence * (PIECES - 2) + (PIECES - 2 if REVERSE else -1)
    following: tl.constexpr = -1 if REVERSE else 1
    S = tl.load(square(first_ptr, sequence, rows, columns, K, V))
    tl.store(square(starts_ptr, index, rows, columns, K, V), S)
    S = tl.load(square(ends_ptr, index, rows, columns, K, V))
    tl.store(square(starts_ptr, index + following, rows, columns, K, V), S)
    for step in range(1, PIECES - 1):
        piece = index + step * following
        end = tl.load(square(ends_ptr, piece, rows, columns, K, V))
        has_map = True
        if FORGETS:
            has_map = tl.load(needs_ptr + piece * 3 + 1) > 0
        if has_map:
            A = tl.load(square(maps_ptr, map_index + step * following, rows, rows, K, K))
            if REVERSE:
                A = tl.trans(A)
            S = tl.dot(A, S, end, input_precision="tf32x3")
        else:
            S = end
        tl.store(square(starts_ptr, piece + following, rows, columns, K, V), S)
