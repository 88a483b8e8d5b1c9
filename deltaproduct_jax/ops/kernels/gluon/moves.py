"""What `walk_back` loads and writes, in Gluon: tiles by TMA, halves of tiles, and lines.

Letters as in prepare.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import mbarrier, tma

from deltaproduct_jax.ops.kernels.gluon.parts import ROW, matrix


@gluon.jit
def ask(array, at, bar, tile):
    """Begins to load a tile."""
    mbarrier.expect(bar, bytes_per_cta=array.block_type.nbytes)
    tma.async_copy_global_to_shared(array, at, bar, tile)


@gluon.jit
def ask_columns(array, b, row, column, bar, tiles, first, NC: gl.constexpr):
    """Begins to load NC tiles of 64 columns each."""
    mbarrier.expect(bar, bytes_per_cta=NC * array.block_type.nbytes)
    for j in gl.static_range(NC):
        tma.async_copy_global_to_shared(
            array, [b, row, column + j * 64], bar, tiles.index(first + j)
        )


@gluon.jit
def ask_rows(array, index, row, bar, tiles, COUNT: gl.constexpr):
    """Begins to load COUNT tiles of 64 rows each."""
    mbarrier.expect(bar, bytes_per_cta=COUNT * array.block_type.nbytes)
    for j in gl.static_range(COUNT):
        at = [index, row + j * 64, 0]
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
