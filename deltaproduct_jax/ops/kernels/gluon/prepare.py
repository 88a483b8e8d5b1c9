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

# What is less than this forgets everything in float32 too, and sums of it stay exact enough.
LEAST_GATE = gl.constexpr(-1e6)


@gluon.jit
def add(x, y):
    """For scans."""
    return x + y


@gluon.jit
def gate_sums(
    g_ptr, resets_ptr, sums_ptr,
    T: gl.constexpr, HV: gl.constexpr, HEADS: gl.constexpr, NG: gl.constexpr,
    HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr,
):  # fmt: skip
    """Sums of g from the start of a group on, in two parts of float32, and of resets.

    Writes [B, HV, NG, 3, 64]. A sum is made in float64: differences of two are then sums over the
    tokens between them to the last bit of float32, whatever was summed before.
    """
    n, b = gl.program_id(0), gl.program_id(1)
    lay: gl.constexpr = gl.BlockedLayout([8, 1], [8, 4], [1, 1], [1, 0])
    c = gl.arange(0, 64, gl.SliceLayout(1, lay))[:, None]
    hv = gl.program_id(2) * HEADS + gl.arange(0, HEADS, gl.SliceLayout(0, lay))[None, :]
    row = b.to(gl.int64) * T + n * 64 + c
    inside = (n * 64 + c < T) & (hv < HV)
    high = gl.zeros([64, HEADS], gl.float32, lay)
    low = gl.zeros([64, HEADS], gl.float32, lay)
    segments = gl.zeros([64, HEADS], gl.float32, lay)
    if HAS_G:
        g = gl.load(g_ptr + row * HV + hv, mask=inside, other=0.0).to(gl.float32)
        g = gl.where(g < LEAST_GATE, LEAST_GATE, g)
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


@gluon.jit
def inverse(
    k_ptr, beta_ptr, x_ptr,
    T: gl.constexpr, R: gl.constexpr, H: gl.constexpr, HV: gl.constexpr, K: gl.constexpr,
    NB: gl.constexpr,
):  # fmt: skip
    """X [64, 64] in float32 of two blocks, ``(I + F beta)^-1 = I - X beta``, by substitution.

    A thread has a column of X, all of it in registers, so that a row is found from those before it
    without a word to other threads; rows of F are read by all threads at once.
    """
    pair, pid = gl.program_id(0), gl.program_id(1)
    b = (pid // HV).to(gl.int64)
    hv = pid % HV
    h = hv // (HV // H)
    tiles: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, K], gl.bfloat16)
    acc: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 64, 16])
    lay: gl.constexpr = gl.BlockedLayout([64, 1, 1], [1, 1, 32], [1, 2, 2], [0, 1, 2])
    plain: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [1, 0])
    keys = gl.allocate_shared_memory(gl.bfloat16, [2, 64, K], tiles)
    f = gl.allocate_shared_memory(gl.float32, [64, 2, 64], plain)
    betas = gl.allocate_shared_memory(
        gl.float32, [64, 2], gl.SwizzledSharedLayout(1, 1, 1, [0])
    )
    bar = gl.allocate_shared_memory(gl.int64, [1], mbarrier.MBarrierLayout())
    mbarrier.init(bar, count=1)
    fence_async_shared()
    rows = T * R
    desc = tma.make_tensor_descriptor(
        k_ptr + b * rows * H * K, shape=[rows, H * K], strides=[H * K, 1], block_shape=[64, K],
        layout=tiles,
    )  # fmt: skip
    mbarrier.expect(bar, bytes_per_cta=2 * 64 * K * 2)
    for i in gl.static_range(2):
        at = [pair * 128 + i * 64, h * K]
        tma.async_copy_global_to_shared(desc, at, bar, keys.index(i))

    of_beta: gl.constexpr = gl.BlockedLayout([1, 1], [32, 1], [2, 2], [0, 1])
    m = gl.arange(0, 64, gl.SliceLayout(1, of_beta))[:, None]
    block = gl.arange(0, 2, gl.SliceLayout(0, of_beta))[None, :]
    row = pair * 128 + block * 64 + m
    beta = gl.load(beta_ptr + (b * rows + row) * HV + hv, mask=row < rows, other=0.0)
    both = betas._reinterpret(gl.float32, [64, 2], plain)
    both.store(beta.to(gl.float32))

    mbarrier.wait(bar, 0)
    zero = gl.zeros([64, 64], gl.float32, acc)
    k0, k1 = keys.index(0), keys.index(1)
    f0 = warpgroup_mma(k0, k0.permute((1, 0)), zero, use_acc=False, is_async=True)
    f1 = warpgroup_mma(k1, k1.permute((1, 0)), zero, use_acc=False, is_async=True)
    f0, f1 = warpgroup_mma_wait(0, deps=[f0, f1])
    whole = f._reinterpret(gl.float32, [64, 2, 64], gl.SwizzledSharedLayout(1, 1, 1, [2, 1, 0]))
    whole.store(gl.permute(gl.join(f0, f1), (0, 2, 1)))

    of_rows: gl.constexpr = gl.SliceLayout(1, gl.SliceLayout(2, lay))
    i_of = gl.expand_dims(gl.expand_dims(gl.arange(0, 64, of_rows), 1), 2)
    of_blocks: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(2, lay))
    block = gl.expand_dims(gl.expand_dims(gl.arange(0, 2, of_blocks), 0), 2)
    of_columns: gl.constexpr = gl.SliceLayout(0, gl.SliceLayout(0, lay))
    j_of = gl.expand_dims(gl.expand_dims(gl.arange(0, 64, of_columns), 0), 0)
    # F is symmetric before it is cut, so rows serve as columns.
    X = gl.where(i_of > j_of, whole.load(lay), 0.0)
    for i in gl.static_range(63):
        # A negative zero, since adding it changes nothing, whatever the sign.
        x = gl.sum(gl.where(i_of == i, X, -0.0), axis=0)
        scale = betas.index(i).load(gl.SliceLayout(1, gl.SliceLayout(0, lay)))
        x = x * gl.expand_dims(scale, 1)
        a = f.index(i).permute((1, 0)).load(gl.SliceLayout(2, lay))
        X = gl.where(i_of > i, X - gl.expand_dims(a, 2) * gl.expand_dims(x, 0), X)
    index = pid.to(gl.int64) * NB + pair * 2 + block
    at = x_ptr + index * 4096 + i_of * 64 + j_of
    gl.store(at, X, mask=pair * 2 + block < NB)
