"""What searches came to: a table of what was chosen, and every seed of it in a picture."""

from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from experiments.lib.bench.report import command_block, known_columns, shown
from experiments.lib.figures import names
from experiments.lib.figures.style import COLORS, Look, add_legend, mark, new_panels
from experiments.lib.run_records import less_is_better

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CHOSEN = ("learning_rate", "beta_bias", "initial_gate", "qk_activation")
KINDS = ("median", "best")


def search_markdown(record: Mapping[str, Any]) -> str:
    """A row an arm: what was chosen, median and best of its fresh seeds, and how many escaped.

    Below the table stand what it shows, which choices are at an end of the rates, what is missing.
    """
    lines = [
        [
            _arm(row),
            shown(row["parameters"], ","),
            *(row[name] for name in CHOSEN),
            *(shown(row[name], ".3f") for name in KINDS),
            f"{row['escaped']}/{row['runs']}" if row["runs"] else None,
        ]
        for row in record["rows"]
    ]
    table = known_columns(["arm", "parameters", *CHOSEN, *KINDS, "escaped"], lines)
    return "\n\n".join([table, *_notes(record), command_block(record["command"])])


def _arm(row: Mapping[str, Any]) -> str:
    return row["arm"].removeprefix("mixer = ")


def _notes(record: Mapping[str, Any]) -> Iterator[str]:
    where = "the longest test length" if record["length"] is None else f"{record['length']} tokens"
    threshold = f"{record['threshold']:g}"
    less = less_is_better(record["metric"])
    reached = f"at {threshold} and below" if less else f"from {threshold} on"
    yield (
        f"Of each arm {len(record['tried'][0]['settings'])} settings were tried. Scores are "
        f"{record['metric']} at {where} on the test split, of seeds that chose nothing; "
        f"{reached} a run has escaped. {record['hours']:.2f} hours of training on "
        f"{', '.join(record['hardware']) or 'nothing'}, "
        f"commit {', '.join(record['commits']) or 'not known'}."
    )
    ends = "; ".join(_arm(row) for row in record["rows"] if row["rate_at_an_end"])
    if ends:
        yield f"Chosen at an end of the rates tried, so that others may do better: {ends}."
    missing = _missing(record)
    if missing is not None:
        yield missing


def _missing(record: Mapping[str, Any]) -> str | None:
    """How many runs have no results, which the picture says too; None where all have."""
    if not record["missing"]:
        return None
    text = f"Runs without results: {record['missing']}. They count as the worst"
    return f"{text}; the search was stopped." if record["stopped"] else f"{text}."


def search_figure(record: Mapping[str, Any], look: Look) -> "Figure":
    """Every fresh seed of every arm as a point, the median as a bar across.

    Args:
        record: its "rows", and what they show: "metric", "length" (None: the longest), the
            "threshold" of escaping, how many runs are "missing" and whether it was "stopped".
        look: the figure's width.
    """
    rows = record["rows"]
    figure, cells = new_panels(look, 1, 1, 0.3 + 0.17 * len(rows))
    axes = cells[0, 0]
    for place, row in enumerate(rows):
        # One below the other, so that seeds of one score are seen to be several.
        count = len(row["scores"])
        heights = [place + SPREAD * (2 * number - count + 1) / count for number in range(count)]
        axes.plot(row["scores"], heights, **POINT)
        if row["median"] is not None:
            axes.plot([row["median"]] * 2, [place - 0.32, place + 0.32], **MEDIAN)
    axes.axvline(record["threshold"], color="0.35", linestyle=(0, (1, 1)), linewidth=1)
    axes.set_yticks(range(len(rows)), [names.pretty(row["arm"]) for row in rows])
    # Scaled accuracies go below 0, losses beyond 1.
    shown_at = [record["threshold"], *(score for row in rows for score in row["scores"])]
    lowest, highest = min([0, *shown_at]), max([1, *shown_at])
    margin = 0.03 * (highest - lowest)
    axes.set(xlim=(lowest - margin, highest + margin), ylim=(len(rows) - 0.5, -0.5))
    axes.grid(visible=False, axis="y")
    where = "" if record["length"] is None else f" at {record['length']} tokens"
    axes.set_xlabel(names.metric(record["metric"]) + where)
    threshold = mark(color="0.35", linestyle=(0, (1, 1)), linewidth=1)
    named = {"a seed": mark(**POINT), "median": mark(**MEDIAN), "escaped from here": threshold}
    add_legend(figure, named, _missing(record))
    return figure


SPREAD = 0.3  # of a row, half of what its points take
POINT = {"linestyle": "none", "marker": "o", "color": COLORS[0], "alpha": 0.55}
MEDIAN = {"color": COLORS[1], "linewidth": 2}
