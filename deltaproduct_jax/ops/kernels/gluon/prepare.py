"""What the walks need of a block that knows no state: sums of gates, and the inverse, in Gluon.

A group is 64 tokens, and R blocks of 64 updates. In a block the errors of the predictions solve
``e + F (beta e) = r`` with F the strictly causal products of keys, times the decay between them.
Such a decay is a product along the way, so ``e = r - (D * X) (beta r)`` with X that of no gates at
all: `inverse` finds it without a look at g or at resets, and walks put the decays D in.
"""

from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_wait,
)

from deltaproduct_jax.ops import decays
from deltaproduct_jax.ops.kernels.gluon.parts import is_mild, not_zero, power, program_ids

# As by `ops.decays.forgets`: no sum is infinite.
FORGETS = gl.constexpr(decays.FORGETS)


@gluon.jit
def add(x, y):
    """For scans."""
    return x + y


@gluon.jit
def gate_sums(
    g_ptr, resets_ptr, sums_ptr,
    T: gl.constexpr, HV: gl.constexpr, HEADS: gl.constexpr, NG: gl.constexpr,
    HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr, GX: gl.constexpr = 0, GY: gl.constexpr = 0,
):  # fmt: skip
    """Sums of g from the start of a group on, in two parts of float32, and of resets.

    Writes [B, HV, NG, 3, 64]. A sum is made in float64: differences of two are then sums over the
    tokens between them to the last bit of float32, whatever was summed before.
    """
    n, b, heads = program_ids(GX, GY)
    lay: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 1], [1, 0])
    c = gl.arange(0, 64, gl.SliceLayout(1, lay))[:, None]
    hv = heads * HEADS + gl.arange(0, HEADS, gl.SliceLayout(0, lay))[None, :]
    row = b.to(gl.int64) * T + n * 64 + c
    inside = (n * 64 + c < T) & (hv < HV)
    high = gl.zeros([64, HEADS], gl.float32, lay)
    low = gl.zeros([64, HEADS], gl.float32, lay)
    segments = gl.zeros([64, HEADS], gl.float32, lay)
    if HAS_G:
        g = gl.load(g_ptr + row * HV + hv, mask=inside, other=0.0).to(gl.float32)
        g = gl.where(g < FORGETS, FORGETS, g)
        total = gl.associative_scan(g.to(gl.float64), 0, add)
        high = total.to(gl.float32)
        low = (total - high.to(gl.float64)).to(gl.float32)
    if HAS_RESETS:
        resets = gl.load(resets_ptr + row + hv * 0, mask=inside, other=0)
        segments = gl.associative_scan(resets.to(gl.float32), 0, add)
    at = sums_ptr + (((b.to(gl.int64) * HV + hv) * NG + n) * 3) * 64 + c
    gl.store(at, high, mask=hv < HV)
    gl.store(at + 64, low, mask=hv < HV)
    gl.store(at + 128, segments, mask=hv < HV)


# Of `inverse`: 32 rows of updates are half a block; a warp has a half's X, a thread a column.
HALVES = gl.constexpr(gl.BlockedLayout([32, 1, 1], [1, 1, 32], [1, 4, 1], [2, 0, 1]))
OF_ROWS = gl.constexpr(gl.SliceLayout(2, HALVES.value))
OF_COLUMNS = gl.constexpr(gl.SliceLayout(0, HALVES.value))
ACC = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 32, 16]))
LEFT = gl.constexpr(gl.DotOperandLayout(0, ACC.value, 2))
PLAIN = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [1, 0]))


@gluon.jit
def two_terms(x):
    """Two numbers of bfloat16 that add up to x, but for 2^-17 of it; the first is cut off."""
    high = (x.to(gl.int32, bitcast=True) & -65536).to(gl.float32, bitcast=True)
    return high.to(gl.bfloat16), (x - high).to(gl.bfloat16)


@gluon.jit
def halves(keys):
    """Products of the keys of a block with those of its first half, and of its second."""
    zero = gl.zeros([64, 32], gl.float32, ACC)
    first, second = keys.slice(0, 32).permute((1, 0)), keys.slice(32, 32).permute((1, 0))
    f0 = warpgroup_mma(keys, first, zero, use_acc=False, is_async=True)
    f1 = warpgroup_mma(keys, second, zero, use_acc=False, is_async=True)
    return f0, f1


@gluon.jit
def three_products(high, low, of_high, of_low, x):
    """x and ``(high + low) (of_high + of_low)`` but for the product of both second terms."""
    x = warpgroup_mma(high, of_high, x, is_async=True)
    x = warpgroup_mma(high, of_low, x, is_async=True)
    return warpgroup_mma(low, of_high, x, is_async=True)


