"""A model and its tokenizer, from a run directory or a folder of flash-linear-attention."""

import functools
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from deltaproduct_jax.data import standard_library
from deltaproduct_jax.data.manifest import MANIFEST
from deltaproduct_jax.data.tokenizer import (
    ByteTokenizer,
    Tokenizer,
    describe,
    identity,
    open_tokenizer,
    tokenizer_of,
)
from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.files import (
    AnyPath,
    any_path,
    given_by,
    in_bucket,
    is_there,
    named,
    read_json,
    user_path,
)
from deltaproduct_jax.interop import fla
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.models.sequence_model import most_tokens, with_fields, with_room
from deltaproduct_jax.settings import misfit, shown, whole_number
from deltaproduct_jax.training.measuring.memory import require_memory_of
from deltaproduct_jax.training.records import CONFIG
from deltaproduct_jax.training.runs import load_run, tokenizer_learnt

# What a folder of Hugging Face's may hold, in the order in which they are tried.
TOKENIZERS = ("tokenizer.json", "tokenizer.model")
# What its config.json calls the tokens that begin and end a document, and padding.
IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


class Opened(NamedTuple):
    """What :func:`open_model` returns.

    Attributes:
        model: the model.
        tokenizer: what reads text for it.
        ends: ids that end a document: BOS, which begins the next one, and the folder's EOS.
    """

    model: SequenceModel
    tokenizer: Tokenizer
    ends: tuple[int, ...]


def is_folder_of_fla(directory: AnyPath) -> bool:
    """Whether a directory's config.json is that of a model, not of a run.

    Raises:
        RunDirectoryError: it is neither, cannot be read, or is such a folder in a bucket.
    """
    if not is_there(directory / CONFIG):
        raise RunDirectoryError(
            f"{named(directory)} has no {CONFIG}; it may be a run directory, or a folder of "
            "flash-linear-attention"
        )
    is_one = "model_type" in read_json(directory / CONFIG, dict[str, Any])
    if is_one and in_bucket(directory):
        raise RunDirectoryError(
            f"{named(directory)} is a folder of flash-linear-attention; copy it to a disk and name "
            "that"
        )
    return is_one


def checkpoint_of(text: str) -> str | int:
    """What ``load_run`` takes for a checkpoint: a step is a number."""
    step = whole_number(text)
    return text if step is None else step


def load_folder(directory: Path, checkpoint: str, param_dtype: str | None = None) -> SequenceModel:
    """The model of a folder of flash-linear-attention; ConfigError for a ``checkpoint`` of it."""
    if checkpoint != "best":
        raise ConfigError(f"checkpoint={checkpoint} is for runs; {directory} is a folder")
    return fla.load(directory, param_dtype=param_dtype)


def open_model(
    path: str | os.PathLike[str],
    *,
    checkpoint: str = "best",
    tokenizer: str | None = None,
    dtype: str | None = None,
) -> Opened:
    """The model in a directory, and the tokenizer that reads text for it.

    Args:
        path: run directory, on a disk or in a bucket, or folder of flash-linear-attention.
        checkpoint: of a run: best, newest, or a step.
        tokenizer: as ``data.tokenizer.open_tokenizer`` takes it; None for the one that belongs to
            the directory: of a run that of its text, of a folder the file beside the model.
        dtype: dtype of the computation; None for the model's own.

    Raises:
        ConfigError: there is no tokenizer, it is not the one that the run learnt, or it has ids
            that the model does not have; a folder has no checkpoints.
        RunDirectoryError: the directory cannot be read, or names an end that is no token.
    """
    directory = any_path(path, "path")
    with given_by("path", directory):
        is_folder = is_folder_of_fla(directory)
        run = None if is_folder else load_run(directory, checkpoint_of(checkpoint))
    if run is None:
        model, own, text = load_folder(directory, checkpoint), _beside(directory), ""
    else:
        model, names = run.model, _texts_of(run.config.task)
        own, text = _of_text(names), f" (data={','.join(names)})" if names else ""
        learnt = tokenizer_learnt(directory, run.step)
        if None not in (own, learnt) and tokenizer is None and identity(describe(own)) != learnt:
            raise ConfigError(
                f"tokenizer is another than the one that {directory} learnt: its text was prepared "
                "anew since; give the path of the one that it was, or bytes or mistral"
            )
    found = own if tokenizer is None else open_tokenizer(tokenizer)
    if found is None:
        raise ConfigError(
            f"tokenizer is missing, and {directory} names none that is here{text}; it may be "
            "bytes, mistral, or the path of a tokenizer.json or of a SentencePiece model"
        )
    if found.vocab_size > model.config.vocab_size:
        raise ConfigError(
            f"tokenizer has {found.vocab_size} ids; the model has {model.config.vocab_size}"
        )
    ends = dict.fromkeys((found.bos_id, *_eos_of(directory, model.config.vocab_size)))
    ends = tuple(end for end in ends if end < found.vocab_size)  # no other is ever drawn
    return Opened(model if dtype is None else with_fields(model, dtype=dtype), found, ends)


def with_room_for(model: SequenceModel, tokens: int, rows: int, what: str) -> SequenceModel:
    """The model; where its attention keeps fewer tokens than are wanted, one that keeps as many.

    Args:
        model: any model.
        tokens: that each row reads.
        rows: read at a time.
        what: the settings that both come from, for the error.

    Raises:
        ConfigError: the rows' states need more memory than there is.
    """
    most = most_tokens(model)
    if most is None or most >= tokens:
        return model
    larger = with_room(model, tokens)
    require_memory_of(what, jax.eval_shape(functools.partial(larger.init_state, rows)))
    return larger


def _eos_of(directory: AnyPath, vocab_size: int) -> list[int]:
    """The ids that a folder of Hugging Face's says end a document; a run has none."""
    said = read_json(directory / CONFIG, dict[str, Any]).get("eos_token_id")
    problem = misfit(said, int | list[int] | None, "eos_token_id")
    ends = said if isinstance(said, list) else [] if said is None else [said]
    if problem is None and not all(0 <= end < vocab_size for end in ends):
        problem = f"eos_token_id={shown(said)} must be from 0 to below vocab_size={vocab_size}"
    if problem is not None:
        raise RunDirectoryError(f"{directory / CONFIG}: {problem}")
    return ends


def ids_of_folder(directory: Path) -> dict[str, Any]:
    """The ids of special tokens that a folder's config.json has, by their names there.

    What it leaves out is left to `fla.save`.
    """
    said = read_json(directory / CONFIG, dict[str, Any])
    return {name: said[name] for name in IDS if name in said}


def ids_of_run(task: Any) -> dict[str, int | None]:
    """The same of what a run learnt: BOS, behind which another document begins; None of no text."""
    tokenizer = _of_text(_texts_of(task))
    bos = None if tokenizer is None else tokenizer.bos_id
    return dict.fromkeys(IDS[:2], bos)


def _texts_of(task: Any) -> Sequence[str]:
    return getattr(task, "data", ())


def _beside(directory: Path) -> Tokenizer | None:
    paths = (directory / name for name in TOKENIZERS)
    return next((open_tokenizer(str(path)) for path in paths if path.is_file()), None)


def _of_text(names: Sequence[str]) -> Tokenizer | None:
    """The tokenizer of the first folder that is there of those that a run reads; all have one."""
    if standard_library.NAME in names:
        return ByteTokenizer()
    folders = (user_path(name, "data") for name in names)
    return next((tokenizer_of(f) for f in folders if (f / MANIFEST).is_file()), None)
