"""What the analyses of language models share: models by their directories, and rows of text."""

import collections
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from deltaproduct_jax.data.config import StreamConfig
from deltaproduct_jax.data.stream import TokenStream
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.evaluation.models import checkpoint_of, is_folder_of_fla
from deltaproduct_jax.files import AnyPath, any_path
from deltaproduct_jax.interop import fla
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.models.sequence_model import with_fields
from deltaproduct_jax.training.runs import load_run


class LanguageModel(NamedTuple):
    """A trained model.

    Attributes:
        label: what tells it apart from the others in a figure.
        model: the model.
        trained: tokens of a row that it was trained on; None where its directory does not say.
    """

    label: str
    model: SequenceModel
    trained: int | None


def open_language_models(
    directories: Sequence[str], checkpoint: str = "best", dtype: str | None = None
) -> list[LanguageModel]:
    """The models of run directories and of folders of flash-linear-attention, in their order.

    Args:
        directories: where they are.
        checkpoint: of runs: best, newest, or a step.
        dtype: dtype of the computation; None for a model's own.

    Raises:
        ConfigError: no directory is given, or one is of no language model.
        RunDirectoryError: a directory cannot be read.
    """
    if not directories:
        raise ConfigError("--runs is missing; give run directories, separated by commas")
    found = [_open(any_path(name), checkpoint) for name in directories]
    times = collections.Counter(model.config.label for model, _ in found)
    models = []
    for name, (model, trained) in zip(directories, found, strict=True):
        label = model.config.label
        label = f"{label} ({any_path(name).resolve().name})" if times[label] > 1 else label
        models.append(
            LanguageModel(
                label, model if dtype is None else with_fields(model, dtype=dtype), trained
            )
        )
    return models


def _open(directory: AnyPath, checkpoint: str) -> tuple[SequenceModel, int | None]:
    if is_folder_of_fla(directory):
        return fla.load(directory), None
    run = load_run(directory, checkpoint_of(checkpoint))
    if not hasattr(run.config.task, "stream"):
        raise ConfigError(
            f"runs={directory} learnt {type(run.config.task).__name__}; it may be a run of text"
        )
    return run.model, run.config.task.train_length


class Text(NamedTuple):
    """Rows of a text.

    Attributes:
        rows: ``[N, T + 1]``, documents one after another, cut to length.
        bos_id: the token that begins each.
    """

    rows: np.ndarray
    bos_id: int


def rows_of(data: str, split: str, *, count: int, length: int, seed: int) -> Text:
    """Rows of one folder of prepared text, as the paper packs them; the same ones for a seed.

    Raises:
        ConfigError: there are fewer rows in the split.
        RunDirectoryError: the folder was not prepared.
    """
    stream = TokenStream(
        StreamConfig((data,)), split, batch_size=count, length=length, seed=seed, read_ahead=0
    )
    if stream.rows_per_epoch < count:
        raise ConfigError(
            f"rows={count} of {length} tokens are not in split={split!r} of data={data}, which has "
            f"{stream.rows_per_epoch}"
        )
    rows = stream.batch(0)
    return Text(np.concatenate([rows.inputs, rows.targets[:, -1:]], axis=1), stream.bos_id)


def name_of_text(data: str) -> str:
    """A folder of text as a figure calls it."""
    return Path(data).name
