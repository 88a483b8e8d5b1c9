"""Parameters and what is computed may differ in dtype, whatever the mixer."""

import jax
import jax.numpy as jnp
import pytest
from flax import nnx
from helpers import relative_error
from quick import quick

from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig, SequenceModel


def model_of(mixer, seed, **dtypes):
    sizes = {"vocab_size": 13, "hidden_size": 16, "num_heads": 2, "head_dim": 8, "num_layers": 1}
    return SequenceModel(ModelConfig(mixer=mixer, **sizes, **dtypes), rngs=nnx.Rngs(seed))


@pytest.mark.parametrize("mixer", quick(list(MIXERS), ("slstm",)))
def test_parameters_may_be_narrower_than_what_is_computed(mixer):
    """A model of bfloat16 parameters that computes in float32 is that of the rounded ones."""
    tokens = jnp.arange(2 * 5).reshape(2, 5) % 13
    narrow, wide = model_of(mixer, 0, param_dtype="bfloat16"), model_of(mixer, 1)
    rounded = jax.tree.map(lambda a, b: a.astype(b.dtype), nnx.state(narrow), nnx.state(wide))
    nnx.update(wide, rounded)
    assert narrow(tokens).dtype == jnp.float32
    assert relative_error(narrow(tokens), wide(tokens)) < 1e-6
