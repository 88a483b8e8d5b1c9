"""Which tokens stand in which row: documents cut to length, or first-fit with segment ids.

A packing is a pure function from a row's index to the row, for as many epochs as are asked for.
What it keeps in memory is some 16 bytes per document and 16 per row, never tokens.

Dimension key: ``T`` positions of a row.
"""

import functools
import threading
from typing import NamedTuple

import numpy as np

from deltaproduct_jax.data.corpus import Corpus

# Documents among which rows are filled; more fill them better and need more memory at once.
WINDOW = 1024
ROWS = 1  # after seeds and epoch: the order of rows, not of documents


class Rows(NamedTuple):
    """One row ``[T]`` or a batch of them ``[B, T]``; the names of training's ``Batch``."""

    inputs: np.ndarray  # int32
    targets: np.ndarray  # int32, the token that follows in the document
    mask: np.ndarray  # bool, False where there is padding
    segment_ids: np.ndarray | None  # int32, documents counted from 1, padding 0; None: no reset


def permutation(size: int, *seeds: int) -> np.ndarray:
    """An order of ``range(size)``, the same on every machine and with every version of NumPy.

    NumPy promises the raw numbers of Philox for good, and not what its shuffles make of them.
    """
    numbers = np.random.Philox(np.random.SeedSequence(seeds)).random_raw(size)
    return np.argsort(numbers, kind="stable")


class Concatenated:
    """As the paper packs: BOS and documents one after another, cut to rows, no reset.

    Every epoch has an order of documents of its own, and then one of rows: those of one document
    would else stand in one batch. Rows overlap by one token, so that each but the first is a target
    once; an epoch's last tokens, fewer than a row, are left out.
    """

    def __init__(self, corpus: Corpus, length: int, *seeds: int):
        self._corpus, self._length, self._seeds = corpus, length, seeds
        self.rows_per_epoch = (corpus.num_tokens - 1) // length
        self.counted_per_row = float(length)
        self._mask = np.ones(length, bool)
        # A lock, or two reading threads would both sort a new epoch's documents.
        self._lock = threading.Lock()
        self._order_of = functools.lru_cache(2)(self._new_order)

    def _new_order(self, epoch: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Documents in their order, the position after each, and the order of rows."""
        lengths = self._corpus.lengths
        order = permutation(len(lengths), *self._seeds, epoch)
        rows = permutation(self.rows_per_epoch, *self._seeds, epoch, ROWS)
        return order, np.cumsum(lengths[order]), rows

    def row(self, index: int) -> Rows:
        """One row; its tokens may be of many documents."""
        epoch, index = divmod(index, self.rows_per_epoch)
        with self._lock:
            order, ends, rows = self._order_of(epoch)
        tokens = np.empty(self._length + 1, np.int32)
        at = int(rows[index]) * self._length
        document = int(np.searchsorted(ends, at, side="right"))
        filled = 0
        while filled < len(tokens):
            left = int(ends[document]) - at
            part = tokens[filled : filled + left]
            stop = int(self._corpus.offsets[order[document] + 1])
            self._corpus.read(stop - left, part)
            filled, at, document = filled + len(part), at + len(part), document + 1
        return Rows(tokens[:-1], tokens[1:], self._mask, None)


class FirstFit:
    """Whole documents, each in the first row that has room; longer ones are cut to rows.

    After a document's last token BOS is wanted, as in `Concatenated`. The rows are filled once, and
    every epoch has an order of rows of its own: since nothing passes from document to document,
    company in a row means nothing.
    """

    def __init__(self, corpus: Corpus, length: int, *seeds: int):
        self._corpus, self._length, self._seeds = corpus, length, seeds
        starts, sizes = cut_documents(corpus.offsets, length)
        order = permutation(len(sizes), *seeds)
        row_of = first_fit(sizes[order], length, WINDOW)
        by_row = np.argsort(row_of, kind="stable")
        self._starts, self._sizes = starts[order][by_row], sizes[order][by_row]
        self._first = np.concatenate([[0], np.cumsum(np.bincount(row_of))])
        self.rows_per_epoch = len(self._first) - 1
        self.counted_per_row = corpus.num_tokens / self.rows_per_epoch
        self._lock = threading.Lock()
        self._order_of = functools.lru_cache(2)(
            lambda epoch: permutation(self.rows_per_epoch, *seeds, epoch)
        )

    def row(self, index: int) -> Rows:
        """One row; padding stands at its end."""
        epoch, index = divmod(index, self.rows_per_epoch)
        with self._lock:
            index = self._order_of(epoch)[index]
        inputs = np.zeros(self._length, np.int32)
        targets, segment_ids = np.zeros_like(inputs), np.zeros_like(inputs)
        parts = range(self._first[index], self._first[index + 1])
        at = 0
        for segment, part in enumerate(parts, 1):
            start, size = int(self._starts[part]), int(self._sizes[part])
            self._corpus.read(start, inputs[at : at + size])
            targets[at : at + size - 1] = inputs[at + 1 : at + size]
            targets[at + size - 1] = self._after(start + size)
            segment_ids[at : at + size] = segment
            at += size
        return Rows(inputs, targets, segment_ids > 0, segment_ids)

    def _after(self, stop: int) -> int:
        """The token at ``stop``, or BOS where a document ends there."""
        offsets = self._corpus.offsets
        if offsets[np.searchsorted(offsets, stop)] == stop:
            return self._corpus.bos_id
        token = np.empty(1, np.int32)
        self._corpus.read(stop, token)
        return int(token[0])


def cut_documents(offsets: np.ndarray, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Parts of at most ``length`` tokens: where each starts and its size, both int64 [parts]."""
    sizes = np.diff(offsets)
    counts = -(-sizes // length)
    document = np.repeat(np.arange(len(sizes)), counts)
    number = np.arange(len(document)) - np.repeat(np.cumsum(counts) - counts, counts)
    starts = offsets[document] + number * length
    return starts, np.minimum(offsets[document + 1] - starts, length)


def first_fit(sizes: np.ndarray, capacity: int, window: int) -> np.ndarray:
    """First-fit among every ``window`` sizes, all windows at once.

    Args:
        sizes: [parts], from 1 to ``capacity``.
        capacity: of a row.
        window: parts that share rows; those of different windows never do.

    Returns:
        [parts] int64, the row of each part; every row from 0 on has one.
    """
    windows = -(-len(sizes) // window)
    padded = np.zeros((windows, window), np.int64)
    padded.reshape(-1)[: len(sizes)] = sizes
    room = np.full((windows, 1), capacity, np.int64)  # of the rows that some window has opened
    row_in_window = np.zeros((windows, window), np.int64)
    each = np.arange(windows)
    for column in range(min(window, len(sizes))):
        size = padded[:, column]
        if (room[:, -1] != capacity).any():
            room = np.concatenate([room, np.full_like(room, capacity)], axis=1)
        row = np.argmax(room >= size[:, None], axis=1)
        room[each, row] -= size
        row_in_window[:, column] = row
    used = (room < capacity).sum(axis=1)
    first = np.cumsum(used) - used
    return (row_in_window + first[:, None]).reshape(-1)[: len(sizes)]


PACKINGS = {"concatenate": Concatenated, "first_fit": FirstFit}
