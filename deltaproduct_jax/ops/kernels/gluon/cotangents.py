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
    ask,
    ask_columns,
    ask_rows,
    half,
    put_line,
)
from deltaproduct_jax.ops.kernels.gluon.parts import (
    ACC,
    COLUMN,
    ROW,
    is_mild,
    load_vectors,
    matrix,
    nothing,
    put_vectors,
    quotients,
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
def from_columns(x):
    """Sums of the columns of a square, as what belongs to its rows."""
    return gl.convert_layout(gl.sum(x, axis=0), ROW)


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
    below = i_of[:, None] > (j_of + z)[None, :]
    of_betas = betas.index(z).load(COLUMN)
    weight = weights(of_updates, of_updates, of_betas, below, mild, z, -1.0, HAS_G, HAS_RESETS)
    Z = warpgroup_mma_wait(0, deps=[Z])
    own = i_of[:, None] == (j_of + z)[None, :]
    dbeta = gl.sum(gl.where(own, Z, 0.0), axis=1) / betas.index(z).load(ROW)
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
    q, dob, sb, h: gl.constexpr, scale, z, mild, NC: gl.constexpr, HAS_G: gl.constexpr,
):  # fmt: skip
    """What reading the state makes of 64 columns of dq of a group; terms of dg, if not ``mild``."""
    read = warpgroup_mma_wait(0, deps=[over_columns(dob, sb, h, z, NC)])
    read *= scale[:, None]
    terms = gl.zeros([64], gl.float32, ROW)
    if HAS_G and not mild:
        terms = times(half(q, h), read)
    return read, terms


@gluon.jit
def times(tile, x):
    """Products of the rows of a tile with others."""
    return gl.sum(tile.load(ACC).to(gl.float32) * x, axis=1)


@gluon.jit
def put_scores(
    q, k, pb, scores_of, betas, of_tokens, of_updates, r, z, mild, SCALE: gl.constexpr,
    R: gl.constexpr, HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr,
):  # fmt: skip
    """What multiplies errors in outputs, into ``pb``; and its factor."""
    i_of, j_of = gl.arange(0, 64, ROW), gl.arange(0, 64, COLUMN)
    # Up to its token, of which there is one for R updates.
    upto = ((i_of + 1) * R)[:, None] > (r * 64 + j_of)[None, :]
    of_betas = betas.index(z).load(COLUMN)
    factor = weights(of_tokens, of_updates, of_betas, upto, mild, z, SCALE, HAS_G, HAS_RESETS)
    scores = warpgroup_mma_wait(0, deps=[scores_of])
    pb.store((scores * factor).to(gl.bfloat16))
    fence_async_shared()
    return scores, factor


