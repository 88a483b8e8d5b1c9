"""The forward pass in one walk over a sequence, in Gluon: warps that load, help, and hold states.

A program has a piece of a sequence and a value head. One warp loads tiles by TMA, blocks of 64
updates STAGES deep. Four warps prepare what knows no state: scores and inverse, with decays. For
each 64 columns of V four warps hold the state, transposed: then every product has its left operand
in registers as the product before left it, and the walk from state to state never waits for shared
memory or other warps. Letters as in prepare.py.
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

from deltaproduct_jax.ops.kernels.gluon.moves import joined
from deltaproduct_jax.ops.kernels.gluon.parts import (
    ACC,
    COLUMN,
    HALF,
    ROW,
    between,
    columns_in_halves,
    left,
    load_vectors,
    matrix,
    one_of_halves,
    put_vectors,
    some_of_rows,
    widened,
)


@gluon.jit
def load_tiles(
    handed, R: gl.constexpr, K: gl.constexpr, NC: gl.constexpr, S: gl.constexpr,
    HAS_O: gl.constexpr, HAS_V: gl.constexpr, NB: gl.constexpr,
):  # fmt: skip
    """One warp: tiles of q, a group ahead, and of k, v and X, up to S blocks ahead."""
    (
        q, k, v, x_first, x_rest, qb, kb, vb, x0b, x1b, full, empty, qfull, qempty, first, steps, b,
        pid, qcol, vcol,
    ) = handed  # fmt: skip
    size: gl.constexpr = 64 * K * 2 + 192 * 32 * 2 + (NC * 64 * 64 * 2 if HAS_V else 0)
    for m in range(steps * R + (1 if HAS_O else 0)):
        n = m // R
        s = m % S
        if HAS_O and m % R == 0:
            sq = n % 2
            mbarrier.wait(qempty.index(sq), ((n // 2) & 1) ^ 1)
            mbarrier.expect(qfull.index(sq), bytes_per_cta=64 * K * 2)
            at = [b, (first + n) * 64, qcol]
            tma.async_copy_global_to_shared(q, at, qfull.index(sq), qb.index(sq))
        bar = full.index(s)
        mbarrier.wait(empty.index(s), ((m // S) & 1) ^ 1)
        row = (first * R + m) * 64
        mbarrier.expect(bar, bytes_per_cta=size)
        tma.async_copy_global_to_shared(k, [b, row, qcol], bar, kb.index(s))
        if HAS_V:
            whole = joined(vb, NC, 64, NC * 64).index(s)
            tma.async_copy_global_to_shared(v, [b, row, vcol], bar, whole)
        index = (pid * NB + first * R + m) * 2
        firsts = x0b._reinterpret(gl.bfloat16, [S, 2, 32, 32], x_first.layout)
        tma.async_copy_global_to_shared(x_first, [index, 0, 0], bar, firsts.index(s))
        seconds = x1b._reinterpret(gl.bfloat16, [S, 2, 64, 32], x_rest.layout)
        tma.async_copy_global_to_shared(x_rest, [index, 32, 0], bar, seconds.index(s))


@gluon.jit
def prepare_blocks(
    handed, SCALE: gl.constexpr, T: gl.constexpr, R: gl.constexpr, HV: gl.constexpr,
    NG: gl.constexpr, S: gl.constexpr, HAS_O: gl.constexpr, HAS_G: gl.constexpr,
    HAS_RESETS: gl.constexpr,
):  # fmt: skip
    """Four warps: scores and decays of every block, two blocks deep.

    And of which queries something is not finite: of a bad one all products with keys are.
    """
    (
        beta_ptr, sums_ptr, told_ptr, qb, kb, pb, betas, intos, outs, tokens, of_tokens, of_updates,
        full, empty, qfull, qempty, ready, free, first, steps, b, hv,
    ) = handed  # fmt: skip
    DECAYS: gl.constexpr = HAS_G or HAS_RESETS
    m_of = gl.arange(0, 64, ROW)[:, None]
    n_of = gl.arange(0, 64, COLUMN)[None, :]
    lines = (betas, intos, outs, tokens, of_tokens, of_updates)
    zero = gl.zeros([64, 64], gl.float32, ACC)
    told, _ = some_of_rows(zero)
    vectors = load_vectors(beta_ptr, sums_ptr, 0, first, b, hv, T, R, HV, NG, HAS_G, HAS_RESETS)
    for m in range(steps * R):
        n, r = m // R, m % R
        sq = n % 2
        s = m % S
        st = m % 2
        p = zero
        if HAS_O:
            if r == 0:
                mbarrier.wait(qfull.index(sq), (n // 2) & 1)
            mbarrier.wait(full.index(s), (m // S) & 1)
            q, k = matrix(qb.index(sq)), matrix(kb.index(s)).permute((1, 0))
            p = warpgroup_mma(q, k, zero, use_acc=False, is_async=True)
        mbarrier.wait(free.index(st), ((m // 2) & 1) ^ 1)
        shown = (vectors[1], vectors[4])
        put_vectors(vectors, shown, lines, st, 0, HAS_O, HAS_G, HAS_RESETS)
        vectors = load_vectors(
            beta_ptr, sums_ptr, m + 1, first, b, hv, T, R, HV, NG, HAS_G, HAS_RESETS
        )
        if HAS_O:
            p = warpgroup_mma_wait(0, deps=[p])
            x, y = some_of_rows(p)
            told = told + x * 0.0 + y * 0.0
            upto = (m_of + 1) * R > r * 64 + n_of
            if DECAYS:
                p *= SCALE * between(of_tokens, of_updates, upto, 0, HAS_G, HAS_RESETS)
            else:
                p = gl.where(upto, SCALE * p, 0.0)
            p *= betas.index(0).load(COLUMN)[None, :]
            pb.index(st).store(p.to(gl.bfloat16))
        fence_async_shared()
        mbarrier.arrive(ready.index(st), count=1)
        if HAS_O:
            mbarrier.arrive(empty.index(s), count=1)
            if r == R - 1:
                mbarrier.arrive(qempty.index(sq), count=1)
    if HAS_O:
        told = gl.sum(gl.sum(told, axis=2), axis=1)
        gl.store(told_ptr + gl.arange(0, 4, told.type.layout), told)


@gluon.jit
def hold_state(
    handed, SCALE: gl.constexpr, R: gl.constexpr, K: gl.constexpr, V: gl.constexpr,
    SEQUENCES: gl.constexpr, S: gl.constexpr, DECAYS: gl.constexpr, HAS_O: gl.constexpr,
    HAS_V: gl.constexpr, HAS_KEPT: gl.constexpr, START: gl.constexpr, J: gl.constexpr,
):  # fmt: skip
    """Four warps: columns J * 64 to J * 64 + 63 of the state, and of the outputs.

    Nothing that reaches a state is chosen by a mask, so that what is not finite stays.
    """
    (
        out, states, errors, start_ptr, final_ptr, qb, kb, vb, x0b, x1b, pb, ob, sb, eb,
        intos, outs, tokens, full, empty, qfull, qempty, ready, free, first, steps, b, ocol, pid,
        index,
    ) = handed  # fmt: skip
    NC: gl.constexpr = V // 64
    wide: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    rows = J * 64 + gl.arange(0, 64, gl.SliceLayout(1, wide))
    keys = gl.arange(0, K, gl.SliceLayout(0, wide))
    at = index.to(gl.int64) * (K * V) + keys[None, :] * V + rows[:, None]
    if START == "maps":
        # Of a piece that forgets whatever was before, nothing.
        of_map = (keys[None, :] == rows[:, None]) & (steps > 0)
        state = gl.where(of_map, 1.0, gl.zeros([64, K], gl.float32, wide))
    elif START == "ends":
        of_piece = pid.to(gl.int64) * (K * V) + keys[None, :] * V + rows[:, None]
        state = gl.load(start_ptr + of_piece, mask=(of_piece >= 0) & (first == 0), other=0.0)
    else:
        state = gl.load(start_ptr + at)
    zero = gl.zeros([64, 64], gl.float32, ACC)
    o, pred = zero, zero
    if HAS_KEPT:
        matrix(sb.index(J)).store(state.to(gl.bfloat16))
        fence_async_shared()
        block = first * R
        kept = ((block // 2) * SEQUENCES + pid) * 2 + block % 2
        if steps > 0:
            tma.async_copy_shared_to_global(states, [kept, J * 64, 0], sb.index(J))
    narrow = left(state, ACC)
    if HAS_O:
        mbarrier.wait(qfull.index(0), 0)
        o = warpgroup_mma(narrow, matrix(qb.index(0)).permute((1, 0)), zero, use_acc=False)
        o *= SCALE
        mbarrier.arrive(qempty.index(0), count=1)
        mbarrier.wait(full.index(0), 0)
        pred = warpgroup_mma(narrow, matrix(kb.index(0)).permute((1, 0)), zero, use_acc=False)
    for m in range(steps * R):
        n = m // R
        r = m % R
        s = m % S
        st = m % 2
        block = first * R + m
        if not HAS_O:  # there are no outputs beside which to begin it
            mbarrier.wait(full.index(s), (m // S) & 1)
            k = matrix(kb.index(s)).permute((1, 0))
            pred = warpgroup_mma(left(state, ACC), k, zero, use_acc=False)
        if HAS_V:
            v = matrix(vb.index(s * NC + J)).permute((1, 0)).load(ACC)
        mbarrier.wait(ready.index(st), (m // 2) & 1)
        if HAS_O and DECAYS and r == 0:
            o *= tokens.index(st).load(COLUMN)[None, :]
        if DECAYS:
            pred *= intos.index(st).load(COLUMN)[None, :]
        pred = widened(v) - pred if HAS_V else -pred
        y = left(pred, HALF)
        y0, y1 = columns_in_halves(pred)
        first_half = left(y0, HALF)
        y0 = warpgroup_mma(first_half, x0b.index(s).slice(0, 32), y0, is_async=True)
        y0 = warpgroup_mma(first_half, x0b.index(s).slice(32, 32), y0, is_async=True)
        y1 = warpgroup_mma(y, x1b.index(s * 2), y1, is_async=True)
        y1 = warpgroup_mma(y, x1b.index(s * 2 + 1), y1, is_async=True)
        if DECAYS:
            state *= intos.index(st).slice(63, 1).load(gl.SliceLayout(0, wide))[None, :]
        y0, y1 = warpgroup_mma_wait(0, deps=[y0, y1])
        e = one_of_halves(y0, y1)
        if HAS_KEPT:
            tma.store_wait(0)
            matrix(eb.index(J)).permute((1, 0)).store(e.to(gl.bfloat16))
            fence_async_shared()
            tma.async_copy_shared_to_global(errors, [b, block * 64, ocol + J * 64], eb.index(J))
        written = left(e * outs.index(st).load(COLUMN)[None, :], wide)
        state = warpgroup_mma(written, matrix(kb.index(s)), state, is_async=True)
        if HAS_O:
            o = warpgroup_mma(left(e, ACC), pb.index(st).permute((1, 0)), o, is_async=True)
            # What the next block begins with, while outputs are on their way. Behind the last there
            # is one more, of which nothing comes.
            state = warpgroup_mma_wait(1, deps=[state])
            narrow = left(state, ACC)
            after = m + 1
            mbarrier.wait(full.index(after % S), (after // S) & 1)
            k = matrix(kb.index(after % S)).permute((1, 0))
            o = warpgroup_mma_wait(0, deps=[o])
            pred = warpgroup_mma(narrow, k, zero, use_acc=False, is_async=True)
        else:
            state = warpgroup_mma_wait(0, deps=[state])
        mbarrier.arrive(free.index(st), count=1)
        mbarrier.arrive(empty.index(s), count=1)
        if HAS_KEPT:
            matrix(sb.index(J)).store(state.to(gl.bfloat16))
            fence_async_shared()
            kept = (((block + 1) // 2) * SEQUENCES + pid) * 2 + (block + 1) % 2
            # Where nothing is, behind the last.
            kept = gl.where(m + 1 < steps * R, kept, 2147483647)
            tma.async_copy_shared_to_global(states, [kept, J * 64, 0], sb.index(J))
        if HAS_O and r == R - 1:
            if not HAS_KEPT:
                tma.store_wait(0)
            buffer = ob.index(J)
            matrix(buffer).permute((1, 0)).store(o.to(gl.bfloat16))
            fence_async_shared()
            tma.async_copy_shared_to_global(out, [b, (first + n) * 64, ocol + J * 64], buffer)
            sq = (n + 1) % 2
            mbarrier.wait(qfull.index(sq), ((n + 1) // 2) & 1)
            o = warpgroup_mma(narrow, matrix(qb.index(sq)).permute((1, 0)), zero, use_acc=False)
            o *= SCALE
            mbarrier.arrive(qempty.index(sq), count=1)
        if HAS_O:
            pred = warpgroup_mma_wait(0, deps=[pred])
    gl.store(final_ptr + at, state)
    if HAS_O:
        tma.store_wait(0)


@gluon.jit
def walk(
    q, k, v, x_first, x_rest, beta_ptr, sums_ptr, start_ptr, needs_ptr, o, final_ptr, states,
    errors, told_ptr,
    SCALE: gl.constexpr, B: gl.constexpr, T: gl.constexpr, R: gl.constexpr, H: gl.constexpr,
    HV: gl.constexpr, K: gl.constexpr, V: gl.constexpr, NG: gl.constexpr, STEPS: gl.constexpr,
    FIRST: gl.constexpr, PIECES: gl.constexpr, S: gl.constexpr, HAS_G: gl.constexpr,
    HAS_RESETS: gl.constexpr, HAS_O: gl.constexpr, HAS_V: gl.constexpr, HAS_KEPT: gl.constexpr,
    START: gl.constexpr, FORGETS: gl.constexpr, SUMMARY: gl.constexpr,
):  # fmt: skip
    """Outputs and final states of pieces of STEPS groups, from FIRST on.

    And, [4] a piece, NaN where of a query something is not finite, else 0.
    They begin with the states given if START is "whole"; for "ends" with nothing, but for piece 0,
    which has its true beginning; for "maps" with the identity. Without HAS_O only the states;
    without HAS_V as if all values were zeros. With HAS_KEPT what the way back reads again, too: the
    state before every block, transposed and in bfloat16, and the errors of its updates. With
    FORGETS they walk through as many of the last groups of their piece as are needed (`Call.needs`:
    SUMMARY of the three numbers); a map is zero, not the identity, if none is.
    """
    pid, piece = gl.program_id(0), FIRST + gl.program_id(1)
    b32, hv = pid // HV, pid % HV
    b = b32.to(gl.int64)
    qcol = (hv // (HV // H)) * K
    vcol = hv * V
    first = piece * STEPS
    steps = gl.maximum(gl.minimum(STEPS, NG - first), 0)
    index = pid * PIECES + piece - FIRST
    if FORGETS:
        needed = gl.load(needs_ptr + (pid * ((NG + STEPS - 1) // STEPS) + piece) * 3 + SUMMARY)
        first += steps - gl.minimum(needed, steps)
        steps = gl.minimum(needed, steps)
    NC: gl.constexpr = V // 64
    DECAYS: gl.constexpr = HAS_G or HAS_RESETS
    bf16: gl.constexpr = gl.bfloat16
    keys: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 64, K], gl.bfloat16)
    tile: gl.constexpr = gl.NVMMASharedLayout.get_default_for([1, 64, 64], gl.bfloat16)
    small: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 64], gl.bfloat16)
    halves: gl.constexpr = gl.NVMMASharedLayout.get_default_for([64, 32], bf16)
    line: gl.constexpr = gl.SwizzledSharedLayout(1, 1, 1, [0])
    qb = gl.allocate_shared_memory(bf16, [2 if HAS_O else 1, 1, 64, K], keys)
    kb = gl.allocate_shared_memory(bf16, [S, 1, 64, K], keys)
    vb = gl.allocate_shared_memory(bf16, [S * NC if HAS_V else 1, 1, 64, 64], tile)
    x0b = gl.allocate_shared_memory(bf16, [S, 64, 32], halves)
    x1b = gl.allocate_shared_memory(bf16, [2 * S, 64, 32], halves)
    pb = gl.allocate_shared_memory(bf16, [2 if HAS_O else 1, 64, 64], small)
    ob = gl.allocate_shared_memory(bf16, [NC if HAS_O else 1, 1, 64, 64], tile)
    sb = gl.allocate_shared_memory(bf16, [NC if HAS_KEPT else 1, 1, 64, K], keys)
    eb = gl.allocate_shared_memory(bf16, [NC if HAS_KEPT else 1, 1, 64, 64], tile)
    betas = gl.allocate_shared_memory(gl.float32, [1, 64], line)
    intos = gl.allocate_shared_memory(gl.float32, [2, 64], line)
    outs = gl.allocate_shared_memory(gl.float32, [2, 64], line)
    tokens = gl.allocate_shared_memory(gl.float32, [2, 64], line)
    of_tokens = gl.allocate_shared_memory(gl.float32, [3, 64], line)
    of_updates = gl.allocate_shared_memory(gl.float32, [3, 64], line)
    bars: gl.constexpr = mbarrier.MBarrierLayout()
    full = gl.allocate_shared_memory(gl.int64, [S, 1], bars)
    empty = gl.allocate_shared_memory(gl.int64, [S, 1], bars)
    # Nobody waits for queries without outputs. A barrier that is set and never waited for has its
    # memory given to what partitions are told, which its setting may reach too late.
    qfull, qempty = full, empty
    if HAS_O:
        qfull = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
        qempty = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    ready = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    free = gl.allocate_shared_memory(gl.int64, [2, 1], bars)
    for i in gl.static_range(S):
        mbarrier.init(full.index(i), count=1)
        mbarrier.init(empty.index(i), count=NC + 1 if HAS_O else NC)
    for i in gl.static_range(2):
        if HAS_O:
            mbarrier.init(qfull.index(i), count=1)
            mbarrier.init(qempty.index(i), count=NC + 1)
        mbarrier.init(ready.index(i), count=1)
        mbarrier.init(free.index(i), count=NC)
    fence_async_shared()
    hold = (
        o, states, errors, start_ptr, final_ptr, qb, kb, vb, x0b, x1b, pb, ob, sb, eb, intos,
        outs, tokens, full, empty, qfull, qempty, ready, free, first, steps, b32, vcol, pid, index,
    )  # fmt: skip
    prepare = (
        beta_ptr, sums_ptr, told_ptr + index.to(gl.int64) * 4, qb, kb, pb, betas, intos, outs,
        tokens, of_tokens, of_updates, full, empty, qfull, qempty, ready, free, first, steps, b, hv,
    )  # fmt: skip
    load = (
        q, k, v, x_first, x_rest, qb, kb, vb, x0b, x1b, full, empty, qfull, qempty, first, steps,
        b32, pid, qcol, vcol,
    )  # fmt: skip
    # Sizes stand where they are used, since a name would make numbers of the program of them.
    if NC == 2:
        gl.warp_specialize([
            (hold_state, (
                hold, SCALE, R, K, V, B * HV, S, DECAYS, HAS_O, HAS_V, HAS_KEPT, START, 0,
            )),
            (hold_state, (
                hold, SCALE, R, K, V, B * HV, S, DECAYS, HAS_O, HAS_V, HAS_KEPT, START, 1,
            )),
            (prepare_blocks, (
                prepare, SCALE, T, R, HV, NG, S, HAS_O, HAS_G, HAS_RESETS,
            )),
            (load_tiles, (load, R, K, NC, S, HAS_O, HAS_V, NG * R)),
        ], [4, 4, 1], [192, 104, 24])  # fmt: skip
    else:
        gl.warp_specialize([
            (hold_state, (
                hold, SCALE, R, K, V, B * HV, S, DECAYS, HAS_O, HAS_V, HAS_KEPT, START, 0,
            )),
            (prepare_blocks, (
                prepare, SCALE, T, R, HV, NG, S, HAS_O, HAS_G, HAS_RESETS,
            )),
            (load_tiles, (load, R, K, NC, S, HAS_O, HAS_V, NG * R)),
        ], [4, 1], [152, 24])  # fmt: skip
