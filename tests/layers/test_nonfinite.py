"""What is not finite stays where it is, in every mixer and in models: values and gradients.

One program per mixer; what is bad, and where, are data. All that is not expected to be NaN must be
what it is without the bad value, bit for bit.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import quick

from deltaproduct_jax.layers import GatedDeltaProduct
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.models.mixers import make_mixer

B, T, D, VOCAB = 2, 11, 16, 13
IDS = np.array([[2] * 4 + [0] * 4 + [2] * 3, [5] * 11])
MASK = np.ones((B, T), bool)
MASK[0, [2, 5, 10]] = False
# The op's own forms are compared in tests/ops; one layer of it stands for all here.
OTHERS = [name for name, mixer in MIXERS.items() if mixer.layer is not GatedDeltaProduct]
NAMES = [*OTHERS, "gated_delta_product"]

QUICK = ("gated_delta_product", "transformer")  # as models, beside their layer


def config_of(mixer):
    sizes = {"hidden_size": D, "num_heads": 2, "head_dim": 8, "intermediate_size": 16}
    own = {"max_length": 16} if mixer == "transformer" else {}
    layers = 2 if mixer == "rwkv7" else 1
    return ModelConfig(mixer=mixer, vocab_size=VOCAB, num_layers=layers, **sizes, **own)


def lively(module):
    """No parameter rests at 0, where it would hide what it multiplies."""
    rng = np.random.default_rng(1)
    nudge = lambda a: jnp.asarray(a + 0.3 * rng.normal(size=a.shape), a.dtype)
    graph, params = nnx.split(module)
    return graph, jax.tree.map(nudge, params)


def is_floating(x):
    return jnp.issubdtype(x.dtype, jnp.floating)


def packed():
    return {"segment_ids": jnp.asarray(IDS), "mask": jnp.asarray(MASK)}


def program(graph):
    """Outputs, state, and the gradients of inputs and parameters for cotangents ``w``."""

    @jax.jit
    def run(params, x, w):
        def outputs(params, x):
            return nnx.merge(graph, params)(x, **packed())

        (y, state), pullback = jax.vjp(outputs, params, x)
        zero = lambda a: np.zeros(a.shape, a.dtype if is_floating(a) else jax.dtypes.float0)
        dparams, dx = pullback((w, jax.tree.map(zero, state)))
        return y, state, dx, dparams

    return run


def equal(x, y, where=...):
    for a, b in zip(jax.tree.leaves(x), jax.tree.leaves(y), strict=True):
        np.testing.assert_array_equal(np.asarray(a)[where], np.asarray(b)[where])


@pytest.mark.parametrize("name", quick(NAMES, ["gated_delta_product", "gla", "transformer"]))
def test_a_layer_holds_it(name):
    graph, params = lively(make_mixer(config_of(name), 0, nnx.Rngs(0)))
    run = program(graph)
    rng = np.random.default_rng(0)
    x, w = rng.normal(size=(2, B, T, D)).astype(np.float32)
    clean = run(params, x, w)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(clean))

    at_padding = x.copy()
    at_padding[~MASK] = np.array([np.nan, np.inf, -np.inf])[:, None]
    equal(run(params, at_padding, w), clean)

    # In the second document of row 0, whose loss stops before it.
    bad, before = x.copy(), w.copy()
    bad[0, 6, 3] = np.nan
    before[0, 6:8] = 0
    y, state, dx, dparams = run(params, bad, before)
    of_clean = run(params, x, before)
    assert np.isnan(y[0, 6:8]).all()
    reached = np.zeros((B, T), bool)
    reached[0, 6:8] = True
    equal(y, of_clean[0], ~reached)
    equal((state, dx, dparams), of_clean[1:])

    # The loss sees it: no parameter has a gradient that looks good.
    _, _, dx, dparams = run(params, bad, w)
    document = np.zeros((B, T), bool)
    document[0, 4:8] = True
    equal(dx, clean[2], ~document)
    assert np.isnan(dx[0, 4]).any()
    assert any(np.isnan(leaf).any() for leaf in jax.tree.leaves(dparams))

    # In the last document of row 0: its state, and no other's.
    bad = x.copy()
    bad[0, 8] = np.inf
    state = run(params, bad, w)[1]
    floating = [a for a in jax.tree.leaves(state) if is_floating(a)]
    assert all(np.isnan(a[0]).all() for a in floating)
    equal([a[1] for a in jax.tree.leaves(state)], [a[1] for a in jax.tree.leaves(clean[1])])

    # A cotangent of the second document.
    bad = w.copy()
    bad[0, 6, 1] = np.inf
    dx = run(params, x, bad)[2]
    equal(dx, clean[2], ~document)
    assert np.isnan(dx[0, 4]).any()


@pytest.mark.parametrize(
    "name",
    [pytest.param(n, marks=() if n in QUICK else pytest.mark.slow) for n in NAMES],
)
def test_a_model_holds_it(name):
    """Token ids out of range, whose embedding is NaN."""
    graph, params = lively(SequenceModel(config_of(name), rngs=nnx.Rngs(0)))

    @jax.jit
    def run(params, tokens, counted):
        def loss(params):
            logits = nnx.merge(graph, params)(tokens, **packed())
            # Masked before the sine: 0 times its slope at NaN would be NaN.
            return jnp.sum(jnp.sin(jnp.where(counted[..., None], logits, 0))), logits

        (value, logits), gradients = jax.value_and_grad(loss, has_aux=True)(params)
        return value, gradients, logits

    tokens = np.random.default_rng(0).integers(VOCAB, size=(B, T))
    counted = MASK.copy()
    counted[0, 4:8] = False
    clean = run(params, tokens, counted)
    bad = tokens.copy()
    bad[0, 4] = VOCAB + 7
    bad[~MASK] = VOCAB
    value, gradients, logits = run(params, bad, counted)
    equal((value, gradients), clean[:2])
    equal(logits, clean[2], counted)
    assert np.isnan(logits[0, [4, 6, 7]]).all()
    value, gradients, _ = run(params, bad, MASK)
    assert np.isnan(value)
    assert all(np.isnan(leaf).any() for leaf in jax.tree.leaves(gradients))


def test_states_that_nobody_asks_for_cost_no_pass_over_tokens():
    """Their cotangents are known to be zero: none are padded and added to those of the inputs."""
    sizes = {"num_heads": 2, "head_dim": 4, "implementation": "recurrent"}
    layer = GatedDeltaProduct(8, **sizes, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)

    def pads(asked):
        def loss(params, x):
            y, state = nnx.merge(graph, params)(x)
            return jnp.sum(y) + (jnp.sum(state.q_conv) if asked else 0)

        gradient = jax.grad(loss, (0, 1))
        return str(jax.make_jaxpr(gradient)(params, jnp.zeros((1, 6, 8)))).count("pad[")

    assert pads(asked=True) > pads(asked=False)
