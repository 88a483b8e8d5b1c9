"""Curves over positions, a panel a setting, and bars of fractions: the records of many runs."""

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.settings import misfit
from experiments.lib.figures.style import COLORS, add_legend, mark_trained, new_axes, new_figure
from experiments.lib.run_records import Record, grouped, label

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

CURVE = "strict.cumulative"
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


def draw_panels(panels: Panels, trained: Mapping[str, int | None], *, band: bool) -> "Figure":
    """A figure of all panels, each with a line at the length that its runs were trained at."""
    columns = math.ceil(math.sqrt(len(panels)))
    rows = math.ceil(len(panels) / columns)
    figure = new_figure(1.4 + 4.2 * columns, 0.6 + 3.2 * rows)
    cells = figure.subplots(rows, columns, squeeze=False).flat
    for (title, curves), axes in zip(panels.items(), cells, strict=False):
        draw_curves(axes, curves, band=band)
        if trained[title] is not None:
            mark_trained(axes, trained[title])
        axes.set(title=title, xlabel="position", ylabel="fraction of sequences right so far")
        add_legend(axes)
    for axes in list(cells):  # places without a panel
        axes.set_axis_off()
    return figure


def draw_curves(axes: "Axes", curves: Mapping[str, np.ndarray], *, band: bool) -> None:
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


def bars_of(
    rows: Sequence[Mapping[str, Any]], keys: Sequence[str], *, xlabel: str, title: str
) -> "Figure":
    """A figure of the bars of an escape table."""
    figure, axes = new_axes()
    draw_bars(axes, rows, keys)
    axes.set(xlabel=xlabel, ylabel="fraction of runs", title=title, ylim=(0, 1.1))
    axes.title.set_fontsize("small")
    add_legend(axes)
    return figure


def draw_bars(axes: "Axes", rows: Sequence[Mapping[str, Any]], keys: Sequence[str]) -> None:
    """A cluster of bars per column of an escape table, a bar per row; none where nothing ran."""
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
