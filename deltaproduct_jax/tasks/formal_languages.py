"""Formal languages: after a whole sequence, one answer; trained short, tested far longer.

Parity and arithmetic modulo 5, without and with brackets, as in Grazzi et al., "Unlocking
State-Tracking in Linear RNNs Through Negative Eigenvalues", https://arxiv.org/abs/2411.12537, whose
protocol the DeltaProduct paper, https://arxiv.org/abs/2502.10297, repeats. Lengths are theirs: they
count the answer, and in brackets one PAD after it. The answer itself is never an input: it is asked
for at the token before it. Scaled accuracy is (accuracy - chance) / (1 - chance), where chance is
that of answers drawn alike. Where brackets multiply, which makes zeros, 0 is the answer to .26 of
the sequences up to 40 tokens and to .30 of those from 40 to 256, so that always saying 0 scores .08
and .13 there; elsewhere all answers are alike.

Dimension key: ``B`` sequences, ``T`` positions, one less than the longest sequence has tokens.
"""

import dataclasses
from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.errors import ConfigError, require_ascending
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.tasks import expressions
from deltaproduct_jax.tasks.expressions import MODULUS, BracketTokens, FlatTokens
from deltaproduct_jax.tasks.registry import register_task
from deltaproduct_jax.tasks.task import Batch, Score, score_positions


@dataclasses.dataclass(frozen=True)
class Language:
    """What the task needs to know of a language.

    Attributes:
        draw: (key, lengths ``[B]``, T, multiplication) -> inputs ``[B, T]`` and answers ``[B]``.
        vocab_size: token ids.
        chance: accuracy of guessing among the possible answers.
        shortest: tokens of its shortest sequence, the answer included.
        lengths_step: lengths are ``shortest`` and multiples of this more.
        asked_before_end: the answer is asked for at so many tokens before the sequence's end.
    """

    draw: Callable[[jax.Array, jax.Array, int, bool], tuple[jax.Array, jax.Array]]
    vocab_size: int
    chance: float
    shortest: int
    lengths_step: int = 1
    asked_before_end: int = 2


def _parity(
    key: jax.Array, lengths_B: jax.Array, num_positions: int, multiplication: bool
) -> tuple[jax.Array, jax.Array]:
    """Symbols 1 and 2; the answer is 2 after an odd number of 2s, else 1; 0 is PAD."""
    is_two_BT = jax.random.bernoulli(key, jnp.float32(0.5), (lengths_B.size, num_positions))
    inside_BT = jnp.arange(num_positions, dtype=jnp.int32)[None, :] < lengths_B[:, None] - 1
    answers_B = jnp.sum(is_two_BT & inside_BT, axis=1, dtype=jnp.int32) % 2 + 1
    return jnp.where(inside_BT, is_two_BT.astype(jnp.int32) + 1, 0), answers_B


