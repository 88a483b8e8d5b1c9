"""Embedding, blocks and head: tagger and language model in one."""

from collections.abc import Callable

import jax
from flax import nnx
from jaxtyping import Array, Bool, Float, Int

from deltaproduct_jax.layers.mlp import SwiGLU
from deltaproduct_jax.layers.norm import RMSNorm
from deltaproduct_jax.layers.rwkv7 import RWKV7
from deltaproduct_jax.models.config import ModelConfig
from deltaproduct_jax.models.mixers import MixerState, make_mixer
from deltaproduct_jax.ops import RESIDUAL_NAMES

ModelState = list[MixerState]

# What a rematerialised block keeps. All but matrix products and the op's own results is cheap to
# compute anew from them, and most of what a block would keep: norms, convolutions, activations.
_policies = jax.checkpoint_policies
_KEPT = {
    "products": _policies.save_from_both_policies(
        _policies.dots_with_no_batch_dims_saveable,
        _policies.save_only_these_names(*RESIDUAL_NAMES[1:]),
    ),
    "blocks": _policies.nothing_saveable,
}


class Block(nnx.Module):
    """``x += mixer(norm(x))``, then ``x += mlp(norm(x))``."""

    def __init__(self, config: ModelConfig, layer: int, *, rngs: nnx.Rngs):
        norm = {"eps": config.norm_eps, **config.jax_dtypes}
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
        v_first: Float[Array, "B T H V"] | None = None,
    ) -> tuple[Float[Array, "B T D"], MixerState]:
        """Whole sequences; returns outputs and the mixer's state after them.

        ``v_first`` is what :meth:`first_values` of the first block returned.
        """
        shared = {} if v_first is None else {"v_first": v_first}
        y, state = self.attn(
            self.attn_norm(x), state=state, segment_ids=segment_ids, mask=mask, **shared
        )
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state

    def step(
        self,
        state: MixerState,
        x: Float[Array, "B D"],
        *,
        v_first: Float[Array, "B 1 H V"] | None = None,
    ) -> tuple[Float[Array, "B D"], MixerState]:
        """One token for every row."""
        shared = {} if v_first is None else {"v_first": v_first}
        y, state = self.attn.step(state, self.attn_norm(x), **shared)
        x = x + y
        return x + self.mlp(self.mlp_norm(x)), state

    def first_values(
        self,
        x: Float[Array, "B T D"],
        *,
        state: MixerState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> Float[Array, "B T H V"] | None:
        """The values that RWKV-7's later blocks blend theirs with; None for other mixers.

        Takes what the first block takes. Under jit the two share what they have in common.
        """
        if not isinstance(self.attn, RWKV7):
            return None
        return self.attn.values(self.attn_norm(x), state=state, segment_ids=segment_ids, mask=mask)


class SequenceModel(nnx.Module):
    """Token ids to logits over the same ids.

    ``model(tokens)`` is the form for training. For decoding, ``forward`` reads a prompt and returns
    the state after it, and ``step`` goes on token by token.

    Args:
        config: what it is made of.
        rngs: source of the parameter keys.
    """

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.config = config
        normal = nnx.initializers.normal(config.initializer_range)
        D, dtypes = config.hidden_size, config.jax_dtypes
        self.embeddings = nnx.Embed(
            config.vocab_size, D, embedding_init=normal, rngs=rngs, **dtypes
        )
        self.layers = nnx.List(
            [Block(config, layer, rngs=rngs) for layer in range(config.num_layers)]
        )
        self.norm = RMSNorm(D, eps=config.norm_eps, **dtypes)
        if not config.tie_embeddings:
            self.lm_head = nnx.Linear(
                D, config.vocab_size, use_bias=False, kernel_init=normal, rngs=rngs, **dtypes
            )

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

    def forward(
        self,
        tokens: Int[Array, "B T"],
        *,
        state: ModelState | None = None,
        segment_ids: Int[Array, "B T"] | None = None,
        mask: Bool[Array, "B T"] | None = None,
    ) -> tuple[Float[Array, "B T vocab"], ModelState]:
        """As calling the model, from a state; returns the logits and the state after the tokens."""
        before = [None] * len(self.layers) if state is None else state
        x, after = self.embeddings(tokens), []
        first = self.layers[0].first_values(x, state=before[0], segment_ids=segment_ids, mask=mask)
        run = _runner(self.config.remat)
        for layer, (block, entry) in enumerate(zip(self.layers, before, strict=True)):
            x, entry = run(block, x, entry, segment_ids, mask, first if layer else None)
            after.append(entry)
        return self._head(x), after

    def step(
        self, state: ModelState, tokens: Int[Array, " B"]
    ) -> tuple[Float[Array, "B vocab"], ModelState]:
        """One token for every row: returns the logits after it and the new state."""
        x, after = self.embeddings(tokens), []
        first = self.layers[0].first_values(x[:, None], state=state[0])
        for layer, (block, entry) in enumerate(zip(self.layers, state, strict=True)):
            x, entry = block.step(entry, x, v_first=first if layer else None)
            after.append(entry)
        return self._head(x), after

    def _head(self, x: jax.Array) -> jax.Array:
        x = self.norm(x)
        return self.embeddings.attend(x) if self.config.tie_embeddings else self.lm_head(x)


def _runner(remat: str) -> Callable[..., tuple[jax.Array, MixerState]]:
    """Calls a block on whole sequences, and computes anew for its gradient what is not kept."""

    def run(
        block: Block,
        x: jax.Array,
        state: MixerState | None,
        segment_ids: jax.Array | None,
        mask: jax.Array | None,
        v_first: jax.Array | None,
    ) -> tuple[jax.Array, MixerState]:
        return block(x, state=state, segment_ids=segment_ids, mask=mask, v_first=v_first)

    return nnx.remat(run, policy=_KEPT[remat]) if remat in _KEPT else run


def count_parameters(model: nnx.Module) -> dict[str, int]:
    """Number of parameters: ``total``, and ``non_embedding`` without token embedding and head."""
    params = nnx.to_flat_state(nnx.state(model, nnx.Param))
    sizes = {path: leaf.get_value().size for path, leaf in params}
    outside = sum(n for path, n in sizes.items() if path[0] in ("embeddings", "lm_head"))
    total = sum(sizes.values())
    return {"total": total, "non_embedding": total - outside}
