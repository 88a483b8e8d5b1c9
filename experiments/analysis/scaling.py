"""Does the loss fall faster with more Householder factors, at as many parameters?

    python -m experiments.analysis.scaling --workdir=OUT
    python -m experiments.analysis.scaling --workdir=OUT --preset=paper --data=tokens --only=768_1

trains a model of each size and number of factors, in ``OUT/runs/NAME``, and draws the loss on the
test split over the parameters. With more factors heads become fewer, or narrower, so that the
parameters stay: a panel each. What is finished is not trained again, and what was killed goes on;
``--only`` trains some, as on several machines, and then draws those that are there. Lengths, data,
optimiser and steps are flags, as in ``experiments.language_modeling``.

Source: https://arxiv.org/abs/2502.10297, scaling (heads as in its trios; head_dim by 4/(2+2n_h)).
Expect: in the paper more factors scale better than wider heads; the preset tiny is too short to
    tell, and shows that it runs.
Takes: of the preset tiny about 11 minutes on two CPU cores; of the paper's GPU months.
"""

import dataclasses
import sys
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.parallel import processes
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.loop import train
from deltaproduct_jax.training.records import CONFIG, RunRecords
from deltaproduct_jax.training.text import TextTask
from experiments.lib import flags
from experiments.lib.bench.report import begun, markdown, write_report
from experiments.lib.figures.language import draw_losses
from experiments.lib.figures.style import SECTION, Look
from experiments.lib.language_presets import PRESETS as MODELS
from experiments.lib.matched_shapes import WAYS, Shape, sizes_of

RUNS = "runs"
# Of a model, what a size or a number of factors decides, and what the text does.
DECIDED = ("vocab_size", "hidden_size", "intermediate_size", "num_heads", "head_dim")
DECIDED += ("num_householder",)


def _without_sizes(name: str) -> dict[str, Any]:
    return {field: value for field, value in MODELS[name].items() if field not in DECIDED}


# Few steps of small models: bytes of the standard library.
_TINY = _without_sizes("tiny") | {
    "sizes": ("48x6x12x128", "96x6x24x256", "144x6x36x384"),
    "steps": 200, "eval_every": 50, "checkpoint_every": 200, "warmup_steps": 20,
    "eval_lengths": (256,), "mixer": "delta_product",
}  # fmt: skip
PRESETS: dict[str, dict[str, Any]] = {
    "default": _TINY,
    "tiny": _TINY,
    "paper": _without_sizes("392m_1")
    | {
        "sizes": ("768x8x128x2048", "1024x12x128x2816", "1536x16x128x4096"),
        "steps_of_sizes": (36_240, 66_758, 104_905),
    },
}


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    """Which models; raises ConfigError where the fields make no sense."""

    sizes: tuple[str, ...] = setting(
        (), "D x H x K x MLP of each model with a single factor", filled=True
    )
    factors: tuple[int, ...] = setting(
        (1, 2, 3), "Householder factors per token (n_h)", filled=True, least=1
    )
    matched_by: tuple[str, ...] = setting(
        WAYS, "what becomes less with more: heads, head_dim", filled=True, one_of=WAYS
    )
    steps_of_sizes: tuple[int, ...] = setting((), "steps of each size; none: --steps", least=1)
    only: tuple[str, ...] = setting((), "names of the models trained now; none: all")

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        if self.steps_of_sizes and len(self.steps_of_sizes) != len(self.sizes):
            raise ConfigError(
                f"steps_of_sizes={self.steps_of_sizes} must be as many as sizes={self.sizes}"
            )
        widths = [size.partition("x")[0] for size in self.sizes]
        if len(set(widths)) < len(widths):
            raise ConfigError(
                f"sizes={','.join(self.sizes)} have a width D twice, by which models are called; "
                "give each size a width of its own, or a --workdir"
            )
        strange = set(self.only) - {cell.name for cell in self.cells()}
        if strange:
            known = ", ".join(cell.name for cell in self.cells())
            raise ConfigError(f"only={','.join(sorted(strange))} is no model; there are {known}")

    def cells(self) -> "list[Cell]":
        """The models, each once: those with a single factor are matched by either."""
        found: dict[str, Cell] = {}
        for index, size in enumerate(self.sizes):
            width, heads, head_dim, mlp = sizes_of("sizes", size, 4)
            for factors in self.factors:
                for way in self.matched_by:
                    name = f"{width}_{factors}" + ("" if factors == 1 else f"_{way}")
                    matched = self.matched_by if factors == 1 else (way,)
                    shape = Shape(1, heads, head_dim).with_factors(factors, way)
                    steps = self.steps_of_sizes[index] if self.steps_of_sizes else None
                    found[name] = Cell(name, matched, width, mlp, shape, steps)
        return list(found.values())


