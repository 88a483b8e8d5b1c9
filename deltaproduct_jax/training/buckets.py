"""Where the checkpoints of a run and copies of its records go, if its processes share no disk.

Orbax saves from all processes straight into the bucket. Records are written on the disk of the
first process, as ever, and copied before a checkpoint is begun, so that none is ever ahead of
them: a run that starts with an empty workdir takes them from the bucket and goes on as on a disk.
A directory that all processes share may take the bucket's place.

Nobody can lock a bucket. Each start of a run leaves its name there instead, and who finds another
name stops before it writes: of two runs at once the one that was started last goes on.
"""

import os
import platform
import sys
import time
import uuid
from collections.abc import Iterable
from pathlib import Path
from typing import TypedDict

import jax

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.files import (
    AnyPath,
    any_path,
    errors_as_one_line,
    given_by,
    is_there,
    read_bytes,
    read_json,
    require_bucket,
    require_directory,
    write_file,
)
from deltaproduct_jax.strict_json import to_json

OWNER = "owner.json"
COPIED = (".json", ".jsonl")


class _Owner(TypedDict):
    id: str
    process: int
    host: str
    time: str


class Bucket:
    """A folder in a bucket, or on a disk that all processes share, for one run.

    Only the first process writes there by what follows.

    Args:
        path: of the folder.

    Raises:
        RunDirectoryError: it cannot be read or written, or another process has taken it over.
    """

    def __init__(self, path: AnyPath):
        self.path = path
        self._id = uuid.uuid4().hex

    def take_over(self) -> None:
        """Makes this process the one that may write."""
        if jax.process_index() != 0:
            return
        if is_there(self.path / OWNER):
            before = _in_words(self._owner())
            print(
                f"{self.path}: taken over from {before}, which stops before its next checkpoint "
                "if it still runs",
                file=sys.stderr,
                flush=True,
            )
        now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        owner = _Owner(id=self._id, process=os.getpid(), host=platform.node(), time=now)
        write_file(self.path / OWNER, to_json(owner))

    def _owner(self) -> _Owner:
        return read_json(self.path / OWNER, _Owner)

    def _require_own(self) -> None:
        owner = self._owner()
        if owner["id"] != self._id:
            raise RunDirectoryError(
                f"{self.path} was taken over by {_in_words(owner)}, so this run stops; all that it "
                "saved is kept there. To take it over, end that process and give this command again"
            )

    def put(self, directory: Path, names: Iterable[str]) -> None:
        """Copies files of ``directory`` that are there, in this order."""
        if jax.process_index() != 0:
            return
        self._require_own()
        for name in names:
            if (directory / name).exists():
                write_file(self.path / name, read_bytes(directory / name))

    def drop(self, name: str) -> None:
        """Removes a file whose content is there by another name."""
        if jax.process_index() == 0 and is_there(self.path / name):
            self._require_own()
            with errors_as_one_line(self.path / name, "removed"):
                (self.path / name).unlink()

    def names(self) -> list[str]:
        """The files that were copied, by name."""
        with errors_as_one_line(self.path, "read"):
            names = [path.name for path in self.path.iterdir()]
        return sorted(n for n in names if Path(n).suffix in COPIED and n != OWNER and n[0] != ".")

    def get(self, directory: Path) -> None:
        """Copies all files to ``directory``, over those of the same name."""
        for name in self.names():
            write_file(directory / name, read_bytes(self.path / name))


def open_bucket(text: str, workdir: Path) -> Bucket:
    """The bucket of a run; nothing is written.

    Args:
        text: gs://BUCKET/FOLDER, or a directory.
        workdir: of the run.

    Raises:
        ConfigError: it is no such path, is the workdir, or needs a package.
        RunDirectoryError: it is not there, or not for this account.
    """
    path = any_path(text, "bucket")
    if isinstance(path, Path):
        require_directory(path, "bucket")
        if path.absolute() == workdir.absolute():
            raise ConfigError(
                f"bucket={text} is the workdir, where all is saved without it; give another folder"
            )
    with given_by("bucket", path):
        require_bucket(path)
    return Bucket(path)


def _in_words(owner: _Owner) -> str:
    return f"process {owner['process']} on {owner['host']}, started at {owner['time']}"
