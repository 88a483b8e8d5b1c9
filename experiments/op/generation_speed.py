"""How fast does a model write: tokens per second of programs of many steps and of a plain loop.

    python -m experiments.op.generation_speed --workdir=runs/writing
    python -m experiments.op.generation_speed --workdir=runs/writing --preset=340m_2   # a GPU

``scan`` is ``models/generation``, all that it does on the host included: programs of ``stride``
tokens for all rows. ``loop`` calls a jitted step from Python for every token and looks at it, as
one does who wants to know where a text ends; ``loop_unread`` looks at none before the last. All
draw in the same way, and the same tokens: that is checked first. A second table has the tokens of
a prompt that are read in a second, by ``pieces`` or by steps. Parameters are drawn at random.

Source: own question; https://arxiv.org/abs/2502.10297 has no speed of decoding.
Expect: experiments/results/language/generation/ has a CPU's.
Takes: a minute on two cores.
"""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.models import ModelConfig, SequenceModel, count_parameters
from deltaproduct_jax.models.generation import Generator, Sampling
from deltaproduct_jax.models.generation.sampling import draw, needs_of, row_keys, rules_of
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.bench.report import begun, markdown, write_report
from experiments.lib.bench.timing import machine

_LANGUAGE = {"use_short_conv": True, "tie_embeddings": True}
PRESETS: dict[str, dict[str, Any]] = {
    "default": {
        "vocab_size": 257, "hidden_size": 256, "num_layers": 4, "num_heads": 4, "head_dim": 64,
        "intermediate_size": 704, **_LANGUAGE,
    },
    "340m_2": {
        "vocab_size": 32000, "hidden_size": 1024, "num_layers": 24, "num_heads": 4,
        "head_dim": 128, "num_householder": 2, "intermediate_size": 2816, "dtype": "bfloat16",
        "rows": (1, 8, 64), **_LANGUAGE,
    },
}  # fmt: skip
NAMES = ("loop", "loop_unread", "scan")
Row = dict[str, Any]


@dataclasses.dataclass(frozen=True)
class SpeedConfig:
    """What is timed."""

    rows: tuple[int, ...] = setting(
        (1, 8, 32), "texts written at the same time, in turn", filled=True, least=1
    )
    max_tokens: int = setting(128, "tokens of each", least=1)
    stride: int = setting(32, "tokens of one program", least=1)
    prompt_tokens: int = setting(512, "tokens of the prompt whose reading is timed", least=1)
    pieces: tuple[int, ...] = setting(
        (256, 32), "tokens read at once, descending", filled=True, least=1
    )
    repeats: int = setting(7, "timed rounds, after one that warms up", least=1)

    def __post_init__(self) -> None:
        """Checks every field; the generator's are the generator's to check."""
        check_fields(self)


@functools.partial(jax.jit, static_argnames=("graph", "sampling"), donate_argnames="state")
def step(
    params: Any,
    state: Any,
    tokens: jax.Array,
    place: jax.Array,
    *,
    graph: nnx.GraphDef,
    sampling: Sampling,
) -> tuple[jax.Array, Any]:
    """One token more in every row, as `Generator` draws it with seed 0."""
    model = nnx.merge(graph, params)
    logits, state = model.step(state, tokens)
    B = len(tokens)
    keys = row_keys(jax.random.key(0), jnp.arange(B, dtype=jnp.uint32), jnp.full(B, place))
    rules = rules_of([sampling] * B, model.config.vocab_size)
    return draw(keys, logits, rules, needs_of([sampling])), state


def writers(
    model: SequenceModel, config: SpeedConfig, sampling: Sampling, rows: int
) -> dict[str, Callable[[], np.ndarray]]:
    """By name, what writes ``[rows, max_tokens]``."""
    graph, params = nnx.split(model)
    take = functools.partial(step, params, graph=graph, sampling=sampling)
    first = (np.arange(rows) % model.config.vocab_size).astype(np.int32)
    start = jax.jit(functools.partial(model.init_state, rows))
    generator = Generator(model, rows=rows, stride=config.stride, pieces=config.pieces)

    def loop(read: Callable[[jax.Array], Any]) -> np.ndarray:
        state, tokens, found = start(), jnp.asarray(first), []
        for place in range(1, config.max_tokens + 1):
            tokens, state = take(state, tokens, np.int32(place))
            found.append(read(tokens))
        return np.stack([np.asarray(tokens) for tokens in found], axis=1)

    def scan() -> np.ndarray:
        options = {"max_tokens": config.max_tokens, "sampling": sampling}
        return np.asarray([c.tokens for c in generator.generate(first[:, None], **options)])

    runs = [lambda: loop(np.asarray), lambda: loop(lambda tokens: tokens), scan]
    return dict(zip(NAMES, runs, strict=True))


