"""Documents in files: text, JSON lines and Parquet, cut into pieces that are read one by one.

What cannot be read as a document is counted and left out; what can be put right is counted too:

- ``null``: the field is missing or null;
- ``malformed``: a line that is no JSON object, or a field that is no text;
- ``empty``: text without a character;
- ``invalid_utf8``: bytes that are no UTF-8 were replaced by U+FFFD;
- ``no_file``: a name that matches and is no file, such as a link to nowhere.
"""

import contextlib
import dataclasses
import fnmatch
import json
import os
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NoReturn

from deltaproduct_jax.errors import ConfigError, require_package
from deltaproduct_jax.files import errors_as_one_line, user_path

KINDS = {".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "jsonl", ".parquet": "parquet"}
COMPRESSED = (".gz", ".zst", ".bz2", ".xz", ".zip", ".lz4")
MOST_PIECES = 100_000
BYTE_ORDER_MARK = "\ufeff"  # which some programs put before the text of a file
ROWS_AT_ONCE = 64  # of a Parquet file: few, since a single one may be gigantic


@dataclasses.dataclass(frozen=True)
class Source:
    """A file: its name as the user wrote it, its size, when it was last written, and its path in
    the folder that was given, which is its name where it was given itself."""

    path: str
    bytes: int
    modified_ns: int
    inside: str

    @property
    def kind(self) -> str:
        """``text`` (one document), ``jsonl`` or ``parquet``."""
        return KINDS.get(Path(self.path).suffix.lower(), "text")


@dataclasses.dataclass(frozen=True)
class Slice:
    """A part of a file: bytes of text or JSON lines, row groups of Parquet."""

    path: str
    inside: str
    kind: str
    start: int
    stop: int
    weight: int  # bytes that it is about, for the size of pieces and the progress bar


def list_sources(
    paths: Sequence[str],
    patterns: Sequence[str],
    counts: Counter[str] | None = None,
    *,
    without: Path | None = None,
) -> list[Source]:
    """Every file once: those named, and those in the folders named whose name matches a pattern.

    What matches and is no file, such as a link to nowhere, is noted in ``counts`` as ``no_file``.
    Links to folders are not followed. The folder ``without``, where what is made of the files goes,
    is no part of a folder that it is in.

    Raises:
        ConfigError: a path is not there or compressed, a folder cannot be read, or no file is left.
    """
    if not paths or not all(paths):
        raise ConfigError("sources is empty; give --sources=FILE_OR_FOLDER, as often as you like")
    found: dict[Path, Source] = {}
    without = without and without.resolve()
    counts = Counter() if counts is None else counts
    for path in (user_path(given, "sources") for given in paths):
        if not path.exists():
            raise ConfigError(f"sources={str(path)!r} is not there; it must be a file or a folder")
        for file in _matches(path, patterns, without):
            if not file.is_file():
                counts["no_file"] += 1
                continue
            if file.suffix.lower() in COMPRESSED:
                raise ConfigError(f"sources: {file} is compressed; unpack it first")
            if not _is_utf8(file):
                raise ConfigError(f"sources: the name of {str(file)!r} is no UTF-8; rename it")
            stat = file.stat()
            inside = file.relative_to(path) if file != path else Path(file.name)
            source = Source(file.as_posix(), stat.st_size, stat.st_mtime_ns, inside.as_posix())
            found.setdefault(file.resolve(), source)
    if not found:
        raise ConfigError(
            f"sources={list(paths)} hold no file that matches pattern={','.join(patterns)}"
        )
    return list(found.values())


def _is_utf8(path: Path) -> bool:
    try:
        return bool(str(path).encode())
    except UnicodeEncodeError:
        return False


def _matches(path: Path, patterns: Sequence[str], without: Path | None) -> list[Path]:
    if not path.is_dir():
        return [path]
    found = []
    for folder, folders, names in os.walk(path, onerror=_refuse):
        if without is not None and without.name in folders:
            folders[:] = [f for f in folders if Path(folder, f).resolve() != without]
        found += [
            Path(folder, name)
            for name in names
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in patterns)
        ]
    return sorted(found, key=Path.as_posix)


def _refuse(error: OSError) -> NoReturn:
    """A folder without its files would be a part of the text that is missing without a word."""
    raise ConfigError(f"sources: {error.filename} cannot be read: {error.strerror}") from error


def plan_pieces(sources: Iterable[Source], piece_bytes: int) -> list[tuple[Slice, ...]]:
    """Cuts large files and gathers small ones, in order, to pieces of about ``piece_bytes``.

    Raises:
        ConfigError: there are more than `MOST_PIECES`, or a Parquet file cannot be read.
    """
    pieces: list[tuple[Slice, ...]] = []
    waiting: list[Slice] = []
    weight = 0
    for source in sources:
        for part in _slices(source, piece_bytes):
            waiting.append(part)
            weight += part.weight
            if weight >= piece_bytes:
                pieces.append(tuple(waiting))
                waiting, weight = [], 0
            if len(pieces) > MOST_PIECES:
                raise ConfigError(
                    f"shard_bytes={piece_bytes} makes more than {MOST_PIECES:,} shards of these "
                    "sources; give a larger one"
                )
    return [*pieces, tuple(waiting)] if waiting else pieces


