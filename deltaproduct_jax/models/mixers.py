"""The sequence mixer that a configuration names."""

from flax import nnx

from deltaproduct_jax.layers.mixer import SequenceMixer
from deltaproduct_jax.models.config import ModelConfig


def make_mixer(config: ModelConfig, layer: int, rngs: nnx.Rngs) -> SequenceMixer:
    """The mixer of block number ``layer``."""
    mixer = config.mixer_of(layer)
    own = {name: config.value_of(name, mixer) for name in mixer.keywords}
    if mixer is not config.registered:  # a hybrid's attention
        own |= config.attention_sizes
    dtypes = {name: value for name, value in config.jax_dtypes.items() if name in own}
    return mixer.layer(
        config.hidden_size, rngs=rngs, **(own | dtypes), **mixer.fixed, **mixer.by_block(layer)
    )
