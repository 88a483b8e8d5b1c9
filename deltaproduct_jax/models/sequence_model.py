"""Embedding, blocks and head: tagger and language model in one."""

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax.ad_checkpoint import checkpoint_name as named
from jaxtyping import Array, Bool, Float, Int

from deltaproduct_jax.layers.checks import (
    as_rows,
    as_state,
    checks_arguments,
    refuse_swapped,
    states_of,
)
from deltaproduct_jax.layers.embedding import Embed
from deltaproduct_jax.layers.laid_out import takes_any_layout
from deltaproduct_jax.layers.mlp import SwiGLU
from deltaproduct_jax.layers.norm import RMSNorm
from deltaproduct_jax.layers.projection import over_tokens
from deltaproduct_jax.models.config import ModelConfig
from deltaproduct_jax.models.mixers import make_mixer
from deltaproduct_jax.models.stack import MixerState, given_to_blocks, run_blocks
from deltaproduct_jax.ops import checks
from deltaproduct_jax.ops.blocks import rows
from deltaproduct_jax.ops.containment import confined, unspoilt
from deltaproduct_jax.ops.debug import check_range, is_checking
from deltaproduct_jax.ops.packing import by_segment, starts_of_segments
from deltaproduct_jax.ops.parts import gathered_along
from deltaproduct_jax.ops.precision import common_dtype

ModelState = list[MixerState]


