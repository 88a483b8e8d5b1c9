"""What do more Householder factors cost: tokens per second of training, and the time of a token?

    python -m experiments.analysis.throughput --workdir=OUT                  # a GPU of 80 GB
    python -m experiments.analysis.throughput --workdir=OUT --preset=small   # a CPU, to see it run

trains and writes with a model for each of ``--shapes``, factors x heads x width of a head, all else
alike. With more factors and fewer or narrower heads the parameters stay as many: that is the
paper's comparison. Each shape has a process of its own. ``relative`` is the speed over that of the
first shape, MFU the part of the chip's peak that 6 operations a parameter and token take.

Source: https://arxiv.org/abs/2502.10297, throughput at 1.3B parameters on an H100.
Expect: in the paper about 70 % of DeltaNet's tokens per second with two factors at as many
    parameters, 50 % with three.
Takes: about 20 minutes on a GPU of 80 GB, not run yet; 2 minutes with --preset=small on two cores.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.training.config import TrainConfig
from experiments.lib import flags
from experiments.lib.bench.decoding import Decoding, trained_and_decoded
from experiments.lib.bench.report import TIMES, begun, markdown, shown, times, write_report
from experiments.lib.bench.training_steps import OURS, Case, Row, measured
from experiments.lib.figures.language import draw_throughput
from experiments.lib.figures.style import SECTION, Look
from experiments.lib.matched_shapes import Shape

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "340m": {
        "batch_size": 8, "length": 4096, "hidden_size": 1024, "intermediate_size": 2816,
        "shapes": ("1x8x128", "2x4x128", "3x4x128", "2x8x85", "3x8x64"),
    },
    "small": {
        "batch_size": 2, "length": 64, "vocab_size": 256, "hidden_size": 96, "num_layers": 2,
        "intermediate_size": 192, "shapes": ("1x6x24", "2x4x24", "3x3x24", "2x6x16", "3x6x12"),
        "dtype": "float32", "decode_rows": (1, 8), "decode_tokens": 16, "repeats": 3,
    },
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class ThroughputConfig:
    """What is timed; raises ConfigError where the fields make no sense."""

    shapes: tuple[str, ...] = setting(
        ("1x8x256", "2x8x256", "3x8x256", "2x16x128", "3x24x85"),
        "factors x heads x head_dim of each model",
        filled=True,
    )
    batch_size: int = setting(8, "sequences B", least=1)
    length: int = setting(2048, "tokens T", least=1)
    vocab_size: int = setting(32000, "number of token ids", least=1)
    hidden_size: int = setting(2048, "width D of the residual stream", least=1)
    num_layers: int = setting(24, "number of blocks", least=1)
    intermediate_size: int = setting(5632, "width of the SwiGLU's hidden layer", least=1)
    gated: bool = setting(False, "with a forget gate")
    dtype: str = setting("bfloat16", "dtype of the computation; those that train are float32")
    remat: str = setting("products", "what blocks compute anew: none, products or blocks")
    steps: int = setting(4, "steps per timed round", least=1)
    repeats: int = setting(6, "timed rounds, after one that warms up", least=1)
    budget_s: float = setting(30.0, "seconds after which no further round begins", above=0)
    decode_rows: tuple[int, ...] = setting(
        (1, 32), "texts written at the same time, in turn", filled=True, least=1
    )
    decode_tokens: int = setting(64, "tokens of each", least=1)

    def __post_init__(self) -> None:
        """Checks every field; the model's are the model's to check."""
        check_fields(self)
        for shape in self.parsed:
            self.model(shape)

    @property
    def parsed(self) -> list[Shape]:
        """The shapes."""
        return [Shape.of_text("shapes", text) for text in self.shapes]

    def model(self, shape: Shape) -> ModelConfig:
        """The model of a shape, as the paper's language models are made."""
        return ModelConfig(
            vocab_size=self.vocab_size,
            mixer="gated_delta_product" if self.gated else "delta_product",
            hidden_size=self.hidden_size,
            num_layers=self.num_layers,
            **dataclasses.asdict(shape),
            use_short_conv=True,
            intermediate_size=self.intermediate_size,
            tie_embeddings=True,
            initializer="fla",
            initializer_range=0.006,
            dtype=self.dtype,
            remat=self.remat,
        )

    @property
    def training(self) -> TrainConfig:
        """The paper's optimiser, past its warm-up."""
        return TrainConfig(
            batch_size=self.batch_size, learning_rate=3e-4, schedule="constant",
            weight_decay=0.01, adam_b2=0.95, clip_norm=1.0,
        )  # fmt: skip

    def tokens(self) -> np.ndarray:
        """``[B, T + 1]``, the same in every process."""
        shape = (self.batch_size, self.length + 1)
        return np.random.default_rng(0).integers(self.vocab_size, size=shape, dtype=np.int32)


