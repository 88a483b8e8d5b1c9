"""Multi-query associative recall, read back token by token by plain Python."""

import collections
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.tasks.recall import RecallTask
from deltaproduct_jax.tasks.task import Batch, batch_key


def batch_of(task: RecallTask, batch_size: int, length: int, seed: int = 0) -> Batch:
    draw = jax.jit(task.batch, static_argnums=(1, 2))
    return jax.tree.map(np.asarray, draw(jax.random.key(seed), batch_size, length))


FIGURE_2 = [(64, 4), (128, 8), (256, 16), (512, 64)]


@pytest.mark.parametrize("filler", ["zero", "random"])
@pytest.mark.parametrize(("length", "pairs"), [*FIGURE_2, (8, 2), (12, 2)])
def test_every_key_is_asked_once_and_answered_by_its_value(length, pairs, filler):
    task = RecallTask(length, pairs, filler=filler)
    batch = batch_of(task, 20, length)
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == (20, length)
    assert [array.dtype for array in batch[:3]] == [jnp.int32, jnp.int32, bool]
    for tokens, targets, mask in zip(*(array.tolist() for array in batch[:3]), strict=True):
        keys, values = tokens[0 : 2 * pairs : 2], tokens[1 : 2 * pairs : 2]
        value_of = dict(zip(keys, values, strict=True))
        assert len(set(keys)) == len(set(values)) == pairs
        assert all(1 <= key < 4096 for key in keys)
        assert all(4096 <= value < 8192 for value in values)
        asked = [t for t in range(length) if mask[t]]
        assert all(t >= 2 * pairs and t % 2 == 0 for t in asked)
        assert sorted(tokens[t] for t in asked) == sorted(keys)
        assert all(targets[t] == value_of[tokens[t]] for t in asked)
        if filler == "zero":
            # A value stands only in its pair: nothing after a query gives the answer away.
            rest = set(range(2 * pairs, length)) - set(asked)
            assert all(tokens[t] == 0 for t in rest)


def test_random_fillers_are_any_token():
    task = RecallTask(64, 4, vocabulary=32)
    batch = batch_of(task, 2000, 64)
    rest = batch.inputs[:, 8:][~batch.mask[:, 8:]]
    counts = np.bincount(rest, minlength=32)
    expected = rest.size / 32
    assert np.abs(counts - expected).max() < 5 * expected**0.5


def test_keys_and_values_are_drawn_alike():
    inputs = batch_of(RecallTask(16, 4, vocabulary=24), 8000, 16).inputs
    for ids, choices in ((inputs[:, 0:8:2], range(1, 12)), (inputs[:, 1:8:2], range(12, 24))):
        for column in ids.T:
            counts = collections.Counter(column.tolist())
            assert set(counts) == set(choices)
            expected = 8000 / len(choices)
            assert all(abs(count - expected) < 5 * expected**0.5 for count in counts.values())


def ordered_probability(places: tuple[int, ...], weights: list[float]) -> float:
    """How likely it is that these places are drawn in this order, without replacement."""
    left, probability = sum(weights), 1.0
    for place in places:
        probability *= weights[place] / left
        left -= weights[place]
    return probability


@pytest.mark.parametrize("power", [0.01, 1.0])
def test_places_are_drawn_without_replacement_by_the_power_law(power):
    # 16 tokens, 2 pairs: places 0..5; the first key's place and the second's, in the order drawn.
    task = RecallTask(16, 2, vocabulary=16, power=power)
    batch = batch_of(task, 20_000, 16)
    places = [
        np.argmax(batch.mask & (batch.inputs == batch.inputs[:, [2 * n]]), axis=1) // 2 - 2
        for n in range(2)
    ]
    counts = collections.Counter(zip(*(column.tolist() for column in places), strict=True))
    weights = [i ** (power - 1) for i in range(1, 7)]
    assert set(counts) == set(itertools.permutations(range(6), 2))
    for pair, count in counts.items():
        expected = 20_000 * ordered_probability(pair, weights)
        assert abs(count - expected) < 5 * expected**0.5, pair


