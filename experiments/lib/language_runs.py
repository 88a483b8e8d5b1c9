"""What the analyses of language models share: models by their directories, and rows of text."""

import collections
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from deltaproduct_jax.data.config import StreamConfig
from deltaproduct_jax.data.stream import TokenStream
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.evaluation.models import checkpoint_of, is_folder_of_fla
from deltaproduct_jax.files import AnyPath, any_path, given_by, named, user_path
from deltaproduct_jax.interop import fla
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.models.sequence_model import with_fields
from deltaproduct_jax.training.runs import load_run, tokenizer_learnt


class LanguageModel(NamedTuple):
    """A trained model.

    Attributes:
        label: what tells it apart from the others in a figure.
        model: the model.
        trained: tokens of a row that it was trained on; None where its directory does not say.
        tokenizer: what made the ids of its text, as `Corpus` has it; None where that is not known.
    """

    label: str
    model: SequenceModel
    trained: int | None
    tokenizer: str | None


def open_language_models(
    directories: Sequence[str],
    checkpoint: str = "best",
    dtype: str | None = None,
    *,
    name: str = "runs",
) -> list[LanguageModel]:
    """The models of run directories and of folders of flash-linear-attention, in their order.

    Args:
        directories: where they are.
        checkpoint: of runs: best, newest, or a step.
        dtype: dtype of the computation; None for a model's own.
        name: of the flag that gave the directories.

    Raises:
        ConfigError: no directory is given, or one is of no language model.
        RunDirectoryError: a directory cannot be read.
    """
    if not directories:
        raise ConfigError(f"--{name} is missing; give run directories, separated by commas")
    paths = [any_path(directory, name) for directory in directories]
    places = _told_apart(name, paths)
    found = []
    for path in paths:
        with given_by(name, path):
            found.append(_open(path, checkpoint))
    times = collections.Counter(one.label for one in found)
    labels = [
        f"{one.label} ({place})" if times[one.label] > 1 else one.label
        for one, place in zip(found, places, strict=True)
    ]
    found = [one._replace(label=label) for one, label in zip(found, labels, strict=True)]
    if dtype is None:
        return found
    return [one._replace(model=with_fields(one.model, dtype=dtype)) for one in found]


def _open(directory: AnyPath, checkpoint: str) -> LanguageModel:
    if is_folder_of_fla(directory):
        model = fla.load(directory)
        return LanguageModel(model.config.label, model, None, None)
    run = load_run(directory, checkpoint_of(checkpoint))
    task = run.config.task
    if not hasattr(task, "stream"):
        raise ConfigError(
            f"{named(directory)} learnt {type(task).__name__}; it may be a run of text"
        )
    learnt = tokenizer_learnt(directory, run.step)
    return LanguageModel(run.model.config.label, run.model, task.train_length, learnt)


def _told_apart(flag: str, paths: Sequence[AnyPath]) -> list[str]:
    """Names of paths, of as many of their last parts as tell them apart.

    Raises:
        ConfigError: a path is there twice.
    """
    whole = [str(path.resolve()) for path in paths]
    for path, times in collections.Counter(whole).items():
        if times > 1:
            raise ConfigError(f"{flag} has {path} {times} times; once is enough")
    parts = [path.strip("/").split("/") for path in whole]
    for count in range(1, max(map(len, parts)) + 1):
        names = ["/".join(of[-count:]) for of in parts]
        if len(set(names)) == len(names):
            break
    return names


class Text(NamedTuple):
    """Rows of a text.

    Attributes:
        rows: ``[N, T + 1]``, documents one after another, cut to length.
        bos_id: the token that begins each.
    """

    rows: np.ndarray
    bos_id: int


def rows_of(
    data: str,
    split: str,
    *,
    count: int,
    length: int,
    seed: int,
    models: Sequence[LanguageModel] = (),
) -> Text:
    """Rows of one folder of prepared text, as the paper packs them; the same ones for a seed.

    Args:
        data: the folder.
        split: of it.
        count: N.
        length: T.
        seed: of the order.
        models: which are to read them.

    Raises:
        ConfigError: there are fewer rows in the split, or to a model their ids mean something else.
        RunDirectoryError: the folder was not prepared.
    """
    stream = TokenStream(
        StreamConfig((data,)), split, batch_size=count, length=length, seed=seed, read_ahead=0
    )
    for label, _, _, tokenizer in models:
        if tokenizer not in (None, stream.corpora[0].tokenizer):
            raise ConfigError(
                f"data={data} was made by another tokenizer than the text that {label} was trained "
                "on, so that its ids mean something else; prepare it with the same --tokenizer, "
                "bytes or the copy in that text's folder"
            )
    if stream.rows_per_epoch < count:
        raise ConfigError(
            f"rows={count} of {length} tokens are not in split={split!r} of data={data}, which has "
            f"{stream.rows_per_epoch}"
        )
    rows = stream.batch(0)
    return Text(np.concatenate([rows.inputs, rows.targets[:, -1:]], axis=1), stream.bos_id)


def names_of_texts(data: Sequence[str]) -> list[str]:
    """Folders of text as a figure calls them; ConfigError where one is there twice."""
    return _told_apart("data", [user_path(name, "data") for name in data])
