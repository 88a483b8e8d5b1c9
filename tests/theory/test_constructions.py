"""Constructions: the weights answer every word as the group or automaton does."""

import dataclasses
import itertools
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from quick import quick

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.theory import (
    CATALOGUE,
    by_blocks,
    construct,
    group_in_one_layer,
    permutation_reset,
    two_layers,
)
from deltaproduct_jax.theory import reflections as refl
from deltaproduct_jax.theory import representations as reps
from deltaproduct_jax.theory.clock import make_clock
from deltaproduct_jax.theory.layered import block_length, key_cases, query_cases

LAYERS_AND_FACTORS = {
    "permutations_S3": (1, 2), "permutations_S4": (1, 3), "permutations_S5": (1, 4),
    "cube_S4": (1, 2), "icosahedron_A5": (1, 2), "plane_Z5": (1, 2), "plane_D5": (1, 2),
    "two_layers_Z5": (2, 1), "two_layers_S3": (2, 1), "two_layers_D5": (2, 1),
    "three_layers_S3": (3, 2), "three_layers_S4": (3, 2), "three_layers_S5": (3, 2),
    "three_layers_S5_full": (3, 4), "four_layers_S3": (4, 1), "four_layers_S4": (4, 1),
    "four_layers_S5": (4, 1), "gated_turns": (1, 2), "gated_swaps": (1, 2),
}  # fmt: skip


def words(construction, T, B=4, seed=0):
    """Random words and what is wanted, BOS first in both; groups as their task has it."""
    drawn = np.random.default_rng(seed).integers(0, len(construction.letters), (B, T))
    letters = construction.letters[drawn]
    if construction.group.endswith("states"):
        wanted = np.array([[spelled(construction.name, row[:t]) for t in range(T + 1)]
                           for row in drawn])  # fmt: skip
        bos = np.full((B, 1), construction.bos)
        return np.concatenate([bos, letters], axis=1), wanted
    task = GroupTask(group=construction.group)
    bos = np.full((B, 1), task.bos_id)
    wanted = np.asarray(jax.jit(task.running_products)(letters))
    return np.concatenate([bos, letters], axis=1), np.concatenate([bos, wanted], axis=1)


def spelled(name, word):
    """Whether a word is in the language, by its description."""
    if name == "gated_turns":
        last = max((i for i, c in enumerate(word) if c == 2), default=-1)
        since = list(word[last + 1 :])
        return int((since.count(0) - since.count(1)) % 3 == 0)
    at = 0
    for letter in word:
        at = [(at + 1) % 3, {0: 1, 1: 0, 2: 2}[at], 0, 2][letter]
    return int(at == 1)


def answers(construction, tokens, dtype="float32", implementation="recurrent"):
    model = construction.model(dtype, implementation)
    return np.asarray(jax.jit(lambda model, x: model(x))(model, jnp.asarray(tokens)), np.float64)


@pytest.mark.parametrize(
    "name",
    quick(
        CATALOGUE,
        ["two_layers_D5", "three_layers_S4", "four_layers_S4", "gated_swaps"],
    ),
)
def test_every_answer_is_right(name):
    made = construct(name)
    assert (made.config.num_layers, made.config.num_householder) == LAYERS_AND_FACTORS[name]
    tokens, wanted = words(made, 40)
    logits = answers(made, tokens)
    np.testing.assert_array_equal(logits.argmax(-1), wanted)
    # As far from the others as exact arithmetic has it.
    answer = logits[:, 1:, : made.ideal.shape[1]]
    states = np.zeros(tokens.shape, int)
    for t in range(1, tokens.shape[1]):
        letter = np.searchsorted(made.letters, tokens[:, t])
        if not np.array_equal(made.letters[letter], tokens[:, t]):  # generators stand unsorted
            letter = np.array([list(made.letters).index(x) for x in tokens[:, t]])
        states[:, t] = made.step[states[:, t - 1], letter]
    ideal = made.ideal[states[:, 1:]]
    unit = lambda x: x / np.linalg.norm(x, axis=-1, keepdims=True)
    assert np.linalg.norm(unit(answer) - unit(ideal), axis=-1).max() < 1e-5


@pytest.mark.parametrize(
    "name",
    quick(
        ["permutations_S4", "two_layers_S3", "three_layers_S4", "gated_swaps"], ["three_layers_S4"]
    ),
)
@pytest.mark.slow
def test_in_bfloat16_by_chunks(name):
    made = construct(name)
    tokens, wanted = words(made, 90, seed=1)
    assert (answers(made, tokens, "bfloat16", "chunked").argmax(-1) == wanted).all()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.slow
