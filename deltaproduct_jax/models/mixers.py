"""The sequence mixer that a configuration names."""

from collections.abc import Callable
from typing import Any

from flax import nnx

from deltaproduct_jax.layers.attention import AttentionState, SoftmaxAttention
from deltaproduct_jax.layers.delta_product import DeltaProductState, GatedDeltaProduct
from deltaproduct_jax.layers.gla import GatedLinearAttention, GLAState
from deltaproduct_jax.layers.mamba2 import Mamba2, Mamba2State
from deltaproduct_jax.layers.rwkv7 import RWKV7, RWKV7State
from deltaproduct_jax.layers.xlstm import MLSTM, SLSTM, MLSTMLayerState
from deltaproduct_jax.models.config import MIXERS_WITH, ModelConfig
from deltaproduct_jax.ops.baselines import SLSTMState

# All of them map [B, T, D] to [B, T, D]: ``mixer(x, state=, segment_ids=, mask=) -> (y, state)``,
# ``mixer.step(state, x) -> (y, state)`` for one token, ``mixer.init_state(batch_size)``.
Mixer = GatedDeltaProduct | SoftmaxAttention | Mamba2 | GatedLinearAttention | MLSTM | SLSTM | RWKV7
MixerState = (
    DeltaProductState
    | AttentionState
    | Mamba2State
    | GLAState
    | MLSTMLayerState
    | SLSTMState
    | RWKV7State
)

_RIVALS: dict[str, Callable[..., Mixer]] = {
    "transformer": SoftmaxAttention,
    "mamba2": Mamba2,
    "gla": GatedLinearAttention,
    "mlstm": MLSTM,
    "slstm": SLSTM,
    "rwkv7": RWKV7,
}


def make_mixer(config: ModelConfig, layer: int, rngs: nnx.Rngs) -> Mixer:
    """The mixer of block number ``layer``."""
    own = {
        name: config.value_of(name)
        for name, mixers in MIXERS_WITH.items()
        if config.mixer in mixers
    }
    if "allow_neg_eigval" in own:
        own["allow_neg_eigval"] = config.extended_range
    make: Callable[..., Mixer] = GatedDeltaProduct
    if config.mixer in _RIVALS:
        make = _RIVALS[config.mixer]
    else:
        own["num_householder"] = config.factors_per_token
        own["use_forget_gate"] = config.mixer.startswith("gated_")
    if config.mixer == "rwkv7":
        own["value_residual"] = layer > 0
    shared: dict[str, Any] = {
        "num_heads": config.num_heads,
        "head_dim": config.head_dim,
        "initializer": config.initializer,
        "initializer_range": config.initializer_range,
        **config.jax_dtypes,
    }
    if config.mixer != "transformer":  # the only one without a norm of its own
        shared["norm_eps"] = config.norm_eps
    return make(config.hidden_size, rngs=rngs, **shared, **own)
