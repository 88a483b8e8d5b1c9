"""Files that appear at once or not at all, and errors that name the file."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax

from deltaproduct_jax.errors import RunDirectoryError


def write_file(path: Path, data: bytes, *, append: bool = False) -> None:
    """The one door through which a run writes its own files; only process 0 passes.

    A whole file is written beside its place, synced, and renamed into it; an appended line is
    handed to the operating system, where it outlives the process.

    Raises:
        RunDirectoryError: no space left, read-only, not permitted, and so on.
    """
    if jax.process_index() != 0:
        return
    with errors_as_one_line(path, "written"):
        path.parent.mkdir(parents=True, exist_ok=True)
        if append:
            _put(path, data, "ab")
            return
        temporary = path.with_name(f".{path.name}.tmp")
        _put(temporary, data, "wb")
        os.replace(temporary, path)
        sync(path.parent)


def _put(path: Path, data: bytes, mode: str) -> None:
    with open(path, mode) as file:
        file.write(data)
        file.flush()
        if "a" not in mode:
            os.fsync(file.fileno())


def sync(path: Path) -> None:
    """Waits until a file, or the list of a directory, is on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextlib.contextmanager
def errors_as_one_line(path: Path, what: str) -> Iterator[None]:
    """Turns an OSError into a RunDirectoryError: ``path`` cannot be ``what``, and why."""
    try:
        yield
    except OSError as error:
        reason = error.strerror or str(error)
        raise RunDirectoryError(f"{path} cannot be {what}: {reason}") from error


def read_json(path: Path) -> Any:
    """The content of a JSON file; RunDirectoryError if it cannot be read or is not JSON."""
    with errors_as_one_line(path, "read"):
        data = path.read_bytes()
    try:
        return json.loads(data)
    except ValueError as error:
        raise RunDirectoryError(f"{path} is not valid JSON: {error}") from error


def to_json(value: Any) -> bytes:
    """JSON as files hold it; ValueError where a number is not finite."""
    return json.dumps(value, indent=2, allow_nan=False).encode() + b"\n"
