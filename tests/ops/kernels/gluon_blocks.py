"""What the Gluon kernels compute, block by block, with their roundings, in NumPy.

Products take operands rounded to bfloat16 and add up in float32; all else is float32, and sums of
gates float64. Nothing here is fast. Names as in deltaproduct_jax/ops/kernels/gluon: a group is 64
tokens and R blocks of 64 updates. Arrays have one axis of heads in front, those of the values.
"""

from typing import NamedTuple

import ml_dtypes
import numpy as np

from deltaproduct_jax.ops.kernels.gluon import gates

SIZE = 64
LEAST_BETA = np.float32(2.0**-64)
FORGETS = -1e4
MILD = gates.MILD
LOWER = np.tril(np.ones((SIZE, SIZE), bool), -1)
f32 = np.float32


def rounded(x):
    """To bfloat16 and back."""
    return np.asarray(x, f32).astype(ml_dtypes.bfloat16).astype(f32)


def two_terms(x):
    """Two numbers of bfloat16, the first cut off."""
    high = (np.ascontiguousarray(x, f32).view(np.int32) & np.int32(-65536)).view(f32)
    return high, rounded(x - high)


def turned(x):
    """The transposed of matrices."""
    return np.swapaxes(x, -1, -2)


class Head(NamedTuple):
    """Inputs, padded to whole groups: tokens [N, T, .], updates [N, T R, .]."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    beta: np.ndarray
    g: np.ndarray | None
    resets: np.ndarray | None
    R: int
    scale: float


class Sums(NamedTuple):
    """Of gates, in two parts, and of resets, at positions of a group."""

    high: np.ndarray
    low: np.ndarray
    segments: np.ndarray

    def at(self, position):
        """At these tokens of the group."""
        return Sums(*(x[:, position] for x in self))


def decay(to: Sums, start: Sums, mask=True):
    """Between positions that are broadcast; 0 outside of ``mask`` and across segments."""
    mask = mask & (to.segments == start.segments)
    sums = (to.high - start.high) + (to.low - start.low)
    return np.where(mask, np.exp(np.where(mask, sums, f32(0))), f32(0))


def rows(sums: Sums):
    """As rows of a matrix."""
    return Sums(*(x[:, :, None] for x in sums))


def columns(sums: Sums):
    """As columns of a matrix."""
    return Sums(*(x[:, None, :] for x in sums))


def gate_sums(head: Head, n: int) -> Sums:
    """Sums from the start of group n on."""
    part = slice(n * SIZE, (n + 1) * SIZE)
    zero = np.zeros((len(head.q), SIZE), f32)
    high, low, segments = zero, zero, zero
    if head.g is not None:
        total = np.cumsum(np.maximum(head.g[:, part], FORGETS).astype(np.float64), axis=1)
        high = total.astype(f32)
        low = (total - high).astype(f32)
    if head.resets is not None:
        segments = np.cumsum(head.resets[:, part].astype(f32), axis=1)
    return Sums(high, low, segments)


class Block(NamedTuple):
    """What a walk needs of block r of a group, but for states."""

    k: np.ndarray
    v: np.ndarray
    beta: np.ndarray
    into: np.ndarray
    out: np.ndarray
    tokens: np.ndarray
    between: np.ndarray  # from columns to rows, either way: its lower half and its upper
    within: np.ndarray  # from updates, columns, to tokens, rows
    token: np.ndarray  # of each update
    before: int  # the token that the block before ends with


def block(head: Head, n: int, r: int) -> Block:
    """Block r of group n."""
    R, i = head.R, np.arange(SIZE)
    part = slice((n * R + r) * SIZE, (n * R + r + 1) * SIZE)
    sums = gate_sums(head, n)
    token, before = (r * SIZE + i) // R, (r * SIZE - 1) // R if r else -1
    at, last = sums.at(token), sums.at(np.full(SIZE, (r * SIZE + SIZE - 1) // R))
    start = sums.at(np.full(SIZE, max(before, 0)))
    if not r:
        start = Sums(*(np.zeros_like(x) for x in start))
    nothing = Sums(*(np.zeros_like(x) for x in sums))
    low = decay(rows(at), columns(at), LOWER)
    beta = head.beta[:, part]
    return Block(
        head.k[:, part],
        head.v[:, part],
        np.where(np.abs(beta) < LEAST_BETA, LEAST_BETA, beta),
        decay(at, start),
        decay(last, at),
        decay(sums, nothing),
        low + turned(low),
        decay(rows(sums), columns(at), i[:, None] >= token[None, :]),
        token,
        before,
    )


def inverse(b: Block):
    """X beta of a block with decays, in two terms: halves by substitution, then what is below."""
    gram = b.k @ turned(b.k)
    half, X = SIZE // 2, np.zeros_like(gram)
    for first in (slice(0, half), slice(half, SIZE)):
        F = gram[:, first, first]
        x = np.where(LOWER[first, first], F * b.beta[:, None, first], f32(0))
        for i in range(half - 1):
            step = F[:, :, i, None] * (b.beta[:, first][:, i, None, None] * x[:, None, i])
            x = np.where((np.arange(half) > i)[:, None], x - step, x)
        X[:, first, first] = x
    upper, under = slice(0, half), slice(half, SIZE)
    product = gram[:, under, upper] * b.beta[:, None, upper]
    product += three_products(two_terms(product), two_terms(-X[:, upper, upper]))
    product += three_products(two_terms(-X[:, under, under]), two_terms(product))
    X[:, under, upper] = product
    return two_terms(np.where(LOWER, X * b.between, f32(0)))


def three_products(x, y):
    """Of two terms each, but for that of both second ones."""
    return x[0] @ y[0] + x[0] @ y[1] + x[1] @ y[0]


def scores(head: Head, b: Block, q):
    """What multiplies errors, [tokens, updates]: with decays, scale and beta; and its factor."""
    factor = f32(head.scale) * b.within * b.beta[:, None]
    return factor * (q @ turned(b.k)), factor


def told(head: Head):
    """By head whether anything of a query is not finite: of products with keys some tell.

    What a thread looks at: of each row, a token, the columns that are left of four halves.
    """
    seen = np.zeros((len(head.q), SIZE, 4), f32)
    for m in range(head.k.shape[1] // SIZE):
        q, k = (x[:, n * SIZE : (n + 1) * SIZE] for x, n in ((head.q, m // head.R), (head.k, m)))
        seen += (q @ turned(k))[:, :, :8:2] * f32(0)
    return np.isnan(seen).any(axis=(1, 2))


class Kept(NamedTuple):
    """What the forward pass keeps of a block."""

    state: np.ndarray
    error: np.ndarray
    x: tuple[np.ndarray, np.ndarray]


def forward(head: Head, state):
    """Outputs, the final state, and what is kept, by block."""
    S, outputs, kept = state.astype(f32), [], []
    for n in range(head.q.shape[1] // SIZE):
        q = head.q[:, n * SIZE : (n + 1) * SIZE]
        for r in range(head.R):
            b, narrow = block(head, n, r), rounded(S)
            x = inverse(b)
            if r == 0:
                o = f32(head.scale) * (q @ narrow) * b.tokens[:, :, None]
            rhs = b.v - b.into[:, :, None] * (b.k @ narrow)
            e = rhs - (x[0] @ rounded(rhs) + x[1] @ rounded(rhs))
            kept.append(Kept(narrow, rounded(e), x))
            written = rounded(e * (b.out * b.beta)[:, :, None])
            S = S * b.into[:, -1, None, None] + turned(b.k) @ written
            o = o + rounded(scores(head, b, q)[0]) @ rounded(e)
        outputs.append(rounded(o))
    return np.concatenate(outputs, axis=1), S, kept


class Gradients(NamedTuple):
    """Cotangents of the inputs, padded as they are."""

    q: np.ndarray
    k: np.ndarray
    v: np.ndarray
    beta: np.ndarray
    g: np.ndarray
    state: np.ndarray


def backward(head: Head, kept: list[Kept], do, dstate) -> Gradients:
    """From the last block to the first; dS goes along as the state does in `forward`."""
    dS, R, after = dstate.astype(f32), head.R, None
    q, k, v, beta, g = (np.zeros(x.shape, f32) for x in (*head[:4], head.q[:, :, 0]))
    for n in reversed(range(head.q.shape[1] // SIZE)):
        of = slice(n * SIZE, (n + 1) * SIZE)
        strong, of_updates = 0.0, []
        for r in reversed(range(R)):
            m = n * R + r
            part, b = slice(m * SIZE, (m + 1) * SIZE), block(head, n, r)
            dy, before = chain(head, b, kept[m], head.q[:, of], do[:, of], dS, is_first=r == 0)
            v[:, part] = dy
            one = gradients(head, b, kept[m], head.q[:, of], do[:, of], rounded(dS), dy, r == 0)
            q[:, of] += one[0]
            k[:, part], beta[:, part] = one[1:3]
            strong = strong + spanned(b, one[3])
            of_updates = [(b.token, one[4]), *of_updates]
            dS = before
        mild, whole = spanned_by_mild(
            of_updates,
            np.sum(head.q[:, of] * q[:, of], axis=2),
            after,
            np.sum(kept[n * R].state * dS, axis=(1, 2)),
        )
        is_mild = gate_sums(head, n).high[:, -1:] >= MILD
        g[:, of] = np.where(is_mild, mild, strong)
        after = whole
    return Gradients(rounded(q), rounded(k), v, beta, g, dS)


def spanned_by_mild(of_updates, of_tokens, after, before):
    """Cotangents of the gates of a group where all of them are mild, and ``before``.

    Of decays that lead to a position, less those from there: what is behind a gate counts for it,
    and what there is behind the group, which is what was before it but for that.
    """
    u = np.arange(SIZE)
    dg = of_tokens @ (u[:, None] >= u).astype(f32)
    for token, terms in of_updates:
        dg = dg + terms @ (token[:, None] >= u).astype(f32)
    if after is None:
        after = before - of_tokens.sum(axis=1) - sum(x.sum(axis=1) for _, x in of_updates)
    return dg + after[:, None], before


def chain(head: Head, b: Block, kept: Kept, q, do, dS, *, is_first: bool):
    """What must wait for the cotangent of the state behind a block: dv, and that before it."""
    outs = (b.out * b.beta)[:, :, None]
    p = rounded(scores(head, b, q)[0])
    rhs = outs * (b.k @ rounded(dS)) + turned(p) @ do
    dy = rhs - (turned(kept.x[0]) @ rounded(rhs) + turned(kept.x[1]) @ rounded(rhs))
    dS = dS * b.into[:, -1, None, None] - turned(b.k) @ rounded(b.into[:, :, None] * dy)
    if is_first:
        dS = dS + turned(q) @ rounded(f32(head.scale) * b.tokens[:, :, None] * do)
    return rounded(dy), dS


class Terms(NamedTuple):
    """Cotangents of the logarithms of decays, where they are added up; see `spanned`."""

    of_updates: np.ndarray
    of_out: np.ndarray
    of_tokens: np.ndarray
    of_start: np.ndarray
    of_all: np.ndarray


def gradients(head: Head, b: Block, kept: Kept, q, do, dS, dy, is_first: bool):
    """Cotangents of q (a block's share), k, beta and the terms of g's."""
    e, S, token = kept.error, kept.state, b.token
    _, factor = scores(head, b, q)
    dA = factor * (do @ turned(e))
    spans = np.arange(SIZE)[:, None] > token[None, :]
    terms = np.where(spans, dA * (q @ turned(b.k)), f32(0))
    of_tokens, begin = terms.sum(axis=2), terms.sum(axis=1)
    dq, of_start = rounded(dA) @ b.k, np.zeros_like(of_tokens)
    if is_first:
        read = f32(head.scale) * b.tokens[:, :, None] * (do @ turned(S))
        of_start, dq = np.sum(q * read, axis=2), dq + read

    G = dy @ turned(e)
    dbeta = np.einsum("nii->ni", G) / b.beta
    weight = b.between * np.where(LOWER, b.beta[:, None, :], b.beta[:, :, None])
    Z = -weight * np.where(LOWER, G, turned(G))
    of_keys = np.where(token[:, None] != token[None, :], Z * (b.k @ turned(b.k)), f32(0))
    of_updates = np.where(LOWER, of_keys, -of_keys).sum(axis=2) - begin
    w, read = e @ turned(dS), dy @ turned(S)
    of_out = b.out * b.beta * np.sum(b.k * w, axis=2)
    of_out = np.where(token < token[-1], of_out, f32(0))
    of_into = -b.into * np.sum(b.k * read, axis=2)
    of_updates = of_updates + np.where(token > b.before, of_into, f32(0))
    below = rounded(np.where(LOWER, Z, f32(0)))
    to = below @ b.k - read * b.into[:, :, None]
    since = w * (b.out * b.beta)[:, :, None] + turned(rounded(dA)) @ q + turned(below) @ b.k
    of_all = b.into[:, -1, None] * np.sum(S * dS, axis=1)
    terms = Terms(of_updates, of_out, of_tokens, of_start, of_all)
    return dq, to + since, dbeta, terms, np.sum(b.k * (to - since), axis=2)


def spanned(b: Block, terms: Terms):
    """Every term counts for the tokens that its decay spans."""
    u, last = np.arange(SIZE), b.token[-1]
    inside = (u > b.before)[:, None]
    dg = terms.of_updates @ turned(inside & (u[:, None] <= b.token[None, :])).astype(f32)
    dg += terms.of_out @ turned((u[:, None] > b.token) & (u <= last)[:, None]).astype(f32)
    dg += terms.of_tokens @ turned(inside & (u[:, None] <= u[None, :])).astype(f32)
    dg += terms.of_start @ turned(u[:, None] <= u[None, :]).astype(f32)
    return dg + terms.of_all.sum(axis=1, keepdims=True) * (inside[:, 0] & (u <= last))
