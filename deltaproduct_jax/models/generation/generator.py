"""Many prompts in a few rows: reading them, going on with them, and text as it comes."""

import functools
import itertools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaproduct_jax.errors import ConfigError, require_at_least
from deltaproduct_jax.layers.checks import as_like, checks_arguments
from deltaproduct_jax.models.generation.requests import (
    ENDLESS,
    LENGTH,
    STOP_STRING,
    STOP_TOKEN,
    STOPS,
    Piece,
    Prefix,
    Request,
    fingerprint,
)
from deltaproduct_jax.models.generation.rows import Rows, axes_of_state, programs_of
from deltaproduct_jax.models.generation.sampling import PLAIN, Sampling, needs_of, rules_of
from deltaproduct_jax.models.generation.text import Decode, StopStrings, TextStream
from deltaproduct_jax.models.sequence_model import ModelState, SequenceModel, most_tokens
from deltaproduct_jax.settings import LARGEST_SEED, make_key, require_kind, shown

PIECES = (256, 32)
STRIDE = 16


class Completion(NamedTuple):
    """What one prompt was gone on with; see :class:`Piece`."""

    tokens: list[int]
    text: str
    reason: str
    prefix: Prefix | None


class Generator:
    """Goes on with prompts, several at once.

    A few programs serve all: one for each of ``pieces`` by which prompts are read, for a single row
    and for all, and one that draws ``stride`` tokens a row. Memory is that of the rows' states,
    however much is written.

    Tokens are a function of the model, the seed, the row's own key and the tokens before, whatever
    else is in the batch and however it is cut, as far as float rounding lets logits be the same.

    Args:
        model: what writes.
        rows: prompts that are gone on with at once; as one ends, the next takes its place.
        pieces: tokens of a prompt that are read at once, descending.
        stride: tokens that every row draws before any is looked at. Larger is faster; a row that
            ends within waits for the others.
        decode: ids to text, for text and for stop strings.
        vocab_size: ids that are drawn are below it; none: the model's, which may have been made
            larger than its tokenizer.

    Raises:
        ConfigError: naming the argument, when one is out of range.
    """

    @checks_arguments
    def __init__(
        self,
        model: SequenceModel,
        *,
        rows: int = 1,
        pieces: tuple[int, ...] | list[int] = PIECES,
        stride: int = STRIDE,
        decode: Decode | None = None,
        vocab_size: int | None = None,
    ):
        if decode is not None and not callable(decode):
            raise ConfigError(f"decode={shown(decode)} must be a function from ids to text")
        require_at_least("rows", rows, 1)
        require_at_least("stride", stride, 1)
        if not pieces or min(pieces) < 1 or sorted(set(pieces), reverse=True) != list(pieces):
            raise ConfigError(f"pieces={pieces!r} must descend and be at least 1, with one piece")
        self.rows, self.pieces, self.stride = rows, tuple(pieces), stride
        most = model.config.vocab_size
        self.vocab_size = most if vocab_size is None else vocab_size
        if not 1 <= self.vocab_size <= most:
            raise ConfigError(f"vocab_size={vocab_size} must be from 1 to the model's, {most}")
        self.most_tokens = most_tokens(model)
        self._decode = decode
        graph, state = nnx.split(model)
        self._params = nnx.to_pure_dict(state)
        self._programs = programs_of(graph, axes_of_state(model))
        self._fresh = jax.jit(functools.partial(model.init_state, 1))()
        self._empty = jax.jit(functools.partial(self._empty_rows, model))

    @functools.cached_property
    def _model(self) -> int:
        return fingerprint(self._params)

    def read(self, tokens: Sequence[int], prefix: Prefix | None = None) -> Prefix:
        """Reads tokens, behind those of ``prefix`` if there are any, which stays as it is."""
        request = Request(tokens, prefix=prefix)
        self._check(request, 0)
        state = self._fresh if prefix is None else prefix.state
        state = self._absorb(state, [_unread(request)])
        return Prefix(state, _last(request), request.length, self._model)

    def stream(self, requests: Iterable[Request], *, seed: int = 0) -> Iterator[Piece]:
        """Goes on with all requests, in their order as rows become free.

        Requests are asked for as there is room, so that there may be any number of them.

        Args:
            requests: the prompts, and how to go on with each.
            seed: of all draws.

        Yields:
            What each row got in a stride; the last piece of a request has a reason.

        Raises:
            ConfigError: a request does not fit this generator.
            FloatingPointError: a model's logits are not finite.
        """
        require_kind("seed", seed, int)
        if not 0 <= seed <= LARGEST_SEED:
            raise ConfigError(f"seed={seed} must be from 0 to {LARGEST_SEED}")
        waiting = enumerate(_each_checked(requests))
        seats: list[_Seat | None] = [None] * self.rows
        rows, key = self._empty(), make_key(seed)
        while True:
            rows = self._fill(rows, seats, waiting)
            taken = [seat for seat in seats if seat is not None]
            if not taken:
                return
            with jax.threefry_partitionable(True):
                rows, drawn = self._programs.decode(
                    self._params,
                    rows,
                    key,
                    stride=self.stride,
                    needs=needs_of([seat.request.sampling for seat in taken]),
                    vocab_size=self.vocab_size,
                    keeps=any(seat.request.keep for seat in taken),
                )
            drawn_B = np.asarray(drawn).T
            for place, seat in enumerate(seats):
                if seat is None:
                    continue
                piece = seat.piece([int(token) for token in drawn_B[place] if token != -1])
                if piece.reason is not None:
                    seats[place] = None
                    rows, piece = self._end(rows, place, seat, piece)
                yield piece

    def generate(
        self,
        prompts: Sequence[Sequence[int]] | np.ndarray | jax.Array,
        *,
        mask: np.ndarray | jax.Array | None = None,
        max_tokens: int | None = 100,
        sampling: Sampling = PLAIN,
        seed: int = 0,
        keys: Sequence[int] | None = None,
        stop_tokens: tuple[int, ...] = (),
        stop: tuple[str, ...] = (),
    ) -> list[Completion]:
        """Goes on with all prompts in the same way; returns what came, in their order.

        Args:
            prompts: token ids, prompts of any lengths; or an array ``[B, T]``.
            mask: ``[B, T]`` of such an array, False at padding, left, right or anywhere.
            max_tokens: as in :class:`Request`, like what follows.
            sampling: how tokens are drawn.
            seed: of all draws.
            keys: each prompt's own; its number without.
            stop_tokens: ids that end a row.
            stop: strings that end a row.
        """
        same = {"max_tokens": max_tokens, "sampling": sampling, "stop_tokens": stop_tokens}
        ids = _without_padding(prompts, mask)
        if keys is not None and len(keys) != len(ids):
            raise ConfigError(f"keys={keys!r} must be as many as the prompts, {len(ids)}")
        own = range(len(ids)) if keys is None else keys
        asked = [
            Request(prompt, key=int(key), stop=tuple(stop), **same)
            for prompt, key in zip(ids, own, strict=True)
        ]
        return collect(self.stream(asked, seed=seed), len(asked))

    def _check(self, request: Request, drawn: int | None) -> None:
        before = ()
        if request.prefix is not None:
            before = (request.prefix.token,)
            require_kind("prefix.token", request.prefix.token, int)
            require_kind("prefix.length", request.prefix.length, int)
            require_at_least("prefix.length", request.prefix.length, 1)
            as_like("prefix.state", request.prefix.state, self._fresh)
            if request.prefix.model not in (None, self._model):
                raise ConfigError(
                    f"prefix.model={shown(request.prefix.model)} must be {self._model}: other "
                    "parameters have read its tokens than this generator's"
                )
        for token in (*before, *request.prompt, *request.stop_tokens):
            if not 0 <= token < self.vocab_size:
                raise ConfigError(
                    f"token {token} must be from 0 to below vocab_size={self.vocab_size}"
                )
        if request.stop and self._decode is None:
            raise ConfigError(f"stop={request.stop} needs a Generator with decode=")
        # The last token is drawn, and not read.
        most, wanted = self.most_tokens, None if drawn is None else request.length + drawn - 1
        if most is not None and (wanted is None or wanted > most):
            raise ConfigError(
                f"a prompt of {request.length} tokens and max_tokens={drawn} do not fit into "
                f"max_length={most}, which is what the model's attention keeps"
            )

    def _empty_rows(self, model: SequenceModel) -> Rows:
        zeros = jnp.zeros(self.rows, jnp.int32)
        return Rows(
            state=model.init_state(self.rows),
            token=zeros,
            length=zeros,
            own=zeros.astype(jnp.uint32),
            left=zeros,
            stops=jnp.full((self.rows, STOPS), -1, jnp.int32),
            rules=rules_of([PLAIN] * self.rows, self.vocab_size),
        )

    def _fill(
        self, rows: Rows, seats: "list[_Seat | None]", waiting: Iterator[tuple[int, Request]]
    ) -> Rows:
        """Puts requests that wait into seats that are free, with their prompts read."""
        free = [place for place, seat in enumerate(seats) if seat is None]
        new = dict(zip(free, itertools.islice(waiting, len(free)), strict=False))
        for place, (index, request) in new.items():
            self._check(request, request.max_tokens)
            seats[place] = _Seat(index, request, self._decode)
        unread = {place: _unread(request) for place, (_, request) in new.items()}
        # Read together, rows wait for the longest, and those that do not read are computed too.
        together = len(new) > 1 and 2 * len(new) >= self.rows
        for place, (index, request) in new.items():
            row = self._row(index, request)
            if not together:
                row = row._replace(state=self._absorb(row.state, [unread[place]]))
            rows = self._programs.put(rows, place, row)
        if together:
            rest = [unread.get(place, []) for place in range(self.rows)]
            rows = rows._replace(state=self._absorb(rows.state, rest))
        return rows

    def _row(self, index: int, request: Request) -> Rows:
        """A row whose prompt is still to be read."""
        stops = [*request.stop_tokens, *[-1] * (STOPS - len(request.stop_tokens))]
        left = ENDLESS if request.max_tokens is None else request.max_tokens
        return Rows(
            state=self._fresh if request.prefix is None else request.prefix.state,
            token=np.asarray([_last(request)], np.int32),
            length=np.asarray([request.length], np.int32),
            own=np.asarray([index if request.key is None else request.key], np.uint32),
            left=np.asarray([left], np.int32),
            stops=np.asarray([stops], np.int32),
            rules=rules_of([request.sampling], self.vocab_size),
        )

    def _absorb(self, state: ModelState, unread: Sequence[list[int]]) -> ModelState:
        """The state after the unread tokens of every row, piece by piece."""
        start, most = 0, max(map(len, unread))
        while start < most:
            size = next((p for p in self.pieces if p <= most - start), self.pieces[-1])
            parts = [ids[start : start + size] for ids in unread]
            tokens = np.asarray([[*part, *[0] * (size - len(part))] for part in parts], np.int32)
            mask = np.arange(size)[None] < np.asarray([[len(part)] for part in parts])
            state = self._programs.absorb(self._params, state, tokens, mask)
            start += size
        return state

    def _end(self, rows: Rows, place: int, seat: "_Seat", piece: Piece) -> tuple[Rows, Piece]:
        """Empties a row; the tokens so far, if its request keeps them."""
        if seat.request.keep and piece.reason == STOP_STRING:
            # The row has gone on behind the string, up to the end of the stride.
            prompt = [*seat.request.prompt, *seat.tokens]
            piece = piece._replace(prefix=self.read(prompt, seat.request.prefix))
        elif seat.request.keep:
            row = self._programs.take(rows, place)
            prefix = Prefix(row.state, int(row.token[0]), int(row.length[0]), self._model)
            piece = piece._replace(prefix=prefix)
        return rows._replace(left=rows.left.at[place].set(0)), piece


