"""Log-likelihoods of continuations, many at a time, by programs of two shapes.

A row is read in pieces, each from the state after the one before, so that rows of any length need
the same two programs, and never more logits than a piece's.

Dimension key: ``B`` rows at a time, ``P`` tokens of a piece.
"""

from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Array, Bool, Float, Int

from deltaproduct_jax.errors import ConfigError, require_at_least
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.models.sequence_model import most_tokens
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.parallel.layout import Layout, make_mesh
from deltaproduct_jax.parallel.names import MESH_AXES, names_of_model

PIECES = (1024, 128)  # tokens, descending; a row is filled up to a multiple of the last


class Scored(NamedTuple):
    """How likely a continuation is.

    Attributes:
        log_likelihood: sum over its tokens, natural logarithm.
        is_greedy: whether each of its tokens is the likeliest, the smallest id where several are.
    """

    log_likelihood: float
    is_greedy: bool


class Pair(NamedTuple):
    """Token ids of a context, one at least, and of what follows and is scored."""

    context: Sequence[int]
    continuation: Sequence[int]


class _Sums(NamedTuple):
    log_likelihood: Float[Array, " B"]
    is_greedy: Bool[Array, " B"]


class Scorer:
    """Scores pairs by a model, on one device or over a mesh.

    Args:
        model: any model.
        batch_size: B, rows at a time.
        pieces: tokens of a piece, descending.
        mesh: devices, as the flag of that name; batches are cut over data and fsdp.

    Raises:
        ConfigError: an argument is out of range, or the mesh does not divide the batch.
    """

    def __init__(
        self,
        model: SequenceModel,
        *,
        batch_size: int,
        pieces: Sequence[int] = PIECES,
        mesh: str = "data:1",
    ):
        require_at_least("batch_size", batch_size, 1)
        if not pieces or sorted(set(pieces), reverse=True) != list(pieces) or pieces[-1] < 1:
            raise ConfigError(f"pieces={tuple(pieces)} must descend, with one at least")
        self.batch_size, self.pieces = batch_size, tuple(pieces)
        self.programs = 0  # compiled so far
        self._most_tokens = most_tokens(model)
        self._layout = Layout(make_mesh(DeviceConfig(mesh=mesh)), names_of_model(model))
        self._layout.require_divisible("batch", batch_size=batch_size)
        self._graph, params = nnx.split(model)
        self._params = self._placed(nnx.to_pure_dict(params))
        self._init = jax.jit(lambda: model.init_state(batch_size))
        self._read = jax.jit(self._piece, donate_argnums=(1, 2))

    def __call__(
        self, pairs: Sequence[Pair], progress: Callable[[int], Any] = lambda count: None
    ) -> list[Scored]:
        """Scores of pairs, in their order.

        The longest rows come first, and rows of about the same length together.

        Args:
            pairs: context and continuation.
            progress: called with the number of pairs, after every batch.

        Raises:
            ConfigError: a context or a continuation is empty, an id is none of the model's, or its
            attention does not keep as many tokens.
        """
        order = sorted(range(len(pairs)), key=lambda i: -sum(map(len, pairs[i])))
        found: dict[int, Scored] = {}
        for start in range(0, len(order), self.batch_size):
            chosen = order[start : start + self.batch_size]
            found |= zip(chosen, self._batch([pairs[i] for i in chosen]), strict=True)
            progress(len(chosen))
        return [found[index] for index in range(len(pairs))]

    @property
    def model(self) -> SequenceModel:
        """The model, with its parameters where they lie."""
        return nnx.merge(self._graph, self._params)

    def _batch(self, pairs: list[Pair]) -> list[Scored]:
        inputs, targets, counted = self._rows(pairs)
        state = self._init()
        sums = _Sums(jnp.zeros(self.batch_size), jnp.ones(self.batch_size, bool))
        for piece in _cut(inputs.shape[1], self.pieces):
            rows = (self._spread(x[:, piece]) for x in (inputs, targets, counted))
            state, sums = self._read(self._params, state, sums, *rows)
        self.programs = self._read._cache_size()
        sums = jax.device_get(sums)
        return [
            Scored(float(sums.log_likelihood[i]), bool(sums.is_greedy[i]))
            for i in range(len(pairs))
        ]

    def _rows(self, pairs: list[Pair]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Inputs, targets and which targets count, ``[B, T]``, filled up behind."""
        for pair in pairs:
            for name, ids in pair._asdict().items():
                if not ids:
                    raise ConfigError(f"{name} is empty; it must hold one token at least")
        length = max(sum(map(len, pair)) for pair in pairs) - 1
        if self._most_tokens is not None and length > self._most_tokens:
            raise ConfigError(
                f"a row reads {length} tokens, and max_length={self._most_tokens} is what the "
                "model's attention keeps"
            )
        shape = (self.batch_size, -(-length // self.pieces[-1]) * self.pieces[-1])
        inputs, targets = np.zeros(shape, np.int32), np.zeros(shape, np.int32)
        counted = np.zeros(shape, bool)
        for row, (context, continuation) in enumerate(pairs):
            ids = np.asarray([*context, *continuation])
            if ids.min() < 0 or ids.max() >= self._vocab_size:
                raise ConfigError(
                    f"a token has id {ids.min() if ids.min() < 0 else ids.max()}; the model has "
                    f"those from 0 to {self._vocab_size - 1}"
                )
            inputs[row, : len(ids) - 1], targets[row, : len(ids) - 1] = ids[:-1], ids[1:]
            counted[row, len(context) - 1 : len(ids) - 1] = True
        return inputs, targets, counted

    @property
    def _vocab_size(self) -> int:
        return self._params["embeddings"]["embedding"].shape[0]

    def _piece(
        self,
        params: Any,
        state: Any,
        sums: _Sums,
        inputs: Int[Array, "B P"],
        targets: Int[Array, "B P"],
        counted: Bool[Array, "B P"],
    ) -> tuple[Any, _Sums]:
        with self._layout.placed():
            model = nnx.merge(self._graph, self._layout.gather(params))
            logits, state = model.forward(inputs, state=state)
        logits = logits.astype(jnp.float32)
        chances = jnp.take_along_axis(jax.nn.log_softmax(logits), targets[..., None], axis=-1)
        right = jnp.argmax(logits, axis=-1) == targets
        return state, _Sums(
            sums.log_likelihood + jnp.sum(chances[..., 0], axis=1, where=counted),
            sums.is_greedy & jnp.all(right | ~counted, axis=1),
        )

    def _placed(self, params: Any) -> Any:
        if self._layout.is_one:
            return params
        return jax.device_put(params, self._layout.shardings(params))

    def _spread(self, rows: np.ndarray) -> jax.Array:
        if self._layout.is_one:
            return jnp.asarray(rows)
        batch = PartitionSpec(MESH_AXES["batch"])
        return jax.device_put(rows, NamedSharding(self._layout.mesh, batch))


def _cut(length: int, pieces: Sequence[int]) -> Iterator[slice]:
    """Slices that cover ``length``, a multiple of the last piece, the largest pieces first."""
    start = 0
    while start < length:
        size = next(piece for piece in pieces if piece <= length - start)
        yield slice(start, start + size)
        start += size
