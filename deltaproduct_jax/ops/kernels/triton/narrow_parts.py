"""What the kernels of narrow heads are made of, in Triton: products by parts, X of a block.

Letters as in narrow_forward.py.
"""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.parts import products, sums

# Two numbers of bfloat16 in float32, by an instruction each; the compiler's own way takes three.
UNPACK = tl.constexpr("shl.b32 $0, $2, 16; and.b32 $1, $2, 0xffff0000;")


@triton.jit
def wide(x):
    """x in float32."""
    if x.dtype == tl.bfloat16:
        x = tl.inline_asm_elementwise(UNPACK, "=f,=f,r", [x], tl.float32, is_pure=True, pack=2)
    else:
        x = x.to(tl.float32)
    return x


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in float32, rounded to what ``dtype`` holds."""
    return wide(x.to(dtype))


@triton.jit
def parts(x, dtype: tl.constexpr, PARTS: tl.constexpr):
    """Terms that add up to x, each of which a tensor core takes: the first and what is left over.

    One of the dtype itself, or of bfloat16 two (16 bits) or three (24 bits, all of float32).
    """
    if PARTS == 1:
        first = x.to(dtype)
        second, third = first, first
    else:
        first = x.to(tl.bfloat16)
        rest = x - wide(first)
        second = rest.to(tl.bfloat16)
        third = second if PARTS == 2 else (rest - wide(second)).to(tl.bfloat16)
    return first, second, third


@triton.jit
def chained(a, b, x, PARTS: tl.constexpr):
    """The product of two matrices in parts, added to x of float32, lower terms first."""
    if PARTS == 3:
        x = tl.dot(a[1], b[1], x)
        x = tl.dot(a[2], b[0], x)
        x = tl.dot(a[0], b[2], x)
    if PARTS > 1:
        x = tl.dot(a[1], b[0], x)
        x = tl.dot(a[0], b[1], x)
    return tl.dot(a[0], b[0], x)


@triton.jit
def product(a, b, PARTS: tl.constexpr):
    """The same, added to nothing."""
    return chained(a, b, tl.zeros([a[0].shape[0], b[0].shape[1]], tl.float32), PARTS)


@triton.jit
def added(a, b, x, PARTS: tl.constexpr):
    """The same, but with more than one part first by itself: what x is then takes one rounding."""
    if PARTS > 1:
        x += product(a, b, PARTS)
    else:
        x = tl.dot(a[0], b[0], x)
    return x


@triton.jit
def turned(a):
    """Every part transposed."""
    return tl.trans(a[0]), tl.trans(a[1]), tl.trans(a[2])


@triton.jit
def gram(a, b, PARTS: tl.constexpr):
    """``a b^T``: products and sums of the first parts are exact, so that equal keys stay equal."""
    b = turned(b)
    x = tl.dot(a[0], b[0])
    if PARTS > 1:
        rest = tl.dot(a[0], b[1], tl.dot(a[1], b[0]))
        if PARTS == 3:
            rest = tl.dot(a[1], b[1], rest)
            rest = tl.dot(a[0], b[2], rest)
            rest = tl.dot(a[2], b[0], rest)
        x += rest
    return x


@triton.jit
def told_by(x, told):
    """``told`` [8, 4], but NaN where rows of a product [8 or 16, 16] are not finite.

    Four numbers of each row tell, of which a thread has one.
    """
    x = tl.permute(tl.reshape(x, [x.shape[0] // 8, 8, 2, 4, 2]), (1, 3, 0, 2, 4))
    x = tl.split(tl.split(x)[0])[0]
    if x.shape[2] == 2:
        x, y = tl.split(x)
        told += y * 0.0
    return told + tl.reshape(x, [8, 4]) * 0.0


@triton.jit
def summed_to(ones, a, PARTS: tl.constexpr):
    """Sums of rows of a matrix in parts, those of which ``ones`` says so."""
    x = tl.dot(ones, a[1])
    if PARTS == 3:
        x = tl.dot(ones, a[2], x)
    return tl.dot(ones, a[0], x)


@triton.jit
def place(ptr, row, head, HEADS: tl.constexpr, WIDTH: tl.constexpr):
    """Where a row of one head of an array [rows, HEADS, WIDTH] begins."""
    return ptr + (row * HEADS + head) * WIDTH


@triton.jit
def block(ptr, rows, columns, inside, HEADS: tl.constexpr, WIDTH: tl.constexpr,
          COLUMNS: tl.constexpr):  # fmt: skip
    """Rows of one head from `place` on; zeros where there is nothing."""
    mask = inside[:, None]
    if COLUMNS != WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    return tl.load(ptr + rows[:, None] * (HEADS * WIDTH) + columns[None, :], mask=mask, other=0.0)


@triton.jit
def put_block(ptr, x, rows, columns, inside, HEADS: tl.constexpr, WIDTH: tl.constexpr,
              COLUMNS: tl.constexpr):  # fmt: skip
    """Writes what `block` would read."""
    mask = inside[:, None]
    if COLUMNS != WIDTH:
        mask = mask & (columns < WIDTH)[None, :]
    pointers = ptr + rows[:, None] * (HEADS * WIDTH) + columns[None, :]
    tl.store(pointers, x.to(ptr.dtype.element_ty), mask=mask)


@triton.jit
def _only(a, b):
    return a + b


@triton.jit
def padded(x, ROWS: tl.constexpr):
    """x with as many rows of zeros below it as it has, if it has not ROWS; nothing is moved.

    The sum is over one number: of what is joined the compiler takes products in an order in which
    nothing lies.
    """
    n: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    if n < ROWS:
        x = tl.permute(tl.join(x, tl.zeros([n, W], x.dtype)), (2, 0, 1))
        x = tl.reduce(tl.reshape(x, [1, ROWS, W]), 0, _only)
    return x


@triton.jit
def padded_columns(x, COLUMNS: tl.constexpr):
    """The same of columns."""
    n: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    if W < COLUMNS:
        x = tl.permute(tl.join(x, tl.zeros([n, W], x.dtype)), (0, 2, 1))
        x = tl.reduce(tl.reshape(x, [1, n, COLUMNS]), 0, _only)
    return x


@triton.jit
def all_padded(a, ROWS: tl.constexpr):
    """Every part with as many rows of zeros below it."""
    return padded(a[0], ROWS), padded(a[1], ROWS), padded(a[2], ROWS)


@triton.jit
def numbers(ptr, row, head, rows, inside, HEADS: tl.constexpr):
    """A number per row of one head, in float32."""
    ptr += row * HEADS + head
    return tl.load(ptr + rows * HEADS, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def turned_parts(x, dtype: tl.constexpr, PARTS: tl.constexpr):
    """`parts` of x transposed; turned first, as the compiler takes what is cut through memory."""
    return parts(tl.trans(x), dtype, PARTS)


@triton.jit
def flipped(x, m, dtype: tl.constexpr, M: tl.constexpr, PARTS: tl.constexpr):
    """x of [W, M] transposed, as a product leaves it, and `parts` of it and of x.

    Of one part by a product with the identity, which is exact: a warp's numbers change places
    faster so than by what the compiler makes of a transpose.
    """
    if PARTS == 1:
        same = tl.where(m[:, None] == m[None, :], 1.0, 0.0).to(dtype)
        xt = tl.dot(same, tl.trans(x).to(dtype))
        found = xt, parts(xt, dtype, PARTS), turned_parts(xt, dtype, PARTS)
    else:
        a = parts(x, dtype, PARTS)
        found = tl.trans(x), turned(a), a
    return found


@triton.jit
def widened(
    X, Xt, F, same, beta, m, dtype: tl.constexpr, SIZE: tl.constexpr, M: tl.constexpr,
    TERMS: tl.constexpr,
):  # fmt: skip
    """X and X transposed of blocks of twice SIZE from those of blocks of SIZE on the diagonal."""
    i, j = m[:, None], m[None, :]
    here = (i // (2 * SIZE) == j // (2 * SIZE)) & (i // SIZE != j // SIZE) & (i > j)
    below = tl.where(here, F, 0.0)
    left = same - X * beta[None, :]
    right = parts(same - Xt * beta[None, :], dtype, TERMS)
    half = product(right, turned_parts(below, dtype, TERMS), TERMS)
    X = chained(parts(left, dtype, TERMS), turned_parts(half, dtype, TERMS), X, TERMS)
    Xt = chained(parts(half, dtype, TERMS), turned_parts(left, dtype, TERMS), Xt, TERMS)
    return X, Xt


@triton.jit
def refined(X, Xt, F, Ft, same, beta, M: tl.constexpr):
    """X again, with twice the bits that X of float16 has: one step of Newton's.

    What X lacks is all but (F - X - X beta F) (I - beta X), of which X need not be known well.
    """
    first = X.to(tl.float16)
    wide = first.to(tl.float32)
    factor = Ft * beta[None, :]
    high = factor.to(tl.float16)
    rest = factor - high.to(tl.float32)
    lacks = tl.dot(first, tl.trans(rest).to(tl.float16))
    lacks = tl.dot(first, tl.trans(factor).to(tl.float16), lacks)
    lacks = (F - wide) - lacks
    right = same - Xt * beta[None, :]
    return tl.dot(lacks.to(tl.float16), tl.trans(right).to(tl.float16), wide)


@triton.jit
def series(G, decays, decays_turned, beta, m, M: tl.constexpr, PARTS: tl.constexpr,
           UNIT: tl.constexpr):  # fmt: skip
    """X = F - F beta F + ..., so that (I + F beta)^-1 = I - X beta.

    Of F the strictly lower gram with its decays. Doubled from blocks of two, without powers of F,
    which overflow where keys are equal and beta is near 2; both of X and X transposed are made, as
    what a product leaves in registers is then what the next one takes. Products have 16 bits for
    narrow inputs, else all. Of UNIT keys, narrow ones, no number of X is over 1 nor any factor over
    2: these are doubled in float16, then refined.
    """
    dtype: tl.constexpr = tl.float16 if UNIT else tl.bfloat16
    TERMS: tl.constexpr = 1 if UNIT else (2 if PARTS == 1 else PARTS)
    i, j = m[:, None], m[None, :]
    F = tl.where(i > j, G, 0.0) * decays
    Ft = tl.where(i < j, G, 0.0) * decays_turned
    same = tl.where(i == j, 1.0, 0.0)
    X = tl.where(i // 2 == j // 2, F, 0.0)
    Xt = tl.where(i // 2 == j // 2, Ft, 0.0)
    X, Xt = widened(X, Xt, F, same, beta, m, dtype, 2, M, TERMS)
    X, Xt = widened(X, Xt, F, same, beta, m, dtype, 4, M, TERMS)
    X, Xt = widened(X, Xt, F, same, beta, m, dtype, 8, M, TERMS)
    if UNIT:
        X = refined(X, Xt, F, Ft, same, beta, M)
    return X


@triton.jit
def sums_and_decays(
    g_ptr, resets_ptr, row, hv, m, c, tokens, R: tl.constexpr, M: tl.constexpr, HV: tl.constexpr,
    HAS_G: tl.constexpr, HAS_RESETS: tl.constexpr,
):  # fmt: skip
    """Sums of rows and tokens, and decays into rows, out of them, into tokens and through all."""
    starts = (m % R == 0) & (m < tokens * R)
    rows = sums(g_ptr, resets_ptr, row, hv, m // R, starts, HV, HAS_G, HAS_RESETS)
    of_tokens = sums(g_ptr, resets_ptr, row, hv, c, c < tokens, HV, HAS_G, HAS_RESETS)
    high, low, segments = rows
    last = m == M - 1  # rows past the last token are as the last
    last_high = tl.sum(tl.where(last, high, 0.0), axis=0)
    last_low = tl.sum(tl.where(last, low, 0.0), axis=0)
    last_segment = tl.sum(tl.where(last, segments, 0), axis=0)
    into = tl.where(segments == 0, tl.exp(high + low), 0.0)
    out = tl.exp((last_high - high) + (last_low - low))
    out = tl.where(segments == last_segment, out, 0.0)
    into_tokens = tl.where(of_tokens[2] == 0, tl.exp(of_tokens[0] + of_tokens[1]), 0.0)
    through = tl.where(last_segment == 0, tl.exp(last_high + last_low), 0.0)
    return rows, of_tokens, into, out, into_tokens, through


@triton.jit
def of_pairs(rows, columns, mask, HAS_G: tl.constexpr, HAS_RESETS: tl.constexpr):
    """Products of decays from columns to rows, as `products` makes them of sums."""
    return products(
        rows[0], rows[1], rows[2], columns[0], columns[1], columns[2], mask, HAS_G, HAS_RESETS
    )  # fmt: skip


@triton.jit
def to_pairs(rows, columns, mask, HAS_G: tl.constexpr, HAS_RESETS: tl.constexpr):
    """Products of decays from rows to columns."""
    return products(
        -rows[0], -rows[1], rows[2], -columns[0], -columns[1], columns[2], mask, HAS_G, HAS_RESETS
    )  # fmt: skip


@triton.jit
def put_series(ptr, X, m, M: tl.constexpr, PARTS: tl.constexpr):
    """Writes X: as it is, or in two terms, the second above the diagonal."""
    dtype = ptr.dtype.element_ty
    if PARTS == 1:
        first = X.to(dtype)
        second = (X - wide(first)).to(dtype)
        X = tl.where(m[:, None] > m[None, :], first, tl.trans(second))
    tl.store(ptr + m[:, None] * M + m[None, :], X.to(dtype))


@triton.jit
def kept_series(ptr, m, M: tl.constexpr, PARTS: tl.constexpr):
    """What `put_series` wrote, in parts."""
    X = tl.load(ptr + m[:, None] * M + m[None, :])
    if PARTS > 1:
        found = parts(X, tl.bfloat16, PARTS)
    else:
        lower = m[:, None] > m[None, :]
        zero = tl.zeros([M, M], X.dtype)
        second = tl.trans(tl.where(lower, zero, X))
        found = tl.where(lower, X, zero), second, second
    return found


@triton.jit
def two_terms(X, dtype: tl.constexpr, PARTS: tl.constexpr):
    """X in the parts in which it is applied: two of the dtype, or as many as any factor has."""
    if PARTS > 1:
        found = parts(X, dtype, PARTS)
    else:
        first = X.to(dtype)
        second = (X - wide(first)).to(dtype)
        found = first, second, second
    return found


@triton.jit
def applied(y, X, PARTS: tl.constexpr):
    """``y X`` with X as `two_terms` or `kept_series` has it."""
    return product(y, X, PARTS) if PARTS > 1 else tl.dot(y[0], X[0], tl.dot(y[0], X[1]))
