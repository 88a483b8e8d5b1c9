"""The options of flash-linear-attention's models beside the fields of ours: one table a model type.

What an option may be stands beside it. What changes nothing in the function is listed by name, and
what stands in no table is refused, since a newer version may have given it a meaning.
Read off flash-linear-attention 0.6.0 and the paper's fork of 0.2.2.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.interop.fla import hybrids
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.settings import require_kind, shown


class Option(NamedTuple):
    """An option of theirs.

    Attributes:
        kind: annotation of its values.
        default: what it is where config.json says nothing.
        field: field of ``ModelConfig`` that is the same; None where it takes more than a new name.
        only: the values that we have; None for all.
    """

    kind: Any
    default: Any
    field: str | None = None
    only: tuple[Any, ...] | None = None


_WHOLE_OR_NONE, _NUMBER_OR_NONE = int | None, float | None

# What all three model types have.
_COMMON = {
    "vocab_size": Option(int, 32000, "vocab_size"),
    "hidden_size": Option(int, 2048, "hidden_size"),
    "intermediate_size": Option(_WHOLE_OR_NONE, None, "intermediate_size"),
    "hidden_ratio": Option(_NUMBER_OR_NONE, 4.0, "hidden_ratio"),
    "norm_eps": Option(float, 1e-6, "norm_eps"),
    "initializer_range": Option(float, 0.02, "initializer_range"),
    "tie_word_embeddings": Option(bool, False, "tie_embeddings"),
    "allow_neg_eigval": Option(bool, False, "allow_neg_eigval"),
    "use_short_conv": Option(bool, True, "use_short_conv"),
    "conv_size": Option(int, 4, "conv_size"),
    "conv_bias": Option(bool, False, only=(False,)),
    "hidden_act": Option(str, "swish", only=("swish",)),
    hybrids.OPTION: Option(Any, None),
    hybrids.LENGTH: Option(Any, 2048),  # read where there is a cache of attention
    "attnres_block_size": Option(_WHOLE_OR_NONE, None, only=(None,)),
    "use_l2warp": Option(bool, False, only=(False,)),
}
# Heads as their gated models count them.
_HEADS = {
    "num_hidden_layers": Option(int, 21, "num_layers"),
    "num_heads": Option(int, 6, "num_heads"),
    "num_v_heads": Option(_WHOLE_OR_NONE, None, "num_v_heads"),
    "head_dim": Option(int, 256, "head_dim"),
    "expand_v": Option(float, 2.0, "expand_v"),
}
OPTIONS: dict[str, dict[str, Option]] = {
    "gated_deltaproduct": _COMMON
    | _HEADS
    | {
        "num_householder": Option(int, 1, "num_householder"),
        "use_forget_gate": Option(bool, False),
        "use_output_gate": Option(bool | None, None),
        "use_gate": Option(bool | None, None),  # the name of the paper's fork
    },
    "gated_deltanet": _COMMON
    | _HEADS
    | {
        "use_gate": Option(bool, True, "use_output_gate"),
        "output_gate_activation": Option(str, "swish", only=("swish", "silu")),
    },
    "delta_net": _COMMON
    | {
        "num_hidden_layers": Option(int, 24, "num_layers"),
        "num_heads": Option(int, 16, "num_heads"),
        "expand_k": Option(float, 1.0),
        "expand_v": Option(float, 1.0),
        "use_gate": Option(bool, False, "use_output_gate"),
        "use_beta": Option(bool, True, only=(True,)),
        "qk_norm": Option(str, "l2", only=("l2",)),
        "qk_activation": Option(str, "silu", only=("silu", "identity")),
    },
}
# How they compute, what they write beside, and what their layers do not read. With pad_token_id a
# row of the embeddings gets no gradient there.
INERT = frozenset(
    """
    _attn_implementation_autoset _name_or_path architectures attn_mode auto_map bos_token_id dtype
    eos_token_id fuse_cross_entropy fuse_linear_cross_entropy fuse_norm fuse_swiglu id2label
    keys_to_ignore_at_inference label2id model_type output_attentions output_hidden_states
    pad_token_id problem_type return_dict torch_dtype transformers_version use_cache use_output_norm
    """.split()  # noqa: SIM905
)
# What the paper's fork reads and passes by.
INERT_IN_FORK = frozenset(
    """
    beta_conv1d_size clamp_min expand_k layer_type norm_first skip_householder_values use_beta_conv
    use_beta_conv1d use_decay_gate use_fast_model use_linear_projs
    """.split()  # noqa: SIM905
)
# Mixers of ours by (model type, whether it has a forget gate).
_MIXERS = {
    ("gated_deltaproduct", False): "delta_product",
    ("gated_deltaproduct", True): "gated_delta_product",
    ("gated_deltanet", True): "gated_delta_net",
    ("delta_net", False): "delta_net",
}
MODEL_TYPES = {mixer: kind for (kind, _), mixer in _MIXERS.items()}
ARCHITECTURES = {
    "gated_deltaproduct": "GatedDeltaProductForCausalLM",
    "gated_deltanet": "GatedDeltaNetForCausalLM",
    "delta_net": "DeltaNetForCausalLM",
}
_QK_ACTIVATIONS = {"silu": "silu", "identity": "none"}


def to_fields(saved: Mapping[str, Any]) -> dict[str, Any]:
    """Fields of our ``ModelConfig`` for a config.json of theirs.

    Raises:
        ConfigError: naming the option, what it is and what it may be.
    """
    kind = saved.get("model_type")
    if kind not in tuple(OPTIONS):  # what a file holds may have no hash
        raise ConfigError(f"model_type={shown(kind)} is not known; it may be {', '.join(OPTIONS)}")
    values = _checked(kind, saved)
    fields = {option.field: values[name] for name, option in OPTIONS[kind].items() if option.field}
    if fields["hidden_ratio"] is None:
        fields["hidden_ratio"] = 4.0
    if not fields["use_short_conv"]:
        fields["conv_size"] = None
    gated = kind == "gated_deltanet" or values.get("use_forget_gate", False)
    if values[hybrids.OPTION] is not None:
        names = (hybrids.OPTION, "hidden_size", "num_hidden_layers", hybrids.LENGTH)
        fields |= hybrids.to_fields(*(values[name] for name in names))
    own = {"gated_deltaproduct": _of_product, "delta_net": _of_delta_net}.get(kind, lambda _: {})
    return {**fields, "mixer": _MIXERS[kind, gated], "initializer": "fla", **own(values)}


def _checked(kind: str, saved: Mapping[str, Any]) -> dict[str, Any]:
    """Every option of a model type, as it is given or by default."""
    options = OPTIONS[kind]
    ignored = INERT | (INERT_IN_FORK if kind == "gated_deltaproduct" else frozenset())
    unknown = sorted(set(saved) - set(options) - ignored)
    if unknown:
        raise ConfigError(
            f"{', '.join(unknown)} of config.json: no known option of model_type={kind!r}; take it "
            "out of the file if it changes nothing"
        )
    values = {name: saved.get(name, option.default) for name, option in options.items()}
    for name, option in options.items():
        require_kind(name, values[name], option.kind)
        if option.only is not None and values[name] not in option.only:
            may = " or ".join(map(repr, option.only))
            raise ConfigError(
                f"{name}={shown(values[name])} is not available here; it may be {may}"
            )
        if option.kind in (float, _NUMBER_OR_NONE) and values[name] is not None:
            values[name] = float(values[name])  # JSON has whole ones without a point
    return values


def _of_product(values: Mapping[str, Any]) -> dict[str, Any]:
    """The output gate, which the paper's fork calls use_gate; both versions have one by default."""
    given = {name: values[name] for name in ("use_output_gate", "use_gate")}
    said = {value for value in given.values() if value is not None}
    if len(said) == 2:
        raise ConfigError(
            f"use_output_gate={given['use_output_gate']} and use_gate={given['use_gate']} are one "
            "option by two names; they may not differ"
        )
    return {"use_output_gate": said.pop() if said else True}