def _modular_arithmetic(
    key: jax.Array, lengths_B: jax.Array, num_positions: int, multiplication: bool
) -> tuple[jax.Array, jax.Array]:
    """``digit op digit .. =``; * binds tighter than + and -."""
    operands_B = (lengths_B - 1) // 2
    tokens_BE, values_B = expressions.draw_flat(key, operands_B, num_positions // 2)
    inputs_BT = _close(tokens_BE, 2 * operands_B - 1, num_positions, FlatTokens)
    return inputs_BT, values_B + FlatTokens.DIGITS


def _modular_arithmetic_brackets(
    key: jax.Array, lengths_B: jax.Array, num_positions: int, multiplication: bool
) -> tuple[jax.Array, jax.Array]:
    """An expression in brackets, then ``=``."""
    ends_B = lengths_B - 3  # without "=", the answer and the PAD that the length counts
    tokens_BE, values_B = expressions.draw_bracketed(
        key, ends_B, num_positions - 2, multiplication=multiplication
    )
    inputs_BT = _close(tokens_BE, ends_B, num_positions, BracketTokens)
    return inputs_BT, values_B + BracketTokens.DIGITS


def _close(
    tokens_BE: jax.Array,
    ends_B: jax.Array,
    num_positions: int,
    ids: type[FlatTokens] | type[BracketTokens],
) -> jax.Array:
    """The expressions with ``=`` after each, padded to ``[B, T]``."""
    room = num_positions - tokens_BE.shape[1]
    tokens_BT = jnp.pad(tokens_BE, ((0, 0), (0, room)), constant_values=ids.PAD)
    return jnp.where(
        jnp.arange(num_positions, dtype=jnp.int32)[None, :] == ends_B[:, None],
        ids.EQUALS,
        tokens_BT,
    )


LANGUAGES = {
    "parity": Language(_parity, vocab_size=3, chance=1 / 2, shortest=2),
    "modular_arithmetic": Language(
        _modular_arithmetic, FlatTokens.VOCAB_SIZE, 1 / MODULUS, shortest=3, lengths_step=2
    ),
    "modular_arithmetic_brackets": Language(
        _modular_arithmetic_brackets,
        BracketTokens.VOCAB_SIZE,
        1 / MODULUS,
        shortest=5,
        asked_before_end=3,
    ),
}


@dataclasses.dataclass(frozen=True)
class RangeScore(Score):
    """A score of the sequences of ``shortest`` to ``longest`` tokens."""

    scaled_accuracy: float
    shortest: int
    longest: int
    sequences: int


@dataclasses.dataclass(frozen=True)
class FormalLanguageTask:
    """One formal language; raises ConfigError where the fields make no sense.

    A batch "of length L" has sequences of up to L tokens, each length as often as any other: from
    ``min_train_length`` on where L is at most ``train_length``, else from ``min_eval_length`` on.
    """

    language: str = setting("parity", f"what is learnt: {', '.join(LANGUAGES)}", one_of=LANGUAGES)
    train_length: int = setting(40, "longest training sequence, the answer included")
    min_train_length: int = setting(
        3, "shortest training sequence, the answer included; brackets have 5 at least", least=2
    )
    eval_lengths: tuple[int, ...] = setting(
        (40, 256), "longest sequences of the evaluations; up to train_length: drawn as in training"
    )
    min_eval_length: int = setting(
        40, "shortest sequence of the evaluations at more than train_length", least=2
    )
    bracket_multiplication: bool = setting(
        False,
        "modular_arithmetic_brackets multiplies too, which makes 0 the answer to .3 of long ones; "
        "without brackets * is always there",
    )

    def __post_init__(self):
        check_fields(self)
        self.check_length("train_length", self.train_length)
        require_ascending("eval_lengths", self.eval_lengths)
        for length in self.eval_lengths:
            self.check_length("eval_lengths", length)
        if self.bracket_multiplication and self.language != "modular_arithmetic_brackets":
            raise ConfigError(
                f"bracket_multiplication=True does not fit language={self.language!r}; it needs "
                "modular_arithmetic_brackets"
            )

    @property
    def answers_every_token(self) -> bool:
        """The last tokens alone have answers."""
        return False

    @property
    def vocab_size(self) -> int:
        """Token ids of the language, PAD included."""
        return LANGUAGES[self.language].vocab_size

    @property
    def chance(self) -> float:
        """Accuracy of guessing."""
        return LANGUAGES[self.language].chance

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """Longest lengths of the evaluations, ascending."""
        return self.eval_lengths

    def lengths(self, length: int) -> range:
        """The lengths drawn for a batch of ``length``, each as often as any other.

        Those below the language's shortest sequence become that, as in the original code, which
        only differs where lengths are odd: its tests from 40 on begin at 39, ours at 41.
        """
        language = LANGUAGES[self.language]
        minimum = getattr(self, self._minimum_at(length))
        minimum += (language.shortest - minimum) % language.lengths_step
        return range(minimum, length + 1, language.lengths_step)

    def _minimum_at(self, length: int) -> str:
        return "min_train_length" if length <= self.train_length else "min_eval_length"

    def check_length(self, name: str, length: int) -> None:
        """Raises ConfigError, naming the field, if no sequence fits into a batch of ``length``."""
        minimum = self._minimum_at(length)
        shortest = max(self.lengths(length).start, LANGUAGES[self.language].shortest)
        if length < shortest:
            raise ConfigError(
                f"{name}={length!r} is too small; it must be at least {shortest}, the shortest "
                f"sequence of {self.language} with {minimum}={getattr(self, minimum)}"
            )

    def batch(self, key: jax.Array, batch_size: int, length: int) -> Batch:
        """Draws ``batch_size`` sequences of up to ``length`` tokens; one position of each counts.

        Args:
            key: the only source of chance.
            batch_size: B, static.
            length: longest length, static; ``T = length - 1``.
        """
        language, lengths = LANGUAGES[self.language], self.lengths(length)
        length_key, draw_key = jax.random.split(key)
        drawn_B = jax.random.randint(length_key, (batch_size,), 0, len(lengths), jnp.int32)
        lengths_B = jnp.maximum(lengths.start + drawn_B * lengths.step, language.shortest)
        inputs_BT, answers_B = language.draw(
            draw_key, lengths_B, length - 1, self.bracket_multiplication
        )
        asked_B1 = lengths_B[:, None] - language.asked_before_end
        mask_BT = jnp.arange(length - 1, dtype=jnp.int32)[None, :] == asked_B1
        return Batch(
            inputs=inputs_BT, targets=jnp.where(mask_BT, answers_B[:, None], 0), mask=mask_BT
        )

    def score(self, correct_BT: np.ndarray, mask_BT: np.ndarray) -> dict[str, RangeScore]:
        """Scores answers ``[B, T]``: "strict" over all lengths, and further ones over ranges.

        The ranges are (1, 2], (2, 4], .. times ``train_length``, as far as sequences fell into
        them; they exist in evaluations at more than ``train_length``.
        """
        correct_BT, mask_BT = np.asarray(correct_BT), np.asarray(mask_BT)
        language, drawn = LANGUAGES[self.language], self.lengths(mask_BT.shape[1] + 1)
        lengths_B = np.argmax(mask_BT, axis=1) + language.asked_before_end

        shortest, longest = max(drawn[0], language.shortest), drawn[-1]
        ranges = {"strict": (shortest, longest)}
        if longest > self.train_length:
            cut = self._ranges(shortest, longest)
            ranges |= {f"lengths_{first}_to_{last}": (first, last) for first, last in cut}
        scores = {}
        for name, (shortest, longest) in ranges.items():
            rows_B = (shortest <= lengths_B) & (lengths_B <= longest)
            if rows_B.any():
                score = score_positions(correct_BT[rows_B], mask_BT[rows_B])
                scores[name] = RangeScore(
                    **dataclasses.asdict(score),
                    scaled_accuracy=(score.token_accuracy - self.chance) / (1 - self.chance),
                    shortest=shortest,
                    longest=longest,
                    sequences=int(rows_B.sum()),
                )
        return scores

    def _ranges(self, shortest: int, longest: int) -> list[tuple[int, int]]:
        """The lengths cut after 2, 4, 8, .. times ``train_length``."""
        ranges, cut = [], 2 * self.train_length
        while shortest <= longest:
            if shortest <= cut:
                ranges.append((shortest, min(cut, longest)))
                shortest = cut + 1
            cut *= 2
        return ranges


register_task("formal_languages", FormalLanguageTask)
