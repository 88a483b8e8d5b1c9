"""The cotangent of gates from the terms of `walk_back`, in Triton. Letters as in prepare.py."""

import triton
import triton.language as tl

from deltaproduct_jax.ops.kernels.triton.ids import program_ids


@triton.jit
def gate_cotangents(
    terms_ptr, wholes_ptr, sums_ptr,
    dg_ptr,
    T: tl.constexpr, R: tl.constexpr, RP: tl.constexpr, HV: tl.constexpr, NC: tl.constexpr,
    NG: tl.constexpr, MILD: tl.constexpr, GX: tl.constexpr = 0, GY: tl.constexpr = 0,
):  # fmt: skip
    """Of the 64 tokens of a group: every term of a decay counts for the tokens that it spans.

    Terms [B, HV, NG, R, 4, 64] are as `find_cotangents` writes them. Wholes [B, HV, NG, R + 1, NC]
    are states before blocks times the cotangents of those behind, with the decay between, and at
    last states before groups times their cotangents. RP is R, rounded up to a power of two.
    """
    n, pid, _ = program_ids(GX, GY)
    b, hv = pid // HV, pid % HV
    group = pid.to(tl.int64) * NG + n
    terms = terms_ptr + group * (R * 256)
    u, j = tl.arange(0, 64), tl.arange(0, RP)
    c = u[:, None] * R + j[None, :]
    real = (j < R)[None, :]
    of_updates = tl.load(terms + (c // 64) * 256 + 128 + c % 64, mask=real, other=0.0)
    of_tokens = tl.load(terms + j[None, :] * 256 + 192 + u[:, None], mask=real, other=0.0)
    each = tl.sum(of_updates + of_tokens, axis=1)
    dg = tl.cumsum(each, axis=0, reverse=True)
    wholes = wholes_ptr + group * ((R + 1) * NC)
    parts = tl.arange(0, NC)
    if tl.load(sums_ptr + group * 192 + 63) >= MILD:
        # All that leaves the group.
        if n + 1 < NG:
            dg += tl.sum(tl.load(wholes + (2 * R + 1) * NC + parts), axis=0)
        else:
            dg += tl.sum(tl.load(wholes + R * NC + parts), axis=0) - tl.sum(each, axis=0)
    else:
        for r in tl.static_range(R):
            token, last = (r * 64 + u) // R, (r * 64 + 63) // R
            before = (r * 64 + R - 1) // R - 1  # that the block before ends with
            upto, out = tl.load(terms + r * 256 + u), tl.load(terms + r * 256 + 64 + u)
            inside = (u > before) & (u <= last)
            reaches = u[None, :] <= token[:, None]
            spanned = tl.sum(tl.where(reaches, upto[:, None], out[:, None]), axis=0)
            # What decays over the whole block, too.
            spanned += tl.sum(tl.load(wholes + r * NC + parts), axis=0)
            dg += tl.where(inside, spanned, 0.0)
    at = n * 64 + u
    row = b.to(tl.int64) * T + at
    tl.store(dg_ptr + row * HV + hv, dg.to(dg_ptr.dtype.element_ty), mask=at < T)
