"""safetensors files of a folder: one or several with an index, read and written tensor by tensor.

A folder is somebody else's: no name in it leads out of it, and what is damaged is one line. Bytes
are read where they are needed, so that no more than a tensor is held beside what the caller keeps.
"""

import json
import os
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypedDict

import ml_dtypes
import numpy as np

from deltaproduct_jax.errors import RunDirectoryError, require_package
from deltaproduct_jax.files import errors_as_one_line, is_file_name, read_json, sync, write_file
from deltaproduct_jax.strict_json import to_json

SINGLE, INDEX = "model.safetensors", "model.safetensors.index.json"
# Files of torch's own, which are programs.
PICKLED = ("pytorch_model.bin", "pytorch_model.bin.index.json")
# Dtypes by their names in files.
DTYPES: dict[str, np.dtype] = {
    "F16": np.dtype("float16"),
    "BF16": np.dtype(ml_dtypes.bfloat16),
    "F32": np.dtype("float32"),
    "F64": np.dtype("float64"),
}
_NAMES = {dtype: name for name, dtype in DTYPES.items()}


class Facts(NamedTuple):
    """A tensor, unread."""

    file: Path
    shape: tuple[int, ...]
    dtype: str


class _Index(TypedDict):
    weight_map: dict[str, str]


def _package() -> ModuleType:
    return require_package("safetensors", "a folder of safetensors", "interop")


def inside(folder: Path, name: str) -> Path:
    """A file of a folder, by the name that another file gives it.

    Raises:
        RunDirectoryError: it is not there, is no file, or lies elsewhere, through a link too.
    """
    if not is_file_name(name):
        raise RunDirectoryError(
            f"{folder} names a file {name!r}; it may be the name of one in this folder"
        )
    path = folder / name
    with errors_as_one_line(path, "read"):
        if path.resolve(strict=True).parent != folder.resolve(strict=True):
            raise RunDirectoryError(
                f"{path} is a link that leads out of the folder; copy the folder with what its "
                "links lead to (cp -rL)"
            )
        if not path.is_file():
            raise RunDirectoryError(f"{path} is no file")
    return path


class TensorFiles:
    """All tensors of a folder by key; their headers are read at once, their bytes when asked for.

    Raises:
        RunDirectoryError: a file is missing, damaged or outside of the folder.
        ConfigError: safetensors is not installed.
    """

    def __init__(self, folder: Path):
        self._open = _package().safe_open
        self._error = _package().SafetensorError
        self.facts: dict[str, Facts] = {}
        named = None if (folder / SINGLE).is_file() else _read_index(folder)
        names = [SINGLE] if named is None else sorted(set(named.values()))
        for path in [inside(folder, name) for name in names]:
            for key, facts in self._header(path):
                if key in self.facts:
                    other = self.facts[key].file.name
                    raise RunDirectoryError(f"{path} has {key}, which {other} has too")
                self.facts[key] = facts
        if named is not None:
            found = {key: facts.file.name for key, facts in self.facts.items()}
            wrong = sorted(key for key in found | named if found.get(key) != named.get(key))
            if wrong:
                raise RunDirectoryError(
                    f"{folder / INDEX} does not say where these tensors are: {', '.join(wrong)}"
                )

    def _header(self, path: Path) -> Iterator[tuple[str, Facts]]:
        with self._reading(path) as file:
            for key in file.keys():  # noqa: SIM118, it is no mapping
                entry = file.get_slice(key)
                yield key, Facts(path, tuple(entry.get_shape()), entry.get_dtype())

    def read(self, key: str) -> np.ndarray:
        """A tensor, in the dtype that it has in its file."""
        # Opened for each, and read rather than mapped: pages of a mapping count as memory.
        with self._reading(self.facts[key].file) as file:
            return file.get_tensor(key)

    def _reading(self, path: Path) -> "_Reading":
        return _Reading(path, self._open, self._error)


class _Reading:
    """An open file; what the package says of damage becomes one line."""

    def __init__(self, path: Path, opener: Callable[..., Any], error: type[Exception]):
        self._path, self._opener, self._error = path, opener, error

    def __enter__(self) -> Any:
        try:
            self._file = self._opener(str(self._path), framework="numpy", backend="pread")
        except (self._error, OSError) as error:
            raise self._damaged(error) from error
        return self._file.__enter__()

    def __exit__(self, kind: Any, error: BaseException | None, trace: Any) -> None:
        self._file.__exit__(None, None, None)
        if isinstance(error, self._error | OSError) and not isinstance(error, RunDirectoryError):
            raise self._damaged(error) from error

    def _damaged(self, error: BaseException) -> RunDirectoryError:
        return RunDirectoryError(f"{self._path} is damaged: {' '.join(str(error).split())}")


def _read_index(folder: Path) -> dict[str, str]:
    """File of each tensor, as the index of a folder says."""
    if not (folder / INDEX).is_file():
        pickled = next((name for name in PICKLED if (folder / name).exists()), None)
        says = f"; {pickled} is a pickle, which is not read: save it as safetensors there"
        raise RunDirectoryError(
            f"{folder} has neither {SINGLE} nor {INDEX}{says if pickled else ''}"
        )
    named = read_json(inside(folder, INDEX), _Index)["weight_map"]
    if not named:
        raise RunDirectoryError(f"{folder / INDEX} names no tensor")
    return named


class Writing(NamedTuple):
    """A tensor to be written: its shape and dtype, and what makes it when its turn comes."""

    shape: tuple[int, ...]
    dtype: np.dtype
    make: Callable[[], np.ndarray]

    @property
    def nbytes(self) -> int:
        """Size in the file."""
        return int(np.prod(self.shape, dtype=np.int64)) * self.dtype.itemsize


def write_tensors(folder: Path, tensors: Mapping[str, Writing], most_bytes: int) -> list[str]:
    """Writes tensors into one file, or several of up to ``most_bytes`` each and an index.

    Tensors are made one at a time. Files appear at once or not at all.

    Returns:
        The names of the files.

    Raises:
        RunDirectoryError: a file cannot be written.
    """
    shards = _shards(tensors, most_bytes)
    if len(shards) == 1:
        _write(folder / SINGLE, shards[0])
        return [SINGLE]
    names, weight_map = [], {}
    for number, shard in enumerate(shards, start=1):
        names.append(f"model-{number:05d}-of-{len(shards):05d}.safetensors")
        _write(folder / names[-1], shard)
        weight_map |= dict.fromkeys(shard, names[-1])
    total = sum(tensor.nbytes for tensor in tensors.values())
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_file(folder / INDEX, to_json(index))
    return [*names, INDEX]


def _shards(tensors: Mapping[str, Writing], most_bytes: int) -> list[dict[str, Writing]]:
    shards: list[dict[str, Writing]] = [{}]
    size = 0
    for key, tensor in tensors.items():
        if shards[-1] and size + tensor.nbytes > most_bytes:
            shards.append({})
            size = 0
        shards[-1][key] = tensor
        size += tensor.nbytes
    return shards


def _write(path: Path, tensors: Mapping[str, Writing]) -> None:
    """One file: the length of its header, the header, the tensors one after another."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}  # without it transformers refuses
    start = 0
    for key, tensor in tensors.items():
        offsets = [start, start + tensor.nbytes]
        shape = list(tensor.shape)
        header[key] = {"dtype": _NAMES[tensor.dtype], "shape": shape, "data_offsets": offsets}
        start = offsets[1]
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    temporary = path.with_name(f".{path.name}.tmp")
    with errors_as_one_line(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for tensor in tensors.values():
                file.write(np.ascontiguousarray(tensor.make()).view(np.uint8).data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)
