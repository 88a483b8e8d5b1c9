"""Groups and their word problems, against loops over permutations written from the definitions."""

import itertools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.tasks.finite_groups import finite_group
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.tasks.task import (
    MAX_BATCH_INDEX,
    SPLITS,
    Batch,
    batch_key,
    score_positions,
)

ORDERS = {
    "S2": 2, "S3": 6, "S4": 24, "S5": 120, "A3": 3, "A4": 12, "A5": 60, "Z2": 2, "Z60": 60,
    "D2": 4, "D3": 6, "D4": 8, "D7": 14, "Z2_x_Z3": 6, "S3_x_Z2": 12, "A4_x_Z5": 60,
    "Z2_x_D3_x_Z3": 36,
}  # fmt: skip


def permutations(n: int, *, even_only: bool = False) -> list[tuple[int, ...]]:
    """Lexicographic permutations of 1..n; the even ones are those of determinant 1."""
    found = list(itertools.permutations(range(1, n + 1)))
    if even_only:
        found = [p for p in found if round(np.linalg.det(np.eye(n)[np.array(p) - 1])) == 1]
    return found


def compose(p: tuple[int, ...], q: tuple[int, ...]) -> tuple[int, ...]:
    """P * q: first q, then p."""
    return tuple(p[q[i] - 1] for i in range(len(p)))


@pytest.mark.parametrize(("name", "order"), ORDERS.items())
def test_group_axioms(name, order):
    table = finite_group(name).table
    everything = np.arange(order)
    assert table.shape == (order, order)
    np.testing.assert_array_equal(table[0], everything)  # 0 is the identity, on both sides
    np.testing.assert_array_equal(table[:, 0], everything)
    assert (np.sort(table, axis=0) == everything[:, None]).all()  # every element has an inverse
    assert (np.sort(table, axis=1) == everything).all()
    # (p q) r == p (q r) for all triples
    np.testing.assert_array_equal(table[table], table[:, table])


@pytest.mark.parametrize("name", ["S2", "S3", "S4", "S5", "A3", "A4", "A5"])
def test_permutations_are_lexicographic_and_compose_as_functions(name):
    perms = permutations(int(name[1:]), even_only=name[0] == "A")
    index = {p: i for i, p in enumerate(perms)}
    want = [[index[compose(p, q)] for q in perms] for p in perms]
    np.testing.assert_array_equal(finite_group(name).table, want)
    moved = [sum(image != i for i, image in enumerate(p, start=1)) for p in perms]
    np.testing.assert_array_equal(finite_group(name).displaced, moved)


def test_known_products_of_s3():
    # Lexicographic S3: 0=123 1=132 2=213 3=231 4=312 5=321. 132 after 213 is 312, 213 after 132 is
    # 231.
    table = finite_group("S3").table
    assert table[1, 2] == 4
    assert table[2, 1] == 3


def test_cyclic_group_adds():
    assert finite_group("Z7").table[5, 4] == 2


def test_dihedral_group_acts_on_the_polygon():
    n = 5
    # r turns corner i to i + 1, s reflects i to -i; element k + n * f is r^k s^f.
    acts = [[(k + (-i if f else i)) % n for i in range(n)] for f in range(2) for k in range(n)]
    for p, q in itertools.product(range(2 * n), repeat=2):
        assert acts[finite_group("D5").table[p, q]] == [acts[p][acts[q][i]] for i in range(n)]


def test_direct_product_is_lexicographic_pairs():
    left, right, both = finite_group("A4"), finite_group("Z5"), finite_group("A4_x_Z5")
    for (a, b), (c, d) in itertools.product(itertools.product(range(12), range(5)), repeat=2):
        assert both.table[a * 5 + b, c * 5 + d] == left.table[a, c] * 5 + right.table[b, d]


def test_large_groups_are_associative_where_sampled():
    table = finite_group("S6").table
    p, q, r = np.random.default_rng(0).integers(720, size=(3, 10_000))
    np.testing.assert_array_equal(table[table[p, q], r], table[p, table[q, r]])


@pytest.mark.parametrize(
    "name", ["S1", "A2", "Z1", "D1", "Q8", "s3", "S", "S3x", "S3_x_", "_x_S3", "", "S-3", "S3_y_Z2"]
)
def test_unknown_groups_are_refused(name):
    with pytest.raises(ConfigError, match=r"group='.*' is not known; it may be one of Sn"):
        finite_group(name)


