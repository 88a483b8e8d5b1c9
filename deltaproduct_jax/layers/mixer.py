"""What mixers are to a model, and what the recurrent ones share.

Every mixer maps ``[B, T, D]`` to ``[B, T, D]``: whole sequences with segments and padding, or one
token at a time.
"""

import abc
from collections.abc import Callable
from typing import Any, ClassVar, Generic, TypeVar

import jax
import jax.numpy as jnp
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from deltaproduct_jax.layers import checks
from deltaproduct_jax.layers.laid_out import takes_any_layout
from deltaproduct_jax.layers.padding import without_padding
from deltaproduct_jax.ops.containment import unspoilt
from deltaproduct_jax.ops.debug import nan_if
from deltaproduct_jax.ops.packing import by_segment, starts_of_segments
from deltaproduct_jax.ops.parts import along_rows_of

# What stands around a method of a subclass, the last of several outermost.
_AROUND: dict[str, tuple[Callable[..., Any], ...]] = {
    "__init__": (checks.checks_arguments,),
    "__call__": (takes_any_layout, checks.checks_outputs, checks.checks_sequences),
    "_mix": (checks.checks_mixed,),
    "_token": (checks.checks_mixed,),
    "for_later_blocks": (takes_any_layout, checks.checks_sequences),
    "init_state": (checks.checks_batch_size,),
    "step": (takes_any_layout, checks.checks_token),
}

State = TypeVar("State")  # what a mixer keeps of the past, a named tuple of arrays


class SequenceMixer(nnx.Module, Generic[State]):
    """What a model asks of a mixer.

    ``mixer(x, state=, segment_ids=, mask=) -> (y, state)`` for whole sequences,
    ``mixer.step(state, x) -> (y, state)`` for one token, and ``mixer.init_state(batch_size)``, the
    state before the first token: arrays with a leading batch axis.

    A hook, for mixers whose later blocks read something of the first (the values of RWKV-7):
    ``mixer.for_later_blocks(x, state=, segment_ids=, mask=)`` is asked of the model's first block,
    with what that block's mixer takes, and returns keywords that the mixers of all later blocks get
    beside theirs, in calls and in steps (there T is 1). None, as here, passes nothing on.

    What a subclass defines of these, and its constructor, refuses arguments that do not fit before
    it begins, see ``layers/checks.py``; its own code meets JAX arrays of the right shapes. Outputs
    and states that it returns are refused if they do not fit what it was given.

    Attributes:
        implementations: what the keyword ``implementation`` may be, if the layer takes it.
        hidden_size: width ``D``, the constructor's first argument.
    """

    implementations: ClassVar[tuple[str, ...]] = ()
    for_later_blocks: ClassVar[Callable[..., dict[str, Any]] | None] = None

    def __init_subclass__(cls, **kwargs: Any) -> None:
        """Puts the checks around the methods that the class defines."""
        super().__init_subclass__(**kwargs)
        for name, wrappers in _AROUND.items():
            if callable(vars(cls).get(name)):
                for wrap in wrappers:
                    setattr(cls, name, wrap(vars(cls)[name]))

    @abc.abstractmethod
    def init_state(self, batch_size: int) -> State:
        """The state before the first token."""

    def runs_kernel(self, x: jax.Array) -> bool:
        """Whether a GPU runs these inputs ``[B, T, D]`` by a kernel, which is differentiated once.

        A block then does the same with what stands around the mixer.
        """
        del x
        return False

    def _by_segment(
        self,
        x: jax.Array,
        state: State | None,
        segment_ids: jax.Array,
        mask: jax.Array | None,
        num_segments: int,
    ) -> tuple[jax.Array, State]:
        """What a call with ``num_segments`` returns, for those that take it."""
        state = checks.states_of(self, x.shape[0], num_segments) if state is None else state
        mask = jnp.ones(x.shape[:2], bool) if mask is None else mask

        def run(tokens: tuple[jax.Array, jax.Array], state: State, counts: jax.Array) -> Any:
            x, mask = tokens
            return self(x, state=state, mask=mask & counts)

        return by_segment(run, (x, mask), state, segment_ids)

    @abc.abstractmethod
    def step(self, state: State, x: Float[Array, "B D"]) -> tuple[Float[Array, "B D"], State]:
        """One token for every row: returns the outputs and the state after it."""


