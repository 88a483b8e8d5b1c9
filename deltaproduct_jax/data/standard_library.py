"""A text that every machine has: the sources of Python's standard library, as bytes."""

import functools
import hashlib
import os
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from deltaproduct_jax.data.corpus import Corpus
from deltaproduct_jax.data.shards import ShardWriter
from deltaproduct_jax.data.splits import SPLITS, split_of
from deltaproduct_jax.data.tokenizer import ByteTokenizer, describe, identity
from deltaproduct_jax.errors import require_one_of

NAME = "stdlib"
HELD_OUT = 0.05  # of the files, in each of the two other splits
# Packages of others, and tests, which some distributions leave out.
LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idle_test", "__pycache__"}


@functools.cache
def standard_library(split: str, folder: Path | None = None) -> Corpus:
    """One split of the sources, a file a document, about 13 million bytes in all.

    Args:
        split: ``train``, ``valid`` or ``test``; a file is in one of them by a hash of its bytes.
        folder: another folder of ``.py`` files than this Python's.
    """
    require_one_of("split", split, SPLITS)
    folder = folder or Path(sysconfig.get_path("stdlib"))
    tokenizer = ByteTokenizer()
    shard = ShardWriter(np.dtype(np.uint16), tokenizer.bos_id)
    for path in sorted(_sources(folder)):
        data = path.read_bytes()
        if data and split_of(data, HELD_OUT, HELD_OUT) == split:
            shard.add([data], len(data))
    tokens, offsets = shard.arrays()
    return Corpus(
        NAME,
        [lambda: tokens],
        [offsets],
        tokenizer=identity(describe(tokenizer)),
        vocab_size=tokenizer.vocab_size,
        bos_id=tokenizer.bos_id,
        num_bytes=shard.num_bytes,
        fingerprint=hashlib.sha256(tokens).hexdigest(),
    )


def _sources(folder: Path) -> Iterator[Path]:
    for path, folders, files in os.walk(folder):
        folders[:] = set(folders) - LEFT_OUT  # which are not looked into
        found = (Path(path, name) for name in files if name.endswith(".py"))
        yield from filter(Path.is_file, found)  # and no link to nowhere
