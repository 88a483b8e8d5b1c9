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
