"""How the GPU kernels cut their work: a pure function of dtype and sizes.

experiments/results/gpu/LOG_triton.md has the measurements that chose the numbers.
"""

import dataclasses
import math

import jax.numpy as jnp

# Programs of a walk that run at once on an H100 or H200: two on each of 132 multiprocessors.
PROGRAMS_AT_ONCE = 264
CHUNKS_IN_A_PIECE = 8


@dataclasses.dataclass(frozen=True)
class Launch:
    """How one kernel is launched.

    Attributes:
      warps: of 32 threads, in a program.
      stages: of loads under way in a loop.
      columns: of the value width that one program has, or takes at a time; a power of two.
      keys: of the key width that one program has, or takes at a time; a power of two; 0 means all.
      registers: of a thread at most, so that more programs run at once; None: as many as it takes.
    """

    warps: int
    stages: int
    columns: int = 0
    keys: int = 0
    registers: int | None = None


@dataclasses.dataclass(frozen=True)
class Tiling:
    """The cut of one shape.

    Attributes:
      chunk_size: tokens in a chunk.
      update_rows: rows of a tile of updates: at least ``chunk_size`` times R; a power of two.
      token_rows: rows of a tile of tokens: at least ``chunk_size``; a power of two from 16 up.
      key_columns: columns of a tile of keys: at least K; a power of two from 16 up.
    """

    chunk_size: int
    update_rows: int
    token_rows: int
    key_columns: int
    prepare: Launch
    walk: Launch
    errors: Launch
    walk_back: Launch
    gradients: Launch
    compose: Launch


def tiling_for(operand: jnp.dtype, *, R: int, K: int, V: int, gated: bool) -> Tiling:
    """The cut of a shape.

    Args:
      operand: the dtype that products are made in.
      R: Householder factors per token.
      K: key width.
      V: value width.
      gated: whether there is a decay.
    """
    large = jnp.dtype(operand).itemsize > 2 or K > 128
    key_columns = power_of_two(K)
    rows = 32 if large else 64
    chunk_size = rows // R
    width = power_of_two(V)
    columns = min(width, 32 if large else 64)
    # With one factor a chunk has as many tokens as updates, and the shared memory for tiles of both
    # leaves room for one program only: that one then looks further ahead.
    alone = R == 1 and not large
    walk = Launch(warps=8 if large else 4, stages=3 if alone else 2, columns=columns)
    wide = gated and R < 3 and not large
    errors = dataclasses.replace(walk, stages=2, columns=min(width, 128) if wide else columns)
    # Cotangents of gates need more registers, and so do operands of float32.
    wide_operand = jnp.dtype(operand).itemsize > 2
    gradients = Launch(
        warps=4,
        stages=2 if large else 3,
        columns=min(columns, 16 if wide_operand else 32 if gated else columns),
        keys=min(key_columns, 64 if not large or (wide_operand and gated) else 128),
    )
    return Tiling(
        chunk_size,
        rows,
        power_of_two(chunk_size),
        key_columns,
        prepare=Launch(warps=4 if large or (alone and gated) else 2, stages=1),
        walk=walk,
        errors=errors,
        walk_back=walk,
        gradients=gradients,
        # A map takes as many registers as fit: 4096 numbers of float32 at a time.
        compose=Launch(
            warps=4,
            stages=1,
            columns=min(width, 32),
            keys=min(key_columns, 4096 // key_columns),
        ),
    )


def pieces_for(heads: int, chunks: int, walk: Launch, *, V: int) -> int:
    """Into how many pieces a sequence is cut that run side by side.

    Finding out what a piece does to any state costs more than walking through it, so only where at
    least four of them fit on the GPU at once, and with some chunks each.

    Args:
      heads: value heads of all sequences.
      chunks: in a sequence.
      walk: how a walk over chunks is launched.
      V: value width.
    """
    programs = heads * -(-V // walk.columns)
    pieces = min(PROGRAMS_AT_ONCE // programs, chunks // CHUNKS_IN_A_PIECE)
    return pieces if pieces >= 4 else 1


# Rows of a block of narrow heads, of which whole tokens fill as many as they can.
NARROW_ROWS = 16


def narrow_launches(parts: int, *, decays: bool) -> tuple[Launch, Launch]:
    """How the kernels of narrow heads are launched, forward and backward: a warp a head.

    Args:
      parts: terms of bfloat16 that a factor is cut into; 1: as it is.
      decays: whether there are gates or segments, which need registers.
    """
    if parts > 1:
        return Launch(warps=1, stages=1), Launch(warps=1, stages=1)
    if decays:
        return Launch(warps=1, stages=2), Launch(warps=1, stages=1)
    # Twelve programs on a multiprocessor, where nothing in the loop needs more.
    return Launch(warps=1, stages=3, registers=168), Launch(warps=1, stages=2)


def step_for(*, R: int, K: int, V: int) -> Launch:
    """The cut for one token: a part of a state's columns to a program."""
    warps = 2 if R == 1 else 1
    columns = max(16, 2048 * warps // power_of_two(K))
    return Launch(warps=warps, stages=1, columns=min(power_of_two(V), columns))


def power_of_two(size: int) -> int:
    """The smallest power of two that is at least ``size`` and 16, what products take."""
    return max(16, 1 << (size - 1).bit_length())


@dataclasses.dataclass(frozen=True)
class ConvolutionTiling:
    """The cut of a short convolution.

    Attributes:
      width: channels of a group, divided by its length if any is.
      rows: groups in a program; a power of two.
      columns: of a tile, at least ``width``; a power of two.
      piece: tokens that a program walks along; at least as many as are read before a token.
      warps: of 32 threads, in a program.
    """

    width: int
    rows: int
    columns: int
    piece: int
    warps: int


def parts_for(groups: tuple[int, ...], width: int, *, backward: bool) -> ConvolutionTiling:
    """The cut of short convolutions side by side, of which a program has channels of one.

    Args:
      groups: of each, of ``width`` channels.
      width: channels of which one length is taken.
      backward: whether it is the way back.
    """
    columns = 1 << (width - 1).bit_length()
    common = math.gcd(*groups)
    rows = min(common & -common, max(1, 512 // columns))
    # Numbers of a thread: the way back holds three times as much in registers.
    warps = max(1, rows * columns // (32 * (4 if backward else 8)))
    return ConvolutionTiling(width, rows, columns, piece=64, warps=warps)


def convolution_for(channels: int, unit_width: int | None, *, backward: bool) -> ConvolutionTiling:
    """The cut of a short convolution over so many channels.

    Args:
      channels: of a token.
      unit_width: channels of which one length is taken; None: no length is.
      backward: whether it is the way back, which holds three times as much in registers.
    """
    most = 512 if backward else 1024
    # Without lengths groups mean nothing: as wide as divide the channels.
    width = unit_width or min(most, channels & -channels)
    columns = 1 << (width - 1).bit_length()
    groups = 1 << (channels // width - 1).bit_length()
    rows = min(groups, max(1, most // columns))
    return ConvolutionTiling(width, rows, columns, piece=64, warps=4)
