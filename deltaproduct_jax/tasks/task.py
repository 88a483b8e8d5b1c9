"""What a training loop asks of a task: batches drawn from a key, and scores of its answers.

Dimension key: ``B`` sequences, ``T`` positions.
"""

import dataclasses
from typing import NamedTuple, Protocol

import jax
import numpy as np

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.settings import make_key, shown

SPLITS = ("train", "valid", "test")
MAX_BATCH_INDEX = 2**32 // len(SPLITS) - 1


class Batch(NamedTuple):
    """Sequences, what is wanted at each position, and which positions count."""

    inputs: jax.Array  # [B, T] int32
    targets: jax.Array  # [B, T] int32
    mask: jax.Array  # [B, T] bool
    segment_ids: jax.Array | None = None  # [B, T] int32; the model starts anew where it changes


@dataclasses.dataclass(frozen=True)
class Metric:
    """A column of evaluations that ranks checkpoints, and which way it is better."""

    name: str
    larger_is_better: bool = True

    def rank(self, value: float) -> float:
        """A number that is larger for what is better."""
        return value if self.larger_is_better else -value


# What selects a checkpoint where a task says nothing else, the first before the second.
ACCURACIES = (Metric("valid_sequence_accuracy"), Metric("valid_token_accuracy"))


@dataclasses.dataclass(frozen=True)
class Score:
    """How often the answers were right, under one protocol of counting.

    ``cumulative[t]`` is the fraction of sequences that are right at every counted position up to
    the t-th; its last entry is the sequence accuracy.
    """

    token_accuracy: float
    sequence_accuracy: float
    cumulative: tuple[float, ...]


class Task(Protocol):
    """A frozen dataclass that checks itself, each field with ``metadata={"help": ...}``.

    Its batches are drawn from a key. One that has none and a method ``stream`` instead is read from
    what has a state, as ``training/text.py`` reads text.
    """

    train_length: int

    @property
    def vocab_size(self) -> int:
        """Token ids, special ones included; inputs and targets share them."""

    @property
    def answers_every_token(self) -> bool:
        """Whether an answer is wanted at every token, so that a prefix is a sequence of its own."""

    @property
    def test_lengths(self) -> tuple[int, ...]:
        """Lengths at which a run is evaluated, ascending."""

    def check_length(self, name: str, length: int) -> None:
        """Raises ConfigError, naming the field, if there is no batch of ``length``."""

    def batch(self, key: jax.Array, batch_size: int, length: int) -> Batch:
        """Draws sequences; a pure function of the key that can be jitted (sizes static)."""

    def score(self, correct_BT: np.ndarray, mask_BT: np.ndarray) -> dict[str, Score]:
        """Protocol name -> score; one is called "strict", the one that selects checkpoints."""


def require_promised(task: Task, batch_size: int) -> None:
    """Draws a batch of a task from outside and scores it.

    A program would broadcast rows that are too few without a word, and make NaN of ids that are no
    tokens.

    Raises:
        ConfigError: the batch or its scores are not as :class:`Task` has them.
    """
    place = f"{type(task).__name__}.batch"
    batch = jax.jit(lambda key: task.batch(key, batch_size, task.train_length))(make_key(0))
    if not isinstance(batch, Batch):
        raise ConfigError(f"{place} must return a Batch, got a {type(batch).__name__}")
    shape = np.shape(batch.inputs)
    if len(shape) != 2 or shape[0] != batch_size:
        raise ConfigError(
            f"{place} must return inputs [B, T] with B={batch_size}, got shape {shape}"
        )
    arrays = {name: np.asarray(x) for name, x in batch._asdict().items() if x is not None}
    for name, array in arrays.items():
        kind = "bool" if name == "mask" else "int"
        if array.shape != shape or not array.dtype.name.startswith(kind):
            raise ConfigError(
                f"{place} must return {name} of dtype {kind} and the shape of inputs, {shape}, got "
                f"{array.dtype} of shape {array.shape}"
            )
    if not batch.mask.any():
        raise ConfigError(f"{place} must return a mask that is true somewhere")
    for name, ids in (("inputs", arrays["inputs"]), ("targets", arrays["targets"][arrays["mask"]])):
        if ids.min() < 0 or ids.max() >= task.vocab_size:
            raise ConfigError(
                f"{place} must return {name} from 0 to below vocab_size={task.vocab_size}, got "
                f"some from {ids.min()} to {ids.max()}"
            )
    scores = task.score(np.ones(shape, bool), arrays["mask"])
    found = scores.values() if isinstance(scores, dict) and "strict" in scores else [None]
    if not all(isinstance(score, Score) for score in found):
        raise ConfigError(
            f"{type(task).__name__}.score must return a dict of Score by name, one of them called "
            f"'strict', got {shown(scores)}"
        )


def batch_key(data_key: jax.Array, split: str, index: int | jax.Array) -> jax.Array:
    """The key of one batch of one split.

    Split and index become one number, which is folded in once. ``fold_in`` enciphers that number
    under ``data_key`` with Threefry, a bijection, so that no two batches, of one split or of two,
    can ever get the same key (index up to ``MAX_BATCH_INDEX``).
    """
    return jax.random.fold_in(data_key, index * len(SPLITS) + SPLITS.index(split))


def score_positions(correct_BT: np.ndarray, mask_BT: np.ndarray) -> Score:
    """Scores ``[B, T]`` right answers over the positions where ``mask_BT`` is true."""
    correct_BT = np.asarray(correct_BT, dtype=bool)
    mask_BT = np.asarray(mask_BT, dtype=bool)
    if correct_BT.shape != mask_BT.shape or correct_BT.ndim != 2:
        raise ValueError(f"shapes [B, T] must agree: {correct_BT.shape=}, {mask_BT.shape=}")
    if not mask_BT.any():
        raise ValueError("no position is counted: the mask is false everywhere")
    so_far_BT = np.logical_and.accumulate(correct_BT | ~mask_BT, axis=1)
    return Score(
        token_accuracy=float(correct_BT[mask_BT].mean()),
        sequence_accuracy=float(so_far_BT[:, -1].mean()),
        cumulative=tuple(so_far_BT.mean(axis=0).tolist()),
    )