class _Seat:
    """A row's request, and what came of it so far."""

    def __init__(self, index: int, request: Request, decode: Decode | None):
        self.index, self.request = index, request
        self.drawn = 0
        self.tokens: list[int] = []  # only those that are needed again
        before = [] if request.prefix is None else [request.prefix.token]
        self._text = None if decode is None else TextStream(decode, [*before, *request.prompt])
        self._stops = StopStrings(request.stop)

    def piece(self, drawn: list[int]) -> Piece:
        """What is to be told of tokens that were drawn."""
        tokens, text, reason = [], [], None
        for token in drawn:
            if token < 0:
                raise FloatingPointError(
                    f"the logits behind {self.request.length + self.drawn} tokens of request "
                    f"{self.index} are not finite"
                )
            tokens.append(token)
            self.drawn += 1
            reason = self._reason(token, text)
            if reason is not None:
                break
        if self.request.keep and self.request.stop:
            self.tokens += tokens
        return Piece(self.index, tokens, "".join(text), reason)

    def _reason(self, token: int, text: list[str]) -> str | None:
        """Why the row ends with this token, if it does; adds to ``text`` what is certain."""
        is_stop = token in self.request.stop_tokens
        is_last = is_stop or self.drawn == self.request.max_tokens
        if self._text is not None:
            if not is_stop:
                text.append(self._stops.push(self._text.push(token)))
            if is_last:
                text.append(self._stops.push(self._text.close()))
                text.append(self._stops.close())
        if self._stops.found is not None:
            return STOP_STRING
        return STOP_TOKEN if is_stop else LENGTH if is_last else None


