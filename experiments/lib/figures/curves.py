"""Curves over positions, a panel a setting, and bars of fractions: the records of many runs."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.settings import misfit
from experiments.lib.figures import names
from experiments.lib.figures.style import (
    Look,
    add_legend,
    bars,
    close_grid,
    fractions_axis,
    mark_trained,
    new_panels,
    points,
    positions_axis,
    room_for,
    series,
)
from experiments.lib.run_records import Record, grouped, label, less_is_better

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVE = "strict.cumulative"
# Hollow, so that a curve below shows.
PUBLISHED = {"linestyle": "none", "marker": "o", "markersize": 4, "fillstyle": "none"}
# Of a score, so that the one shows around the other.
SCORE_MARKS = {
    "median": {"markersize": 3},
    "best": {"markersize": 6, "fillstyle": "none"},
    "published": {"markersize": 4.5, "marker": "|", "markeredgewidth": 1.5},
}
# Panel -> curve -> the runs [runs, positions].
Panels = Mapping[str, Mapping[str, np.ndarray]]


def curves_of(records: Sequence[Record], metric: str, length: int | None) -> np.ndarray:
    """``[runs, positions]``; ConfigError if the runs' curves differ in length."""
    curves = []
    for record in records:
        found: Any = record.entry(length)
        for name in metric.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        if not found or misfit(found, list[float], metric) is not None:
            raise ConfigError(
                f"metric={metric!r} is no curve in the results of run {record.name}; it may be "
                f"{CURVE}"
            )
        curves.append(found)
    if len(set(map(len, curves))) > 1:
        raise ConfigError(
            f"the runs of one curve, such as {records[0].name}, were tested at different lengths; "
            "give --length or more of --by and --where"
        )
    return np.array(curves)


def panels_of(
    records: Sequence[Record], x: str, by: Sequence[str], metric: str, length: int | None
) -> Panels:
    """The curves of a figure: a panel a value of ``x``, in it a curve a value of ``by``."""
    return {
        label([x], value): {
            label(by, group): curves_of(runs, metric, length)
            for group, runs in grouped(members, by).items()
        }
        for value, members in grouped(records, [x]).items()
    }


def trained_lengths(records: Sequence[Record], x: str) -> dict[str, int | None]:
    """The length that all runs of a panel were trained at; None where they differ or none says."""
    found = {}
    for value, members in grouped(records, [x]).items():
        lengths = {record.settings.get("train_length") for record in members}
        found[label([x], value)] = lengths.pop() if len(lengths) == 1 else None
    return found


def numbers_of(panels: Panels) -> dict[str, Any]:
    """What `draw_panels` draws, as plain values."""
    return {
        title: {
            name: {
                "median": np.median(runs, axis=0).round(4).tolist(),
                "runs": runs.round(4).tolist(),
            }
            for name, runs in curves.items()
        }
        for title, curves in panels.items()
    }


def draw_panels(record: Mapping[str, Any], look: Look) -> "Figure":
    """A figure of all panels, each with a line at the length that its runs were trained at.

    Args:
        record: "panels" as of `numbers_of`, the "metric" that they are of, whether runs are a
            "band", the length "trained" of each panel, None where it is not known, and maybe
            "published" points (position, fraction) by panel and curve.
        look: the figure's width.
    """
    panels = {
        title: {name: np.array(curve["runs"], float) for name, curve in curves.items()}
        for title, curves in record["panels"].items()
    }
    rows, columns = look.grid(len(panels), 3)
    figure, cells = new_panels(look, rows, columns, 2.0, sharex=True, sharey=True)
    order = list(dict.fromkeys(name for curves in panels.values() for name in curves))
    published = record.get("published", {})
    for (title, curves), axes in zip(panels.items(), cells.flat, strict=False):
        draw_curves(axes, curves, order, band=record["band"])
        for name, found in published.get(title, {}).items():
            color = series(order.index(name))["color"]
            axes.plot(*zip(*found, strict=True), color=color, **PUBLISHED)
        if record["trained"][title] is not None:
            mark_trained(axes, record["trained"][title])
        axes.set_title(names.pretty(title))
    medians = [np.median(runs, axis=0) for curves in panels.values() for runs in curves.values()]
    beside = [
        point for curves in published.values() for found in curves.values() for point in found
    ]
    positions_axis(cells[0, 0], medians, max((position for position, _ in beside), default=0))
    lowest = min(runs.min() for curves in panels.values() for runs in curves.values())
    fractions_axis(cells[0, 0], min([lowest, *(fraction for _, fraction in beside)]))
    last = cells.flat[len(panels) - 1]  # so that the legend has all curves before these
    if any(len(runs) > 1 for curves in panels.values() for runs in curves.values()):
        every = {"linewidth": 5, "alpha": 0.3} if record["band"] else {"linewidth": 0.6}
        last.plot([], [], color="0.4", label="single runs", **every)
    if beside:
        last.plot([], [], color="0.2", label="published", **PUBLISHED)
    close_grid(cells, len(panels), "position", names.metric(record["metric"]))
    add_legend(figure, note=_note(record))
    return figure


