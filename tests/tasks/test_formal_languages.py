"""Formal languages, against generators and evaluators in plain Python that share no code."""

import collections
import random

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.tasks import expressions
from deltaproduct_jax.tasks.formal_languages import FormalLanguageTask
from deltaproduct_jax.tasks.task import Batch, batch_key

LANGUAGES = ("parity", "modular_arithmetic", "modular_arithmetic_brackets")
# Token ids as characters: "_" is PAD, "a" and "b" are the two symbols of parity.
ALPHABETS = {
    "parity": "_ab",
    "modular_arithmetic": "_+-*=01234",
    "modular_arithmetic_brackets": "01234+-*()=_",
}
CHANCE = {"parity": 0.5, "modular_arithmetic": 0.2, "modular_arithmetic_brackets": 0.2}


def text(language: str, tokens) -> str:
    return "".join(ALPHABETS[language][token] for token in tokens)


def answer(language: str, question: str) -> str:
    """What Python thinks: its own parser and its own precedence."""
    if language == "parity":
        return "ab"[question.count("b") % 2]
    assert question[-1] == "="
    return str(eval(question[:-1]) % 5)


_drawn: dict[tuple, Batch] = {}


def drawn(language: str, batch_size: int, length: int, seed: int = 0, **fields) -> Batch:
    """A batch, drawn once a test session."""
    call = (language, batch_size, length, seed, *fields.items())
    if call not in _drawn:
        task = FormalLanguageTask(language, **fields)
        batch = jax.jit(task.batch, static_argnums=(1, 2))(jax.random.key(seed), batch_size, length)
        _drawn[call] = jax.tree.map(np.asarray, batch)
    return _drawn[call]


CASES = [
    *((language, length, {}) for language in LANGUAGES for length in (40, 256)),
    ("modular_arithmetic_brackets", 100, {"bracket_multiplication": True}),
]


@pytest.mark.parametrize(("language", "length", "fields"), CASES)
def test_answers_are_what_python_computes(language, length, fields):
    batch = drawn(language, 300, length, **fields)
    assert batch.inputs.shape == batch.targets.shape == batch.mask.shape == (300, length - 1)
    assert [array.dtype for array in batch[:3]] == [jnp.int32, jnp.int32, bool]
    assert (batch.mask.sum(axis=1) == 1).all()
    for tokens, targets, mask in zip(*batch[:3], strict=True):
        asked = int(np.argmax(mask))
        question = text(language, tokens[: asked + 1])
        assert "_" not in question
        assert text(language, [targets[asked]]) == answer(language, question), question


@pytest.mark.parametrize(("language", "length", "fields"), CASES)
def test_inputs_hold_nothing_from_the_answer_on(language, length, fields):
    batch = drawn(language, 300, length, **fields)
    pad = ALPHABETS[language].index("_")
    after = np.cumsum(batch.mask, axis=1) - batch.mask > 0
    assert (batch.inputs[after] == pad).all()
    assert (batch.inputs[~after] != pad).all()


# Tokens of a sequence less the position of its question: the question, the answer, and in brackets
# one PAD that the published lengths count.
BEYOND = {"parity": 2, "modular_arithmetic": 2, "modular_arithmetic_brackets": 3}


@pytest.mark.parametrize("language", LANGUAGES)
@pytest.mark.parametrize(("length", "minimum"), [(40, 3), (30, 3), (64, 40)])
def test_lengths_are_uniform(language, length, minimum):
    lengths = np.argmax(drawn(language, 8000, length).mask, axis=1) + BEYOND[language]
    rng = range(minimum, length + 1)
    if language == "modular_arithmetic":
        wanted = collections.Counter(n for n in rng if n % 2)
    elif language == "modular_arithmetic_brackets":
        wanted = collections.Counter(max(n, 5) for n in rng)  # as in the original generator
    else:
        wanted = collections.Counter(rng)
    expected = {n: 8000 * share / wanted.total() for n, share in wanted.items()}
    counts = collections.Counter(lengths.tolist())
    assert counts.keys() <= expected.keys()
    assert chi_square(counts, expected) < chi_square_limit(len(expected) - 1)


def chi_square(counts, expected) -> float:
    return sum((counts[n] - mean) ** 2 / mean for n, mean in expected.items())


