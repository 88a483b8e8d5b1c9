"""How well a model predicts each place of a long row: losses by position, far beyond training.

The paper (https://arxiv.org/abs/2502.10297) reads rows of 32,768 tokens, documents one after
another with BOS before each and no reset between them, by models trained on 4,096, and shows the
mean loss at each position and the mean over all positions up to it.

Dimension key: ``N`` rows, ``B`` of them at a time, ``T`` positions, ``P`` of a piece.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deltaproduct_jax.analysis.token_ids import token_ids
from deltaproduct_jax.errors import ConfigError, require_at_least
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.models.sequence_model import with_room
from deltaproduct_jax.settings import require_kind

PIECE = 1024


class Losses(NamedTuple):
    """Of every target of rows, arrays ``[N, T]``.

    Attributes:
        loss: cross entropy in nats, float32.
        correct: whether the likeliest token was the one that came.
    """

    loss: np.ndarray
    correct: np.ndarray


@dataclasses.dataclass(frozen=True)
class Curves:
    """Losses over positions.

    Attributes:
        position: of each point, the tokens read up to it, ascending to T.
        loss: mean over the positions since the last point, and over rows.
        error: standard error of that mean by the spread of rows; None of a single one.
        running_loss: mean over all positions so far.
        running_accuracy: fraction of the likeliest tokens so far that were right.
    """

    position: list[int]
    loss: list[float]
    error: list[float] | None
    running_loss: list[float]
    running_accuracy: list[float]


def token_losses(
    model: SequenceModel, rows: np.ndarray, *, batch_size: int = 1, piece: int = PIECE
) -> Losses:
    """The loss of every token of ``rows`` but the first, read in pieces from state to state.

    Memory does not grow with T, but for softmax attention, which sees all of the row.

    Args:
        model: any model.
        rows: ``[N, T + 1]`` token ids, N a multiple of ``batch_size``.
        batch_size: B.
        piece: P; one program reads all of them.

    Raises:
        ConfigError: an argument is out of range, or an id is none of the model's.
    """
    for name, value in (("batch_size", batch_size), ("piece", piece)):
        require_kind(name, value, int)
        require_at_least(name, value, 1)
    rows = token_ids("rows", rows, "N T+1", model)
    if len(rows) % batch_size or rows.shape[1] < 2:
        raise ConfigError(
            f"rows={list(rows.shape)} must be [N, T + 1], N a multiple of batch_size={batch_size}"
        )
    model = with_room(model, rows.shape[1] - 1 + piece)
    graph, params = nnx.split(model)

    @jax.jit
    def read(params: Any, state: Any, inputs: jax.Array, targets: jax.Array) -> Any:
        logits, state = nnx.merge(graph, params).forward(inputs, state=state)
        logits = logits.astype(jnp.float32)
        loss = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
        return state, loss, jnp.argmax(logits, axis=-1) == targets

    parts = []
    for chosen in np.split(rows, len(rows) // batch_size):
        state, found = model.init_state(batch_size), []
        for inputs, targets in _pieces(chosen, piece):
            state, *outputs = read(params, state, inputs, targets)
            found.append(outputs)
        parts.append(
            [np.concatenate(of, axis=1) for of in zip(*jax.device_get(found), strict=True)]
        )
    T = rows.shape[1] - 1
    return Losses(*(np.concatenate(of)[:, :T] for of in zip(*parts, strict=True)))


def _pieces(rows: np.ndarray, piece: int) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Inputs and targets ``[B, P]``; the last are filled up, behind all that counts."""
    filled = np.pad(rows, [(0, 0), (0, -(rows.shape[1] - 1) % piece)])
    for start in range(0, filled.shape[1] - 1, piece):
        yield filled[:, start : start + piece], filled[:, start + 1 : start + piece + 1]


def by_position(losses: Losses, window: int) -> Curves:
    """Curves with a point every ``window`` positions.

    Raises:
        ConfigError: the window is longer than the rows, or does not divide them.
    """
    N, T = losses.loss.shape
    require_kind("window", window, int)
    if window < 1 or T % window:
        raise ConfigError(f"window={window} must divide the length of rows, {T}")
    of_rows = losses.loss.astype(np.float64).reshape(N, T // window, window).mean(axis=2)
    ends = np.arange(window, T + 1, window)
    # Each running mean is that of whole windows.
    running = lambda x: np.cumsum(x.astype(np.float64).sum(axis=0))[ends - 1] / (N * ends)
    error = None if N == 1 else (of_rows.std(axis=0, ddof=1) / N**0.5).tolist()
    return Curves(
        ends.tolist(),
        of_rows.mean(axis=0).tolist(),
        error,
        running(losses.loss).tolist(),
        running(losses.correct).tolist(),
    )