def _of_delta_net(values: Mapping[str, Any]) -> dict[str, Any]:
    """Widths of a head, which DeltaNet gives as those of all heads over the model's."""
    heads, widths = values["num_heads"], {}
    for name in ("expand_k", "expand_v"):
        width = values["hidden_size"] * values[name]
        if heads < 1 or round(width) < 1 or abs(width - round(width)) > 1e-6 * width:
            raise ConfigError(f"{name}={values[name]} times hidden_size must be a whole number")
        if round(width) % heads:
            raise ConfigError(f"{name}={values[name]}: num_heads={heads} must divide {width}")
        widths[name] = round(width) // heads
    return {
        "head_dim": widths["expand_k"],
        "expand_v": widths["expand_v"] / widths["expand_k"],
        "qk_activation": _QK_ACTIVATIONS[values["qk_activation"]],
    }


def to_options(config: ModelConfig) -> dict[str, Any]:
    """What config.json says of a model of ours, ``model_type`` among it.

    Raises:
        ConfigError: naming the field that flash-linear-attention's model does not have.
    """
    if config.mixer not in MODEL_TYPES:
        raise ConfigError(
            f"mixer={config.mixer!r} is no model of flash-linear-attention's that is written; it "
            f"may be {', '.join(MODEL_TYPES)}"
        )
    kind = MODEL_TYPES[config.mixer]
    _refuse_what_they_lack(config, kind)
    saved: dict[str, Any] = {"architectures": [ARCHITECTURES[kind]], "model_type": kind}
    for name, option in OPTIONS[kind].items():
        if option.field is not None:
            saved[name] = config.value_of(option.field)
    saved |= {"intermediate_size": config.mlp_width, **hybrids.to_options(config)}
    if kind == "gated_deltaproduct":
        saved["use_forget_gate"] = config.mixer == "gated_delta_product"
        saved["use_output_gate"] = config.value_of("use_output_gate")
        del saved["num_v_heads"]
    if kind == "delta_net":
        width = config.num_heads * config.head_dim
        saved["expand_k"] = width / config.hidden_size
        saved["expand_v"] = width * config.value_of("expand_v") / config.hidden_size
        named = {ours: theirs for theirs, ours in _QK_ACTIVATIONS.items()}
        saved["qk_activation"] = named[config.value_of("qk_activation")]
    return saved


def _refuse_what_they_lack(config: ModelConfig, kind: str) -> None:
    of_theirs = f"which model_type={kind!r} of flash-linear-attention has not"
    if config.beta_bias is not None:
        raise ConfigError(f"beta_bias={config.beta_bias} is a bias, {of_theirs}")
    if kind != "delta_net" and config.value_of("qk_activation") != "silu":
        raise ConfigError(
            f"qk_activation={config.qk_activation!r} is a choice {of_theirs}; it may be 'silu'"
        )
    grouped = config.num_v_heads not in (None, config.num_heads)
    if kind != "gated_deltanet" and grouped:
        raise ConfigError(
            f"num_v_heads={config.num_v_heads} is an option {of_theirs}; it may be num_heads, "
            f"{config.num_heads}"
        )