def chi_square_limit(freedom: int) -> float:
    """Mean plus five standard deviations and the square of five, for the tail's skewness."""
    return freedom + 5 * (2 * freedom) ** 0.5 + 25


def test_parity_draws_both_symbols_alike():
    inputs = drawn("parity", 8000, 40).inputs
    symbols = inputs[inputs > 0]
    assert abs((symbols == 2).mean() - 0.5) < 5 * 0.5 / symbols.size**0.5


def test_flat_expressions_alternate_and_draw_tokens_alike():
    batch = drawn("modular_arithmetic", 8000, 40)
    digits, operators = batch.inputs[:, 0::2], batch.inputs[:, 1::2]
    assert set(np.unique(digits)) == {0, 5, 6, 7, 8, 9}
    assert set(np.unique(operators)) == {0, 1, 2, 3, 4}
    for tokens, kinds in ((digits, range(5, 10)), (operators, range(1, 4))):
        counts = collections.Counter(tokens[np.isin(tokens, kinds)].tolist())
        expected = dict.fromkeys(kinds, counts.total() / len(kinds))
        assert chi_square(counts, expected) < chi_square_limit(len(kinds) - 1)


@pytest.mark.parametrize(
    ("expression", "value"),
    [("2+3*4", 4), ("1-2-3", 1), ("4*4-3*3*3", 4), ("3", 3), ("0-1", 4), ("4-3*2+1", 4)],
)
def test_known_values_without_brackets(expression, value):
    digits = jnp.array([[int(c) for c in expression[0::2]]])
    operators = jnp.array([["+-*".index(c) for c in expression[1::2]] + [0]])
    assert int(expressions.flat_values(digits, operators)[0, -1]) == value


def recursive(length: int, operators: str, rng: random.Random) -> str:
    """The generator of the paper, as it is written there: recursively."""
    if length < 5:
        d = str(rng.randrange(5))
        return {1: d, 2: f"-{d}", 3: f"({d})", 4: f"(-{d})"}[length]
    left = rng.randint(1, length - 4)
    a, b = recursive(left, operators, rng), recursive(length - 3 - left, operators, rng)
    return f"({a}{rng.choice(operators)}{b})"


def probability(expression: str, operators: str) -> float:
    """How likely the recursive generator is to draw an expression; 0 if it cannot."""
    if len(expression) < 5:
        return 5.0 ** -sum(c.isdigit() for c in expression)
    total = 0.0
    for left in range(1, len(expression) - 3):
        middle = expression[1 + left]
        if middle in operators and expression[0] == "(" and expression[-1] == ")":
            a, b = expression[1 : 1 + left], expression[2 + left : -1]
            if is_expression(a) and is_expression(b):
                chance = 1 / (len(expression) - 4) / len(operators)
                total += chance * probability(a, operators) * probability(b, operators)
    return total


def is_expression(expression: str) -> bool:
    shape = "".join("d" if c.isdigit() else c for c in expression)
    if len(shape) < 5:
        return shape in ("d", "-d", "(d)", "(-d)")
    return any(
        shape[0] == "(" and shape[-1] == ")" and shape[1 + n] in "+-*"
        and is_expression(expression[1 : 1 + n]) and is_expression(expression[2 + n : -1])
        for n in range(1, len(shape) - 3)
    )  # fmt: skip


draw_bracketed = jax.jit(
    expressions.draw_bracketed, static_argnums=2, static_argnames="multiplication"
)


def bracketed(length: int, *, multiplication: bool) -> list[str]:
    """Many expressions of one length, few long ones; in an array that has room for longer ones."""
    room, count = (12, 20_000) if length <= 12 else (200, 1000)
    lengths = jnp.full(count, length)
    tokens, _ = draw_bracketed(jax.random.key(0), lengths, room, multiplication=multiplication)
    found = [text("modular_arithmetic_brackets", row) for row in np.asarray(tokens)]
    assert all(set(one[length:]) <= {"_"} for one in found)
    return [one[:length] for one in found]