@gluon.jit
def times_first(product, turned, betas, p: gl.constexpr):
    """Begins ``-L21 T11`` of block p."""
    product *= -betas.slice(p * 64, 32).load(gl.SliceLayout(0, ACC))[None, :]
    high, low = two_terms(product)
    high, low = gl.convert_layout(high, LEFT), gl.convert_layout(low, LEFT)
    of_high = turned.index(0).slice(p * 32, 32).slice(0, 32, dim=1).permute((1, 0))
    of_low = turned.index(1).slice(p * 32, 32).slice(0, 32, dim=1).permute((1, 0))
    return three_products(high, low, of_high, of_low, product)


@gluon.jit
def times_second(product, turned, tiles, p: gl.constexpr):
    """Begins ``-T22 (L21 T11)`` of block p."""
    high = turned.index(0).slice(p * 32, 32).permute((1, 0))
    low = turned.index(1).slice(p * 32, 32).permute((1, 0))
    of_high, of_low = tiles.index(4 + p).slice(32, 32), tiles.index(6 + p).slice(32, 32)
    return three_products(high, low, of_high, of_low, product)


@gluon.jit
def beside(X, sums, mild, p: gl.constexpr, HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr):
    """-X below the halves on the diagonal of block p, with decays; of rows 32 to 63 alone."""
    of_columns: gl.constexpr = gl.SliceLayout(0, ACC)
    of_rows: gl.constexpr = gl.SliceLayout(1, ACC)
    is_below = (gl.arange(0, 64, of_rows) >= 32)[:, None]
    if HAS_RESETS:
        here = sums.index(2).slice(p * 64, 64).load(of_rows)[:, None]
        same = here == sums.index(2).slice(p * 64, 32).load(of_columns)[None, :]
        is_below = is_below & same
    if HAS_G:
        high = sums.index(0).slice(p * 64, 64).load(of_rows)[:, None]
        from_low = sums.index(1).slice(p * 64, 32).load(of_columns)[None, :]
        if mild:
            X *= high * from_low
        else:
            of_g = high - sums.index(0).slice(p * 64, 32).load(of_columns)[None, :]
            of_g += sums.index(1).slice(p * 64, 64).load(of_rows)[:, None] - from_low
            X *= power(gl.where(is_below, of_g, 0.0))
    if HAS_RESETS:
        X = gl.where(is_below, X, 0.0)
    return X


@gluon.jit
def below(f0, f2, turned, tiles, betas):
    """``-T22 (L21 T11)``, T = I - X, of both blocks.

    ``turned`` holds -X of the halves, transposed, in two terms, and the second half of ``tiles``
    has room for two terms of two products. A product has 64 rows, of which the first 32 matter to
    nobody.
    """
    P0, P1 = times_first(f0, turned, betas, 0), times_first(f2, turned, betas, 1)
    P0, P1 = warpgroup_mma_wait(0, deps=[P0, P1])
    high, low = two_terms(P0)
    tiles.index(4).store(high)
    tiles.index(6).store(low)
    high, low = two_terms(P1)
    tiles.index(5).store(high)
    tiles.index(7).store(low)
    fence_async_shared()
    X0, X1 = times_second(P0, turned, tiles, 0), times_second(P1, turned, tiles, 1)
    X0, X1 = warpgroup_mma_wait(0, deps=[X0, X1])
    return X0, X1


@gluon.jit
def copy_out(x, quarters, index, p: gl.constexpr):
    """Writes block p by quarters [32, 32], both terms of each at once, but none of zeros."""
    tma.async_copy_shared_to_global(x, [index, 0, 0], quarters.index(2 * p))
    tma.async_copy_shared_to_global(x, [index, 32, 0], quarters.index(5 + 2 * p))
    tma.async_copy_shared_to_global(x, [index, 64, 0], quarters.index(2 * p + 1))


@gluon.jit
def positions():
    """Of rows and columns in the halves."""
    i_of = gl.expand_dims(gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(1, OF_ROWS)), 1), 2)
    j_of = gl.expand_dims(gl.expand_dims(gl.arange(0, 32, gl.SliceLayout(0, OF_COLUMNS)), 0), 0)
    return i_of, j_of


