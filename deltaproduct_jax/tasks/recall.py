"""Multi-query associative recall (MQAR): pairs of a key and a value, then each key once more.

A sequence of length T starts with N pairs ``key value``. In the rest every second token may be a
query: each key comes again once, at a place drawn without replacement with probability
proportional to i**(power - 1) for the i-th of the T / 2 - N places, so that most queries come soon.
The key's value is wanted at the query itself, and nothing else counts. Source: Arora et
al., "Zoology: Measuring and Improving Recall in Efficient Language Models",
https://arxiv.org/abs/2312.04927, and its code. Sequences are drawn on the fly; theirs are files.

Dimension key: ``B`` sequences, ``N`` pairs, ``T`` positions.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.errors import ConfigError, require_ascending
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.tasks.registry import register_task
from deltaproduct_jax.tasks.task import Batch, Score, score_positions

FILLERS = ("random", "zero")


@dataclasses.dataclass(frozen=True)
class RecallScore(Score):
    """A score of sequences with so many pairs."""

    num_pairs: int


@dataclasses.dataclass(frozen=True)
class RecallTask:
    """Multi-query associative recall; raises ConfigError where the fields make no sense."""

    reported = "token_accuracy"  # of a score, the number that is published: queries answered

    train_length: int = setting(64, "tokens T of a training sequence, an even number")
    num_pairs: int = setting(4, "pairs N of a key and a value in a training sequence", least=1)
    eval_lengths: tuple[int, ...] | None = setting(
        None, "tokens of the sequences in evaluations; none: train_length"
    )
    eval_pairs: tuple[int, ...] | None = setting(
        None, "pairs at each of eval_lengths; none: num_pairs", least=1
    )
    vocabulary: int = setting(
        8192, "token ids; the lower half but 0 are keys, the upper half are values", least=4
    )
    power: float = setting(0.01, "exponent of how far away queries are; 1: anywhere alike", above=0)
    filler: str = setting(
        "random",
        "tokens that are neither pairs nor queries: random (any token) or zero",
        one_of=FILLERS,
    )

    def __post_init__(self):
        check_fields(self)
        self._check_evaluations()
        most = max((self.num_pairs, *(self.eval_pairs or ())))
        if most > self.num_keys:
            raise ConfigError(
                f"vocabulary={self.vocabulary} has {self.num_keys} keys, fewer than the {most} "
                f"pairs of a sequence; it must be at least {2 * most + 2}"
            )
        self.check_length("train_length", self.train_length)
        for length in self.test_lengths:
            self.check_length("eval_lengths", length)

    def _check_evaluations(self) -> None:
        if self.eval_lengths is not None:
            require_ascending("eval_lengths", self.eval_lengths)
        if self.eval_pairs is None:
            return
        if self.eval_lengths is None or len(self.eval_pairs) != len(self.eval_lengths):
            raise ConfigError(
                f"eval_pairs={self.eval_pairs!r} must have one number for each of "
                f"eval_lengths={self.eval_lengths!r}"
            )
        if self.pairs_at(self.train_length) != self.num_pairs:
            raise ConfigError(
                f"eval_pairs={self.eval_pairs!r} has {self.pairs_at(self.train_length)} pairs at "
                f"train_length={self.train_length}; they must be num_pairs={self.num_pairs}"
            )

    @property
    def answers_every_token(self) -> bool:
        """Queries alone have answers."""
        return False

    @property
    def vocab_size(self) -> int:
        """Token ids, as many as ``vocabulary``."""
        return self.vocabulary

    @property
    def num_keys(self) -> int:
        """Keys are 1 to this."""
        return self.vocabulary // 2 - 1

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """Lengths at which a run is evaluated, ascending."""
        return (self.train_length,) if self.eval_lengths is None else self.eval_lengths

    def pairs_at(self, length: int) -> int:
        """Pairs in a sequence of ``length``: those of its evaluation if there is one."""
        if self.eval_pairs is None or length not in self.eval_lengths:
            return self.num_pairs
        return self.eval_pairs[self.eval_lengths.index(length)]

    def check_length(self, name: str, length: int) -> None:
        """Raises ConfigError, naming the field, unless pairs and queries fit into ``length``."""
        pairs = self.pairs_at(length)
        if length % 2 or length < 4 * pairs:
            raise ConfigError(
                f"{name}={length!r} does not fit {pairs} pairs; it must be even and at least "
                f"{4 * pairs}, 4 times the pairs"
            )

    def batch(self, key: jax.Array, batch_size: int, length: int) -> Batch:
        """Draws ``batch_size`` sequences; the positions of the queries count.

        Args:
            key: the only source of chance.
            batch_size: B, static.
            length: T, static.
        """
        num_pairs = self.pairs_at(length)
        num_places = length // 2 - num_pairs
        key_key, value_key, place_key, filler_key = jax.random.split(key, 4)
        keys_BN = 1 + _distinct(
            key_key, jnp.zeros(self.num_keys, jnp.float32), batch_size, num_pairs
        )
        num_values = self.vocabulary - self.vocabulary // 2
        values_BN = self.vocabulary // 2 + _distinct(
            value_key, jnp.zeros(num_values, jnp.float32), batch_size, num_pairs
        )
        logits = (self.power - 1) * jnp.log(jnp.arange(1, num_places + 1, dtype=jnp.float32))
        places_BN = 2 * num_pairs + 2 * _distinct(place_key, logits, batch_size, num_pairs)

        pairs = jnp.stack([keys_BN, values_BN], axis=-1).reshape(batch_size, 2 * num_pairs)
        shape = (batch_size, length)
        if self.filler == "random":
            inputs_BT = jax.random.randint(filler_key, shape, 0, self.vocabulary, jnp.int32)
        else:
            inputs_BT = jnp.zeros(shape, dtype=jnp.int32)
        rows_B1 = jnp.arange(batch_size, dtype=jnp.int32)[:, None]
        return Batch(
            inputs=inputs_BT.at[:, : 2 * num_pairs].set(pairs).at[rows_B1, places_BN].set(keys_BN),
            targets=jnp.zeros(shape, dtype=jnp.int32).at[rows_B1, places_BN].set(values_BN),
            mask=jnp.zeros(shape, dtype=bool).at[rows_B1, places_BN].set(True),
        )

    def score(self, correct_BT: np.ndarray, mask_BT: np.ndarray) -> dict[str, RecallScore]:
        """Scores answers ``[B, T]``: "strict" is the only protocol, queries being all that counts.

        Its token accuracy is the published number, the fraction of queries answered.
        """
        score = score_positions(correct_BT, mask_BT)
        num_pairs = int(np.asarray(mask_BT)[0].sum())
        return {"strict": RecallScore(**dataclasses.asdict(score), num_pairs=num_pairs)}


def _distinct(key: jax.Array, logits: jax.Array, batch_size: int, count: int) -> jax.Array:
    """``[B, count]`` indices drawn one after another without replacement, weights exp(logits).

    The largest of Gumbel-perturbed logits, in order, are distributed so (Kool et al., "Stochastic
    Beams and Where to Find Them", https://arxiv.org/abs/1903.06059).
    """
    gumbels = jax.random.gumbel(key, (batch_size, logits.size), jnp.float32)
    return jax.lax.top_k(gumbels + logits[None, :], count)[1]


register_task("recall", RecallTask)
