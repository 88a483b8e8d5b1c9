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


@pytest.fixture(autouse=True)
def nothing_is_promoted():
    with jax.numpy_dtype_promotion("strict"):
        yield


@pytest.mark.parametrize("mixer", quick(list(MIXERS), ("slstm",)))
def test_parameters_may_be_narrower_than_what_is_computed(mixer):
    """A model of bfloat16 parameters that computes in float32 is that of the rounded ones."""
    tokens = jnp.arange(2 * 5).reshape(2, 5) % 13
    narrow, wide = model_of(mixer, 0, param_dtype="bfloat16"), model_of(mixer, 1)
    rounded = jax.tree.map(lambda a, b: a.astype(b.dtype), nnx.state(narrow), nnx.state(wide))
    nnx.update(wide, rounded)
    assert narrow(tokens).dtype == jnp.float32
    assert relative_error(narrow(tokens), wide(tokens)) < 1e-6


# One mixer of each class; the slow ones have the others.
OF_A_CLASS = (
    "gated_delta_net", "complex_kimi_delta_attention", "erase_then_delta", "rwkv7", "mamba2", "gla",
    "mlstm", "slstm", "transformer",
)  # fmt: skip


@pytest.mark.parametrize("mixer", quick(list(MIXERS), OF_A_CLASS))
def test_no_dtype_is_left_to_the_settings_of_jax(mixer):
    """Layers of bfloat16 run where none is promoted, and have no numbers of 64 bits."""

    def read(tokens):
        model = model_of(mixer, 0, dtype="bfloat16", param_dtype="bfloat16")
        logits, state = model.forward(tokens)
        return nnx.state(model), logits, state, *model.step(state, tokens[:, 0])

    with jax.enable_x64(True):
        found = jax.eval_shape(read, jax.ShapeDtypeStruct((2, 5), jnp.int32))
    assert {a.dtype.itemsize for a in jax.tree.leaves(found)} <= {1, 2, 4}
