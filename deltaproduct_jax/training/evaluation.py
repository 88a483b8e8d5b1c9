"""Evaluation of a model on a split of its task, and the results of a finished run."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from deltaproduct_jax.tasks.task import Score, batch_key
from deltaproduct_jax.training.config import RunConfig, plain
from deltaproduct_jax.training.step import Params


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """Mean loss, and the scores by protocol, of one split at one length."""

    loss: float
    scores: dict[str, Score]

    @property
    def selection(self) -> tuple[float, ...]:
        """What ranks checkpoints: strict sequence accuracy, then token accuracy."""
        strict = self.scores["strict"]
        return strict.sequence_accuracy, strict.token_accuracy

    def to_row(self) -> dict[str, float]:
        """As the columns of a validation in metrics.jsonl."""
        sequence_accuracy, token_accuracy = self.selection
        return {
            "valid_loss": self.loss,
            "valid_token_accuracy": token_accuracy,
            "valid_sequence_accuracy": sequence_accuracy,
        }

    def to_dict(self, length: int) -> dict[str, Any]:
        """As an entry of results.json."""
        scores = {name: dataclasses.asdict(score) for name, score in self.scores.items()}
        return plain({"length": length, "loss": self.loss, **scores})


def selection_of(row: dict[str, Any]) -> tuple[float, ...] | None:
    """The selection of a row of metrics.jsonl, None if that step was not evaluated."""
    if "valid_sequence_accuracy" not in row:
        return None
    return row["valid_sequence_accuracy"], row["valid_token_accuracy"]


EvalStep = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def evaluate(
    config: RunConfig,
    eval_step: EvalStep,
    params: Params,
    data_key: jax.Array,
    split: str,
    length: int,
) -> Evaluation:
    """Scores ``eval_sequences`` fresh sequences of ``length``; the same ones at every call."""
    outputs = [
        jax.device_get(eval_step(length, params, batch_key(data_key, split, index)))
        for index in batches_of(config, length)
    ]
    return scored(config, outputs)


def batches_of(config: RunConfig, length: int) -> range:
    """Numbers of the batches of an evaluation at ``length``, within their split."""
    batches = config.train.eval_sequences // config.train.eval_batch_size
    # Batches of the lengths are numbered on, so that no two lengths share a key.
    lengths = sorted({*config.task.test_lengths, config.select_length})
    first = lengths.index(length) * batches
    return range(first, first + batches)


def scored(
    config: RunConfig, outputs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> Evaluation:
    """The evaluation of what an evaluation step returned for each batch."""
    losses, corrects_BT, masks_BT = zip(*outputs, strict=True)
    mask_BT = np.concatenate(masks_BT)
    return Evaluation(
        loss=float(np.sum(losses, dtype=np.float64) / mask_BT.sum()),
        scores=config.task.score(np.concatenate(corrects_BT), mask_BT),
    )
