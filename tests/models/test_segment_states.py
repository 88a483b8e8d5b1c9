"""Packed rows of prompts give a state for each prompt, as each alone does; models and layers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import nudged

from deltaproduct_jax.layers.checks import states_of
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig, SequenceModel

FAST = "gated_delta_product"
ALL = [name if name == FAST else pytest.param(name, marks=pytest.mark.slow) for name in MIXERS]
# Prompts of two rows; the second has one less.
LENGTHS = [[5, 70, 3], [76, 2]]
T, S, VOCAB = 78, 3, 11


def model_of(mixer):
    sizes = {"hidden_size": 8, "num_heads": 2, "head_dim": 4, "intermediate_size": 8}
    own = {"use_short_conv": True, "implementation": "recurrent"} if mixer == FAST else {}
    layers = 2 if mixer == "rwkv7" else 1
    config = ModelConfig(vocab_size=VOCAB, mixer=mixer, num_layers=layers, **sizes, **own)
    return nudged(SequenceModel(config, rngs=nnx.Rngs(0)))


def packed():
    tokens = np.random.default_rng(3).integers(0, VOCAB, (2, T)).astype(np.int32)
    ids = np.stack([np.repeat(np.arange(len(n)), n) for n in LENGTHS])
    return tokens, ids


def alone(tokens):
    """Every prompt in a row of its own, padded behind; an empty one last."""
    rows, mask = np.zeros((2 * S, T), np.int32), np.zeros((2 * S, T), bool)
    for row, lengths in enumerate(LENGTHS):
        for number, length in enumerate(lengths):
            start, at = sum(lengths[:number]), row * S + number
            rows[at, :length] = tokens[row, start : start + length]
            mask[at, :length] = True
    return rows, mask


@pytest.mark.parametrize("mixer", ALL)
def test_a_state_for_each_prompt(mixer):
    """Logits, states, and what follows; a first part that was read before goes on by itself."""
    model = model_of(mixer)
    tokens, ids = packed()
    forward = nnx.jit(lambda model, tokens, **read: model.forward(tokens, **read))

    @nnx.jit
    def by_prompt(model, tokens, ids, state):
        return model.forward(tokens, segment_ids=ids, state=state, num_segments=S)

    before = states_of(model, 2, S)
    logits, states = by_prompt(model, tokens, ids, before)
    rows, mask = alone(tokens)
    want, want_states = forward(model, rows, mask=mask, state=model.init_state(2 * S))
    flat = jax.tree.map(lambda x: x.reshape(2 * S, *x.shape[2:]), states)
    close = lambda x, y: np.testing.assert_allclose(x, y, atol=2e-4)
    jax.tree.map(close, flat, want_states)
    for row, lengths in enumerate(LENGTHS):
        got = np.split(np.asarray(logits[row]), np.cumsum(lengths)[:-1])
        for number, (length, each) in enumerate(zip(lengths, got, strict=True)):
            close(each, want[row * S + number, :length])
    # The same again from these states is each prompt read twice.
    logits, _ = by_prompt(model, tokens, ids, states)
    want, _ = forward(model, rows, mask=mask, state=want_states)
    close(logits[0, : LENGTHS[0][0]], want[0, : LENGTHS[0][0]])
    close(logits[1, LENGTHS[1][0] :], want[S + 1, : LENGTHS[1][1]])


@pytest.mark.slow
def test_a_layer_skips_padding_between_its_prompts():
    layer = model_of(FAST).layers[0].attn
    x = np.random.default_rng(0).normal(size=(1, 9, 8)).astype(np.float32)
    ids, mask = np.array([[0, 0, 0, 0, 1, 1, 1, 1, 1]]), np.array([[1, 0, 1, 1, 0, 1, 0, 1, 0]]) > 0
    run = nnx.jit(lambda layer, mask: layer(x, segment_ids=ids, mask=mask, num_segments=2))
    y, state = run(layer, mask)
    alone = nnx.jit(lambda layer, mask: layer(x, mask=mask))
    for number, counted in enumerate(([0, 2, 3], [5, 7])):
        want_y, want_state = alone(layer, mask & np.isin(np.arange(9), counted)[None])
        np.testing.assert_allclose(y[:, counted], want_y[:, counted], atol=1e-5)
        own = jax.tree.map(lambda leaf, n=number: leaf[:, n], state)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, atol=1e-5), own, want_state)
    assert not np.any(y[0][~mask[0]])


def test_what_does_not_fit_is_named(unchecked):
    model = model_of(FAST)
    tokens, ids = packed()
    layer, x = model.layers[0].attn, jnp.zeros((2, T, 8))
    for read, state in ((model.forward, model.init_state(2)), (layer, layer.init_state(2))):
        given = tokens if read == model.forward else x
        with pytest.raises(ValueError, match="num_segments=3 needs segment_ids"):
            read(given, num_segments=3)
        with pytest.raises(ValueError, match="num_segments must be a whole number of at least 1"):
            read(given, segment_ids=ids, num_segments=0)
        with pytest.raises(ValueError, match=r"float32\[2, 3, 2, 4, 4\], as init_state makes it"):
            read(given, segment_ids=ids, num_segments=3, state=state)
