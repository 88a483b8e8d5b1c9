"""What of a list of parameters runs in the ordinary tests; the rest is slow."""

from collections.abc import Container, Iterable

import pytest


def quick(values: Iterable, kept: Container) -> list:
    """Parameters, of which those that are not ``kept`` are marked slow."""
    return [
        value if value in kept else pytest.param(value, marks=pytest.mark.slow) for value in values
    ]
