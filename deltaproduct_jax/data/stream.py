"""A stream of batches: a pure function of (seed, step), whatever the number of processes.

Dimension key: ``B`` rows of the whole batch, ``T`` positions.
"""

import dataclasses
from collections.abc import Iterator
from typing import Any, TypedDict

import numpy as np

from deltaproduct_jax.data import standard_library
from deltaproduct_jax.data.config import StreamConfig
from deltaproduct_jax.data.corpus import Corpus, open_corpus
from deltaproduct_jax.data.packing import PACKINGS, Rows
from deltaproduct_jax.data.splits import SPLITS
from deltaproduct_jax.errors import ConfigError, require_at_least, require_one_of, require_package
from deltaproduct_jax.files import given_by, user_path
from deltaproduct_jax.settings import misfit

ENDLESS = 2**48  # rows of a corpus, and steps: more than anyone will ask for
READ_AHEAD = 2  # batches


class StreamState(TypedDict):
    """Where a stream stands, and of what it is."""

    config: dict[str, Any]
    split: str
    batch_size: int
    length: int
    seed: int
    step: int  # the one that comes next
    fingerprints: list[str]  # of the folders' tokens
    tokenizer: str  # what made them


class TokenStream:
    """Batches of rows drawn from shuffled documents of one split.

    ``batch(step)`` may be called with any step; one after another they are read ahead.
    """

    def __init__(
        self,
        config: StreamConfig,
        split: str,
        *,
        batch_size: int,
        length: int,
        seed: int,
        process_index: int = 0,
        process_count: int = 1,
        read_ahead: int = READ_AHEAD,
        length_name: str = "length",
    ):
        """Opens the corpora; no token is read yet.

        Args:
            config: which text.
            split: ``train``, ``valid`` or ``test``.
            batch_size: B, rows of all processes together.
            length: T.
            seed: orders the documents.
            process_index: which of the processes this is; it draws B / process_count rows.
            process_count: how many share a batch.
            read_ahead: batches that are read before they are asked for; 0 reads on demand alone.
            length_name: the setting that ``length`` comes from, for errors.

        Raises:
            ConfigError: an argument makes no sense, or the folders' tokenizers differ.
            RunDirectoryError: a folder was not prepared.
        """
        require_one_of("split", split, SPLITS)
        for name, value in (("batch_size", batch_size), (length_name, length)):
            require_at_least(name, value, 1)
        for name, value in (("read_ahead", read_ahead), ("seed", seed)):
            require_at_least(name, value, 0)
        if not 0 <= process_index < process_count:
            raise ConfigError(
                f"process_index={process_index} must be from 0 to below {process_count}, the "
                "number of processes"
            )
        if batch_size % process_count:
            raise ConfigError(
                f"batch_size={batch_size} must be a multiple of the number of processes, "
                f"{process_count}"
            )
        self.config, self.split, self.seed = config, split, seed
        self.batch_size, self.length = batch_size, length
        self.corpora = open_corpora(config, split)
        self._rows_here = batch_size // process_count
        self._first_row = process_index * self._rows_here
        self._step, self._read_ahead = 0, read_ahead
        packing = PACKINGS[config.packing]
        self._packings = [packing(c, length, seed, i) for i, c in enumerate(self.corpora)]
        for corpus, packed in zip(self.corpora, self._packings, strict=True):
            if not packed.rows_per_epoch:
                raise ConfigError(
                    f"{length_name}={length} is too long: {corpus.name} has {corpus.num_tokens} "
                    f"tokens in split {split!r}, and a row takes one more than its length"
                )
        self._grain = require_package("grain", f"data={','.join(config.data)}", "data")
        self._numbers, self._batches = self._datasets()
        self._ahead: Iterator[Rows] | None = None

    def _datasets(self) -> tuple[Any, Any]:
        """Grain's random access to the numbers of rows, and to this process's batches.

        A number is the corpus times ENDLESS and the row in it. Rows themselves do not pass through
        Grain one by one: it counts the bytes of each, which takes longer than reading them.
        """
        access = self._grain.MapDataset
        numbers = [
            access.range(index * ENDLESS, (index + 1) * ENDLESS)
            for index in range(len(self.corpora))
        ]
        several = len(numbers) > 1
        mixed = access.mix(numbers, self.config.data_weights or None) if several else numbers[0]
        return mixed, access.range(ENDLESS).map(self._draw)

    def _draw(self, step: int) -> Rows:
        first = step * self.batch_size + self._first_row
        numbers = [self._numbers[index] for index in range(first, first + self._rows_here)]
        places = [divmod(int(number), ENDLESS) for number in numbers]
        rows = [self._packings[corpus].row(row) for corpus, row in places]
        return Rows(*(None if of[0] is None else np.stack(of) for of in zip(*rows, strict=True)))

    @property
    def vocab_size(self) -> int:
        """Token ids are below it."""
        return self.corpora[0].vocab_size

    @property
    def bos_id(self) -> int:
        """The token that begins every document."""
        return self.corpora[0].bos_id

    @property
    def rows_per_epoch(self) -> int:
        """Rows of one epoch of every folder; of a single one, after them all was seen once."""
        return sum(packing.rows_per_epoch for packing in self._packings)

    @property
    def bytes_per_token(self) -> float:
        """Of the text that counts, by its shares: turns a loss per token into bits per byte."""
        shares = self.config.data_weights or [1.0] * len(self.corpora)
        counted = [packing.counted_per_row for packing in self._packings]  # fewer beside padding
        per_token = [corpus.num_bytes / corpus.num_tokens for corpus in self.corpora]
        return float(np.average(per_token, weights=np.multiply(shares, counted)))

    def batch(self, step: int) -> Rows:
        """This process's rows of one batch, arrays ``[B / process_count, T]``.

        Process p of P draws rows p B/P to (p+1) B/P, so that put together in the order of processes
        they are the batch that a single process would draw.
        """
        require_at_least("step", step, 0)
        if not self._read_ahead:
            rows = self._batches[step]
        else:
            if self._ahead is None or step != self._step:
                options = self._grain.ReadOptions(1, self._read_ahead)
                self._ahead = iter(self._batches[step:].to_iter_dataset(options))
            rows = next(self._ahead)
        self._step = step + 1
        return rows

    def state(self) -> "StreamState":
        """What a checkpoint keeps, as JSON has it: where the stream stands, and of what it is."""
        return {
            "config": {
                name: list(value) if isinstance(value, tuple) else value
                for name, value in dataclasses.asdict(self.config).items()
            },
            "split": self.split,
            "batch_size": self.batch_size,
            "length": self.length,
            "seed": self.seed,
            "step": self._step,
            "fingerprints": [corpus.fingerprint for corpus in self.corpora],
            "tokenizer": self.corpora[0].tokenizer,
        }

    @property
    def step(self) -> int:
        """The step after the newest that was drawn."""
        return self._step

    @classmethod
    def from_state(
        cls,
        state: "StreamState",
        *,
        data: tuple[str, ...] | None = None,
        process_index: int = 0,
        process_count: int = 1,
        read_ahead: int = READ_AHEAD,
    ) -> "TokenStream":
        """The stream that goes on where ``state`` was taken, on any number of processes.

        Args:
            state: of `state`.
            data: where the folders are now, if they have moved.
            process_index: as for the constructor, and so the rest.
            process_count: may be another than before.
            read_ahead: may be another, too.

        Raises:
            ConfigError: the folders hold other tokens than they did, or ``state`` is no state.
        """
        problem = misfit(state, StreamState, "state")
        if problem is not None:
            raise ConfigError(problem)
        fields = dict(state["config"])
        if data is not None:
            fields["data"] = tuple(data)
        if len(fields["data"]) != len(state["fingerprints"]):
            raise ConfigError(
                f"data={fields['data']} must be as many folders as the run began with, "
                f"{len(state['fingerprints'])}"
            )
        stream = cls(
            StreamConfig(**fields),
            state["split"],
            batch_size=state["batch_size"],
            length=state["length"],
            seed=state["seed"],
            process_index=process_index,
            process_count=process_count,
            read_ahead=read_ahead,
        )
        for corpus, fingerprint in zip(stream.corpora, state["fingerprints"], strict=True):
            if corpus.fingerprint != fingerprint:
                raise ConfigError(
                    f"data={corpus.name!r} does not hold the tokens that the run began with; "
                    "it must be the folder that was prepared then, or a copy"
                )
        stream._step = state["step"]
        return stream


def open_corpora(config: StreamConfig, split: str) -> list[Corpus]:
    """One split of every folder; ConfigError if their tokenizers differ."""
    corpora = [_open(name, split) for name in config.data]
    _check_same_tokens(corpora)
    return corpora


def _open(name: str, split: str) -> Corpus:
    if name == standard_library.NAME:
        return standard_library.standard_library(split)
    folder = user_path(name, "data")
    with given_by("data", folder):
        return open_corpus(folder, split)


def _check_same_tokens(corpora: list[Corpus]) -> None:
    first = corpora[0]
    for corpus in corpora[1:]:
        if (corpus.tokenizer, corpus.bos_id) != (first.tokenizer, first.bos_id):
            raise ConfigError(
                f"data={corpus.name!r} was made by another tokenizer than {first.name!r}; all "
                "must be prepared with the same one"
            )