def draw_curves(
    axes: "Axes", curves: Mapping[str, np.ndarray], order: Sequence[str], *, band: bool
) -> None:
    """Draws the median of the runs ``[runs, positions]`` of each name over the runs or a band.

    Args:
        axes: the panel.
        curves: runs by name.
        order: names of all panels, so that each looks alike in all.
        band: from the worst run to the best, instead of every run thinly.
    """
    for name, runs in curves.items():
        look, positions = series(order.index(name)), np.arange(runs.shape[1])
        thin = {"color": look["color"], "linewidth": 0.5, "alpha": 0.45}
        if band:
            axes.fill_between(positions, runs.min(0), runs.max(0), color=look["color"], alpha=0.2)
        elif len(runs) > 1:
            axes.plot(positions, runs.T, **thin)
        axes.plot(positions, np.median(runs, axis=0), label=names.pretty(name), **look)


def scores_of(record: Mapping[str, Any], look: Look) -> "Figure":
    """A figure of a table of scores: a panel a column, in it median and best of each row.

    Args:
        record: its "rows", their settings "by", the setting "x" of its columns, and what they show:
            "metric", and "length", None for the longest.
        look: the figure's width.
    """
    rows = record["rows"]
    values = [column.removesuffix(" median") for column in rows[0] if column.endswith(" median")]
    lines, columns = look.grid(len(values), 4)
    figure, cells = new_panels(
        look, lines, columns, 0.35 + 0.15 * len(rows), sparse=len(values) < 3, sharey=True
    )
    for value, axes in zip(values, cells.flat, strict=False):
        for number, (name, more) in enumerate(SCORE_MARKS.items()):
            if f"{value} {name}" not in rows[0]:
                continue
            there = [place for place, row in enumerate(rows) if row[f"{value} {name}"] is not None]
            scores = [rows[place][f"{value} {name}"] for place in there]
            style = points(number) | {"linestyle": "none"} | more
            label_of = name if name == "published" else f"{name} over runs"
            axes.plot(scores, there, label=label_of, **style)
        axes.set_title(names.pretty(label([record["x"]], (value,))))
        rows_axis(axes, rows, record["by"])
        axes.set_xlim(min(0, axes.get_xlim()[0]) - 0.03, 1.05 * max(1, axes.dataLim.x1))
    close_grid(cells, len(values))
    figure.suptitle(names.metric(record["metric"]) + _where(record))
    add_legend(figure, note=_note(record))
    return figure


def bars_of(record: Mapping[str, Any], look: Look) -> "Figure":
    """A figure of the bars of an escape table.

    Args:
        record: its "rows", their settings "by", the setting "x" of its columns, and what escaping
            is: "metric", "threshold", and "length", None for the longest.
        look: the figure's width.
    """
    rows = record["rows"]
    values = [column.removesuffix(" escaped") for column in rows[0] if column.endswith(" escaped")]
    lines, columns = look.grid(len(values), 4)
    height = 0.35 + 0.15 * len(rows)
    figure, cells = new_panels(
        look, lines, columns, height, sparse=len(values) < 3, sharex=True, sharey=True
    )
    for value, axes in zip(values, cells.flat, strict=False):
        draw_bars(axes, rows, record["by"], value)
        axes.set_title(names.pretty(label([record["x"]], (value,))))
    close_grid(cells, len(values))
    what, threshold = names.metric(record["metric"]) + _where(record), f"{record['threshold']:g}"
    if less_is_better(record["metric"]):
        said = f"fraction of runs with at most {threshold} of\n{what}"
    else:
        said = f"fraction of runs with at least {threshold} of the\n{what}"
    figure.supxlabel("\n".join([said, *room_for(figure, _note(record))]), fontsize="medium")
    return figure


def _note(record: Mapping[str, Any]) -> str | None:
    """Which runs a figure does not show; None where it shows all."""
    return names.note(record["left_out"]) if "left_out" in record else None


def _where(record: Mapping[str, Any]) -> str:
    return "" if record["length"] is None else f" at {record['length']} tokens"


def rows_axis(axes: "Axes", rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """Names the rows of a table by their settings, the first at the top."""
    said = [names.pretty(_label_of_row(row, keys)) for row in rows]
    axes.set_yticks(range(len(rows)), said)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(visible=False, axis="y")


def _label_of_row(row: Mapping[str, Any], keys: Sequence[str]) -> str:
    """A row's settings, but for those that its mixer does not have."""
    own = [key for key in keys if row[key] != "none"] or keys
    return label(own, tuple(row[key] for key in own))


def draw_bars(
    axes: "Axes", rows: Sequence[Mapping[str, Any]], keys: Sequence[str], value: str
) -> None:
    """A bar a row of an escape table, the first at the top, for one of its columns."""
    for place, row in enumerate(rows):
        runs, escaped = row[f"{value} runs"], row[f"{value} escaped"]
        if runs:  # none where nothing ran
            axes.barh(place, escaped / runs, 0.75, **bars(0))
            axes.annotate(
                f"{escaped}/{runs}", (escaped / runs, place), (3, 0),
                textcoords="offset points", va="center", fontsize="small",
            )  # fmt: skip
    rows_axis(axes, rows, keys)
    axes.set(xlim=(0, 1.28), xticks=(0, 0.5, 1))
