"""What the kernels of narrow heads are made of, in Triton: products by parts, X of a block.

Letters as in narrow_forward.py.
"""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.convolution import sigmoid
from deltaproduct_jax.ops.kernels.triton.parts import products, sums


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x in float32, rounded to what ``dtype`` holds.

    For bfloat16 in integers, ties away from zero: converting there and back keeps the compiler from
    packing two numbers at once, and takes an instruction of a quarter of the rate.
    """
    if dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x8000) & -0x10000).to(tl.float32, bitcast=True)
    else:
        x = x.to(dtype).to(tl.float32)
    return x


@triton.jit
def parts(x, dtype: tl.constexpr, PARTS: tl.constexpr):
    """Terms that add up to x, each of which a tensor core takes: the first and what is left over.

    One of the dtype itself, or of bfloat16 two (16 bits) or three (24 bits, all of float32).
    """
    if PARTS == 1:
        first = x.to(dtype)
        second, third = first, first
    else:
        high = rounded(x, tl.bfloat16)
        rest = x - high
        first = high.to(tl.bfloat16)
        if PARTS == 2:
            second = rest.to(tl.bfloat16)
            third = second
        else:
            middle = rounded(rest, tl.bfloat16)
            second, third = middle.to(tl.bfloat16), (rest - middle).to(tl.bfloat16)
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
def entered(u, EPSILON: tl.constexpr, RAW: tl.constexpr, UNIT: tl.constexpr):
    """SiLU of a block if it is RAW, divided by the lengths of rows if UNIT, in its own dtype."""
    if RAW:
        z = u.to(tl.float32)
        y = z * sigmoid(z)
        if UNIT:
            y *= tl.rsqrt(tl.sum(y * y, axis=1, keep_dims=True) + EPSILON)
        u = y.to(u.dtype)
    return u


@triton.jit
def spread(x, inside, ROWS: tl.constexpr):
    """Rows [n, W] as the first of [ROWS, W], zeros where nothing is inside."""
    n: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    if n < ROWS:
        x = tl.reshape(tl.broadcast_to(x[None, :, :], [ROWS // n, n, W]), [ROWS, W])
        x = tl.where(inside[:, None], x, tl.zeros([ROWS, W], x.dtype))
    return x


@triton.jit
def queries(
    q_base, c, keys, tokens, H: tl.constexpr, K: tl.constexpr, BK: tl.constexpr, CP: tl.constexpr,
    CQ: tl.constexpr, RAW: tl.constexpr, EPSILON: tl.constexpr,
):  # fmt: skip
    """Queries of ``tokens`` tokens as the first rows of [CP, BK]; of RAW ones no more are made."""
    if RAW:
        few = tl.arange(0, CQ)
        q = block(q_base, few, keys, few < tokens, H, K, BK)
        q = spread(entered(q, EPSILON, RAW, True), c < tokens, CP)
    else:
        q = block(q_base, c, keys, c < tokens, H, K, BK)
    return q


@triton.jit
def gathered(x, n: tl.constexpr):
    """The first n rows of x, of which all others are zero."""
    ROWS: tl.constexpr = x.shape[0]
    W: tl.constexpr = x.shape[1]
    if n < ROWS:
        x = tl.sum(tl.reshape(x, [ROWS // n, n, W]), axis=0)
    return x


@triton.jit
def left(dy, u, EPSILON: tl.constexpr, UNIT: tl.constexpr):
    """The cotangent of a block u from that of what `entered` makes of it, in float32."""
    z = u.to(tl.float32)
    s = sigmoid(z)
    y = z * s
    if UNIT:
        inverse = tl.rsqrt(tl.sum(y * y, axis=1, keep_dims=True) + EPSILON)
        along = tl.sum(y * dy, axis=1, keep_dims=True) * inverse * inverse
        dy = inverse * (dy - y * along)
    return dy * (s + (y - y * s))


@triton.jit
def numbers(ptr, row, head, rows, inside, HEADS: tl.constexpr):
    """A number per row of one head, in float32."""
    ptr += row * HEADS + head
    return tl.load(ptr + rows * HEADS, mask=inside, other=0.0).to(tl.float32)


@triton.jit
def widened(X, Xt, F, same, beta, m, SIZE: tl.constexpr, M: tl.constexpr, TERMS: tl.constexpr):
    """X and X transposed of blocks of twice SIZE from those of blocks of SIZE on the diagonal."""
    i, j = m[:, None], m[None, :]
    here = (i // (2 * SIZE) == j // (2 * SIZE)) & (i // SIZE != j // SIZE) & (i > j)
    zero = tl.zeros([M, M], tl.bfloat16)
    below = tl.where(here, F[0], zero), tl.where(here, F[1], zero), tl.where(here, F[2], zero)
    left = parts(same - X * beta[None, :], tl.bfloat16, TERMS)
    right = parts(same - Xt * beta[None, :], tl.bfloat16, TERMS)
    half = parts(product(right, turned(below), TERMS), tl.bfloat16, TERMS)
    X = chained(left, turned(half), X, TERMS)
    Xt = chained(half, turned(left), Xt, TERMS)
    return X, Xt


@triton.jit
def series(G, decays, decays_turned, beta, m, M: tl.constexpr, PARTS: tl.constexpr):
    """X = F - F beta F + ..., so that (I + F beta)^-1 = I - X beta, and X transposed.

    Of F the strictly lower gram with its decays. Doubled from blocks of two, without powers of F,
    which overflow where keys are equal and beta is near 2; both of X and X transposed are kept, as
    what a product leaves in registers is then what the next one takes. Products have 16 bits for
    narrow inputs, else all.
    """
    TERMS: tl.constexpr = 2 if PARTS == 1 else PARTS
    i, j = m[:, None], m[None, :]
    F = tl.where(i > j, G, 0.0) * decays
    same = tl.where(i == j, 1.0, 0.0)
    F_parts = parts(F, tl.bfloat16, TERMS)
    X = tl.where(i // 2 == j // 2, F, 0.0)
    Xt = tl.where((i // 2 == j // 2) & (i < j), G * decays_turned, 0.0)
    X, Xt = widened(X, Xt, F_parts, same, beta, m, 2, M, TERMS)
    X, Xt = widened(X, Xt, F_parts, same, beta, m, 4, M, TERMS)
    X, Xt = widened(X, Xt, F_parts, same, beta, m, 8, M, TERMS)
    return X, Xt


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
        first = rounded(X, dtype)
        X = first + tl.trans(X - first)
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
        first = rounded(X, dtype)
        second = (X - first).to(dtype)
        found = first.to(dtype), second, second
    return found


@triton.jit
def applied(y, X, PARTS: tl.constexpr):
    """``y X`` with X as `two_terms` or `kept_series` has it."""
    return product(y, X, PARTS) if PARTS > 1 else tl.dot(y[0], X[0], tl.dot(y[0], X[1]))
