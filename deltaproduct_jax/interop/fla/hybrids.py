"""The option ``attn`` of flash-linear-attention's models: blocks that are softmax attention.

Its attention has heads of ``hidden_size / num_heads``, and values as wide as keys.
"""

from typing import Any, NotRequired, TypedDict

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.models.config import ATTENTION
from deltaproduct_jax.settings import require_kind, shown

OPTION = "attn"
LENGTH = "max_position_embeddings"  # tokens that a cache of ours holds; theirs grows


class Attn(TypedDict):
    """What the option may hold."""

    layers: list[int]
    num_heads: int
    num_kv_heads: NotRequired[int | None]
    qkv_bias: NotRequired[bool | None]
    window_size: NotRequired[int | None]
    rope_theta: NotRequired[float]


# Options of theirs that are fields of ours.
_SAME = ("num_kv_heads", "qkv_bias", "window_size", "rope_theta")


def to_fields(attn: Any, hidden_size: int, num_layers: int, length: Any) -> dict[str, Any]:
    """Fields of ``ModelConfig`` for a value of the option; none where no block is attention.

    Args:
        attn: the value.
        hidden_size: of the model.
        num_layers: of the model.
        length: its ``max_position_embeddings``.

    Raises:
        ConfigError: naming the entry, what it is and what it may be.
    """
    require_kind(OPTION, attn, Attn)
    unknown = sorted(set(attn) - set(Attn.__annotations__))
    if unknown:
        raise ConfigError(
            f"{OPTION}.{unknown[0]}={shown(attn[unknown[0]])} has no counterpart here; known are "
            f"{', '.join(Attn.__annotations__)}"
        )
    if not attn["layers"]:
        return {}
    layers, heads = sorted(set(attn["layers"])), attn["num_heads"]
    if layers[0] < 0 or layers[-1] >= num_layers or len(layers) == num_layers:
        raise ConfigError(
            f"{OPTION}.layers={shown(attn['layers'])} must be numbers from 0 to {num_layers - 1}, "
            "and leave a layer to the model's own mixer"
        )
    if heads < 1 or hidden_size % heads:
        raise ConfigError(f"{OPTION}.num_heads={heads} must divide hidden_size={hidden_size}")
    require_kind(LENGTH, length, int)
    same = {name: attn[name] for name in _SAME if attn.get(name) is not None}
    sizes = {"attention_layers": tuple(layers), "attention_heads": heads, "max_length": length}
    return {**sizes, **same}


def to_options(config: ModelConfig) -> dict[str, Any]:
    """``attn``, and the length, for a model of ours; ``attn`` is None where no block is attention.

    Raises:
        ConfigError: the attention has other widths than theirs can have.
    """
    layers = [i for i in range(config.num_layers) if is_attention(config, i)]
    if not layers:
        return {OPTION: None}
    attention, sizes = MIXERS[ATTENTION], config.attention_sizes
    heads, head_dim, expand_v = (sizes[name] for name in ("num_heads", "head_dim", "expand_v"))
    if heads * head_dim != config.hidden_size or expand_v != 1:
        raise ConfigError(
            f"attention has {heads} heads with keys of {head_dim} and values of "
            f"{head_dim * expand_v:g}; flash-linear-attention's have hidden_size / heads, as "
            "attention_heads makes them"
        )
    value = {name: config.value_of(name, attention) for name in _SAME}
    value["num_kv_heads"] = value["num_kv_heads"] or heads
    length = config.value_of("max_length", attention)
    return {OPTION: {"layers": layers, "num_heads": heads, **value}, LENGTH: length}


def is_attention(config: ModelConfig, block: int) -> bool:
    """Whether a block is attention beside the model's own mixer."""
    return config.mixer_of(block) is not config.registered
