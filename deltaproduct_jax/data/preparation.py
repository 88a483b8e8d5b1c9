"""From files of text to tokens on disk: in parallel, and after a kill from where it stood.

The work is cut into pieces. A piece writes its shards, then its record; what has a record is not
done again. What a piece writes depends on its sources and the configuration alone, so neither the
number of workers nor a kill changes a byte. While work is under way it keeps its plan and records
in the folder ``.prepare``; the manifest appears last.
"""

import contextlib
import dataclasses
import functools
import os
import shutil
from collections import Counter
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from deltaproduct_jax.data import documents, resuming, tokenizer, workers
from deltaproduct_jax.data.config import PrepareConfig
from deltaproduct_jax.data.documents import Slice, Source
from deltaproduct_jax.data.manifest import (
    FORMAT,
    MANIFEST,
    Manifest,
    PieceRecord,
    Plan,
    PlannedSource,
    TokenizerFacts,
    read_manifest,
)
from deltaproduct_jax.data.shards import ShardWriter, digest, dtype_for, write_whole
from deltaproduct_jax.data.splits import SPLITS
from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.files import errors_as_one_line, given_by, read_json
from deltaproduct_jax.strict_json import to_json

if os.name != "nt":
    import fcntl

UNDER_WAY, CONFIG = ".prepare", "config.json"
_OTHER_TOKENIZER = "with tokenizer={!r}, a file that has changed since; give another --workdir"


def prepare(config: PrepareConfig, directory: Path) -> Manifest:
    """Turns the sources into tokens, or goes on where a killed call of the same stood.

    Args:
        config: what is prepared.
        directory: where to; created if need be. One that is done is not touched.

    Returns:
        The manifest, which the page beside this file describes.

    Raises:
        ConfigError: a source or the tokenizer cannot be used, or there is no document.
        RunDirectoryError: the directory holds something else, is in use, or cannot be written.
    """
    listed: Counter[str] = Counter()
    sources = documents.list_sources(config.sources, config.pattern, listed, without=directory)
    with _locked(directory):
        if not (directory / MANIFEST).exists():
            _prepare(config, sources, listed, directory)
        manifest = read_manifest(directory)
        difference = resuming.difference(manifest, config, sources, "bytes")
        now = tokenizer.file_of(config.tokenizer)  # one that is gone was read
        if difference is None and now and digest(now) != manifest["tokenizer"]["sha256"]:
            difference = _OTHER_TOKENIZER.format(config.tokenizer)
        if difference is not None:
            raise RunDirectoryError(f"{directory} was prepared {difference}")
        shutil.rmtree(directory / UNDER_WAY, ignore_errors=True)
        return manifest


def verify(directory: Path, processes: int) -> Manifest:
    """Reads every file of tokens in a directory that is done, and the tokenizer's, for its hash.

    Args:
        directory: what `prepare` made, or a copy of it.
        processes: how many files are read at once.

    Returns:
        The manifest.

    Raises:
        RunDirectoryError: it is not done, or a file is not there or not the one that was written;
            the first is named.
    """
    with given_by("workdir", directory):
        manifest = read_manifest(directory)
    shards = [shard for split in manifest["splits"].values() for shard in split["shards"]]
    files = [(s, f"{s['name']}.{what}.npy") for s in shards for what in ("tokens", "offsets")]
    said = {directory / file: shard["sha256"].get(file) for shard, file in files}
    sizes = []
    for path in said:
        with errors_as_one_line(path, "read"):
            sizes.append(path.stat().st_size)
    hashes = workers.run(digest, list(said), sizes, processes, "hashing", in_threads=True)
    wrong = [path for path, found in zip(said, hashes, strict=True) if found != said[path]]
    if wrong:
        more = f", and so are {len(wrong) - 1} more" if len(wrong) > 1 else ""
        raise RunDirectoryError(
            f"{wrong[0]} is damaged: its SHA-256 is not that of {MANIFEST}{more}; copy or prepare "
            "the tokens anew"
        )
    tokenizer.load_tokenizer(directory, manifest["tokenizer"])
    return manifest


