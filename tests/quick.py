"""What of a list of parameters runs in the ordinary tests; the rest is slow."""

from collections.abc import Container, Iterable

import pytest


def quick(values: Iterable, kept: Container, *, unpack: bool = False) -> list:
    """Parameters, of which those that are not ``kept`` are marked slow.

    ``unpack``: each is a tuple, of a value for every argument.
    """
    slow = lambda value: pytest.param(*(value if unpack else [value]), marks=pytest.mark.slow)
    return [value if value in kept else slow(value) for value in values]
