"""Cotangents of a block from its error, the state before it and that behind it, in Gluon.

Four warps of `walk_back`, which share every tile by columns. They ask for all tiles of a walk as
well: they know best when there is room. Of two products that are each other's transposed one is
made, and read both ways from shared memory. Letters as in prepare.py.
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

from deltaproduct_jax.ops.kernels.gluon.moves import (
    ask_ahead,
    ask_do,
    ask_first,
    ask_for_block,
    ask_x,
    half,
    put_dq,
    put_line,
)
from deltaproduct_jax.ops.kernels.gluon.parts import (
    ACC,
    COLUMN,
    ROW,
    diagonal,
    exceeds,
    from_columns,
    is_mild,
    load_vectors,
    matrix,
    nothing,
    put_vectors,
    quotients,
    times,
    weights,
)


@gluon.jit
def over_values(rows, columns, z, NC: gl.constexpr):
    """Begins the products of rows of one tile over V with those of another, [64, 64]."""
    x = gl.zeros([64, 64], gl.float32, ACC)
    for j in gl.static_range(NC):
        of_columns = matrix(columns.index(z + j)).permute((1, 0))
        x = warpgroup_mma(matrix(rows.index(z + j)), of_columns, x, use_acc=j > 0, is_async=True)
    return x


@gluon.jit
def over_columns(rows, states, h: gl.constexpr, z, NC: gl.constexpr):
    """Begins the products of rows of a tile over V with 64 columns of a state's, [64, 64]."""
    x = gl.zeros([64, 64], gl.float32, ACC)
    for j in gl.static_range(NC):
        state = half(states.index(z + j), h * 1)
        x = warpgroup_mma(matrix(rows.index(z + j)), state, x, use_acc=j > 0, is_async=True)
    return x


@gluon.jit
def of_system(
    k, tile, eb, dyb, betas, of_updates, dbeta_ptr, row, rows, b, hv, r, z, mild, R: gl.constexpr,
    HV: gl.constexpr, NC: gl.constexpr, HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr,
):  # fmt: skip
    """Puts what multiplies keys in dk, on behalf of the system of errors, into ``tile``.

    With an update as row; it counts for both. Its terms of dg, if not ``mild``. Writes dbeta.
    """
    i_of, j_of = gl.arange(0, 64, ROW), gl.arange(0, 64, COLUMN)
    Z = over_values(dyb, eb, z, NC)
    below = exceeds(i_of - z, j_of)
    of_betas = betas.index(z).load(COLUMN)
    weight = weights(of_updates, of_updates, of_betas, below, mild, z, -1.0, HAS_G, HAS_RESETS)
    Z = warpgroup_mma_wait(0, deps=[Z])
    dbeta = diagonal(Z, z) / betas.index(z).load(ROW)
    at = dbeta_ptr + (b * rows + row + i_of) * HV + hv
    gl.store(at, dbeta.to(dbeta_ptr.dtype.element_ty), mask=row + i_of < rows)
    Z *= weight
    tile.store(Z.to(gl.bfloat16))
    terms = gl.zeros([64], gl.float32, ROW)
    if HAS_G and not mild:
        zero = gl.zeros([64, 64], gl.float32, ACC)
        kk = warpgroup_mma(k, k.permute((1, 0)), zero, use_acc=False)
        spans = (r * 64 + i_of)[:, None] // R != (r * 64 + j_of)[None, :] // R
        kk = gl.where(spans, Z * kk, 0.0)
        terms = gl.sum(kk, axis=1) - from_columns(kk)
    return terms


@gluon.jit
def of_queries(
    q, dob, sb, tokens, z, mild, SCALE: gl.constexpr, K: gl.constexpr, NC: gl.constexpr,
    HAS_G: gl.constexpr, DECAYS: gl.constexpr,
):  # fmt: skip
    """What reading the state makes of dq of a group; its terms of dg, if not ``mild``."""
    lay: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    read = gl.zeros([64, K], gl.float32, lay)
    for j in gl.static_range(NC):
        state = matrix(sb.index(z + j))
        read = warpgroup_mma(matrix(dob.index(z + j)), state, read, use_acc=j > 0, is_async=True)
    scale = gl.full([64], SCALE, gl.float32, gl.SliceLayout(1, lay))
    if DECAYS:
        scale *= tokens.load(gl.SliceLayout(1, lay))
    read = warpgroup_mma_wait(0, deps=[read])
    read *= scale[:, None]
    terms = gl.zeros([64], gl.float32, ROW)
    if HAS_G and not mild:
        terms = times(q, read)
    return read, terms


