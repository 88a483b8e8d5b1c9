"""What a model is made of: one frozen dataclass that checks itself."""

import dataclasses

import jax.numpy as jnp

from deltaproduct_jax.errors import ConfigError, require_at_least, require_one_of
from deltaproduct_jax.layers.delta_product import QK_ACTIVATIONS, check_heads
from deltaproduct_jax.layers.initializers import INITIALIZERS
from deltaproduct_jax.layers.mlp import swiglu_width
from deltaproduct_jax.ops import checks
from deltaproduct_jax.ops.dispatch import AVAILABLE
from deltaproduct_jax.settings import setting

MIXERS: tuple[str, ...] = ("delta_net", "gated_delta_net", "delta_product", "gated_delta_product")
DTYPES: tuple[str, ...] = ("float32", "bfloat16")


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
        "mixers have one Householder factor a token",
    )
    hidden_size: int = setting(128, "width D of the residual stream")
    num_layers: int = setting(1, "number of blocks")
    num_heads: int = setting(4, "heads H of queries and keys")
    num_v_heads: int | None = setting(None, "value heads, a multiple of num_heads; none: num_heads")
    head_dim: int = setting(32, "key width K of a head")
    expand_v: float = setting(1.0, "value width over key width")
    num_householder: int = setting(2, "Householder factors a token (the paper's n_h)")
    allow_neg_eigval: bool = setting(True, "beta in (0, 2), eigenvalues in (-1, 1), not (0, 1)")
    qk_activation: str = setting("silu", "activation of q and k: silu (the paper's) or none")
    beta_bias: float | None = setting(
        None, "start of a learnt bias before beta's sigmoid; none: no bias, as in the paper"
    )
    use_output_gate: bool = setting(False, "gate the mixer's normalised output by silu(x W_g)")
    use_short_conv: bool = setting(False, "causal convolution on q, k and v")
    conv_size: int = setting(4, "taps of the short convolution")
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
    implementation: str | None = setting(
        None, "how the op is computed; none: by platform and shape, see delta_product"
    )
    chunk_size: int | None = setting(None, "tokens in a chunk of the op; none: the op chooses")

    def __post_init__(self) -> None:
        """Checks every field against its range and against the others."""
        require_one_of("mixer", self.mixer, MIXERS)
        require_one_of("qk_activation", self.qk_activation, QK_ACTIVATIONS)
        require_one_of("initializer", self.initializer, INITIALIZERS)
        require_one_of("dtype", self.dtype, DTYPES)
        require_one_of("param_dtype", self.param_dtype, DTYPES)
        try:
            checks.check_implementation(self.implementation, AVAILABLE)
            checks.check_chunk_size(self.chunk_size, self.implementation)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        for name in ("vocab_size", "hidden_size", "num_layers", "num_householder", "conv_size"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("intermediate_size", "num_v_heads"):
            if getattr(self, name) is not None:
                require_at_least(name, getattr(self, name), 1)
        for name in ("hidden_ratio", "norm_eps", "initializer_range"):
            if not getattr(self, name) > 0:
                raise ConfigError(f"{name}={getattr(self, name)!r} must be greater than 0")
        num_v_heads = self.num_heads if self.num_v_heads is None else self.num_v_heads
        check_heads(self.num_heads, num_v_heads, self.head_dim, self.expand_v)
        if self.mixer.endswith("delta_net") and self.num_householder != 1:
            raise ConfigError(
                f"num_householder={self.num_householder} does not fit mixer={self.mixer!r}, which "
                "has one factor a token; give num_householder=1 or a delta_product mixer"
            )

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
