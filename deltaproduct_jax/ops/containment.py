"""What is not finite stays in its segment, whatever implementation runs.

Implementations multiply by masks of zeros, and zero times NaN is NaN. So none ever sees a NaN or an
infinity: they are replaced by 0 first, and which tokens had one is noted, per head, in booleans.
Afterwards the outputs of those tokens and of all behind them in the same segment become NaN, and
the final state if that segment is the last. A bad value is confined, never repaired.

Backwards the same: cotangents that are not finite, or that are not 0 where the output is NaN, are
replaced by 0, and the gradients of their token and of all before it in the segment become NaN. A
cotangent of 0 asks for nothing, so what stands behind a loss that leaves a segment out is exact.
The two ends of the way back tell each other by the cotangent of ``link``, an array of zeros.

Shape suffixes: B batch, T tokens, H heads (those of the outputs).
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name

from deltaproduct_jax.ops.checks import known_finite
from deltaproduct_jax.ops.debug import nan_if
from deltaproduct_jax.ops.linear import linear
from deltaproduct_jax.ops.unavailable import by_case
from deltaproduct_jax.ops.varying import mark_varying_as

Run = Callable[[Any, Any], tuple[jax.Array, Any]]
POINT = "reached_tokens"  # name of what `confined` finds, for policies of `jax.checkpoint`


def contained(
    run: Run,
    tokens: Any,
    state: Any,
    resets: jax.Array | None,
    *,
    head_axes: Any,
    check_state: bool = True,
    axis_name: Any = None,
    mark: Callable[[Any, jax.Array], Any] = lambda tokens, _: tokens,
    asks_first: bool = False,
) -> tuple[jax.Array, Any]:
    """``run(tokens, state)`` on finite operands, and NaN where what was not finite reaches.

    Args:
      run: takes the tokens as they are, and a finite state; replaces what is not finite by 0
        (`only_finite`) and returns outputs [B, T, H, ...] and a tree of states [B, H, ...]. So a
        loop can do it piece by piece, with what it reads anyway.
      tokens: a tree of floating-point arrays [B, T, ...].
      state: a tree of floating-point arrays [B, H, ...].
      resets: [B, T] bool, True where the state starts anew, or None.
      head_axes: the tree of ``tokens`` with the axis of heads of each; a head may stand for a
        group of those of the outputs.
      check_state: False for a state that is known to be finite.
      axis_name: inside `shard_map`, the axis, or several, over which the sequence is cut: the state
        enters on its first device, and the returned one leaves on its last.
      mark: what ``run`` is given of the tokens and of the bad ones among them, [B, T, H] bool.
      asks_first: a CPU asks whether anything is bad before it looks for it; only for arrays that
        do not lie over explicit mesh axes.
    """
    leaves, axes = jax.tree.leaves(tokens), jax.tree.leaves(head_axes)
    if 0 in leaves[0].shape[:2]:  # nothing is bad, and empty arrays lose the axes they vary over
        return run(tokens, state)
    looked_at = (leaves, axes, state if check_state else (), resets)
    bad_BTH, reached_BTH = _look(*looked_at, axis_name, asks_first=asks_first)
    tokens, state = _mapped_alike(tokens, state, reached_BTH, head_axes)
    zero = jnp.float32(0)
    link_BTH = mark_varying_as(jnp.where(reached_BTH, zero, zero), reached_BTH)  # mapped alike
    (tokens, state), link_BTH = _linked((tokens, state), link_BTH, head_axes, axis_name)
    pull = functools.partial(_finite_cotangents, axis_name=axis_name)
    return _spoil(run(mark(tokens, bad_BTH), state), link_BTH, reached_BTH, resets, pull, axis_name)


def _look(leaves, axes, state, resets, axis_name=None, *, asks_first=False):
    """Which tokens are bad, and which are reached, [B, T, H] both."""
    H = max(x.shape[axis] for x, axis in zip(leaves, axes, strict=True))

    def look(leaves):
        of_each = zip(leaves, axes, strict=True)
        return _any_of([_repeat(_bad(x, (0, 1, axis)), H) for x, axis in of_each])

    bad_BTH = by_case(look, leaves) if asks_first else look(leaves)
    return bad_BTH, reach(bad_BTH, _bad_state(state), resets, axis_name)


def _bad_state(state):
    return _any_of([_bad(x, (0, 1)) for x in jax.tree.leaves(state)])


class Watched(NamedTuple):
    """`contained` for a pass that has a derivative of its own: its two ways, one by one.

    Attributes:
      bad: tokens of which anything is not finite, [B, T, H] bool.
      reached: tokens whose outputs are NaN, the same.
      resets: where the state starts anew, [B, T] bool, or None.
      head_axes: as above.
      bad_state: heads of whose state anything is not finite, [B, H] bool.
    """

    bad: jax.Array
    reached: jax.Array
    resets: jax.Array | None
    head_axes: Any
    bad_state: jax.Array

    @classmethod
    def of(cls, tokens: Any, state: Any, resets: jax.Array | None, head_axes: Any) -> "Watched":
        """For operands as the caller has them; arguments as of `contained`."""
        leaves, axes = jax.tree.leaves(tokens), jax.tree.leaves(head_axes)
        looked = _look(leaves, axes, state, resets)
        return cls(*looked, resets, head_axes, _bad_state(state))

    @property
    def _fixed(self):
        return self.reached, self.reached[:, -1], self.resets

    def spoil(self, o: jax.Array, state: Any) -> tuple[jax.Array, Any]:
        """NaN for results that are reached."""
        return _map_reached(nan_if, self._fixed, o, state)

    def finite_cotangents(self, do: jax.Array, dstate: Any) -> tuple[tuple[Any, Any], jax.Array]:
        """Cotangents of the results for the pass to take, and what `spoil_gradients` is told."""
        return _finite_cotangents(self._fixed, ((do, dstate), None), axis_name=None)

    def spoil_gradients(self, tokens: Any, state: Any, told: jax.Array) -> tuple[Any, Any]:
        """NaN for gradients of which bad cotangents are to blame."""
        cotangents = (tokens, state), told
        pulled = _spoil_gradients((), cotangents, head_axes=self.head_axes, axis_name=None)
        return pulled[0]


def confined(
    run: Run, x: jax.Array, state: Any, resets: jax.Array | None, *, check_state: bool = True
) -> tuple[jax.Array, Any]:
    """`contained` for a layer or a model: ``run`` has parameters, and they share in what is bad.

    A cotangent that is not finite therefore goes the whole way back. One that is 0 asks for
    nothing, and no parameter then learns of a segment that is bad.

    Args:
      run: takes ``x`` and ``state`` when they are finite; returns [B, T, ...] and a tree [B, ...].
      x: [B, T, D].
      state: a tree of arrays [B, ...], or None; only those of floating point matter.
      resets, check_state: as above.
    """
    y, after, reached_BT = unspoilt(run, x, None, state, resets, check_state=check_state)
    return nan_where(_like(reached_BT, y), y) if x.shape[1] else y, after


def unspoilt(
    run: Run, x: jax.Array, bad_BT: Any, state: Any, resets: Any, *, check_state: bool = True
) -> tuple[jax.Array, Any, jax.Array]:
    """`confined`, outputs as they are, and which are to be NaN; bad tokens, if given, are 0."""
    if not x.shape[1]:
        return *run(x, state), jnp.zeros(x.shape[:2], bool)
    if bad_BT is None:
        bad_BT, x = _bad(x, (0, 1)), only_finite(x)
    leaves = filter(_is_floating, jax.tree.leaves(state) if check_state else ())
    before_B1 = _any_of([_bad(leaf, (0,))[:, None] for leaf in leaves])
    reached_BT1 = checkpoint_name(reach(bad_BT[..., None], before_B1, resets), POINT)
    with known_finite():
        y, after = run(x, only_finite(state))
    # One by one: of a state that nobody asks for JAX then knows that its cotangent is zero, where
    # zeros of its size would go all the way back.
    last = reached_BT1[:, -1]
    spoilt = lambda leaf: nan_where(_like(last, leaf), leaf) if _is_floating(leaf) else leaf
    return y, jax.tree.map(spoilt, after), reached_BT1[..., 0]


def only_finite(tree: Any) -> Any:
    """Arrays with 0 for what is not finite; gradients pass as if nothing had been replaced."""
    return jax.tree.map(lambda x: _only_finite(x) if _is_floating(x) else x, tree)


def reach(
    bad_BTH: jax.Array,
    before_BH: jax.Array | None,
    resets_BT: jax.Array | None,
    axis_name: Any = None,
    reverse: bool = False,
) -> jax.Array:
    """True from a bad token, or a bad state before the first, to the end of its segment.

    Args:
      bad_BTH: whether a token is bad.
      before_BH: whether the state is, or None.
      resets_BT: True where a segment starts, or None.
      axis_name: the axis over which the sequence is cut; ``before`` is that of its first device.
      reverse: the sequence runs from the last device to the first.
    """
    if axis_name is None:
        return _reach(bad_BTH, before_BH, resets_BT)
    if before_BH is not None:
        before_BH &= _is_first(axis_name, reverse)
    own_BH = _reach(bad_BTH, before_BH, resets_BT)[:, -1]
    is_open_BH = jnp.ones_like(own_BH)
    if resets_BT is not None:
        is_open_BH &= ~jnp.any(resets_BT, axis=1, keepdims=True)
    both = jax.lax.all_gather(jnp.stack([own_BH, is_open_BH]), axis_name)

    def then(first, second):
        return second[0] | (second[1] & first[0]), first[1] & second[1]

    after_NBH, _ = jax.lax.associative_scan(then, (both[:, 0], both[:, 1]), reverse=reverse)
    index, size = jax.lax.axis_index(axis_name), jax.lax.axis_size(axis_name)
    of_before = jnp.clip(index + 1 if reverse else index - 1, 0, size - 1)
    entering_BH = after_NBH[of_before] & ~_is_first(axis_name, reverse)
    entering_BH = entering_BH if before_BH is None else entering_BH | before_BH
    return _reach(bad_BTH, entering_BH, resets_BT)


def _is_first(axis_name: Any, reverse: bool = False) -> jax.Array | bool:
    """Whether this device has the first piece of the sequence, in its direction."""
    if axis_name is None:
        return True
    return jax.lax.axis_index(axis_name) == (jax.lax.axis_size(axis_name) - 1 if reverse else 0)


def _reach(bad_BTH, before_BH, resets_BT):
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


def reach_back(
    bad_BTH: jax.Array,
    after_BH: jax.Array | None,
    resets_BT: jax.Array | None,
    axis_name: Any = None,
) -> jax.Array:
    """True from a bad token, or a bad state after the last, back to the start of its segment."""
    if resets_BT is not None:
        if axis_name is None:
            next_B1 = jnp.zeros_like(resets_BT[:, :1])
        else:
            size = jax.lax.axis_size(axis_name)
            pairs = [(i + 1, i) for i in range(size - 1)]
            next_B1 = jax.lax.ppermute(resets_BT[:, :1], axis_name, pairs)
        resets_BT = jnp.concatenate([resets_BT[:, 1:], next_B1], axis=1)[:, ::-1]
    return reach(bad_BTH[:, ::-1], after_BH, resets_BT, axis_name, reverse=True)[:, ::-1]


def _bad(x: jax.Array, kept: tuple[int, ...]) -> jax.Array:
    """Whether anything is not finite, for every index of the axes ``kept``.

    ``x - x`` is 0, or NaN where x is not finite, and a sum of such a NaN if any is one: a CPU takes
    less time for it than for `jnp.any`. The largest magnitude would not do: from 8 numbers on XLA
    of jaxlib 0.10.2 overlooks NaN in a maximum. Only the last axis is summed, see `spread`.
    """
    x = jax.lax.stop_gradient(x)
    others = [axis for axis in range(x.ndim) if axis not in kept]
    wrong = x - x
    if others and others[-1] == x.ndim - 1:
        wrong = jnp.sum(wrong, axis=others.pop())
    return jnp.any(wrong != 0, axis=tuple(others))


def _mapped_alike(tokens: Any, state: Any, reached_BTH: jax.Array, head_axes: Any) -> Any:
    """The operands as they are; under `jax.vmap` all are mapped if any is.

    The rules of JAX for mapped functions with a derivative of their own want results and their
    tangents to be mapped alike, and `linear` maps all of its results. XLA drops the choices: each
    is by row, token and head, so that nothing moves where those lie over a mesh.
    """

    def choose(x, axis):
        of_heads = reached_BTH.reshape(*reached_BTH.shape[:2], x.shape[axis], -1)[..., 0]
        shape = [x.shape[a] if a in (0, 1, axis) else 1 for a in range(x.ndim)]
        return jnp.where(of_heads.reshape(shape), x, x)

    tokens = jax.tree.map(choose, tokens, head_axes)
    first_BH = reached_BTH[:, 0]
    return tokens, jax.tree.map(lambda x: jnp.where(_like(first_BH, x), x, x), state)


def _any_of(flags: list[jax.Array]) -> jax.Array | None:
    return functools.reduce(jnp.logical_or, flags) if flags else None


def _is_floating(x: jax.Array) -> bool:
    return jnp.issubdtype(x.dtype, jnp.floating)


def _repeat(x_BTH: jax.Array, H: int) -> jax.Array:
    """Key heads to their groups of heads."""
    groups = H // x_BTH.shape[2]
    return x_BTH if groups == 1 else jnp.repeat(x_BTH, groups, axis=2)


@jax.custom_jvp
def _only_finite(x: jax.Array) -> jax.Array:
    return jnp.where(jnp.isfinite(x), x, 0)


_only_finite.defjvps(lambda tangent, *_: tangent)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _linked(operands, link_BTH, head_axes, axis_name):
    tokens, state = operands
    return (tokens, only_finite(state)), link_BTH


@_linked.defjvp
def _linked_jvp(head_axes, axis_name, primals, tangents):
    pull = functools.partial(_spoil_gradients, head_axes=head_axes, axis_name=axis_name)
    return _linked(*primals, head_axes, axis_name), linear(_unchanged, pull, (), tangents)


_unchanged = lambda _, arrays: arrays


def _spoil_gradients(_, cotangents, *, head_axes, axis_name):
    """NaN for the gradients of every token and state that the cotangent of ``link`` names."""
    (tokens, state), spoiled_BTH = cotangents
    spoiled_BTH = spoiled_BTH > 0

    def spoil_tokens(x, axis):
        spoiled = spoiled_BTH.reshape(*spoiled_BTH.shape[:2], x.shape[axis], -1).any(axis=-1)
        shape = [x.shape[a] if a in (0, 1, axis) else 1 for a in range(x.ndim)]
        return nan_if(spoiled.reshape(shape), x)

    tokens = jax.tree.map(spoil_tokens, tokens, head_axes)
    # A state enters where the first token's segment began.
    first_BH = spoiled_BTH[:, 0] & _is_first(axis_name)
    state = jax.tree.map(lambda x: nan_if(_like(first_BH, x), x), state)
    return (tokens, state), jnp.zeros_like(spoiled_BTH, jnp.float32)


@functools.partial(jax.custom_jvp, nondiff_argnums=(4, 5))
def _spoil(results, link_BTH, reached_BTH, resets, pull, axis_name):
    """NaN for results that are reached; ``pull`` is what happens to their cotangents."""
    last_BH = reached_BTH[:, -1] & _is_first(axis_name, reverse=True)
    return _spoil_results((reached_BTH, last_BH, resets), (results, link_BTH))[0]


@_spoil.defjvp
def _spoil_jvp(pull, axis_name, primals, tangents):
    *_, reached_BTH, resets = primals
    last_BH = reached_BTH[:, -1] & _is_first(axis_name, reverse=True)
    fixed = (reached_BTH, last_BH, resets)
    out = _spoil(*primals, pull, axis_name)
    return out, linear(_spoil_results, pull, fixed, tangents[:2])[0]


def _spoil_results(fixed, results):
    ((o, state), link_BTH) = results
    return _map_reached(nan_if, fixed, o, state), link_BTH


def _finite_cotangents(fixed, cotangents, *, axis_name):
    ((do, dstate), _) = cotangents
    do, dstate = _map_reached(_nan_unless_zero, fixed, do, dstate)
    after_BH = _any_of([_bad(x, (0, 1)) for x in jax.tree.leaves(dstate)])
    dlink_BTH = reach_back(_bad(do, (0, 1, 2)), after_BH, fixed[2], axis_name)
    return only_finite((do, dstate)), dlink_BTH.astype(jnp.float32)


@jax.custom_jvp
def nan_where(reached: jax.Array, x: jax.Array) -> jax.Array:
    """``x`` with NaN where it is reached, flags [..., 1] alike; so is what is not 0 backwards."""
    return nan_if(reached, x)


@nan_where.defjvp
def _nan_where_jvp(primals, tangents):
    return nan_where(*primals), linear(nan_if, _nan_unless_zero, primals[0], tangents[1])


def _nan_unless_zero(reached, x):
    return nan_if(reached & (x != 0), x)


def _map_reached(function, fixed, o, state):
    """``function`` of outputs and states, each with whether it is reached."""
    reached_BTH, last_BH, _ = fixed
    of_state = jax.tree.map(lambda x: function(_like(last_BH, x), x), state)
    return function(_like(reached_BTH, o), o), of_state


def _like(flags: jax.Array, x: jax.Array) -> jax.Array:
    """Flags with axes of size 1 behind, to the rank of ``x``."""
    return flags.reshape(*flags.shape, *[1] * (x.ndim - flags.ndim))
