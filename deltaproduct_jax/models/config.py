"""What a model is made of: one frozen dataclass that checks itself."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from deltaproduct_jax.errors import ConfigError, require_at_least, require_one_of
from deltaproduct_jax.layers.delta_product import QK_ACTIVATIONS
from deltaproduct_jax.layers.initializers import INITIALIZERS
from deltaproduct_jax.layers.mlp import swiglu_width
from deltaproduct_jax.layers.projection import check_heads
from deltaproduct_jax.layers.xlstm import BLOCK
from deltaproduct_jax.ops import checks
from deltaproduct_jax.ops.baselines.checks import IMPLEMENTATIONS as BASELINE_IMPLEMENTATIONS
from deltaproduct_jax.ops.selection import AVAILABLE
from deltaproduct_jax.settings import setting

DELTA_MIXERS: tuple[str, ...] = (
    "delta_net",
    "gated_delta_net",
    "delta_product",
    "gated_delta_product",
)
# The paper's rivals, each as its own paper has it.
RIVALS: tuple[str, ...] = ("transformer", "mamba2", "gla", "mlstm", "slstm", "rwkv7")
MIXERS: tuple[str, ...] = (*DELTA_MIXERS, *RIVALS)

_LINEAR = (*DELTA_MIXERS, "mamba2", "gla", "rwkv7")  # the state turns by a matrix of the input
# Fields that not every mixer has, with those that do; elsewhere they must not be given.
MIXERS_WITH: dict[str, tuple[str, ...]] = {
    "num_v_heads": (*DELTA_MIXERS, "mamba2"),
    "expand_v": (*_LINEAR, "transformer"),
    "num_householder": DELTA_MIXERS,
    "allow_neg_eigval": _LINEAR,
    "qk_activation": DELTA_MIXERS,
    "beta_bias": DELTA_MIXERS,
    "use_output_gate": DELTA_MIXERS,
    "use_short_conv": DELTA_MIXERS,
    "conv_size": (*DELTA_MIXERS, "mamba2", "mlstm"),
    "max_length": ("transformer",),
    "implementation": (*_LINEAR, "mlstm"),
    "chunk_size": (*_LINEAR, "mlstm"),
}
# What such a field is where the mixer has it and none is given, unless that depends on the mixer.
_DEFAULTS: dict[str, Any] = {
    "expand_v": 1.0,
    "qk_activation": "silu",
    "use_output_gate": False,
    "use_short_conv": False,
    "conv_size": 4,
    "max_length": 2048,
}
# Not None, since "none" is one of the values that the field may have.
AUTO = "auto"
DTYPES: tuple[str, ...] = ("float32", "bfloat16")
REMAT: tuple[str, ...] = ("none", "products", "blocks")

_OPTIONAL_SIZES = ("num_v_heads", "num_householder", "conv_size", "max_length", "intermediate_size")


def _fields_absent(mixer: str) -> list[str]:
    return [name for name, mixers in MIXERS_WITH.items() if mixer not in mixers]


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A sequence model: embedding, ``num_layers`` blocks of mixer and SwiGLU, head.

    Raises:
        ConfigError: naming the field, when a value is out of range or does not fit another.
    """

    vocab_size: int = setting(32000, "number of token ids; an experiment takes it from its task")
    mixer: str = setting(
        "delta_product",
        f"sequence mixer, one of {', '.join(MIXERS)}; gated_ adds a forget gate, and the delta_net "
        "mixers have one Householder factor a token; a field that a mixer lacks is an error",
    )
    hidden_size: int = setting(128, "width D of the residual stream")
    num_layers: int = setting(1, "number of blocks")
    num_heads: int = setting(4, "heads H of queries and keys")
    num_v_heads: int | None = setting(None, "value heads, a multiple of num_heads; none: num_heads")
    head_dim: int = setting(32, "key width K of a head")
    expand_v: float | None = setting(None, "value width over key width; none: 1")
    num_householder: int | None = setting(
        None, "Householder factors a token (the paper's n_h); none: 2, or the 1 of the delta_nets"
    )
    allow_neg_eigval: bool | None = setting(
        None, "eigenvalues in (-1, 1), not (0, 1); none: wherever the mixer can"
    )
    qk_activation: str = setting(
        AUTO, "activation of a delta mixer's q and k: silu (the paper's) or none; auto: silu"
    )
    beta_bias: float | None = setting(
        None, "start of a learnt bias before beta's sigmoid; none: no bias, as in the paper"
    )
    use_output_gate: bool | None = setting(
        None, "gate a delta mixer's normalised output by silu(x W_g); none: no"
    )
    use_short_conv: bool | None = setting(
        None, "causal convolution on q, k and v of a delta mixer; none: no"
    )
    conv_size: int | None = setting(None, "taps of the short convolution; none: 4")
    max_length: int | None = setting(
        None, "tokens that the transformer's state holds for decoding; none: 2048"
    )
    intermediate_size: int | None = setting(
        512, "width of the SwiGLU's hidden layer; none: two thirds of hidden_ratio, up to next 256"
    )
    hidden_ratio: float = setting(4.0, "nominal SwiGLU width over hidden_size, if none is given")
    norm_eps: float = setting(1e-6, "epsilon of every RMSNorm")
    tie_embeddings: bool = setting(False, "the head uses the embedding's weights")
    initializer: str = setting("paper", "paper: the official code's draws; fla: N(0, range)")
    initializer_range: float = setting(0.02, "standard deviation of normal draws")
    dtype: str = setting("float32", f"dtype of the computation, one of {', '.join(DTYPES)}")
    param_dtype: str = setting("float32", f"dtype of the parameters, one of {', '.join(DTYPES)}")
    remat: str = setting(
        "none",
        "what a block computes anew for its gradient: none; all but its matrix products and the "
        "op's results (products), in a fraction of the memory; or all (blocks), in the least",
    )
    implementation: str | None = setting(
        None, "how the op is computed; none: by platform and shape, see delta_product"
    )
    chunk_size: int | None = setting(None, "tokens in a chunk of the op; none: the op chooses")

    def __post_init__(self) -> None:
        """Checks every field against its range and against the others."""
        require_one_of("mixer", self.mixer, MIXERS)
        self._check_fields_of_mixer()
        require_one_of("qk_activation", self.qk_activation, (*QK_ACTIVATIONS, AUTO))
        require_one_of("initializer", self.initializer, INITIALIZERS)
        require_one_of("dtype", self.dtype, DTYPES)
        require_one_of("param_dtype", self.param_dtype, DTYPES)
        require_one_of("remat", self.remat, REMAT)
        try:
            available = AVAILABLE if self.mixer in DELTA_MIXERS else BASELINE_IMPLEMENTATIONS
            checks.check_implementation(self.implementation, available)
            checks.check_chunk_size(self.chunk_size, self.implementation)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for name in ("vocab_size", "hidden_size", "num_layers", *_OPTIONAL_SIZES):
            if name not in _OPTIONAL_SIZES or getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        for name in ("hidden_ratio", "norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be greater than 0")
        num_v_heads = self.num_heads if self.num_v_heads is None else self.num_v_heads
        check_heads(self.num_heads, num_v_heads, self.head_dim, self.value_of("expand_v"))
        if self.mixer.endswith("delta_net") and self.num_householder not in (None, 1):
            raise ConfigError(
                f"num_householder={self.num_householder} does not fit mixer={self.mixer!r}, which "
                "has one factor a token; give num_householder=1 or a delta_product mixer"
            )
        if self.mixer in DELTA_MIXERS and self.conv_size is not None and not self.use_short_conv:
            raise ConfigError(
                f"conv_size={self.conv_size} means nothing without use_short_conv, got "
                f"use_short_conv={self.use_short_conv}; set that too, or leave conv_size none"
            )
        if self.mixer == "transformer" and self.head_dim % 2:
            raise ConfigError(f"head_dim={self.head_dim} must be even for mixer='transformer'")
        if self.mixer == "mlstm" and self.num_heads * self.head_dim % BLOCK:
            raise ConfigError(
                f"num_heads={self.num_heads} times head_dim={self.head_dim} must be a multiple of "
                f"{BLOCK} for mixer='mlstm'"
            )

    @classmethod
    def without_use(cls, values: Mapping[str, Any]) -> list[str]:
        """Fields of a preset that mean nothing for the mixer among these values."""
        mixer = values.get("mixer", cls.mixer)
        idle = ["num_householder"] if mixer.endswith("delta_net") else []
        if mixer in DELTA_MIXERS and not values.get("use_short_conv"):
            idle.append("conv_size")
        return idle + _fields_absent(mixer)

    def _check_fields_of_mixer(self) -> None:
        """ConfigError if a field is set that the mixer does not have."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _fields_absent(self.mixer):
            value = getattr(self, name)
            if value == defaults[name] or (name == "allow_neg_eigval" and value is False):
                continue
            raise ConfigError(
                f"{name}={value!r} does not fit mixer={self.mixer!r}, which has no such choice; "
                f"leave it {str(defaults[name]).lower()}, or take a mixer among "
                f"{', '.join(MIXERS_WITH[name])}"
            )

    def value_of(self, name: str) -> Any:
        """A field as the mixer takes it: what it means where none, or "auto", is given."""
        value = getattr(self, name)
        return _DEFAULTS.get(name) if value in (None, AUTO) else value

    @property
    def factors_per_token(self) -> int:
        """Householder factors a token, ``R``, of a delta mixer."""
        if self.num_householder is None:
            return 1 if self.mixer.endswith("delta_net") else 2
        return self.num_householder

    @property
    def label(self) -> str:
        """What tells the model apart in a figure: its factors a token, or a rival's mixer."""
        return self.mixer if self.mixer in RIVALS else f"n_h = {self.factors_per_token}"

    @property
    def extended_range(self) -> bool:
        """Whether eigenvalues of the state's transitions reach (-1, 1)."""
        if self.allow_neg_eigval is None:
            return self.mixer in MIXERS_WITH["allow_neg_eigval"]
        return self.allow_neg_eigval

    @property
    def mlp_width(self) -> int:
        """Width of the SwiGLU's hidden layer."""
        if self.intermediate_size is None:
            return swiglu_width(self.hidden_size, self.hidden_ratio)
        return self.intermediate_size

    @property
    def jax_dtypes(self) -> dict[str, jnp.dtype]:
        """``dtype`` and ``param_dtype`` as JAX knows them, ready to be passed on."""
        return {"dtype": jnp.dtype(self.dtype), "param_dtype": jnp.dtype(self.param_dtype)}
