"""What the walks of both directions are made of, in Gluon: layouts, tiles, decays, vectors.

Letters as in prepare.py.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from deltaproduct_jax.ops.kernels.gluon import gates

ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16]))
ROW = gl.constexpr(gl.SliceLayout(1, ACC.value))
COLUMN = gl.constexpr(gl.SliceLayout(0, ACC.value))

LINE = gl.constexpr(gl.BlockedLayout([1], [32], [4], [0]))

MILD = gl.constexpr(gates.MILD)

# Stands for a beta of zero: dv is a multiple of beta, and dbeta what dv is a multiple of.
LEAST_BETA = gl.constexpr(2.0**-64)


@gluon.jit
def program_ids(GX: gl.constexpr, GY: gl.constexpr):
    """Those of all three axes, as in triton/ids.py."""
    x, y, z = gl.program_id(0), gl.program_id(1), gl.program_id(2)
    if GX > 0:
        x, y, z = x % GX, x // GX % GY, x // (GX * GY)
    return x, y, z


@gluon.jit
def not_zero(beta):
    """beta, or next to nothing, by which one may divide."""
    return gl.where(gl.abs(beta) < LEAST_BETA, LEAST_BETA, beta)


@gluon.jit
def left(x, of_product: gl.constexpr):
    """As the left operand of a product with this layout."""
    lay: gl.constexpr = gl.DotOperandLayout(0, of_product, 2)
    return gl.convert_layout(x.to(gl.bfloat16), lay, assert_trivial=True)


@gluon.jit
def matrix(tile):
    """A tile [1, rows, columns] as a matrix."""
    return tile.reshape([tile.shape[1], tile.shape[2]])


@gluon.jit
def nothing(m, BITS: gl.constexpr = 29):
    """0, but not for the compiler, in a loop over m, the blocks of a program, less than 2^21.

    More are 2^27 updates, of as many heads as are not cut into pieces: no GPU holds them.

    What is looked up by it is found anew in every round. Else the addresses of all tiles are found
    before the loop, and there are more of them than registers. The parts of a round shift by bits
    of their own, so that nothing is kept from one to the next.
    """
    return m >> BITS


@gluon.jit
def power(x):
    """exp of a float32; 0 where that is less than the least normal number."""
    return gl.inline_asm_elementwise(
        "ex2.approx.ftz.f32 $0, $1;",
        "=f,f",
        [x * 1.4426950408889634],
        dtype=gl.float32,
        is_pure=True,
        pack=1,
    )


@gluon.jit
def decays(high, low, segments, from_high, from_low, from_segments, mask,
           HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr):  # fmt: skip
    """Decays between positions; 0 outside ``mask`` and across segments."""
    if HAS_RESETS:
        mask = mask & (segments == from_segments)
    if HAS_G:
        sums = (high - from_high) + (low - from_low)
        return gl.where(mask, power(gl.where(mask, sums, 0.0)), 0.0)
    return gl.where(mask, 1.0, 0.0)


@gluon.jit
def is_mild(sums_ptr, pid, group, NG: gl.constexpr, HAS_G: gl.constexpr):
    """Whether decays within a group are quotients of what float32 holds."""
    mild = True
    if HAS_G:
        mild = gl.load(sums_ptr + (pid.to(gl.int64) * NG + group) * 192 + 63) >= MILD
    return mild


@gluon.jit
def weights(
    of_rows, of_columns, of_betas, mask, mild, z, SIGN: gl.constexpr, HAS_G: gl.constexpr,
    HAS_RESETS: gl.constexpr,
):  # fmt: skip
    """Decays from columns to rows, times SIGN and beta of the columns.

    The lines hold what `quotients` makes of sums.
    """
    of_betas = SIGN * of_betas
    if HAS_RESETS:
        segments = of_rows.index(z + 2).load(ROW)[:, None]
        mask = mask & (segments == of_columns.index(z + 2).load(COLUMN)[None, :])
    x = of_betas[None, :] + gl.zeros([64, 64], gl.float32, ACC)
    if HAS_G:
        row, column = of_rows.index(z).load(ROW), of_columns.index(z + 1).load(COLUMN)
        if mild:
            x = row[:, None] * (column * of_betas)[None, :]
        else:
            low, from_high = of_rows.index(z + 1).load(ROW), of_columns.index(z).load(COLUMN)
            x = (row[:, None] - from_high[None, :]) + (low[:, None] - column[None, :])
            x = power(x) * of_betas[None, :]
    return gl.where(mask, x, 0.0)


@gluon.jit
def between(
    of_rows, of_columns, mask, z, HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr,
):  # fmt: skip
    """`decays` from columns to rows, whose sums of gates and resets lie in shared memory."""
    segments, from_segments = 0.0, 0.0
    if HAS_RESETS:
        segments = of_rows.index(z + 2).load(ROW)[:, None]
        from_segments = of_columns.index(z + 2).load(COLUMN)[None, :]
    high, low, from_high, from_low = 0.0, 0.0, 0.0, 0.0
    if HAS_G:
        high, low = of_rows.index(z + 0).load(ROW)[:, None], of_rows.index(z + 1).load(ROW)[:, None]
        from_high = of_columns.index(z + 0).load(COLUMN)[None, :]
        from_low = of_columns.index(z + 1).load(COLUMN)[None, :]
    return decays(high, low, segments, from_high, from_low, from_segments, mask, HAS_G, HAS_RESETS)


@gluon.jit
def sums_at(sums, position, mask, HAS_RESETS: gl.constexpr):
    """Sums of gates in two parts, and of resets, at a position of a group."""
    high = gl.load(sums + position, mask=mask, other=0.0)
    low = gl.load(sums + position + 64, mask=mask, other=0.0)
    segments = low
    if HAS_RESETS:
        segments = gl.load(sums + position + 128, mask=mask, other=0.0)
    return high, low, segments


@gluon.jit
def load_vectors(
    beta_ptr, sums_ptr, m, first, b, hv, T: gl.constexpr, R: gl.constexpr, HV: gl.constexpr,
    NG: gl.constexpr, HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr,
):  # fmt: skip
    """Of block m: beta, and sums at its updates, at its last, before it, and at its tokens."""
    i_of = gl.arange(0, 64, LINE)
    group, r = first + m // R, m % R
    row = (first * R + m) * 64 + i_of
    inside = row < T * R
    beta = gl.load(beta_ptr + (b * (T * R) + row) * HV + hv, mask=inside, other=0.0)
    beta = not_zero(beta.to(gl.float32))
    none = gl.zeros([64], gl.float32, LINE)
    if not (HAS_G or HAS_RESETS):
        of_none = (none, none, none)
        return beta, of_none, of_none, of_none, of_none
    sums = sums_ptr + ((b * HV + hv) * NG + group) * 192
    real = (i_of >= 0) & (group < NG)
    at_updates = sums_at(sums, (r * 64 + i_of) // R, real, HAS_RESETS)
    at_last = sums_at(sums, (r * 64 + 63) // R + i_of * 0, real, HAS_RESETS)
    # Before a group's first block there are none.
    at_first = gl.maximum(r * 64 - 1, 0) // R + i_of * 0
    before = sums_at(sums, at_first, real & (r > 0), HAS_RESETS)
    at_tokens = sums_at(sums, i_of, real, HAS_RESETS)
    return beta, at_updates, at_last, before, at_tokens


@gluon.jit
def quotients(vectors, mild):
    """Of what `load_vectors` found, sums at updates and at tokens as `weights` takes them.

    Of mild gates decays from the first token of the group on, and what undoes those to updates.
    """
    _, at, _, _, here = vectors
    high = gl.where(mild, power(at[0] + at[1]), at[0])
    low = gl.where(mild, power(-at[0] - at[1]), at[1])
    of_tokens = gl.where(mild, power(here[0] + here[1]), here[0])
    return (high, low, at[2]), (of_tokens, here[1], here[2])


@gluon.jit
def put_vectors(
    vectors, shown, lines, st, z, HAS_O: gl.constexpr, HAS_G: gl.constexpr,
    HAS_RESETS: gl.constexpr,
):  # fmt: skip
    """Puts what `load_vectors` found where others read it, in turn ``st``: beta, decays and sums.

    Decays from the block before to its updates, and, times beta, from them to its last. With HAS_O
    those to its tokens, and of updates and tokens what the scores' decays are made of, ``shown``.
    """
    beta, at, last, before, here = vectors
    betas, intos, outs, tokens, of_tokens, of_updates = lines
    every = gl.arange(0, 64, LINE) >= 0
    betas.index(z).store(beta)
    if HAS_G or HAS_RESETS:
        into = decays(
            at[0], at[1], at[2], before[0], before[1], before[2], every, HAS_G, HAS_RESETS
        )
        out = decays(last[0], last[1], last[2], at[0], at[1], at[2], every, HAS_G, HAS_RESETS)
        intos.index(st).store(into)
        outs.index(st).store(out * beta)
        if HAS_O:
            of_t = decays(here[0], here[1], here[2], 0.0, 0.0, 0.0, every, HAS_G, HAS_RESETS)
            tokens.index(st).store(of_t)
            for part in gl.static_range(3):
                of_updates.index(z + part).store(shown[0][part])
                of_tokens.index(z + part).store(shown[1][part])
    else:
        outs.index(st).store(beta)


@gluon.jit
def widened(x):
    """bfloat16 as float32, of two in a register: the compiler takes an instruction more."""
    return gl.inline_asm_elementwise(
        "shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;",
        "=f,=f,r",
        [x],
        dtype=gl.float32,
        is_pure=True,
        pack=2,
    )


HALF = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))


@gluon.jit
def columns_in_halves(x):
    """Both halves of the columns of a square of 64 in ACC, in HALF."""
    x0, x1 = gl.split(gl.permute(gl.reshape(x, [64, 2, 32]), (0, 2, 1)))
    x0 = gl.convert_layout(x0, HALF, assert_trivial=True)
    return x0, gl.convert_layout(x1, HALF, assert_trivial=True)


@gluon.jit
def one_of_halves(x0, x1):
    """What `columns_in_halves` took apart."""
    x = gl.permute(gl.join(x0, x1), (0, 2, 1))
    return gl.convert_layout(gl.reshape(x, [64, 64]), ACC, assert_trivial=True)


@gluon.jit
def exceeds(of_rows, columns):
    """Whether numbers of rows exceed those of columns, 0 to 63, as they are spread in ACC.

    What threads differ in is taken from the rows: the rest of a column is a constant of a register.
    """
    return of_rows[:, None] - (columns & 6)[None, :] > (columns & 57)[None, :]


@gluon.jit
def rows_of(x):
    """Numbers of the rows of a tensor of 64, to be compared with it."""
    lay: gl.constexpr = x.type.layout
    if len(x.shape) == 2:
        i = gl.arange(0, 64, gl.SliceLayout(1, lay))[:, None]
    else:
        i = gl.arange(0, 64, gl.SliceLayout(1, gl.SliceLayout(2, lay)))
        i = gl.expand_dims(gl.expand_dims(i, 1), 2)
    return i


@gluon.jit
def diagonal(x, z):
    """The diagonal of a square of 64 in ACC, z being 0: by halves of columns that can be on it.

    A mask would be compared and applied at every entry.
    """
    x0, x1 = gl.split(gl.permute(gl.reshape(x, [64, 4, 2, 8]), (0, 1, 3, 2)))
    x = gl.where(rows_of(x0) & 8 == 0, x0, x1)
    x = gl.permute(gl.reshape(x, [64, 2, 2, 8]), (0, 2, 3, 1))
    x0, x1 = gl.split(x)
    x = gl.where((rows_of(x0) + z) & 32 == 0, x0, x1)
    x0, x1 = gl.split(gl.permute(x, (0, 2, 1)))
    x = gl.where((rows_of(x0) + z) & 16 == 0, x0, x1)
    x0, x1 = gl.split(gl.reshape(x, [64, 4, 2]))
    i = rows_of(x0) + z
    x = gl.where(i & 1 == 0, x0, x1)
    lay: gl.constexpr = x.type.layout
    pair = gl.arange(0, 4, gl.SliceLayout(0, lay))[None, :]
    x = gl.sum(gl.where((i // 2) % 4 == pair, x, 0.0), axis=1)
    return gl.convert_layout(x, ROW, assert_trivial=True)


@gluon.jit
def some_of_rows(x):
    """Of every row of a square in ACC four numbers: twice [4, 8, 4], one of each a thread.

    The halves that are dropped are never touched.
    """
    x = gl.reshape(x, [4, 2, 8, 2, 2, 2, 4, 2])
    x = gl.permute(x, (0, 2, 6, 1, 3, 4, 5, 7))
    for _ in gl.static_range(4):
        x = gl.split(x)[0]
    return gl.split(x)


@gluon.jit
def from_columns(x):
    """Sums of the columns of a square, as what belongs to its rows."""
    return gl.convert_layout(gl.sum(x, axis=0), ROW)


@gluon.jit
def times(tile, x):
    """Products of the rows of a tile with others."""
    sums = gl.sum(widened(tile.load(x.type.layout)) * x, axis=1)
    return gl.convert_layout(sums, ROW, assert_trivial=True)
