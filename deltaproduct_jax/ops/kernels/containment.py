"""What is not finite stays where it is, where kernels run: rows that have some are run again.

A kernel sees its inputs as they are, and a NaN reaches more than it may. It says of which rows
anything was not finite, by what it has in registers, which costs next to nothing; to look at every
operand and to replace it takes a TPU a fifth of its time. A loop of as many turns as there are such
rows, mostly none, then runs the kernel on each of them with 0 for what is bad, and puts NaN where
`ops.containment` says. One row at a time, it needs memory for one.

Shape suffixes: B rows, T tokens, H value heads.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.containment import Watched, only_finite
from deltaproduct_jax.ops.kernels import Options, axis_of_rows
from deltaproduct_jax.ops.layout import Tokens, head_axes
from deltaproduct_jax.ops.varying import mark_varying_as

# What the loop is called in compiled programs, for who counts what they take: it has no turns.
SCOPE = "delta_product_bad_rows"
# Of a row and head, kept with the states: what the way back cannot see.
RERUN, BAD_STATE = 1, 2


def watched(tokens: Tokens, state: jax.Array) -> Watched:
    """What is bad among the arguments of a pass of a kernel, and what that reaches."""
    bare = tokens._replace(resets=None)
    return Watched.of(bare, state, tokens.resets, head_axes(bare))


def flags_like(tokens: Tokens) -> jax.ShapeDtypeStruct:
    """The last of what a gradient keeps where a kernel may run, [B, H]."""
    return jax.ShapeDtypeStruct((tokens.v.shape[0], tokens.v.shape[3]), jnp.int8)


def forward(
    tokens: Tokens, initial_state, *, kernel: ModuleType, options: Options, keep_states: bool
):
    """``kernel.forward``, contained: ``(o, final_state, kept)``, flags last among the kept."""
    # The loop is to read what the kernel reads: a TPU would turn beta around for each of them.
    tokens, initial_state = jax.lax.optimization_barrier((tokens, initial_state))
    run = functools.partial(kernel.forward, options=options, keep_states=keep_states)
    o, final_state, kept, bad_B = run(tokens, initial_state)
    if keep_states:
        kept = (*kept, _flags(bad_B, flags_like(tokens), o))
    if bad_B is None:
        return o, final_state, kept
    run = functools.partial(run, options=options._replace(rows=bad_B.size))

    def again(operands):
        tokens, state = operands
        looked = watched(tokens, state)
        o, final_state, kept, _ = run(only_finite(tokens), only_finite(state))
        if keep_states:
            flags_BH = RERUN + BAD_STATE * looked.bad_state.astype(jnp.int8)
            kept = (*kept, flags_BH)
        return *looked.spoil(o, final_state), kept

    return _again(again, bad_B, (tokens, initial_state), (o, final_state, kept))


def backward(tokens: Tokens, kept, do, dfinal_state, *, kernel: ModuleType, options: Options):
    """``kernel.backward``, contained, from what `forward` kept."""
    *kept, flags_BH = kept
    kept = tuple(kept)
    *gradients, bad_B = kernel.backward(tokens, kept, do, dfinal_state, options)
    if bad_B is None:
        return tuple(gradients)
    bad_B |= jnp.any(flags_BH > 0, axis=1)
    options = options._replace(rows=bad_B.size)

    def again(operands):
        tokens, kept, flags_BH, do, dfinal_state = operands
        looked = watched(tokens, jnp.where(flags_BH >= BAD_STATE, jnp.nan, 0.0))
        cotangents, told = looked.finite_cotangents(do, dfinal_state)
        dtokens, dstate, _ = kernel.backward(only_finite(tokens), kept, *cotangents, options)
        return looked.spoil_gradients(dtokens, dstate, told)

    return _again(again, bad_B, (tokens, kept, flags_BH, do, dfinal_state), tuple(gradients))


def _flags(bad_B: jax.Array | None, like: jax.ShapeDtypeStruct, o: jax.Array) -> jax.Array:
    if bad_B is None:
        return mark_varying_as(jnp.zeros(like.shape, like.dtype), o)
    return jnp.broadcast_to(RERUN * bad_B[:, None].astype(like.dtype), like.shape)


def _again(run: Callable, bad_B: jax.Array, operands: Any, results: Any) -> Any:
    """The results, but of bad rows those of ``run(operands)`` of one row each.

    A loop, and not a `lax.cond`, of which `jax.vmap` would run both sides.
    """
    rows_B = jnp.argsort(~bad_B)  # the bad ones first
    number = jnp.sum(bad_B, dtype=jnp.int32)

    def is_left(carry):
        return carry[0] < number

    def redo(carry):
        turn, results = carry
        row = rows_B[turn]
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis_of_rows(x.ndim))
        put = lambda x, part: jax.lax.dynamic_update_slice_in_dim(
            x, part, row, axis_of_rows(x.ndim)
        )
        # Of a single row nothing depends on the turn, and XLA would look at it before the loop.
        _, part = jax.lax.optimization_barrier((turn, jax.tree.map(take, operands)))
        return turn + 1, jax.tree.map(put, results, run(part))

    first = mark_varying_as(jnp.int32(0), number)
    with jax.named_scope(SCOPE):
        return jax.lax.while_loop(is_left, redo, (first, results))[1]