def readers(model: SequenceModel, config: SpeedConfig) -> dict[str, Callable[[], Any]]:
    """By name, what reads a prompt."""
    graph, params = nnx.split(model)
    prompt = (np.arange(config.prompt_tokens) % model.config.vocab_size).astype(np.int32)
    generator = Generator(model, pieces=config.pieces)
    only_state = jax.jit(lambda params, s, t: nnx.merge(graph, params).step(s, t)[1])

    def loop() -> Any:
        state = model.init_state(1)
        for token in prompt[:-1]:
            state = only_state(params, state, token[None])
        return jax.block_until_ready(state)

    return {
        "loop": loop,
        "pieces": lambda: jax.block_until_ready(generator.read(prompt.tolist()).state),
    }


def timed(runs: Mapping[str, Callable[[], Any]], repeats: int) -> dict[str, list[float]]:
    """Seconds of each round, all in turn, so that a busy moment of the machine meets them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(repeats + 1):
        for name, run in runs.items():
            began = time.perf_counter()
            run()
            if turn:
                seconds[name].append(time.perf_counter() - began)
    return seconds


def measure(model: SequenceModel, config: SpeedConfig, sampling: Sampling) -> Iterator[Row]:
    """The rows of both tables."""
    for rows in config.rows:
        runs = writers(model, config, sampling, rows)
        texts = {name: run() for name, run in runs.items()}
        for name, text in texts.items():
            same = float(np.mean(text == texts["scan"]))
            if same < 0.9:  # where rounding changes a draw, all behind it is another text
                raise ConfigError(f"{name} writes other texts than scan: {same:.0%} are the same")
        count = rows * config.max_tokens
        yield from _rows("write", rows, count, timed(runs, config.repeats))
    yield from _rows("read", 1, config.prompt_tokens, timed(readers(model, config), config.repeats))


def _rows(what: str, rows: int, count: int, seconds: Mapping[str, list[float]]) -> Iterator[Row]:
    base = statistics.median(seconds["loop"])
    for name, each in seconds.items():
        middle = statistics.median(each)
        yield {
            "what": what,
            "rows": rows,
            "name": name,
            "tokens_per_s": count / middle,
            "least": count / max(each),
            "most": count / min(each),
            "times_loop": base / middle,
        }


def table(rows: Sequence[Row]) -> str:
    """Rows as Markdown."""
    lines = [
        [
            *(row["what"], row["rows"], row["name"]),
            *(f"{row[name]:,.0f}" for name in ("tokens_per_s", "least", "most")),
            f"{row['times_loop']:.2f}",
        ]
        for row in rows
    ]
    return markdown(("what", "rows", "how", "tokens/s", "least", "most", "x loop"), lines)


def command(argv: Sequence[str]) -> None:
    """Measures, prints the table, writes generation.json and generation.md."""
    sections = {"model": ModelConfig, "speed": SpeedConfig, "sampling": Sampling}
    parsed = flags.parse(argv, sections, PRESETS)
    model_config = ModelConfig.variant(parsed.sections["model"])(**parsed.sections["model"])
    config = SpeedConfig(**parsed.sections["speed"])
    sampling = Sampling(**parsed.sections["sampling"])
    model = SequenceModel(model_config, rngs=nnx.Rngs(0))
    parameters = count_parameters(model)["total"]
    rows = list(measure(model, config, sampling))
    record = begun(
        "op.generation_speed",
        argv,
        model=dataclasses.asdict(model_config),
        config=dataclasses.asdict(config),
        sampling=dataclasses.asdict(sampling),
        parameters=parameters,
        machine=machine(),
        rows=rows,
    )
    print(write_report(parsed.workdir, "generation", record, page))


def page(record: Mapping[str, Any]) -> list[str]:
    """What generation.md holds."""
    model, config = record["model"], record["config"]
    head = (
        f"{model['mixer']}, {record['parameters']:,} parameters in {model['num_layers']} blocks, "
        f"vocabulary {model['vocab_size']}, {model['dtype']}; {config['max_tokens']} tokens a "
        f"row, stride {config['stride']}; {record['machine']}"
    )
    return [head, table(record["rows"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