def _prepare(
    config: PrepareConfig, sources: Sequence[Source], listed: Counter[str], directory: Path
) -> None:
    """All that is not done yet; the manifest last."""
    made = None
    if config.tokenizer != "bpe":  # one that cannot be opened shall leave nothing behind
        made = tokenizer.open_tokenizer(
            config.tokenizer, config.bos, known=("bytes", "bpe", "mistral")
        )
    plan = _plan(config, sources, directory)
    if made and _is_begun(directory) and not _is_kept(made, directory):
        difference = _OTHER_TOKENIZER.format(config.tokenizer)
        raise RunDirectoryError(f"{directory} was begun {difference}")
    try:
        made = _keep(made, directory) if made else _trained(config, sources, directory)
        records = _work(config, sources, made, directory)
        _refuse_changed(sources, plan)
    except ConfigError:
        if not _is_begun(directory):
            _forget(directory)
        raise
    manifest = _manifest(plan, made, records, listed)
    if not manifest["counts"]["documents"]:
        _forget(directory)
        raise ConfigError(
            f"sources={list(config.sources)} hold no document with text in "
            f"text_field={config.text_field!r}: {_spelled(manifest['counts'])}"
        )
    for name, content in ((CONFIG, {"data": plan["config"]}), (MANIFEST, manifest)):
        write_whole(directory / name, lambda file, content=content: file.write(to_json(content)))


@contextlib.contextmanager
def _locked(directory: Path) -> Iterator[None]:
    """One call at a time; the lock is the kernel's, on the folder itself, and dies with us."""
    is_new = not directory.exists()
    with errors_as_one_line(directory, "written"):
        directory.mkdir(parents=True, exist_ok=True)
    if os.name == "nt":  # which has no such lock
        yield
        return
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise RunDirectoryError(
                f"{directory} is being prepared by another process; wait for its end"
            ) from None
        yield
    finally:
        os.close(descriptor)
        if is_new:  # a call that was refused leaves nothing behind
            with contextlib.suppress(OSError):  # what has files stays
                directory.rmdir()


def _plan(config: PrepareConfig, sources: Sequence[Source], directory: Path) -> Plan:
    """What this directory is being made of, noted before anything else; hashes files once."""
    path = directory / UNDER_WAY / "plan.json"
    if path.exists():
        plan = read_json(path, Plan)
        difference = resuming.difference(plan, config, sources, "modified_ns")
        if difference is None:
            return plan
        if _is_begun(directory):
            raise RunDirectoryError(f"{directory} was begun {difference}")
        _forget(directory)  # nothing was done: another setting is a correction
    elif strangers := [*directory.glob("*.npy"), *directory.glob("tokenizer.*")]:
        raise RunDirectoryError(
            f"{directory} holds {strangers[0].name}, which no preparation under way wrote; "
            "give another --workdir"
        )
    config.require_held_out([source.inside for source in sources])
    entries: list[PlannedSource] = [
        {**dataclasses.asdict(source), "sha256": sha256}
        for source, sha256 in zip(sources, resuming.hashes_of(config, sources), strict=True)
    ]
    plan = {"config": config.identity(), "sources": entries}
    write_whole(path, lambda file: file.write(to_json(plan)))
    return plan


def _is_begun(directory: Path) -> bool:
    """Whether a piece is done."""
    return any((directory / UNDER_WAY).glob("[0-9]*.json"))


def _refuse_changed(sources: Sequence[Source], plan: Plan) -> None:
    """Raises RunDirectoryError if a source is not what was hashed; one that is gone was read."""
    for source, said in zip(sources, plan["sources"], strict=True):
        path = Path(source.path)
        if not path.exists():
            continue
        with errors_as_one_line(path, "read"):
            found = path.stat()
        is_touched = (found.st_size, found.st_mtime_ns) != (source.bytes, source.modified_ns)
        if is_touched and digest(path) != said["sha256"]:
            raise RunDirectoryError(
                f"{path} has changed while it was prepared; give another --workdir"
            )


def _forget(directory: Path) -> None:
    """Leaves a directory as it was before a preparation that has made nothing."""
    for path in directory.glob("tokenizer.*"):
        path.unlink()
    shutil.rmtree(directory / UNDER_WAY)


def _trained(
    config: PrepareConfig, sources: Sequence[Source], directory: Path
) -> tokenizer.Tokenizer:
    """The BPE, trained once."""
    path = directory / "tokenizer.json"
    if path.exists():
        return tokenizer.HuggingFaceTokenizer(path.read_bytes(), str(path), tokenizer.BOS)
    return _keep(tokenizer.train_bpe(_sample(config, sources), config.bpe_size), directory)


def _is_kept(made: tokenizer.Tokenizer, directory: Path) -> bool:
    name = tokenizer.FILES[made.kind]
    if name is None:
        return True
    return (directory / name).exists() and (directory / name).read_bytes() == made.data


def _keep(made: tokenizer.Tokenizer, directory: Path) -> tokenizer.Tokenizer:
    """Writes a copy of a tokenizer."""
    name = tokenizer.FILES[made.kind]
    if name is not None:
        write_whole(directory / name, lambda file: file.write(made.data))
    return made


