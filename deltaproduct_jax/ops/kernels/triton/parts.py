"""What the GPU kernels are made of, in Triton: tiles, products of decays, the triangular series.

Letters as in kernels.py.
"""

import triton
import triton.language as tl

from deltaproduct_jax.ops import decays

FORGETS = tl.constexpr(decays.FORGETS)


@triton.jit
def head(pid, H: tl.constexpr, HV: tl.constexpr):
    """Sequence, value head and key head of a program, wide enough for any array."""
    b = (pid // HV).to(tl.int64)
    hv = pid % HV
    return b, hv, hv // (HV // H)


@triton.jit
def tile(
    ptr, row, head, rows, columns, rows_valid, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    WHOLE: tl.constexpr = False,
):  # fmt: skip
    """Rows of one head of an array [rows, HEADS, WIDTH]; zeros where there is nothing.

    WHOLE: no column is past WIDTH.
    """
    offsets = rows[:, None].to(tl.int64) * (HEADS * WIDTH) + columns[None, :]
    mask = rows_valid[:, None]
    if not WHOLE:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(ptr + (row * HEADS + head) * WIDTH + offsets, mask=mask, other=0.0)


@triton.jit
def put_tile(
    ptr, x, row, head, rows, columns, rows_valid, HEADS: tl.constexpr, WIDTH: tl.constexpr,
    WHOLE: tl.constexpr = False,
):  # fmt: skip
    """Writes what `tile` would read."""
    offsets = rows[:, None].to(tl.int64) * (HEADS * WIDTH) + columns[None, :]
    mask = rows_valid[:, None]
    if not WHOLE:
        mask = mask & (columns < WIDTH)[None, :]
    base = ptr + (row * HEADS + head) * WIDTH
    tl.store(base + offsets, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def square(ptr, index, rows, columns, ROWS: tl.constexpr, COLUMNS: tl.constexpr):
    """Pointers into matrix ``index`` of an array [..., ROWS, COLUMNS]."""
    return ptr + index * (ROWS * COLUMNS) + rows[:, None].to(tl.int64) * COLUMNS + columns[None, :]


@triton.jit
def put_series(x_ptr, X, chunk, m, M: tl.constexpr, TWO: tl.constexpr):
    """Writes the X of a chunk: as it is, or as two terms, the second above the diagonal."""
    dtype = x_ptr.dtype.element_ty
    if TWO:
        first = X.to(dtype).to(tl.float32)
        X = first + tl.trans(X - first)
    tl.store(square(x_ptr, chunk, m, m, M, M), X.to(dtype))


@triton.jit
def solved(x_ptr, chunk, y, beta, m, M: tl.constexpr, TWO: tl.constexpr,
           TRANSPOSED: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """``y - X (beta y)``, or with X transposed, of the X of a chunk.

    With narrow products beta y is rounded once, for the identity too: that acts like an error of a
    value. X is rounded to two terms: with one its errors along a row have one sign where keys are
    equal and beta is near 2, and the state never takes them back.
    """
    X = tl.load(square(x_ptr, chunk, m, m, M, M))
    scaled = (beta[:, None] * y).to(X.dtype)
    if TWO:
        is_zero = beta == 0.0
        inverse = 1.0 / tl.where(is_zero, 1.0, beta)
        y = tl.where(is_zero[:, None], y, inverse[:, None] * scaled.to(tl.float32))
        is_first = m[:, None] > m[None, :]
        first = tl.where(is_first, X, 0.0)
        second = tl.where(is_first, 0.0, X)
        if TRANSPOSED:
            first = tl.trans(first)
        else:
            second = tl.trans(second)
        product = tl.dot(second, scaled, -y, input_precision=PRECISION)
        return -tl.dot(first, scaled, product, input_precision=PRECISION)
    if TRANSPOSED:
        X = tl.trans(X)
    return -tl.dot(X, scaled, -y, input_precision=PRECISION)


@triton.jit
def wide_products(
    q_ptr, k_ptr, row, h, m, c, tokens, R: tl.constexpr, H: tl.constexpr, K: tl.constexpr,
    BK: tl.constexpr, M: tl.constexpr, CP: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """``k k^T`` and ``q k^T`` of float32, the first with hardly more error than its own rounding.

    Where keys agree all entries have the same error, which adds up over the updates of a chunk and
    over chunks. Products of numbers of 8 bits, and sums of them, are exact. A few columns at a
    time: the compiler unrolls such products, and with all columns its registers do not suffice.
    """
    STEP: tl.constexpr = 16
    large = tl.zeros([M, M], tl.float32)
    small = tl.zeros([M, M], tl.float32)
    scores = tl.zeros([CP, M], tl.float32)
    for part in range(0, BK // STEP):
        columns = part * STEP + tl.arange(0, STEP)
        k = tile(k_ptr, row * R, h, m, columns, m < tokens * R, H, K).to(tl.float32)
        q = tile(q_ptr, row, h, c, columns, c < tokens, H, K).to(tl.float32)
        high = k.to(tl.bfloat16).to(tl.float32)
        low = k - high
        small = tl.dot(high, tl.trans(low), small, input_precision="ieee")
        small = tl.dot(low, tl.trans(k), small, input_precision="ieee")
        large = tl.dot(high, tl.trans(high), large, input_precision="ieee")
        scores = tl.dot(q, tl.trans(k), scores, input_precision=PRECISION)
    return large + small, scores


@triton.jit
def told_by(scores, CP: tl.constexpr, M: tl.constexpr):
    """NaN if any row of [CP, M] is not finite, else 0: some of its numbers tell."""
    x = tl.split(tl.reshape(scores, [CP, M // 2, 2]))[0]
    return tl.sum(x * 0.0)


@triton.jit
def kept_state(states_ptr, n, b, hv, rows, columns, B: tl.constexpr, HV: tl.constexpr,
               K: tl.constexpr, V: tl.constexpr, SPAN: tl.constexpr, NARROW: tl.constexpr,
               dtype: tl.constexpr):  # fmt: skip
    """Pointers to the kept state before chunk n.

    A slot of the residuals holds a float32 state, that before the first chunk of a span, or, if
    NARROW, the states before both of its chunks, rounded as products take them.
    """
    slot = ((n // SPAN) * B + b) * HV + hv
    if NARROW:
        states_ptr = states_ptr.to(tl.pointer_type(dtype), bitcast=True)
        slot = 2 * slot + n % SPAN
    return square(states_ptr, slot, rows, columns, K, V)


@triton.jit
def forgets(g):
    """Log decays in float32, as by `ops.decays.forgets`: no sum is infinite, but where g is bad."""
    g = g.to(tl.float32)
    return tl.where(g < FORGETS, FORGETS, g)


@triton.jit
def sums(
    g_ptr, resets_ptr, row, hv, token, starts, HV: tl.constexpr, HAS_G: tl.constexpr,
    HAS_RESETS: tl.constexpr,
):  # fmt: skip
    """Sums of g from the start of the chunk, and how many segments have begun, at positions.

    A sum has two float32 parts, of the 53 bits that it is made with: differences are then sums over
    the tokens between to float32's last bit, whatever was summed before.
    """
    high = tl.zeros(token.shape, tl.float32)
    low = tl.zeros(token.shape, tl.float32)
    segments = tl.zeros(token.shape, tl.int32)
    if HAS_G:
        g = tl.load(g_ptr + (row + token) * HV + hv, mask=starts, other=0.0)
        sums = tl.cumsum(forgets(g).to(tl.float64), 0)
        high = sums.to(tl.float32)
        low = (sums - high.to(tl.float64)).to(tl.float32)
    if HAS_RESETS:
        resets = tl.load(resets_ptr + row + token, mask=starts, other=0)
        segments = tl.cumsum(resets.to(tl.int32), 0)
    return high, low, segments


@triton.jit
def products(
    high, low, segments, from_high, from_low, from_segments, mask, HAS_G: tl.constexpr,
    HAS_RESETS: tl.constexpr,
):  # fmt: skip
    """Products of decays from columns to rows; 0 outside ``mask`` and across segments.

    With both sums of the opposite sign: from rows to columns.
    """
    if HAS_RESETS:
        mask = mask & (segments[:, None] == from_segments[None, :])
    products = tl.where(mask, 1.0, 0.0)
    if HAS_G:
        sums = (high[:, None] - from_high[None, :]) + (low[:, None] - from_low[None, :])
        products = tl.where(mask, tl.exp(tl.where(mask, sums, 0.0)), 0.0)
    return products


@triton.jit
def corner(A, ROW: tl.constexpr, COLUMN: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr):
    """A quarter of every block of 2 SIZE on the diagonal of [M, M]: [M / 2 SIZE, SIZE, SIZE]."""
    parts = tl.reshape(A, [M // SIZE, SIZE, M // SIZE, SIZE])
    i = tl.arange(0, M // SIZE)
    row, column = i[:, None, None, None], i[None, None, :, None]
    keep = (row // 2 == column // 2) & (row % 2 == ROW) & (column % 2 == COLUMN)
    rows = tl.sum(tl.where(keep, parts, 0.0), axis=2)
    return tl.sum(tl.reshape(rows, [M // (2 * SIZE), 2, SIZE, SIZE]), axis=1)


@triton.jit
def doubled(X, F, beta, SIZE: tl.constexpr, M: tl.constexpr, PRECISION: tl.constexpr):
    """X of blocks of twice the size, from those of blocks of SIZE on the diagonal."""
    below = corner(F, 1, 0, SIZE, M)
    above_X = corner(beta[:, None] * X, 0, 0, SIZE, M)
    X_below = corner(X * beta[None, :], 1, 1, SIZE, M)
    if M == 2 * SIZE:
        # One product, which the compiler does better without an axis in front.
        Y = tl.reshape(below, [SIZE, SIZE])
        Y -= tl.dot(Y, tl.reshape(above_X, [SIZE, SIZE]), input_precision=PRECISION)
        Y -= tl.dot(tl.reshape(X_below, [SIZE, SIZE]), Y, input_precision=PRECISION)
        Y = tl.reshape(Y, [1, SIZE, SIZE])
    else:
        Y = below - tl.dot(below, above_X, input_precision=PRECISION)
        Y -= tl.dot(X_below, Y, input_precision=PRECISION)
    i = tl.arange(0, M // SIZE)
    row, column = i[:, None, None, None], i[None, None, :, None]
    place = (row // 2 == column // 2) & (row % 2 == 1) & (column % 2 == 0)
    rows = tl.broadcast_to(Y[:, None, :, :], [M // (2 * SIZE), 2, SIZE, SIZE])
    rows = tl.reshape(rows, [M // SIZE, SIZE, SIZE])
    return X + tl.reshape(tl.where(place, rows[:, :, None, :], 0.0), [M, M])


@triton.jit
def strictly_lower_series(F, beta, M: tl.constexpr, PRECISION: tl.constexpr):
    """X = F - F beta F + ..., so that (I + F beta)^-1 = I - X beta, for strictly lower F.

    Blocks of 16 by substitution, then masked doubling: both without powers of F, which overflow
    where keys are equal and beta is near 2.
    """
    BLOCK: tl.constexpr = 16
    BLOCKS: tl.constexpr = M // BLOCK
    block = tl.arange(0, BLOCKS)
    same = block[:, None, None, None] == block[None, None, :, None]
    blocks = tl.reshape(F, [BLOCKS, BLOCK, BLOCKS, BLOCK])
    X = tl.sum(tl.where(same, blocks, 0.0), axis=2)
    lower = X * tl.reshape(beta, [BLOCKS, BLOCK])[:, None, :]
    row = tl.arange(0, BLOCK)[None, :, None]
    for i in range(1, BLOCK):
        coefficients = tl.sum(tl.where(row == i, lower, 0.0), axis=1)
        update = tl.sum(coefficients[:, :, None] * X, axis=1)
        X = tl.where(row == i, X - update[:, None, :], X)
    X = tl.where(same, X[:, :, None, :], 0.0)
    X = tl.reshape(X, [M, M])
    if M > 16:
        X = doubled(X, F, beta, 16, M, PRECISION)
    if M > 32:
        X = doubled(X, F, beta, 32, M, PRECISION)
    return X


@triton.jit
def row_decay(ptr, chunk, rows, M: tl.constexpr, DECAYS: tl.constexpr):
    """Decays from the start of the chunk or to its end, as ``ptr`` says, of rows of updates."""
    decay = tl.full(rows.shape, 1.0, tl.float32)
    if DECAYS:
        decay = tl.load(ptr + chunk * M + rows)
    return decay


@triton.jit
def chunk_decay(ptr, chunk, M: tl.constexpr, DECAYS: tl.constexpr):
    """Decay over all of the chunk."""
    decay = tl.full([], 1.0, tl.float32)
    if DECAYS:
        decay = tl.load(ptr + chunk * M + M - 1)
    return decay


@triton.jit
def put_sums(ptr, chunk, m, M: tl.constexpr, high, low, segments):
    """Keeps what `sums` returned, row by row, for the cotangents."""
    ptr += chunk * (3 * M) + m
    tl.store(ptr, high)
    tl.store(ptr + M, low)
    tl.store(ptr + 2 * M, segments.to(tl.float32))


@triton.jit
def kept_sums(ptr, chunk, rows, M: tl.constexpr, HAS_G: tl.constexpr, HAS_RESETS: tl.constexpr):
    """What `put_sums` kept, of ``rows``."""
    high = tl.zeros(rows.shape, tl.float32)
    low = tl.zeros(rows.shape, tl.float32)
    segments = tl.zeros(rows.shape, tl.float32)
    ptr += chunk * (3 * M) + rows
    if HAS_G:
        high = tl.load(ptr)
        low = tl.load(ptr + M)
    if HAS_RESETS:
        segments = tl.load(ptr + 2 * M)
    return high, low, segments
