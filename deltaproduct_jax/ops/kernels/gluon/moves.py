"""What `walk_back` loads and writes, in Gluon: tiles by TMA, halves of tiles, and lines.

Letters as in prepare.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import fence_async_shared, mbarrier, tma

from deltaproduct_jax.ops.kernels.gluon.parts import ROW, matrix


@gluon.jit
def ask(array, at, bar, tile):
    """Begins to load a tile."""
    mbarrier.expect(bar, bytes_per_cta=array.block_type.nbytes)
    tma.async_copy_global_to_shared(array, at, bar, tile)


@gluon.jit
def joined(tiles, COUNT: gl.constexpr, ROWS: gl.constexpr, COLUMNS: gl.constexpr):
    """Every COUNT tiles of 64 rows and 64 columns as one that is loaded at once.

    Beside or below each other: either way one lies behind the other.
    """
    shape: gl.constexpr = [1, ROWS, COLUMNS]
    lay: gl.constexpr = gl.NVMMASharedLayout.get_default_for(shape, gl.bfloat16)
    whole: gl.constexpr = [tiles.shape[0] // COUNT, 1, ROWS, COLUMNS]
    return tiles._reinterpret(gl.bfloat16, whole, lay)


@gluon.jit
def ask_x(x_term, x_rest, index, bar, xb):
    """Begins to load X of a block, ``index`` among all; below the first half there are zeros."""
    mbarrier.expect(bar, bytes_per_cta=2 * x_term.block_type.nbytes + x_rest.block_type.nbytes)
    halves = xb[0]._reinterpret(gl.bfloat16, [4, 1, 32, 32], x_term.layout)
    for p in gl.static_range(2):
        at = [index * 2 + p, 0, 0]
        tma.async_copy_global_to_shared(x_term, at, bar, halves.index(2 * p))
    both = xb[1]._reinterpret(gl.bfloat16, [1, 2, 64, 32], x_rest.layout)
    tma.async_copy_global_to_shared(x_rest, [index * 2, 32, 0], bar, both.index(0))


@gluon.jit
def ask_rows(array, index, bar, tiles, COUNT: gl.constexpr):
    """Begins to load COUNT tiles of 64 rows each."""
    mbarrier.expect(bar, bytes_per_cta=COUNT * array.block_type.nbytes)
    for j in gl.static_range(COUNT):
        at = [index, j * 64, 0]
        tma.async_copy_global_to_shared(array, at, bar, tiles.index(j))


@gluon.jit
def half(tile, h):
    """64 columns of a tile of 64 rows."""
    if len(tile.shape) == 3:
        tile = matrix(tile)
    return tile.slice(h * 64, 64, dim=1)


@gluon.jit
def put_line(ptr, x):
    """Writes 64 numbers, one a row."""
    gl.store(ptr + gl.arange(0, 64, ROW), x)


@gluon.jit
def ask_for_block(
    handed, arrays, block, R: gl.constexpr, NC: gl.constexpr, SEQUENCES: gl.constexpr,
):  # fmt: skip
    """Begins to load errors of a block and the state before it, of which there is room for one."""
    e, states = arrays[4], arrays[5]
    eb, sb, of_e, of_states, b, pid, vcol = handed
    ask(e, [b, block * 64, vcol], of_e.index(0), joined(eb, NC, 64, NC * 64).index(0))
    kept = ((block // 2) * SEQUENCES + pid) * 2 + block % 2
    ask_rows(states, kept, of_states.index(0), sb, NC)


@gluon.jit
def put_dq(dq_out, at, dq, dyb, stage, z):
    """Writes dq of a group, by way of the tiles that dv was in."""
    tile = dyb._reinterpret(gl.bfloat16, stage.shape, stage.layout).index(z)
    matrix(tile).store(dq.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(dq_out, at, tile)


@gluon.jit
def ask_do(arrays, tiles, bars, place, group, d, NC: gl.constexpr):
    """Begins to load the cotangents of outputs of a group, in place ``d``."""
    _, _, b, _, _, _, vcol = place
    ask(
        arrays[3],
        [b, group * 64, vcol],
        bars[4].index(d),
        joined(tiles[2], NC, 64, NC * 64).index(d),
    )


@gluon.jit
def ask_first(
    arrays, tiles, bars, of_ones, place, R: gl.constexpr, NC: gl.constexpr,
    SEQUENCES: gl.constexpr, HAS_GRADIENTS: gl.constexpr, NB: gl.constexpr,
):  # fmt: skip
    """Begins to load all that the last block of a piece takes, which is the first walked over."""
    qb, kb, _, xb, _, eb, sb, _, _, _ = tiles
    full, _, qfull, _, _, _ = bars
    of_x, of_e, of_states = of_ones
    total, first, b, _, pid, qcol, vcol = place
    last = first * R + total - 1
    ask(arrays[0], [b, last // R * 64, qcol], qfull.index(0), qb.index(0))
    ask(arrays[1], [b, last * 64, qcol], full.index(0), kb.index(0))
    ask_x(arrays[2], arrays[6], pid * NB + last, of_x.index(0), xb)
    ask_do(arrays, tiles, bars, place, last // R, 0, NC)
    if HAS_GRADIENTS:
        ask_for_block((eb, sb, of_e, of_states, b, pid, vcol), arrays, last, R, NC, SEQUENCES)


@gluon.jit
def ask_ahead(
    arrays, tiles, bars, place, m, R: gl.constexpr, S: gl.constexpr, D: gl.constexpr,
    NC: gl.constexpr,
):  # fmt: skip
    """Begins to load keys of the block behind the m-th; with the m-th of a group what the next
    group takes, but for cotangents of outputs where there is room for one group's alone.
    """
    qb, kb = tiles[0], tiles[1]
    full, empty, qfull, qempty, _, do_empty = bars
    total, first, b, _, _, qcol, _ = place
    block, turn = total - 1 - m, m // R
    row = (first * R + block) * 64
    if m + 1 < total:
        after = (m + 1) % S
        mbarrier.wait(empty.index(after), (((m + 1) // S) & 1) ^ 1)
        ask(arrays[1], [b, row - 64, qcol], full.index(after), kb.index(after))
    has_more = turn + 1 < total // R
    if (m % R == 0) & has_more:
        group, other = first + block // R - 1, (turn % 2) ^ 1
        mbarrier.wait(qempty.index(other), (((turn + 1) // 2) & 1) ^ 1)
        ask(arrays[0], [b, group * 64, qcol], qfull.index(other), qb.index(other))
        if D == 2:
            mbarrier.wait(do_empty.index((turn % D) ^ 1), (((turn + 1) // 2) & 1) ^ 1)
            ask_do(arrays, tiles, bars, place, group, (turn % D) ^ 1, NC)
