"""The paper's figures and tables from the records of runs.

    python -m experiments.figures --workdir=OUT --source=runs/groups --preset=factors
    python -m experiments.figures --workdir=OUT --source=runs/groups --preset=layers
    python -m experiments.figures --workdir=OUT --source=runs/languages --preset=languages
    python -m experiments.figures --workdir=OUT --source=runs/groups --preset=escape

``--kind=cumulative`` draws the fraction of sequences right up to each position, a panel a value of
``--x`` and a curve a value of ``--by``: the median over all other settings, seeds above all, and
every run thinly or as a band. ``--kind=table`` puts median and best over them into a table,
``--kind=escape`` the fraction of runs that reach a threshold, as a table and bars. The numbers are
written beside the picture. Presets are the figures of https://arxiv.org/abs/2502.10297.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deltaproduct_jax.errors import ConfigError, require_one_of
from deltaproduct_jax.files import write_file
from deltaproduct_jax.settings import setting
from experiments.lib import flags
from experiments.lib.figures.plots import save
from experiments.lib.figures.tables import (
    escape_markdown,
    escape_table,
    scores_markdown,
    scores_table,
    to_csv,
)
from experiments.lib.run_records import Record, choose, grouped, label, read_records

# The number that each kind looks at unless --metric says so.
METRICS = {
    "cumulative": "strict.cumulative",
    "table": "strict.scaled_accuracy",
    "escape": "strict.sequence_accuracy",
}
THRESHOLD = 0.9
# Entries of a legend within the axes, and the room that a longer one takes beside them.
MOST_INSIDE, LEGEND_INCHES = 6, 2.2
COLORS = tuple(f"C{index}" for index in range(10))

PRESETS: dict[str, dict[str, Any]] = {
    "default": {},
    "factors": {"by": "num_householder", "where": "num_layers=1", "name": "factors"},
    "layers": {"by": "num_layers", "where": "num_householder=1", "name": "layers"},
    "languages": {"kind": "table", "by": "mixer", "x": "language", "name": "languages"},
    "escape": {"kind": "escape", "name": "escape"},
}


@dataclasses.dataclass(frozen=True)
class FigureConfig:
    """What is drawn from which runs; raises ConfigError where the fields make no sense."""

    source: str = setting("", "folder of a sweep, its results.csv, or a folder of run directories")
    kind: str = setting("cumulative", f"one of {', '.join(METRICS)}")
    x: str = setting("group", "setting of the panels, of the columns, of the bars' places")
    by: str = setting("num_householder", "settings, a comma list: of the curves, rows, bars")
    where: str = setting("", "only runs with these settings, as num_layers=1;group=S3,S4")
    length: int | None = setting(None, "test length looked at; none: the longest of each run")
    metric: str | None = setting(
        None,
        "path of the number in an entry of results.json's test; none: strict.cumulative, "
        "strict.scaled_accuracy (table) or strict.sequence_accuracy (escape)",
    )
    threshold: float | None = setting(
        None, f"score from which a run has escaped; none: {THRESHOLD}"
    )
    band: bool = setting(False, "a band from the worst run to the best instead of a line each")
    name: str | None = setting(None, "of the files; none: the kind")

    def __post_init__(self):
        if not self.source:
            raise ConfigError("--source is missing; give the folder of a sweep or of runs")
        require_one_of("kind", self.kind, METRICS)
        if self.threshold is not None and self.kind != "escape":
            raise ConfigError(f"threshold={self.threshold} needs kind=escape, got {self.kind!r}")
        if self.band and self.kind != "cumulative":
            raise ConfigError(f"band=True needs kind=cumulative, got {self.kind!r}")
        if self.x in self.keys:
            raise ConfigError(f"x={self.x!r} is among by={self.by!r} too; give another setting")

    @property
    def keys(self) -> list[str]:
        """The settings of ``by``."""
        return list(filter(None, (key.strip() for key in self.by.split(","))))


def curves_of(records: Sequence[Record], metric: str, length: int | None) -> np.ndarray:
    """``[runs, positions]``; ConfigError if the runs' curves differ in length."""
    curves = []
    for record in records:
        found: Any = record.entry(length)
        for name in metric.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        if not isinstance(found, list):
            raise ConfigError(
                f"metric={metric!r} is no curve in the results of run {record.name}; it may be "
                f"{METRICS['cumulative']}"
            )
        curves.append(found)
    if len(set(map(len, curves))) > 1:
        raise ConfigError(
            f"the runs of one curve, such as {records[0].name}, were tested at different lengths; "
            "give --length or more of --by and --where"
        )
    return np.array(curves)