@gluon.jit
def put_scores(
    q, k, pb, scores_of, betas, of_tokens, of_updates, r, z, mild, SCALE: gl.constexpr,
    R: gl.constexpr, HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr,
):  # fmt: skip
    """What multiplies errors in outputs, into ``pb``; and its factor."""
    i_of, j_of = gl.arange(0, 64, ROW), gl.arange(0, 64, COLUMN)
    # Up to its token, of which there is one for R updates.
    upto = exceeds((i_of + 1) * R - r * 64, j_of)
    of_betas = betas.index(z).load(COLUMN)
    factor = weights(of_tokens, of_updates, of_betas, upto, mild, z, SCALE, HAS_G, HAS_RESETS)
    scores = warpgroup_mma_wait(0, deps=[scores_of])
    pb.store((scores * factor).to(gl.bfloat16))
    fence_async_shared()
    return scores, factor


@gluon.jit
def before_dv(
    tiles, tokens, dq, scores, factor, m, r, st, z, mild, waits,
    SCALE: gl.constexpr, R: gl.constexpr, K: gl.constexpr, NC: gl.constexpr, HAS_G: gl.constexpr,
    DECAYS: gl.constexpr,
):  # fmt: skip
    """What a block's cotangents are made of without dv: of scores, and by reading the state.

    Returns the cotangents of scores, what there is of dq, and terms of dg, if not ``mild``, by
    token and by update.
    """
    q, dob, eb, sb = tiles
    of_states, of_ds = waits
    i_of, j_of = gl.arange(0, 64, ROW), gl.arange(0, 64, COLUMN)
    ds = over_values(dob, eb, z, NC)
    ds = warpgroup_mma_wait(0, deps=[ds])
    ds *= factor
    by_token = gl.zeros([64], gl.float32, ROW)
    by_update = by_token
    if HAS_G and not mild:
        spans = exceeds(i_of * R - r * 64, j_of)
        scores = gl.where(spans, ds * scores, 0.0)
        by_token = gl.sum(scores, axis=1)
        by_update = -from_columns(scores)
    narrow = ds.to(gl.bfloat16)
    mbarrier.wait(of_states.index(0), m & 1)
    z = nothing(m, 28)
    if r == 0:
        read, of_start = of_queries(
            q, dob, sb, tokens.index(st), z, mild, SCALE, K, NC, HAS_G, DECAYS
        )
        by_token += of_start
        dq = read if R == 1 else dq + read
    mbarrier.wait(of_ds.index(0), m & 1)
    return narrow, dq, by_token, by_update


