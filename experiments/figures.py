"""Figures, drawn from records alone."""

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deltaproduct_jax.training.records import write_file


def plot_cumulative(results_by_label: Mapping[str, Mapping[str, Any]], path: Path) -> None:
    """Draws the fraction of sequences right up to each position, at the longest test length.

    Args:
        results_by_label: contents of results.json, by the name of their curve.
        path: where the picture goes.

    Raises:
        RunDirectoryError: the picture cannot be written.
    """
    figure = Figure(figsize=(6, 4), layout="constrained")
    canvas = FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, results in results_by_label.items():
        curve = max(results["test"], key=lambda entry: entry["length"])["strict"]["cumulative"]
        axes.plot(range(len(curve)), curve, label=label)
    axes.set(xlabel="position", ylabel="sequences right so far", ylim=(-0.02, 1.02))
    axes.grid(alpha=0.3)
    axes.legend()
    picture = io.BytesIO()
    canvas.print_png(picture)
    write_file(path, picture.getvalue())
