"""What stands in a prepared directory's JSON files, and how they are read back."""

from pathlib import Path
from typing import Any, TypedDict

from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.files import is_file_name, named, read_json

MANIFEST = "manifest.json"
FORMAT = 1


class ShardFacts(TypedDict):
    """One shard: ``NAME.tokens.npy`` and ``NAME.offsets.npy``."""

    name: str
    documents: int
    tokens: int  # BOS counted
    bytes: int  # of the text
    sha256: dict[str, str]  # of each file


class SplitFacts(TypedDict):
    """One split: the sums of its shards."""

    documents: int
    tokens: int
    bytes: int
    shards: list[ShardFacts]


class TokenizerFacts(TypedDict):
    """The tokenizer, and the file that is a copy of it."""

    kind: str
    file: str | None
    sha256: str
    vocab_size: int
    bos_id: int


class SourceFacts(TypedDict):
    """One file that was read."""

    path: str
    inside: str  # its path in the folder that was given
    bytes: int
    sha256: str


class PlannedSource(SourceFacts):
    """One file that is to be read."""

    modified_ns: int


class Plan(TypedDict):
    """What a directory is being made of."""

    config: dict[str, Any]
    sources: list[PlannedSource]


class PieceRecord(TypedDict):
    """What one piece of the work has made: a shard by split, and counts."""

    shards: dict[str, ShardFacts]
    counts: dict[str, int]


class Manifest(TypedDict):
    """What a directory holds; it is written last."""

    format: int
    config: dict[str, Any]
    tokenizer: TokenizerFacts
    dtype: str
    counts: dict[str, int]
    splits: dict[str, SplitFacts]
    sources: list[SourceFacts]


def read_manifest(directory: Path) -> Manifest:
    """The manifest of a directory.

    Raises:
        RunDirectoryError: there is none, it is damaged, or another version wrote it.
    """
    path = directory / MANIFEST
    if not path.is_file():
        raise RunDirectoryError(
            f"{named(directory)} has no {MANIFEST}; experiments.prepare_text writes it when it is "
            "done"
        )
    version = read_json(path, dict[str, Any]).get("format")
    if version != FORMAT:
        raise RunDirectoryError(f"{path} has format={version!r}; this version reads {FORMAT}")
    manifest = read_json(path, Manifest)
    problem = _wrong_with(manifest)
    if problem is not None:
        raise RunDirectoryError(f"{path}: {problem}")
    return manifest


def _wrong_with(manifest: Manifest) -> str | None:
    """What says otherwise than the rest of it, or names what is not in its folder."""
    made = manifest["tokenizer"]
    if not 0 <= made["bos_id"] < made["vocab_size"]:
        return f"tokenizer.bos_id={made['bos_id']} must be below vocab_size={made['vocab_size']}"
    for split, said in manifest["splits"].items():
        place = f"splits.{split}"
        if not said["shards"]:
            return f"{place}.shards is empty; it must have one at least"
        for index, shard in enumerate(said["shards"]):
            if not is_file_name(shard["name"]):
                return f"{place}.shards[{index}].name={shard['name']!r} is no name of a shard here"
        for key in ("documents", "tokens", "bytes"):
            total = sum(shard[key] for shard in said["shards"])
            if said[key] != total:
                return f"{place}.{key}={said[key]} must be what its shards have, {total}"
    return None
