"""Text to token ids and back: bytes, Hugging Face's tokenizers, SentencePiece, and a BPE of ours.

Ids of documents never hold ``bos_id`` (BOS begins every document, and who writes it is
`deltaproduct_jax.data.shards`): text that spells it out is text.
"""

import hashlib
import importlib.util
import itertools
import re
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

from deltaproduct_jax.data.manifest import TokenizerFacts, read_manifest
from deltaproduct_jax.errors import ConfigError, RunDirectoryError, require_package
from deltaproduct_jax.files import given_by, read_bytes, user_path

MISTRAL = ("mistral_common", "data/tokenizer.model.v1")
BOS = "<s>"  # of a BPE that is trained here
BOS_NAMES = (BOS, "<|begin_of_text|>", "<bos>", "<|startoftext|>", "<|endoftext|>", "[BOS]")
UNKNOWN = "\U00020bb7"  # a letter that hardly any text has
MARKS = ("\n", UNKNOWN)  # that hardly any token joins with what follows
SPACES = " x  x \n"  # of which a tokenizer that normalises text leaves some out
# Longer texts are given to a tokenizer in stretches: it then needs little memory, and its time
# grows linearly.
STRETCH = 2**18
# Of a run without spaces, or of spaces alone: a BPE is trained in time that grows with its square.
LONGEST_RUN = 2**10


class Tokenizer(Protocol):
    """A text's ids, and the text of ids."""

    kind: str
    data: bytes  # the file that it was made from
    vocab_size: int
    bos_id: int

    def encode(self, text: str) -> Sequence[int]:
        """Ids of a text, without BOS."""

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids."""


class ByteTokenizer:
    """The bytes of UTF-8, and 256 for BOS."""

    kind = "bytes"
    data = b""
    vocab_size = 257
    bos_id = 256

    def encode(self, text: str) -> Sequence[int]:
        """The bytes of a text."""
        return text.encode()

    def decode(self, ids: Sequence[int]) -> str:
        """The text of bytes; BOS is left out, and what is no UTF-8 becomes U+FFFD."""
        return bytes(int(i) for i in ids if i < 256).decode(errors="replace")


class HuggingFaceTokenizer:
    """A ``tokenizer.json``, as the package tokenizers writes it."""

    kind = "huggingface"

    def __init__(self, data: bytes, name: str, bos: str | None = None):
        package = require_package("tokenizers", f"tokenizer={name}", "data")
        try:
            self._tokenizer = package.Tokenizer.from_buffer(data)
        except Exception as error:  # the package raises nothing narrower
            raise ConfigError(f"tokenizer={name} is no tokenizer.json: {error}") from error
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.data, self._name = data, name
        vocabulary = self._tokenizer.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values()) + 1
        names = [n for n in ((bos,) if bos else BOS_NAMES) if n in vocabulary]
        if not names:
            what = f"bos={bos!r} is no token of" if bos else "bos is missing, and none is known in"
            raise ConfigError(f"{what} tokenizer={name}; name the token that begins a document")
        self.bos_id = vocabulary[names[0]]
        self._tokenizer.add_special_tokens([names[0]])  # in some files it is a token like others
        self._tokenizer.encode_special_tokens = True  # a text that spells BOS out is text
        if not self.encode(UNKNOWN):
            raise ConfigError(
                f"tokenizer={name} leaves out characters that it does not know, so that its ids "
                "would be of another text; one with an unk_token, with byte_fallback, or of bytes "
                "has ids for all"
            )

    def encode(self, text: str) -> Sequence[int]:
        """Ids of a text, without special tokens.

        Raises:
            ConfigError: the package cannot read it.
        """
        # "fast" leaves out where in the text each token stands.
        try:
            ids = self._tokenizer.encode_batch_fast([text], add_special_tokens=False)[0].ids
        except Exception as error:  # the package raises nothing narrower
            raise ConfigError(f"tokenizer={self._name} cannot read a text: {error}") from error
        return ids if self.bos_id not in ids else self._without_bos(text)

    def _without_bos(self, text: str) -> Sequence[int]:
        """Ids of a text that some models read BOS from even so: it is cut within each of them."""
        found = self._tokenizer.encode(text, add_special_tokens=False)
        places = [at for at, i in zip(found.offsets, found.ids, strict=True) if i == self.bos_id]
        cuts = [(start + stop) // 2 for start, stop in places]
        if any(cut == start for cut, (start, _) in zip(cuts, places, strict=True)):
            raise ConfigError(
                f"tokenizer={self._name} makes bos, {self.bos_id}, of a single character of a "
                "text; name a token that no text has"
            )
        parts = itertools.pairwise([0, *cuts, len(text)])
        return [i for start, stop in parts for i in self.encode(text[start:stop])]

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without special tokens."""
        return self._tokenizer.decode([int(i) for i in ids])


