"""A sequence in pieces that GPU kernels walk through side by side, in Triton.

What a piece does to any state is S -> A S + B, and on the way back dS -> A^T dS + B'. A summary
finds the ends B, beginning with nothing, and the maps A, beginning with the identity; the piece
from which a walk sets out has its true beginning. `compose` makes of them what every piece begins
with. The first and the last piece need no map: the P - 2 between are ``[..., K, K]``.
Letters as in kernels.py.
"""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.ids import program_ids
from deltaproduct_jax.ops.kernels.triton.parts import square


@triton.jit
def start(
    ptr, pid, piece, first, rows, columns, K: tl.constexpr, V: tl.constexpr, BV: tl.constexpr,
    PIECES: tl.constexpr, SUMMARY: tl.constexpr,
):  # fmt: skip
    """The state that a piece begins with; of a summary zero, then, in further columns, identity."""
    inside = (rows < K)[:, None] & (columns < V)[None, :]
    if SUMMARY:
        inside = inside & (piece == first)
        S = tl.load(square(ptr, pid.to(tl.int64), rows, columns, K, V), mask=inside, other=0.0)
        return S + tl.where(rows[:, None] == (columns - tl.cdiv(V, BV) * BV)[None, :], 1.0, 0.0)
    index = pid.to(tl.int64) * PIECES + piece
    return tl.load(square(ptr, index, rows, columns, K, V), mask=inside, other=0.0)


@triton.jit
def is_asked_for(
    part, piece, first, V: tl.constexpr, BV: tl.constexpr, PIECES: tl.constexpr
):  # fmt: skip
    """Whether `compose` reads what this program of a summary finds.

    Not the end of the last piece, nor the maps of both ends.
    """
    last = PIECES - 1 - first
    is_end = part < tl.cdiv(V, BV)
    return (piece != last) & (is_end | (piece != first))


@triton.jit
def compose(
    first_ptr, maps_ptr, ends_ptr,
    starts_ptr,
    K: tl.constexpr, BK: tl.constexpr, V: tl.constexpr, BV: tl.constexpr, ROWS: tl.constexpr,
    PIECES: tl.constexpr, REVERSE: tl.constexpr, PRECISION: tl.constexpr,
    GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """States that pieces begin with, or, REVERSE, cotangents of states, from the last piece on.

    ROWS rows of a map at a time, so that wide ones fit into shared memory.
    """
    part, pid, _ = program_ids(GX, GY)
    rows, some = tl.arange(0, BK), tl.arange(0, ROWS)
    columns = part * BV + tl.arange(0, BV)
    inside = (rows < K)[:, None] & (columns < V)[None, :]
    sequence = pid.to(tl.int64)
    index = sequence * PIECES + (PIECES - 1 if REVERSE else 0)
    map_index = sequence * (PIECES - 2) + (PIECES - 3 if REVERSE else 0)
    following: tl.constexpr = -1 if REVERSE else 1
    S = tl.load(square(first_ptr, sequence, rows, columns, K, V), mask=inside, other=0.0)
    tl.store(square(starts_ptr, index, rows, columns, K, V), S, mask=inside)
    S = tl.load(square(ends_ptr, index, rows, columns, K, V), mask=inside, other=0.0)
    index += following
    tl.store(square(starts_ptr, index, rows, columns, K, V), S, mask=inside)
    for _ in range(2, PIECES):
        for block in range(0, BK // ROWS):
            here = block * ROWS + some
            if REVERSE:
                pointers = square(maps_ptr, map_index, rows, here, K, K)
                A = tl.load(pointers, mask=(rows < K)[:, None] & (here < K)[None, :], other=0.0)
                A = tl.trans(A)
            else:
                pointers = square(maps_ptr, map_index, here, rows, K, K)
                A = tl.load(pointers, mask=(here < K)[:, None] & (rows < K)[None, :], other=0.0)
            within = (here < K)[:, None] & (columns < V)[None, :]
            B = tl.load(square(ends_ptr, index, here, columns, K, V), mask=within, other=0.0)
            B = tl.dot(A, S, B, input_precision=PRECISION)
            pointers = square(starts_ptr, index + following, here, columns, K, V)
            tl.store(pointers, B, mask=within)
        index += following
        map_index += following
        tl.debug_barrier()  # all threads wrote what each of them reads now
        S = tl.load(square(starts_ptr, index, rows, columns, K, V), mask=inside, other=0.0)
