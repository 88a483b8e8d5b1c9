"""What is prepared and what is drawn: the fields that are flags."""

import dataclasses
from collections.abc import Sequence
from typing import Any

from deltaproduct_jax.data import standard_library, workers
from deltaproduct_jax.data.packing import PACKINGS
from deltaproduct_jax.data.splits import matches, names_inside, split_of
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.settings import check_fields, setting

HELD_OUT = 0.005
VOCAB_SIZE, TRAIN_BYTES = 32_000, 2**28
FEWEST_OF_BPE = 257  # BOS and every byte
MOST_OF_BPE = 2**24
SAME_BYTES = ("workers",)  # fields that change nothing of what is written


@dataclasses.dataclass(frozen=True)
class PrepareConfig:
    """What is prepared, and how; raises ConfigError where the fields make no sense."""

    sources: tuple[str, ...] = setting(
        (),
        "a file or folder of text (each file one document), of lines of JSON (.jsonl, .ndjson, "
        ".json) or of .parquet; may be repeated",
        repeated=True,
    )
    pattern: tuple[str, ...] = setting(
        ("*.txt", "*.jsonl", "*.parquet"), "which files of a folder are taken, as in *.c,*.h"
    )
    text_field: str = setting("text", "the field or column of a document's text")
    tokenizer: str = setting(
        "bpe",
        "bytes, bpe (trained on the sources), mistral (the paper's), or the path of a "
        "tokenizer.json or of a SentencePiece model",
    )
    bos: str | None = setting(
        None, "of a tokenizer.json, the token that begins a document; none: the usual names"
    )
    vocab_size: int | None = setting(
        None, f"of bpe; none: {VOCAB_SIZE}", least=FEWEST_OF_BPE, most=MOST_OF_BPE
    )
    train_bytes: int | None = setting(
        None, f"of text that bpe is trained on; none: {TRAIN_BYTES}", least=1
    )
    valid_fraction: float | None = setting(
        None, f"documents for validation; none: {HELD_OUT}, or 0 with valid_paths"
    )
    test_fraction: float | None = setting(
        None, f"documents for the test; none: {HELD_OUT}, or 0 with test_paths"
    )
    valid_paths: tuple[str, ...] = setting(
        (),
        "files for validation by their paths in the folder given, as in */drivers/*; before any "
        "fraction",
    )
    test_paths: tuple[str, ...] = setting((), "files for the test, written alike")
    shard_bytes: int = setting(2**26, "of sources, about, that a shard is made of", least=1)
    workers: int | None = setting(None, "processes; none: one for every core", least=1)

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        if self.tokenizer != "bpe":
            for name in ("vocab_size", "train_bytes"):
                if getattr(self, name) is not None:
                    raise ConfigError(
                        f"{name}={getattr(self, name)} is only for tokenizer=bpe, which is "
                        f"trained; tokenizer={self.tokenizer} is what it is"
                    )
        elif self.bos is not None:
            raise ConfigError(f"bos={self.bos!r} is only for a tokenizer.json, got tokenizer=bpe")
        for name, value in zip(("valid_fraction", "test_fraction"), self.fractions, strict=True):
            if not 0 <= value < 1:
                raise ConfigError(f"{name}={value} must be at least 0 and below 1")
        if sum(self.fractions) >= 1:
            raise ConfigError(
                f"valid_fraction={self.fractions[0]} and test_fraction={self.fractions[1]} leave "
                "nothing to train on; their sum must be below 1"
            )

    @property
    def bpe_size(self) -> int:
        """Tokens of a BPE that is trained."""
        return VOCAB_SIZE if self.vocab_size is None else self.vocab_size

    @property
    def bpe_bytes(self) -> int:
        """Of text that a BPE is trained on."""
        return TRAIN_BYTES if self.train_bytes is None else self.train_bytes

    @property
    def fractions(self) -> tuple[float, float]:
        """Of documents, for validation and for the test."""
        valid = 0.0 if self.valid_paths else HELD_OUT
        test = 0.0 if self.test_paths else HELD_OUT
        return (
            valid if self.valid_fraction is None else self.valid_fraction,
            test if self.test_fraction is None else self.test_fraction,
        )

    @property
    def processes(self) -> int:
        """How many work at once."""
        return workers.cores() if self.workers is None else self.workers

    def split_of(self, inside: str, text: str) -> str:
        """The split of a document, by its file's path inside its source or by what it says."""
        return self.split_of_path(inside) or split_of(text.encode(), *self.fractions)

    def split_of_path(self, inside: str) -> str | None:
        """The split that the path of a file inside its source decides, if it does."""
        for split, patterns in (("valid", self.valid_paths), ("test", self.test_paths)):
            if matches(names_inside(inside), patterns):
                return split
        return None

    def require_held_out(self, insides: Sequence[str]) -> None:
        """Raises ConfigError where a flag for files of a split has none of these paths."""
        for name in ("valid_paths", "test_paths"):
            patterns = getattr(self, name)
            if patterns and not any(matches(names_inside(path), patterns) for path in insides):
                raise ConfigError(
                    f"{name}={','.join(patterns)!r} matches no file; they are matched by their "
                    f"paths in a folder of sources, such as {names_inside(insides[0])[-1]!r}"
                )

    def identity(self) -> dict[str, Any]:
        """The fields that what is written depends on, as JSON has them."""
        fields = dataclasses.asdict(self)
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in fields.items()
            if name not in SAME_BYTES
        }


@dataclasses.dataclass(frozen=True)
class StreamConfig:
    """Which text, and how it is packed; raises ConfigError where the fields make no sense."""

    data: tuple[str, ...] = setting(
        (standard_library.NAME,),
        f"folders of experiments.prepare_text, or {standard_library.NAME}: Python's own sources",
        filled=True,
    )
    data_weights: tuple[float, ...] = setting(
        (), "shares of the folders in every stretch of rows; none: alike", above=0
    )
    packing: str = setting("concatenate", f"one of {', '.join(PACKINGS)}", one_of=PACKINGS)

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        if self.data_weights and len(self.data_weights) != len(self.data):
            raise ConfigError(
                f"data_weights={self.data_weights} must be as many as data={self.data}"
            )
