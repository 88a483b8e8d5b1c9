"""The programs of a generator: rows read a piece of their prompts, or draw some tokens each.

A row has read all of its tokens but the last: that one gives the logits of what comes next, so a
prompt's logits are those at its own last token, however it was padded or cut.

Dimension key: ``B`` rows, ``P`` tokens of a piece, ``S`` stop tokens.
"""

import functools
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Int, Key

from deltaproduct_jax.models.generation.sampling import Needs, Rules, draw, row_keys
from deltaproduct_jax.models.sequence_model import ModelState, SequenceModel

Params = Any
Axes = tuple[int, ...]  # of rows, for every leaf of a tree


class Rows(NamedTuple):
    """All that a program of B rows goes on with.

    Attributes:
        state: of the model, after all tokens of a row but the last.
        token: the last token.
        length: tokens of the row so far.
        own: the row's own number, for its draws.
        left: tokens that it still draws; 0 in a row that has ended or is empty.
        stops: tokens that end it; -1 is none.
        rules: how it draws.
    """

    state: ModelState
    token: Int[Array, " B"]
    length: Int[Array, " B"]
    own: Array
    left: Int[Array, " B"]
    stops: Int[Array, "B S"]
    rules: Rules


class Programs:
    """Jitted functions of one model's description; its parameters are arguments.

    Args:
        graph: the description.
        axes_of_state: where rows are in every leaf of its state.
    """

    def __init__(self, graph: nnx.GraphDef, axes_of_state: Axes):
        self._graph, self._axes_of_state = graph, axes_of_state
        self.absorb = jax.jit(self._absorb)
        # What goes on needs no second copy of the state.
        decode = {
            "static_argnames": ("stride", "needs", "vocab_size", "keeps"),
            "donate_argnames": "rows",
        }
        self.decode = jax.jit(self._decode, **decode)
        self.put = jax.jit(self._put, donate_argnames="rows")
        self.take = jax.jit(self._take)

    def _model(self, params: Params) -> SequenceModel:
        return nnx.merge(self._graph, params)

    def _absorb(
        self,
        params: Params,
        state: ModelState,
        tokens: Int[Array, "B P"],
        mask: Bool[Array, "B P"],
    ) -> ModelState:
        """The state after one more piece; rows of which nothing counts keep theirs bit by bit."""
        # Logits are not asked for, so that the head is no part of the program.
        _, after = self._model(params).forward(tokens, state=state, mask=mask)
        return self._where(jnp.any(mask, axis=1), after, state)

    def _decode(
        self,
        params: Params,
        rows: Rows,
        key: Key[Array, ""],
        *,
        stride: int,
        needs: Needs,
        vocab_size: int,
        keeps: bool,
    ) -> tuple[Rows, Int[Array, "stride B"]]:
        """``stride`` tokens more in every row that goes on; -1 where a row has none.

        A token of -2 says that the logits were not finite; the row ends there. Only with ``keeps``
        is the state of a row that has ended kept: all others are then read once more, and cannot
        be changed in place.
        """
        model = self._model(params)

        def one(rows: Rows, _: None) -> tuple[Rows, jax.Array]:
            goes_on = rows.left > 0
            logits, state = model.step(rows.state, rows.token)
            keys = row_keys(key, rows.own, rows.length)
            drawn = draw(keys, logits[:, :vocab_size], rows.rules, needs)
            ends = (drawn < 0) | jnp.any(drawn[:, None] == rows.stops, axis=1)
            after = rows._replace(
                state=self._where(goes_on, state, rows.state) if keeps else state,
                token=jnp.where(goes_on, drawn, rows.token),
                length=jnp.where(goes_on, rows.length + 1, rows.length),
                left=jnp.where(goes_on & ~ends, rows.left - 1, 0),
            )
            return after, jnp.where(goes_on, jnp.where(drawn < 0, -2, drawn), -1)

        return jax.lax.scan(one, rows, None, length=stride)

    def _put(self, rows: Rows, index: Int[Array, ""], row: Rows) -> Rows:
        """``rows`` with another row at one place."""
        write = jax.lax.dynamic_update_slice_in_dim
        return self._map(lambda axis, x, y: write(x, y, index, axis), rows, row)

    def _take(self, rows: Rows, index: Int[Array, ""]) -> Rows:
        """One of ``rows``, for itself."""
        cut = jax.lax.dynamic_slice_in_dim
        return self._map(lambda axis, x: cut(x, index, 1, axis), rows)

    def _map(self, function: Callable[..., Any], rows: Rows, *others: Rows) -> Rows:
        leaves, structure = jax.tree.flatten(rows)
        axes = [*self._axes_of_state, *[0] * (len(leaves) - len(self._axes_of_state))]
        columns = [leaves, *(jax.tree.leaves(other) for other in others)]
        return structure.unflatten(list(map(function, axes, *columns)))

    def _where(self, flags: jax.Array, state: ModelState, otherwise: ModelState) -> ModelState:
        """States of the rows whose flag is up, and others."""
        leaves, structure = jax.tree.flatten(state)

        def choose(axis: int, x: jax.Array, y: jax.Array) -> jax.Array:
            shape = [1] * x.ndim
            shape[axis] = -1
            return jnp.where(flags.reshape(shape), x, y)

        pairs = (leaves, jax.tree.leaves(otherwise))
        return structure.unflatten(list(map(choose, self._axes_of_state, *pairs)))


@functools.lru_cache(maxsize=8)
def programs_of(graph: nnx.GraphDef, axes_of_state: Axes) -> Programs:
    """The programs of a model, compiled once however many generators it has."""
    return Programs(graph, axes_of_state)


def axes_of_state(model: SequenceModel) -> Axes:
    """Where rows are in every leaf of a model's state."""
    two, three = (jax.eval_shape(functools.partial(model.init_state, n)) for n in (2, 3))
    pairs = zip(jax.tree.leaves(two), jax.tree.leaves(three), strict=True)
    return tuple(_differing(x.shape, y.shape) for x, y in pairs)


def _differing(two: tuple[int, ...], three: tuple[int, ...]) -> int:
    (axis,) = (i for i, sizes in enumerate(zip(two, three, strict=True)) if sizes == (2, 3))
    return axis