def collect(pieces: Iterable[Piece], count: int) -> list[Completion]:
    """Puts the pieces of ``count`` requests together."""
    found = [Completion([], "", "", None) for _ in range(count)]
    for piece in pieces:
        tokens, text, *_ = found[piece.index]
        found[piece.index] = Completion(
            tokens + piece.tokens, text + piece.text, piece.reason or "", piece.prefix
        )
    return found


def _each_checked(requests: Any) -> Iterator[Request]:
    """Each as it is asked for; ConfigError for what is none, or for one that stands alone."""
    if not isinstance(requests, Iterable):
        raise ConfigError(f"requests={shown(requests)} must be several, as in a list")
    for index, request in enumerate(requests):
        require_kind(f"requests[{index}]", request, Request)
        yield request


def _unread(request: Request) -> list[int]:
    """The tokens that a row reads before it draws: all that it has but the last."""
    before = [] if request.prefix is None else [request.prefix.token]
    return [*before, *request.prompt][:-1]


def _last(request: Request) -> int:
    return request.prompt[-1] if request.prompt else request.prefix.token


def _without_padding(prompts: Any, mask: Any) -> list[Any]:
    if mask is None:
        if not isinstance(prompts, Iterable):
            raise ConfigError(f"prompts={shown(prompts)} must be several, as in a list")
        return list(prompts)
    prompts, mask = np.asarray(prompts), np.asarray(mask)
    if prompts.ndim != 2 or mask.shape != prompts.shape or mask.dtype != bool:
        raise ConfigError(
            f"mask must be bool, of the prompts' shape [B, T], got {mask.dtype}{mask.shape} for "
            f"{prompts.shape}"
        )
    return [row[counts] for row, counts in zip(prompts, mask, strict=True)]
