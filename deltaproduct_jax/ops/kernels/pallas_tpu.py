"""The op for TPU: Pallas kernels that walk the chunks of a sequence with the state in VMEM.

A `lax.scan` over chunks sends the state, the pseudo-values and the triangular inverse through HBM
for every chunk; here they never leave the core. The grid is (sequence, block of heads, span); spans
come one after the other, forwards, or backwards in the backward pass, and the state of all heads of
the block, or its cotangent, stays in scratch memory. README.md beside this file has the schedule,
its memory, and what was tried.

Shape suffixes as in pallas_chunk.py; N spans of C tokens each, cut into chunks of ``chunk``.

Sources: the chunked form of ops/README.md. That several heads have to share a program was seen in
the gated delta rule kernels of MaxText and Levanter, which have one factor a token.
"""

import functools
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deltaproduct_jax.ops.kernels import Options
from deltaproduct_jax.ops.kernels.pallas_chunk import (
    Chunk,
    chunk_backward,
    errors,
    next_state,
    outputs,
    prepare,
)
from deltaproduct_jax.ops.kernels.pallas_products import BASE, Passes
from deltaproduct_jax.ops.layout import Tokens, pad

# Updates in a chunk where products are float32: more, and the rounding of k_m . k_n, which adds up
# coherently where keys agree and beta is near 2, would show (README.md of ops).
WIDE_UPDATES = 32
MOST_FACTORS = 8
WIDEST_KEY, WIDEST_VALUE = 256, 512
# A block of heads is this many key heads, the rows of a register, or all of them.
HEADS_IN_BLOCK = 8
# Bytes for matrices of the heads that are worked on together; the rest of a core's vector memory,
# 16 MiB on the smallest generation, holds blocks, twice, and states.
WORKING_BYTES = 7 * 2**20
VECTOR_MEMORY = 16 * 2**20


class Plan(NamedTuple):
    """How the sequence and the heads are cut.

    Attributes:
      span: tokens of a program.
      chunk: tokens in a chunk; divides ``span``.
      spans: how many programs walk a sequence.
      heads: key heads in a block.
      together: key heads that are worked on at once; divides ``heads``.
    """

    span: int
    chunk: int
    spans: int
    heads: int
    together: int


