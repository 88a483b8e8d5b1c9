"""Log-likelihoods of continuations against probabilities of the whole row, taken by hand."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop.golden_models import drawn

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.evaluation.models import with_room_for
from deltaproduct_jax.evaluation.scoring import Pair, Scorer
from deltaproduct_jax.models import ModelConfig

CONFIG = ModelConfig(vocab_size=13, hidden_size=8, num_heads=2, head_dim=4, intermediate_size=8)
PIECES = (8, 4)


@functools.cache
def model():
    return drawn(CONFIG)


@functools.cache
def likeliest():
    """A continuation that is greedy, of a context."""
    ids = [1, 2]
    for _ in range(2):
        ids.append(int(np.argmax(np.asarray(logits_of(ids)[-1]))))
    return Pair(ids[:2], ids[2:])


@functools.cache
def forward():
    return jax.jit(model().__call__)


def logits_of(ids):
    padded = np.zeros((1, 40), np.int32)  # one program for all
    padded[0, : len(ids)] = ids
    return np.asarray(forward()(padded), np.float64)[0, : len(ids)]


def by_hand(pair):
    ids = [*pair.context, *pair.continuation]
    total, greedy = 0.0, True
    for place in range(len(pair.context), len(ids)):
        logits = logits_of(ids[:place])[-1]
        chances = np.exp(logits - logits.max())
        total += np.log(chances[ids[place]] / chances.sum())
        greedy &= int(np.argmax(logits)) == ids[place]
    return total, greedy


def pairs():
    rng = np.random.default_rng(0)
    draw = lambda length: rng.integers(0, 13, size=length).tolist()
    lengths = [(1, 1), (3, 5), (1, 30), (7, 2), (20, 9), (4, 4)]
    return [likeliest(), *(Pair(draw(before), draw(after)) for before, after in lengths)]


def test_scores_are_the_probabilities_of_the_continuations():
    asked, done = pairs(), []
    scorer = Scorer(model(), batch_size=3, pieces=PIECES)
    scores = scorer(asked, done.append)
    for pair, score in zip(asked, scores, strict=True):
        total, greedy = by_hand(pair)
        assert score.log_likelihood == pytest.approx(total, rel=2e-5, abs=2e-5)
        assert score.is_greedy is greedy
    assert scores[0].is_greedy
    assert not scores[3].is_greedy
    assert done == [3, 3, 1]
    assert scorer.programs == len(PIECES)


def test_rows_that_attention_does_not_keep_are_refused_and_not_scored_as_nan():
    hybrid = drawn(dataclasses.replace(CONFIG, num_layers=2, attention_every=2, max_length=6))
    fits, is_long = Pair([1, 2, 3], [4, 5, 6, 7]), Pair([1, 2, 3, 4], [5, 6, 7, 8])
    with pytest.raises(ConfigError, match="a row reads 7 tokens, and max_length=6 is what the mod"):
        Scorer(hybrid, batch_size=2)([fits, is_long])
    larger = with_room_for(hybrid, 7, 2, "max_length=7")
    scores = Scorer(larger, batch_size=2, pieces=(4,))([fits, is_long])
    assert all(np.isfinite(score.log_likelihood) for score in scores)
    assert with_room_for(hybrid, 6, 2, "") is hybrid
    assert with_room_for(model(), 10**12, 2, "") is not None  # a state of its own size
    with pytest.raises(ConfigError, match=r"^max_length=1.* and batch_size=2 need at least \d"):
        with_room_for(hybrid, 10**9, 2, "max_length=1000000000 and batch_size=2")


@pytest.mark.slow
@pytest.mark.usefixtures("all_devices")
def test_over_a_mesh_they_are_the_same():
    asked = pairs()
    one = Scorer(model(), batch_size=4, pieces=PIECES)(asked)
    for mesh in ("data:4", "data:2,fsdp:2", "data:2,tensor:2"):
        spread = Scorer(model(), batch_size=4, pieces=PIECES, mesh=mesh)(asked)
        ours, theirs = ([score.log_likelihood for score in scores] for scores in (one, spread))
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)


@pytest.mark.usefixtures("all_devices")
def test_what_does_not_fit_is_named():
    with pytest.raises(ConfigError, match="batch_size=3 must be a multiple of the 2 devices"):
        Scorer(model(), batch_size=3, mesh="data:2")
    with pytest.raises(ConfigError, match=r"pieces=\(4, 8\) must descend"):
        Scorer(model(), batch_size=3, pieces=(4, 8))
    scorer = Scorer(model(), batch_size=2)
    with pytest.raises(ConfigError, match="continuation is empty"):
        scorer([Pair([1], [])])
    with pytest.raises(ConfigError, match="id 13; the model has those from 0 to 12"):
        scorer([Pair([1], [13])])
    assert scorer([]) == []
    assert jnp.ndim(scorer.model.embeddings.embedding[...]) == 2
