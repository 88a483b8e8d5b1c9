"""Tables over seeds, as Markdown and CSV: medians and bests, and fractions of seeds that escape.

Runs on hard groups stay on a plateau for long and leave it suddenly, some seeds never, so that the
fraction of seeds that get there says more than a mean. The table of mixers by tasks is that of
Grazzi et al., https://arxiv.org/abs/2411.12537, which the DeltaProduct paper repeats.
"""

import csv
import io
import statistics
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from deltaproduct_jax.errors import ConfigError
from experiments.lib.bench.report import markdown, shown
from experiments.lib.run_records import Record, best_score, grouped, reaches

Row = Mapping[str, Any]


def scores_table(
    records: Sequence[Record],
    by: Sequence[str],
    x: str,
    metric: str,
    length: int | None,
) -> list[dict[str, Any]]:
    """Median and best over the runs of every cell, a row a group ``by``, columns by ``x``.

    Returns:
        Rows of the keys of ``by``, and for each value of ``x`` "VALUE median", "VALUE best" and
        "VALUE runs"; a cell without runs is None, with 0 runs.
    """
    return [
        row
        | {
            f"{value} {name}": entry
            for value, scores in cells.items()
            for name, entry in (
                ("median", statistics.median(scores) if scores else None),
                ("best", best_score(scores, metric)),
                ("runs", len(scores)),
            )
        }
        for row, cells in _cells(records, by, x, metric, length)
    ]


def escape_table(
    records: Sequence[Record],
    by: Sequence[str],
    x: str,
    metric: str,
    length: int | None,
    threshold: float,
) -> list[dict[str, Any]]:
    """For every cell the runs that reach the ``threshold``: "VALUE escaped", of "VALUE runs"."""
    return [
        row
        | {
            f"{value} {name}": count
            for value, scores in cells.items()
            for name, count in (
                ("escaped", sum(reaches(score, metric, threshold) for score in scores)),
                ("runs", len(scores)),
            )
        }
        for row, cells in _cells(records, by, x, metric, length)
    ]


def _cells(
    records: Sequence[Record], by: Sequence[str], x: str, metric: str, length: int | None
) -> Iterator[tuple[dict[str, Any], dict[Any, list[float]]]]:
    """The keys of every group ``by``, and its scores by the values of ``x`` among all records."""
    columns = [value for (value,) in grouped(records, [x])]
    for members in grouped(records, [x]).values():
        _require_one_length(members, length)
    for group, members in grouped(records, by).items():
        found = grouped(members, [x])
        yield (
            dict(zip(by, group, strict=True)),
            {v: [r.score(metric, length) for r in found.get((v,), [])] for v in columns},
        )


def _require_one_length(records: Sequence[Record], length: int | None) -> None:
    """Raises ConfigError where the longest lengths, which are looked at, are not the same."""
    lengths = {record.entry(length)["length"]: record.name for record in records}
    if len(lengths) > 1:
        (short, one), *_, (long, other) = sorted(lengths.items())
        raise ConfigError(
            f"runs of one column were tested up to different lengths, {one} to {short} and {other} "
            f"to {long}; give --length, or more of --where"
        )


def to_csv(rows: Sequence[Row]) -> str:
    """The rows with all columns but those of lists; nothing for none."""
    buffer = io.StringIO()
    columns = [name for name, value in rows[0].items() if not isinstance(value, list)]
    writer = csv.DictWriter(buffer, columns, extrasaction="ignore", lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def scores_markdown(rows: Sequence[Row], by: Sequence[str]) -> str:
    """Medians and bests to three places, numbers of runs where these differ, what is published."""
    values = [column.removesuffix(" median") for column in rows[0] if column.endswith(" median")]
    counts = {row[f"{value} runs"] for row in rows for value in values}
    kinds = ["median", "best", *(["runs"] if len(counts) > 1 else [])]
    kinds += ["published"] if f"{values[0]} published" in rows[0] else []
    columns = [f"{value} {kind}" for value in values for kind in kinds]
    lines = [
        [*(row[key] for key in by), *(_cell(row[column]) for column in columns)] for row in rows
    ]
    return markdown([*by, *columns], lines)


def _cell(number: float | int | None) -> str:
    return shown(number, "" if isinstance(number, int) else ".3f")


def escape_markdown(rows: Sequence[Row], by: Sequence[str]) -> str:
    """Cells as "escaped/runs"."""
    values = [column.removesuffix(" escaped") for column in rows[0] if column.endswith(" escaped")]
    lines = [
        [
            *(row[key] for key in by),
            *(
                f"{row[f'{value} escaped']}/{row[f'{value} runs']}" if row[f"{value} runs"] else "-"
                for value in values
            ),
        ]
        for row in rows
    ]
    return markdown([*by, *values], lines)
