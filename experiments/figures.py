"""How far do runs get, by a setting and over seeds: the paper's figures and tables, from records.

    python -m experiments.figures --workdir=OUT --source=runs/groups --preset=factors
    python -m experiments.figures --workdir=OUT --source=runs/paper --preset=paper
    python -m experiments.figures --workdir=OUT --source=runs/groups --preset=layers
    python -m experiments.figures --workdir=OUT --source=runs/languages --preset=languages
    python -m experiments.figures --workdir=OUT --source=runs/paper --preset=paper_languages
    python -m experiments.figures --workdir=OUT --source=runs/groups --preset=escape

``--kind=cumulative`` draws the fraction of sequences right up to each position, a panel a value of
``--x`` and a curve a value of ``--by``: the median over all other settings, seeds above all, and
every run thinly or as a band. ``--kind=table`` puts median and best over them into a table and
points, ``--kind=escape`` the fraction of runs that reach a threshold, as a table and bars.
``NAME.json`` keeps what is shown: ``experiments.redraw`` makes the same of it, without the runs. It
is written before the picture, which needs matplotlib.

Source: https://arxiv.org/abs/2502.10297: accuracy over length by n_h and by layers (state tracking)
    and the table of formal languages, as in https://arxiv.org/abs/2411.12537, table 3.
Expect: experiments/results/state_tracking/ holds what the runs of this project gave.
Takes: seconds, on any machine, from the records of a sweep.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import read_json, user_path
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.bench.report import command_line, write_json
from experiments.lib.figures.curves import (
    CURVE,
    numbers_of,
    panels_of,
    trained_lengths,
)
from experiments.lib.figures.published import keys_fit, published_points, published_scores
from experiments.lib.figures.records import FIGURE, MARKDOWN, show
from experiments.lib.figures.style import SECTION, Look
from experiments.lib.figures.tables import escape_table, scores_table
from experiments.lib.run_records import (
    Record,
    choose,
    finished,
    grouped,
    left_out,
    less_is_better,
    read_runs,
)

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
    "paper": {"by": "num_householder", "published": True, "name": "paper"},
    "layers": {"by": "num_layers", "where": "num_householder=1", "name": "layers"},
    "languages": {"kind": "table", "by": "mixer", "x": "language", "name": "languages"},
    "paper_languages": {
        "kind": "table",
        "by": "mixer,num_householder,allow_neg_eigval",
        "x": "language",
        "published": True,
        "name": "paper_languages",
    },
    "escape": {"kind": "escape", "name": "escape"},
}


@dataclasses.dataclass(frozen=True)
class FigureConfig:
    """What is drawn from which runs; raises ConfigError where the fields make no sense."""

    source: str = setting(
        "", "a sweep's folder, its results.csv beside its runs, or a runs' folder"
    )
    kind: str = setting("cumulative", f"one of {', '.join(METRICS)}", one_of=METRICS)
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
        None,
        f"score that a run which has escaped reaches, of losses from above; none: {THRESHOLD}",
    )
    band: bool = setting(False, "a band from the worst run to the best instead of every run's line")
    published: bool = setting(
        False,
        "what is published too, beside runs of the published lengths: points of the paper's curves "
        "(S5 by num_householder), or the predecessor's table of languages (by mixer)",
    )
    name: str | None = setting(None, "of the files; none: the kind")

    def __post_init__(self):
        check_fields(self)
        if not self.source:
            raise ConfigError("--source is missing; give the folder of a sweep or of runs")
        if self.threshold is not None and self.kind != "escape":
            raise ConfigError(f"threshold={self.threshold} needs kind=escape, got {self.kind!r}")
        if self.band and self.kind != "cumulative":
            raise ConfigError(f"band=True needs kind=cumulative, got {self.kind!r}")
        given = self.kind, self.x, self.keys, self.metric, self.length
        if self.published and not keys_fit(*given):
            raise ConfigError(
                "published=True needs kind=cumulative, x=group and by=num_householder, or "
                "kind=table, x=language and mixer among by, of scaled accuracy at 256 tokens, got "
                f"kind={self.kind}, x={self.x}, by={self.by}, metric={self.metric} and "
                f"length={self.length}"
            )
        if self.name is not None and (self.name in ("", "..") or Path(self.name).name != self.name):
            raise ConfigError(f"name={self.name!r} must be the name of a file, without folders")
        twice = {key for key in self.keys if self.keys.count(key) > 1}
        if twice:
            raise ConfigError(f"by={self.by!r} has {twice.pop()!r} twice; give it once")
        if self.x in self.keys:
            raise ConfigError(f"x={self.x!r} is among by={self.by!r} too; give another setting")

    @property
    def keys(self) -> list[str]:
        """The settings of ``by``."""
        return list(filter(None, (key.strip() for key in self.by.split(","))))


def cumulative(records: Sequence[Record], config: FigureConfig) -> dict[str, Any]:
    """The numbers of the curves."""
    panels = panels_of(records, config.x, config.keys, config.metric, config.length)
    published = {"published": published_points(panels, records)} if config.published else {}
    return {
        "band": config.band,
        "trained": trained_lengths(records, config.x),
        **published,
        "panels": numbers_of(panels),
    }


def table(records: Sequence[Record], config: FigureConfig) -> dict[str, Any]:
    """The rows of medians and bests."""
    rows = scores_table(records, config.keys, config.x, config.metric, config.length)
    if config.published:
        languages = [value for (value,) in grouped(records, [config.x])]
        for row, members in zip(rows, grouped(records, config.keys).values(), strict=True):
            scores = published_scores(members, config.length)
            row |= {f"{language} published": scores.get(language) for language in languages}
    return {"rows": rows}


def escape(records: Sequence[Record], config: FigureConfig) -> dict[str, Any]:
    """The rows of escape fractions."""
    threshold = THRESHOLD if config.threshold is None else config.threshold
    rows = escape_table(records, config.keys, config.x, config.metric, config.length, threshold)
    return {"threshold": threshold, "rows": rows}


KINDS = {"cumulative": cumulative, "table": table, "escape": escape}


def command(argv: Sequence[str]) -> None:
    """Writes the record that the flags say, and draws it."""
    parsed = flags.parse(argv, {"figure": FigureConfig, **SECTION}, PRESETS)
    look, config = Look(**parsed.sections["figures"]), FigureConfig(**parsed.sections["figure"])
    runs = read_runs(user_path(config.source, "source"))
    records = choose(finished(runs), config.where)
    metric = METRICS[config.kind] if config.metric is None else config.metric
    config = dataclasses.replace(config, metric=metric)
    note = left_out(runs, config.where, [config.x, *config.keys])
    record = {
        "figure": config.kind,
        "command": command_line("figures", argv),
        "x": config.x,
        "by": config.keys,
        "metric": metric,
        "length": config.length,
        **({} if note is None else {"left_out": note}),
        **KINDS[config.kind](records, config),
    }
    path = parsed.workdir / (config.name or config.kind)
    refuse_foreign(path)
    file = path.with_name(f"{path.name}.json")
    write_json(file, record, indent=None)
    print(f"written: {file}")
    if config.kind != "cumulative":
        print(f"{says(config)}:\n\n{MARKDOWN[config.kind](record)}")
    for written in show(record, path, look):
        print(f"written: {written}")
    if note is not None:
        print(f"note: {note}", file=sys.stderr)
    if config.published and not has_published(record):
        print("note: nothing is published of runs with these settings", file=sys.stderr)


def refuse_foreign(path: Path) -> None:
    """Raises ConfigError where files of this name are not those of an earlier figure."""
    record, *tables = (path.with_name(f"{path.name}{end}") for end in (".json", ".csv", ".md"))
    said = read_json(record) if record.exists() else None
    if isinstance(said, dict) and said.get(FIGURE) in KINDS:
        return
    taken = [file.name for file in (record, *tables) if file.exists()]
    if taken:
        raise ConfigError(
            f"name={path.name!r} is taken: {' and '.join(taken)} in workdir={path.parent} are not "
            "those of a figure; give another name"
        )


def has_published(record: Mapping[str, Any]) -> bool:
    """Whether anything that is published stands in a record."""
    of_rows = (
        value
        for row in record.get("rows", ())
        for name, value in row.items()
        if name.endswith(" published")
    )
    return any(record.get("published", {}).values()) or any(x is not None for x in of_rows)


def says(config: FigureConfig) -> str:
    """What stands in a table."""
    if config.kind == "table":
        return f"{config.metric}, median and best over runs"
    threshold = THRESHOLD if config.threshold is None else config.threshold
    at = "the longest length tested" if config.length is None else f"length {config.length}"
    bound = "at most" if less_is_better(config.metric) else "at least"
    return f"runs with {config.metric} of {bound} {threshold} at {at}"


def main(argv: Sequence[str]) -> int:
    """Exit code of the command; ``argv`` without the program's name."""
    return flags.run(command, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
