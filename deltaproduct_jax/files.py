"""Files that appear at once or not at all, are read by a schema, and errors that name the file."""

import contextlib
import contextvars
import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import jax
from etils import epath

from deltaproduct_jax.errors import ConfigError, RunDirectoryError, require_package
from deltaproduct_jax.settings import shown
from deltaproduct_jax.strict_json import decode

# What is written inside a run directory has names of up to so many characters.
ROOM_FOR_NAMES = 128
PROBE_BYTES = 4096  # of a block, which a file system gives whole

AnyPath = Path | epath.Path  # on a disk, or in a bucket
IN_BUCKET = "gs://"


def in_bucket(path: AnyPath) -> bool:
    """Whether a path is in a bucket: one without folders, whose objects appear whole."""
    return str(path).startswith(IN_BUCKET)


def write_file(path: AnyPath, data: bytes, *, append: bool = False) -> None:
    """The one door through which a run writes its own files; only process 0 passes.

    A whole file is written beside its place, synced, and renamed into it; an appended line is
    handed to the operating system, where it outlives the process. In a bucket, where nothing can
    be appended, a whole file appears at once by itself.

    Raises:
        RunDirectoryError: no space left, read-only, not permitted, and so on.
    """
    if jax.process_index() != 0:
        return
    with errors_as_one_line(path, "written"):
        if in_bucket(path):
            path.write_bytes(data)
            return
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


def set_aside(path: AnyPath) -> AnyPath:
    """Renames a file or folder, so that another can take its place; returns its new path.

    ``metrics.jsonl`` becomes ``metrics.aside1.jsonl``, or the first number that is free. Only
    process 0 renames. In a bucket that is to copy and then to delete, object by object.

    Raises:
        RunDirectoryError: it cannot be renamed.
    """
    number = 1
    while is_there(there := path.with_name(f"{path.stem}.aside{number}{path.suffix}")):
        number += 1
    if jax.process_index() == 0:
        with errors_as_one_line(path, "renamed"):
            path.rename(there)
            if not in_bucket(path):
                sync(path.parent)
    return there


_NOBODY: Mapping[str, str] = MappingProxyType({})
_GIVEN = contextvars.ContextVar("given", default=_NOBODY)  # who gave a path, as errors spell it


@contextlib.contextmanager
def given_by(name: str, path: AnyPath) -> Iterator[None]:
    """Inside, errors say ``path`` behind the ``name`` of the setting or argument that gave it.

    Of several names the outermost counts, which is the one that a user wrote.
    """
    token = _GIVEN.set({str(path): name, **_GIVEN.get()})
    try:
        yield
    finally:
        _GIVEN.reset(token)


def named(path: AnyPath) -> str:
    """A path as an error says it, behind the setting or argument that gave it, if one did."""
    name = _GIVEN.get().get(str(path))
    return str(path) if name is None else f"{name}={path}"


@contextlib.contextmanager
def errors_as_one_line(path: AnyPath, what: str) -> Iterator[None]:
    """Turns an OSError into a RunDirectoryError: ``path`` cannot be ``what``, and why.

    Of a bucket it does so with any error: which one it is depends on the part that failed.
    """
    try:
        yield
    except Exception as error:
        if not isinstance(error, OSError) and not in_bucket(path):
            raise
        reason = getattr(error, "strerror", None) or str(error) or repr(error)
        if isinstance(error, FileNotFoundError):  # of which a bucket's client says its own address
            reason = os.strerror(errno.ENOENT)
        raise RunDirectoryError(f"{named(path)} cannot be {what}: {reason}") from error


@contextlib.contextmanager
def whole_or_absent(written: Callable[[], Iterable[Path]]) -> Iterator[None]:
    """Takes away what was written inside, if that is stopped or fails; the next try begins anew.

    Args:
        written: files and folders that may be there then, none of which was before.
    """
    try:
        yield
    except BaseException:
        for path in written():
            if path.is_dir():
                shutil.rmtree(path, ignore_errors=True)
            else:
                path.unlink(missing_ok=True)
        raise


def is_there(path: AnyPath) -> bool:
    """Whether there is such a file or folder; RunDirectoryError if that cannot be told."""
    with errors_as_one_line(path, "read"):
        if not in_bucket(path):
            return path.exists()
        try:
            path.stat()  # exists() says no where it only cannot tell
        except FileNotFoundError:
            return False
        return True


def any_path(path: str | os.PathLike[str], name: str) -> AnyPath:
    """A path as a user writes it: in a bucket, as gs://BUCKET/FOLDER, or as `user_path` reads it.

    A bucket alone is one too: for Orbax, epath and gcsfs its root is a folder as any other.

    Args:
        path: what was given, which need not be there.
        name: of the flag, field or argument that gave it.

    Raises:
        ConfigError: it can be neither, or the package that reaches buckets is not installed.
    """
    text = _text_of(path)
    if text is None:
        raise ConfigError(
            f"{name}={shown(path)} is not known; it may be a directory, or gs://BUCKET/FOLDER"
        )
    # A single slash is a slip: nobody calls a folder "gs:".
    if text and "://" not in text and not text.startswith(IN_BUCKET.removesuffix("/")):
        return user_path(text, name)
    names = text.removeprefix(IN_BUCKET).removesuffix("/").split("/")
    # An empty name, as of a variable that is not set, would be left out, and another place taken;
    # of "." and ".." a bucket knows nothing.
    if not text.startswith(IN_BUCKET) or "\0" in text or {"", ".", ".."} & set(names):
        raise ConfigError(
            f"{name}={text!r} is not known; it may be a directory, or gs://BUCKET/FOLDER, of which "
            "no name is empty, '.' or '..'"
        )
    require_package("gcsfs", f"{name}={text}", "gcs")
    import fsspec

    # What a process remembers of a folder would not show what others have written since.
    fsspec.config.conf.setdefault("gcs", {})["use_listings_cache"] = False
    return epath.Path(text.removesuffix("/"))


