"""The op for TPU: Pallas kernels that walk the chunks of a sequence with the state in VMEM.

A `lax.scan` over chunks sends the state, the pseudo-values and the triangular inverse through HBM
for every chunk; here they never leave the core. The grid is (sequence, block of heads, span); spans
come one after the other, forwards, or backwards in the backward pass, and the state of all heads of
the block, or its cotangent, stays in scratch memory. README.md of the folder above has
the schedule and its memory.

Sources: the chunked form of ops/README.md. The TPU kernels of MaxText and Levanter for the gated
delta rule, one factor per token, showed the gain of a state that stays in VMEM.
"""

import functools

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl

from deltaproduct_jax.ops.decays import forgets
from deltaproduct_jax.ops.kernels import Options
from deltaproduct_jax.ops.kernels.pallas.blocks import (
    Call,
    Kept,
    Scratch,
    from_rows,
    heads_first,
    look,
    tokens_first,
)
from deltaproduct_jax.ops.kernels.pallas.chunk import (
    chunk_backward,
    errors,
    next_state,
    outputs,
    prepare,
    read_by_keys,
)
from deltaproduct_jax.ops.kernels.pallas.plan import memory_of_core, plan_of
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.parts import is_left_to_the_compiler, placement
from deltaproduct_jax.ops.unavailable import devices_left

MOST_FACTORS = 8
WIDEST_KEY, WIDEST_VALUE = 256, 512