def _sample(config: PrepareConfig, sources: Sequence[Source]) -> Iterator[str]:
    """Training documents from the beginning of every piece, as many bytes of each."""
    pieces = documents.plan_pieces(sources, config.shard_bytes)
    budget = config.bpe_bytes
    for piece in pieces:
        left = -(-budget // len(pieces))
        for split, text in _documents(config, piece, Counter()):
            if split == "train":
                yield text[:left]
                left -= len(text.encode())
            if left <= 0:
                break


def _documents(
    config: PrepareConfig, piece: Sequence[Slice], counts: Counter[str]
) -> Iterator[tuple[str, str]]:
    for part in piece:
        for text in documents.read(part, config.text_field, counts):
            yield config.split_of(part.inside, text), text


def _work(
    config: PrepareConfig,
    sources: Sequence[Source],
    made: tokenizer.Tokenizer,
    directory: Path,
) -> list[PieceRecord]:
    """Does what has no record yet; the records of all pieces, in order."""
    pieces = list(enumerate(documents.plan_pieces(sources, config.shard_bytes)))
    missing = [piece for piece in pieces if not _record(directory, piece[0]).exists()]
    sizes = [sum(part.weight for part in piece) for _, piece in missing]
    do = functools.partial(_do_piece, config, directory, tokenizer.describe(made))
    workers.run(do, missing, sizes, config.processes, "tokenizing")
    return [read_json(_record(directory, index), PieceRecord) for index, _ in pieces]


def _record(directory: Path, index: int) -> Path:
    return directory / UNDER_WAY / f"{index:05d}.json"


@functools.lru_cache(1)
def _encoder(directory: Path, said: tuple[tuple[str, Any], ...]):
    """The tokenizer of a worker process, which is read once."""
    return tokenizer.encoder(tokenizer.load_tokenizer(directory, dict(said)))


def _do_piece(
    config: PrepareConfig,
    directory: Path,
    said: TokenizerFacts,
    numbered: tuple[int, Sequence[Slice]],
) -> None:
    """Tokenizes one piece: a shard for every split that has documents there, then the record."""
    index, piece = numbered
    encode = _encoder(directory, tuple(said.items()))
    counts: Counter[str] = Counter()
    writers = {s: ShardWriter(dtype_for(said["vocab_size"]), said["bos_id"]) for s in SPLITS}
    for split, text in _documents(config, piece, counts):
        writers[split].add(encode(text), len(text.encode()))
        counts["documents"] += 1
        counts["long"] += len(text) > tokenizer.STRETCH
    shards = {
        split: writer.write(directory, f"{split}-{index:05d}")
        for split, writer in writers.items()
        if writer.num_documents
    }
    record: PieceRecord = {"shards": shards, "counts": dict(counts)}
    write_whole(_record(directory, index), lambda file: file.write(to_json(record)))


def _manifest(
    plan: Plan, made: tokenizer.Tokenizer, records: Sequence[PieceRecord], listed: Counter[str]
) -> Manifest:
    found = [listed, *(r["counts"] for r in records)]
    counts = {name: sum(c.get(name, 0) for c in found) for name in COUNTS}
    splits = {}
    for split in SPLITS:
        shards = [r["shards"][split] for r in records if split in r["shards"]]
        sums = {
            name: sum(shard[name] for shard in shards) for name in ("documents", "tokens", "bytes")
        }
        if shards:
            splits[split] = sums | {"shards": shards}
    return {
        "format": FORMAT,
        "config": plan["config"],
        "tokenizer": tokenizer.describe(made),
        "dtype": dtype_for(made.vocab_size).name,
        "counts": counts,
        "splits": splits,
        "sources": [
            {key: value for key, value in source.items() if key != "modified_ns"}
            for source in plan["sources"]
        ],
    }


COUNTS = ("documents", "long", "empty", "null", "malformed", "invalid_utf8", "no_file")


def _spelled(counts: dict[str, int]) -> str:
    return ", ".join(f"{name} {count}" for name, count in counts.items())


def summary(manifest: Manifest) -> str:
    """The counts as a table."""
    lines = ["split  documents        tokens         bytes  bytes/token"]
    for split, said in manifest["splits"].items():
        lines.append(
            f"{split:<5}{said['documents']:>11,}{said['tokens']:>14,}{said['bytes']:>14,}"
            f"{said['bytes'] / said['tokens']:>13.3f}"
        )
    return "\n".join([*lines, _spelled(manifest["counts"])])