@pytest.mark.parametrize("name", ["S8", "S9999", "A8", "Z9999", "A5_x_A5_x_Z2"])
def test_groups_too_large_for_a_table_are_refused(name):
    with pytest.raises(ConfigError, match="too many elements; it may have up to 5040"):
        finite_group(name)


def drawn(task: GroupTask, batch_size: int, length: int, seed: int = 0) -> np.ndarray:
    letters = task.letters()
    return letters[np.random.default_rng(seed).integers(len(letters), size=(batch_size, length))]


def batch_of(task: GroupTask, key: jax.Array, batch_size: int, length: int) -> Batch:
    return jax.tree.map(
        np.asarray, jax.jit(task.batch, static_argnums=(1, 2))(key, batch_size, length)
    )


def products_of(task: GroupTask, elements: list[int]) -> list[int]:
    so_far, found = 0, []
    for x in elements:
        so_far = int(finite_group(task.group).table[so_far, x])
        found.append(so_far)
    return found


def check_word_problem(task: GroupTask, one_sequence):
    """``one_sequence``: drawn elements -> (inputs, targets), as a plain loop."""
    for length in (1, 3, 13):
        elements = drawn(task, 5, length)
        inputs, targets = jax.jit(task.word_problem)(jnp.asarray(elements, dtype=jnp.int32))
        for row in range(5):
            want_inputs, want_targets = one_sequence(elements[row].tolist())
            assert np.asarray(inputs)[row].tolist() == want_inputs[:length]
            assert np.asarray(targets)[row].tolist() == want_targets[:length]


@pytest.mark.parametrize("group", ["S3", "A5", "Z7", "D4", "S3_x_Z2"])
def test_plain_word_problem(group):
    task = GroupTask(group)
    check_word_problem(task, lambda x: (x, products_of(task, x)))


@pytest.mark.parametrize(("group", "width"), [("S5", 4), ("S4", 3), ("Z5", 2)])
def test_merged_elements(group, width):
    task = GroupTask(group, max_displaced=2 if group == "S5" else None, merge_elements=width)

    def one_sequence(x):
        inputs = []
        for start in range(0, len(x), width):
            inputs += [products_of(task, x[start : start + width])[-1]] + [0] * (width - 1)
        return inputs, [0] * (width - 1) + products_of(task, inputs)

    check_word_problem(task, one_sequence)


@pytest.mark.parametrize("filler", ["element", "symbol", "input_symbol"])
@pytest.mark.parametrize("width", [2, 4])
def test_repeated_elements(filler, width):
    task = GroupTask("S4", repeat_elements=width, filler=filler)
    symbol = 24

    def one_sequence(x):
        blocks = x[: math.ceil(len(x) / width)]
        inputs, targets = [], [0] * (width - 1)
        for element, product in zip(blocks, products_of(task, blocks), strict=True):
            inputs += [element] + (width - 1) * [element if filler == "element" else symbol]
            targets += [product] + (width - 1) * [symbol if filler == "symbol" else product]
        return inputs, targets

    check_word_problem(task, one_sequence)


@pytest.mark.parametrize(
    ("group", "limit", "letters"), [("S5", 2, 11), ("S5", 3, 31), ("S5", 4, 76), ("A5", 3, 21)]
)
def test_limited_letters(group, limit, letters):
    task = GroupTask(group, max_displaced=limit)
    perms = permutations(5, even_only=group == "A5")
    moved = [sum(a != b for a, b in zip(p, perms[0], strict=True)) for p in perms]
    want = [i for i, count in enumerate(moved) if count <= limit]
    assert task.letters().tolist() == want
    assert len(want) == letters
    batch = batch_of(task, jax.random.key(0), 64, 32)
    assert set(np.unique(batch.inputs[:, 1:])) == set(want)
    assert task.vocab_size == GroupTask(group).vocab_size


def test_token_ids():
    task = GroupTask("S5")
    assert (task.pad_id, task.bos_id, task.vocab_size) == (120, 121, 127)
    filled = GroupTask("S5", repeat_elements=2, filler="symbol")
    assert (filled.pad_id, filled.bos_id, filled.vocab_size) == (121, 122, 128)


def test_batch_begins_with_bos_and_counts_every_position():
    task = GroupTask("S4")
    batch = batch_of(task, jax.random.key(3), 7, 20)
    for array, dtype in zip(batch[:3], (jnp.int32, jnp.int32, bool), strict=True):
        assert array.shape == (7, 21)
        assert array.dtype == dtype
    inputs, targets = batch.inputs, batch.targets
    assert (inputs[:, 0] == task.bos_id).all()
    assert (targets[:, 0] == task.bos_id).all()
    assert batch.mask.all()
    for row in range(7):
        assert targets[row, 1:].tolist() == products_of(task, inputs[row, 1:].tolist())


