"""The ratio of spread to distance over positions, and predicted against measured failures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from deltaproduct_jax.analysis.separation import Growth
from experiments.lib.figures.style import COLORS, beside_records, new_figure, save

SMALLEST = 1e-8  # what the axis of ratios shows at least


@beside_records
def draw_separation(models: Sequence[Mapping[str, Any]], limit: float, path: Path) -> None:
    """Draws every model's ratio with its law, and beside it predicted over measured positions."""
    figure = new_figure(13, 5)
    curves, failures = figure.subplots(1, 2, width_ratios=(1.5, 1))
    both = [(m["failed"], m["predicted"]) for m in models if m["failed"] and m["predicted"]]
    for index, model in enumerate(models):
        style = {"color": COLORS[index % len(COLORS)]}
        x, y = np.array(model["positions"]), np.maximum(model["ratio"], SMALLEST)
        form = "-" if model["trained"] else ":"
        curves.loglog(x, y, form, **style, label=model["name"])
        law = Growth(**model["growth"])
        beyond = x[x > model["reference_to"]]
        law_at = law.at(beyond - (model["reference_to"] + 1) / 2)
        curves.loglog(beyond, np.maximum(law_at, SMALLEST), "--", linewidth=0.8, **style)
        if model["failed"]:
            curves.plot(model["failed"], model["ratio_at_failure"], "x", ms=9, **style)
        if model["failed"] and model["predicted"]:
            mark = "o" if model["trained"] else "^"
            failures.loglog(model["failed"], model["predicted"], mark, **style)
    curves.axhline(limit, color="grey", linewidth=0.8)
    curves.set(xlabel="position (x: fails, dashed: law fitted up to the length trained)")
    curves.set(ylabel="spread within classes / distance between")
    if both:
        ends = [0.7 * np.min(both), 1.4 * np.max(both)]
        failures.plot(ends, ends, color="grey", linewidth=0.8)
    failures.set(xlabel="position at which it fails", ylabel="predicted (^: construction)")
    for axes in (curves, failures):
        axes.grid(alpha=0.3)
    handles, labels = curves.get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside right upper", fontsize="small")
    save(figure, path)
