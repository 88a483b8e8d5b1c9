"""The ratio of spread to distance over positions, and predicted against measured failures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaproduct_jax.analysis.separation import Growth
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

MARGIN = 2.0  # above and below what is measured, on a logarithmic axis
SMALLEST = 1e-8  # what the axis of ratios shows at least
LAW = {"linestyle": (0, (1, 1)), "linewidth": 0.9}
# A construction has one colour and marker in every dtype, so that the legend stays short.
SOLID = {"linestyle": "-"}
HOLLOW = {"linestyle": "--", "markerfacecolor": "white"}
FAILS = {"color": "k", "marker": "x", "linestyle": "none"}


@beside_records
def draw_separation(
    models: Sequence[Mapping[str, Any]], limit: float, path: Path, look: Look
) -> list[Path]:
    """Draws every model's ratio with its law, and beside it predicted over measured positions.

    In a column the second panel stands below the first.

    Args:
        models: entries of separation.json.
        limit: of the ratio.
        path: without an ending.
        look: width and formats.

    Returns:
        The files written.
    """
    if look.is_narrow(2):
        figure, panels = new_panels(look, 2, 1, 2.1, height_ratios=(1.2, 1))
    else:
        figure, panels = new_panels(look, 1, 2, 2.4, width_ratios=(1.5, 1))
    curves, failures = panels.flat
    styles, named = _styles([model["name"] for model in models])
    for index, (model, style) in enumerate(zip(models, styles, strict=True)):
        _draw_curve(curves, style | {"markevery": series(index)["markevery"]}, model)
        if model["failed"] and model["predicted"]:
            failures.loglog(model["failed"], model["predicted"], **style)
    curves.axhline(limit, color=GREY, linewidth=0.8)
    ratios = np.maximum(np.concatenate([[limit], *(m["ratio"] for m in models)]), SMALLEST)
    # What is measured fills the axis; a law that is far off leaves it.
    curves.set_ylim(ratios.min() / MARGIN, ratios.max() * MARGIN)
    plain_log(curves.yaxis, curves.get_ylim())
    curves.set(xlabel="position", ylabel="spread / distance of classes")
    plain_log(curves.xaxis, curves.get_xlim())
    both = [(m["failed"], m["predicted"]) for m in models if m["failed"] and m["predicted"]]
    if both:
        ends = 0.7 * np.min(both), 1.4 * np.max(both)
        failures.plot(ends, ends, color=GREY, linewidth=0.8)
        for axis in (failures.xaxis, failures.yaxis):
            plain_log(axis, ends)
    failures.set(xlabel="fails at", ylabel="predicted")
    named |= {"law beyond the fit": mark(color="k", **LAW), "fails": mark(**FAILS)}
    add_legend(figure, named | {"limit": mark(color=GREY, linewidth=0.8)})
    return save(figure, path, look)


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
    x, y = np.array(model["positions"], float), np.maximum(model["ratio"], SMALLEST)
    axes.loglog(x, y, **style)
    beyond = x[x > model["fit_length"]]
    law_at = Growth(**model["growth"]).at(beyond - (model["reference_to"] + 1) / 2)
    axes.loglog(beyond, np.maximum(law_at, SMALLEST), **LAW, color=style["color"])
    if model["failed"]:
        axes.plot(model["failed"], model["ratio_at_failure"], **FAILS)
