"""Which split a document belongs to, by what it says alone."""

import hashlib

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
