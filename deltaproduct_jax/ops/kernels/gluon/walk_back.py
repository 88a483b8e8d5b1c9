"""The way back in one walk over a sequence, in Gluon: nothing of the states' cotangents is written.

A program has a piece of a sequence and a value head, and goes through its blocks from the last.
For each 64 columns of V four warps hold the cotangent of the state, transposed, as `walk` holds the
state: they find dv, which the block before waits for. Four others ask for tiles by TMA, make the
scores that this takes, and find all cotangents but dv of a block from its error and the state
before it, which `walk` kept (cotangents.py). Letters as in prepare.py.
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

from deltaproduct_jax.ops.kernels.gluon.cotangents import find_cotangents
from deltaproduct_jax.ops.kernels.gluon.parts import (
    ACC,
    COLUMN,
    columns_in_halves,
    is_mild,
    left,
    matrix,
    nothing,
)


@gluon.jit
def put_product(ptr, tile, state):
    """Writes the sum of products of 64 columns of a state with those of a cotangent."""
    products = matrix(tile).load(state.type.layout).to(gl.float32) * state
    gl.store(ptr, gl.sum(gl.sum(products, axis=1), axis=0))


@gluon.jit
def hold_cotangent(
    handed, SCALE: gl.constexpr, R: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    NG: gl.constexpr, PIECES: gl.constexpr, S: gl.constexpr, D: gl.constexpr, DECAYS: gl.constexpr,
    HAS_GRADIENTS: gl.constexpr, HAS_G: gl.constexpr, ENDS: gl.constexpr, J: gl.constexpr,
):  # fmt: skip
    """Four warps: columns J * 64 to J * 64 + 63 of the cotangent of the state, and of dv."""
    (
        dv, sums_ptr, start_ptr, before_ptr, wholes_ptr, qb, kb, dob, x0b, x1b, pb, sb, dsb,
        dyb, intos, outs, tokens, full, empty, qfull, qempty, do_full, do_empty, of_x, of_states,
        ready, free, of_ds, of_dy, total, first, b, vcol, pid, piece, is_last,
    ) = handed  # fmt: skip
    P: gl.constexpr = 1 if HAS_GRADIENTS else 2
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    rows = J * 64 + gl.arange(0, 64, gl.SliceLayout(1, wide))
    keys = gl.arange(0, K, gl.SliceLayout(0, wide))
    at = keys[None, :] * V + rows[:, None]
    index = pid.to(gl.int64) * PIECES + piece
    if ENDS:
        of_last = start_ptr + pid.to(gl.int64) * (K * V) + at
        state = gl.load(of_last, mask=(at >= 0) & is_last, other=0.0)
    else:
        state = gl.load(start_ptr + index * (K * V) + at)
    zero = gl.zeros([64, 64], gl.float32, ACC)
    for m in range(total):
        block = total - 1 - m
        s, st, turn = m % S, m % 2, m // R
        sq, d = turn % 2, turn % D
        z = nothing(m)
        group = first + block // R
        mild = is_mild(sums_ptr, pid, group, NG, HAS_GRADIENTS and HAS_G)
        # As left operands from shared memory, where the others need them: registers are short.
        if HAS_GRADIENTS:
            mbarrier.wait(of_ds.index(1), (m & 1) ^ 1)
        dsb.index(z + J).store(state.to(gl.bfloat16))
        fence_async_shared()
        if HAS_GRADIENTS:
            mbarrier.arrive(of_ds.index(0), count=1)
        mbarrier.wait(full.index(s), (m // S) & 1)
        k = matrix(kb.index(s))
        de = warpgroup_mma(dsb.index(z + J), k.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(ready.index(st), (m // 2) & 1)
        if m % R == 0:
            mbarrier.wait(do_full.index(d), (turn // D) & 1)
        de = warpgroup_mma_wait(0, deps=[de])
        de *= outs.index(st).load(COLUMN)[None, :]
        do = matrix(dob.index(z + d * (V // 64) + J)).permute((1, 0))
        de = warpgroup_mma(do, pb.index(z + m % P), de)
        mbarrier.wait(of_x.index(0), m & 1)
        y0, y1 = columns_in_halves(de)
        y0, y1 = left(y0, ACC), left(y1, ACC)
        rest = warpgroup_mma(y0, x0b.index(z).permute((1, 0)), de, is_async=True)
        rest = warpgroup_mma(y0, x0b.index(z + 1).permute((1, 0)), rest, is_async=True)
        rest = warpgroup_mma(y1, x1b.index(z).permute((1, 0)), rest, is_async=True)
        rest = warpgroup_mma(y1, x1b.index(z + 1).permute((1, 0)), rest, is_async=True)
        if DECAYS:
            state *= intos.index(st).slice(63, 1).load(gl.SliceLayout(0, wide))[None, :]
        rest = warpgroup_mma_wait(0, deps=[rest])
        mbarrier.arrive(of_x.index(1), count=1)
        if HAS_GRADIENTS:
            mbarrier.wait(of_dy.index(1), (m & 1) ^ 1)
            tma.store_wait(0)
            matrix(dyb.index(z + J)).permute((1, 0)).store(rest.to(gl.bfloat16))
            fence_async_shared()
            mbarrier.arrive(of_dy.index(0), count=1)
            out = [b, (first * R + block) * 64, vcol + J * 64]
            tma.async_copy_shared_to_global(dv, out, dyb.index(z + J))
        if HAS_GRADIENTS and HAS_G:
            # While the others are at work on what dv is in.
            if not mild:
                mbarrier.wait(of_states.index(0), m & 1)
                at_block = (pid.to(gl.int64) * NG + group) * (R + 1) + block % R
                put_product(wholes_ptr + at_block * (V // 64) + J, sb.index(z + J), state)
            if block % R > 0:
                mbarrier.arrive(of_states.index(1), count=1)
        if DECAYS:
            rest *= -intos.index(st).load(COLUMN)[None, :]
        else:
            rest = -rest
        state = warpgroup_mma(left(rest, wide), k, state)
        if block % R == 0:
            mbarrier.wait(qfull.index(sq), (turn // 2) & 1)
            read = do.load(ACC).to(gl.float32) * SCALE
            if DECAYS:
                read *= tokens.index(st).load(COLUMN)[None, :]
            state = warpgroup_mma(left(read, wide), matrix(qb.index(sq)), state)
            mbarrier.arrive(qempty.index(sq), count=1)
            if HAS_GRADIENTS:
                tma.store_wait(0)
            mbarrier.arrive(do_empty.index(d), count=1)
            if HAS_GRADIENTS and HAS_G:
                mbarrier.wait(of_states.index(0), m & 1)
                at_group = (pid.to(gl.int64) * NG + group) * (R + 1) + R
                put_product(wholes_ptr + at_group * (V // 64) + J, sb.index(z + J), state)
                mbarrier.arrive(of_states.index(1), count=1)
        mbarrier.arrive(free.index(st), count=1)
        mbarrier.arrive(empty.index(s), count=1)
    gl.store(before_ptr + index * (K * V) + at, state)
    if HAS_GRADIENTS:
        tma.store_wait(0)


@gluon.jit
def barriers(COUNT: gl.constexpr, N: gl.constexpr):
    """N of them, each of which waits for COUNT arrivals."""
    bars = gl.allocate_shared_memory(gl.int64, [N, 1], mbarrier.MBarrierLayout())
    for i in gl.static_range(N):
        mbarrier.init(bars.index(i), count=COUNT)
    return bars


@gluon.jit
def both_ways(FULL: gl.constexpr, EMPTY: gl.constexpr):
    """A barrier of what is filled, and one of what is free again."""
    bars = gl.allocate_shared_memory(gl.int64, [2, 1], mbarrier.MBarrierLayout())
    mbarrier.init(bars.index(0), count=FULL)
    mbarrier.init(bars.index(1), count=EMPTY)
    return bars


@gluon.jit
def walk_back(
    q, k, x_term, do, e, states, x_rest, beta_ptr, sums_ptr, start_ptr, needs_ptr,
    dq, dk, dv, dbeta_ptr, terms_ptr, wholes_ptr, before_ptr,
    SCALE: gl.constexpr, B: gl.constexpr, T: gl.constexpr, R: gl.constexpr, H: gl.constexpr,
    HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, NG: gl.constexpr, STEPS: gl.constexpr,
    FIRST: gl.constexpr, PIECES: gl.constexpr, S: gl.constexpr, HAS_G: gl.constexpr,
    HAS_RESETS: gl.constexpr, HAS_GRADIENTS: gl.constexpr, START: gl.constexpr,
    FORGETS: gl.constexpr,
):  # fmt: skip
    """Cotangents of inputs, and of the states before pieces of STEPS groups, from FIRST on.

    They set out from the cotangents given if START is "whole"; for "ends" from nothing, but for the
    last piece, which has its true one. Without HAS_GRADIENTS only those of states. With FORGETS
    they begin behind as many of the first groups of their piece as are needed (`Call.needs`).
    """
    pid, piece = gl.program_id(0), FIRST + gl.program_id(1)
    b32, hv = pid // HV, pid % HV
    qcol = (hv // (HV // H)) * K
    vcol = hv * V
    first = piece * STEPS
    steps = gl.maximum(gl.minimum(STEPS, NG - first), 0)
    is_last = piece == PIECES - 1
    if FORGETS:
        needed = gl.load(needs_ptr + (pid * PIECES + piece) * 3 + 2)
        is_last = is_last & (needed >= steps)
        steps = gl.minimum(needed, steps)
    total = steps * R
    NC: gl.constexpr = V // 64
    DECAYS: gl.constexpr = HAS_G or HAS_RESETS
    bf16: gl.constexpr = gl.bfloat16
    keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 64, K], gl.bfloat16)
    flat: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, K], gl.bfloat16)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 64, 64], gl.bfloat16)
    small: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    halves: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 32], bf16)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    # Of what only gradients take, one small tile stands where there are none.
    NG_: gl.constexpr = NC if HAS_GRADIENTS else 1
    # What only gradients take leaves less room for what is loaded ahead.
    D: gl.constexpr = 1 if HAS_GRADIENTS else 2
    # Holds dq as well, when dv has been used.
    OF_DY: gl.constexpr = (NC if K == 64 else 2) if HAS_GRADIENTS else 1
    qb = gl.allocate_shared_memory(bf16, [2, 1, 64, K], keys)
    kb = gl.allocate_shared_memory(bf16, [S, 1, 64, K], keys)
    dob = gl.allocate_shared_memory(bf16, [D * NC, 1, 64, 64], tile)
    x0b = gl.allocate_shared_memory(bf16, [2, 64, 32], halves)
    x1b = gl.allocate_shared_memory(bf16, [2, 64, 32], halves)
    pb = gl.allocate_shared_memory(bf16, [1 if HAS_GRADIENTS else 2, 64, 64], small)
    eb = gl.allocate_shared_memory(bf16, [NG_, 1, 64, 64], tile)
    sb = gl.allocate_shared_memory(bf16, [NG_, 1, 64, K], keys)
    dsb = gl.allocate_shared_memory(bf16, [NC, 64, K], flat)
    dyb = gl.allocate_shared_memory(bf16, [OF_DY, 1, 64, 64], tile)
    stage = gl.allocate_shared_memory(bf16, [1, 1, 64, K], keys)
    betas = gl.allocate_shared_memory(gl.float32, [1, 64], line)
    intos = gl.allocate_shared_memory(gl.float32, [2, 64], line)
    outs = gl.allocate_shared_memory(gl.float32, [2, 64], line)
    tokens = gl.allocate_shared_memory(gl.float32, [2, 64], line)
    of_tokens = gl.allocate_shared_memory(gl.float32, [3, 64], line)
    of_updates = gl.allocate_shared_memory(gl.float32, [3, 64], line)
    full, empty = barriers(1, S), barriers(NC, S)
    qfull, qempty = barriers(1, 2), barriers(NC, 2)
    do_full, do_empty = barriers(1, D), barriers(NC, D)
    ready, free = barriers(1, 2), barriers(NC, 2)
    # Of what there is one of: filled, and free again.
    of_x = both_ways(1, NC)
    # None that nobody waits for: see `walk`.
    of_e, of_states, of_ds, of_dy = of_x, of_x, of_x, of_x
    if HAS_GRADIENTS:
        of_e, of_states = both_ways(1, 1), both_ways(1, NC)
        of_ds, of_dy = both_ways(NC, 1), both_ways(NC, 1)
    for p in gl.static_range(2):  # zeros, where nothing is loaded
        none = gl.zeros([64, 32], bf16, gl.BlockedLayout([1, 8], [8, 4], [4, 1], [1, 0]))
        x0b.index(p).store(none)
    fence_async_shared()
    hold = (
        dv, sums_ptr, start_ptr, before_ptr, wholes_ptr, qb, kb, dob, x0b, x1b, pb, sb, dsb,
        dyb, intos, outs, tokens, full, empty, qfull, qempty, do_full, do_empty, of_x, of_states,
        ready, free, of_ds, of_dy, total, first, b32, vcol, pid, piece, is_last,
    )  # fmt: skip
    find = (
        (beta_ptr, sums_ptr),
        (dq, dk, dbeta_ptr, terms_ptr),
        (qb, kb, dob, (x0b, x1b), pb, eb, sb, dsb, dyb, stage),
        (betas, intos, outs, tokens, of_tokens, of_updates),
        (full, empty, qfull, qempty, do_full, do_empty),
        (of_x, of_e, of_states),
        (ready, free),
        (of_ds, of_dy),
        (total, first, b32, hv, pid, qcol, vcol),
    )
    arrays = (q, k, x_term, do, e, states, x_rest)
    # Sizes stand where they are used, since a name would make numbers of the program of them.
    if NC == 2:
        gl.warp_specialize([
            (hold_cotangent, (
                hold, SCALE, R, K, V, NG, PIECES, S, D, DECAYS, HAS_GRADIENTS, HAS_G,
                START == "ends", 0,
            )),
            (hold_cotangent, (
                hold, SCALE, R, K, V, NG, PIECES, S, D, DECAYS, HAS_GRADIENTS, HAS_G,
                START == "ends", 1,
            )),
            (find_cotangents, (
                find, arrays, SCALE, T, R, HV, K, NG, S, D, NC, B * HV, HAS_G, HAS_RESETS,
                HAS_GRADIENTS,
            )),
        ], [4, 4], [144, 216])  # fmt: skip
    else:
        gl.warp_specialize([
            (hold_cotangent, (
                hold, SCALE, R, K, V, NG, PIECES, S, D, DECAYS, HAS_GRADIENTS, HAS_G,
                START == "ends", 0,
            )),
            (find_cotangents, (
                find, arrays, SCALE, T, R, HV, K, NG, S, D, NC, B * HV, HAS_G, HAS_RESETS,
                HAS_GRADIENTS,
            )),
        ], [4], [248])  # fmt: skip
