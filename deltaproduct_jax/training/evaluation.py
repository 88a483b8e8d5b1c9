"""Evaluation of a model on a split of its task, and the results of a finished run."""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import numpy as np

from deltaproduct_jax.tasks.task import Metric
from deltaproduct_jax.training.config import plain
from deltaproduct_jax.training.source import Source
from deltaproduct_jax.training.step import Params


@dataclasses.dataclass(frozen=True)
class Evaluation:
    """What one split gave at one length.

    Attributes:
        loss: mean over the counted positions, in nats.
        numbers: beside it, by name: columns of metrics.jsonl, where "valid_" stands before each.
        scores: what results.json has beside length and loss.
    """

    loss: float
    numbers: dict[str, float]
    scores: dict[str, Any]

    def to_row(self) -> dict[str, float]:
        """As the columns of a validation in metrics.jsonl, those that are finite."""
        numbers = {"loss": self.loss, **self.numbers}
        return {f"valid_{name}": x for name, x in numbers.items() if math.isfinite(x)}

    def to_dict(self, length: int) -> dict[str, Any]:
        """As an entry of results.json; FloatingPointError where the loss is not finite."""
        if not math.isfinite(self.loss):
            raise FloatingPointError(
                f"the loss of the best checkpoint on the test split is {self.loss}, at length "
                f"{length}; a lower learning_rate, a warm-up or clip_norm may help"
            )
        return plain({"length": length, "loss": self.loss, **self.scores})


def selection_of(row: dict[str, Any], selected_by: Sequence[Metric]) -> tuple[float, ...] | None:
    """What ranks a row of metrics.jsonl, larger for better; None if it has no such number."""
    if any(metric.name not in row for metric in selected_by):
        return None
    return tuple(metric.rank(row[metric.name]) for metric in selected_by)


EvalStep = Callable[..., tuple[jax.Array, jax.Array, jax.Array]]


def evaluate(
    eval_step: EvalStep,
    params: Params,
    source: Source,
    split: str,
    length: int,
) -> Evaluation:
    """Scores ``eval_sequences`` held-out sequences of ``length``; the same ones at every call."""
    outputs = [
        jax.device_get(eval_step(length, params, given))
        for given in source.evaluation(split, length)
    ]
    return scored(source, split, outputs)


def scored(
    source: Source, split: str, outputs: Sequence[tuple[np.ndarray, np.ndarray, np.ndarray]]
) -> Evaluation:
    """The evaluation of what an evaluation step returned for each batch."""
    losses, corrects_BT, masks_BT = zip(*outputs, strict=True)
    mask_BT = np.concatenate(masks_BT)
    loss = float(np.sum(losses, dtype=np.float64) / mask_BT.sum())
    numbers, scores = source.scores(split, loss, np.concatenate(corrects_BT), mask_BT)
    return Evaluation(loss, numbers, scores)
