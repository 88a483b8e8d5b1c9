"""Archives that tar reads: one line for what is none, is damaged, or ends too early."""

import bz2
import contextlib
import gzip
import lzma
import tarfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import IO

from deltaproduct_jax.errors import ConfigError

BROKEN = (OSError, EOFError, tarfile.TarError, lzma.LZMAError, zlib.error)


class _Member(tarfile.TarInfo):
    """A member of an archive, which knows when the archive's own end has been met.

    An archive that was cut short between two members is else read as one that ends there.
    """

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Member":
        """The next member."""
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:
            archive.has_ended = True
            raise


FORMATS = {b"\x1f\x8b": gzip.open, b"BZh": bz2.open, b"\xfd7zXZ": lzma.open, b"]\0\0": lzma.open}


def _decompressed(path: Path) -> IO[bytes]:
    """What is in a file, however it is compressed; tar's own stream of gzip checks no checksum."""
    with open(path, "rb") as file:
        start = file.read(6)
    return next((reader for magic, reader in FORMATS.items() if start.startswith(magic)), open)(
        path, "rb"
    )


@contextlib.contextmanager
def opened(path: Path, name: str) -> Iterator[tarfile.TarFile]:
    """An archive, of which all members are to be read, in turn; compressed in any way.

    Args:
        path: of the archive.
        name: of the setting that gave it.

    Raises:
        ConfigError: it is no archive, cannot be read, or not to its end.
    """
    try:
        if not path.is_file():  # a pipe may never end
            path.stat()
            raise tarfile.ReadError("it is no file")
        with (
            _decompressed(path) as file,
            tarfile.open(fileobj=file, mode="r|", tarinfo=_Member) as archive,
        ):
            archive.has_ended = False
            yield archive
            if not archive.has_ended:
                raise tarfile.ReadError("it ends too early")
            while file.read(1 << 20):  # the checksum of what was read stands behind it
                pass
    except ConfigError:  # of whoever reads it
        raise
    # What a member says of itself ends in the last two: a link to what is not there, a size.
    except (*BROKEN, KeyError, ValueError) as error:
        said = error.args[0] if isinstance(error, KeyError) else error
        reason = getattr(error, "strerror", None) or said
        raise ConfigError(f"{name}={str(path)!r} cannot be read: {reason}") from error
