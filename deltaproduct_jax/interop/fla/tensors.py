"""Parameters of ours beside tensors of theirs: one table, the same for every model type.

Names are theirs already, but for what a tensor of a module is called; torch stores a linear map as
``[out, in]``, and taps of a convolution as ``[channels, 1, taps]``.
"""

import re
from collections.abc import Callable, Iterable
from typing import NamedTuple

import numpy as np

Path = tuple[str | int, ...]
Shape = tuple[int, ...]


class Turn(NamedTuple):
    """How an array of ours becomes theirs, and back; shapes go the same ways."""

    there: Callable[[np.ndarray], np.ndarray]
    back: Callable[[np.ndarray], np.ndarray]


_SAME = Turn(lambda x: x, lambda x: x)
_TRANSPOSED = Turn(np.transpose, np.transpose)
_TAPS = Turn(lambda x: x.T[:, None, :], lambda x: x[:, 0, :].T)

# End of our path -> what theirs ends with instead, and the turn.
_ENDS: tuple[tuple[str, str, Turn], ...] = (
    ("embeddings.embedding", "embeddings.weight", _SAME),
    ("norm.scale", "norm.weight", _SAME),
    ("conv1d.weight", "conv1d.weight", _TAPS),
    ("_proj.kernel", "_proj.weight", _TRANSPOSED),
    ("_proj.bias", "_proj.bias", _SAME),
    ("lm_head.kernel", "lm_head.weight", _TRANSPOSED),
    (".A_log", ".A_log", _SAME),
    (".dt_bias", ".dt_bias", _SAME),
)
# In the paper's fork every Householder factor has a module of its own, in the order of the factors.
_APART = ("k_proj", "v_proj", "b_proj", "k_conv1d", "v_conv1d")
# It has as many convolutions of q and uses the first.
_FIRST = "q_conv1d"


def key_and_turn(path: Path) -> tuple[str, Turn]:
    """Their key of a parameter of ours, and how it is turned.

    Raises:
        KeyError: they have no such tensor.
    """
    name = ".".join(map(str, path))
    for end, theirs, turn in _ENDS:
        if name.endswith(end):
            key = name.removesuffix(end) + theirs
            return (key if name.startswith("lm_head.") else f"model.{key}"), turn
    raise KeyError(name)


def is_fork(keys: Iterable[str]) -> bool:
    """Whether tensors of these names are those of the paper's fork."""
    return any(re.search(r"\.k_projs\.0\.weight$", key) for key in keys)


def fork_keys(key: str, factors: int) -> list[str]:
    """The tensors of the fork that one of today's is made of, in order, along axis 0."""
    for name in _APART:
        if f".{name}." in key:
            return [key.replace(f".{name}.", f".{name}s.{factor}.") for factor in range(factors)]
    return [key.replace(f".{_FIRST}.", f".{_FIRST}s.0.")]


def dead_keys(key: str, factors: int) -> list[str]:
    """Tensors of the fork beside one of today's that nothing reads."""
    if f".{_FIRST}." not in key:
        return []
    return [key.replace(f".{_FIRST}.", f".{_FIRST}s.{factor}.") for factor in range(1, factors)]
