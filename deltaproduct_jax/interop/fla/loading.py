"""A folder of flash-linear-attention's as a model of ours."""

import contextlib
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx, traverse_util

from deltaproduct_jax.errors import ConfigError, RunDirectoryError, require_one_of
from deltaproduct_jax.files import read_json, user_path
from deltaproduct_jax.interop.fla import hybrids, options
from deltaproduct_jax.interop.fla.tensors import (
    Path as ParameterPath,
)
from deltaproduct_jax.interop.fla.tensors import (
    Turn,
    dead_keys,
    fork_keys,
    is_fork,
    key_and_turn,
)
from deltaproduct_jax.interop.tensor_files import DTYPES, TensorFiles, inside
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.models import config as model_config
from deltaproduct_jax.parallel.config import AXES
from deltaproduct_jax.parallel.layout import Layout
from deltaproduct_jax.parallel.names import names_of_model
from deltaproduct_jax.settings import require_kind

CONFIG = "config.json"
EMBEDDINGS, HEAD = "model.embeddings.weight", "lm_head.weight"
MOST_NAMED = 5  # of the tensors that do not fit, by each reason
# What a model here may hold without being asked to convert.
_HELD = ("F32", "BF16")


def load(
    directory: str | os.PathLike[str],
    *,
    param_dtype: str | None = None,
    dtype: str | None = None,
    implementation: str | None = None,
    chunk_size: int | None = None,
    remat: str = "none",
    max_length: int | None = None,
    mesh: jax.sharding.Mesh | None = None,
) -> SequenceModel:
    """The model in a folder of flash-linear-attention's, or of the paper's fork of it.

    The folder holds ``config.json`` and ``model.safetensors``, or several such files and their
    index. Tensors are read one at a time, to where they are to lie.

    Args:
        directory: the folder.
        param_dtype: dtype of the parameters, ``"float32"`` or ``"bfloat16"``; None keeps each as it
            is in its file. Where it is given, those of forget gates are float32.
        dtype: dtype of the computation; None is that of the parameters.
        implementation: as in ``ModelConfig``.
        chunk_size: as in ``ModelConfig``.
        remat: as in ``ModelConfig``.
        max_length: of a hybrid, tokens that its attention keeps while decoding; None for the
            folder's ``max_position_embeddings``.
        mesh: where the parameters lie, as ``parallel.layout.make_mesh`` makes it; None is JAX's
            default device.

    Raises:
        ConfigError: an option of config.json has no counterpart here, or an argument cannot be
            honoured; the text names it, and the file.
        RunDirectoryError: a file is missing, damaged or outside of the folder, or tensors are
            missing, superfluous or of another shape; one text lists them all.
    """
    folder = user_path(directory, "directory")
    require_kind("param_dtype", param_dtype, str | None)
    require_kind("mesh", mesh, jax.sharding.Mesh | None)
    if not folder.is_dir():
        raise RunDirectoryError(
            f"directory={folder} is no folder; it may be one of flash-linear-attention"
        )
    file = inside(folder, CONFIG)
    said = read_json(file, dict[str, Any])
    with errors_of(file):
        fields = options.to_fields(said)
    files = TensorFiles(folder)
    if param_dtype is not None:
        require_one_of("param_dtype", param_dtype, model_config.DTYPES)
    held = param_dtype or _dtype_of(files, folder)
    ours = {"implementation": implementation, "chunk_size": chunk_size, "remat": remat}
    ours |= {"param_dtype": held, "dtype": dtype or held}
    ModelConfig(vocab_size=2, **ours)  # what is wrong in these is no fault of the file
    if max_length is not None:
        fields["max_length"] = max_length
    with errors_of(file):
        config = ModelConfig(**fields, **ours)
    _check_layers(files, folder, config.num_layers)
    return _filled(config, files, folder, mesh, converts=param_dtype is not None)


def _filled(
    config: ModelConfig,
    files: TensorFiles,
    folder: Path,
    mesh: jax.sharding.Mesh | None,
    *,
    converts: bool,
) -> SequenceModel:
    """The model with the tensors of its files, each read to where it lies."""
    model = nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
    graphdef, state = nnx.split(model, nnx.Param)
    shapes = traverse_util.flatten_dict(nnx.to_pure_dict(state))
    sources = _sources(shapes, files, folder, config)
    shardings = dict.fromkeys(shapes, None) if mesh is None else _shardings(model, shapes, mesh)
    params = {}
    for path, leaf in shapes.items():
        keys, turn = sources[path]
        asked = leaf.dtype if converts else None
        params[path] = _placed(_read(files, keys, turn, asked), shardings[path])
    return nnx.merge(graphdef, traverse_util.unflatten_dict(params))


@contextlib.contextmanager
def errors_of(path: Path) -> Iterator[None]:
    """Puts the file in front of what is wrong with an option in it."""
    try:
        yield
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error


def _check_layers(files: TensorFiles, folder: Path, num_layers: int) -> None:
    """RunDirectoryError if there are fewer layers than said, before as many are described."""
    found = set(re.findall(r"\blayers\.(\d+)\.", " ".join(files.facts)))
    if num_layers > len(found):
        raise RunDirectoryError(
            f"{folder} has tensors of {len(found)} layers; its config.json says "
            f"num_hidden_layers={num_layers}"
        )