def test_the_state_of_a_permutation_is_exact(dtype):
    made = construct("permutations_S3")
    tokens, _ = words(made, 300, B=2)
    model = made.model(dtype, "chunked")
    read = jax.jit(lambda model, x: model.forward(x)[1][0].recurrent)
    first, last = (np.asarray(read(model, jnp.asarray(x))) for x in (tokens[:, :1], tokens))
    assert np.abs(first).max() > 0
    assert not np.array_equal(first[..., 0], last[..., 0])
    np.testing.assert_array_equal(np.sort(first[..., 0]), np.sort(last[..., 0]))


@pytest.mark.slow
def test_in_pieces_and_steps():
    made = construct("two_layers_S3")
    tokens, wanted = words(made, 24)
    model = made.model(implementation="recurrent")
    logits, state = model.forward(jnp.asarray(tokens[:, :16]))
    found = [np.asarray(logits).argmax(-1)]
    step = jax.jit(lambda model, state, x: model.step(state, x))
    for t in range(16, tokens.shape[1]):
        logits, state = step(model, state, jnp.asarray(tokens[:, t]))
        found.append(np.asarray(logits).argmax(-1)[:, None])
    np.testing.assert_array_equal(np.concatenate(found, axis=1), wanted)


def test_with_betas_up_to_1_it_forgets():
    made = construct("permutations_S3")
    half = dataclasses.replace(
        made, config=dataclasses.replace(made.config, allow_neg_eigval=False)
    )
    tokens, wanted = words(made, 40)
    assert (answers(half, tokens).argmax(-1) == wanted)[:, 5:].mean() < 0.7


def test_too_few_factors_and_wrong_groups():
    with pytest.raises(ValueError, match=r"num_householder=3 is too small: a letter takes 4"):
        group_in_one_layer("few", "S5", "permutations", 3)
    with pytest.raises(ConfigError, match=r"group='D3' has no permutation matrices; it may be Sn"):
        by_blocks("no", "D3", 2)
    with pytest.raises(ConfigError, match=r"group='S4' does not act on the plane; it may be Zm"):
        two_layers("no", "S4")
    with pytest.raises(ConfigError, match=r"group='S5' is no solid's; it may be one of \['S4'"):
        reps.solid_matrices("S5")
    with pytest.raises(ConfigError, match=r"letter 1 takes the states to \[0, 0, 1\]"):
        permutation_reset("no", [[1, 0], [2, 0], [0, 1]], [0])
    with pytest.raises(ConfigError, match=r"name='S3' is not known; it may be one of \['perm"):
        construct("S3")
    with pytest.raises(ConfigError, match=r"kind='cube' is not known; it may be one of \['perm"):
        group_in_one_layer("no", "S4", "cube", 3)
    for letters in ([0, 6], [-1], [0.5], []):
        with pytest.raises(ConfigError, match=r"letters=\[.*must be whole numbers from 0 to 5"):
            by_blocks("no", "S3", 2, letters)
    with pytest.raises(ConfigError, match="num_householder=0 is too small"):
        by_blocks("no", "S3", 0)
    for step, accepting in (([[0, 2], [1, 0]], [0]), ([[0], [1]], [2]), ([[0.0]], [0]), ([], [])):
        with pytest.raises(ConfigError, match=r"must be whole numbers from 0 to -?\d in \d dim"):
            permutation_reset("no", step, accepting)
    made = dataclasses.replace(construct("permutations_S3"), params={"layers.7.x": np.zeros(1)})
    with pytest.raises(AssertionError, match="no such parameters"):
        made.model()


@pytest.mark.parametrize(
    ("group", "matrices"),
    [
        ("S4", reps.permutation_matrices), ("A5", reps.permutation_matrices),
        ("S4", reps.solid_matrices), ("A5", reps.solid_matrices), ("Z7", reps.plane_matrices),
        ("D4", reps.plane_matrices),
    ],
)  # fmt: skip
def test_matrices_multiply_like_the_group(group, matrices):
    found = matrices(group)
    pairs = np.stack(np.meshgrid(*2 * [range(len(found))], indexing="ij"), -1).reshape(-1, 2)
    table = np.asarray(jax.jit(GroupTask(group=group).running_products)(pairs))[:, 1]
    products = np.einsum("pij,qjk->pqik", found, found).reshape(-1, *found.shape[1:])
    np.testing.assert_allclose(products, found[table], atol=1e-12)
    with pytest.raises(ValueError, match="do not multiply like"):
        reps.numbered(np.add.outer(range(4), range(4)) % 4, reps.plane_matrices("D2"))


@pytest.mark.parametrize(
    ("matrices", "group", "says"),
    [
        (reps.permutation_matrices, "S0", "is not known; it may be one of Sn (n >= 2)"),
        (reps.permutation_matrices, "S8", "has too many elements; it may have up to 5040"),
        (reps.permutation_matrices, "S3_x_Z2", "has no permutation matrices; it may be Sn or An"),
        (reps.plane_matrices, "D0", "is not known; it may be one of Sn (n >= 2)"),
        (lambda group: reps.subgroup_matrices(group, 4), "S5", "p=4 must be a prime that divides"),
        (lambda group: reps.subgroup_matrices(group, 7), "S5", "the order of group='S5', 120"),
    ],
)
def test_groups_without_such_matrices_are_named(matrices, group, says):
    with pytest.raises(ConfigError, match=re.escape(says)):
        matrices(group)