def test_elements_are_drawn_uniformly():
    inputs = batch_of(GroupTask("S3"), jax.random.key(0), 600, 100).inputs[:, 1:]
    counts = np.bincount(inputs.ravel(), minlength=6)
    # 10,000 expected, standard deviation 91; five of those.
    assert np.abs(counts - 10_000).max() < 460


def test_keys_of_batches_never_coincide():
    data_key = jax.random.key(0)
    draw = jax.vmap(batch_key, in_axes=(None, None, 0))
    indices = jnp.arange(200)
    keys = [np.asarray(jax.random.key_data(draw(data_key, split, indices))) for split in SPLITS]
    assert len(np.unique(np.concatenate(keys), axis=0)) == 3 * 200
    # The largest index of one split must not wrap around into another.
    last = MAX_BATCH_INDEX * len(SPLITS) + len(SPLITS) - 1
    assert last < 2**32 <= last + len(SPLITS)


def test_batch_depends_on_its_key_alone():
    task = GroupTask("S3")
    key = batch_key(jax.random.key(0), "train", 5)
    first, second = batch_of(task, key, 4, 8), batch_of(task, key, 4, 8)
    np.testing.assert_array_equal(first.inputs, second.inputs)
    other = batch_of(task, batch_key(jax.random.key(0), "train", 6), 4, 8)
    assert (first.inputs != other.inputs).any()


def test_scores_of_a_case_made_by_hand():
    correct = np.array([[1, 1, 1, 1], [1, 1, 0, 1], [0, 1, 1, 1], [1, 0, 0, 1]], dtype=bool)
    scores = GroupTask("S3").score(correct, np.ones_like(correct))
    paper, strict = scores["paper"], scores["strict"]
    assert paper.token_accuracy == 12 / 16
    assert paper.sequence_accuracy == 1 / 4
    assert paper.cumulative == (3 / 4, 2 / 4, 1 / 4, 1 / 4)
    assert strict.token_accuracy == 9 / 12
    assert strict.sequence_accuracy == 2 / 4
    assert strict.cumulative == (1, 3 / 4, 2 / 4, 2 / 4)


def test_masked_positions_do_not_count():
    correct = np.array([[0, 1, 0], [0, 1, 1]], dtype=bool)
    mask = np.array([[0, 1, 0], [0, 1, 1]], dtype=bool)
    score = score_positions(correct, mask)
    assert (score.token_accuracy, score.sequence_accuracy) == (1, 1)
    assert score.cumulative == (1, 1, 1)


def test_scores_need_equal_shapes_and_a_counted_position():
    with pytest.raises(ValueError, match="shapes"):
        score_positions(np.ones((2, 3)), np.ones((2, 1)))
    with pytest.raises(ValueError, match="no position is counted"):
        score_positions(np.ones((2, 3)), np.zeros((2, 3)))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"train_length": 0}, "train_length=0 is too small"),
        ({"eval_lengths": ()}, "must ascend"),
        ({"eval_lengths": (8, 4)}, "must ascend"),
        ({"eval_lengths": (4, 4)}, "must ascend"),
        ({"eval_lengths": (0, 4)}, "eval_lengths=0 is too small"),
        ({"filler": "blank"}, "filler='blank' is not known"),
        ({"filler": "symbol"}, "repeat_elements must be at least 2"),
        ({"repeat_elements": 0}, "repeat_elements=0 is too small"),
        ({"merge_elements": 0}, "merge_elements=0 is too small"),
        ({"merge_elements": 2, "repeat_elements": 2}, "exclude each other"),
        ({"group": "Z5", "max_displaced": 2}, "it may be Sn or An"),
        ({"group": "S3_x_S3", "max_displaced": 2}, "it may be Sn or An"),
        ({"group": "S5", "max_displaced": 1}, "must be at least 2"),
        ({"group": "A5", "max_displaced": 2}, "must be at least 3"),
        ({"group": "S5", "max_displaced": 5}, "less than 5"),
    ],
)
def test_senseless_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        GroupTask(**fields)


def test_default_lengths_are_multiples_of_the_trained_one():
    assert GroupTask(train_length=5).test_lengths == (5, 10, 20, 40)
    assert GroupTask(train_length=5, eval_lengths=(3, 9)).test_lengths == (3, 9)