def _dtype_of(files: TensorFiles, folder: Path) -> str:
    """The dtype of the embeddings, after any that a model here does not hold has been refused."""
    strange = {facts.dtype for facts in files.facts.values()} & DTYPES.keys() - set(_HELD)
    if strange:
        raise ConfigError(
            f"param_dtype is not given, and {folder} has tensors of {', '.join(sorted(strange))}; "
            f"it may be {' or '.join(model_config.DTYPES)}, to which they are converted"
        )
    embeddings = files.facts.get(EMBEDDINGS)
    if embeddings is None or embeddings.dtype not in DTYPES:
        return "float32"  # the list of what does not fit will say so
    return DTYPES[embeddings.dtype].name


def _sources(
    shapes: Mapping[ParameterPath, Any], files: TensorFiles, folder: Path, config: ModelConfig
) -> dict[ParameterPath, tuple[list[str], Turn]]:
    """Tensors that each parameter is made of, after all of them have been compared."""
    fork = is_fork(files.facts)
    factors = config.value_of("num_householder")
    found: dict[ParameterPath, tuple[list[str], Turn]] = {}
    wanted: dict[str, tuple[int, ...]] = {}
    ignored: set[str] = set()
    for path, leaf in shapes.items():
        key, turn = key_and_turn(path)
        # Attention is the same in both versions.
        apart = fork and not (path[0] == "layers" and hybrids.is_attention(config, path[1]))
        keys = fork_keys(key, factors) if apart else [key]
        found[path] = keys, turn
        shape = turn.there(np.broadcast_to(np.float32(0), leaf.shape)).shape
        wanted |= dict.fromkeys(keys, (shape[0] // len(keys), *shape[1:]))
        ignored |= set(dead_keys(key, factors)) if apart else set()
    if config.tie_embeddings and HEAD in files.facts:
        ignored.add(HEAD)
    _compare(wanted, ignored, files, folder)
    if HEAD in ignored and not _same_bits(files.read(HEAD), files.read(EMBEDDINGS)):
        raise RunDirectoryError(f"{folder}: {HEAD} differs from {EMBEDDINGS}, which it is tied to")
    return found


def _compare(
    wanted: Mapping[str, tuple[int, ...]], ignored: set[str], files: TensorFiles, folder: Path
) -> None:
    """RunDirectoryError that lists every tensor that is missing, superfluous or misshapen."""
    have = files.facts
    misshapen = [
        f"{key} is {list(have[key].shape)}, not {list(shape)}"
        for key, shape in wanted.items()
        if key in have and have[key].shape != shape
    ]
    strange = [
        f"{k} is {f.dtype}" for k, f in have.items() if k in wanted and f.dtype not in DTYPES
    ]
    lists = {
        "missing": gathered(wanted.keys() - have.keys()),
        "not of this model": gathered(have.keys() - wanted.keys() - ignored),
        "of another shape": gathered(misshapen),
        "of no dtype that is read": gathered(strange),
    }
    said = [f"{what}: {_listed(names)}" for what, names in lists.items() if names]
    if said:
        text = "; ".join(said)
        raise RunDirectoryError(f"{folder} has other tensors than its config.json; {text}")


def _listed(names: Sequence[str]) -> str:
    more = len(names) - MOST_NAMED
    return ", ".join(names[:MOST_NAMED]) + (f" and {more} more" if more > 0 else "")


def gathered(keys: Iterable[str]) -> list[str]:
    """Names of tensors, those of several layers as one: ``model.layers.{0,1}.attn.A_log``."""
    layers: dict[tuple[str, str], list[int]] = {}
    for key in keys:
        parts = re.fullmatch(r"(.*?\blayers\.)?([0-9]{1,18})?(.*)", key, re.DOTALL)
        before, number, after = parts.groups()
        layers.setdefault((before or "", after), []).append(-1 if number is None else int(number))
    return sorted(
        f"{before}{_numbers(numbers)}{after}" for (before, after), numbers in layers.items()
    )


def _numbers(numbers: list[int]) -> str:
    if numbers == [-1]:
        return ""
    text = ",".join(map(str, sorted(numbers)))
    return f"{{{text}}}" if len(numbers) > 1 else text


def _same_bits(one: np.ndarray, other: np.ndarray) -> bool:
    return one.dtype == other.dtype and one.tobytes() == other.tobytes()


def _shardings(
    model: nnx.Module, shapes: Mapping[ParameterPath, Any], mesh: jax.sharding.Mesh
) -> dict[ParameterPath, jax.sharding.Sharding]:
    if set(mesh.axis_names) != set(AXES):
        raise ConfigError(
            f"mesh has axes {mesh.axis_names}; it may be one that parallel.layout.make_mesh makes, "
            f"with {AXES}"
        )
    layout = Layout(mesh, names_of_model(model))
    tree = layout.shardings(traverse_util.unflatten_dict(dict(shapes)))
    return traverse_util.flatten_dict(tree)


def _read(files: TensorFiles, keys: list[str], turn: Turn, asked: Any) -> np.ndarray:
    """A parameter on the host, in our layout."""
    parts = [files.read(key) for key in keys]
    whole = turn.back(parts[0] if len(parts) == 1 else np.concatenate(parts, axis=0))
    return whole if asked is None else whole.astype(asked, copy=False)


def _placed(host: np.ndarray, sharding: jax.sharding.Sharding | None) -> jax.Array:
    """An array on its devices; each takes its own part."""
    if sharding is None:
        return jax.device_put(np.ascontiguousarray(host))
    return jax.make_array_from_callback(host.shape, sharding, lambda index: host[index])
