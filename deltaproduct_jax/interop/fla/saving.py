"""A model of ours as a folder of flash-linear-attention's."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx, traverse_util

from deltaproduct_jax.errors import ConfigError, RunDirectoryError, require_at_least
from deltaproduct_jax.files import errors_as_one_line, user_path, whole_or_absent, write_file
from deltaproduct_jax.interop.card import CARD, model_card
from deltaproduct_jax.interop.fla import options
from deltaproduct_jax.interop.fla.loading import CONFIG
from deltaproduct_jax.interop.fla.tensors import key_and_turn
from deltaproduct_jax.interop.tensor_files import Writing, write_tensors
from deltaproduct_jax.models import SequenceModel, count_parameters
from deltaproduct_jax.settings import require_kind
from deltaproduct_jax.strict_json import to_json

MOST_BYTES = 5 * 10**9  # of one file

THEIRS = """\
import fla  # registers the model types
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(".").cuda()
logits = model(input_ids).logits"""
OURS = """\
from deltaproduct_jax.interop import fla

model = fla.load(".")
logits = model(tokens)"""


def save(
    model: SequenceModel,
    directory: str | os.PathLike[str],
    *,
    bos_token_id: int | None = 1,
    eos_token_id: int | list[int] | None = 2,
    pad_token_id: int | None = None,
    most_bytes: int = MOST_BYTES,
    facts: Mapping[str, Mapping[str, Any]] | None = None,
) -> None:
    """Writes what flash-linear-attention loads, and a model card beside it.

    Parameters keep their dtypes. They are fetched and written one at a time.

    Args:
        model: a model with one of the mixers ``delta_product``, ``gated_delta_product``,
            ``delta_net``, ``gated_delta_net``.
        directory: a folder that holds no model yet; it is made if need be.
        bos_token_id: id of the token that begins a document, for config.json.
        eos_token_id: id of the token that ends one, or several ids.
        pad_token_id: id of padding.
        most_bytes: largest file; a larger model becomes several, with an index.
        facts: more tables for the card, rows by title, such as how it was trained.

    Raises:
        ConfigError: the model has something that theirs has not, or an argument cannot be
            honoured; the text names the field or the argument.
        RunDirectoryError: the folder holds a model, or cannot be written.
    """
    require_kind("model", model, SequenceModel)
    require_kind("most_bytes", most_bytes, int)
    require_at_least("most_bytes", most_bytes, 1)
    require_kind("facts", facts, Mapping | None)
    for title, rows in (facts or {}).items():
        require_kind(f"facts[{title!r}]", rows, Mapping)
    folder = user_path(directory, "directory")
    ids = {
        "bos_token_id": bos_token_id,
        "eos_token_id": eos_token_id,
        "pad_token_id": pad_token_id,
    }
    for name, given in ids.items():
        require_kind(name, given, int | list[int] | None if name == "eos_token_id" else int | None)
        for number in given if isinstance(given, list) else [] if given is None else [given]:
            if not 0 <= number < model.config.vocab_size:
                raise ConfigError(f"{name}={given} must be from 0 to {model.config.vocab_size - 1}")
    saved = options.to_options(model.config)
    _refuse_other_blocks(model)
    params = traverse_util.flatten_dict(nnx.to_pure_dict(nnx.state(model, nnx.Param)))
    tensors = dict(sorted(_writing(path, leaf) for path, leaf in params.items()))
    _refuse_taken(folder)
    dtype = tensors["model.embeddings.weight"].dtype.name
    card = model_card(
        folder.name,
        model.config,
        count_parameters(model)["total"],
        facts or {},
        {"In JAX": OURS, "In PyTorch": THEIRS},
    )
    with whole_or_absent(lambda: [folder / name for name in _of_a_model(folder)]):
        write_tensors(folder, tensors, most_bytes)
        write_file(folder / CARD, card.encode())
        # Last: a folder without it holds no model.
        write_file(folder / CONFIG, to_json(saved | ids | {"dtype": dtype}))


def _writing(path: tuple[str | int, ...], leaf: Any) -> tuple[str, Writing]:
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        raise ConfigError(
            "model lies on devices of several processes; save it from a single process, which may "
            "load its run"
        )
    key, turn = key_and_turn(path)
    shape = turn.there(np.broadcast_to(np.float32(0), leaf.shape)).shape
    return key, Writing(shape, np.dtype(leaf.dtype), lambda: turn.there(np.asarray(leaf)))


def _refuse_other_blocks(model: SequenceModel) -> None:
    """ConfigError where some block has another mixer than config.json will say."""
    for number, block in enumerate(model.layers):
        wanted = model.config.mixer_of(number)
        if type(block.attn) is not wanted.layer:
            raise ConfigError(
                f"model has a {type(block.attn).__name__} in block {number}, where its config says "
                f"{wanted.name!r}; such a block is not written"
            )


def _refuse_taken(folder: Path) -> None:
    with errors_as_one_line(folder, "read"):
        taken = _of_a_model(folder)
    if taken:
        raise RunDirectoryError(f"{folder} holds {', '.join(taken)}; give another folder")


def _of_a_model(folder: Path) -> list[str]:
    """Files of a folder that are parts of a model."""
    there = sorted(path.name for path in folder.glob("*")) if folder.is_dir() else []
    return [n for n in there if n in (CONFIG, CARD) or n.endswith((".safetensors", ".index.json"))]
