"""Losses by position: read in pieces they are those of the whole; curves by hand."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from interop.golden_models import drawn

from deltaproduct_jax.analysis.length_extrapolation import Losses, by_position, token_losses
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.models import ModelConfig

CONFIG = ModelConfig(
    vocab_size=11, hidden_size=8, num_layers=2, num_heads=2, head_dim=4, intermediate_size=8,
    attention_every=2, max_length=4, implementation="recurrent",
)  # fmt: skip


def test_pieces_are_the_whole():
    """Also of attention, whose own room would not do."""
    model, rows = drawn(CONFIG), np.random.default_rng(0).integers(0, 11, size=(2, 12))
    found = token_losses(model, rows, batch_size=2, piece=4)  # the last piece is filled up by one
    logits = jax.jit(model.__call__)(jnp.asarray(rows[:, :-1]))
    want = optax.softmax_cross_entropy_with_integer_labels(logits, rows[:, 1:])
    np.testing.assert_allclose(found.loss, want, rtol=1e-4, atol=1e-4)
    np.testing.assert_array_equal(found.correct, np.argmax(logits, axis=-1) == rows[:, 1:])


def test_curves_by_hand():
    loss = np.array([[1, 2, 3, 4, 5, 6], [3, 4, 5, 6, 7, 8]], np.float32)
    correct = np.array([[1, 0, 0, 0, 1, 1], [1, 1, 0, 0, 0, 0]], bool)
    curves = by_position(Losses(loss, correct), 2)
    assert curves.position == [2, 4, 6]
    assert curves.loss == [2.5, 4.5, 6.5]
    assert curves.error == [1.0, 1.0, 1.0]
    assert curves.running_loss == [2.5, 3.5, 4.5]
    assert curves.running_accuracy == [0.75, 0.375, 5 / 12]
    assert by_position(Losses(loss[:1], correct[:1]), 6).error is None
    with pytest.raises(ConfigError, match="window=4 must divide the length of rows, 6"):
        by_position(Losses(loss, correct), 4)


def test_what_cannot_be_read_is_named():
    model = drawn(CONFIG)
    with pytest.raises(ConfigError, match="N a multiple of batch_size=2"):
        token_losses(model, np.zeros((3, 4), int), batch_size=2)
    with pytest.raises(ConfigError, match="rows hold 0 to 11; the model has ids 0 to 10"):
        token_losses(model, np.array([[0, 11]]))
    with pytest.raises(ConfigError, match=r"rows must be whole numbers \[N, T\+1\], one at least"):
        token_losses(model, np.zeros((0, 4), int))
    with pytest.raises(ConfigError, match=r"got float64 of shape \(1, 4\)"):
        token_losses(model, np.zeros((1, 4)))
    with pytest.raises(ConfigError, match=r"piece=2\.5 must be a whole number"):
        token_losses(model, np.zeros((1, 4), int), piece=2.5)
