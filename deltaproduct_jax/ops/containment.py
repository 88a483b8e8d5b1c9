"""What is not finite stays in its segment, whatever implementation runs.

Implementations multiply by masks of zeros, and zero times NaN is NaN. So none ever sees a NaN or an
infinity: they are replaced by 0 first, and which tokens had one is noted, per head, in booleans.
Afterwards the outputs of those tokens and of all behind them in the same segment become NaN, and
the final state if that segment is the last. A bad value is confined, never repaired.

Backwards the same: cotangents that are not finite, or that are not 0 where the output is NaN, are
replaced by 0, and the gradients of their token and of all before it in the segment become NaN. A
cotangent of 0 asks for nothing, so what stands behind a loss that leaves a segment out is exact.
The two ends of the way back tell each other by the cotangent of ``spoiled``, an array of zeros.

Shape suffixes: B batch, T tokens, H heads (those of the outputs).
"""

import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.linear import linear
from deltaproduct_jax.ops.varying import mark_varying_as

# exp of anything below is 0 in float64 too, and sums of it over a chunk are finite.
FORGETS = -1e4


def contained(
    run: Callable[[Any, Any], tuple[jax.Array, Any]],
    tokens: Any,
    state: Any,
    resets: jax.Array | None,
    *,
    head_axes: Any,
    check_state: bool = True,
) -> tuple[jax.Array, Any]:
    """``run(tokens, state)`` on finite operands, and NaN where what was not finite reaches.

    Args:
      run: takes the tokens as they are, and a finite state; replaces what is not finite by 0
        (`only_finite`) and returns outputs [B, T, H, ...] and a tree of states [B, H, ...]. So a
        loop can do it piece by piece, with what it reads anyway.
      tokens: a tree of floating-point arrays [B, T, ...], T at least 1.
      state: a tree of floating-point arrays [B, H, ...].
      resets: [B, T] bool, True where the state starts anew, or None.
      head_axes: the tree of ``tokens`` with the axis of heads of each; a head may stand for a
        group of those of the outputs.
      check_state: False for a state that is known to be finite.
    """
    B, T, H = *jax.tree.leaves(tokens)[0].shape[:2], jax.tree.leaves(state)[0].shape[1]
    bad = jax.tree.map(lambda x, axis: _repeat(_bad(x, (0, 1, axis)), H), tokens, head_axes)
    bad_BTH, bad_BH = _any_of(bad), None
    if check_state:
        bad_BH = _any_of(jax.tree.map(lambda x: _bad(x, (0, 1)), state))
    reached_BTH = reach(bad_BTH, bad_BH, resets)
    spoiled_BTH = mark_varying_as(jnp.zeros((B, T, H), jnp.float32), bad_BTH)
    (tokens, state), spoiled_BTH = _linked((tokens, state), spoiled_BTH, head_axes)
    return _spoil(run(tokens, state), spoiled_BTH, reached_BTH, resets)


def only_finite(tree: Any) -> Any:
    """Arrays with 0 for what is not finite; gradients pass as if nothing had been replaced."""
    is_number = lambda x: jnp.issubdtype(x.dtype, jnp.floating)
    return jax.tree.map(lambda x: _only_finite(x) if is_number(x) else x, tree)


def reach(
    bad_BTH: jax.Array, before_BH: jax.Array | None, resets_BT: jax.Array | None
) -> jax.Array:
    """True from a bad token, or a bad state before the first, to the end of its segment."""
    T = bad_BTH.shape[1]
    time = jnp.arange(T, dtype=jnp.int32).reshape(1, T, 1)
    if resets_BT is None:
        first_B1H = jnp.min(jnp.where(bad_BTH, time, T), axis=1, keepdims=True)
        reached_BTH = time >= first_B1H
        return reached_BTH if before_BH is None else reached_BTH | before_BH[:, None]
    resets_BT1 = resets_BT[..., None]
    if before_BH is not None:
        bad_BTH |= (time == 0) & ~resets_BT1 & before_BH[:, None]
    # Odd numbers for bad tokens, even ones for boundaries: what was the last event?
    events = jnp.where(bad_BTH, 2 * time + 1, jnp.where(resets_BT1, 2 * time, 0))
    return jax.lax.cummax(events, axis=1) % 2 == 1


def reach_back(bad_BTH: jax.Array, after_BH: jax.Array, resets_BT: jax.Array | None) -> jax.Array:
    """True from a bad token, or a bad state after the last, back to the start of its segment."""
    if resets_BT is not None:
        later = jnp.concatenate([resets_BT[:, 1:], jnp.zeros_like(resets_BT[:, :1])], axis=1)
        resets_BT = later[:, ::-1]
    return reach(bad_BTH[:, ::-1], after_BH, resets_BT)[:, ::-1]


