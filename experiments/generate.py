"""Text from a trained language model, on standard output.

    python -m experiments.generate --run=DIR --prompt=TEXT --max_tokens=100 --temperature=0.8 \\
        --top_p=0.95

goes on with the prompt, and shows the text as it comes. ``--prompt`` may be given several times,
and ``--samples`` asks for several texts of each: they are written at the same time, and shown one
after another. A text ends after ``--max_tokens``, at a ``--stop`` string, or where the model begins
another document. The same ``--seed`` gives the same text, whatever is written beside it.

Source: https://arxiv.org/abs/2502.10297; the recurrence lets a model write with a state that stays
    as large as it was.
Expect: the prompt and what follows it; tokens and seconds on standard error.
Takes: seconds to load and compile, then 100 tokens in less than a second for a small model.
"""

import dataclasses
import sys
import time
from collections.abc import Iterator, Sequence

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.evaluation.models import open_model, with_room_for
from deltaproduct_jax.files import any_path, given_by
from deltaproduct_jax.models.generation import Generator, Piece, Request, Sampling
from deltaproduct_jax.models.generation.generator import collect
from deltaproduct_jax.settings import LARGEST_COUNT, check_fields, seed_setting, setting
from experiments.lib import flags

MOST_TEXTS = 100_000


@dataclasses.dataclass(frozen=True)
class GenerateConfig:
    """What is written; raises ConfigError where the fields make no sense."""

    run: str = setting("", "run directory of a language model, or a folder as fla has them")
    checkpoint: str = setting("best", "of a run: best, newest, or the step of one")
    tokenizer: str | None = setting(
        None, "bytes, mistral, or the path of one; none: the one that the text or folder had"
    )
    prompt: tuple[str, ...] = setting(
        (), "text that is gone on with; may be repeated; none: a document's start", repeated=True
    )
    samples: int = setting(1, "texts for each prompt", least=1)
    max_tokens: int = setting(100, "tokens of a text at most", most=LARGEST_COUNT, least=1)
    stop: tuple[str, ...] = setting((), "a string that ends a text; may be repeated", repeated=True)
    seed: int = seed_setting("of all draws")
    rows: int = setting(16, "texts that are written at the same time", least=1)
    echo: bool = setting(True, "show the prompt before what follows it")

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        if not self.run:
            raise ConfigError("--run is missing; give the directory of a language model's run")
        texts = self.samples * max(len(self.prompt), 1)
        if texts > MOST_TEXTS:
            raise ConfigError(
                f"samples={self.samples} makes {texts} texts, which are kept until they are shown; "
                f"they may be {MOST_TEXTS} at most"
            )
        if "" in self.stop:
            raise ConfigError("stop holds an empty string, which ends any text")

    @property
    def texts(self) -> list[str]:
        """The prompt of every text, in order."""
        return [prompt for prompt in self.prompt or ("",) for _ in range(self.samples)]


def write(config: GenerateConfig, sampling: Sampling) -> Iterator[str]:
    """What is shown, as it comes; the last line of standard error says how long it took."""
    run = any_path(config.run, "run")
    with given_by("run", run):
        opened = open_model(run, checkpoint=config.checkpoint, tokenizer=config.tokenizer)
    rows, encode = min(config.rows, len(config.texts)), opened.tokenizer.encode
    ids = {text: [opened.tokenizer.bos_id, *encode(text)] for text in {*config.texts}}
    longest = max(map(len, ids.values())) + config.max_tokens - 1  # the last is drawn, not read
    what = f"a prompt, max_tokens={config.max_tokens} and rows={rows}"
    generator = Generator(
        with_room_for(opened.model, longest, rows, what),
        rows=rows,
        decode=opened.tokenizer.decode,
        vocab_size=opened.tokenizer.vocab_size,
    )
    requests = (
        Request(
            ids[text],
            max_tokens=config.max_tokens,
            sampling=sampling,
            stop_tokens=opened.ends,
            stop=config.stop,
        )
        for text in config.texts
    )
    began = time.perf_counter()
    counted = _Counted(generator.stream(requests, seed=config.seed))
    shown = config.texts if config.echo else [""] * len(config.texts)
    if len(shown) == 1:
        yield shown[0]
        yield from (piece.text for piece in counted)
        yield "\n"
    else:
        found = collect(counted, len(shown))
        for number, (prompt, completion) in enumerate(zip(shown, found, strict=True), 1):
            yield f"== {number} of {len(shown)} ==\n{prompt}{completion.text}\n"
    seconds = time.perf_counter() - began
    print(f"{counted.tokens} tokens in {seconds:.2f} s, compiling included", file=sys.stderr)


class _Counted:
    """Pieces as they come, and how many tokens they had."""

    def __init__(self, pieces: Iterator[Piece]):
        self._pieces, self.tokens = pieces, 0

    def __iter__(self) -> Iterator[Piece]:
        for piece in self._pieces:
            self.tokens += len(piece.tokens)
            yield piece


def command(argv: Sequence[str]) -> None:
    """Writes text to standard output."""
    values = flags.parse_fields(argv, {"generate": GenerateConfig, "sampling": Sampling})
    texts = write(GenerateConfig(**values["generate"]), Sampling(**values["sampling"]))
    for text in texts:
        print(text, end="", flush=True)


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