def unsupported(*, dtype, B, T, R, H, Hv, K, V, precision) -> str | None:
    """Why the kernels cannot run these, or None; arguments as `delta_product` has them."""
    del B, precision
    if dtype not in (jnp.bfloat16, jnp.float32):
        return f"q is {jnp.dtype(dtype).name}, and it takes bfloat16 and float32"
    if R > MOST_FACTORS:
        return f"R={R} must be at most {MOST_FACTORS}"
    if K > WIDEST_KEY or V > WIDEST_VALUE:
        return f"K={K} must be at most {WIDEST_KEY} and V={V} at most {WIDEST_VALUE}"
    plan = plan_of(dtype, spans=-(-T * R // 128), T=T, R=R, H=H, Hv=Hv, K=K, V=V)
    if plan.bytes > plan.limit:
        return (
            f"R={R}, H={H}, Hv={Hv}, K={K}, V={V} in {dtype.name} need "
            f"{plan.bytes / 2**20:.1f} MiB of vector memory, "
            f"and there are {plan.limit / 2**20:.1f} MiB"
        )
    return None


def is_ready() -> bool:
    """Whether JAX will lower a kernel, as far as a trace can know.

    It does for a TPU of which it knows the kind, and partitions none: where the mesh around has
    axes of several devices that are not manual, as those of `jax.shard_map` are, XLA could not.
    What is `placed` will run inside of one.
    """
    is_cut = placement() is not None or not is_left_to_the_compiler()
    return memory_of_core() is not None and is_cut


def reason_when_lowered(axis_context) -> str | None:
    """The same, when also the arrays' own mesh is known, as the end of a sentence."""
    if memory_of_core() is None:
        return "JAX does not know for which TPU"
    devices = devices_left(axis_context)
    if devices > 1:
        return (
            f"{devices} devices are left to the compiler, which cuts no kernel; "
            "sharded_delta_product, or jax.shard_map over all axes, does"
        )
    return None


def kept_span(span: int, *, dtype, B, T, **sizes) -> int:
    """Tokens of a program, from one kept state to the next."""
    del B
    return plan_of(dtype, spans=-(-T // span), T=T, **sizes).span


def kept_more(tokens: Tokens, options: Options) -> tuple:
    """States suffice."""
    del tokens, options
    return ()


def lay_out(tokens: Tokens, options: Options) -> Tokens:
    """beta and g as the kernels read them, [B, N, chunks of a span, Hv, updates or tokens].

    Boundaries likewise, of tokens and of updates, as two arrays in place of one. Of g no sum is
    infinite then.
    """
    tokens = tokens._replace(g=forgets(tokens.g))
    return Call.of(tokens, options, reverse=False).laid_out(tokens)


def restore(laid: Tokens, like: Tokens) -> Tokens:
    """The inverse, of tokens or of their cotangents, but for boundaries; dtypes as of ``like``."""
    beta = from_rows(laid.beta, like.beta)
    g = None if like.g is None else from_rows(laid.g, like.g)
    return laid._replace(beta=beta, g=g, resets=None)


def forward(tokens: Tokens, initial_state: jax.Array, options: Options, *, keep_states: bool):
    """Outputs, final state, (states before every span,) or None, and bad rows; as all kernels.

    Tokens are as `lay_out` gives them.
    """
    call = Call.of(tokens, options, reverse=False)
    specs, operands = call.inputs(tokens)
    o, final_state, seen, *states = call.run(
        functools.partial(_forward_kernel, call=call, keep_states=keep_states),
        [*specs, call.state_block()],
        [*operands, initial_state],
        call.outputs(tokens, keep_states),
    )
    o = o[:, : tokens.q.shape[1]]
    if not keep_states:
        return o, final_state, None, seen
    B, _, _, H, _ = tokens.k.shape
    shape = (-1, B, H, call.value_heads // call.plan.heads, *states[0].shape[-2:])
    # They lie row by row, or XLA would turn them around for a loop over rows and back again.
    kept = jnp.swapaxes(states[0], 0, 1).reshape(shape)
    return o, final_state, (kept,), seen


def backward(tokens: Tokens, kept: tuple[jax.Array, ...], do, dfinal_state, options: Options):
    """Cotangents of the inputs and of the initial state, and bad rows; as all kernels.

    Tokens and their cotangents are as `lay_out` gives them.
    """
    call = Call.of(tokens, options, reverse=True)
    specs, operands = call.inputs(tokens)
    states, *_, flags = kept
    states = jnp.swapaxes(states.reshape(-1, *dfinal_state.shape), 0, 1)
    dq, dk, dv, dbeta, *dg, dinitial_state, seen = call.run(
        functools.partial(_backward_kernel, call=call),
        [
            *(*specs, call.states_block(), call.tokens_block(do.shape[2:])),
            *(call.state_block(), call.flags_block()),
        ],
        [*operands, states, call.padded(do), dfinal_state, flags[:, None]],
        call.cotangents(tokens),
    )
    dq, dk, dv = (dx[:, : tokens.q.shape[1]] for dx in (dq, dk, dv))
    dtokens = Tokens(dq, dk, dv, dbeta, dg[0] if dg else None, None)
    return dtokens, dinitial_state, seen


def _forward_kernel(*refs, call: Call, keep_states: bool):
    count = 4 + call.gated + 2 * call.packed
    inputs, (initial, o, final, seen, *refs) = refs[:count], refs[count:]
    scratch = Scratch(*refs[keep_states:])
    passes, scale = call.passes, call.scale

    @pl.when(pl.program_id(2) == 0)
    def _():
        scratch.state[...] = initial[0]
        seen[...] = jnp.zeros(seen.shape, seen.dtype)

    if keep_states:
        refs[0][0, 0] = scratch.state[...]

    def side_by_side(first):
        segments = call.load(inputs, scratch, first, 0)

        def work(keys, values):
            for i, (x, p) in enumerate(call.prepared(scratch, segments, 0, keys, values)):
                state = scratch.state[values]
                error = errors(x, p, read_by_keys(p, state, passes), passes)
                scratch.state[values] = next_state(p, error, state, passes)
                scratch.o[i, values] = outputs(p, error, state, scale, passes)

        call.over_groups(work)
        for i in range(call.plan.joined):
            look(seen, scratch.o[i])
            if call.gated:  # before a boundary a decay is replaced: no output tells of it
                look(seen, scratch.g[i])
            o[0, call.tokens_of(first + i)] = tokens_first(scratch.o[i], o)

    call.over_chunks(side_by_side, call.plan.joined)

    @pl.when(pl.program_id(2) == call.plan.spans - 1)
    def _():
        final[0] = scratch.state[...]


def _backward_kernel(*refs, call: Call):
    count = 4 + call.gated + 2 * call.packed
    inputs, (states, do, dfinal, flags) = refs[:count], refs[count : count + 4]
    refs = refs[count + 4 :]
    outs, seen, refs = refs[: 5 + call.gated], refs[5 + call.gated], refs[6 + call.gated :]
    scratch, kept = Scratch(*refs[:7]), Kept(*refs[7:]) if refs[7:] else None
    passes, scale = call.passes, call.scale

    @pl.when(pl.program_id(2) == 0)
    def _():
        scratch.state[...] = dfinal[0]

    if kept:
        _walk_again(inputs, states, scratch, kept, call)

    def chunk(i):
        at = i if call.plan.keeps else 0
        if call.plan.keeps:
            segments = call.segments_of(inputs, i)
        else:
            (segments,) = call.load(inputs, scratch, i, at)
        scratch.o[0] = heads_first(do[0, call.tokens_of(i)])

        def work(keys, values):
            x = call.chunk_of(scratch, segments, at, keys, values)
            state = kept.state[i, values] if kept else states[0, 0, values]
            if call.plan.keeps:
                p, error = prepare(x, scale, passes, kept.inverse[i, values]), x.v
            else:
                p = prepare(x, scale, passes)
                error = errors(x, p, read_by_keys(p, state, passes), passes)
            do, dnext = scratch.o[0, values], scratch.state[values]
            dx, dstate = chunk_backward(x, p, error, state, do, dnext, scale, passes)
            scratch.state[values] = dstate
            scratch.q[at, keys], scratch.k[at, keys] = dx[:2]
            scratch.v[at, values], scratch.beta[at, values] = dx[2:4]
            if call.gated:
                scratch.g[at, values] = dx[4]

        call.over_groups(work)
        call.store(outs, scratch, i, at)

    call.over_chunks(chunk)

    @pl.when(pl.program_id(2) == call.plan.spans - 1)
    def _():
        outs[-1][0] = scratch.state[...]
        # Whatever is bad reaches it: all terms are added up, none is chosen.
        seen[...] = jnp.zeros(seen.shape, seen.dtype)
        look(seen, scratch.state[...])
        seen[0, 0] += jnp.sum(flags[0], axis=-1, keepdims=True)


def _walk_again(inputs, states, scratch: Scratch, kept: Kept, call: Call):
    """Finds the state before every chunk of a span.

    Where the plan keeps what it finds, the whole span is loaded, and errors replace its values.
    """
    joined, keeps, passes = call.plan.joined, call.plan.keeps, call.passes
    kept.state[0] = states[0, 0]

    def side_by_side(first):
        at = first if keeps else 0
        segments = call.load(inputs, scratch, first, at)

        def work(keys, values):
            for j, (x, p) in enumerate(call.prepared(scratch, segments, at, keys, values)):
                i = first + j
                state = kept.state[i, values]
                error = errors(x, p, read_by_keys(p, state, passes), passes)
                if keeps:
                    kept.inverse[i, values] = p.inverse
                    scratch.v[i, values] = error
                # Of no use after the last chunk: with ``keeps`` there is room for it.
                kept.state[i + 1, values] = next_state(p, error, state, passes)

        call.over_groups(work)

    if joined == call.chunks:
        side_by_side(0)
    else:
        steps = call.chunks // joined if keeps else call.chunks - 1
        jax.lax.fori_loop(0, steps, lambda n, _: side_by_side(n * joined), None)
