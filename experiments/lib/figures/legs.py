"""Pictures of several models trained on one text: losses of training, and by position."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lib.figures.style import COLORS, add_legend, beside_records, new_figure, save


@beside_records
def draw_losses(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws the training loss of each model, and its validations, over the tokens read.

    Args:
        found: entries with "label" and "curve", rows with "tokens", "loss" and some "valid_loss".
        path: where the picture goes.
    """
    figure = new_figure(6.4, 4.2)
    axes = figure.subplots()
    for number, record in enumerate(found):
        color, rows = COLORS[number % len(COLORS)], record["curve"]
        points = [(row["tokens"], row["loss"]) for row in rows if "loss" in row]
        axes.plot(*zip(*points, strict=True), color=color, linewidth=0.8, alpha=0.5)
        points = [(row["tokens"], row["valid_loss"]) for row in rows if "valid_loss" in row]
        if points:
            axes.plot(*zip(*points, strict=True), color=color, marker="o", label=record["label"])
    axes.set(xlabel="tokens", ylabel="loss (nats a token); dots: validation", xscale="log")
    axes.grid(alpha=0.3)
    add_legend(axes)
    save(figure, path)


def draw_positions(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws losses by position of all models, if there are any; ``positions`` of each entry."""
    entries = [
        entry | {"label": record["label"]} for record in found for entry in record["positions"]
    ]
    if entries:
        from experiments.lib.figures.language import draw_extrapolation

        draw_extrapolation(entries, path)
