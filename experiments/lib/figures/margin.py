"""What errors used of the margin over positions, and predicted against measured failures."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaproduct_jax.analysis.margin import Growth
from experiments.lib.figures import names
from experiments.lib.figures.style import (
    GREY,
    Look,
    add_legend,
    beside_records,
    mark,
    new_panels,
    plain_log,
    points,
    save,
    series,
)

ROOM = 2.0  # above and below what is measured, on a logarithmic axis
SMALLEST = 1e-8  # what the axis shows at least
LAW = {"linestyle": (0, (1, 1)), "linewidth": 0.9}
# A construction has one colour and marker in every dtype, so that the legend stays short.
SOLID = {"linestyle": "-"}
HOLLOW = {"linestyle": "--", "markerfacecolor": "white"}
# From a point to the right: it lies farther that way.
BEYOND = {"arrowstyle": "<-", "linewidth": 0.8, "shrinkA": 0, "shrinkB": 2}
YET = {"marker": r"$\rightarrow$", "linestyle": "none", "color": "k", "markersize": 8}
FAILS = {"color": "k", "marker": "x", "linestyle": "none"}


@beside_records
def draw_margin(models: Sequence[Mapping[str, Any]], path: Path, look: Look) -> list[Path]:
    """Draws what every model used with its law, and predicted over measured positions.

    Runs have a panel for each length trained; constructions, powers of ten below them, one of their
    own. In a column all panels stand one below the other.

    Args:
        models: entries of margin.json.
        path: without an ending.
        look: width and formats.

    Returns:
        The files written.
    """
    lengths = sorted({model["trained"] for model in models} - {None})
    kinds = [*lengths, *([None] if any(m["trained"] is None for m in models) else [])]
    if look.is_narrow(2):
        figure, panels = new_panels(look, len(kinds) + 1, 1, 2.0)
    else:
        rows = 1 + (len(kinds) + 1) // 4
        figure, panels = new_panels(look, rows, math.ceil((len(kinds) + 1) / rows), 2.4)
    styles, named = _styles([model["name"] for model in models])
    styled = list(zip(models, styles, strict=True))
    failures, *curves = panels.flat
    for unused in curves[len(kinds) :]:
        unused.set_axis_off()
    for axes, kind in zip(curves, kinds, strict=False):
        _draw_kind(axes, [(m, s) for m, s in styled if m["trained"] == kind])
    held = _draw_failures(failures, styled)
    named |= {"law beyond the fit": mark(color="k", **LAW), "fails": mark(**FAILS)}
    named |= {"limit": mark(color=GREY, linewidth=0.8)}
    add_legend(figure, named | ({"has not failed yet": mark(**YET)} if held else {}))
    return save(figure, path, look)


def _draw_kind(axes: Any, kind: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]) -> None:
    """What models of one kind used."""
    for index, (model, style) in enumerate(kind):
        _draw_curve(axes, style | {"markevery": series(index)["markevery"]}, model)
    axes.axhline(1, color=GREY, linewidth=0.8)
    used = np.concatenate([[1.0], *(_behind_reference(m) for m, _ in kind)])
    # What is measured fills the axis; a law that is far off leaves it.
    axes.set_ylim(np.maximum(used, SMALLEST).min() / ROOM, used.max() * ROOM)
    plain_log(axes.yaxis, axes.get_ylim())
    trained = kind[0][0]["trained"]
    title = f"trained on {trained} tokens" if trained else "constructed"
    axes.set(xlabel="position", ylabel="part of the margin used", title=title)
    plain_log(axes.xaxis, axes.get_xlim())


def _behind_reference(model: Mapping[str, Any]) -> np.ndarray:
    """What was used where states are no longer among the earliest, of which some use nothing."""
    return np.array(model["used"])[np.array(model["positions"]) > model["reference_to"]]


def _draw_failures(
    axes: Any, styled: Sequence[tuple[Mapping[str, Any], Mapping[str, Any]]]
) -> bool:
    """Predicted over measured failures; whether there is one that was predicted and did not come.

    Of a model that was to fail among the positions read, and has not, an arrow stands at the last.
    """
    both, held = [], False
    for model, style in styled:
        failed, last, predicted = model["failed"], model["positions"][-1], model["predicted"]
        if not predicted or (not failed and predicted > last):
            continue
        both.append((failed or last, predicted))
        axes.loglog(*both[-1], **style)
        if not failed:
            held = True
            axes.annotate("", both[-1], (12, 0), textcoords="offset points", arrowprops=BEYOND)
    if both:
        ends = 0.7 * np.min(both), 1.4 * np.max(both)
        axes.set(xlim=(ends[0], ends[1] * (4 if held else 1)), ylim=ends)
        axes.plot(ends, ends, color=GREY, linewidth=0.8)
        for axis, limits in ((axes.xaxis, axes.get_xlim()), (axes.yaxis, ends)):
            plain_log(axis, limits)
    axes.set(xlabel="fails at position", ylabel="predicted to fail at", title="where they fail")
    return held


def _styles(models: Sequence[str]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The style of each model by its name, and what stands for it in the legend."""
    order = list(dict.fromkeys(name.partition(", ")[0] for name in models))
    styles, named, hollow = [], {}, {}
    for model in models:
        name, _, dtype = model.partition(", ")
        style = points(order.index(name))
        if dtype == "float32":
            style |= SOLID | {"markerfacecolor": style["color"]}
        elif dtype:
            style |= HOLLOW
            hollow[f"in {dtype}"] = mark(color=GREY, marker="o", **HOLLOW)
        styles.append(style)
        label = " ".join(names.construction(name)) if dtype else names.run(name)
        named.setdefault(label, mark(**style))
    return styles, named | hollow


def _draw_curve(axes: Any, style: Mapping[str, Any], model: Mapping[str, Any]) -> None:
    x, y = np.array(model["positions"], float), np.maximum(model["used"], SMALLEST)
    axes.loglog(x, y, **style)
    beyond = x[x > model["fit_length"]]
    law_at = Growth(**model["growth"]).at(beyond - (model["reference_to"] + 1) / 2 - 1)
    axes.loglog(beyond, np.maximum(law_at, SMALLEST), **LAW, color=style["color"])
    if model["failed"]:
        axes.plot(model["failed"], 1, **FAILS)
