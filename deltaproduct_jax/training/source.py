"""Where a run's batches come from: drawn from a key inside the step, or read from a stream.

Both kinds give the compiled step something (``training``, ``evaluation``) of which it makes the
batch while it is traced (``train_batch``, ``eval_batch``): a task is given its key and draws there,
a stream gives the rows themselves. The loop knows no difference.

Dimension key: ``B`` rows of the whole batch, ``T`` positions.
"""

import dataclasses
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, Protocol

import jax
import numpy as np
from jax.sharding import NamedSharding, PartitionSpec

from deltaproduct_jax.data.packing import Rows
from deltaproduct_jax.data.stream import TokenStream
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.parallel.layout import Layout
from deltaproduct_jax.parallel.names import MESH_AXES
from deltaproduct_jax.tasks.task import ACCURACIES, Batch, Metric, batch_key, require_promised
from deltaproduct_jax.training.config import RunConfig, seed_for
from deltaproduct_jax.training.start import data_key

HELD_OUT_SEED = 0  # of the text that runs of all seeds are evaluated on


class Source(Protocol):
    """The batches of a run, and how answers to them are scored."""

    selected_by: Sequence[Metric]

    def training(self, step: int) -> Any:
        """What the compiled step is given for the update after ``step`` of them."""

    def train_batch(self, given: Any, step: jax.Array, length: int) -> Batch:
        """The batch of that update, while the step is traced."""

    def evaluation(self, split: str, length: int) -> Iterable[Any]:
        """What the compiled evaluation is given, one batch after another."""

    def eval_batch(self, given: Any, length: int) -> Batch:
        """The batch of it, while the evaluation is traced."""

    def columns(self, loss: float) -> dict[str, float]:
        """What a record says beside the training loss."""

    def scores(
        self, split: str, loss: float, correct_BT: np.ndarray, mask_BT: np.ndarray
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Numbers for metrics.jsonl and scores for results.json, of the answers on a split."""

    def state(self) -> dict[str, Any] | None:
        """What a checkpoint keeps of where the source stands, as JSON has it."""

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Goes on where a checkpoint's state was taken."""


def source_of(config: RunConfig, layout: Layout) -> Source:
    """The source that a run's task asks for.

    Raises:
        ConfigError: a stream cannot be opened, or does not fit the model.
    """
    kind = StreamedBatches if config.is_streamed else DrawnBatches
    return kind(config, layout)


class DrawnBatches:
    """Of a task that draws from a key; the batch's number makes the key, so it has no state."""

    def __init__(self, config: RunConfig, layout: Layout):
        self._config = config
        if not type(config.task).__module__.startswith("deltaproduct_jax."):
            require_promised(config.task, config.train.batch_size)  # ours have tests of it
        self._key = data_key(config, layout)
        self.selected_by = getattr(config.task, "selected_by", ACCURACIES)

    def training(self, step: int) -> jax.Array:
        """The same key for all steps, each of which knows its own number."""
        return self._key

    def train_batch(self, given: jax.Array, step: jax.Array, length: int) -> Batch:
        """The batch that the number of updates made stands for."""
        key = batch_key(given, "train", step)
        return self._config.task.batch(key, self._config.train.batch_size, length)

    def evaluation(self, split: str, length: int) -> list[jax.Array]:
        """A key a batch; no two lengths share one."""
        return [batch_key(self._key, split, index) for index in batches_of(self._config, length)]

    def eval_batch(self, given: jax.Array, length: int) -> Batch:
        """The batch of a key."""
        return self._config.task.batch(given, self._config.train.eval_batch_size, length)

    def columns(self, loss: float) -> dict[str, float]:
        """Nothing."""
        return {}

    def scores(
        self, split: str, loss: float, correct_BT: np.ndarray, mask_BT: np.ndarray
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """The strict score's accuracies, and all scores of the task."""
        scores = self._config.task.score(correct_BT, mask_BT)
        strict = scores["strict"]
        numbers = {
            "token_accuracy": strict.token_accuracy,
            "sequence_accuracy": strict.sequence_accuracy,
        }
        return numbers, {name: dataclasses.asdict(score) for name, score in scores.items()}

    def state(self) -> None:
        """None: a step's number says all."""

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Nothing to do."""


def batches_of(config: RunConfig, length: int) -> range:
    """Numbers of the batches of an evaluation at ``length``, within their split."""
    batches = config.train.eval_sequences // config.train.eval_batch_size
    # Batches of the lengths are numbered on, so that no two lengths share a key.
    lengths = sorted({*config.task.test_lengths, config.select_length})
    first = lengths.index(length) * batches
    return range(first, first + batches)


class StreamedBatches:
    """Of text: rows that each process reads for its own devices.

    Those held out are the same whatever the run's seed, so that runs differ by what they learned.
    """

    def __init__(self, config: RunConfig, layout: Layout):
        self._config, self._layout = config, layout
        self.selected_by = config.task.selected_by
        self._held_out: dict[tuple[str, int], tuple[_Reader, TokenStream]] = {}
        train = config.train
        self._reader = _Reader(layout, train.batch_size)
        self._stream = self._open(
            self._reader, "train", config.task.train_length, "train_length", seed=train.seed
        )
        if self._stream.vocab_size > config.model.vocab_size:
            raise ConfigError(
                f"vocab_size={config.model.vocab_size} must be at least that of the text's "
                f"tokenizer, {self._stream.vocab_size}"
            )
        # What cannot be evaluated is to be known now, not behind the steps.
        for split, lengths in (
            ("valid", (config.select_length,)),
            ("test", config.task.test_lengths),
        ):
            for length in lengths:
                self._hold_out(split, length)

    def _open(
        self, reader: "_Reader", split: str, length: int, length_name: str, *, seed: int
    ) -> TokenStream:
        return self._config.task.stream(
            split,
            batch_size=reader.batch_size,
            length=length,
            seed=seed_for(seed, "data"),
            length_name=length_name,
            **reader.share,
        )

    def _hold_out(self, split: str, length: int) -> tuple["_Reader", TokenStream]:
        if (split, length) not in self._held_out:
            reader = _Reader(self._layout, self._config.train.eval_batch_size)
            name = self._config.evaluated_by(length)
            stream = self._open(reader, split, length, name, seed=HELD_OUT_SEED)
            self._held_out[split, length] = reader, stream
        return self._held_out[split, length]

    def training(self, step: int) -> Batch:
        """The rows of a step."""
        return self._reader.place(self._stream.batch(step))

    def train_batch(self, given: Batch, step: jax.Array, length: int) -> Batch:
        """The rows as they are."""
        return given

    def evaluation(self, split: str, length: int) -> Iterable[Batch]:
        """The first rows of a split, always the same ones; where there are fewer, each once.

        Those of a mixture come again, or its shares would not be kept.
        """
        reader, stream = self._hold_out(split, length)
        rows = self._config.train.eval_sequences
        if len(stream.corpora) == 1:
            rows = min(rows, stream.rows_per_epoch)
        for step in range(-(-rows // reader.batch_size)):
            batch = stream.batch(step)
            is_first = reader.numbers(batch) + step * reader.batch_size < rows
            yield reader.place(batch._replace(mask=batch.mask & is_first[:, None]))

    def eval_batch(self, given: Batch, length: int) -> Batch:
        """The rows as they are."""
        return given

    def columns(self, loss: float) -> dict[str, float]:
        """Bits that a byte of the training text takes."""
        return {"bits_per_byte": bits_per_byte(loss, self._stream)}

    def scores(
        self, split: str, loss: float, correct_BT: np.ndarray, mask_BT: np.ndarray
    ) -> tuple[dict[str, float], dict[str, Any]]:
        """Bits per byte of the split's own text, and how many tokens were the likeliest ones."""
        _, stream = self._hold_out(split, mask_BT.shape[1])  # padding depends on the length
        numbers = {
            "bits_per_byte": bits_per_byte(loss, stream),
            "token_accuracy": float(correct_BT[mask_BT].mean()),
        }
        return numbers, numbers | {"tokens": int(mask_BT.sum())}

    def state(self) -> dict[str, Any]:
        """Where the training stream stands, and of which text it is."""
        return dict(self._stream.state())

    def resume(self, state: Mapping[str, Any] | None) -> None:
        """Goes on in the middle of an epoch; ConfigError if the folders hold other text now."""
        if state is not None:
            self._stream = TokenStream.from_state(state, **self._reader.share)


def bits_per_byte(loss: float, stream: TokenStream) -> float:
    """A loss in nats per token as bits per byte of the stream's text."""
    return loss / math.log(2) / stream.bytes_per_token


class _Reader:
    """The rows of a batch that this process reads, and how they come to lie on the mesh.

    Args:
        layout: of the run.
        batch_size: B, rows of all processes together.
    """

    def __init__(self, layout: Layout, batch_size: int):
        self.batch_size = batch_size
        self._sharding = NamedSharding(layout.mesh, PartitionSpec(MESH_AXES["batch"]))
        self._is_one = layout.is_one
        rows = self._sharding.addressable_devices_indices_map((batch_size,)).values()
        bounds = [index[0].indices(batch_size)[:2] for index in rows]
        first, last = min(low for low, _ in bounds), max(high for _, high in bounds)
        index, count = jax.process_index(), jax.process_count()
        each = batch_size // count
        # Where devices of a process hold other rows than its own share, it reads the whole batch.
        is_share = (first, last) == (index * each, (index + 1) * each)
        self.share = {"process_index": index, "process_count": count} if is_share else {}
        self._first = first if is_share else 0

    def numbers(self, rows: Rows) -> np.ndarray:
        """[rows] int64, which of the whole batch's B rows those are that this process read."""
        return self._first + np.arange(len(rows.mask))

    def place(self, rows: Rows) -> Batch:
        """The batch [B, T] of all processes, of the rows that this one read."""
        if self._is_one:
            return Batch(*rows)
        return Batch(*jax.tree.map(self._spread, rows))

    def _spread(self, own: np.ndarray) -> jax.Array:
        def part(index: tuple[slice, ...]) -> np.ndarray:
            low, high, _ = index[0].indices(self.batch_size)
            return own[low - self._first : high - self._first, index[1]]

        shape = (self.batch_size, *own.shape[1:])
        return jax.make_array_from_callback(shape, self._sharding, part)