def measure(config: ThroughputConfig, shape: Shape) -> Row:
    """The row of a shape; one with "error" where it did not run."""
    timing = (config.tokens(), config.steps, config.repeats, config.budget_s)
    decoding = Decoding(config.decode_rows, config.decode_tokens)
    arguments = (config.training, config.model(shape), *timing, decoding)
    case = Case(trained_and_decoded, OURS, arguments, dataclasses.asdict(shape))
    ((row,),) = measured([case])
    return row


def table(rows: Sequence[Row], decode_rows: Sequence[int]) -> str:
    """The rows as Markdown, and below it what did not run."""
    head = ["n_h", "heads", "head_dim", "parameters", *TIMES, "tokens/s", "relative", "MFU, %"]
    head += ["temp GiB", "peak GiB", "compile s"]
    head += [f"ms a token, {count} at a time" for count in decode_rows]
    lines, failed = [], []
    for row in rows:
        names = [row[name] for name in ("num_householder", "num_heads", "head_dim")]
        if "error" in row:
            lines.append([*names, *[None] * (len(head) - len(names))])
            failed.append(f"n_h = {names[0]}, {names[1]} x {names[2]}: {row['error']}")
            continue
        memory = [row[name] and row[name] / 1024 for name in ("temp_mib", "peak_mib")]
        lines.append(
            [
                *(*names, f"{row['parameters']:,}", *times(row), f"{row['tokens_per_s']:,.0f}"),
                *(shown(row["relative"], ".2f"), shown(row["mfu"] and 100 * row["mfu"], ".1f")),
                *(*(shown(gib, ".2f") for gib in memory), f"{row['compile_s']:.1f}"),
                *(f"{ms:.3g}" for ms in row["decoding_ms"].values()),
            ]
        )
    return "\n\n".join([markdown(head, lines), *failed])


def command(argv: Sequence[str]) -> None:
    """Measures, writes throughput.json and .md after each shape, draws throughput."""
    parsed = flags.parse(argv, {"throughput": ThroughputConfig, **SECTION}, PRESETS)
    config = ThroughputConfig(**parsed.sections["throughput"])
    look = Look(**parsed.sections["figures"])
    rows: list[Row] = []
    record = begun("analysis.throughput", argv, config=dataclasses.asdict(config), rows=rows)
    for shape in config.parsed:
        row = measure(config, shape)
        if "error" not in row:
            done = [r for r in rows if "error" not in r]
            row["relative"] = row["tokens_per_s"] / (done or [row])[0]["tokens_per_s"]
        rows.append(row)
        text = write_report(parsed.workdir, "throughput", record, page)
    print(text)
    done = [row for row in rows if "error" not in row]
    if not done:
        raise ConfigError(f"no model ran: {rows[0]['error']}")
    draw_throughput(done, dataclasses.asdict(config), parsed.workdir / "throughput", look)


def page(record: Mapping[str, Any]) -> list[str]:
    """What throughput.md holds."""
    config, rows = record["config"], record["rows"]
    machines = dict.fromkeys(row["machine"] for row in rows if "machine" in row)
    head = (
        f"B={config['batch_size']} T={config['length']} D={config['hidden_size']}, "
        f"{config['num_layers']} blocks, vocabulary {config['vocab_size']}, "
        f"{'gated' if config['gated'] else 'ungated'}; {config['dtype']}, "
        f"remat={config['remat']}; {'; '.join(machines)}"
    )
    return [head, table(rows, config["decode_rows"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
