"""How does the loss go on beyond the length that a language model was trained on?

    python -m experiments.analysis.length_extrapolation --workdir=OUT --runs=runs/a,runs/b \
        --data=tokens/code,tokens/prose --length=32768

reads rows of each text by each model, one state all the way, and draws the loss at each position
and its mean up to there, a column for each text. Documents stand one after another with BOS before
each and no reset between them, as the models were trained. ``extrapolation.json`` has the points.

Source: https://arxiv.org/abs/2502.10297, length extrapolation (trained on 4,096, read to 32,768).
Expect: in the paper the loss of DeltaNet rises behind the length trained, that of n_h = 3 hardly.
Takes: seconds on a CPU for the preset tiny's model; minutes on a GPU for the paper's.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deltaproduct_jax.analysis.length_extrapolation import PIECE, by_position, token_losses
from deltaproduct_jax.data import standard_library
from deltaproduct_jax.data.splits import SPLITS
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.settings import check_fields, seed_setting, setting
from experiments.lib import flags
from experiments.lib.bench.report import begun, markdown, write_report
from experiments.lib.bench.timing import machine
from experiments.lib.figures.language import draw_extrapolation
from experiments.lib.figures.style import SECTION, Look
from experiments.lib.language_runs import names_of_texts, open_language_models, rows_of

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "tiny": {"length": 4096, "rows": 8, "batch_size": 8, "piece": 256, "window": 64},
}


@dataclasses.dataclass(frozen=True)
class ExtrapolationConfig:
    """Who reads what; raises ConfigError where the fields make no sense."""

    runs: tuple[str, ...] = setting((), "run directories, or folders of flash-linear-attention")
    checkpoint: str = setting("best", "of a run directory: best, newest, or a step")
    data: tuple[str, ...] = setting(
        (standard_library.NAME,), "folders of experiments.prepare_text, a column of the figure each"
    )
    split: str = setting("test", f"one of {', '.join(SPLITS)}", one_of=SPLITS)
    length: int = setting(32768, "tokens of a row", least=1)
    rows: int = setting(16, "rows of each text", least=1)
    batch_size: int = setting(2, "rows read at a time", least=1)
    piece: int = setting(PIECE, "tokens read at once", least=1)
    window: int = setting(256, "tokens from one point of a curve to the next", least=1)
    dtype: str | None = setting(None, "dtype of the computation; none: the model's own")
    seed: int = seed_setting("orders the documents")

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        if self.rows % self.batch_size:
            raise ConfigError(
                f"rows={self.rows} must be a multiple of batch_size={self.batch_size}"
            )
        if self.length % self.window:
            raise ConfigError(f"window={self.window} must divide length={self.length}")


def measure(config: ExtrapolationConfig) -> Iterator[dict[str, Any]]:
    """An entry for each text and model."""
    names = names_of_texts(config.data)
    models = open_language_models(config.runs, config.checkpoint, config.dtype)
    wanted = {"count": config.rows, "length": config.length, "seed": config.seed}
    texts = [rows_of(data, config.split, **wanted, models=models) for data in config.data]
    for name, text in zip(names, texts, strict=True):
        for label, model, trained, _ in models:
            losses = token_losses(
                model, text.rows, batch_size=config.batch_size, piece=config.piece
            )
            curves = dataclasses.asdict(by_position(losses, config.window))
            yield {"data": name, "label": label, "trained": trained, **curves}


def table(found: Sequence[dict[str, Any]]) -> str:
    """A line for each text and model: the loss around the length trained, and at the end."""
    lines = []
    for entry in found:
        trained = entry["trained"]
        within = [
            loss
            for place, loss in zip(entry["position"], entry["loss"], strict=True)
            if trained is not None and trained / 2 < place <= trained
        ]
        last = entry["loss"][-max(1, len(entry["loss"]) // 8) :]
        lines.append(
            [
                *(entry["data"], entry["label"], trained),
                f"{sum(within) / len(within):.3f}" if within else None,
                f"{sum(last) / len(last):.3f}",
                f"{entry['running_loss'][-1]:.3f}",
                f"{entry['running_accuracy'][-1]:.3f}",
            ]
        )
    head = ("text", "model", "trained on", "loss in the second half of that", "in the last eighth")
    return markdown((*head, "of all", "accuracy"), lines)


def command(argv: Sequence[str]) -> None:
    """Reads, writes extrapolation.json and .md, draws extrapolation."""
    parsed = flags.parse(argv, {"extrapolation": ExtrapolationConfig, **SECTION}, PRESETS)
    config = ExtrapolationConfig(**parsed.sections["extrapolation"])
    look = Look(**parsed.sections["figures"])
    found = list(measure(config))
    config_said = dataclasses.asdict(config)
    record = begun("analysis.length_extrapolation", argv, config=config_said, machine=machine())
    record["curves"] = found
    print(write_report(parsed.workdir, "extrapolation", record, page))
    draw_extrapolation(found, parsed.workdir / "extrapolation", look)


def page(record: Mapping[str, Any]) -> list[str]:
    """What extrapolation.md holds."""
    config = record["config"]
    head = f"{config['rows']} rows of {config['length']} tokens of split {config['split']}"
    return [f"{head}; {record['machine']}", table(record["curves"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