def test_evaluations_have_their_own_pairs():
    task = RecallTask(64, 4, eval_lengths=(32, 64, 128), eval_pairs=(2, 4, 32), vocabulary=256)
    assert task.test_lengths == (32, 64, 128)
    for length, pairs in ((32, 2), (64, 4), (128, 32), (48, 4)):
        mask = batch_of(task, 3, length).mask
        assert (mask.sum(axis=1) == pairs).all()
        score = task.score(mask, mask)["strict"]
        assert (score.num_pairs, score.token_accuracy, score.sequence_accuracy) == (pairs, 1, 1)


def test_scores_count_queries_alone():
    task = RecallTask(8, 2, vocabulary=16)
    mask = np.zeros((2, 8), dtype=bool)
    mask[:, [4, 6]] = True
    correct = np.ones((2, 8), dtype=bool)
    correct[0, 6] = correct[1, 0] = False
    score = task.score(correct, mask)["strict"]
    assert (score.token_accuracy, score.sequence_accuracy) == (3 / 4, 1 / 2)


def test_no_sequence_is_in_two_splits():
    task = RecallTask()
    draw = jax.jit(task.batch, static_argnums=(1, 2))
    seen = set()
    for split in ("train", "valid", "test"):
        inputs = np.asarray(draw(batch_key(jax.random.key(0), split, 0), 100, 64).inputs)
        rows = {row.tobytes() for row in inputs}
        assert len(rows) == 100
        assert not rows & seen
        seen |= rows


def test_batch_depends_on_its_key_alone():
    task = RecallTask(16, 2, vocabulary=64)
    first, same, other = (batch_of(task, 4, 16, seed) for seed in (3, 3, 4))
    np.testing.assert_array_equal(first.inputs, same.inputs)
    assert (first.inputs != other.inputs).any()


def test_defaults_are_the_published_smallest_setting():
    task = RecallTask()
    assert (task.train_length, task.num_pairs, task.vocab_size) == (64, 4, 8192)
    assert (task.test_lengths, task.power, task.filler) == ((64,), 0.01, "random")


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_pairs": 0}, "num_pairs=0 is too small"),
        ({"num_pairs": 17}, "train_length=64 does not fit 17 pairs; .* even and at least 68"),
        ({"train_length": 63}, "train_length=63 does not fit 4 pairs; it must be even"),
        ({"train_length": 0}, "train_length=0 does not fit"),
        ({"eval_lengths": (64, 33)}, "must ascend"),
        ({"eval_lengths": ()}, "must ascend"),
        ({"eval_lengths": (8, 64)}, "eval_lengths=8 does not fit 4 pairs"),
        ({"eval_pairs": (4,)}, r"eval_pairs=\(4,\) must have one number for each of eval_lengths="),
        ({"eval_lengths": (64, 128), "eval_pairs": (4,)}, "one number for each"),
        ({"eval_lengths": (128,), "eval_pairs": (0,)}, "eval_pairs=0 is too small"),
        ({"eval_lengths": (128,), "eval_pairs": (33,)}, "eval_lengths=128 does not fit 33 pairs"),
        ({"eval_lengths": (64,), "eval_pairs": (8,)}, "8 pairs at train_length=64; .* num_pairs=4"),
        ({"vocabulary": 3}, "vocabulary=3 is too small"),
        ({"vocabulary": 8}, "vocabulary=8 has 3 keys, fewer than the 4 pairs .* at least 10"),
        (
            {"vocabulary": 16, "eval_lengths": (128,), "eval_pairs": (9,)},
            "vocabulary=16 has 7 keys, fewer than the 9 pairs .* at least 20",
        ),
        ({"power": 0.0}, r"power=0\.0 must be greater than 0"),
        ({"filler": "blank"}, r"filler='blank' is not known; it may be one of \['random', 'zero'"),
    ],
)
def test_senseless_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        RecallTask(**fields)


def test_as_many_pairs_as_an_error_says_are_taken():
    RecallTask(vocabulary=10)
    RecallTask(vocabulary=20, eval_lengths=(128,), eval_pairs=(9,))
    RecallTask(train_length=68, num_pairs=17)