class SentencePieceTokenizer:
    """A SentencePiece model."""

    kind = "sentencepiece"

    def __init__(self, data: bytes, name: str):
        package = require_package("sentencepiece", f"tokenizer={name}", "data")
        try:
            self._model = package.SentencePieceProcessor(model_proto=data)
        except RuntimeError as error:
            raise ConfigError(f"tokenizer={name} is no SentencePiece model: {error}") from error
        if self._model.bos_id() < 0:
            raise ConfigError(f"tokenizer={name} has no BOS, the token that begins a document")
        self.data = data
        self.vocab_size = self._model.vocab_size()
        self.bos_id = self._model.bos_id()

    def encode(self, text: str) -> Sequence[int]:
        """Ids of a text."""
        return self._model.encode(text)

    def decode(self, ids: Sequence[int]) -> str:
        """The text of ids, without control tokens."""
        return self._model.decode([int(i) for i in ids])


def open_tokenizer(
    spec: str, bos: str | None = None, *, known: Sequence[str] = ("bytes", "mistral")
) -> Tokenizer:
    """A tokenizer by name.

    Args:
        spec: ``bytes``, ``mistral`` (the paper's 32,000 pieces), or the path of a tokenizer.json or
            of a SentencePiece model.
        bos: the token that begins a document, for a tokenizer.json; without it the usual names.
        known: names, as an error lists them.

    Raises:
        ConfigError: there is no such file, it is neither, or its package is not installed.
    """
    path = file_of(spec)
    if spec == "bytes":
        tokenizer: Tokenizer = ByteTokenizer()
    elif path is None and spec == "mistral":
        raise ConfigError(
            "tokenizer=mistral is in the package mistral-common, which is not installed; install "
            "it with: pip install --no-deps mistral-common"
        )
    elif path is None:
        raise ConfigError(
            f"tokenizer={spec!r} is not known; it may be {', '.join(known)}, or the path of a "
            "tokenizer.json or of a SentencePiece model"
        )
    else:
        with given_by("tokenizer", path):
            data = read_bytes(path)
        if data.lstrip().startswith(b"{"):
            return HuggingFaceTokenizer(data, spec, bos)
        tokenizer = SentencePieceTokenizer(data, spec)
    if bos is not None:
        raise ConfigError(f"bos={bos!r} is only for a tokenizer.json; tokenizer={spec} has its own")
    return tokenizer


def file_of(spec: str) -> Path | None:
    """The file that the name of a tokenizer stands for; None where it has none, or none is there.

    ``mistral`` is inside mistral-common, which is not imported: it wants an older NumPy.
    """
    paths = [] if spec in ("bytes", "bpe", "mistral") else [user_path(spec, "tokenizer")]
    if spec == "mistral":
        package, name = MISTRAL
        found = importlib.util.find_spec(package)
        folders = (found.submodule_search_locations or ()) if found else ()
        paths = [Path(folder) / name for folder in folders]
    return next((path for path in paths if path.is_file()), None)


def train_bpe(texts: Iterable[str], vocab_size: int) -> HuggingFaceTokenizer:
    """A byte-level BPE learnt from texts; every text has ids, and decodes to itself.

    Raises:
        ConfigError: the package tokenizers is not installed.
    """
    package = require_package("tokenizers", "tokenizer=bpe", "data")
    level = package.pre_tokenizers.ByteLevel
    tokenizer = package.Tokenizer(package.models.BPE())
    tokenizer.pre_tokenizer = level(add_prefix_space=False)
    tokenizer.decoder = package.decoders.ByteLevel()
    trainer = package.trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[BOS],
        initial_alphabet=sorted(level.alphabet()),
        show_progress=False,
    )
    pieces = (p for t in texts for s in stretches(t, STRETCH) for p in _without_long_runs(s))
    _while_listening(lambda given: tokenizer.train_from_iterator(given, trainer), pieces)
    return HuggingFaceTokenizer(tokenizer.to_str().encode(), "bpe", BOS)


def _while_listening(train: Callable[[Iterator[str]], None], pieces: Iterator[str]) -> None:
    """``train(pieces)``, minutes without a look at signals, which this thread meanwhile waits for.

    After a signal no piece is given any more; what is under way then ends with the process.
    """
    failed: list[BaseException] = []
    stopped = threading.Event()

    def run() -> None:
        try:
            train(itertools.takewhile(lambda piece: not stopped.is_set(), pieces))
        except BaseException as error:  # whatever it is, it is the caller's
            failed.append(error)

    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    try:
        thread.join()
    except BaseException:
        stopped.set()
        thread.join(1)
        raise
    if failed:
        raise failed[0]


def _without_long_runs(text: str) -> Iterator[str]:
    """A text for training, cut where a run goes on for longer than `LONGEST_RUN`."""
    start = 0
    for run in re.finditer(rf"\S{{{LONGEST_RUN},}}|\s{{{LONGEST_RUN},}}", text):
        for at in range(run.start() + LONGEST_RUN, run.end(), LONGEST_RUN):
            yield text[start:at]
            start = at
    yield text[start:]