def unsupported(*, dtype, B, T, R, H, Hv, K, V, precision) -> str | None:
    """Why the kernels cannot run these, or None; arguments as `delta_product` has them."""
    del B, precision
    if dtype == jnp.float64:
        return "a TPU has no float64, and q is float64"
    if R > MOST_FACTORS:
        return f"R={R} factors a token are more than {MOST_FACTORS}"
    if K > WIDEST_KEY or V > WIDEST_VALUE:
        return f"K={K} and V={V} may be at most {WIDEST_KEY} and {WIDEST_VALUE}"
    plan = plan_of(dtype, spans=-(-T * R // 128), T=T, R=R, H=H, Hv=Hv, K=K, V=V)
    needed = vector_memory(plan, dtype, R=R, G=Hv // H, K=K, V=V)
    if needed > VECTOR_MEMORY:
        return (
            f"its blocks need {needed / 2**20:.0f} MiB of vector memory with R={R}, H={H}, "
            f"Hv={Hv}, K={K}, V={V}, and the smallest TPU has {VECTOR_MEMORY // 2**20} MiB a core"
        )
    return None


def plan_of(dtype, *, spans: int, T: int, R: int, H: int, Hv: int, K: int, V: int) -> Plan:
    """How the sequence and the heads are cut, for at most ``spans`` spans."""
    span = _round_up(-(-T // spans), BASE)
    chunk = span
    if dtype != jnp.bfloat16 and span * R > WIDE_UPDATES:
        fits = [c for c in range(BASE, span + 1, BASE) if span % c == 0 and c * R <= WIDE_UPDATES]
        chunk = max(fits, default=BASE)
    heads = HEADS_IN_BLOCK if H % HEADS_IN_BLOCK == 0 else H
    each = Hv // H * _working_bytes(chunk, R, K, V)
    together = max(
        (n for n in range(1, heads + 1) if heads % n == 0 and n * each <= WORKING_BYTES), default=1
    )
    return Plan(span, chunk, -(-T // span), heads, together)


def vector_memory(plan: Plan, dtype, *, R: int, G: int, K: int, V: int) -> int:
    """Bytes of vector memory that the backward kernel, the larger one, needs at most."""
    K, V = _round_up(K, 128), _round_up(V, 128)
    heads = _round_up(plan.heads, 8)
    rows = plan.span * heads * jnp.dtype(dtype).itemsize
    tokens = rows * (K + R * K + G * R * V)
    state = 4 * plan.heads * G * K * V
    blocks = 2 * (2 * tokens + rows * G * V) + 3 * 2 * state
    working = plan.together * G * _working_bytes(plan.chunk, R, K, V)
    return blocks + (1 + plan.span // plan.chunk) * state + working


def _working_bytes(chunk: int, R: int, K: int, V: int) -> int:
    """Of the matrices of one value head that the backward pass holds at once, in float32."""
    M = chunk * R
    return 4 * M * (6 * _round_up(M, 128) + 4 * _round_up(V, 128) + 2 * _round_up(K, 128))


def _round_up(n: int, multiple: int) -> int:
    return -(-n // multiple) * multiple


def forward(tokens: Tokens, initial_state: jax.Array, options: Options, *, keep_states: bool):
    """Outputs, final state, and the state before every span or None; the contract of kernels."""
    call = _Call.of(tokens, options)
    in_specs, operands = call.inputs(tokens)
    state = call.state_block
    out_specs, out_shapes = zip(*call.outputs(tokens, keep_states), strict=True)
    o, final_state, *states = call.run(
        functools.partial(_forward_kernel, call=call, keep_states=keep_states),
        [*in_specs, state],
        [*operands, initial_state],
        out_specs,
        out_shapes,
    )
    o = o[:, : tokens.q.shape[1]]
    if not keep_states:
        return o, final_state, None
    return o, final_state, call.as_residual(states[0], options.spans)


def backward(tokens: Tokens, states: jax.Array, do, dfinal_state, options: Options):
    """Cotangents of the inputs and of the initial state; the contract of kernels."""
    call = _Call.of(tokens, options, reverse=True)
    in_specs, operands = call.inputs(tokens)
    out_specs, out_shapes = zip(*call.cotangents(tokens, dfinal_state), strict=True)
    N = call.plan.spans
    states = states[:N].reshape(N, *dfinal_state.shape)
    dq, dk, dv, dbeta, *dg, dinitial_state = call.run(
        functools.partial(_backward_kernel, call=call),
        [*in_specs, call.states_block, call.tokens_block(do.shape[2:]), call.state_block],
        [*operands, states, call.padded(do), dfinal_state],
        out_specs,
        out_shapes,
    )
    dtokens = Tokens(
        dq,
        dk,
        dv,
        call.from_rows(dbeta, tokens.beta),
        call.from_rows(dg[0], tokens.g) if dg else None,
        None,
    )
    dtokens = jax.tree.map(lambda dx: dx[:, : tokens.q.shape[1]], dtokens)
    return dtokens, dinitial_state


class _Call(NamedTuple):
    """What a kernel and its caller both know."""

    plan: Plan
    passes: Passes
    scale: float
    interpret: bool
    reverse: bool
    sizes: tuple[int, int, int, int, int, int]  # B, R, H, Hv, K, V
    gated: bool
    packed: bool
    manual_axis_type: object

    @classmethod
    def of(cls, tokens: Tokens, options: Options, reverse: bool = False) -> "_Call":
        B, T, R, H, K = tokens.k.shape
        Hv, V = tokens.v.shape[-2:]
        dtype = tokens.q.dtype
        return cls(
            plan_of(dtype, spans=options.spans, T=T, R=R, H=H, Hv=Hv, K=K, V=V),
            Passes.of(dtype, options.precision, options.interpret),
            options.scale,
            options.interpret,
            reverse,
            (B, R, H, Hv, K, V),
            tokens.g is not None,
            tokens.resets is not None,
            jax.typeof(tokens.q).manual_axis_type,
        )

    @property
    def value_heads(self) -> int:
        """In a block."""
        _, _, H, Hv, _, _ = self.sizes
        return self.plan.heads * Hv // H

    def run(self, kernel, in_specs, operands, out_specs, out_shapes):
        B, _, H, _, K, V = self.sizes
        state = (self.value_heads, K, V)
        chunks = self.plan.span // self.plan.chunk
        scratch = [pltpu.VMEM(state, jnp.float32)]
        if self.reverse and chunks > 1:
            scratch.append(pltpu.VMEM((chunks, *state), jnp.float32))
        return pl.pallas_call(
            kernel,
            grid=(B, H // self.plan.heads, self.plan.spans),
            in_specs=list(in_specs),
            out_specs=list(out_specs),
            out_shape=[
                jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=self.manual_axis_type)
                for shape, dtype in out_shapes
            ],
            scratch_shapes=scratch,
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=VECTOR_MEMORY,
            ),
            interpret=self.interpret,
            name="delta_product_backward" if self.reverse else "delta_product_forward",
        )(*operands)

    def span_of(self, n):
        """The span of the n-th program of a sequence."""
        return self.plan.spans - 1 - n if self.reverse else n

    @property
    def state_block(self) -> pl.BlockSpec:
        *_, K, V = self.sizes
        return pl.BlockSpec((1, self.value_heads, K, V), lambda b, h, n: (b, h, 0, 0))

    @property
    def states_block(self) -> pl.BlockSpec:
        *_, K, V = self.sizes
        shape = (1, 1, self.value_heads, K, V)
        return pl.BlockSpec(shape, lambda b, h, n: (self.span_of(n), b, h, 0, 0))

    def tokens_block(self, rest: tuple[int, ...]) -> pl.BlockSpec:
        """Of an array [B, T, *rest], where ``rest`` is ([R,] heads, width)."""
        *factors, heads, width = rest
        *_, H, _, _, _ = self.sizes
        shape = (1, self.plan.span, *factors, heads * self.plan.heads // H, width)
        middle = (0,) * len(factors)
        return pl.BlockSpec(shape, lambda b, h, n: (b, self.span_of(n), *middle, h, 0))

    def rows_block(self, length: int, heads: int | None = None) -> pl.BlockSpec:
        """Of an array [B, N, heads, length]; one row for all heads where None."""
        if heads is None:
            return pl.BlockSpec((1, 1, 1, length), lambda b, h, n: (b, self.span_of(n), 0, 0))
        return pl.BlockSpec((1, 1, heads, length), lambda b, h, n: (b, self.span_of(n), h, 0))

    def padded(self, x: jax.Array) -> jax.Array:
        """Zero keys and step sizes write nothing, and g = 0 decays nothing."""
        return pad(x, self.plan.span)

    def rows(self, x: jax.Array) -> jax.Array:
        """beta or g, [B, T, (R,) Hv], as [B, N, Hv, updates or tokens of a span] in float32."""
        x = self.padded(x.astype(jnp.float32))
        x = x.reshape(x.shape[0], self.plan.spans, -1, x.shape[-1])
        return jnp.swapaxes(x, -1, -2)

    def from_rows(self, x: jax.Array, like: jax.Array) -> jax.Array:
        """The inverse, padded still, in the dtype of ``like``."""
        B, _, *rest = like.shape
        return jnp.swapaxes(x, -1, -2).reshape(B, -1, *rest).astype(like.dtype)

    def segments(self, resets: jax.Array, repeats: int) -> jax.Array:
        """Boundaries since the chunk began, [B, N, 1, tokens or updates of a span]."""
        plan = self.plan
        resets = self.padded(resets)
        counts = jnp.cumsum(resets.reshape(resets.shape[0], -1, plan.chunk), axis=-1)
        counts = jnp.repeat(counts.astype(jnp.float32), repeats, axis=-1)
        return counts.reshape(resets.shape[0], plan.spans, 1, -1)

    def inputs(self, tokens: Tokens):
        """Blocks and operands that both kernels read."""
        _, R, *_ = self.sizes
        C = self.plan.span
        arrays = [self.padded(x) for x in tokens[:3]]
        specs = [self.tokens_block(x.shape[2:]) for x in arrays]
        arrays.append(self.rows(tokens.beta))
        specs.append(self.rows_block(C * R, self.value_heads))
        if self.gated:
            arrays.append(self.rows(tokens.g))
            specs.append(self.rows_block(C, self.value_heads))
        if self.packed:
            arrays += [self.segments(tokens.resets, 1), self.segments(tokens.resets, R)]
            specs += [self.rows_block(C), self.rows_block(C * R)]
        return specs, arrays

    def outputs(self, tokens: Tokens, keep_states: bool):
        """Block, shape and dtype of every output of the forward kernel."""
        B, _, _, Hv, K, V = self.sizes
        T = self.plan.spans * self.plan.span
        yield self.tokens_block((Hv, V)), ((B, T, Hv, V), tokens.v.dtype)
        yield self.state_block, ((B, Hv, K, V), jnp.float32)
        if keep_states:
            yield self.states_block, ((self.plan.spans, B, Hv, K, V), jnp.float32)

    def cotangents(self, tokens: Tokens, dfinal_state: jax.Array):
        """Block, shape and dtype of every output of the backward kernel."""
        B, R, _, Hv, _, _ = self.sizes
        N, C = self.plan.spans, self.plan.span
        for x in tokens[:3]:
            yield self.tokens_block(x.shape[2:]), ((B, N * C, *x.shape[2:]), x.dtype)
        for length in (C * R, C) if self.gated else (C * R,):
            yield self.rows_block(length, self.value_heads), ((B, N, Hv, length), jnp.float32)
        yield self.state_block, (dfinal_state.shape, jnp.float32)

    def as_residual(self, states: jax.Array, spans: int) -> jax.Array:
        """[N, B, Hv, K, V] as [spans, B, H, G, K, V]."""
        B, _, H, Hv, K, V = self.sizes
        missing = spans - self.plan.spans
        if missing:
            states = jnp.pad(states, [(0, missing)] + [(0, 0)] * 4)
        return states.reshape(spans, B, H, Hv // H, K, V)

    def read(self, refs, i: int) -> "Chunk":
        """The i-th chunk of a span, heads first."""
        q_ref, k_ref, v_ref, beta_ref, *rest = refs
        _, R, *_ = self.sizes
        C = self.plan.chunk
        g_ref = rest.pop(0) if self.gated else None
        segments = [None, None]
        if self.packed:
            segments = [
                ref[0, 0, :, i * n : (i + 1) * n][None]
                for ref, n in zip(rest, (C, C * R), strict=True)
            ]
        return Chunk(
            heads_first(q_ref[0, i * C : (i + 1) * C]),
            heads_first(k_ref[0, i * C : (i + 1) * C]),
            heads_first(v_ref[0, i * C : (i + 1) * C]),
            beta_ref[0, 0, :, i * C * R : (i + 1) * C * R][:, None],
            g_ref[0, 0, :, i * C : (i + 1) * C][:, None] if self.gated else None,
            *segments,
        )

    def groups(self, x: Chunk):
        """The heads of a chunk, those that are worked on together, with their value heads."""
        G = self.value_heads // self.plan.heads
        for first in range(0, self.plan.heads, self.plan.together):
            keys = slice(first, first + self.plan.together)
            values = slice(first * G, (first + self.plan.together) * G)
            part = Chunk(
                x.q[keys],
                x.k[keys],
                x.v[values],
                x.beta[values],
                x.g[values] if self.gated else None,
                x.segment,
                x.segment_of_update,
            )
            yield values, part


def heads_first(x: jax.Array) -> jax.Array:
    """[C, (R,) heads, width] as [heads, C * R, width] in float32."""
    return jnp.swapaxes(x.astype(jnp.float32).reshape(-1, *x.shape[-2:]), 0, 1)


def _forward_kernel(*refs, call: _Call, keep_states: bool):
    *ins, initial_ref, o_ref, final_ref = refs[: -1 - keep_states]
    state_ref = refs[-1]
    n, last = pl.program_id(2), call.plan.spans - 1

    @pl.when(n == 0)
    def _():
        state_ref[...] = initial_ref[0]

    if keep_states:
        refs[-2][0, 0] = state_ref[...]
    C = call.plan.chunk
    for i in range(call.plan.span // C):
        parts = []
        for heads, x in call.groups(call.read(ins, i)):
            state = state_ref[heads]
            p = prepare(x, call.scale, call.passes)
            _, error = errors(x, p, state, call.passes)
            state_ref[heads] = next_state(p, error, state, call.passes)
            parts.append(outputs(p, error, state, call.scale, call.passes))
        o_CHV = jnp.swapaxes(jnp.concatenate(parts), 0, 1)
        o_ref[0, i * C : (i + 1) * C] = o_CHV.astype(o_ref.dtype)

    @pl.when(n == last)
    def _():
        final_ref[0] = state_ref[...]


def _backward_kernel(*refs, call: _Call):
    chunks = call.plan.span // call.plan.chunk
    count = 7 + call.gated + 2 * call.packed
    ins, (states_ref, do_ref, dfinal_ref) = refs[: count - 3], refs[count - 3 : count]
    outs = refs[count : count + 5 + call.gated]
    dstate_ref, *kept = refs[count + 5 + call.gated :]
    n, last = pl.program_id(2), call.plan.spans - 1

    @pl.when(n == 0)
    def _():
        dstate_ref[...] = dfinal_ref[0]

    if chunks > 1:
        _states_again(ins, states_ref, kept[0], call)
    C = call.plan.chunk
    for i in reversed(range(chunks)):
        do_hCV = heads_first(do_ref[0, i * C : (i + 1) * C])
        parts = []
        for heads, x in call.groups(call.read(ins, i)):
            state = kept[0][i, heads] if chunks > 1 else states_ref[0, 0, heads]
            part, dstate_ref[heads] = chunk_backward(
                x, state, do_hCV[heads], dstate_ref[heads], call.scale, call.passes
            )
            parts.append(part)
        _write(outs, parts, i, call)

    @pl.when(n == last)
    def _():
        outs[-1][0] = dstate_ref[...]


def _states_again(ins, states_ref, kept_ref, call: _Call):
    """The state before every chunk of a span, from that before the span."""
    kept_ref[0] = states_ref[0, 0]
    for i in range(call.plan.span // call.plan.chunk - 1):
        for heads, x in call.groups(call.read(ins, i)):
            state = kept_ref[i, heads]
            p = prepare(x, call.scale, call.passes)
            _, error = errors(x, p, state, call.passes)
            kept_ref[i + 1, heads] = next_state(p, error, state, call.passes)


def _write(outs, parts, i: int, call: _Call):
    """Cotangents of the i-th chunk, for all heads, in the layout of the inputs."""
    _, R, *_ = call.sizes
    C = call.plan.chunk
    wholes = [
        None if part[0] is None else jnp.concatenate(part) for part in zip(*parts, strict=True)
    ]
    for ref, dx in zip(outs[:3], wholes[:3], strict=True):
        dx = jnp.swapaxes(dx, 0, 1).reshape(C, *ref.shape[2:])
        ref[0, i * C : (i + 1) * C] = dx.astype(ref.dtype)
    for ref, dx, n in zip(outs[3:-1], wholes[3:], (C * R, C), strict=False):
        ref[0, 0, :, i * n : (i + 1) * n] = dx[:, 0]
