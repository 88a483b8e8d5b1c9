"""What searches came to: a table of what was chosen, and every seed of it in a picture."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from experiments.lib.bench.report import markdown, shown
from experiments.lib.figures import names
from experiments.lib.figures.style import COLORS, Look, add_legend, mark, new_panels

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHOSEN = ("learning_rate", "beta_bias", "initial_gate", "qk_activation")


def search_markdown(rows: Sequence[Mapping[str, Any]], by: Sequence[str]) -> str:
    """A row an arm: what was chosen, median and best of its fresh seeds, and how many escaped."""
    del by  # the arms are the rows
    fields = [name for name in CHOSEN if any(row[name] is not None for row in rows)]
    lines = [
        [
            row["arm"].removeprefix("mixer = "),
            *(row[name] for name in fields),
            *(shown(row[name], ".3f" if row[name] is not None else "") for name in KINDS),
            f"{row['escaped']}/{row['runs']}" if row["runs"] else "-",
        ]
        for row in rows
    ]
    return markdown(["arm", *fields, *KINDS, "escaped"], lines)


KINDS = ("median", "best")


def search_figure(record: Mapping[str, Any], look: Look) -> "Figure":
    """Every fresh seed of every arm as a point, its median as a bar across.

    Args:
        record: its "rows", and what they show: "metric", "length" (None: the longest) and the
            "threshold" of escaping.
        look: the figure's width.
    """
    rows = record["rows"]
    figure, cells = new_panels(look, 1, 1, 0.3 + 0.17 * len(rows))
    axes = cells[0, 0]
    for place, row in enumerate(rows):
        axes.plot(row["scores"], [place] * len(row["scores"]), **POINT)
        if row["median"] is not None:
            axes.plot([row["median"]] * 2, [place - 0.32, place + 0.32], **MEDIAN)
    axes.axvline(record["threshold"], color="0.35", linestyle=(0, (1, 1)), linewidth=1)
    axes.set_yticks(range(len(rows)), [names.pretty(row["arm"]) for row in rows])
    axes.set(xlim=(-0.03, 1.03), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(visible=False, axis="y")
    where = "" if record["length"] is None else f" at {record['length']} tokens"
    axes.set_xlabel(names.metric(record["metric"]) + where)
    threshold = mark(color="0.35", linestyle=(0, (1, 1)), linewidth=1)
    named = {"a seed": mark(**POINT), "median": mark(**MEDIAN), "escaped from here": threshold}
    add_legend(figure, named)
    return figure


POINT = {"linestyle": "none", "marker": "o", "color": COLORS[0], "alpha": 0.55}
MEDIAN = {"color": COLORS[1], "linewidth": 2}
