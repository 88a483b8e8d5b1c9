"""Draws of parameters: how far each goes, by its formula, and what the inverses undo."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltaproduct_jax.layers import initializers as inits
from deltaproduct_jax.layers import mlp, projection
from deltaproduct_jax.models import ModelConfig, SequenceModel

SHAPE, STD = (64, 64), 0.02
KEY = jax.random.key(0)
# As the paper's code draws: half the width of a uniform draw.
BOUNDS = {
    "a projection": (
        lambda name: inits.projection_init(name, STD, 96, 192),
        2**-2.5 * (6 / (96 + 192)) ** 0.5,
    ),
    "of four factors, each on its own": (
        lambda name: inits.projection_init(name, STD, 96, 384, parts=4),
        2**-2.5 * (6 / (96 + 96)) ** 0.5,
    ),
    "a convolution of 4 taps": (lambda name: inits.conv_init(name, STD, 4), 0.5),
    "the end of an MLP in 3 blocks": (
        lambda name: inits.mlp_down_init(name, STD, 256, 3),
        1 / 16 / 6**0.5,
    ),
}


@pytest.mark.parametrize("what", BOUNDS)
def test_draws_are_uniform_as_in_the_paper_or_normal(what):
    of_name, bound = BOUNDS[what]
    drawn = np.asarray(of_name("paper")(KEY, SHAPE, jnp.float32))
    assert 0.99 * bound < np.abs(drawn).max() <= bound
    assert drawn.std() == pytest.approx(bound / 3**0.5, rel=0.03)
    normal = np.asarray(of_name("fla")(KEY, SHAPE, jnp.float32))
    assert normal.std() == pytest.approx(STD, rel=0.05)
    assert np.abs(normal).max() > 3 * STD


def test_gates_begin_within_their_ranges():
    for least, given in ((1.0, ()), (4.0, (4.0,))):
        rates = np.exp(inits.decay_rate_init(KEY, (4096,), *given))
        assert least <= rates.min() * 1.0001 < least + 0.1
        assert 15.9 < rates.max() <= 16.001
    steps = np.asarray(jax.nn.softplus(inits.decay_step_init(KEY, (4096,))))
    assert 1e-3 <= steps.min() * 1.001 < 1.02e-3
    assert 0.98e-1 < steps.max() <= 1.001e-1
    # Log-uniform: as many below 1e-2 as above.
    assert np.mean(steps < 1e-2) == pytest.approx(0.5, abs=0.03)


def test_inverses_undo():
    y = jnp.array([1e-3, 0.1, 1.0, 20.0])
    np.testing.assert_allclose(jax.nn.softplus(inits.softplus_inverse(y)), y, rtol=1e-5)
    np.testing.assert_allclose(jax.nn.log_sigmoid(inits.log_sigmoid_inverse(-y)), -y, rtol=1e-5)


def test_a_model_asks_for_draws_of_its_own_sizes(monkeypatch):
    asked, normal = [], nnx.initializers.normal()
    for module, name in (
        (projection, "projection_init"), (projection, "conv_init"), (mlp, "mlp_down_init"),
    ):  # fmt: skip
        noted = lambda *of, name=name: asked.append((name, *of)) or normal
        monkeypatch.setattr(module, name, noted)
    sizes = {"hidden_size": 16, "num_heads": 2, "head_dim": 4, "intermediate_size": 24}
    how = {"initializer": "paper", "initializer_range": 0.25}
    config = ModelConfig(
        vocab_size=7, num_layers=5, num_householder=3, use_short_conv=True, **sizes, **how
    )
    nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
    draws = {name: {tuple(of[2:]) for what, *of in asked if what == name} for name, *_ in asked}
    assert {tuple(of[1:3]) for of in asked} == {("paper", 0.25)}
    assert draws["mlp_down_init"] == {(24, 5)}
    assert draws["conv_init"] == {(4,)}
    assert {(16, 8, 1), (16, 24, 3), (16, 6, 3)} <= draws["projection_init"]
