"""Figures, drawn from records alone; as a script, those of the paper (``paper_figures.py``).

python -m experiments.figures --workdir=OUT --source=DIR --preset=factors
"""

import io
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deltaproduct_jax.training.records import write_file


def plot_cumulative(
    results_by_label: Mapping[str, Mapping[str, Any]], path: Path, train_length: int
) -> None:
    """Draws the fraction of sequences right up to each position, at the longest test length.

    Args:
        results_by_label: contents of results.json, by the name of their curve.
        path: where the picture goes.
        train_length: position up to which the models were trained, marked by a line.
    """
    figure = Figure(figsize=(6.4, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for label, results in results_by_label.items():
        curve = max(results["test"], key=lambda entry: entry["length"])["strict"]["cumulative"]
        axes.plot(range(len(curve)), curve, label=label, linewidth=2)
    axes.axvline(train_length, color="grey", linestyle="--", label="trained up to here")
    axes.set(
        xlabel="position (group elements read)",
        ylabel="fraction of sequences right so far",
        xlim=(0, len(curve) - 1),
        ylim=(-0.02, 1.02),
    )
    axes.grid(alpha=0.3)
    axes.legend()
    save(figure, path)


def save(figure: Figure, path: Path) -> None:
    """Writes a figure as PNG; RunDirectoryError where that fails."""
    buffer = io.BytesIO()
    figure.savefig(buffer, dpi=150, format="png")
    write_file(path, buffer.getvalue())


if __name__ == "__main__":
    # Here, since what it imports draws with what stands above.
    from experiments.paper_figures import main

    sys.exit(main(sys.argv[1:]))
