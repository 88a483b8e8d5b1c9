"""Tables over seeds, as Markdown and CSV: medians and bests, and fractions of seeds that escape.

Runs on hard groups stay on a plateau for long and leave it suddenly, some seeds never, so that the
fraction of seeds that get there says more than a mean. The table of mixers by tasks is that of
Grazzi et al., https://arxiv.org/abs/2411.12537, which the DeltaProduct paper repeats.
"""

import csv
import io
import statistics
from collections.abc import Mapping, Sequence
from typing import Any

from experiments.lib.bench.report import markdown, shown
from experiments.lib.run_records import Record, grouped

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
    columns = [value for (value,) in grouped(records, [x])]
    rows = []
    for group, members in grouped(records, by).items():
        row: dict[str, Any] = dict(zip(by, group, strict=True))
        cells = grouped(members, [x])
        for value in columns:
            scores = [record.score(metric, length) for record in cells.get((value,), [])]
            row[f"{value} median"] = statistics.median(scores) if scores else None
            row[f"{value} best"] = max(scores) if scores else None
            row[f"{value} runs"] = len(scores)
        rows.append(row)
    return rows


def escape_table(
    records: Sequence[Record],
    by: Sequence[str],
    x: str,
    metric: str,
    length: int | None,
    threshold: float,
) -> list[dict[str, Any]]:
    """For every cell the runs whose score is at least ``threshold``: "VALUE escaped", of "runs"."""
    columns = [value for (value,) in grouped(records, [x])]
    rows = []
    for group, members in grouped(records, by).items():
        row: dict[str, Any] = dict(zip(by, group, strict=True))
        cells = grouped(members, [x])
        for value in columns:
            scores = [record.score(metric, length) for record in cells.get((value,), [])]
            row[f"{value} escaped"] = sum(score >= threshold for score in scores)
            row[f"{value} runs"] = len(scores)
        rows.append(row)
    return rows


def to_csv(rows: Sequence[Row]) -> str:
    """The rows with all their columns; nothing for none."""
    buffer = io.StringIO()
    writer = csv.DictWriter(buffer, list(rows[0]), lineterminator="\n")
    writer.writeheader()
    writer.writerows(rows)
    return buffer.getvalue()


def scores_markdown(rows: Sequence[Row], by: Sequence[str]) -> str:
    """Medians and bests to three places, and numbers of runs where these are not the same."""
    values = [column.removesuffix(" median") for column in rows[0] if column.endswith(" median")]
    counts = {row[f"{value} runs"] for row in rows for value in values}
    kinds = ("median", "best") if len(counts) == 1 else ("median", "best", "runs")
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