def encoder(tokenizer: Tokenizer, limit: int = STRETCH) -> Callable[[str], Iterator[Sequence[int]]]:
    """A function from a text to its ids, a stretch of at most ``limit`` characters at a time.

    The cuts change no id where a tokenizer splits text at single spaces, as all known ones do. One
    that adds or removes spaces, as those that normalise do, is cut there alone, and is given longer
    stretches where single spaces are rare.
    """
    # SentencePiece writes a space before a text: after a cut it stands for the one that was there.
    writes_space = list(tokenizer.encode("x y")) == [
        *tokenizer.encode("x"),
        *tokenizer.encode("y"),
    ]

    keeps_spaces = tokenizer.decode(list(tokenizer.encode(SPACES))) == SPACES
    marks = [mark for mark in MARKS if tokenizer.decode(list(tokenizer.encode(mark))) == mark]
    anywhere = keeps_spaces and (not writes_space or bool(marks))

    def encode(text: str) -> Iterator[Sequence[int]]:
        for index, stretch in enumerate(stretches(text, limit, anywhere=anywhere)):
            if index == 0 or (keeps_spaces and not writes_space):
                yield tokenizer.encode(stretch)
            elif not writes_space:  # its first space, a single one, is not to be stripped
                yield _behind_mark(tokenizer, [UNKNOWN], stretch)
            elif stretch[0] == " ":
                yield tokenizer.encode(stretch[1:])
            else:  # no space was here: the one that is written goes before a mark instead
                yield _behind_mark(tokenizer, marks, stretch)

    return encode


def _behind_mark(tokenizer: Tokenizer, marks: Sequence[str], stretch: str) -> Sequence[int]:
    """Ids of a stretch that does not begin its text.

    A mark is of use if it has tokens of its own; where none is, the stretch is a text by itself.
    """
    for mark in marks:
        before = list(tokenizer.encode(mark))
        ids = tokenizer.encode(mark + stretch)
        if list(ids[: len(before)]) == before:
            return ids[len(before) :]
    return tokenizer.encode(stretch)


def stretches(text: str, limit: int, *, anywhere: bool = True) -> Iterator[str]:
    """Cuts a text before single spaces between words.

    Args:
        text: the whole.
        limit: characters of a stretch.
        anywhere: whether it is cut anywhere where there is no such space for long, or else at the
            next one, behind more characters than the limit.
    """
    start = 0
    while len(text) - start > limit:
        stop = _last_space(text, start + 1 + limit // 2, start + limit)
        if stop is None:
            stop = start + limit if anywhere else _next_space(text, start + limit)
        yield text[start:stop]
        start = stop
    if start < len(text) or not text:
        yield text[start:]


def _last_space(text: str, low: int, high: int) -> int | None:
    at = text.rfind(" ", low, high)
    while at > 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
        at = text.rfind(" ", low, at)
    return None


def _next_space(text: str, low: int) -> int:
    """The place of the first single space between words from ``low`` on, or else the end."""
    at = text.find(" ", low, -1)
    while at >= 0:
        if not text[at - 1].isspace() and not text[at + 1].isspace():
            return at
        at = text.find(" ", at + 1, -1)
    return len(text)


FILES = {"bytes": None, "huggingface": "tokenizer.json", "sentencepiece": "tokenizer.model"}


def describe(tokenizer: Tokenizer) -> TokenizerFacts:
    """What a manifest says of a tokenizer."""
    return {
        "kind": tokenizer.kind,
        "file": FILES[tokenizer.kind],
        "sha256": hashlib.sha256(tokenizer.data).hexdigest(),
        "vocab_size": tokenizer.vocab_size,
        "bos_id": tokenizer.bos_id,
    }


def identity(said: TokenizerFacts) -> str:
    """What tells tokenizers apart, of what `describe` says."""
    return f"{said['kind']} {said['sha256']}"


def tokenizer_of(directory: Path) -> Tokenizer:
    """The tokenizer of a prepared directory, which holds a copy of it.

    Raises:
        RunDirectoryError: the directory was not prepared, or the file is not the one it was.
    """
    return load_tokenizer(directory, read_manifest(directory)["tokenizer"])


def load_tokenizer(directory: Path, said: TokenizerFacts) -> Tokenizer:
    """The tokenizer that `describe` described, from its file in ``directory``."""
    if said["kind"] == "bytes":
        return ByteTokenizer()
    path = directory / (said["file"] or "")
    data = read_bytes(path)
    if hashlib.sha256(data).hexdigest() != said["sha256"]:
        raise RunDirectoryError(f"{path} is not the tokenizer that the tokens were made with")
    if said["kind"] == "sentencepiece":
        return SentencePieceTokenizer(data, str(path))
    tokenizer = HuggingFaceTokenizer(data, str(path), _name_of(data, said["bos_id"]))
    return tokenizer


def _name_of(data: bytes, token_id: int) -> str:
    tokenizer = require_package("tokenizers", "tokenizer.json", "data").Tokenizer.from_buffer(data)
    return tokenizer.id_to_token(token_id)
