"""The effective rank of states, against NumPy's loop over updates."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop.golden_models import drawn

from deltaproduct_jax.analysis import effective_rank as analysis
from deltaproduct_jax.analysis.householder_geometry import factors_of_tokens
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers.delta_rule import TokenFactors
from deltaproduct_jax.models import ModelConfig

CONFIG = ModelConfig(
    vocab_size=11, mixer="gated_delta_product", hidden_size=8, num_layers=2, num_heads=2,
    head_dim=4, num_householder=2, intermediate_size=8, attention_every=2,
    implementation="recurrent",
)  # fmt: skip


def rank_of(matrix):
    values = np.linalg.svd(matrix, compute_uv=False)
    if not values.sum():
        return 0.0
    shares = values[values > 1e-6 * values.sum()] / values.sum()
    return np.exp(-np.sum(shares * np.log(shares)))


def test_the_rank_of_matrices_one_knows():
    matrices = np.zeros((4, 3, 5), np.float32)
    matrices[1, 0] = 1.0, 2.0, 3.0, 4.0, 5.0
    matrices[2, range(3), range(3)] = 7.0
    matrices[3, range(2), range(2)] = 3.0, 1.0
    want = [0.0, 1.0, 3.0, np.exp(-0.75 * np.log(0.75) - 0.25 * np.log(0.25))]
    np.testing.assert_allclose(analysis.effective_rank(matrices), want, rtol=1e-5)
    of_narrow = analysis.effective_rank(jnp.asarray(matrices, jnp.bfloat16))  # which holds these
    np.testing.assert_allclose(of_narrow, want, rtol=1e-5)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_has_no_rank(bad):
    matrices = np.ones((2, 3, 4), np.float32)
    matrices[1, 2, 1] = bad
    np.testing.assert_allclose(analysis.effective_rank(matrices), [1.0, np.nan], rtol=1e-5)


@pytest.mark.parametrize(
    ("tokens", "says"),
    [
        ([0, 11], "tokens hold 0 to 11; the model has ids 0 to 10"),
        ([-1, 3], "tokens hold -1 to 3"),
        ([0.5, 3], "tokens must be whole numbers [T], one at least, got float64 of shape (2,)"),
        ([[0, 3]], "got int64 of shape (1, 2)"),
        ([], "got float64 of shape (0,)"),
    ],
)
def test_ids_that_are_none_are_named(tokens, says):
    """An embedding of them would be another's, or NaN, without a word."""
    with pytest.raises(ConfigError, match=re.escape(says)):
        analysis.ranks_of_model(drawn(CONFIG), tokens)
    with pytest.raises(ConfigError, match=re.escape(says)):
        factors_of_tokens(drawn(CONFIG), tokens)


def test_accelerators_leave_singular_values_to_the_host():
    states = np.random.default_rng(0).normal(size=(3, 5, 4, 6)).astype(np.float32)
    states[1, 2, 0, 0] = np.nan
    found = jax.jit(jax.vmap(analysis._on_host))(states)
    assert np.isnan(found[1, 2]).all()
    assert np.isfinite(found).sum() == 14 * 4
    np.testing.assert_allclose(found, jnp.linalg.svd(states, compute_uv=False), rtol=1e-5)


def test_states_before_every_update_are_looked_at(monkeypatch):
    """Two key heads serve four value heads; ranks are taken a few tokens at once."""
    monkeypatch.setattr(analysis, "AT_ONCE", 4 * 2 * 4 * 4 * 3)  # states of one token
    T, R, H, Hv, K, V, every = 12, 2, 2, 4, 4, 3, 3
    rng = np.random.default_rng(0)
    k, v = rng.normal(size=(T, R, H, K)), rng.normal(size=(T, R, Hv, V))
    beta, g = rng.uniform(0, 2, size=(T, R, Hv)), -rng.uniform(size=(T, Hv))
    factors = TokenFactors(*(jnp.asarray(a, jnp.float32) for a in (k, v, beta, g)))
    found = analysis.ranks_of_factors(factors, every)
    want, states = np.zeros((T // every, R, Hv)), np.zeros((Hv, K, V))
    for t in range(T):
        for h in range(Hv):
            states[h] *= np.exp(g[t, h])
            for r in range(R):
                if t % every == 0:
                    want[t // every, r, h] = rank_of(states[h])
                key = k[t, r, h // 2] / np.linalg.norm(k[t, r, h // 2])
                wrong = v[t, r, h] - states[h].T @ key
                states[h] += beta[t, r, h] * np.outer(key, wrong)
    np.testing.assert_allclose(found, want, rtol=1e-4)


def test_blocks_of_a_hybrid_that_have_such_states():
    model, tokens = drawn(CONFIG), np.arange(8) % 11
    found = analysis.ranks_of_model(model, tokens, every=4)
    assert {block: ranks.shape for block, ranks in found.items()} == {0: (2, 2, 2)}
    # The state that the first block holds behind four tokens is the one before the fifth.
    read = jax.jit(lambda ids: model.forward(ids)[1][0].recurrent[0])
    state = read(jnp.asarray(tokens[None, :4]))
    want = [rank_of(np.asarray(matrix)) for matrix in state]
    np.testing.assert_allclose(found[0][1, 0], want, rtol=1e-3)
    assert not np.any(found[0][0, 0])
    with pytest.raises(ConfigError, match="every=3 must divide the number of tokens, 8"):
        analysis.ranks_of_model(model, tokens, every=3)
    with pytest.raises(ConfigError, match="mixer='transformer' has no Householder factors"):
        analysis.ranks_of_model(drawn(ModelConfig(vocab_size=11, mixer="transformer")), tokens)


def test_summary_by_hand():
    ranks = np.array([1, 2, 3, 4, 8, 8, 2, 2], float).reshape(8, 1, 1)
    (head,) = analysis.summary(ranks, 10, starts=[0, 45], trained=40)
    assert head == {"trained": 2.5, "end": 2.0, "kept_at_starts": 0.25}
    (head,) = analysis.summary(ranks, 10, starts=[0, 70], trained=None)
    assert head == {"trained": None, "end": 2.0, "kept_at_starts": None}


def test_ranks_over_heads_by_hand():
    first = np.arange(14.0).reshape(7, 2, 1)  # means over updates: .5, 2.5, ...
    second = np.zeros((7, 1, 3))
    found = analysis.over_heads({0: first, 4: second}, 10, most=4)
    assert found["position"] == [0, 20, 40]
    assert found["mean"] == [1.5 / 4, 5.5 / 4, 9.5 / 4]
    assert found["low"] == [0, 0, 0]
    assert found["high"] == [float(f"{0.7 * x:.4g}") for x in (1.5, 5.5, 9.5)]
    assert analysis.over_heads({0: first}, 10)["mean"] == first.mean(axis=1)[:, 0].tolist()
