"""Pictures of measured times."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lib.figures.style import beside_records, new_axes, new_figure, save


@beside_records
def draw_speed(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Bars of the median times, a group a number of factors and direction."""
    groups = list(dict.fromkeys((row["direction"], row["num_householder"]) for row in rows))
    names = list(dict.fromkeys(row["implementation"] for row in rows))
    figure, axes = new_axes(1.5 + 1.1 * len(groups))
    for index, name in enumerate(names):
        picked = {
            (r["direction"], r["num_householder"]): r for r in rows if r["implementation"] == name
        }
        heights = [picked.get(group, {"median_ms": float("nan")})["median_ms"] for group in groups]
        offset = (index - (len(names) - 1) / 2) * 0.8 / len(names)
        places = [place + offset for place in range(len(groups))]
        axes.bar(places, heights, 0.8 / len(names), label=name)
    axes.set_xticks(range(len(groups)), [f"{d}\nn_h = {n}" for d, n in groups], fontsize=8)
    axes.set(ylabel="ms a call (median)", yscale="log", title=title)
    axes.legend()
    save(figure, path)


# Column of a row, and what it is called.
MEASURES = {"median_ms": "ms a call (median)", "temp_mib": "temporary memory, MiB"}
VARIED = {"T": "tokens T", "num_householder": "factors per token n_h"}


@beside_records
def draw_scaling(
    rows_by_varied: Mapping[str, Sequence[Mapping[str, Any]]],
    slopes: Mapping[str, float],
    path: Path,
) -> None:
    """Time and memory over T, and over the number of factors.

    Args:
        rows_by_varied: rows, by which of `VARIED` differs among them.
        slopes: of every panel in log-log, by "MEASURE over VARIED".
        path: where the picture goes.
    """
    figure = new_figure(9, 6.4)
    panels = figure.subplots(len(MEASURES), len(VARIED))
    for column, (x, rows) in enumerate(rows_by_varied.items()):
        for row, (y, unit) in enumerate(MEASURES.items()):
            axes = panels[row, column]
            axes.plot([r[x] for r in rows], [r[y] for r in rows], "o-")
            if x == "T":
                axes.set(xscale="log", yscale="log")
            else:
                axes.set(ylim=(0, None))
            title = f"slope in log-log {slopes[f'{y} over {x}']:.2f}"
            axes.set(xlabel=VARIED[x], ylabel=unit, title=title)
            axes.grid(alpha=0.3)
    save(figure, path)
