"""Where forget gates start, of every mixer that has any."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import quick

from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.models.mixers import make_mixer

SIZES = {"vocab_size": 9, "hidden_size": 16, "num_heads": 2, "head_dim": 8}
GATED = [m for m in MIXERS if MIXERS[m].takes("initial_gate")]


@pytest.mark.parametrize("mixer", quick(GATED, ["erase_then_delta", "gated_delta_net", "gla"]))
def test_gates_start_where_one_says(mixer):
    """A token of zeros writes nothing: what is left of a state is what its gates keep."""
    magnitudes = {"allow_neg_eigval": False} if MIXERS[mixer].takes("allow_neg_eigval") else {}
    config = ModelConfig(mixer=mixer, initial_gate=0.7, **SIZES, **magnitudes)
    layer = make_mixer(config, 0, nnx.Rngs(0))
    empty = layer.init_state(1)
    full = jax.tree.map(jnp.ones_like, empty)
    full = full._replace(**{n: getattr(empty, n) for n in empty._fields if n in INPUTS})
    after = layer.step(full, jnp.zeros((1, 16)))[1]
    np.testing.assert_allclose(kept(after), 0.7 * kept(full), rtol=1e-5)


INPUTS = ("q_conv", "k_conv", "v_conv", "conv", "last", "hidden")


def kept(state):
    """The numbers that a gate multiplies, free of what they were divided by."""
    memory = getattr(state, "recurrent", state)
    if not hasattr(memory, "stabilizer"):
        return np.abs(memory)
    cells = np.asarray(memory.memory if hasattr(memory, "memory") else memory.cell)
    divided = np.exp(np.asarray(memory.stabilizer))
    return cells * divided.reshape(*divided.shape, *[1] * (cells.ndim - divided.ndim))