@gluon.jit
def put_growth(ptr, f, by_half, pair, NB: gl.constexpr):
    """Writes by how much, at most, the updates of each half make any state longer: a logarithm."""
    i_of, j_of = positions()
    squares = gl.sum(gl.where(i_of == j_of, f.permute((1, 0, 2)).load(HALVES), 0.0), axis=0)
    factor = gl.abs(1.0 - by_half.load(OF_COLUMNS) * squares)
    growth = gl.sum(gl.where(factor <= 1.0, 0.0, gl.log(factor)), axis=1)
    half = pair * 4 + gl.arange(0, 4, gl.SliceLayout(1, OF_COLUMNS))
    gl.store(ptr + half, growth, mask=half < 2 * NB)


@gluon.jit
def substituted(f, by_half):
    """-X of the halves on the diagonals, without decays, from products of keys [4, 32, 32]."""
    i_of, j_of = positions()
    X = gl.where(i_of > j_of, f.permute((1, 0, 2)).load(HALVES), 0.0)
    X *= gl.expand_dims(-by_half.load(OF_COLUMNS), 0)
    for i in gl.static_range(31):
        # A negative zero, since adding it changes nothing, whatever the sign.
        x = gl.sum(gl.where(i_of == i, X, -0.0), axis=0)
        of_i = by_half.slice(i, 1, dim=1).load(OF_COLUMNS)
        a = f.slice(i, 1, dim=1).permute((2, 0, 1)).load(HALVES)
        X = gl.where(i_of > i, X - a * gl.expand_dims(of_i * x, 0), X)
    return X


@gluon.jit
def decayed(X, sums, mild, HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr):
    """-X of the halves with decays, from -X without."""
    i_of, j_of = positions()
    mask = i_of > j_of
    if HAS_RESETS:
        segments = sums.index(2)._reinterpret(gl.float32, [4, 32], PLAIN)
        here = gl.expand_dims(segments.permute((1, 0)).load(OF_ROWS), 2)
        mask = mask & (here == gl.expand_dims(segments.load(OF_COLUMNS), 0))
    if HAS_G:
        highs = sums.index(0)._reinterpret(gl.float32, [4, 32], PLAIN)
        lows = sums.index(1)._reinterpret(gl.float32, [4, 32], PLAIN)
        high = gl.expand_dims(highs.permute((1, 0)).load(OF_ROWS), 2)
        from_low = gl.expand_dims(lows.load(OF_COLUMNS), 0)
        if mild:
            X *= high * from_low
        else:
            of_g = high - gl.expand_dims(highs.load(OF_COLUMNS), 0)
            of_g += gl.expand_dims(lows.permute((1, 0)).load(OF_ROWS), 2) - from_low
            X *= power(gl.where(mask, of_g, 0.0))
    if HAS_RESETS:
        X = gl.where(mask, X, 0.0)
    return X


@gluon.jit
def put_turned(turned, X):
    """Writes both terms of what is on the diagonals, transposed: a thread has a row then.

    Rows are columns of one half of both blocks, columns rows of the first half and the second.
    """
    high, low = two_terms(X)
    high = gl.permute(gl.reshape(high, [32, 2, 2, 32]), (1, 3, 2, 0))
    low = gl.permute(gl.reshape(low, [32, 2, 2, 32]), (1, 3, 2, 0))
    turned.index(0).store(gl.reshape(high, [64, 64]))
    turned.index(1).store(gl.reshape(low, [64, 64]))


@gluon.jit
def put_halves(ts, X):
    """Writes what is on the diagonals, transposed, both terms of a half behind each other."""
    terms = gl.permute(gl.join(*two_terms(X)), (1, 3, 2, 0))
    ts.slice(0, 256).store(gl.reshape(terms, [256, 32]))


@gluon.jit
def put_beside(ts, X, p: gl.constexpr):
    """Writes what is below the diagonal of block p in the same way, behind 32 rows of nothing."""
    terms = gl.reshape(gl.join(*two_terms(X)), [2, 32, 32, 2])
    terms = gl.reshape(gl.permute(terms, (0, 3, 2, 1)), [128, 32])
    ts.slice(256 + p * 128, 128).store(terms)