class Block(nnx.Module):
    """``x += mixer(norm(x))``, then ``x += mlp(norm(x))``."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs):
        norm = {"eps": config.norm_eps, **config.jax_dtypes}
        self.keeps = config.remat == "none"  # what a way back could make again
        self.attn_norm = RMSNorm(config.hidden_size, **norm)
        self.attn = make_mixer(config, layer, rngs)
        self.mlp_norm = RMSNorm(config.hidden_size, **norm)
        self.mlp = SwiGLU(
            config.hidden_size,
            config.mlp_width,
            num_layers=config.num_layers,
            initializer=config.initializer,
            initializer_range=config.initializer_range,
            rngs=rngs,
            **config.jax_dtypes,
        )

    def __call__(
        self,
        x: Float[Array, "B T D"],
        *,
        state: MixerState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        passed_on: Mapping[str, Any] | None = None,
        fused: bool = False,
    ) -> tuple[Float[Array, "B T D"], MixerState]:
        """Whole sequences; returns outputs and the mixer's state after them.

        ``passed_on`` is what :meth:`for_later_blocks` of the first block returned. With ``fused``
        norms and the MLP may have a way back of their own, of which some points have no name.
        """
        read = {"state": state, "segment_ids": segment_ids, "mask": mask}
        if fused and self._may_be_fused(x):
            x, y, bad = self.attn_norm.forked(x)
            y, reached, state = self.attn.unspoilt(y, bad, **read, **(passed_on or {}))
            return self.mlp.residual(x, y, reached, self.mlp_norm, self.keeps), state
        y, state = self.attn(named(self.attn_norm(x), "mixer_input"), **read, **(passed_on or {}))
        x = x + named(y.astype(x.dtype), "mixer_output")  # a plug-in's may be wider
        y = self.mlp(named(self.mlp_norm(x), "mlp_input"))
        return x + named(y, "mlp_output"), state

    def _may_be_fused(self, x: jax.Array) -> bool:
        """Whether a GPU's kernels take it: forward mode and second derivatives are refused then."""
        kinds = {self.attn_norm.dtype, self.mlp_norm.dtype, x.dtype}
        F = self.mlp.down_proj.kernel.shape[0]
        return len(kinds) == 1 and self.attn.runs_kernel(x) and rows.may_run(x, F)

    def step(
        self,
        state: MixerState,
        x: Float[Array, "B D"],
        *,
        passed_on: Mapping[str, Any] | None = None,
    ) -> tuple[Float[Array, "B D"], MixerState]:
        """One token for every row."""
        y, state = self.attn.step(state, self.attn_norm(x), **(passed_on or {}))
        x = x + y.astype(x.dtype)
        return x + self.mlp(self.mlp_norm(x)), state

    def for_later_blocks(
        self,
        x: Float[Array, "B T D"],
        *,
        state: MixerState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> dict[str, Any]:
        """Keywords that the mixers of later blocks get of the first; see ``SequenceMixer``.

        Takes what the first block takes. Under jit the two share what they have in common.
        """
        if self.attn.for_later_blocks is None:
            return {}
        x = self.attn_norm(x)
        return self.attn.for_later_blocks(x, state=state, segment_ids=segment_ids, mask=mask)


class SequenceModel(nnx.Module):
    """Token ids to logits over the same ids.

    ``model(tokens)`` is the form for training. For decoding, ``forward`` reads a prompt and returns
    the state after it, and ``step`` goes on token by token.

    Args:
        config: what it is made of.
        rngs: source of the parameter keys.
    """

    @checks_arguments
    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.initializers.normal(config.initializer_range)
        D, dtypes = config.hidden_size, config.jax_dtypes
        self.embeddings = Embed(config.vocab_size, D, embedding_init=normal, rngs=rngs, **dtypes)
        self.layers = nnx.List(
            [Block(config, layer, rngs=rngs) for layer in range(config.num_layers)]
        )
        self.norm = RMSNorm(D, eps=config.norm_eps, **dtypes)
        if not config.tie_embeddings:
            how = {"kernel_init": normal, "dot_general": over_tokens, "rngs": rngs}
            self.lm_head = nnx.Linear(D, config.vocab_size, use_bias=False, **how, **dtypes)

    def __call__(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T vocab"]:
        """Logits at every position, in the model's dtype.

        Args:
            tokens: token ids.
            segment_ids: sequence that each token belongs to; nothing passes from one to the next.
            mask: False at padding, which no other token sees.
        """
        return self.forward(tokens, segment_ids=segment_ids, mask=mask)[0]

    def init_state(self, batch_size: int) -> ModelState:
        """The state before the first token, one entry a block."""
        return [block.attn.init_state(batch_size) for block in self.layers]

    @takes_any_layout
    def forward(
        self,
        tokens: Int[Array, "B T"],
        *,
        state: ModelState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
        num_segments: int | None = None,
    ) -> tuple[Float[Array, "B T vocab"], ModelState]:
        """As calling the model, from a state; returns the logits and the state after the tokens.

        With ``num_segments`` every state is one of each of a row's segments, arrays ``[B, S, ...]``
        before and after it: of a packed row of prompts the state after each prompt.
        """
        if num_segments is not None:
            return self._by_segment(tokens, state, segment_ids, mask, num_segments)
        return self._read(tokens, state, segment_ids, mask, self._head)

    def unspoilt(
        self, tokens: Int[Array, "B T"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T vocab"], Bool[Array, "B T"]]:
        """Logits before NaN is put into them, and tokens that it belongs to.

        For losses that read the logits by a kernel: NaN would take a pass over all of them. No
        parameter may lie over an explicit axis.
        """
        run = functools.partial(self._read, tokens, None, segment_ids, None, self._head)
        return run(confine=_unspoilt)

    def before_head(
        self, tokens: Int[Array, "B T"], *, segment_ids: Int[Array, "B T"] | None = None
    ) -> tuple[Float[Array, "B T D"], Bool[Array, "B T"]]:
        """What :attr:`norm` and :attr:`head` make the logits of that `unspoilt` returns.

        For losses by a kernel that makes logits itself, and the same tokens that NaN belongs to.
        """
        run = functools.partial(self._read, tokens, None, segment_ids, None, lambda x: x)
        return run(confine=_unspoilt)

    @takes_any_layout
    def features(
        self,
        tokens: Int[Array, "B T"],
        *,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T D"]:
        """What :attr:`head` makes the logits of, for losses that take them piece by piece."""
        return self._read(tokens, None, segment_ids, mask, self.norm)[0]

    @property
    def head(self) -> nnx.Embed | nnx.Linear:
        """The last map: a linear one, or the embedding, to be asked by its ``attend``."""
        return self.embeddings if self.config.tie_embeddings else self.lm_head

    def runs_kernel(self, x: jax.Array) -> bool:
        """Whether a GPU runs a block of inputs ``[B, T, D]`` by a kernel: no forward mode then.

        It asks for shape and dtype alone.
        """
        return any(block.attn.runs_kernel(x) for block in self.layers)

    @property
    def head_kernel(self) -> jax.Array:
        """The matrix of :attr:`head`, [D, vocab], in the dtype that it computes in."""
        tied = self.config.tie_embeddings
        kernel = self.embeddings.embedding[...].T if tied else self.lm_head.kernel[...]
        return kernel.astype(self.config.jax_dtypes["dtype"])

    def _read(
        self,
        tokens: jax.Array,
        state: ModelState | None,
        segment_ids: jax.Array | None,
        mask: jax.Array | None,
        read_out: Callable[[jax.Array], jax.Array],
        confine: Callable[..., Any] = confined,
    ) -> Any:
        """Reads the tokens; ``read_out`` makes the outputs of what the last block gives.

        Returns what ``confine`` does, which is outputs and states.
        """
        tokens = _as_tokens(tokens, ("B", "T"))
        segment_ids, mask = as_rows(tokens.shape, segment_ids, mask)
        self._check_ids(tokens, mask)
        if state is not None:
            state = self._as_state(state, tokens.shape[0])
        before = [None] * len(self.layers) if state is None else state
        x = self._embed(tokens)
        if mask is not None:
            x = jnp.where(mask[..., None], x, 0)
        resets = None if segment_ids is None else starts_of_segments(segment_ids)

        def run(x: jax.Array, before: list[MixerState | None]) -> tuple[jax.Array, ModelState]:
            read = {"segment_ids": segment_ids, "mask": mask}
            x, after = run_blocks(self.config, self.layers, x, before, **read)
            return read_out(x), after

        return confine(run, x, before, resets, check_state=state is not None)

    def _by_segment(
        self,
        tokens: jax.Array,
        state: ModelState | None,
        segment_ids: jax.Array | None,
        mask: jax.Array | None,
        num_segments: int,
    ) -> tuple[jax.Array, ModelState]:
        tokens = _as_tokens(tokens, ("B", "T"))
        segment_ids, mask = as_rows(tokens.shape, segment_ids, mask)
        self._check_ids(tokens, mask)
        num_segments = checks.check_segments(num_segments, segment_ids)
        rows = (tokens.shape[0], num_segments)
        state = states_of(self, *rows) if state is None else self._as_state(state, *rows)
        mask = jnp.ones(tokens.shape, bool) if mask is None else mask

        def run(given: Any, state: ModelState, counts: jax.Array) -> tuple[jax.Array, ModelState]:
            tokens, mask = given
            return self.forward(tokens, state=state, mask=mask & counts)

        return by_segment(run, (tokens, mask), state, segment_ids)

    @takes_any_layout
    def step(
        self, state: ModelState, tokens: Int[Array, " B"]
    ) -> tuple[Float[Array, "B vocab"], ModelState]:
        """One token for every row: returns the logits after it and the new state."""
        refuse_swapped(state, tokens)
        tokens = _as_tokens(tokens, ("B",))
        self._check_ids(tokens, None)
        state = self._as_state(state, tokens.shape[0])
        x, after = self._embed(tokens), []
        passed_on = self.layers[0].for_later_blocks(x[:, None], state=state[0])
        given = given_to_blocks(self.config, passed_on)
        for block, entry, of_first in zip(self.layers, state, given, strict=True):
            x, entry = block.step(entry, x, passed_on=of_first)
            after.append(entry)
        return self._head(x), after

    def _as_state(self, state: ModelState, *rows: int) -> ModelState:
        """``state`` in JAX arrays; ValueError unless there is an entry a block that fits it."""
        wanted = [self.config.mixer_of(layer).state for layer in range(len(self.layers))]
        kinds = [type(entry).__name__ for entry in state] if isinstance(state, list | tuple) else []
        if len(kinds) != len(wanted) or not all(map(isinstance, state, wanted)):
            names = " or ".join(dict.fromkeys(kind.__name__ for kind in wanted))
            raise ValueError(
                f"state must hold {len(self.layers)} of {names}, one per block, got "
                f"{kinds or type(state).__name__}"
            )
        return [
            as_state(f"state[{index}]", entry, block.attn, *rows)
            for index, (block, entry) in enumerate(zip(self.layers, state, strict=True))
        ]

    def _check_ids(self, tokens: jax.Array, mask: jax.Array | None) -> None:
        """Looks for ids that no embedding has, inside ``ops.checked``; elsewhere they give NaN."""
        if is_checking():
            counted = tokens if mask is None else jnp.where(mask, tokens, 0)
            check_range("tokens", counted, 0, self.config.vocab_size - 1)

    def _embed(self, tokens: jax.Array) -> jax.Array:
        # No id counts from the end: below 0 it is out of range, and its embedding NaN.
        tokens = tokens.astype(common_dtype(tokens.dtype, jnp.int32))
        tokens = jnp.where(tokens < 0, jnp.iinfo(tokens.dtype).max, tokens)
        return self.embeddings(tokens, out_sharding=gathered_along(tokens))

    def _head(self, x: jax.Array) -> jax.Array:
        x = self.norm(x)
        return self.embeddings.attend(x) if self.config.tie_embeddings else self.lm_head(x)


def with_fields(model: SequenceModel, **fields: Any) -> SequenceModel:
    """The same parameters in a model that computes otherwise, such as in another ``dtype``.

    Args:
        model: any model.
        **fields: of its configuration that change no parameter's shape.

    Raises:
        ConfigError: a value is not available.
    """
    config = dataclasses.replace(model.config, **fields)
    graph, _ = nnx.split(nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0))))
    return nnx.merge(graph, nnx.to_pure_dict(nnx.state(model)))


def with_room(model: SequenceModel, length: int) -> SequenceModel:
    """The model, its attention's state, if it has one, with room for ``length`` tokens."""
    if not any(mixer.takes("max_length") for mixer in model.config.mixers):
        return model
    return with_fields(model, max_length=length)


def most_tokens(model: SequenceModel) -> int | None:
    """Tokens that a row may read, where some block's attention keeps no more; None for no limit."""
    limits = [getattr(block.attn, "max_length", None) for block in model.layers]
    return min((limit for limit in limits if limit is not None), default=None)


def _unspoilt(run, x, before, resets, *, check_state):
    """`confined`, but outputs as they are and which tokens are reached."""
    y, _, reached = unspoilt(run, x, None, before, resets, check_state=check_state)
    return y, reached


def _as_tokens(tokens: Any, layout: tuple[str, ...]) -> jax.Array:
    """``tokens`` as a JAX array; ValueError unless they are whole numbers of this layout."""
    tokens = checks.as_array("tokens", tokens)
    checks.check_shape("tokens", tokens.shape, layout, {})
    if not jnp.issubdtype(tokens.dtype, jnp.integer):
        raise ValueError(f"tokens must have an integer dtype, got {tokens.dtype.name}")
    return tokens


def count_parameters(model: nnx.Module | Mapping[str, Any]) -> dict[str, int]:
    """Numbers of parameters, ``total`` and ``without_embedding``, of a model or of their tree."""
    params = nnx.state(model, nnx.Param) if isinstance(model, nnx.Module) else model
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    total = size(params)
    return {"total": total, "without_embedding": total - size(params["embeddings"])}
