"""Pictures of several models trained on one text: losses of training, and by position."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lib.figures import names
from experiments.lib.figures.language import draw_extrapolation
from experiments.lib.figures.style import (
    Look,
    add_legend,
    beside_records,
    new_panels,
    plain_log,
    points,
    save,
)


def _labels(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the models, with seeds where there are several."""
    seeds = len({record["seed"] for record in found}) > 1
    return [
        names.leg(record["leg"]) + (f", seed {record['seed']}" if seeds else "") for record in found
    ]


@beside_records
def draw_losses(found: Sequence[Mapping[str, Any]], path: Path, look: Look) -> list[Path]:
    """Draws the training loss of each model, thinly, and its validations, over the tokens read.

    Args:
        found: entries with "leg", "seed" and "curve", rows with "tokens", "loss" and some
            "valid_loss".
        path: where the picture goes, without an ending.
        look: width and formats.
    """
    figure, ((axes,),) = new_panels(look, 1, 1, 2.2)
    for number, (record, label) in enumerate(zip(found, _labels(found), strict=True)):
        rows, style = record["curve"], points(number)
        losses = [(row["tokens"], row["loss"]) for row in rows if "loss" in row]
        thin = {"color": style["color"], "linewidth": 0.5, "alpha": 0.5}
        axes.plot(*zip(*losses, strict=True), **thin)
        validated = [(row["tokens"], row["valid_loss"]) for row in rows if "valid_loss" in row]
        if validated:
            axes.plot(*zip(*validated, strict=True), label=label, **style)
    tokens = [row["tokens"] for record in found for row in record["curve"]]
    losses = [row["loss"] for record in found for row in record["curve"] if "loss" in row]
    axes.set(xlabel="tokens", ylabel="loss, nats per token", xscale="log", yscale="log")
    plain_log(axes.xaxis, (min(tokens), max(tokens)))
    plain_log(axes.yaxis, (min(losses), max(losses)))
    add_legend(figure)
    return save(figure, path, look)


def draw_positions(found: Sequence[Mapping[str, Any]], path: Path, look: Look) -> list[Path]:
    """Draws losses by position of all models, if there are any; ``positions`` of each entry."""
    entries = [
        entry | {"label": label}
        for record, label in zip(found, _labels(found), strict=True)
        for entry in record["positions"]
    ]
    return draw_extrapolation(entries, path, look) if entries else []
