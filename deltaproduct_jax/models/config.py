"""What a model is made of: one frozen dataclass that checks itself."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers.checks import check_options
from deltaproduct_jax.layers.delta_rule import QK_ACTIVATIONS
from deltaproduct_jax.layers.heads import check_gate
from deltaproduct_jax.layers.initializers import INITIALIZERS
from deltaproduct_jax.layers.mlp import POINT as MLP_POINT
from deltaproduct_jax.layers.mlp import swiglu_width
from deltaproduct_jax.layers.projection import value_width
from deltaproduct_jax.layers.registry import MIXERS, RegisteredMixer
from deltaproduct_jax.ops import RESIDUAL_NAMES
from deltaproduct_jax.ops.convolution.selection import AVAILABLE as CONVOLUTIONS
from deltaproduct_jax.settings import check_fields, setting

# Not None, since "none" is one of the values that the field may have.
AUTO = "auto"
DTYPES: tuple[str, ...] = ("float32", "bfloat16")
REMAT: tuple[str, ...] = ("none", "products", "blocks", "named")
# Arrays of a block that remat="named" may keep.
POINTS: tuple[str, ...] = (
    "mixer_input", *RESIDUAL_NAMES, "mixer_output", "mlp_input", MLP_POINT, "mlp_output",
)  # fmt: skip
ATTENTION = "transformer"  # the mixer of a hybrid's other blocks

# Blocks are made one by one, in a time that grows with the square of their number: of more than
# these it would be hours, without a word.
MOST_LAYERS = 1000
# Fields that not every mixer has: its layer's keywords tell. Elsewhere they must not be given.
MIXER_FIELDS: tuple[str, ...] = (
    "num_heads", "head_dim", "num_v_heads", "expand_v", "num_householder", "allow_neg_eigval",
    "qk_activation", "beta_bias", "initial_gate", "use_output_gate", "use_short_conv", "conv_size",
    "max_length", "conv_implementation", "implementation", "chunk_size", "num_kv_heads", "qkv_bias",
    "window_size", "rope_theta",
)  # fmt: skip


def _fields_absent(*mixers: RegisteredMixer) -> list[str]:
    """Fields that none of the mixers has."""
    return [name for name in MIXER_FIELDS if not any(mixer.takes(name) for mixer in mixers)]


def _named(mixer: Any) -> RegisteredMixer | None:
    """The mixer of that name; None for what is none, whatever it is."""
    return MIXERS.get(mixer) if isinstance(mixer, str) else None


def _mixers(name: str, is_hybrid: bool) -> tuple[RegisteredMixer, ...]:
    return (MIXERS[name], MIXERS[ATTENTION]) if is_hybrid else (MIXERS[name],)


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A sequence model: embedding, ``num_layers`` blocks of mixer and SwiGLU, head.

    A field that is None means what the mixer's registration says, or else its layer's default.
    ``GatedDeltaProduct`` has the defaults of flash-linear-attention's layer, made for language
    models: 6 heads of 256, ``expand_v`` 2, an output gate, convolutions, ``norm_eps`` 1e-5. Models
    here start from the paper's state tracking instead: 4 heads of 32 in 128 channels, ``expand_v``
    1, no output gate, no convolution, and the 1e-6 that its models have for every norm.

    A mixer with fields of its own has a dataclass derived from this one, see :meth:`variant`.

    Raises:
        ConfigError: naming the field, when a value is out of range or does not fit another.
    """

    vocab_size: int = setting(
        32000, "number of token ids; an experiment takes it from its task", least=1
    )
    mixer: str = setting(
        "delta_product",
        f"sequence mixer, one of {', '.join(MIXERS)}, or a plug-in's; gated_ adds a forget gate, "
        "the delta_nets have one Householder factor per token; a field that a mixer lacks is an "
        "error",
        one_of=MIXERS,
    )
    hidden_size: int = setting(128, "width D of the residual stream", least=1)
    num_layers: int = setting(1, "number of blocks", most=MOST_LAYERS, least=1)
    num_heads: int = setting(4, "heads H of queries and keys", least=1)
    num_v_heads: int | None = setting(
        None, "value heads, a multiple of num_heads; none: num_heads", least=1
    )
    head_dim: int = setting(32, "key width K of a head", least=1)
    expand_v: float | None = setting(None, "value width over key width; none: 1")
    num_householder: int | None = setting(
        None,
        "Householder factors per token (the paper's n_h); none: 2, or the 1 of the delta_nets",
        least=1,
    )
    allow_neg_eigval: bool | None = setting(
        None, "eigenvalues in (-1, 1), not (0, 1); none: wherever the mixer can"
    )
    qk_activation: str = setting(
        AUTO,
        "activation of a delta mixer's q and k: silu (the paper's) or none; auto: silu",
        one_of=(*QK_ACTIVATIONS, AUTO),
    )
    beta_bias: float | None = setting(
        None, "start of a learnt bias before beta's sigmoid; none: no bias, as in the paper"
    )
    initial_gate: float | None = setting(
        None,
        "what a forget gate keeps of a state in a token at the start of training, between 0 and 1; "
        "none: as published",
        recorded_if_set=True,
    )
    use_output_gate: bool | None = setting(None, "gate a delta mixer's normalised output; none: no")
    use_short_conv: bool | None = setting(
        None, "causal convolution on q, k and v of a delta mixer; none: no"
    )
    conv_size: int | None = setting(None, "taps of the short convolution; none: 4", least=1)
    conv_implementation: str | None = setting(
        None,
        "how short convolutions of a delta mixer, and the SiLU and length of its q and k, are "
        "computed, plain, triton or pallas_tpu; none: by platform and shape",
        recorded_if_set=True,
        one_of=CONVOLUTIONS,
    )
    max_length: int | None = setting(
        None, "tokens that the transformer's state holds for decoding; none: 2048", least=1
    )
    intermediate_size: int | None = setting(
        512,
        "width of the SwiGLU's hidden layer; none: two thirds of hidden_ratio, up to next 256",
        least=1,
    )
    hidden_ratio: float = setting(
        4.0, "nominal SwiGLU width over hidden_size, if none is given", above=0
    )
    norm_eps: float = setting(1e-6, "epsilon of every RMSNorm", above=0)
    tie_embeddings: bool = setting(False, "the head uses the embedding's weights")
    initializer: str = setting(
        "paper", "paper: the official code's draws; fla: N(0, range)", one_of=INITIALIZERS
    )
    initializer_range: float = setting(0.02, "standard deviation of normal draws", above=0)
    dtype: str = setting(
        "float32", f"dtype of the computation, one of {', '.join(DTYPES)}", one_of=DTYPES
    )
    param_dtype: str = setting(
        "float32",
        f"dtype of the parameters, one of {', '.join(DTYPES)}; training keeps float32 copies",
        one_of=DTYPES,
    )
    remat: str = setting(
        "none",
        "what a block computes anew for its gradient: none; all but its matrix products, the op's "
        "results and those of convolutions by a kernel (products), in a fraction of the memory; "
        "all (blocks), in the least; or all but saved_points (named)",
        one_of=REMAT,
    )
    implementation: str | None = setting(
        None, "how the op is computed; none: by platform and shape, see delta_product"
    )
    chunk_size: int | None = setting(None, "tokens in a chunk of the op; none: the op chooses")
    saved_points: tuple[str, ...] = setting(
        (),
        f"what remat=named keeps, among {', '.join(POINTS)}",
        recorded_if_set=True,
        one_of=POINTS,
    )
    scan_layers: bool = setting(
        False,
        "blocks run as a scan, of which only those that differ are traced, for a copy of their "
        "parameters",
        recorded_if_set=True,
    )
    attention_every: int | None = setting(
        None,
        "a hybrid: of so many blocks the last is softmax attention in the mixer's place; none: no "
        "block is",
        recorded_if_set=True,
        least=2,
    )
    attention_layers: tuple[int, ...] = setting(
        (),
        "a hybrid: the blocks, by their numbers from 0, that are softmax attention",
        recorded_if_set=True,
    )
    attention_heads: int | None = setting(
        None,
        "heads of a hybrid's attention, hidden_size / attention_heads wide; none: num_heads, "
        "head_dim and expand_v, as the mixer's",
        recorded_if_set=True,
        least=1,
    )
    num_kv_heads: int | None = setting(
        None,
        "heads of attention's keys and values, each for a group of queries'; none: one a head",
        recorded_if_set=True,
        least=1,
    )
    qkv_bias: bool | None = setting(
        None, "biases of attention's q, k and v; none: no", recorded_if_set=True
    )
    window_size: int | None = setting(
        None,
        "tokens that attention sees, the one that looks among them; none: all before it",
        recorded_if_set=True,
        least=1,
    )
    rope_theta: float | None = setting(
        None, "base of attention's rotary positions; none: 10000", recorded_if_set=True, above=0
    )

    def __post_init__(self) -> None:
        """Checks every field against its range and against the others."""
        check_fields(self)
        self._check_class()
        self._check_fields_of_mixer()
        implementations = self.registered.layer.implementations
        check_options(self.implementation, self.chunk_size, implementations)
        expand_v = self.value_of("expand_v") if self.registered.takes("expand_v") else 1.0
        value_width(self.num_heads, self.head_dim, num_v_heads=self.num_v_heads, expand_v=expand_v)
        check_gate(self.initial_gate, self.registered.layer)
        self._check_hybrid()
        for mixer in self.mixers:
            mixer.check(self)
        if self.saved_points and self.remat != "named":
            raise ConfigError(
                f"saved_points={self.saved_points} needs remat=named, got remat={self.remat}"
            )

    @property
    def registered(self) -> RegisteredMixer:
        """The mixer, as it is registered."""
        return MIXERS[self.mixer]

    @property
    def mixers(self) -> tuple[RegisteredMixer, ...]:
        """The mixer, and that of a hybrid's other blocks."""
        return _mixers(self.mixer, self.attention_every is not None or bool(self.attention_layers))

    def mixer_of(self, block: int) -> RegisteredMixer:
        """The mixer of a block, by its number from 0."""
        every = self.attention_every
        is_attention = every is not None and (block + 1) % every == 0
        return self.mixers[-1 if is_attention or block in self.attention_layers else 0]

    @property
    def attention_sizes(self) -> dict[str, Any]:
        """Heads and widths of attention: the mixer's own, or those of ``attention_heads``."""
        if self.attention_heads is None:
            expand_v = self.value_of("expand_v", MIXERS[ATTENTION])
            return {"num_heads": self.num_heads, "head_dim": self.head_dim, "expand_v": expand_v}
        head_dim = self.hidden_size // self.attention_heads
        return {"num_heads": self.attention_heads, "head_dim": head_dim, "expand_v": 1.0}

    @classmethod
    def variant(cls, values: Mapping[str, Any]) -> type["ModelConfig"]:
        """The dataclass for the mixer among these values: this one, or one with more fields."""
        mixer = _named(values.get("mixer", cls.mixer))
        return cls if mixer is None or mixer.config is None else mixer.config

    @classmethod
    def variants(cls) -> list[type["ModelConfig"]]:
        """All that :meth:`variant` may return."""
        return [cls, *(mixer.config for mixer in MIXERS.values() if mixer.config is not None)]

    @classmethod
    def without_use(cls, values: Mapping[str, Any]) -> list[str]:
        """Fields of a preset that mean nothing for the mixer among these values."""
        mixer = _named(values.get("mixer", cls.mixer))
        if mixer is None:
            return []
        is_hybrid = values.get("attention_every") not in (None, "none") or bool(
            values.get("attention_layers")
        )
        return [*mixer.idle(values), *_fields_absent(*_mixers(mixer.name, is_hybrid))]

    def _check_class(self) -> None:
        """ConfigError unless the fields are the mixer's, and all that its layer needs."""
        wanted = self.registered.config
        if wanted is not None and not isinstance(self, wanted):
            raise ConfigError(
                f"mixer={self.mixer!r} has fields of its own, which a {type(self).__name__} lacks; "
                f"it may be a {wanted.__name__}"
            )
        names = {field.name for field in dataclasses.fields(self)}
        strange = [name for name in self.registered.keywords if name not in names]
        if strange:
            raise ConfigError(
                f"mixer={self.mixer!r} has a layer whose keywords {', '.join(strange)} are no "
                f"fields of {type(self).__name__}; register it with a config that has them, or "
                "with fixed="
            )

    def _check_fields_of_mixer(self) -> None:
        """ConfigError if a field is set that the mixer does not have."""
        defaults = {field.name: field.default for field in dataclasses.fields(self)}
        for name in _fields_absent(*self.mixers):
            value = getattr(self, name)
            if value == defaults[name] or (name == "allow_neg_eigval" and value is False):
                continue
            having = [mixer.name for mixer in MIXERS.values() if mixer.takes(name)]
            raise ConfigError(
                f"{name}={value!r} does not fit mixer={self.mixer!r}, which has no such choice; "
                f"leave it {str(defaults[name]).lower()}, or take a mixer among "
                f"{', '.join(having)}"
            )

    def _check_hybrid(self) -> None:
        """ConfigError unless attention stands beside another mixer, and can."""
        given = {
            name: getattr(self, name)
            for name in ("attention_every", "attention_layers", "attention_heads")
            if getattr(self, name) not in (None, ())
        }
        if given and self.mixer == ATTENTION:
            name, value = next(iter(given.items()))
            raise ConfigError(
                f"{name}={value} puts attention between blocks of another mixer; "
                f"mixer={self.mixer!r} is attention itself"
            )
        if (self.attention_every or 0) > self.num_layers:
            raise ConfigError(
                f"attention_every={self.attention_every} makes none of num_layers="
                f"{self.num_layers} blocks attention; it must be at most as many"
            )
        places = self.attention_layers
        if "attention_every" in given and places:
            raise ConfigError(
                f"attention_layers={places} and attention_every={self.attention_every} both say "
                "where attention is; give one of them"
            )
        wrong = [place for place in places if not 0 <= place < self.num_layers]
        if wrong or len(set(places)) < len(places) or len(places) == self.num_layers:
            raise ConfigError(
                f"attention_layers={places} must be different numbers from 0 to "
                f"{self.num_layers - 1}, and leave a block to mixer={self.mixer!r}"
            )
        if self.attention_heads is None:
            return
        if len(self.mixers) == 1:
            raise ConfigError(
                f"attention_heads={self.attention_heads} is of a hybrid's attention; give "
                "attention_every or attention_layers with it"
            )
        if self.hidden_size % self.attention_heads:
            raise ConfigError(
                f"attention_heads={self.attention_heads} must divide hidden_size={self.hidden_size}"
            )

    def value_of(self, name: str, mixer: RegisteredMixer | None = None) -> Any:
        """A field as a mixer takes it: what it means where none, or "auto", is given."""
        value = getattr(self, name)
        return (mixer or self.registered).default(name) if value in (None, AUTO) else value

    @property
    def label(self) -> str:
        """What tells the model apart in a figure: its factors per token, or else its mixer."""
        factors = self.value_of("num_householder")
        return self.mixer if factors is None else f"n_h = {factors}"

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
