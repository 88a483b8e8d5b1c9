"""Pictures of measured times."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lib.figures import names
from experiments.lib.figures.style import (
    Look,
    add_legend,
    beside_records,
    close_grid,
    new_panels,
    plain_log,
    points,
    save,
)

# Of the whole width of a group; series stand side by side, so that none hides another.
SPREAD = 0.5


@beside_records
def draw_speed(rows: Sequence[Mapping[str, Any]], path: Path, title: str, look: Look) -> list[Path]:
    """Times over n_h, a series an implementation: on the GPU, or medians and spread of calls.

    A panel has one direction, and one size and kind of gates where these differ.
    """
    # What a call takes beside its kernels is the host's, and no fault or merit of theirs.
    on_gpu = all(row.get("device_ms") for row in rows)
    middle_of, least_of, most_of = (
        ["device_ms"] * 3 if on_gpu else ["median_ms", "min_ms", "max_ms"]
    )
    directions = list(dict.fromkeys(map(_panel, rows)))
    factors = sorted({row["num_householder"] for row in rows})
    implementations = list(dict.fromkeys(row["implementation"] for row in rows))
    lines, columns = look.grid(len(directions), 2)
    figure, panels = new_panels(look, lines, columns, 2.0, sparse=len(factors) == 1)
    for direction, axes in zip(directions, panels.flat, strict=False):
        here = [row for row in rows if _panel(row) == direction]
        for index, name in enumerate(implementations):
            found = {r["num_householder"]: r for r in here if r["implementation"] == name}
            offset = (index + 0.5) / len(implementations) - 0.5
            x = [factors.index(n) + SPREAD * offset for n in found]
            middle = [row[middle_of] for row in found.values()]
            spread = [
                [row[middle_of] - row[least_of] for row in found.values()],
                [row[most_of] - row[middle_of] for row in found.values()],
            ]
            style = points(index) | {"elinewidth": 0.8, "capsize": 0 if on_gpu else 2}
            axes.errorbar(x, middle, spread, label=names.value(name), **style)
        axes.set(yscale="log", xlim=(-0.6, len(factors) - 0.4), title=direction)
        axes.set_xticks(range(len(factors)), factors)
        lowest, highest = (
            pick(r[n] for r in here) for pick, n in ((min, least_of), (max, most_of))
        )
        plain_log(axes.yaxis, (lowest, highest))
        axes.set_ylim(lowest / 1.3, highest * 1.3)
    close_grid(
        panels, len(directions), "factors, $n_h$", "ms on the GPU" if on_gpu else "ms a call"
    )
    figure.suptitle(title)
    add_legend(figure)
    return save(figure, path, look)


def _panel(row: Mapping[str, Any]) -> str:
    """What a row of op.speed is of, but for its factors and implementation."""
    parts = [names.value(row["direction"])]
    if "batch_size" in row:
        parts.append(f"{row['batch_size']} x {row['length']}")
    if "gates" in row:
        parts.append("gated" if row["gates"] == "yes" else "ungated")
    return ", ".join(parts)


# Column of a row, and what it is called.
MEASURES = {"median_ms": "ms a call", "temp_mib": "temporary memory, MiB"}
VARIED = {"T": "tokens, $T$", "num_householder": "factors, $n_h$"}


@beside_records
def draw_scaling(
    rows_by_varied: Mapping[str, Sequence[Mapping[str, Any]]],
    slopes: Mapping[str, float | None],
    path: Path,
    look: Look,
) -> list[Path]:
    """Time and memory over T, and over the number of factors, all axes logarithmic.

    Args:
        rows_by_varied: rows, by which of `VARIED` differs among them.
        slopes: of every panel in log-log, by "MEASURE over VARIED"; None where there is none.
        path: where the picture goes, without an ending.
        look: width and formats.
    """
    figure, panels = new_panels(look, len(MEASURES), len(VARIED), 1.9, sharex="col")
    for column, (x, rows) in enumerate(rows_by_varied.items()):
        for row, (y, unit) in enumerate(MEASURES.items()):
            axes = panels[row, column]
            xs, ys = ([r[name] for r in rows] for name in (x, y))
            # What is not reported, or is 0, has no logarithm and no point.
            axes.loglog(xs, [value or math.nan for value in ys], **points(0))
            shown = list(filter(None, ys)) or [1.0]
            for axis, values in ((axes.xaxis, xs), (axes.yaxis, shown)):
                plain_log(axis, (min(values), max(values)))
            axes.set_ylim(min(shown) / 1.5, max(shown) * 1.5)
            if x == "num_householder":
                axes.set_xticks(xs, [str(n) if n & (n - 1) == 0 else "" for n in xs])
                axes.set_xticks([], minor=True)
            slope = slopes[f"{y} over {x}"]
            axes.set_title("no slope" if slope is None else f"slope {slope:.2f}")
            axes.set_xlabel(VARIED[x] if row == len(MEASURES) - 1 else "")
            axes.set_ylabel(unit if column == 0 else "")
    return save(figure, path, look)