@gluon.jit
def ask_for_block(
    handed, arrays, block, R: gl.constexpr, NC: gl.constexpr, SEQUENCES: gl.constexpr,
):  # fmt: skip
    """Begins to load errors of a block and the state before it, of which there is room for one."""
    e, states = arrays[4], arrays[5]
    eb, sb, of_e, of_states, b, pid, vcol = handed
    ask_columns(e, b, block * 64, vcol, of_e.index(0), eb, 0, NC)
    kept = ((block // 2) * SEQUENCES + pid) * 2 + block % 2
    ask_rows(states, kept, 0, of_states.index(0), sb, NC)


@gluon.jit
def before_dv(
    tiles, tokens, dq_0, dq_1, scores, factor, m, r, st, z, mild, waits,
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
        spans = (i_of * R)[:, None] > (r * 64 + j_of)[None, :]
        scores = gl.where(spans, ds * scores, 0.0)
        by_token = gl.sum(scores, axis=1)
        by_update = -from_columns(scores)
    narrow = ds.to(gl.bfloat16)
    mbarrier.wait(of_states.index(0), m & 1)
    z = nothing(m, 28)
    if r == 0:
        scale = gl.full([64], SCALE, gl.float32, ROW)
        if DECAYS:
            scale *= tokens.index(st).load(ROW)
        read, of_start = of_queries(q, dob, sb, 0, scale, z, mild, NC, HAS_G)
        by_token += of_start
        dq_0 = read if R == 1 else dq_0 + read
        if K == 128:
            read, of_start = of_queries(q, dob, sb, 1, scale, nothing(m, 23), mild, NC, HAS_G)
            by_token += of_start
            dq_1 = read if R == 1 else dq_1 + read
    mbarrier.wait(of_ds.index(0), m & 1)
    return narrow, dq_0, dq_1, by_token, by_update


@gluon.jit
def of_keys(
    tiles, ds_tile, Z_tile, into, out, m, mild, K: gl.constexpr, NC: gl.constexpr,
    HAS_G: gl.constexpr,
):  # fmt: skip
    """Puts dk of a block into ``stage``.

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
        dk, read = warpgroup_mma_wait(0, deps=[dk, read])
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
    return of_into, of_out, of_all


@gluon.jit
def put_dq(
    dq_out, at, dq_0, dq_1, dyb, stage, z, K: gl.constexpr
):  # fmt: skip
    """Writes dq of a group, by way of the tiles that dv was in."""
    tile = dyb._reinterpret(gl.bfloat16, stage.shape, stage.layout).index(z)
    half(tile, 0).store(dq_0.to(gl.bfloat16))
    if K == 128:
        half(tile, 1).store(dq_1.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(dq_out, at, tile)


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
    (
        beta_ptr, sums_ptr, dq_out, dk_out, dbeta_ptr, terms_ptr, qb, kb, dob, xb, pb, eb, sb, dsb,
        dyb, stage, betas, intos, outs, tokens, of_tokens, of_updates, full, empty, qfull, qempty,
        do_full, do_empty, of_x, of_e, of_states, ready, free, of_ds, of_dy, total, first, b, hv,
        pid, qcol, vcol,
    ) = handed  # fmt: skip
    q_in, k_in, x_in, do_in = arrays[0], arrays[1], arrays[2], arrays[3]
    of_block = (eb, sb, of_e, of_states, b, pid, vcol)
    wide = b.to(gl.int64)
    DECAYS: gl.constexpr = HAS_G or HAS_RESETS
    P: gl.constexpr = 1 if HAS_GRADIENTS else 2
    lines = (betas, intos, outs, tokens, of_tokens, of_updates)
    zero = gl.zeros([64, 64], gl.float32, ACC)
    dq_0, dq_1 = zero, zero
    vectors = load_vectors(
        beta_ptr, sums_ptr, gl.maximum(total - 1, 0), first, wide, hv, T, R, HV, NG, HAS_G,
        HAS_RESETS,
    )  # fmt: skip
    mild = is_mild(sums_ptr, pid, first + gl.maximum(total - 1, 0) // R, NG, HAS_G)
    if total > 0:
        last = first * R + total - 1
        ask(q_in, [b, last // R * 64, qcol], qfull.index(0), qb.index(0))
        ask(k_in, [b, last * 64, qcol], full.index(0), kb.index(0))
        ask_rows(x_in, pid, last * 128, of_x.index(0), xb, 2)
        ask_columns(do_in, b, last // R * 64, vcol, do_full.index(0), dob, 0, NC)
        if HAS_GRADIENTS:
            ask_for_block(of_block, arrays, last, R, NC, SEQUENCES)
    for m in range(total):
        block = total - 1 - m
        r = block % R
        s, st, turn = m % S, m % 2, m // R
        sq, d, z = turn % 2, turn % D, nothing(m)
        row = (first * R + block) * 64
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
        if m + 1 < total:
            after = (m + 1) % S
            mbarrier.wait(empty.index(after), (((m + 1) // S) & 1) ^ 1)
            ask(k_in, [b, row - 64, qcol], full.index(after), kb.index(after))
        has_more = turn + 1 < total // R
        if (m % R == 0) & has_more:
            here = (first + block // R - 1) * 64
            mbarrier.wait(qempty.index(sq ^ 1), (((turn + 1) // 2) & 1) ^ 1)
            ask(q_in, [b, here, qcol], qfull.index(sq ^ 1), qb.index(sq ^ 1))
            if D == 2:
                mbarrier.wait(do_empty.index(d ^ 1), (((turn + 1) // 2) & 1) ^ 1)
                ask_columns(do_in, b, here, vcol, do_full.index(d ^ 1), dob, (d ^ 1) * NC, NC)
        if HAS_GRADIENTS:
            terms = terms_ptr + (pid.to(gl.int64) * (NG * R) + first * R + block) * 256
            # dk, and dq in the place of dv, of the block before are out.
            tma.store_wait(0)
            if m > 0:
                mbarrier.arrive(of_dy.index(1), count=1)
            mbarrier.wait(of_e.index(0), m & 1)
            mbarrier.wait(do_full.index(0), turn & 1)
            narrow, dq_0, dq_1, by_token, by_update = before_dv(
                (q, dob, eb, sb), tokens, dq_0, dq_1, scores, factor, m, r, st, z, mild,
                (of_states, of_ds), SCALE, R, K, NC, HAS_G, DECAYS,
            )  # fmt: skip
            z = nothing(m, 27)
            mbarrier.wait(of_dy.index(0), m & 1)
            # Nobody reads X or the scores any more.
            if m + 1 < total:
                ask_rows(x_in, pid, 2 * row - 128, of_x.index(0), xb, 2)
            ds_tile = pb.index(z)
            ds_tile.store(narrow)
            Z_tile = matrix(stage.index(z)).slice(K - 64, 64, dim=1)
            by_update += of_system(
                k, Z_tile, eb, dyb, betas, of_updates, dbeta_ptr, row, T * R, wide, hv, r + z, z,
                mild, R, HV, NC, HAS_G, HAS_RESETS,
            )  # fmt: skip
            fence_async_shared()
            if R == 1:
                dq_0 = warpgroup_mma(ds_tile, half(k, 0), dq_0)
                if K == 128:
                    dq_1 = warpgroup_mma(ds_tile, half(k, 1), dq_1)
            else:
                dq_0 = warpgroup_mma(ds_tile, half(k, 0), dq_0, use_acc=(m % R > 0))
                if K == 128:
                    dq_1 = warpgroup_mma(ds_tile, half(k, 1), dq_1, use_acc=(m % R > 0))
            out = outs.index(st).load(ROW)
            into = gl.full([64], 1.0, gl.float32, ROW)
            if DECAYS:
                into = intos.index(st).load(ROW)
            of_into, of_out, of_all = of_keys(
                (q, k, eb, sb, dsb, dyb, stage), ds_tile, Z_tile, into, out, m, mild, K, NC, HAS_G
            )
            fence_async_shared()
            tma.async_copy_shared_to_global(dk_out, [b, row, hv * K], stage.index(nothing(m, 21)))
            mbarrier.arrive(of_ds.index(1), count=1)
            if HAS_G:
                mbarrier.wait(of_states.index(1), m & 1)
            if m + 1 < total:
                ask_for_block(of_block, arrays, first * R + block - 1, R, NC, SEQUENCES)
            if HAS_G:
                if mild:
                    by_update = of_all
                    if r == 0:
                        by_token = times(half(q, 0), dq_0)
                        if K == 128:
                            by_token += times(half(q, 1), dq_1)
                put_line(terms, of_into)
                put_line(terms + 64, of_out)
                put_line(terms + 128, by_update)
                put_line(terms + 192, by_token)
            vectors = load_vectors(
                beta_ptr, sums_ptr, gl.maximum(block - 1, 0), first, wide, hv, T, R, HV, NG, HAS_G,
                HAS_RESETS,
            )  # fmt: skip
            mild = is_mild(sums_ptr, pid, first + gl.maximum(block - 1, 0) // R, NG, HAS_G)
            z = nothing(m, 25)
            if r == 0:
                # Those who hold the cotangent of the state have written dv.
                mbarrier.wait(do_empty.index(0), turn & 1)
                at = [b, (first + block // R) * 64, hv * K]
                put_dq(dq_out, at, dq_0, dq_1, dyb, stage, z, K)
                if has_more:
                    here = (first + block // R - 1) * 64
                    ask_columns(do_in, b, here, vcol, do_full.index(0), dob, 0, NC)
        else:
            vectors = load_vectors(
                beta_ptr, sums_ptr, gl.maximum(block - 1, 0), first, wide, hv, T, R, HV, NG, HAS_G,
                HAS_RESETS,
            )  # fmt: skip
            mild = is_mild(sums_ptr, pid, first + gl.maximum(block - 1, 0) // R, NG, HAS_G)
            if m + 1 < total:
                mbarrier.wait(of_x.index(1), m & 1)
                ask_rows(x_in, pid, 2 * row - 128, of_x.index(0), xb, 2)
    if HAS_GRADIENTS:
        tma.store_wait(0)