@dataclasses.dataclass(frozen=True)
class Cell:
    """A model of the figure, and how long it is trained."""

    name: str
    matched: tuple[str, ...]
    hidden_size: int
    intermediate_size: int
    shape: Shape
    steps: int | None


SECTIONS = {
    "scaling": ScalingConfig,
    "task": TextTask,
    "model": ModelConfig,
    "train": TrainConfig,
    "devices": DeviceConfig,
    **SECTION,
}


def runs_of(sections: dict[str, dict[str, Any]]) -> Iterator[tuple[Cell, RunConfig]]:
    """The run of each model."""
    task, given = TextTask(**sections["task"]), sections["model"]
    for cell in ScalingConfig(**sections["scaling"]).cells():
        sizes = {"hidden_size": cell.hidden_size, "intermediate_size": cell.intermediate_size}
        own = {**given, **sizes, **dataclasses.asdict(cell.shape)}
        model = ModelConfig.variant(own)(vocab_size=task.vocab_size, **own)
        steps = {} if cell.steps is None else {"steps": cell.steps}
        yield cell, RunConfig(task, model, TrainConfig(**{**sections["train"], **steps}))


def row_of(cell: Cell, config: RunConfig, results: dict[str, Any]) -> dict[str, Any]:
    """What the table and the figure have of a finished run, at the length trained if tested."""
    entries = {entry["length"]: entry for entry in results["test"]}
    entry = entries.get(config.task.train_length, entries[max(entries)])
    return {
        "name": cell.name,
        "matched": cell.matched,
        "hidden_size": cell.hidden_size,
        **dataclasses.asdict(cell.shape),
        "parameters": results["parameters"]["total"],
        "length": entry["length"],
        "loss": entry["loss"],
        "bits_per_byte": entry["bits_per_byte"],
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """A line for every finished run."""
    head = ("model", "D", "n_h", "heads", "head_dim", "parameters", "test loss", "bits per byte")
    names = ("name", "hidden_size", "num_householder", "num_heads", "head_dim")
    lines = [
        [
            *(row[name] for name in names),
            *(f"{row['parameters']:,}", f"{row['loss']:.4f}", f"{row['bits_per_byte']:.4f}"),
        ]
        for row in rows
    ]
    return markdown(head, lines)


def command(argv: Sequence[str]) -> None:
    """Trains, writes scaling.json and .md, draws scaling."""
    parsed = flags.parse(argv, SECTIONS, PRESETS, exclude=DECIDED)
    devices = DeviceConfig(**parsed.sections["devices"])
    processes.keep_programs(devices)
    processes.join(devices)
    options = ScalingConfig(**parsed.sections["scaling"])
    look, rows = Look(**parsed.sections["figures"]), []
    runs = [
        (cell, config, parsed.workdir / RUNS / cell.name)
        for cell, config in runs_of(parsed.sections)
    ]
    for _, config, folder in runs:  # what cannot be is said before any of them is trained
        if (folder / CONFIG).is_file():
            RunRecords(folder, config)
    for cell, config, folder in runs:
        if not options.only or cell.name in options.only:
            train(config, folder, ["experiments.analysis.scaling", *argv], devices=devices)
        is_there = (folder / CONFIG).is_file()
        results = RunRecords(folder, config).results() if is_there else None
        if results is not None:
            rows.append(row_of(cell, config, results))
    if processes.is_first():
        _show(rows, parsed.workdir, options, argv, look)


def _show(
    rows: list[dict[str, Any]],
    workdir: Path,
    options: ScalingConfig,
    argv: Sequence[str],
    look: Look,
) -> None:
    config, wanted = dataclasses.asdict(options), len(options.cells())
    record = begun("analysis.scaling", argv, config=config, wanted=wanted, rows=rows)
    print(write_report(workdir, "scaling", record, page))
    if rows:
        draw_losses(rows, workdir / "scaling", look)


def page(record: Mapping[str, Any]) -> list[str]:
    """What scaling.md holds."""
    rows = record["rows"]
    return [f"{len(rows)} of {record['wanted']} models are trained", table(rows)]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