@pytest.mark.parametrize("multiplication", [False, True])
@pytest.mark.parametrize("length", [1, 2, 3, 4, 5, 6])
def test_short_bracketed_expressions_have_exactly_the_recursive_probabilities(
    length, multiplication
):
    operators = "+-*" if multiplication else "+-"
    counts = collections.Counter(bracketed(length, multiplication=multiplication))
    shares = {expression: probability(expression, operators) for expression in counts}
    assert sum(shares.values()) == pytest.approx(1)  # every expression there is was drawn
    expected = {expression: 20_000 * share for expression, share in shares.items()}
    assert chi_square(counts, expected) < chi_square_limit(len(expected) - 1)


def skeleton(expression: str) -> str:
    """The tree alone: what brackets what, and the operators."""
    return "".join("d" if c.isdigit() else c for c in expression)


@pytest.mark.parametrize("length", [9, 12])
def test_trees_are_distributed_as_by_the_recursive_generator(length):
    rng = random.Random(0)
    ours = collections.Counter(map(skeleton, bracketed(length, multiplication=False)))
    theirs = collections.Counter(skeleton(recursive(length, "+-", rng)) for _ in range(20_000))
    # Trees seen at least ten times; the others together are one more class.
    kinds = [tree for tree in ours | theirs if ours[tree] + theirs[tree] >= 10]
    pairs = [(ours[tree], theirs[tree]) for tree in kinds]
    pairs.append(tuple(20_000 - sum(column) for column in zip(*pairs, strict=True)))
    statistic = sum((a - b) ** 2 / (a + b) for a, b in pairs if a + b)
    assert len(kinds) > 10
    assert statistic < chi_square_limit(len(kinds))


@pytest.mark.parametrize("length", [37, 200])
def test_long_trees_are_as_deep_as_the_recursive_generators(length):
    def depths(found):
        opened = [np.cumsum([(c == "(") - (c == ")") for c in one]).max() for one in found]
        return np.mean(opened), np.std(opened) / len(opened) ** 0.5

    rng = random.Random(1)
    ours = bracketed(length, multiplication=True)
    assert not any("_" in one for one in ours)
    mean, error = depths(ours)
    other_mean, other_error = depths([recursive(length, "+-*", rng) for _ in range(1000)])
    assert abs(mean - other_mean) < 5 * (error**2 + other_error**2) ** 0.5


def test_brackets_multiply_only_when_asked():
    times = ALPHABETS["modular_arithmetic_brackets"].index("*")
    assert not (drawn("modular_arithmetic_brackets", 300, 256).inputs == times).any()
    fields = {"bracket_multiplication": True}
    assert (drawn("modular_arithmetic_brackets", 300, 100, **fields).inputs == times).any()


def test_where_brackets_multiply_always_saying_zero_is_better_than_chance():
    batch = drawn("modular_arithmetic_brackets", 2000, 256, bracket_multiplication=True)
    zeros = int((batch.targets[batch.mask] == 0).sum())
    assert abs(zeros / 2000 - 0.3) < 0.04


@pytest.mark.parametrize("language", LANGUAGES)
def test_token_ids_and_chance(language):
    task = FormalLanguageTask(language)
    assert task.vocab_size == len(ALPHABETS[language])
    assert task.chance == CHANCE[language]
    answers = {int(x) for x in drawn(language, 300, 256).targets[drawn(language, 300, 256).mask]}
    assert set(text(language, answers)) == set("ab" if language == "parity" else "01234")


@pytest.mark.parametrize("language", LANGUAGES)
def test_no_sequence_is_in_two_splits(language):
    data_key = jax.random.key(0)
    task = FormalLanguageTask(language, min_train_length=30)
    draw = jax.jit(task.batch, static_argnums=(1, 2))
    seen = set()
    for split in ("train", "valid", "test"):
        inputs = np.asarray(draw(batch_key(data_key, split, 0), 200, 40).inputs)
        rows = {row.tobytes() for row in inputs}
        assert len(rows) > 190
        assert not rows & seen
        seen |= rows


def test_batch_depends_on_its_key_alone():
    first, same, other = (drawn("parity", 8, 40, seed=seed, **extra) for seed, extra in (
        (3, {}), (3, {"eval_lengths": (40, 99)}), (4, {})
    ))  # fmt: skip
    np.testing.assert_array_equal(first.inputs, same.inputs)
    assert (first.inputs != other.inputs).any()


