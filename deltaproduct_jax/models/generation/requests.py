"""What is asked of a generator, and what it answers with."""

import dataclasses
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.errors import ConfigError, require_at_least
from deltaproduct_jax.models.generation.sampling import PLAIN, Sampling
from deltaproduct_jax.settings import check_fields, shown

STOPS = 8  # stop tokens of a request
ENDLESS = 2**31 - 1
LENGTH, STOP_TOKEN, STOP_STRING = "length", "stop_token", "stop_string"


class Prefix(NamedTuple):
    """Tokens that were read, ready to be gone on with: as often as one likes, and anywhere.

    It may be fetched to the host (`jax.device_get`) or pickled, and given back as it is.

    Attributes:
        state: of the model after all tokens but the last, for one row.
        token: the last token.
        length: how many tokens there are.
        model: `fingerprint` of the model's parameters, by which one of another model is refused;
            None: not known.
    """

    state: Any
    token: int
    length: int
    model: int | None = None


def fingerprint(params: Any) -> int:
    """A number of 64 bits, of all bits of a tree of arrays; the same on every platform."""
    total = 0
    for leaf in jax.tree.leaves(params):
        bits = leaf.ravel().view(jnp.uint8 if leaf.dtype.itemsize == 1 else jnp.uint16)
        # Each by a number of its place, modulo 2**32: integers, whose sum has no order.
        places = jnp.arange(bits.size, dtype=jnp.uint32) * jnp.uint32(2654435761) + 1
        of_leaf = int(jnp.sum(bits.astype(jnp.uint32) * places, dtype=jnp.uint32))
        total = (total * 6364136223846793005 + of_leaf + 1) % 2**64
    return total


@dataclasses.dataclass(frozen=True)
class Request:
    """A prompt, and how to go on with it.

    Attributes:
        prompt: token ids; behind those of ``prefix``, where it may be empty.
        max_tokens: tokens that are drawn at most; None for no end.
        sampling: how they are drawn.
        key: the row's own: its draws are a function of the seed, of this and of the place in the
            row. None for the number of the request.
        stop_tokens: ids that end it, 8 at most.
        stop: strings that end it, which are left out of its text; needs a ``decode``.
        prefix: tokens read before.
        keep: whether the last piece gets the tokens so far as a ``prefix``.

    Raises:
        ConfigError: naming the field, when a value is out of range.
    """

    prompt: Sequence[int] | np.ndarray
    max_tokens: int | None = 100
    sampling: Sampling = PLAIN
    key: int | None = None
    stop_tokens: tuple[int, ...] = ()
    stop: tuple[str, ...] = ()
    prefix: Prefix | None = None
    keep: bool = False

    def __post_init__(self) -> None:
        """Checks every field, and makes plain ids of the prompt."""
        of_bytes = isinstance(self.prompt, bytes)  # ids as a tokenizer of bytes has them
        prompt = np.asarray(list(self.prompt) if of_bytes else self.prompt)
        if prompt.ndim != 1 or not (prompt.size == 0 or np.issubdtype(prompt.dtype, np.integer)):
            raise ConfigError(f"prompt={shown(self.prompt)} must be whole numbers in one dimension")
        object.__setattr__(self, "prompt", prompt.tolist())
        check_fields(self)
        if not self.prompt and self.prefix is None:
            raise ConfigError("prompt is empty; it must hold one token at least, such as BOS")
        if self.max_tokens is not None:
            require_at_least("max_tokens", self.max_tokens, 1)
            if self.max_tokens > ENDLESS:
                raise ConfigError(f"max_tokens={self.max_tokens} is too large; it may be {ENDLESS}")
        if self.key is not None and not 0 <= self.key < 2**32:
            raise ConfigError(f"key={self.key} must be from 0 to below 2**32")
        if len(self.stop_tokens) > STOPS:
            raise ConfigError(f"stop_tokens={self.stop_tokens} are too many; {STOPS} are the most")
        if "" in self.stop:
            raise ConfigError(f"stop={self.stop} holds an empty string, which ends any text")

    @property
    def length(self) -> int:
        """Tokens before the first that is drawn."""
        return len(self.prompt) + (0 if self.prefix is None else self.prefix.length)


class Piece(NamedTuple):
    """What a row has got since the last piece.

    Attributes:
        index: number of the request, from 0.
        tokens: drawn tokens; of the stop token and what completes a stop string, too.
        text: of the tokens, as far as it is certain, without stop token and stop string; "" without
            a ``decode``.
        reason: why it ends here, ``"length"``, ``"stop_token"`` or ``"stop_string"``; None if it
            goes on.
        prefix: all tokens of the row, if it ends here and the request keeps them.
    """

    index: int
    tokens: list[int]
    text: str = ""
    reason: str | None = None
    prefix: Prefix | None = None
