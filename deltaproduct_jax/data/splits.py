"""Which split a document belongs to: by what it says alone, or by the path of its file."""

import fnmatch
import hashlib
from collections.abc import Iterable

SPLITS = ("train", "valid", "test")


def split_of(data: bytes, valid_fraction: float, test_fraction: float) -> str:
    """The split of a document, from a hash of its bytes.

    A document and its copies are in one split, whatever file they stand in, whoever reads them.
    """
    digest = hashlib.blake2b(data, digest_size=8).digest()
    at = int.from_bytes(digest, "big") / 2**64
    if at < valid_fraction:
        return "valid"
    return "test" if at < valid_fraction + test_fraction else "train"


def names_inside(inside: str) -> tuple[str, str]:
    """What patterns see of a file, by its path in the folder that was given: mm/a.c and /mm/a.c.

    Where that folder lies decides nothing: one around it may be called as one that is held out.
    """
    return inside, f"/{inside}"


def matches(names: Iterable[str], patterns: Iterable[str]) -> bool:
    """Whether one of the names is as one of the patterns says."""
    patterns = tuple(patterns)
    return any(fnmatch.fnmatchcase(name, pattern) for name in names for pattern in patterns)