class RecurrentMixer(SequenceMixer[State]):
    """Sequence mixer ``[B, T, D] -> [B, T, D]`` whose state is all that it keeps of the past.

    A subclass has ``init_state(batch_size)``, and two methods for inputs without padding in front
    of or between tokens, both returning outputs and state: ``_mix(x, state, segment_ids, length)``,
    where the first ``length`` tokens ``[B]`` of a row count (None: all), and ``_token(x, state)``,
    where T is 1.
    """

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        state: State | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        num_segments: int | None = None,
    ) -> tuple[Float[Array, "B T D"], State]:
        """Mixes whole sequences.

        Args:
            x: inputs.
            state: state of the tokens before; None for none. It continues each row's first segment.
            segment_ids: sequence that each token belongs to; convolution and recurrence start anew
                where it changes.
            mask: False at padding, anywhere in a row. Padding is skipped: neither convolution nor
                recurrence sees it, and its output is zero.
            num_segments: S, segments that a row has at most: every state is then one of each
                segment, arrays ``[B, S, ...]``, both that before it and that after it. Outputs of
                segments beyond the S-th are NaN.

        Returns:
            The outputs, and the state after the last token of each row's last segment.
        """
        if num_segments is not None:
            return self._by_segment(x, state, segment_ids, mask, num_segments)
        given = state is not None
        state = state if given else self.init_state(x.shape[0])
        if 0 in x.shape:
            return x.astype(getattr(self, "dtype", x.dtype)), state
        state = along_rows_of(x, state)
        return without_padding(self._mix, x, state, segment_ids, mask, check_state=given)

    def unspoilt(
        self,
        x: Float[Array, "B T D"],
        bad: Bool[Array, "B T"],
        *,
        state: State | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T D"], Bool[Array, "B T"], State]:
        """A call for whoever looked for what is not finite, and puts NaN into the outputs.

        Args:
            x: inputs with 0 for what is not finite.
            bad: tokens where anything was not.
            state, segment_ids, mask: as in a call.

        Returns:
            The outputs, tokens whose outputs shall be NaN, and the state.
        """
        if mask is not None:
            x = nan_if(bad[..., None], x)
            y, state = self(x, state=state, segment_ids=segment_ids, mask=mask)
            return y, jnp.zeros_like(bad), state
        given = state is not None
        state = along_rows_of(x, state if given else self.init_state(x.shape[0]))
        resets = None if segment_ids is None else starts_of_segments(segment_ids)
        run = lambda x, state: self._mix(x, state, segment_ids, None)
        y, state, reached = unspoilt(run, x, bad, state, resets, check_state=given)
        return y, reached, state

    def step(self, state: State, x: Float[Array, "B D"]) -> tuple[Float[Array, "B D"], State]:
        """One token for every row: returns the outputs and the state after it."""
        if 0 in x.shape:
            return x.astype(getattr(self, "dtype", x.dtype)), state
        y, state = self._token(x[:, None], along_rows_of(x, state))
        return y[:, 0], state

    @abc.abstractmethod
    def _mix(
        self,
        x: jax.Array,
        state: State,
        segment_ids: jax.Array | None,
        length: jax.Array | None,
    ) -> tuple[jax.Array, State]:
        """Outputs and the state after each row's first ``length`` tokens."""

    @abc.abstractmethod
    def _token(self, x: jax.Array, state: State) -> tuple[jax.Array, State]:
        """Outputs and the state after it of one token, where T is 1."""
