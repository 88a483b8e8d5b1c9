"""Tokens on disk: NumPy files that ``np.load(mmap_mode="r")`` reads, and how they are written."""

import hashlib
import os
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from deltaproduct_jax.data.manifest import ShardFacts
from deltaproduct_jax.files import errors_as_one_line, sync


def dtype_for(vocab_size: int) -> np.dtype:
    """The smallest of uint16 and uint32 that holds every id."""
    return np.dtype(np.uint16 if vocab_size <= 2**16 else np.uint32)


def write_whole(path: Path, put: Callable[[BinaryIO], Any]) -> None:
    """Writes a file that appears whole or not at all; unlike a run's files, from any process.

    Raises:
        RunDirectoryError: no space left, not permitted, and so on.
    """
    temporary = path.with_name(f".{path.name}.tmp")
    with errors_as_one_line(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        with open(temporary, "wb") as file:
            put(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
        sync(path.parent)


class ShardWriter:
    """Collects the documents of one split of one piece; BOS goes before each."""

    def __init__(self, dtype: np.dtype, bos_id: int):
        self._bos = np.full(1, bos_id, dtype)
        self._parts: list[np.ndarray] = []
        self._offsets = [0]
        self.num_bytes = 0

    def add(self, stretches: Iterable[Sequence[int]], num_bytes: int) -> None:
        """Adds a document: its ids, in stretches, and the bytes of its text."""
        parts = [self._bos, *(_as_array(ids, self._bos.dtype) for ids in stretches)]
        self._parts += parts
        self._offsets.append(self._offsets[-1] + sum(map(len, parts)))
        self.num_bytes += num_bytes

    @property
    def num_documents(self) -> int:
        """Documents added so far."""
        return len(self._offsets) - 1

    def arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """The tokens [n], and where documents begin and the last ends [documents + 1] int64."""
        tokens = np.concatenate([self._bos[:0], *self._parts])
        return tokens, np.asarray(self._offsets, np.int64)

    def write(self, directory: Path, name: str) -> ShardFacts:
        """Writes both arrays, a file each; what the manifest says of them."""
        sha256 = {}
        for what, array in zip(("tokens", "offsets"), self.arrays(), strict=True):
            file = f"{name}.{what}.npy"
            write_whole(directory / file, lambda out, array=array: _save(out, array))
            sha256[file] = digest(directory / file)
        return {
            "name": name,
            "documents": self.num_documents,
            "tokens": self._offsets[-1],
            "bytes": self.num_bytes,
            "sha256": sha256,
        }


def _save(out: BinaryIO, array: np.ndarray) -> None:
    """As np.save, which says of a disk that is full how much it has written, and not why."""
    np.lib.format.write_array_header_1_0(out, np.lib.format.header_data_from_array_1_0(array))
    out.write(array.data)


def _as_array(ids: Sequence[int], dtype: np.dtype) -> np.ndarray:
    if isinstance(ids, bytes):
        return np.frombuffer(ids, np.uint8).astype(dtype)
    return np.asarray(ids, dtype)


def digest(path: Path) -> str:
    """SHA-256 of a file."""
    with errors_as_one_line(path, "read"), open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
