"""Where the TPU kernels find their arrays: blocks of HBM, scratch memory, heads before tokens.

Arrays along T are read as they lie, [C, (R,) heads, width], since a transposed copy in HBM would
double the traffic; heads come first once a block is in vector memory.

Shape suffixes as in chunk.py; N spans of C tokens.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from deltaproduct_jax.ops.kernels import Options
from deltaproduct_jax.ops.kernels.pallas.chunk import Chunk, joined, parted, prepare
from deltaproduct_jax.ops.kernels.pallas.plan import Plan, plan_of, vector_memory
from deltaproduct_jax.ops.kernels.pallas.products import Passes
from deltaproduct_jax.ops.layout import Tokens, pad

LANES = 128  # of a register of a TPU


class Scratch(NamedTuple):
    """References to vector memory, float32: n chunks of all heads of the block, and their state.

    They are those that are prepared side by side; on the way back, a whole span where it is kept.
    """

    q: Any  # nhCK; its cotangent on the way back, as below
    k: Any  # nhMK
    v: Any  # ngMV; on the way back the errors before the cotangent
    beta: Any  # ng1M
    g: Any  # ng1C
    o: Any  # ngCV, or 1gCV: the cotangent of o
    state: Any  # gKV, or its cotangent


class Kept(NamedTuple):
    """What the way back needs of every chunk of a span, where that holds several."""

    state: Any  # ngKV, before each of them; with the inverse also after the last
    inverse: Any = None  # ngMM


class Call(NamedTuple):
    """What a kernel and its caller both know."""

    plan: Plan
    passes: Passes
    scale: float
    interpret: bool
    reverse: bool
    sizes: tuple[int, int, int, int, int, int]  # B, R, H, Hv, K, V
    gated: bool
    packed: bool
    manual_axis_type: Any  # of the arrays, inside shard_map
    slots: int  # for states
    is_again: bool  # on rows that are not finite

    @classmethod
    def of(cls, tokens: Tokens, options: Options, *, reverse: bool) -> "Call":
        """For the inputs of the op; ``reverse`` walks the spans from the last to the first."""
        B, T, R, H, K = tokens.k.shape
        Hv, V = tokens.v.shape[-2:]
        dtype = tokens.q.dtype
        plan = plan_of(dtype, spans=options.spans, T=T, R=R, H=H, Hv=Hv, K=K, V=V)
        is_again = options.rows is not None
        if is_again:  # seldom run, so that it had better compile in little time
            plan = plan._replace(together=1, joined=1)
        return cls(
            plan,
            Passes.of(dtype, options.precision, options.interpret),
            options.scale,
            options.interpret,
            reverse,
            (B, R, H, Hv, K, V),
            tokens.g is not None,
            tokens.resets is not None,
            jax.typeof(tokens.q).manual_axis_type,
            options.slots or options.spans,
            is_again,
        )

    @property
    def value_heads(self) -> int:
        """In a block."""
        _, _, H, Hv, _, _ = self.sizes
        return self.plan.heads * Hv // H

    @property
    def chunks(self) -> int:
        """In a span."""
        return self.plan.span // self.plan.chunk

    def run(self, kernel, in_specs, operands, outs):
        """The Pallas call; ``outs`` gives block, shape and dtype of every output."""
        B, _, H, *_ = self.sizes
        out_specs, out_shapes, dtypes = zip(*outs, strict=True)
        direction = "backward" if self.reverse else "forward"
        return pl.pallas_call(
            kernel,
            grid=(B, H // self.plan.heads, self.plan.spans),
            in_specs=[self._buffered(spec) for spec in in_specs],
            out_specs=list(out_specs),
            out_shape=[
                jax.ShapeDtypeStruct(shape, dtype, manual_axis_type=self.manual_axis_type)
                for shape, dtype in zip(out_shapes, dtypes, strict=True)
            ],
            scratch_shapes=self.scratch(),
            compiler_params=pltpu.CompilerParams(
                dimension_semantics=("parallel", "parallel", "arbitrary"),
                vmem_limit_bytes=vector_memory(self.plan),
            ),
            interpret=self.interpret,
            # Names tell who counts what a program moves of which call it reads.
            name=f"delta_product_{direction}{'_again' * self.is_again}",
        )(*operands)

    def scratch(self):
        """Shapes of `Scratch`, and of `Kept` where it is needed."""
        _, R, _, _, K, V = self.sizes
        plan, C, h, g = self.plan, self.plan.chunk, self.plan.heads, self.value_heads
        M, state = C * R, (g, K, V)
        n = self.chunks if self.reverse and plan.keeps else plan.joined
        shapes = [(n, h, C, K), (n, h, M, K), (n, g, M, V), (n, g, 1, M), (n, g, 1, C)]
        shapes += [(1 if self.reverse else n, g, C, V), state]
        if self.reverse and self.chunks > 1:
            shapes.append((self.chunks + plan.keeps, *state))
        if self.reverse and plan.keeps:
            shapes.append((n, g, M, M))
        return [pltpu.VMEM(shape, jnp.float32) for shape in shapes]

    def _buffered(self, spec: pl.BlockSpec) -> pl.BlockSpec:
        if self.plan.buffers == 2:
            return spec
        mode = pl.Buffered(self.plan.buffers)
        return pl.BlockSpec(spec.block_shape, spec.index_map, pipeline_mode=mode)

    def _span(self, n):
        return self.plan.spans - 1 - n if self.reverse else n

    def state_block(self) -> pl.BlockSpec:
        """Of an array [B, Hv, K, V]."""
        *_, K, V = self.sizes
        return pl.BlockSpec((1, self.value_heads, K, V), lambda b, h, n: (b, h, 0, 0))

    def states_block(self) -> pl.BlockSpec:
        """Of an array [B, N, Hv, K, V]; blocks of no span are neither read nor written."""
        *_, K, V = self.sizes
        shape = (1, 1, self.value_heads, K, V)
        return pl.BlockSpec(shape, lambda b, h, n: (b, self._span(n), h, 0, 0))

    def tokens_block(self, rest: tuple[int, ...]) -> pl.BlockSpec:
        """Of an array [B, T, *rest], where ``rest`` is ([R,] heads, width)."""
        *factors, heads, width = rest
        _, _, H, *_ = self.sizes
        shape = (1, self.plan.span, *factors, heads * self.plan.heads // H, width)
        middle = (0,) * len(factors)
        return pl.BlockSpec(shape, lambda b, h, n: (b, self._span(n), *middle, h, 0))

    def rows_block(self, length: int) -> pl.BlockSpec:
        """Of an array [B, N, chunks of a span, Hv, length]."""
        shape = (1, 1, self.chunks, self.value_heads, length)
        return pl.BlockSpec(shape, lambda b, h, n: (b, self._span(n), 0, h, 0))

    def segments_block(self, length: int) -> pl.BlockSpec:
        """Of an array [B, N, chunks of a span, 1, length], for all heads."""
        shape = (1, 1, self.chunks, 1, length)
        return pl.BlockSpec(shape, lambda b, h, n: (b, self._span(n), 0, 0, 0))

    def padded(self, x: jax.Array) -> jax.Array:
        """Whole spans: zero keys and step sizes write nothing, and g = 0 decays nothing."""
        return pad(x, self.plan.span)

    def rows(self, x: jax.Array) -> jax.Array:
        """beta or g, [B, T, (R,) Hv], in float32 as `rows_block` has them: a row per chunk."""
        x = self.padded(x.astype(jnp.float32))
        x = x.reshape(x.shape[0], self.plan.spans, self.chunks, -1, x.shape[-1])
        return jnp.swapaxes(x, -1, -2)

    def segments(self, resets: jax.Array, repeats: int) -> jax.Array:
        """Boundaries since the chunk began, of tokens or updates, as `segments_block` has them."""
        resets = self.padded(resets)
        B = resets.shape[0]
        counts = jnp.cumsum(resets.reshape(B, -1, self.plan.chunk), axis=-1)
        counts = jnp.repeat(counts.astype(jnp.float32), repeats, axis=-1)
        return counts.reshape(B, self.plan.spans, self.chunks, 1, -1)

    def laid_out(self, tokens: Tokens) -> Tokens:
        """beta, g and boundaries as `rows_block` and `segments_block` have them."""
        _, R, *_ = self.sizes
        beta, g, resets = self.rows(tokens.beta), tokens.g, tokens.resets
        g = None if g is None else self.rows(g)
        resets = None if resets is None else [self.segments(resets, n) for n in (1, R)]
        return tokens._replace(beta=beta, g=g, resets=resets)

    def inputs(self, tokens: Tokens):
        """Blocks and operands that both kernels read, of tokens that are laid out."""
        _, R, *_ = self.sizes
        C = self.plan.chunk
        arrays = [*(self.padded(x) for x in tokens[:3]), tokens.beta]
        specs = [*(self.tokens_block(x.shape[2:]) for x in arrays[:3]), self.rows_block(C * R)]
        if self.gated:
            arrays.append(tokens.g)
            specs.append(self.rows_block(C))
        if self.packed:
            arrays += tokens.resets
            specs += [self.segments_block(C), self.segments_block(C * R)]
        return specs, arrays

    def seen_block(self) -> pl.BlockSpec:
        """Of an array [B, blocks of heads, 1, LANES]; it stays where it is from span to span."""
        return pl.BlockSpec((1, 1, 1, LANES), lambda b, h, n: (b, h, 0, 0))

    def flags_block(self) -> pl.BlockSpec:
        """Of an array [B, 1, Hv], for all heads."""
        return pl.BlockSpec((1, 1, self.sizes[3]), lambda b, h, n: (b, 0, 0))

    def seen(self):
        """Block, shape and dtype of what tells whether all is finite: 0 throughout or not."""
        B, _, H, *_ = self.sizes
        return self.seen_block(), (B, H // self.plan.heads, 1, LANES), jnp.float32

    def outputs(self, tokens: Tokens, keep_states: bool):
        """Block, shape and dtype of every output of the forward kernel."""
        B, _, _, Hv, K, V = self.sizes
        N, C = self.plan.spans, self.plan.span
        yield self.tokens_block((Hv, V)), (B, N * C, Hv, V), tokens.v.dtype
        yield self.state_block(), (B, Hv, K, V), jnp.float32
        yield self.seen()
        if keep_states:
            yield self.states_block(), (B, self.slots, Hv, K, V), jnp.float32

    def cotangents(self, tokens: Tokens):
        """Block, shape and dtype of every output of the backward kernel."""
        B, R, _, Hv, K, V = self.sizes
        N, C = self.plan.spans, self.plan.chunk
        for x in tokens[:3]:
            shape = (B, N * self.plan.span, *x.shape[2:])
            yield self.tokens_block(x.shape[2:]), shape, x.dtype
        for length in (C * R, C) if self.gated else (C * R,):
            yield self.rows_block(length), (B, N, self.chunks, Hv, length), jnp.float32
        yield self.state_block(), (B, Hv, K, V), jnp.float32
        yield self.seen()

    def tokens_of(self, i):
        """The tokens of the i-th chunk of a span."""
        return pl.ds(i * self.plan.chunk, self.plan.chunk)

    def load(self, ins, scratch: Scratch, first, at):
        """Puts chunks of a span, as many as are joined, into scratch memory.

        Args:
          ins: blocks of the inputs.
          scratch: where to.
          first: the first of the chunks.
          at: where in scratch memory it goes.

        Returns:
          The rows of segments of each of them.
        """
        for j in range(self.plan.joined):
            i, to = first + j, at + j
            for ref, block in zip(scratch[:3], ins[:3], strict=True):
                ref[to] = heads_first(block[0, self.tokens_of(i)])
            scratch.beta[to] = ins[3][0, 0, i][:, None]
            if self.gated:
                scratch.g[to] = ins[4][0, 0, i][:, None]
        return [self.segments_of(ins, first + j) for j in range(self.plan.joined)]

    def segments_of(self, ins, i):
        """The rows of segments of the i-th chunk of a span."""
        return tuple(ref[0, 0, i][None] for ref in ins[-2:]) if self.packed else (None, None)

    def store(self, outs, scratch: Scratch, i, at):
        """Writes the cotangents of the i-th chunk from where its primals were in scratch memory."""
        for ref, block in zip(scratch[:3], outs[:3], strict=True):
            block[0, self.tokens_of(i)] = tokens_first(ref[at], block)
        outs[3][0, 0, i] = scratch.beta[at, :, 0]
        if self.gated:
            outs[4][0, 0, i] = scratch.g[at, :, 0]

    def over_chunks(self, work, step: int = 1):
        """``work(i)`` for every ``step``-th chunk of a span, or backwards; a loop, as below."""
        last = self.chunks // step - 1
        if last == 0:
            work(0)
        else:
            order = (lambda i: last - i) if self.reverse else (lambda i: i)
            jax.lax.fori_loop(0, last + 1, lambda i, _: work(order(i) * step), None)

    def over_groups(self, work):
        """``work(keys, values)`` for the key and value heads of every group of the block.

        A loop, so that one group takes the memory of the one before.
        """
        h = self.plan.together
        g = h * self.value_heads // self.plan.heads
        groups = self.plan.heads // h
        if groups == 1:
            work(slice(None), slice(None))
        else:
            jax.lax.fori_loop(0, groups, lambda j, _: work(pl.ds(j * h, h), pl.ds(j * g, g)), None)

    def chunk_of(self, scratch: Scratch, segments, at, keys, values) -> Chunk:
        """The chunk at a place in scratch memory, of a group of heads."""
        return Chunk(
            scratch.q[at, keys],
            scratch.k[at, keys],
            scratch.v[at, values],
            scratch.beta[at, values],
            scratch.g[at, values] if self.gated else None,
            *segments,
        )

    def prepared(self, scratch: Scratch, segments, at, keys, values):
        """The chunks that `load` loaded, each with what does not depend on the state."""
        chunks = [
            self.chunk_of(scratch, rows, at + j, keys, values) for j, rows in enumerate(segments)
        ]
        p = prepare(joined(chunks), self.scale, self.passes)
        return zip(chunks, parted(p, len(chunks)), strict=True)


def from_rows(x: jax.Array, like: jax.Array) -> jax.Array:
    """beta or g again, [B, T, (R,) Hv], from rows; ``like`` has all but B, and the dtype."""
    T, *rest = like.shape[1:]
    x = jnp.swapaxes(x, -1, -2).reshape(x.shape[0], -1, *rest)
    return x[:, :T].astype(like.dtype)


def look(seen, x: jax.Array) -> None:
    """Makes ``seen`` NaN if any of x [heads, rows, width] is not finite: then x - x is NaN."""
    wrong = jnp.sum(jnp.sum(x - x, axis=0), axis=0, keepdims=True)
    if wrong.shape[-1] != LANES:
        wrong = jnp.sum(wrong, axis=-1, keepdims=True)
    seen[0, 0] += wrong


def heads_first(x: jax.Array) -> jax.Array:
    """[C, (R,) heads, width] as [heads, C * R, width] in float32."""
    return jnp.swapaxes(x.astype(jnp.float32).reshape(-1, *x.shape[-2:]), 0, 1)


def tokens_first(x: jax.Array, block) -> jax.Array:
    """The inverse, in the dtype and the shape of a chunk of ``block``."""
    x = jnp.swapaxes(x, 0, 1)
    return x.reshape(-1, *block.shape[2:]).astype(block.dtype)