def cumulative(records: Sequence[Record], config: FigureConfig, path: Path) -> list[Path]:
    """Draws the curves; returns the picture and the numbers drawn."""
    panels = grouped(records, [config.x])
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    figure = Figure(figsize=(1.4 + 4.2 * columns, 0.6 + 3.2 * rows), layout="constrained")
    FigureCanvasAgg(figure)
    cells = figure.subplots(rows, columns, squeeze=False).flat
    drawn: dict[str, Any] = {}
    for axes, (panel, members) in zip(cells, panels.items(), strict=False):
        curves = {
            label(config.keys, group): curves_of(runs, config.metric, config.length)
            for group, runs in grouped(members, config.keys).items()
        }
        draw_curves(axes, curves, band=config.band)
        trained = {record.settings.get("train_length") for record in members}
        if len(trained) == 1 and None not in trained:
            axes.axvline(*trained, color="grey", linestyle="--", label="trained up to here")
        title = label([config.x], panel)
        axes.set(title=title, xlabel="position", ylabel="fraction of sequences right so far")
        _add_legend(axes)
        drawn[title] = {
            name: {
                "median": np.median(runs, axis=0).round(4).tolist(),
                "runs": runs.round(4).tolist(),
            }
            for name, runs in curves.items()
        }
    for axes in list(cells):  # places without a panel
        axes.set_axis_off()
    save(figure, _file(path, ".png"))
    write_file(_file(path, ".json"), json.dumps(drawn).encode() + b"\n")
    return [_file(path, ".png"), _file(path, ".json")]


def _add_legend(axes: Axes) -> None:
    """Within the axes, or beside them where it would cover what is drawn."""
    if len(axes.get_legend_handles_labels()[0]) <= MOST_INSIDE:
        axes.legend(fontsize="small")
        return
    axes.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0)
    width, height = axes.figure.get_size_inches()
    axes.figure.set_size_inches(width + LEGEND_INCHES, height)


def draw_curves(axes: Axes, curves: Mapping[str, np.ndarray], *, band: bool) -> None:
    """Draws the median of the runs ``[runs, positions]`` of each name over the runs or a band."""
    for index, (name, runs) in enumerate(curves.items()):
        color, positions = COLORS[index % len(COLORS)], np.arange(runs.shape[1])
        if band:
            axes.fill_between(positions, runs.min(0), runs.max(0), color=color, alpha=0.2)
        else:
            axes.plot(positions, runs.T, color=color, alpha=0.3, linewidth=0.8)
        text = f"{name} ({len(runs)} runs)" if len(runs) > 1 else name
        axes.plot(positions, np.median(runs, axis=0), color=color, linewidth=2, label=text)
    axes.set(xlim=(0, None), ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)


def table(records: Sequence[Record], config: FigureConfig, path: Path) -> list[Path]:
    """Writes and prints the table of medians and bests."""
    rows = scores_table(records, config.keys, config.x, config.metric, config.length)
    text = scores_markdown(rows, config.keys)
    print(f"{config.metric}, median (best) over runs:\n\n{text}", end="")
    return write_table(path, rows, text)


def escape(records: Sequence[Record], config: FigureConfig, path: Path) -> list[Path]:
    """Writes and prints the table of escape fractions, and draws them as bars."""
    threshold = THRESHOLD if config.threshold is None else config.threshold
    rows = escape_table(records, config.keys, config.x, config.metric, config.length, threshold)
    text = escape_markdown(rows, config.keys)
    at = "the longest length tested" if config.length is None else f"length {config.length}"
    says = f"runs with {config.metric} of at least {threshold} at {at}"
    print(f"{says}:\n\n{text}", end="")
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    draw_bars(axes, rows, config.keys)
    axes.set(xlabel=config.x, ylabel="fraction of runs", title=says, ylim=(0, 1.1))
    axes.title.set_fontsize("small")
    _add_legend(axes)
    save(figure, _file(path, ".png"))
    return [_file(path, ".png"), *write_table(path, rows, text)]


def draw_bars(axes: Axes, rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """A cluster of bars a column of an escape table, a bar a row; no bar where nothing was run."""
    values = [column.removesuffix(" escaped") for column in rows[0] if column.endswith(" escaped")]
    width = 0.8 / len(rows)
    for index, row in enumerate(rows):
        places, heights = [], []
        for place, value in enumerate(values):
            runs, escaped = row[f"{value} runs"], row[f"{value} escaped"]
            if runs:
                places.append(place + (index - (len(rows) - 1) / 2) * width)
                heights.append(escaped / runs)
                axes.annotate(
                    f"{escaped}/{runs}", (places[-1], heights[-1]), ha="center", va="bottom",
                    fontsize="x-small",
                )  # fmt: skip
        name = label(keys, tuple(row[key] for key in keys))
        axes.bar(places, heights, width, label=name, color=COLORS[index % len(COLORS)])
    axes.set_xticks(range(len(values)), values)
    axes.grid(axis="y", alpha=0.3)


def _file(path: Path, ending: str) -> Path:
    return path.with_name(path.name + ending)


def write_table(path: Path, rows: Sequence[Mapping[str, Any]], text: str) -> list[Path]:
    """Writes a table as CSV and Markdown."""
    write_file(_file(path, ".csv"), to_csv(rows))
    write_file(_file(path, ".md"), text.encode())
    return [_file(path, ".csv"), _file(path, ".md")]


KINDS = {"cumulative": cumulative, "table": table, "escape": escape}


def command(argv: Sequence[str]) -> None:
    """Draws what the flags say."""
    parsed = flags.parse(argv, {"figure": FigureConfig}, PRESETS)
    config = FigureConfig(**parsed.sections["figure"])
    records = choose(read_records(Path(config.source)), config.where)
    metric = METRICS[config.kind] if config.metric is None else config.metric
    path = parsed.workdir / (config.name or config.kind)
    for written in KINDS[config.kind](records, dataclasses.replace(config, metric=metric), path):
        print(f"written: {written}")


def main(argv: Sequence[str]) -> int:
    """Exit code of the command; ``argv`` without the program's name."""
    return flags.run(command, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
