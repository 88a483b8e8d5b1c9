"""Bodies of the TPU kernels of short convolutions, in Pallas: SiLU and unit length with them.

A program has all channels of a block of tokens and works on 128 of them, the lanes of a register,
at a time, with tokens along sublanes. A block is read as projections write it, [tokens, C], and
written as the op reads it, one row of 128 channels after another, [tokens * C / 128, 128], which
lies in HBM as heads of 128 do. In between it is float32 in scratch memory, where a row may start
anywhere: shifted by a token, or at every (C / 128)-th row.

Blocks of a sequence come in order. Forwards the last inputs of a block wait in scratch memory for
the next one. Backwards, from the last block, the first cotangents do, and what stands before a
block is read again.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from deltaproduct_jax.ops.precision import L2NORM_EPSILON

LANES = 128
EDGE = 8  # rows of a register, of which the last W - 1 are the inputs before a block
VIEW = 16  # rows that are read of the block before: a tile of bfloat16


class Call(NamedTuple):
    """What a kernel and its caller both know.

    Attributes:
      tokens: of a block, a multiple of 16.
      blocks: of a sequence.
      length: tokens of a sequence.
      groups: of 128 channels.
      taps: W.
      silu: whether the sum of taps goes through SiLU.
      width: channels that are divided by their length together, or None.
      at_once: heads in a turn of the loop; they wait less for each other.
      packed: whether there are segments.
      narrow: whether arrays are bfloat16, of which no single row can be read or written.
      interpret: run on a CPU.
    """

    tokens: int
    blocks: int
    length: int
    groups: int
    taps: int
    silu: bool
    width: int | None
    at_once: int
    packed: bool
    narrow: bool
    interpret: bool

    @property
    def together(self) -> int:
        """Groups that are worked on together: those of a head."""
        return max(1, (self.width or LANES) // LANES)

    @property
    def heads(self) -> int:
        """Of a token, or groups of smaller ones."""
        return self.groups // self.together


class Scratch(NamedTuple):
    """References to vector memory, float32."""

    x: Any  # [at_once, together, EDGE + tokens, LANES], inputs after those before them
    edge: Any  # [groups, EDGE, LANES]: forwards the last inputs, backwards the first cotangents
    rows: Any  # [tokens * groups, LANES], outputs or their cotangents as the op has them
    codes: Any  # [tokens, LANES], what `codes_of` makes, alike in all lanes
    dz: Any = (
        None  # [at_once, tokens + EDGE, LANES], cotangents of sums of taps before those behind them
    )


def forward(*refs, call: Call):
    """Outputs of a block: u, before, taps, [codes,] y, scratch memory."""
    (u, before, taps, *codes), (y, *scratch) = refs[: 3 + call.packed], refs[3 + call.packed :]
    scratch = Scratch(*scratch)

    @pl.when(pl.program_id(1) == 0)
    def _():
        for group in range(call.groups):
            scratch.edge[group] = before[0, :, group * LANES : (group + 1) * LANES]

    load_codes(call, codes, scratch)
    rows = scratch.rows if call.narrow else y.at[0]

    def head(i, slot):
        outputs = []
        for j in range(call.together):
            group = i * call.together + j
            x = scratch.x.at[slot, j]
            x[:EDGE] = scratch.edge[group]
            load(call, u, group, x)
            scratch.edge[group] = x[call.tokens :]
            outputs.append(activated(call, summed(call, scratch, x, taps, group))[0])
        inverse = inverse_length(call, outputs)
        for j, x in enumerate(outputs):
            x = x if inverse is None else x * inverse
            group = i * call.together + j
            rows[pl.ds(group, call.tokens, stride=call.groups), :] = x

    over_heads(call, head)
    if call.narrow:
        y[0] = rows[...].astype(y.dtype)


def backward(*refs, call: Call):
    """Cotangents of a block: u, view, before, taps, [codes,] dy, du, dtaps, scratch memory.

    ``view`` holds the inputs before the block, where it is not the first. To ``dtaps`` [W, C] every
    block of a sequence adds.
    """
    (u, view, before, taps, *codes), refs = refs[: 4 + call.packed], refs[4 + call.packed :]
    dy, du, dtaps, *scratch = refs
    scratch = Scratch(*scratch)
    block = call.blocks - 1 - pl.program_id(1)

    @pl.when(pl.program_id(1) == 0)
    def _():
        scratch.edge[...] = jnp.zeros(scratch.edge.shape, jnp.float32)
        dtaps[...] = jnp.zeros(dtaps.shape, jnp.float32)

    load_codes(call, codes, scratch)
    rows = scratch.rows if call.narrow else dy.at[0]
    if call.narrow:
        rows[...] = dy[0].astype(jnp.float32)
    is_first = block == 0
    inside = None
    if call.length % call.tokens:
        token = jax.lax.broadcasted_iota(jnp.int32, (call.tokens, LANES), 0)
        inside = token < call.length - block * call.tokens

    def head(i, slot):
        cotangents, outputs, slopes = [], [], []
        for j in range(call.together):
            group = i * call.together + j
            lanes = lanes_of(group)
            past = view[0, :, lanes].astype(jnp.float32)[VIEW - EDGE :]
            x = scratch.x.at[slot, j]
            x[:EDGE] = jnp.where(is_first, before[0, :, lanes], past)
            load(call, u, group, x, inside)
            y, slope = activated(call, summed(call, scratch, x, taps, group), slope=True)
            outputs.append(y)
            slopes.append(slope)
            cotangents.append(rows[pl.ds(group, call.tokens, stride=call.groups), :])
        inverse = inverse_length(call, outputs)
        if inverse is not None:
            outputs = [y * inverse for y in outputs]
            along = lengths(call, [x * y for x, y in zip(cotangents, outputs, strict=True)])
            cotangents = [
                inverse * (x - y * along) for x, y in zip(cotangents, outputs, strict=True)
            ]
        for j, (dz, slope) in enumerate(zip(cotangents, slopes, strict=True)):
            group = i * call.together + j
            dz = dz if slope is None else dz * slope
            dz = dz if inside is None else jnp.where(inside, dz, 0)
            ahead = scratch.dz.at[slot]
            ahead[: call.tokens] = dz
            ahead[call.tokens :] = scratch.edge[group]
            scratch.edge[group] = dz[:EDGE]
            total = None
            for back in range(call.taps):
                x = scratch.x[slot, j, EDGE - back : EDGE - back + call.tokens]
                x = same(call, scratch, x, back)
                place = call.taps - 1 - back
                added = jnp.sum(dz * x, axis=0, keepdims=True)
                dtaps[0, place : place + 1, lanes_of(group)] += added
                term = same(call, scratch, ahead[back : back + call.tokens], -back)
                term *= tap(taps, place, group)
                total = term if total is None else total + term
            du[0, :, lanes_of(group)] = total.astype(du.dtype)

    over_heads(call, head)


def over_heads(call: Call, head) -> None:
    """``head(i, slot)`` for every head i, each of a turn of the loop with scratch of its own."""
    turns = call.heads // call.at_once

    def turn(n, _):
        for slot in range(call.at_once):
            head(n * call.at_once + slot, slot)

    jax.lax.fori_loop(0, turns, turn, None)
    for slot in range(call.heads - turns * call.at_once):
        head(turns * call.at_once + slot, slot)


def lanes_of(group):
    """The channels of a group."""
    return pl.ds(pl.multiple_of(group * LANES, LANES), LANES)


def tap(taps, place: int, group):
    """One tap of a group [1, LANES]."""
    return taps[place : place + 1, lanes_of(group)]


def load(call: Call, u, group, x, inside=None) -> None:
    """Puts a group of a block behind what stands before it."""
    values = u[0, :, lanes_of(group)].astype(jnp.float32)
    x[EDGE:] = values if inside is None else jnp.where(inside, values, 0)


def load_codes(call: Call, codes, scratch: Scratch) -> None:
    """Turns the codes of tokens [1, tokens] around."""
    if call.packed:
        row = jnp.broadcast_to(codes[0][0, 0], (LANES, call.tokens))
        scratch.codes[...] = row.T.astype(jnp.int32)


def codes_of(run: jax.Array, past: jax.Array, taps: int) -> jax.Array:
    """What every token [B, T] has beside it, a bit each, as float32.

    Bit i - 1 says that the i-th token before it is of its segment, bit W + i - 2 the i-th behind.
    """
    T, tail = run.shape[1], taps - 1
    ahead = jnp.pad(run, ((0, 0), (0, tail)), mode="edge")  # its cotangents are 0
    extended = jnp.concatenate([past, ahead], axis=1)
    code = jnp.zeros(run.shape, jnp.int32)
    for i in range(1, taps):
        earlier, later = extended[:, tail - i :][:, :T], extended[:, tail + i :][:, :T]
        code += (earlier == run) * 2 ** (i - 1) + (later == run) * 2 ** (tail + i - 1)
    return code.astype(jnp.float32)


def same(call: Call, scratch: Scratch, x: jax.Array, back: int) -> jax.Array:
    """``x`` of a token so far back, or ahead where negative, if it is of one segment; else 0."""
    if not call.packed or back == 0:
        return x
    bit = back - 1 if back > 0 else call.taps - 2 - back
    return jnp.where((scratch.codes[...] & 2**bit) != 0, x, 0)


def summed(call: Call, scratch: Scratch, x, taps, group) -> jax.Array:
    """The sum of taps of a group that `load` loaded, the earliest first."""
    total = None
    for place in range(call.taps):
        back = call.taps - 1 - place
        term = same(call, scratch, x[EDGE - back : EDGE - back + call.tokens], back)
        term *= tap(taps, place, group)
        total = term if total is None else total + term
    return total


def activated(call: Call, z: jax.Array, slope: bool = False):
    """The activation of z, and if asked for its slope, None where that is 1."""
    if not call.silu:
        return z, None
    s = jax.nn.sigmoid(z)
    y = z * s
    return y, s + y * (1 - s) if slope else None


def inverse_length(call: Call, outputs: list[jax.Array]) -> jax.Array | None:
    """One over the length of every token's head, or heads, whose groups these are."""
    if call.width is None:
        return None
    return jax.lax.rsqrt(lengths(call, [y * y for y in outputs]) + L2NORM_EPSILON)


def lengths(call: Call, terms: list[jax.Array]) -> jax.Array:
    """Sums over the channels of each head, [tokens, 1] or, of several heads, [tokens, LANES]."""
    total = sum(terms[1:], start=terms[0])
    if call.width >= LANES:
        return jnp.sum(total, axis=-1, keepdims=True)
    # No product with zeros and ones, in which a head that is not finite would reach the others.
    head = jax.lax.broadcasted_iota(jnp.int32, total.shape, 1) // call.width
    sums = jnp.zeros_like(total)
    for i in range(LANES // call.width):
        here = jnp.sum(jnp.where(head == i, total, 0), axis=-1, keepdims=True)
        sums = jnp.where(head == i, here, sums)
    return sums