def test_reflections_are_as_few_as_can_be():
    rng = np.random.default_rng(0)
    for moved in (0, 1, 2, 5):
        inner = np.linalg.qr(rng.normal(size=(moved, moved)))[0]
        basis = np.linalg.qr(rng.normal(size=(6, 6)))[0]
        matrix = np.eye(6)
        matrix[:moved, :moved] = inner
        matrix = basis @ matrix @ basis.T
        needed = np.linalg.matrix_rank(matrix - np.eye(6), 1e-9)
        assert len(refl.reflections(matrix)) == needed
        k, beta = refl.factors(matrix, 6)
        np.testing.assert_allclose(refl.product(k, beta), matrix, atol=1e-12)
        assert beta.tolist() == [2.0] * needed + [0.0] * (6 - needed)
    with pytest.raises(ValueError, match="must be orthogonal"):
        refl.reflections(2 * np.eye(2))
    with pytest.raises(ValueError, match="must be orthogonal"):
        refl.reflections(np.full((2, 2), np.nan))
    assert refl.reflections([[0.0, 1.0], [1.0, 0.0]]).shape == (1, 2)


def test_completions_reach_powers_of_4():
    for squares in (1, 2, 7, 10, 28, 60):
        for least in (1, 200):
            pads = refl.completion(squares, least)
            total = squares + sum(pad**2 for pad in pads)
            assert total >= least
            assert total in 4 ** np.arange(8)


def test_blocks_are_as_short_as_their_product_and_an_exact_clock_allow():
    """One layer with several factors cannot count modulo 4 without drift."""
    for needed, R in itertools.product(range(1, 9), range(1, 5)):
        m = block_length(needed, R)
        shorter = [n for n in range(1, m) if n * R >= needed and (R == 1 or n != 2)]
        assert m * R >= needed
        assert not shorter
        assert R == 1 or m != 2


def test_clocks_return_after_their_period_only():
    for period, R, layers in ((2, 2, 1), (6, 2, 1), (8, 3, 1), (4, 1, 2), (6, 1, 2), (8, 1, 2)):
        clock = make_clock(period, R)
        assert clock.num_layers == layers
        at = np.concatenate([hand.positions(2 * period) for hand in clock.hands], axis=1)
        np.testing.assert_allclose(at[:period], at[period:], atol=1e-12)
        assert (np.abs(at) == 1).all()
        others = (at[:period] @ at[:period].T)[~np.eye(period, dtype=bool)]
        assert others.max() == clock.num_heads - 2
        for hand in clock.hands:
            found = [hand.start]
            for t in range(1, period):
                found.append(hand.turns[t % layers] @ found[-1])
            distance = np.abs(np.array(found) @ hand.lines.T).min()
            if period == 8:  # as far from 0, where a sign turns, as eight directions can be
                assert distance == pytest.approx(np.sin(np.pi / 8))
            else:
                assert distance == 1
                assert all(np.array_equal(turn, np.rint(turn)) for turn in hand.turns)


@pytest.mark.parametrize(
    "name", [pytest.param("three_layers_S3", marks=pytest.mark.slow), "four_layers_S4"]
)
@pytest.mark.slow
def test_a_clock_whose_state_has_lost_length_goes_on(name):
    made = construct(name)
    tokens, wanted = words(made, 40)
    model = made.model(implementation="recurrent")
    read = jax.jit(lambda model, x, state: model.forward(x, state=state))
    _, state = model.forward(jnp.asarray(tokens[:, :1]))
    clock = made.config.num_layers - 3
    state[clock] = state[clock]._replace(recurrent=0.7 * state[clock].recurrent)
    logits, _ = read(model, jnp.asarray(tokens[:, 1:]), state)
    assert (np.asarray(logits).argmax(-1) == wanted[:, 1:]).all()


def test_a_lookup_has_no_more_cases_than_the_theorem_says():
    for m, L in ((1, 3), (2, 2), (3, 2)):
        keys, queries = list(key_cases(m, L)), list(query_cases(m, L))
        later = [case for case in keys + queries if case[1] is not None]
        assert len(set(keys)) == len(keys)
        assert len(set(queries)) == len(queries)
        assert len(later) <= 2 * m * L**m + 2 * m * L ** (2 * m - 1)
    # With one table of keys and queries these were 28,920 and 3066.
    assert construct("three_layers_S5_full").config.mlp_width == 481
    assert construct("four_layers_S3").config.mlp_width == 656
