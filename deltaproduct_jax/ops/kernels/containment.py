"""What is not finite stays where it is, where kernels run: rows that have some are run again.

A kernel sees its inputs as they are, and a NaN reaches more than it may. It says of which rows
anything was not finite, by what it has in registers, which costs next to nothing; to look at every
operand and to replace it takes a TPU a fifth of its time. A loop of as many turns as there are such
rows, mostly none, then runs the kernel on each of them with 0 for what is bad, and puts NaN where
`ops.containment` says. One row at a time, it needs memory for one. Kernels of GPUs see to it
themselves, behind each pass, so that no host waits: they say of no row that it is to run again.

Shape suffixes: B rows, T tokens, H value heads.
"""

import functools
from collections.abc import Callable
from types import ModuleType
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.layout import Layout, with_layout_constraint

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


def kept_last(tokens: Tokens, names: tuple[str, ...]) -> tuple[jax.ShapeDtypeStruct, ...]:
    """The last of what a gradient keeps where kernels of these names may run.

    The initial state [B, H, K, V], of which kept ones are rounded, and flags [B, H].
    """
    B, H, V = tokens.v.shape[0], *tokens.v.shape[3:]
    shapes = {"triton": (B, H, tokens.k.shape[-1], V), "pallas_tpu": (B, H)}
    return tuple(
        jax.ShapeDtypeStruct(shape, jnp.float32) for name, shape in shapes.items() if name in names
    )


def forward(
    tokens: Tokens, initial_state, *, kernel: ModuleType, options: Options, keep_states: bool
):
    """``kernel.forward``, contained: ``(o, final_state, kept)``, `kept_last` last of the kept."""
    laid, restore = _laid_out(kernel, tokens, options)
    run = functools.partial(kernel.forward, options=options, keep_states=keep_states)
    o, final_state, kept, bad = run(laid, initial_state)
    if keep_states:
        for like in kept_last(tokens, options.kernels):
            is_state = like.shape == initial_state.shape
            last = initial_state if is_state else jnp.zeros(like.shape, like.dtype)
            kept = (*kept, mark_varying_as(last, o))
    if bad is None or options.known_finite:
        return o, final_state, kept
    run = functools.partial(run, options=options._replace(rows=len(bad)))

    def again(operands):
        laid, resets, state = operands
        looked = watched(restore(laid)._replace(resets=resets), state)
        o, final_state, kept, _ = run(only_finite(laid), only_finite(state))
        if keep_states:
            kept = (*kept, RERUN + BAD_STATE * looked.bad_state.astype(jnp.float32))
        return *looked.spoil(o, final_state), kept

    operands = laid, tokens.resets, initial_state
    return _again(again, bad, operands, (o, final_state, kept))


def backward(tokens: Tokens, kept, do, dfinal_state, *, kernel: ModuleType, options: Options):
    """``kernel.backward``, contained, from what `forward` kept."""
    laid, restore = _laid_out(kernel, tokens, options)
    dlaid, dstate, bad = kernel.backward(laid, kept, do, dfinal_state, options)
    if bad is None:
        return restore(dlaid), dstate
    time_last, time_back = _time_last, _time_back
    if not hasattr(kernel, "lay_out"):  # it takes arrays as they are
        time_last = time_back = lambda tokens: tokens
    options = options._replace(rows=len(bad))

    def again(operands):
        laid, resets, kept, do, dfinal_state = operands
        state = jnp.where(kept[-1] >= BAD_STATE, jnp.nan, 0.0)
        looked = watched(restore(laid)._replace(resets=resets), state)
        cotangents, told = looked.finite_cotangents(do, dfinal_state)
        dlaid, dstate, _ = kernel.backward(only_finite(laid), kept, *cotangents, options)
        dtokens, dstate = looked.spoil_gradients(restore(dlaid), dstate, told)
        return time_last(dtokens), dstate

    operands = laid, tokens.resets, kept, do, dfinal_state
    dtokens, dstate = _again(again, bad, operands, (time_last(restore(dlaid)), dstate))
    return time_back(dtokens), dstate


def _laid_out(kernel: ModuleType, tokens: Tokens, options: Options):
    """The tokens as the kernel reads them, and what brings those, or their cotangents, back.

    The loop takes them as they are then, and gives cotangents so: or a TPU would turn beta and g
    around for the loop, and once more for the kernel before it.
    """
    if not hasattr(kernel, "lay_out"):
        return tokens, lambda laid: laid
    return kernel.lay_out(tokens, options), lambda laid: kernel.restore(laid, tokens)


def _time_last(tokens: Tokens) -> Tokens:
    """beta and g as a TPU lays them out in and between programs: heads would fill no register.

    They are to stay so in the loop. Else it has them as its body makes them, with heads last, and
    arrays that no turn touched are turned around twice.
    """

    def move(x):
        x = jnp.moveaxis(x, 1, -1)
        return with_layout_constraint(x, Layout(tuple(range(x.ndim))))

    return tokens._replace(beta=move(tokens.beta), g=None if tokens.g is None else move(tokens.g))


def _time_back(tokens: Tokens) -> Tokens:
    move = functools.partial(jnp.moveaxis, source=-1, destination=1)
    return tokens._replace(beta=move(tokens.beta), g=None if tokens.g is None else move(tokens.g))


def _again(run: Callable, bad: jax.Array, operands: Any, results: Any) -> Any:
    """The results, but of bad rows those of ``run(operands)`` of one row each.

    A loop, and not a `lax.cond`, of which `jax.vmap` would run both sides. All that stands before
    it is one sum: each small program takes a GPU microseconds.
    """

    def is_any(bad):
        return jnp.any(bad != 0)

    def redo(carry):
        _, bad, results = carry
        row = jnp.argmax(jnp.any(bad != 0, axis=tuple(range(1, bad.ndim))))
        # Of one row XLA knows which it is, and looks before the loop at what it does not change.
        row, bad = jax.lax.optimization_barrier((row, bad))
        take = lambda x: jax.lax.dynamic_slice_in_dim(x, row, 1, axis_of_rows(x.ndim))
        put = lambda x, part: jax.lax.dynamic_update_slice_in_dim(
            x, part, row, axis_of_rows(x.ndim)
        )
        bad, part = jax.lax.optimization_barrier((bad, jax.tree.map(take, operands)))
        is_done = jnp.arange(len(bad)).reshape(-1, *[1] * (bad.ndim - 1)) == row
        bad = jnp.where(is_done, jnp.zeros((), bad.dtype), bad)
        return is_any(bad), bad, jax.tree.map(put, results, run(part))

    with jax.named_scope(SCOPE):
        return jax.lax.while_loop(lambda carry: carry[0], redo, (is_any(bad), bad, results))[2]
