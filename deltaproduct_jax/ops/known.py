"""What whoever traces a program has seen to, so that the op need not look for it again."""

import contextlib
import contextvars
from collections.abc import Iterator

_KNOWN_FINITE: contextvars.ContextVar[bool] = contextvars.ContextVar("known_finite", default=False)


def is_known_finite() -> bool:
    """Whether what is being traced has finite operands, as whoever calls has seen to it."""
    return _KNOWN_FINITE.get()


@contextlib.contextmanager
def known_finite() -> Iterator[None]:
    """Inside, the op need not look at its operands, only at their cotangents.

    It is to be entered where a trace begins and ends: a program found again does not look here. An
    operand that overflows all the same may then spread in its row, as a state that does.
    """
    token = _KNOWN_FINITE.set(True)
    try:
        yield
    finally:
        _KNOWN_FINITE.reset(token)