@gluon.jit
def inverse(
    k, beta_ptr, sums_ptr, x_out, growth_ptr,
    T: gl.constexpr, R: gl.constexpr, H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr,
    NG: gl.constexpr, HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr, HAS_GROWTH: gl.constexpr,
    GX: gl.constexpr = 0, GY: gl.constexpr = 0,
):  # fmt: skip
    """``(I + L)^-1 = I - X``, L the strictly causal products of keys, decays and beta.

    Two blocks a program; X [64, 64] of each as the sum of two terms of bfloat16. Found without
    decays, which are put in at last: the four halves on the diagonals by substitution, then what
    is below them by products.
    """
    NB: gl.constexpr = NG * R
    pair, pid, _ = program_ids(GX, GY)
    b = (pid // HV).to(gl.int64)
    hv = pid % HV
    h = hv // (HV // H)
    rows = T * R
    of_keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, K], gl.bfloat16)
    whole: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 64, K], gl.bfloat16)
    of_tiles: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 32], gl.bfloat16)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    space = gl.allocate_shared_memory(gl.bfloat16, [2 * 128 // K, 64, K], of_keys)
    arriving = space._reinterpret(gl.bfloat16, [2 * 128 // K, 1, 64, K], whole)
    betas = gl.allocate_shared_memory(gl.float32, [128], line)
    sums = gl.allocate_shared_memory(gl.float32, [3, 128], line)
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    fence_async_shared()
    mbarrier.expect(bar, bytes_per_cta=128 * K * 2)
    for p in gl.static_range(2):
        at = [pid // HV, pair * 128 + p * 64, h * K]
        tma.async_copy_global_to_shared(k, at, bar, arriving.index(p))

    flat: gl.constexpr = gl.BlockedLayout([1], [32], [4], [0])
    row = pair * 128 + gl.arange(0, 128, flat)
    beta = gl.load(beta_ptr + (b * rows + row) * HV + hv, mask=row < rows, other=0.0)
    betas.store(not_zero(beta.to(gl.float32)))
    # Of both blocks.
    mild = is_mild(sums_ptr, pid, gl.minimum(pair * 2 // R, NG - 1), NG, HAS_G)
    mild = mild & is_mild(sums_ptr, pid, gl.minimum((pair * 2 + 1) // R, NG - 1), NG, HAS_G)
    if HAS_G or HAS_RESETS:
        group = gl.minimum(row // (64 * R), NG - 1)
        at = sums_ptr + ((b * HV + hv) * NG + group) * 192 + (row // R) % 64
        high, low = gl.load(at), gl.load(at + 64)
        sums.index(0).store(gl.where(mild, power(high + low), high))
        sums.index(1).store(gl.where(mild, power(-high - low), low))
        sums.index(2).store(gl.load(at + 128))

    mbarrier.wait(bar, 0)
    f0, f1 = halves(space.index(0))
    f2, f3 = halves(space.index(1))
    f0, f1, f2, f3 = warpgroup_mma_wait(0, deps=[f0, f1, f2, f3])
    gl.barrier()
    # In the place of the keys, what is on the diagonal. It is symmetric before it is cut, so that
    # rows serve as columns.
    f = space._reinterpret(gl.float32, [4, 64, 32], PLAIN)
    is_first = gl.arange(0, 64, gl.SliceLayout(1, ACC))[:, None] < 32
    f.index(0).store(gl.where(is_first, f0, f1))
    f.index(1).store(gl.where(is_first, f2, f3))
    gl.barrier()
    f = space._reinterpret(gl.float32, [8, 32, 32], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    f = f.slice(0, 4)

    by_half = betas._reinterpret(gl.float32, [4, 32], PLAIN)
    if HAS_GROWTH:
        put_growth(growth_ptr + pid.to(gl.int64) * (2 * NB), f, by_half, pair, NB)
    X = substituted(f, by_half)
    gl.barrier()

    square: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    turned = space._reinterpret(gl.bfloat16, [4, 64, 64], square)
    tiles = space._reinterpret(gl.bfloat16, [8, 64, 32], of_tiles)
    put_turned(turned, X)
    fence_async_shared()
    X0, X1 = below(f0, f2, turned, tiles, betas)
    X0 = beside(X0, sums, mild, 0, HAS_G, HAS_RESETS)
    X1 = beside(X1, sums, mild, 1, HAS_G, HAS_RESETS)

    X = decayed(X, sums, mild, HAS_G, HAS_RESETS)
    gl.barrier()
    # What is on the diagonals, then what is below them.
    ts = space._reinterpret(gl.bfloat16, [512, 32], of_tiles)
    put_halves(ts, X)
    put_beside(ts, X0, 0)
    put_beside(ts, X1, 1)
    fence_async_shared()
    quarter: gl.constexpr = gl.NVMMASharedLayout.get_default_for([2, 32, 32], gl.bfloat16)
    quarters = space._reinterpret(gl.bfloat16, [8, 2, 32, 32], quarter)
    for p in gl.static_range(2):
        block = pair * 2 + p
        if block < NB:
            copy_out(x_out, quarters, (pid * NB + block) * 2, p)
    tma.store_wait(0)