def test_scores_of_a_case_made_by_hand():
    # Five sequences of 4, 5, 8, 9 and 16 tokens; the answers to those of 5 and 9 are wrong.
    task = FormalLanguageTask(train_length=4, min_eval_length=4, eval_lengths=(4, 16))
    mask = np.zeros((5, 15), dtype=bool)
    mask[range(5), [2, 3, 6, 7, 14]] = True
    correct = mask.copy()
    correct[1, 3] = correct[3, 7] = False
    scores = task.score(correct, mask)
    assert list(scores) == ["strict", "lengths_4_to_8", "lengths_9_to_16"]
    whole, short, long = scores.values()
    assert (whole.shortest, whole.longest, whole.sequences) == (4, 16, 5)
    assert whole.token_accuracy == whole.sequence_accuracy == 3 / 5
    assert whole.scaled_accuracy == pytest.approx((3 / 5 - 1 / 2) / (1 / 2))
    assert (short.sequences, short.token_accuracy) == (3, 2 / 3)
    assert short.scaled_accuracy == pytest.approx(1 / 3)
    assert (long.sequences, long.scaled_accuracy) == (2, 0)
    # Only short sequences were drawn: nothing is said of the long ones.
    assert list(task.score(correct[:3], mask[:3])) == ["strict", "lengths_4_to_8"]
    # At the length trained there is nothing to cut.
    assert list(task.score(correct[:1, :3], mask[:1, :3])) == ["strict"]


def test_guessing_scores_zero_and_the_worst_is_below():
    task = FormalLanguageTask("modular_arithmetic")
    mask = np.zeros((10, 39), dtype=bool)
    mask[:, 3] = True
    correct = mask & (np.arange(10) < 2)[:, None]
    assert task.score(correct, mask)["strict"].scaled_accuracy == pytest.approx(0)
    assert task.score(mask & False, mask)["strict"].scaled_accuracy == pytest.approx(-0.25)
    assert task.score(mask, mask)["strict"].scaled_accuracy == 1


def test_scored_lengths_are_those_drawn():
    for language in LANGUAGES:
        task = FormalLanguageTask(language)
        batch = drawn(language, 300, 256)
        scores = task.score(np.ones_like(batch.mask), batch.mask)
        lengths = np.argmax(batch.mask, axis=1) + BEYOND[language]
        for score in scores.values():
            inside = (score.shortest <= lengths) & (lengths <= score.longest)
            assert score.sequences == inside.sum() > 0
        whole, *ranges = scores.values()
        longest = 255 if language == "modular_arithmetic" else 256
        assert (whole.shortest, whole.longest) == (296 - longest, longest)
        assert (ranges[0].shortest, ranges[-1].longest) == (whole.shortest, whole.longest)
        assert whole.sequences == sum(score.sequences for score in ranges) == 300


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"language": "dyck"}, r"language='dyck' is not known; it may be one of \['parity', 'mod"),
        ({"train_length": 2}, "train_length=2 is too small; it must be at least 3, the shortest"),
        ({"train_length": 0}, "train_length=0 is too small; it must be at least 3"),
        ({"min_train_length": 1}, "min_train_length=1 is too small; it must be at least 2"),
        (
            {"min_train_length": 41},
            "train_length=40 is too small; it must be at least 41, .* with ",
        ),
        ({"min_eval_length": 1}, "min_eval_length=1 is too small"),
        ({"min_eval_length": 300}, "eval_lengths=256 is too small; it must be at least 300"),
        ({"eval_lengths": ()}, r"eval_lengths=\(\) must ascend"),
        ({"eval_lengths": (50, 45)}, r"eval_lengths=\(50, 45\) must ascend"),
        ({"eval_lengths": (2, 45)}, "eval_lengths=2 is too small; it must be at least 3"),
        ({"bracket_multiplication": True}, "does not fit language='parity'; it needs modular_ar"),
        (
            {"language": "modular_arithmetic_brackets", "train_length": 4},
            "train_length=4 is too small; it must be at least 5, the shortest sequence of modular_",
        ),
        (
            {"language": "modular_arithmetic", "min_eval_length": 256},
            "eval_lengths=256 is too small; it must be at least 257",
        ),
    ],
)
def test_senseless_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        FormalLanguageTask(**fields)
