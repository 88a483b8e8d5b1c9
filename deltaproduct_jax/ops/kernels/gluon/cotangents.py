"""Cotangents of a block from its error, the state before it and that behind it, in Gluon.

Four warps of `walk_back`. Products of keys, queries, errors and cotangents of a block are made
once with updates as rows and once as columns: then every left operand and every sum along a row
stays in the registers that have it. Letters as in prepare.py.
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

from deltaproduct_jax.ops.kernels.gluon.parts import (
    ACC,
    COLUMN,
    ROW,
    between,
    left,
    load_vectors,
    matrix,
    nothing,
    put_vectors,
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
def put_line(ptr, x):
    """Writes 64 numbers, one a row."""
    gl.store(ptr + gl.arange(0, 64, ROW), x)


@gluon.jit
def of_system(
    k, eb, dyb, betas, of_updates, dbeta_ptr, row, rows, b, hv, r, z, R: gl.constexpr,
    HV: gl.constexpr, NC: gl.constexpr, HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr,
):  # fmt: skip
    """What multiplies keys in dk on behalf of the system of errors; its terms of dg. Writes dbeta.

    The system has the products of keys twice, once with an update as row and once as column: what
    is below the diagonal here is of the first, what is above of the second.
    """
    i_of, j_of = gl.arange(0, 64, ROW), gl.arange(0, 64, COLUMN)
    apart = i_of[:, None] != j_of[None, :]
    is_above = i_of[:, None] < j_of[None, :]
    beta = betas.load(ROW)
    weight = between(of_updates, of_updates, apart, is_above, HAS_G, HAS_RESETS)
    weight *= gl.where(is_above, -beta[:, None], -betas.load(COLUMN)[None, :])
    # One after the other: both at once do not fit into the registers.
    Z = warpgroup_mma_wait(0, deps=[over_values(dyb, eb, z, NC)])
    dbeta = gl.sum(gl.where(apart, 0.0, Z), axis=1) / beta
    at = dbeta_ptr + (b * rows + row + i_of) * HV + hv
    gl.store(at, dbeta.to(dbeta_ptr.dtype.element_ty), mask=row + i_of < rows)
    above = warpgroup_mma_wait(0, deps=[over_values(eb, dyb, z, NC)])
    Z = gl.where(is_above, above, Z) * weight
    terms = beta
    if HAS_G:
        zero = gl.zeros([64, 64], gl.float32, ACC)
        kk = warpgroup_mma(k, k.permute((1, 0)), zero, use_acc=False)
        spans = (r * 64 + i_of)[:, None] // R != (r * 64 + j_of)[None, :] // R
        kk = gl.where(spans, Z * kk, 0.0)
        terms = gl.sum(gl.where(is_above, -kk, kk), axis=1)
    return left(Z), terms


@gluon.jit
def of_keys(
    dk, stage, k, q, eb, sb, dsb, dyb, pb, Z, into, out, b, row, qcol, z,
    K: gl.constexpr,
    NC: gl.constexpr, HAS_G: gl.constexpr,
):  # fmt: skip
    """Writes dk, 64 columns at a time; what decays to the ends of the block add to dg."""
    zero = gl.zeros([64, 64], gl.float32, ACC)
    of_into, of_out = gl.zeros([64], gl.float32, ROW), gl.zeros([64], gl.float32, ROW)
    tma.store_wait(0)
    for h in gl.static_range(K // 64):
        written, read = zero, zero
        for j in gl.static_range(NC):
            ds = dsb.index(z + j).slice(h * 64, 64, dim=1)
            written = warpgroup_mma(
                matrix(eb.index(z + j)), ds, written, use_acc=j > 0, is_async=True
            )
            s = matrix(sb.index(z + j)).slice(h * 64, 64, dim=1)
            read = warpgroup_mma(matrix(dyb.index(z + j)), s, read, use_acc=j > 0, is_async=True)
        some = k.slice(h * 64, 64, dim=1)
        written, read = warpgroup_mma_wait(0, deps=[written, read])
        written *= out[:, None]
        read *= -into[:, None]
        if HAS_G:
            wide = some.load(ACC).to(gl.float32)
            of_out += gl.sum(wide * written, axis=1)
            of_into += gl.sum(wide * read, axis=1)
        x = written + read
        x = warpgroup_mma(pb, q.slice(h * 64, 64, dim=1), x, is_async=True)
        x = warpgroup_mma(Z, some, x, is_async=True)
        x = warpgroup_mma_wait(0, deps=[x])
        matrix(stage.index(z)).slice(h * 64, 64, dim=1).store(x.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(dk, [b, row, qcol], stage.index(z))
    return of_into, of_out


@gluon.jit
def of_whole_decay(sb, dsb, z, NC: gl.constexpr):
    """Products of the state before a block with the cotangent of that behind it, added up."""
    x = gl.zeros([64], gl.float32, ROW)
    for j in gl.static_range(NC):
        s = matrix(sb.index(z + j)).load(ACC).to(gl.float32)
        x += gl.sum(s * dsb.index(z + j).load(ACC).to(gl.float32), axis=1)
    return x


@gluon.jit
def of_queries(
    dq, stage, first, second, q, dob, sb, tokens, b, row, qcol, st, z, SCALE: gl.constexpr,
    K: gl.constexpr, NC: gl.constexpr, HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr,
):  # fmt: skip
    """Writes dq of a group, 64 columns at a time: what scores made of them, and reading the state.

    Returns the terms of the latter.
    """
    terms = gl.zeros([64], gl.float32, ROW)
    scale = gl.full([64], SCALE, gl.float32, ROW)
    if HAS_G or HAS_RESETS:
        scale *= tokens.index(st).load(ROW)
    tma.store_wait(0)
    for h in gl.static_range(K // 64):
        read = gl.zeros([64, 64], gl.float32, ACC)
        for j in gl.static_range(NC):
            state = matrix(sb.index(z + j)).slice(h * 64, 64, dim=1)
            do = matrix(dob.index(z + j))
            read = warpgroup_mma(do, state, read, use_acc=j > 0, is_async=True)
        read = warpgroup_mma_wait(0, deps=[read])
        read *= scale[:, None]
        if HAS_G:
            wide = q.slice(h * 64, 64, dim=1).load(ACC).to(gl.float32)
            terms += gl.sum(wide * read, axis=1)
        read += first if h == 0 else second
        matrix(stage.index(z)).slice(h * 64, 64, dim=1).store(read.to(gl.bfloat16))
    fence_async_shared()
    tma.async_copy_shared_to_global(dq, [b, row, qcol], stage.index(z))
    return terms


@gluon.jit
def of_scores(
    q, k, eb, dob, betas, of_updates, of_tokens, r, z, SCALE: gl.constexpr, R: gl.constexpr,
    NC: gl.constexpr, HAS_G: gl.constexpr, HAS_RESETS: gl.constexpr,
):  # fmt: skip
    """What multiplies queries in dk, with updates as rows; by row its terms, where spans begin."""
    i_of, j_of = gl.arange(0, 64, ROW), gl.arange(0, 64, COLUMN)
    token = (r * 64 + i_of)[:, None] // R
    upto = j_of[None, :] >= token
    factor = between(of_updates, of_tokens, upto, upto, HAS_G, HAS_RESETS)
    factor *= (SCALE * betas.load(ROW))[:, None]
    ds = warpgroup_mma_wait(0, deps=[over_values(eb, dob, z, NC)])
    ds *= factor
    terms = gl.zeros([64], gl.float32, ROW)
    if HAS_G:
        zero = gl.zeros([64, 64], gl.float32, ACC)
        scores = warpgroup_mma(k, q.permute((1, 0)), zero, use_acc=False)
        terms = gl.sum(gl.where(j_of[None, :] > token, ds * scores, 0.0), axis=1)
    return ds.to(gl.bfloat16), terms


@gluon.jit
def find_cotangents(
    handed, SCALE: gl.constexpr, T: gl.constexpr, R: gl.constexpr, HV: gl.constexpr,
    K: gl.constexpr, NG: gl.constexpr, S: gl.constexpr, NC: gl.constexpr, HAS_G: gl.constexpr,
    HAS_RESETS: gl.constexpr, HAS_GRADIENTS: gl.constexpr,
):  # fmt: skip
    """Scores and decays of every block for those who hold the cotangent of the state; the rest.

    Terms of dg are written for each block, [5, 64]: by update what counts up to its token and what
    counts behind it, by token what scores make of a block and, of a group, what reading the state
    makes, and what counts for the whole block, to be added up.
    """
    (
        beta_ptr, sums_ptr, dq, dk, dbeta_ptr, terms_ptr, qb, kb, dob, pb, eb, sb, dsb, dyb, stage,
        betas, intos, outs, tokens, of_tokens, of_updates, full, empty, qfull, qempty, of_do, of_e,
        of_states, ready, free, of_ds, of_dy, total, first, b, hv, pid,
    ) = handed  # fmt: skip
    wide = b.to(gl.int64)
    DECAYS: gl.constexpr = HAS_G or HAS_RESETS
    P: gl.constexpr = 1 if HAS_GRADIENTS else 2
    i_of, j_of = gl.arange(0, 64, ROW), gl.arange(0, 64, COLUMN)
    lines = (betas, intos, outs, tokens, of_tokens, of_updates)
    zero = gl.zeros([64, 64], gl.float32, ACC)
    first_half, second_half = zero, zero  # of dq's columns
    vectors = load_vectors(
        beta_ptr, sums_ptr, gl.maximum(total - 1, 0), first, wide, hv, T, R, HV, NG, HAS_G,
        HAS_RESETS,
    )  # fmt: skip
    for m in range(total):
        block = total - 1 - m
        r = block % R
        s, st, turn = m % S, m % 2, m // R
        sq, z = turn % 2, nothing(m)
        # Else the compiler keeps the token of every column from one use to the next.
        again = r + z
        row = (first * R + block) * 64
        mbarrier.wait(qfull.index(sq), (turn // 2) & 1)
        mbarrier.wait(full.index(s), (m // S) & 1)
        q, k = matrix(qb.index(sq)), matrix(kb.index(s))
        scores = warpgroup_mma(q, k.permute((1, 0)), zero, use_acc=False, is_async=True)
        mbarrier.wait(free.index(st), ((m // 2) & 1) ^ 1)
        put_vectors(vectors, lines, st, True, HAS_G, HAS_RESETS)
        vectors = load_vectors(
            beta_ptr, sums_ptr, gl.maximum(block - 1, 0), first, wide, hv, T, R, HV, NG, HAS_G,
            HAS_RESETS,
        )  # fmt: skip
        scores = warpgroup_mma_wait(0, deps=[scores])
        upto = i_of[:, None] >= (r * 64 + j_of)[None, :] // R
        factor = between(of_tokens, of_updates, upto, None, HAS_G, HAS_RESETS)
        factor *= SCALE * betas.load(COLUMN)[None, :]
        pb.index(z + m % P).store((scores * factor).to(gl.bfloat16))
        fence_async_shared()
        mbarrier.arrive(ready.index(st), count=1)
        if HAS_GRADIENTS:
            terms = terms_ptr + (pid.to(gl.int64) * (NG * R) + first * R + block) * 320
            mbarrier.wait(of_e.index(0), m & 1)
            mbarrier.wait(of_do.index(0), turn & 1)
            ds = over_values(dob, eb, z, NC)
            ds = warpgroup_mma_wait(0, deps=[ds])
            ds *= factor
            if HAS_G:
                spans = i_of[:, None] > (again * 64 + j_of)[None, :] // R
                put_line(terms + 128, gl.sum(gl.where(spans, ds * scores, 0.0), axis=1))
            narrow, is_more = left(ds), m % R > 0
            first_half = warpgroup_mma(
                narrow, k.slice(0, 64, dim=1), zero if R == 1 else first_half, use_acc=is_more
            )
            if K == 128:
                second_half = warpgroup_mma(
                    narrow, k.slice(64, 64, dim=1), zero if R == 1 else second_half, use_acc=is_more
                )
            mbarrier.wait(of_states.index(0), m & 1)
            of_start = gl.zeros([64], gl.float32, ROW)
            if r == 0:
                of_start = of_queries(
                    dq, stage, first_half, second_half, q, dob, sb, tokens, b,
                    (first + block // R) * 64, hv * K, st, z, SCALE, K, NC, HAS_G, HAS_RESETS,
                )  # fmt: skip
            narrow, begin = of_scores(
                q, k, eb, dob, betas, of_updates, of_tokens, again, z, SCALE, R, NC, HAS_G,
                HAS_RESETS,
            )  # fmt: skip
            if r == 0:
                mbarrier.arrive(of_do.index(1), count=1)

            mbarrier.wait(of_dy.index(0), m & 1)
            # Nobody reads the scores any more.
            pb.index(z).store(narrow)
            fence_async_shared()
            Z, of_system_g = of_system(
                k, eb, dyb, betas, of_updates, dbeta_ptr, row, T * R, wide, hv, again + z, z, R, HV,
                NC, HAS_G, HAS_RESETS,
            )  # fmt: skip
            mbarrier.wait(of_ds.index(0), m & 1)
            out = outs.index(st).load(ROW)
            into = gl.full([64], 1.0, gl.float32, ROW)
            if DECAYS:
                into = intos.index(st).load(ROW)
            of_into, of_out = of_keys(
                dk, stage, k, q, eb, sb, dsb, dyb, pb.index(z), Z, into, out, b, row, hv * K, z, K,
                NC, HAS_G,
            )  # fmt: skip
            if HAS_G:
                token = (r * 64 + i_of) // R
                is_new = (token > (r * 64 - 1) // R) | (r == 0)
                put_line(terms, of_system_g - begin + gl.where(is_new, of_into, 0.0))
                put_line(terms + 64, gl.where(token < (r * 64 + 63) // R, of_out, 0.0))
                put_line(terms + 192, of_start)
                through = intos.index(st).slice(63, 1).load(ROW)
                put_line(terms + 256, through * of_whole_decay(sb, dsb, z, NC))
            mbarrier.arrive(of_ds.index(1), count=1)
            mbarrier.arrive(of_dy.index(1), count=1)
            mbarrier.arrive(of_e.index(1), count=1)
            mbarrier.arrive(of_states.index(1), count=1)
        mbarrier.arrive(empty.index(s), count=1)
        if r == 0:
            mbarrier.arrive(qempty.index(sq), count=1)
    if HAS_GRADIENTS:
        tma.store_wait(0)