def require_bucket(path: AnyPath) -> None:
    """Raises RunDirectoryError unless the bucket is there for this account; a disk passes.

    What is asked is also what Orbax asks before it deletes a checkpoint.
    """
    if in_bucket(path):
        with errors_as_one_line(path, "used"):
            from google.cloud import storage

            storage.Client().get_bucket(path.parts[2])


def user_path(path: str | os.PathLike[str], name: str) -> Path:
    """A path as a user writes it, ``~`` being their home.

    Args:
        path: what was given, which need not be there.
        name: of the flag, field or argument that gave it.

    Raises:
        ConfigError: it cannot be a path on a disk, or cannot be reached.
    """
    text, why = _text_of(path), None
    if text is None:
        raise ConfigError(f"{name}={shown(path)} must be a path, in a text or as of pathlib")
    if not text or "\0" in text:
        why = "has a NUL character" if text else "is empty"  # which else is this folder
    elif "://" in text:
        why = "is an address"
    if why is not None:
        raise ConfigError(f"{name}={text!r} {why}; it may be a path on a disk")
    try:
        found = Path(text).expanduser()
    except RuntimeError as error:
        raise ConfigError(
            f"{name}={text!r} begins with a home that is not known; ~ alone is yours"
        ) from error
    try:
        found.stat()
    except (FileNotFoundError, NotADirectoryError):
        return found  # which whoever reads it finds, or makes
    except OSError as error:  # which Path.exists() raises or hides, by Python's version
        raise ConfigError(
            f"{name}={text!r} cannot be reached: {error.strerror}; it may be another path"
        ) from error
    return found


def _text_of(path: Any) -> str | None:
    """A path as a text; None of what is none, as bytes are."""
    text = os.fspath(path) if isinstance(path, str | os.PathLike) else None
    return text if isinstance(text, str) else None


def is_file_name(name: str) -> bool:
    """Whether a text is the name of one file in a folder, on any system."""
    is_one = Path(name).name == name and name not in ("", "..")
    return is_one and not {"\0", "\\"} & set(name)


def require_directory(path: Path, name: str) -> None:
    """Raises RunDirectoryError unless ``path`` is a directory or may become one.

    The error has the ``name`` of the setting or argument that gave the path.
    """
    if "\0" in str(path):
        raise RunDirectoryError(
            f"{name}={str(path)!r} cannot be a directory: it has a NUL character"
        )
    if path.parts[:1] in (("gs:",), ("s3:",)):
        scheme, rest = path.parts[0], "/".join(path.parts[1:])
        raise RunDirectoryError(
            f"{name}={scheme}//{rest} is in a bucket, which has no locks and no files to append "
            "records to; it may be a directory on a disk; training takes a bucket by --bucket"
        )
    with given_by(name, path), errors_as_one_line(path, "a directory"):
        try:
            (path / ("x" * ROOM_FOR_NAMES)).stat()
        except FileNotFoundError:
            return


def require_writable(path: AnyPath, name: str) -> None:
    """Raises RunDirectoryError unless ``path`` is a directory, or may become one, that takes files.

    The error has the ``name`` of the setting or argument that gave the path. Nothing is left
    behind: a file without a name is written there, or where ``path`` is to be made. A bucket is not
    tried.
    """
    if in_bucket(path):
        return
    require_directory(path, name)
    with given_by(name, path), errors_as_one_line(path, "written"):
        whole = path.absolute()
        there = next(folder for folder in (whole, *whole.parents) if folder.exists())
        with tempfile.TemporaryFile(dir=there) as file:  # permissions do not tell of a full disk
            file.write(bytes(PROBE_BYTES))
            file.flush()
            os.fsync(file.fileno())


def read_bytes(path: AnyPath) -> bytes:
    """The content of a file.

    Raises:
        RunDirectoryError: it cannot be read, or is a pipe or a device, which may never end.
    """
    with errors_as_one_line(path, "read"):
        if not in_bucket(path):
            kind = path.stat().st_mode
            if not (stat.S_ISREG(kind) or stat.S_ISDIR(kind)):
                raise OSError("it is a pipe or a device, and no file")
            return path.read_bytes()
        import fsspec

        # In one request, or a part would be of what another process has written meanwhile.
        return fsspec.filesystem("gcs").cat_file(str(path))


def read_json(path: AnyPath, schema: Any = Any) -> Any:
    """The content of a JSON file that fits a schema: an annotation as `settings.misfit` knows it.

    Raises:
        RunDirectoryError: it cannot be read, is not JSON, has a number that is not finite or a key
            twice, or does not fit; the text names the file and the place in it.
    """
    return decode(read_bytes(path), schema, named(path))


def read_lines(path: AnyPath, schema: Any = Any) -> list[Any]:
    """The lines of a file that has a JSON object a line, each checked as `read_json` does.

    What follows the last line break is a line that a kill has torn, and is left out. No file, no
    lines.
    """
    if not is_there(path):
        return []
    lines = read_bytes(path).split(b"\n")[:-1]
    return [decode(line, schema, f"{path}, line {n}") for n, line in enumerate(lines, start=1)]
