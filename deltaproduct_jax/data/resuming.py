"""Whether a preparation is the one that a folder of tokens holds or is being made of."""

from collections.abc import Sequence
from pathlib import Path

from deltaproduct_jax.data import workers
from deltaproduct_jax.data.config import PrepareConfig
from deltaproduct_jax.data.documents import Source
from deltaproduct_jax.data.manifest import Manifest, Plan
from deltaproduct_jax.data.shards import digest


def difference(
    found: Plan | Manifest, config: PrepareConfig, sources: Sequence[Source], measure: str
) -> str | None:
    """What keeps one preparation from being another; two are not mixed in one directory.

    Sources may have been moved: the same files, by their hashes, are the same at other paths.

    Args:
        found: what a directory holds.
        config: what is to be prepared.
        sources: its files.
        measure: the field of a source, beside its path, by which it is known.
    """
    text = _difference(found, config, sources, measure)
    return None if text is None or _are_moved(found, config, sources) else text


def _difference(
    found: Plan | Manifest, config: PrepareConfig, sources: Sequence[Source], measure: str
) -> str | None:
    for name, value in config.identity().items():
        if found["config"].get(name) != value:
            return (
                f"with {name}={found['config'].get(name)!r}, not {value!r}; give another --workdir"
            )
    now = [(source.path, getattr(source, measure)) for source in sources]
    if [(source["path"], source[measure]) for source in found["sources"]] != now:
        return "from other sources, or they have changed since; give another --workdir"
    return None


def _are_moved(found: Plan | Manifest, config: PrepareConfig, sources: Sequence[Source]) -> bool:
    """Whether the sources are those of another preparation, at other paths: the same hashes.

    All that a path says to a preparation, the kind of the file and its split, must be the same too.
    """
    if {**found["config"], "sources": None} != {**config.identity(), "sources": None}:
        return False
    then = found["sources"]
    if [source["bytes"] for source in then] != [source.bytes for source in sources]:
        return False
    for said, source in zip(then, sources, strict=True):
        before = Source(said["path"], source.bytes, source.modified_ns, "")
        if before.kind != source.kind:
            return False
        if config.split_of_path(said["inside"]) != config.split_of_path(source.inside):
            return False
    return hashes_of(config, sources) == [source["sha256"] for source in then]


def hashes_of(config: PrepareConfig, sources: Sequence[Source]) -> list[str]:
    """The SHA-256 of every file."""
    names, sizes = [Path(s.path) for s in sources], [s.bytes for s in sources]
    return workers.run(digest, names, sizes, config.processes, "hashing", in_threads=True)