def _slices(source: Source, piece_bytes: int) -> Iterator[Slice]:
    kind, size = source.kind, source.bytes
    at = source.path, source.inside, kind
    if kind == "text":
        yield Slice(*at, 0, size, size)
    elif kind == "jsonl":
        for start in range(0, size, piece_bytes):
            stop = min(start + piece_bytes, size)
            yield Slice(*at, start, stop, stop - start)
    else:
        yield from _row_groups(source, piece_bytes)


def _row_groups(source: Source, piece_bytes: int) -> Iterator[Slice]:
    metadata = _parquet(source.path).metadata
    start = weight = 0
    for group in range(metadata.num_row_groups):
        weight += metadata.row_group(group).total_byte_size
        if weight >= piece_bytes or group + 1 == metadata.num_row_groups:
            yield Slice(source.path, source.inside, "parquet", start, group + 1, weight)
            start, weight = group + 1, 0


def _parquet(path: str) -> Any:
    parquet = require_package("pyarrow.parquet", f"sources: {path}", "data")
    with _errors_of_parquet(path):
        return parquet.ParquetFile(path, memory_map=True, page_checksum_verification=True)


@contextlib.contextmanager
def _errors_of_parquet(path: str) -> Iterator[None]:
    arrow = require_package("pyarrow", f"sources: {path}", "data")
    try:
        yield
    except (arrow.ArrowException, OSError) as error:
        reason = str(error).partition("\n")[0]
        raise ConfigError(f"sources: {path} cannot be read as Parquet: {reason}") from error


def read(part: Slice, text_field: str, counts: Counter[str]) -> Iterator[str]:
    """The documents of a slice, in order, none empty; notes in ``counts`` what was wrong.

    Raises:
        ConfigError: a Parquet file without the column ``text_field``, or with another type there.
        RunDirectoryError: a file cannot be read.
    """
    readers = {"text": _read_text, "jsonl": _read_lines, "parquet": _read_rows}
    for text in readers[part.kind](part, text_field, counts):
        if text:
            yield text
        else:
            counts["empty"] += 1


def _read_text(part: Slice, text_field: str, counts: Counter[str]) -> Iterator[str]:
    with errors_as_one_line(Path(part.path), "read"):
        data = Path(part.path).read_bytes()
    yield _decode(data, counts).removeprefix(BYTE_ORDER_MARK)


def _read_lines(part: Slice, text_field: str, counts: Counter[str]) -> Iterator[str]:
    """Lines that begin in the slice, wherever they end."""
    for line in _lines_from(part):
        decoded = _decode(line, counts).removeprefix(BYTE_ORDER_MARK)
        text = _field_of(decoded, text_field, counts) if decoded.strip() else None
        if text is not None:
            yield _without_surrogates(text, counts)


def _lines_from(part: Slice) -> Iterator[bytes]:
    with errors_as_one_line(Path(part.path), "read"), open(part.path, "rb") as file:
        if part.start:
            file.seek(part.start - 1)
            file.readline()  # the rest of a line that began in the slice before
        while file.tell() < part.stop and (line := file.readline()):
            yield line


def _field_of(line: str, text_field: str, counts: Counter[str]) -> str | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        counts["malformed"] += 1
        return None
    text = entry.get(text_field) if isinstance(entry, dict) else entry
    if isinstance(entry, dict) and (text is None or isinstance(text, str)):
        counts["null"] += text is None
        return text
    counts["malformed"] += 1
    return None


def _read_rows(part: Slice, text_field: str, counts: Counter[str]) -> Iterator[str]:
    arrow = require_package("pyarrow", f"sources: {part.path}", "data")
    file = _parquet(part.path)
    columns = file.schema_arrow.names
    if text_field not in columns:
        raise ConfigError(
            f"text_field={text_field!r} is no column of {part.path}; it may be one of {columns}"
        )
    groups = range(part.start, part.stop)
    batches = file.iter_batches(ROWS_AT_ONCE, row_groups=groups, columns=[text_field])
    while True:
        with _errors_of_parquet(part.path):  # of a page that is damaged
            batch = next(batches, None)
        if batch is None:
            return
        column = batch.column(0)
        if arrow.types.is_dictionary(column.type):
            column = column.dictionary_decode()
        try:
            # As bytes: Parquet promises UTF-8 and files break that promise.
            values = column.cast(arrow.large_binary())
        except (arrow.ArrowInvalid, arrow.ArrowNotImplementedError) as error:
            raise ConfigError(
                f"text_field={text_field!r} of {part.path} holds {column.type}; it must be text"
            ) from error
        for value in values:
            data = value.as_py()
            counts["null"] += data is None
            if data is not None:
                yield _decode(data, counts)


def _decode(data: bytes, counts: Counter[str]) -> str:
    try:
        return data.decode()
    except UnicodeDecodeError:
        counts["invalid_utf8"] += 1
        return data.decode(errors="replace")


def _without_surrogates(text: str, counts: Counter[str]) -> str:
    """JSON can spell half of a surrogate pair, which no encoding can write."""
    try:
        text.encode()
    except UnicodeEncodeError:
        counts["invalid_utf8"] += 1
        return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
    return text