@gluon.jit
def of_keys(
    tiles, ds_tile, Z_tile, into, out, dq, m, mild, of_next, waits, arrays, block, last,
    R: gl.constexpr, K: gl.constexpr, NC: gl.constexpr, SEQUENCES: gl.constexpr,
    HAS_G: gl.constexpr,
):  # fmt: skip
    """Puts dk of a block into ``stage``; ends what was begun of dq.

    Asks for what the next block takes as soon as nobody reads what is in its place.

    Terms of dg: of decays to updates from where the block begins, and from them to its end; if
    ``mild`` of all decays to updates, less those from them.
    """
    q, k, eb, sb, dsb, dyb, stage = tiles
    of_into, of_out = gl.zeros([64], gl.float32, ROW), gl.zeros([64], gl.float32, ROW)
    of_all = of_into
    for h in gl.static_range(K // 64):
        z = nothing(m, 26 - 5 * h)
        dk = over_columns(eb, dsb, h, z, NC)
        read = over_columns(dyb, sb, h, z, NC)
        dk, read, dq = warpgroup_mma_wait(0, deps=[dk, read, dq])
        if h == K // 64 - 1:
            of_states, of_ds = waits
            mbarrier.arrive(of_ds.index(1), count=1)
            if HAS_G:
                mbarrier.wait(of_states.index(1), m & 1)
            if not last:
                ask_for_block(of_next, arrays, block - 1, R, NC, SEQUENCES)
        dk *= out[:, None]
        read *= -into[:, None]
        if HAS_G:
            if not mild:
                of_out += times(half(k, h), dk)
                of_into += times(half(k, h), read)
            # Apart until their difference is known.
            read = warpgroup_mma(Z_tile, half(k, h), read, is_async=True)
        else:
            dk += read
            dk = warpgroup_mma(Z_tile, half(k, h), dk, is_async=True)
        dk = warpgroup_mma(ds_tile.permute((1, 0)), half(q, h), dk, is_async=True)
        dk = warpgroup_mma(Z_tile.permute((1, 0)), half(k, h), dk, is_async=True)
        if HAS_G:
            dk, read = warpgroup_mma_wait(0, deps=[dk, read])
            if mild:
                of_all += times(half(k, h), read - dk)
            dk += read
        else:
            dk = warpgroup_mma_wait(0, deps=[dk])
        half(stage.index(z), h).store(dk.to(gl.bfloat16))
    return of_into, of_out, of_all, dq


@gluon.jit
def vectors_of(
    sources, block, place, T: gl.constexpr, R: gl.constexpr, HV: gl.constexpr, NG: gl.constexpr,
    HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr,
):  # fmt: skip
    """What `load_vectors` finds of a block, the first where it is negative, and if it is mild."""
    beta_ptr, sums_ptr = sources
    _, first, b, hv, pid, _, _ = place
    block = gl.maximum(block, 0)
    vectors = load_vectors(
        beta_ptr, sums_ptr, block, first, b.to(gl.int64), hv, T, R, HV, NG, HAS_G, HAS_RESETS
    )
    return vectors, is_mild(sums_ptr, pid, first + block // R, NG, HAS_G)


@gluon.jit
def put_terms(ptr, of_into, of_out, by_update, by_token):
    """Writes the lines of terms of dg of a block."""
    put_line(ptr, of_into)
    put_line(ptr + 64, of_out)
    put_line(ptr + 128, by_update)
    put_line(ptr + 192, by_token)


@gluon.jit
def of_block(
    handed, arrays, q, k, scores, factor, dq, m, mild, of_sequence, SCALE: gl.constexpr,
    T: gl.constexpr, R: gl.constexpr, HV: gl.constexpr, K: gl.constexpr, NG: gl.constexpr,
    NC: gl.constexpr, SEQUENCES: gl.constexpr, HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr,
):  # fmt: skip
    """Writes the cotangents of a block, but dq of a group and dv; asks for what the next takes.

    The block's terms of dg stand from ``of_sequence`` plus its number on.

    Returns what there is of dq, and vectors of the next block and whether it is mild.
    """
    sources, outputs, tiles, lines, of_loads, of_ones, _, shared, place = handed
    _, _, dob, xb, pb, eb, sb, dsb, dyb, stage = tiles
    betas, intos, outs, tokens, _, of_updates = lines
    of_x, of_e, of_states = of_ones
    of_ds, of_dy = shared
    total, first, b, hv, pid, _, vcol = place
    DECAYS: gl.constexpr = HAS_G or HAS_RESETS
    block = total - 1 - m
    r, st, row = block % R, m % 2, (first * R + block) * 64
    # dk, and dq in the place of dv, of the block before are out.
    tma.store_wait(0)
    if m > 0:
        mbarrier.arrive(of_dy.index(1), count=1)
    mbarrier.wait(of_e.index(0), m & 1)
    mbarrier.wait(of_loads[4].index(0), (m // R) & 1)
    narrow, dq, by_token, by_update = before_dv(
        (q, dob, eb, sb), tokens, dq, scores, factor, m, r, st, nothing(m), mild,
        (of_states, of_ds), SCALE, R, K, NC, HAS_G, DECAYS,
    )  # fmt: skip
    z = nothing(m, 27)
    mbarrier.wait(of_dy.index(0), m & 1)
    # Nobody reads X or the scores any more.
    if m + 1 < total:
        before = pid * (NG * R) + first * R + block - 1
        ask_x(arrays[2], arrays[6], before, of_x.index(0), xb)
    ds_tile = pb.index(z)
    ds_tile.store(narrow)
    Z_tile = matrix(stage.index(z)).slice(K - 64, 64, dim=1)
    by_update += of_system(
        k, Z_tile, eb, dyb, betas, of_updates, outputs[2], row, T * R, b.to(gl.int64), hv, r + z, z,
        mild, R, HV, NC, HAS_G, HAS_RESETS,
    )  # fmt: skip
    fence_async_shared()
    if R == 1:
        dq = warpgroup_mma(ds_tile, k, dq, is_async=True)
    else:
        dq = warpgroup_mma(ds_tile, k, dq, use_acc=m % R > 0, is_async=True)
    out = outs.index(st).load(ROW)
    into = gl.full([64], 1.0, gl.float32, ROW)
    if DECAYS:
        into = intos.index(st).load(ROW)
    of_into, of_out, of_all, dq = of_keys(
        (q, k, eb, sb, dsb, dyb, stage), ds_tile, Z_tile, into, out, dq, m, mild,
        (eb, sb, of_e, of_states, b, pid, vcol), (of_states, of_ds), arrays, first * R + block,
        m + 1 == total, R, K, NC, SEQUENCES, HAS_G,
    )  # fmt: skip
    vectors, is_next_mild = vectors_of(sources, block - 1, place, T, R, HV, NG, HAS_G, HAS_RESETS)
    fence_async_shared()
    at = [b, row, hv * K]
    tma.async_copy_shared_to_global(outputs[1], at, stage.index(nothing(m, 21)))
    if HAS_G:
        if mild:
            by_update = of_all
            if r == 0:
                by_token = times(q, dq)
        terms = outputs[3] + (of_sequence + block) * 256
        put_terms(terms, of_into, of_out, by_update, by_token)
    return dq, vectors, is_next_mild


@gluon.jit
def find_cotangents(
    handed, arrays, SCALE: gl.constexpr, T: gl.constexpr, R: gl.constexpr, HV: gl.constexpr,
    K: gl.constexpr, NG: gl.constexpr, S: gl.constexpr, D: gl.constexpr, NC: gl.constexpr,
    SEQUENCES: gl.constexpr, HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr,
    HAS_GRADIENTS: gl.constexpr,
):  # fmt: skip
    """Scores and decays of every block for those who hold the cotangent of the state; the rest.

    Terms of dg are written for each block, [4, 64]: by update what counts from the block's first
    token up to its own, what counts behind it, and what counts from the group's first token up to
    its own; and by token what counts from the group's first up to it.
    """
    sources, outputs, tiles, lines, of_loads, of_ones, turns, _, place = handed
    qb, kb, _, xb, pb, _, _, _, dyb, stage = tiles
    betas, _, _, _, of_tokens, of_updates = lines
    full, qfull, do_empty = of_loads[0], of_loads[2], of_loads[5]
    of_x = of_ones[0]
    ready, free = turns
    total, first, b, hv, pid, _, _ = place
    P: gl.constexpr = 1 if HAS_GRADIENTS else 2
    zero = gl.zeros([64, 64], gl.float32, ACC)
    of_dq: gl.constexpr = gl.NVMMADistributedLayout([3, 0], [4, 1], [16, K, 16])
    dq = gl.zeros([64, K], gl.float32, of_dq)
    vectors, mild = vectors_of(sources, total - 1, place, T, R, HV, NG, HAS_G, HAS_RESETS)
    if total > 0:
        ask_first(arrays, tiles, of_loads, of_ones, place, R, NC, SEQUENCES, HAS_GRADIENTS, NG * R)
    of_sequence = pid.to(gl.int64) * (NG * R) + first * R
    for m in range(total):
        block = total - 1 - m
        r = block % R
        s, st, turn = m % S, m % 2, m // R
        sq, z = turn % 2, nothing(m)
        mbarrier.wait(qfull.index(sq), (turn // 2) & 1)
        mbarrier.wait(full.index(s), (m // S) & 1)
        q, k = matrix(qb.index(sq)), matrix(kb.index(s))
        scores = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(free.index(st), ((m // 2) & 1) ^ 1)
        shown = (vectors[1], vectors[4])
        if HAS_G:
            shown = quotients(vectors, mild)
        put_vectors(vectors, shown, lines, st, nothing(m, 30), True, HAS_G, HAS_RESETS)
        scores, factor = put_scores(
            q, k, pb.index(z + m % P), scores, betas, of_tokens, of_updates, r, nothing(m, 24),
            mild, SCALE, R, HAS_G, HAS_RESETS,
        )  # fmt: skip
        mbarrier.arrive(ready.index(st), count=1)
        ask_ahead(arrays, tiles, of_loads, place, m, R, S, D, NC)
        if HAS_GRADIENTS:
            dq, vectors, mild = of_block(
                handed, arrays, q, k, scores, factor, dq, m, mild, of_sequence, SCALE, T, R, HV, K,
                NG, NC, SEQUENCES, HAS_G, HAS_RESETS,
            )  # fmt: skip
            if r == 0:
                # Those who hold the cotangent of the state have written dv.
                mbarrier.wait(do_empty.index(0), turn & 1)
                at = [b, (first + block // R) * 64, hv * K]
                put_dq(outputs[0], at, dq, dyb, stage, nothing(m, 25))
                if turn + 1 < total // R:
                    ask_do(arrays, tiles, of_loads, place, first + block // R - 1, 0, NC)
        else:
            vectors, mild = vectors_of(sources, block - 1, place, T, R, HV, NG, HAS_G, HAS_RESETS)
            if m + 1 < total:
                mbarrier.wait(of_x.index(1), m & 1)
                before = pid * (NG * R) + first * R + block - 1
                ask_x(arrays[2], arrays[6], before, of_x.index(0), xb)
    if HAS_GRADIENTS:
        tma.store_wait(0)