def forgets(g: jax.Array | None) -> jax.Array | None:
    """Log decays of which no sum is infinite; exp of each is as it was.

    ``-inf`` means to forget everything. No gradient is lost: that of a decay of 0 is 0.
    """
    return None if g is None else jnp.maximum(g, jnp.asarray(FORGETS, g.dtype))


def _bad(x: jax.Array, kept: tuple[int, ...]) -> jax.Array:
    """Whether anything is not finite, for every index of the axes ``kept``.

    The largest magnitude tells: a CPU takes half the time for it that `jnp.any` would.
    """
    others = tuple(axis for axis in range(x.ndim) if axis not in kept)
    return ~jnp.isfinite(jnp.max(jnp.abs(jax.lax.stop_gradient(x)), axis=others, initial=0))


def _any_of(tree: Any) -> jax.Array:
    first, *others = jax.tree.leaves(tree)
    for x in others:
        first |= x
    return first


def _repeat(x_BTH: jax.Array, H: int) -> jax.Array:
    """Key heads to their groups of heads."""
    groups = H // x_BTH.shape[2]
    return x_BTH if groups == 1 else jnp.repeat(x_BTH, groups, axis=2)


@jax.custom_jvp
def _only_finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, 0)


@_only_finite.defjvp
def _only_finite_jvp(primals, tangents):
    return _only_finite(*primals), tangents[0]


@functools.partial(jax.custom_jvp, nondiff_argnums=(2,))
def _linked(operands, spoiled_BTH, head_axes):
    tokens, state = operands
    return (tokens, only_finite(state)), spoiled_BTH


@_linked.defjvp
def _linked_jvp(head_axes, primals, tangents):
    pull = functools.partial(_spoil_gradients, head_axes=head_axes)
    return _linked(*primals, head_axes), linear(_unchanged, pull, (), tangents)


def _unchanged(_, arrays):
    return arrays


def _spoil_gradients(_, cotangents, *, head_axes):
    """NaN for the gradients of every token and state that ``spoiled`` names."""
    (tokens, state), spoiled_BTH = cotangents
    spoiled_BTH = spoiled_BTH > 0

    def spoil_tokens(x, axis):
        spoiled = spoiled_BTH.reshape(*spoiled_BTH.shape[:2], x.shape[axis], -1).any(axis=-1)
        shape = [x.shape[a] if a in (0, 1, axis) else 1 for a in range(x.ndim)]
        return jnp.where(spoiled.reshape(shape), jnp.nan, x)

    tokens = jax.tree.map(spoil_tokens, tokens, head_axes)
    # A state enters where the first token's segment began.
    state = jax.tree.map(lambda x: jnp.where(_like(spoiled_BTH[:, 0], x), jnp.nan, x), state)
    return (tokens, state), jnp.zeros(spoiled_BTH.shape, jnp.float32)


@jax.custom_jvp
def _spoil(results, spoiled_BTH, reached_BTH, resets):
    return _spoil_results((reached_BTH, resets), (results, spoiled_BTH))[0]


@_spoil.defjvp
def _spoil_jvp(primals, tangents):
    fixed = primals[2:]
    return _spoil(*primals), linear(_spoil_results, _finite_cotangents, fixed, tangents[:2])[0]


def _spoil_results(fixed, results):
    (reached_BTH, _), ((o, state), spoiled_BTH) = fixed, results
    o = jnp.where(_like(reached_BTH, o), jnp.nan, o)
    last_BH = reached_BTH[:, -1]
    state = jax.tree.map(lambda x: jnp.where(_like(last_BH, x), jnp.nan, x), state)
    return (o, state), spoiled_BTH


def _finite_cotangents(fixed, cotangents):
    (reached_BTH, resets), ((do, dstate), _) = fixed, cotangents

    def guard(x, reached):
        of_nan = jnp.where(_like(reached, x) & (x != 0), jnp.nan, x)
        return _only_finite(of_nan), _bad(of_nan, tuple(range(reached.ndim)))

    do, bad_BTH = guard(do, reached_BTH)
    leaves, tree = jax.tree.flatten(dstate)
    leaves, bad_BH = zip(*(guard(x, reached_BTH[:, -1]) for x in leaves), strict=True)
    spoiled_BTH = reach_back(bad_BTH, _any_of(bad_BH), resets).astype(jnp.float32)
    return (do, jax.tree.unflatten(tree, leaves)), spoiled_BTH


def _like(flags: jax.Array, x: jax.Array) -> jax.Array:
    """Flags with axes of size 1 behind, to the rank of ``x``."""
    return flags.reshape(*flags.shape, *[1] * (x.ndim - flags.ndim))
