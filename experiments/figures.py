"""How far do runs get, by a setting and over seeds: the paper's figures and tables, from records.

    python -m experiments.figures --workdir=OUT --source=runs/groups --preset=factors
    python -m experiments.figures --workdir=OUT --source=runs/groups --preset=layers
    python -m experiments.figures --workdir=OUT --source=runs/languages --preset=languages
    python -m experiments.figures --workdir=OUT --source=runs/groups --preset=escape

``--kind=cumulative`` draws the fraction of sequences right up to each position, a panel a value of
``--x`` and a curve a value of ``--by``: the median over all other settings, seeds above all, and
every run thinly or as a band. ``--kind=table`` puts median and best over them into a table,
``--kind=escape`` the fraction of runs that reach a threshold, as a table and bars. The numbers are
written before the picture, which needs matplotlib.

Source: https://arxiv.org/abs/2502.10297: accuracy over length by n_h and by layers (state tracking)
    and the table of formal languages, as in https://arxiv.org/abs/2411.12537, table 3.
Expect: experiments/results/state_tracking/ holds what the runs of this project gave.
Takes: seconds, on any machine, from the records of a sweep.
"""

import dataclasses
import json
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from deltaproduct_jax.errors import ConfigError, require_one_of
from deltaproduct_jax.files import user_path, write_file
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.figures.curves import (
    CURVE,
    bars_of,
    draw_panels,
    numbers_of,
    panels_of,
    trained_lengths,
)
from experiments.lib.figures.style import save
from experiments.lib.figures.tables import (
    escape_markdown,
    escape_table,
    scores_markdown,
    scores_table,
    to_csv,
)
from experiments.lib.run_records import Record, choose, read_records

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# The number that each kind looks at unless --metric says so.
METRICS = {
    "cumulative": CURVE,
    "table": "strict.scaled_accuracy",
    "escape": "strict.sequence_accuracy",
}
THRESHOLD = 0.9

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
    band: bool = setting(False, "a band from the worst run to the best instead of every run's line")
    name: str | None = setting(None, "of the files; none: the kind")

    def __post_init__(self):
        check_fields(self)
        if not self.source:
            raise ConfigError("--source is missing; give the folder of a sweep or of runs")
        require_one_of("kind", self.kind, METRICS)
        if self.threshold is not None and self.kind != "escape":
            raise ConfigError(f"threshold={self.threshold} needs kind=escape, got {self.kind!r}")
        if self.band and self.kind != "cumulative":
            raise ConfigError(f"band=True needs kind=cumulative, got {self.kind!r}")
        if self.name is not None and Path(self.name).name != self.name:
            raise ConfigError(f"name={self.name!r} must be the name of a file, without folders")
        if self.x in self.keys:
            raise ConfigError(f"x={self.x!r} is among by={self.by!r} too; give another setting")

    @property
    def keys(self) -> list[str]:
        """The settings of ``by``."""
        return list(filter(None, (key.strip() for key in self.by.split(","))))


def cumulative(records: Sequence[Record], config: FigureConfig, path: Path) -> Iterator[Path]:
    """Writes the numbers drawn, then draws the curves."""
    panels = panels_of(records, config.x, config.keys, config.metric, config.length)
    yield written(path, ".json", json.dumps(numbers_of(panels)) + "\n")
    figure = draw_panels(panels, trained_lengths(records, config.x), band=config.band)
    yield saved(figure, path)


def table(records: Sequence[Record], config: FigureConfig, path: Path) -> Iterator[Path]:
    """Writes and prints the table of medians and bests."""
    rows = scores_table(records, config.keys, config.x, config.metric, config.length)
    text = scores_markdown(rows, config.keys)
    print(f"{config.metric}, median and best over runs:\n\n{text}")
    yield written(path, ".csv", to_csv(rows))
    yield written(path, ".md", text + "\n")


def escape(records: Sequence[Record], config: FigureConfig, path: Path) -> Iterator[Path]:
    """Writes and prints the table of escape fractions, then draws them as bars."""
    threshold = THRESHOLD if config.threshold is None else config.threshold
    rows = escape_table(records, config.keys, config.x, config.metric, config.length, threshold)
    text = escape_markdown(rows, config.keys)
    at = "the longest length tested" if config.length is None else f"length {config.length}"
    says = f"runs with {config.metric} of at least {threshold} at {at}"
    print(f"{says}:\n\n{text}")
    yield written(path, ".csv", to_csv(rows))
    yield written(path, ".md", text + "\n")
    yield saved(bars_of(rows, config.keys, xlabel=config.x, title=says), path)


def written(path: Path, ending: str, text: str) -> Path:
    """Writes a file of the figure; its path."""
    file = path.with_name(path.name + ending)
    write_file(file, text.encode())
    return file


def saved(figure: "Figure", path: Path) -> Path:
    """Writes the picture; its path."""
    file = path.with_name(f"{path.name}.png")
    save(figure, file)
    return file


KINDS = {"cumulative": cumulative, "table": table, "escape": escape}


def command(argv: Sequence[str]) -> None:
    """Draws what the flags say."""
    parsed = flags.parse(argv, {"figure": FigureConfig}, PRESETS)
    config = FigureConfig(**parsed.sections["figure"])
    records = choose(read_records(user_path(config.source)), config.where)
    metric = METRICS[config.kind] if config.metric is None else config.metric
    path = parsed.workdir / (config.name or config.kind)
    for written in KINDS[config.kind](records, dataclasses.replace(config, metric=metric), path):
        print(f"written: {written}")


def main(argv: Sequence[str]) -> int:
    """Exit code of the command; ``argv`` without the program's name."""
    return flags.run(command, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
