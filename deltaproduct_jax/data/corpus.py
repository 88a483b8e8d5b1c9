"""The tokens of one split, read through memory maps."""

import bisect
import functools
import hashlib
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from deltaproduct_jax.data.manifest import MANIFEST, ShardFacts, read_manifest
from deltaproduct_jax.data.tokenizer import identity
from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.files import given_by, user_path

# Every map keeps a file open, of which a process may often have 1,024.
MAPS_OPEN = 512


class Corpus:
    """Documents of one split, one after another; the token that begins each is ``bos_id``.

    Attributes:
        name: where it comes from, as a user wrote it.
        offsets: [documents + 1] int64, where documents begin, and where the last ends.
        tokenizer: `tokenizer.identity` of what made the ids; alike where they mean the same.
        vocab_size: ids are below it.
        bos_id: the token that begins every document.
        num_bytes: of the text, for bits per byte.
        fingerprint: of the tokens and the tokenizer; another place does not change it.
    """

    def __init__(
        self,
        name: str,
        shards: Sequence[Callable[[], np.ndarray]],
        offsets: Sequence[np.ndarray],
        *,
        tokenizer: str,
        vocab_size: int,
        bos_id: int,
        num_bytes: int,
        fingerprint: str,
    ):
        self.name = name
        self.tokenizer, self.vocab_size, self.bos_id = tokenizer, vocab_size, bos_id
        self.num_bytes, self.fingerprint = num_bytes, fingerprint
        sizes = np.array([part[-1] for part in offsets], np.int64)
        bases = np.cumsum(sizes) - sizes
        ends = [part[1:] + base for part, base in zip(offsets, bases, strict=True)]
        self.offsets = np.concatenate([np.zeros(1, np.int64), *ends])
        self._bases = bases.tolist()
        self._shard = functools.lru_cache(MAPS_OPEN)(lambda index: shards[index]())

    @property
    def num_tokens(self) -> int:
        """Tokens, BOS counted."""
        return int(self.offsets[-1])

    @property
    def lengths(self) -> np.ndarray:
        """[documents] int64, tokens of each, BOS counted."""
        return np.diff(self.offsets)

    def read(self, start: int, out: np.ndarray) -> None:
        """Fills ``out`` with the tokens from ``start`` on, which must be of one document.

        Raises:
            RunDirectoryError: one is no token of the tokenizer; to a model it would be NaN.
        """
        shard = bisect.bisect_right(self._bases, start) - 1
        start -= self._bases[shard]
        tokens = self._shard(shard)[start : start + len(out)]
        most = int(tokens.max(initial=0))  # before they are made wide, which takes longer
        if most >= self.vocab_size:
            raise RunDirectoryError(
                f"{self.name} is damaged: it has token {most}, and its tokenizer "
                f"{self.vocab_size} tokens; experiments.prepare_text --verify names the file"
            )
        out[:] = tokens

    def document(self, index: int) -> np.ndarray:
        """The tokens of one document, int32."""
        start, stop = self.offsets[index : index + 2].tolist()
        out = np.empty(stop - start, np.int32)
        self.read(start, out)
        return out


def open_corpus(directory: str | Path, split: str) -> Corpus:
    """Opens one split of a directory that `prepare` made.

    Raises:
        ConfigError: it has no such split.
        RunDirectoryError: it was not prepared to the end, or its files are not what they were.
    """
    directory = user_path(directory, "directory")
    with given_by("directory", directory):
        manifest = read_manifest(directory)
    if split not in manifest["splits"]:
        more = f"a larger {split}_fraction or {split}_paths there holds out more"
        if split == "train":
            more = "smaller fractions and fewer paths there hold out less"
        raise ConfigError(
            f"{directory} has no split {split!r}; it has {', '.join(manifest['splits'])}, as "
            f"fractions and paths of experiments.prepare_text had it; {more}"
        )
    said, tokenizer = manifest["splits"][split], manifest["tokenizer"]
    names = [shard["name"] for shard in said["shards"]]
    opened = [functools.partial(_map, directory / f"{name}.tokens.npy", "u") for name in names]
    offsets = [np.array(_map(directory / f"{name}.offsets.npy", "i")) for name in names]
    for shard, of_shard, tokens in zip(said["shards"], offsets, opened, strict=True):
        found = tokens()
        is_said = (found.dtype.name, len(found)) == (manifest["dtype"], shard["tokens"])
        if not (is_said and _has_documents(of_shard, shard)):
            raise RunDirectoryError(f"{directory / shard['name']} is not what {MANIFEST} says")
    hashes = [
        tokenizer["sha256"],
        *(h for shard in said["shards"] for h in shard["sha256"].values()),
    ]
    return Corpus(
        str(directory),
        opened,
        offsets,
        tokenizer=identity(tokenizer),
        vocab_size=tokenizer["vocab_size"],
        bos_id=tokenizer["bos_id"],
        num_bytes=said["bytes"],
        fingerprint=hashlib.sha256("".join(hashes).encode()).hexdigest(),
    )


def _has_documents(offsets: np.ndarray, said: ShardFacts) -> bool:
    """Whether a shard's offsets are those of as many documents and tokens; each has one at least.

    What is on a disk may be damaged, and a document that ends before it begins is not read.
    """
    ends = (0, said["tokens"])
    is_long = len(offsets) == said["documents"] + 1 > 0
    return is_long and (offsets[0], offsets[-1]) == ends and bool(np.all(np.diff(offsets) > 0))


def _map(path: Path, kind: str) -> np.ndarray:
    """A file's array of one axis, whose dtype is of a kind as NumPy names it."""
    try:
        mapped = np.load(path, mmap_mode="r")
        size, wanted = path.stat().st_size, mapped.offset + mapped.nbytes
    except Exception as error:  # what a damaged header ends in is NumPy's affair
        raise RunDirectoryError(f"{path} cannot be read: {str(error) or repr(error)}") from error
    if mapped.ndim != 1 or mapped.dtype.kind != kind:
        found = f"{mapped.dtype.name}{list(mapped.shape)}"
        raise RunDirectoryError(f"{path} is damaged: it has {found}")
    if size != wanted:
        raise RunDirectoryError(f"{path} is damaged: it has {size} bytes, and its array {wanted}")
    # As a plain array: slices of np.memmap cost several times as much.
    return mapped.view(np.ndarray)
