"""What a mesh changes about a program while it is traced: set above, read by the op and by blocks.

Layers and models know nothing of meshes. Whoever trains over one says here, for the time of a
trace, how the op is spread over it and what a block does to its parameters before it runs.
"""

import contextlib
import contextvars
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple


class Placement(NamedTuple):
    """How a model that is being traced lies on a mesh.

    Attributes:
      op: what `delta_product` calls instead of itself, with its own arguments.
      block: (block of a model, its input [B, T, D]) -> both as they are to be used.
    """

    op: Callable[..., tuple[Any, Any]]
    block: Callable[[Any, Any], tuple[Any, Any]]


_CURRENT: contextvars.ContextVar[Placement | None] = contextvars.ContextVar("placement")


def current() -> Placement | None:
    """The placement of what is being traced, None on one device and within one device's piece."""
    return _CURRENT.get(None)


@contextlib.contextmanager
def placed(placement: Placement | None) -> Iterator[None]:
    """Inside, what is traced lies as ``placement`` says.

    It is to be entered inside the function that `jax.jit` traces: a program found again does not
    look here.
    """
    token = _CURRENT.set(placement)
    try:
        yield
    finally:
        _CURRENT.reset(token)
