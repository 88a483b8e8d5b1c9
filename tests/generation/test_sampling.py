"""Draws: probabilities computed by hand, frequencies, and what a draw depends on."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import quick

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.models.generation import Generator, Sampling
from deltaproduct_jax.models.generation.sampling import (
    Needs,
    draw,
    needs_of,
    probabilities,
    row_keys,
    rules_of,
)

P = [0.05, 0.5, 0.2, 0.2, 0.05]  # two ties, the likeliest not in front
BY_HAND = {
    Sampling(): P,
    Sampling(temperature=0.0): [0, 1, 0, 0, 0],
    Sampling(temperature=0.5): [p**2 / 0.335 for p in P],
    Sampling(top_k=1): [0, 1, 0, 0, 0],
    Sampling(top_k=2): [0, 5 / 7, 2 / 7, 0, 0],
    Sampling(top_k=4): [0.05 / 0.95, 0.5 / 0.95, 0.2 / 0.95, 0.2 / 0.95, 0],
    Sampling(top_k=99): P,
    Sampling(top_p=0.4): [0, 1, 0, 0, 0],
    Sampling(top_p=0.6): [0, 5 / 7, 2 / 7, 0, 0],
    Sampling(top_p=0.8): [0, 5 / 9, 2 / 9, 2 / 9, 0],
    Sampling(top_p=1e-9): [0, 1, 0, 0, 0],
    Sampling(min_p=0.3): [0, 5 / 9, 2 / 9, 2 / 9, 0],
    Sampling(min_p=0.05): P,
    Sampling(min_p=1.0): [0, 1, 0, 0, 0],
    # Of the two that top_k leaves the first has 5/7, which is enough for .7 and not for .72.
    Sampling(top_k=2, top_p=0.7): [0, 1, 0, 0, 0],
    Sampling(top_k=2, top_p=0.72): [0, 5 / 7, 2 / 7, 0, 0],
    # At temperature .5 the likeliest has .746, and .2 becomes .16 of it.
    Sampling(temperature=0.5, top_p=0.7): [0, 1, 0, 0, 0],
    Sampling(temperature=0.5, min_p=0.2): [0, 1, 0, 0, 0],
    Sampling(temperature=2.0, min_p=0.5): [
        0, *(np.sqrt([0.5, 0.2, 0.2]) / np.sqrt([0.5, 0.2, 0.2]).sum()), 0,
    ],
}  # fmt: skip


jitted = jax.jit(draw, static_argnames="needs")
jitted_probabilities = jax.jit(probabilities)


@pytest.fixture(scope="module")
def rows():
    """Logits of P in every row, off by constants, and the rules by hand."""
    logits = np.log(P)[None] + np.arange(len(BY_HAND))[:, None]
    return jnp.asarray(logits, jnp.float32), rules_of(list(BY_HAND), len(P))


def test_probabilities_are_those_computed_by_hand(rows):
    got = jitted_probabilities(*rows)
    for row, (sampling, want) in zip(got, BY_HAND.items(), strict=True):
        np.testing.assert_allclose(row, want, atol=1e-6, err_msg=str(sampling))


def test_all_of_the_probability_is_every_token_however_unlikely(rows):
    """In float32 the first has it all: the sum before each other is 1 already."""
    logits = jnp.array([0.0, -20.0, -30.0, -40.0, -50.0])
    got = jitted_probabilities(jnp.broadcast_to(logits, rows[0].shape), rows[1])
    assert next(iter(BY_HAND)) == Sampling()
    np.testing.assert_allclose(got[0], np.exp(logits), rtol=1e-5)


def test_tokens_are_drawn_with_these_probabilities(rows):
    keys = jax.random.split(jax.random.key(1), 4000)
    every = jax.vmap(lambda key: draw(jax.random.split(key, len(BY_HAND)), *rows))
    drawn = np.asarray(jax.jit(every)(keys))
    for column, (sampling, want) in zip(drawn.T, BY_HAND.items(), strict=True):
        want = np.asarray(want)
        frequencies = np.bincount(column, minlength=len(P)) / len(column)
        allowed = 5 * np.sqrt(want * (1 - want) / len(column))
        assert (np.abs(frequencies - want) <= allowed).all(), sampling


def test_a_program_without_what_no_row_needs_draws_the_same(rows):
    logits, _ = rows
    keys = jax.random.split(jax.random.key(0), len(logits))
    for sampling, needs in [
        (Sampling(temperature=0.0), Needs(False, False)),
        (Sampling(min_p=0.1), Needs(True, False)),
        (Sampling(top_k=3), Needs(True, True)),
    ]:
        assert needs_of([sampling]) == needs
        rules = rules_of([sampling] * len(logits), len(P))
        few = jitted(keys, logits, rules, needs)
        np.testing.assert_array_equal(few, jitted(keys, logits, rules))


def test_a_draw_depends_on_seed_key_and_place_alone():
    logits = jax.random.normal(jax.random.key(3), (1, 300)).repeat(6, axis=0)
    rules = rules_of([Sampling()] * 6, 300)
    own, place = jnp.array([7, 7, 8, 7, 9, 7], jnp.uint32), jnp.array([4, 5, 4, 4, 4, 5])
    keys = lambda seed: row_keys(jax.random.key(seed), own, place)
    seeded = jax.jit(lambda seed: draw(keys(seed), logits, rules, Needs(True, False)))
    drawn = seeded(0)
    assert drawn[0] == drawn[3]
    assert drawn[1] == drawn[5]
    assert len(set(drawn.tolist())) == 4
    assert not np.any(seeded(1) == drawn)


def test_logits_that_are_not_finite_give_no_token(rows):
    logits = jnp.stack([jnp.array(x) for x in ([0, jnp.nan], [-jnp.inf, 0], [-jnp.inf, -jnp.inf])])
    keys = jax.random.split(jax.random.key(0), 3)
    assert jitted(keys, logits, rules_of([Sampling()] * 3, 2)).tolist() == [-1, 1, -1]
    many = jnp.zeros((3, 4096)).at[1, 70].set(jnp.nan).at[:, 9].set(1)
    rules = rules_of([Sampling(temperature=0.0)] * 3, 4096)
    assert jitted(keys, many, rules).tolist() == [9, -1, 9]


@pytest.mark.parametrize(
    ("field", "text"),
    [
        ({"temperature": -1.0}, "temperature=-1.0 is too small; it must be at least 0"),
        ({"top_k": 0}, "top_k=0 is too small; it must be at least 1"),
        ({"top_p": 0.0}, r"top_p=0\.0 must be greater than 0"),
        ({"min_p": 1.5}, r"min_p=1\.5 is too large; it may be up to 1"),
        ({"top_p": float("nan")}, "top_p=nan must be a finite number"),
    ],
)
def test_a_setting_out_of_range_is_named(field, text, unchecked):
    with pytest.raises(ConfigError, match=text):
        Sampling(**field)


@pytest.mark.parametrize(
    ("flag", "value"),
    quick(
        [
            (jax.default_prng_impl, "rbg"),
            (jax.default_prng_impl, "unsafe_rbg"),
            (jax.threefry_partitionable, False),
        ],
        [(jax.default_prng_impl, "rbg")],
        unpack=True,
    ),
)
def test_what_is_written_hangs_on_no_mode_of_jax(flag, value):
    """Mapped over rows, keys of "rbg" would not draw what each draws by itself."""
    sizes = {"hidden_size": 8, "num_heads": 1, "head_dim": 8, "num_layers": 1}
    model = SequenceModel(ModelConfig(vocab_size=50, **sizes), rngs=nnx.Rngs(0))

    def write():
        generator = Generator(model, rows=2, pieces=(2,), stride=8)
        return [each.tokens for each in generator.generate([[1, 2], [3]], max_tokens=8, seed=5)]

    expected = write()
    with flag(value):
        assert write() == expected
