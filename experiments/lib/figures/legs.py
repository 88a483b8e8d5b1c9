"""Pictures of several models trained on one text: losses of training, and by position; ranks."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lib.figures import names
from experiments.lib.figures.language import MOST_MARKED, START, draw_extrapolation
from experiments.lib.figures.style import (
    Look,
    add_legend,
    beside_records,
    close_grid,
    mark,
    mark_trained,
    marked,
    new_panels,
    plain_log,
    points,
    save,
)


def draw_all(found: Sequence[Mapping[str, Any]], folder: Path, look: Look) -> Iterator[Path]:
    """Draws losses, positions and ranks of legs, as `records_of` reads them; the files written."""
    yield from draw_losses_of_legs(found, folder / "losses", look)
    yield from draw_positions(found, folder / "positions", look)
    yield from draw_ranks_of_legs(found, folder / "ranks", look)


def _labels(found: Sequence[Mapping[str, Any]]) -> list[str]:
    """Names of the models, with seeds where there are several."""
    seeds = len({record["seed"] for record in found}) > 1
    return [
        names.leg(record["leg"]) + (f", seed {record['seed']}" if seeds else "") for record in found
    ]


@beside_records
def draw_losses_of_legs(found: Sequence[Mapping[str, Any]], path: Path, look: Look) -> list[Path]:
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


@beside_records
def draw_ranks_of_legs(found: Sequence[Mapping[str, Any]], path: Path, look: Look) -> list[Path]:
    """Draws the mean effective rank over all heads along a row, a panel for each n_h.

    Bands go from the 10th to the 90th percentile of the heads. Legs whose records have no ranks
    along the row are left out; without any nothing is drawn.

    Args:
        found: entries with "leg", "seed" and "ranks", as `language_legs.Ranks`, or None.
        path: where the picture goes, without an ending.
        look: width and formats.
    """
    by_factors: dict[int, list[tuple[int, str, Mapping[str, Any]]]] = {}
    for number, (record, label) in enumerate(zip(found, _labels(found), strict=True)):
        ranks = record["ranks"]
        if ranks and "along" in ranks:
            by_factors.setdefault(ranks["num_householder"], []).append((number, label, ranks))
    if not by_factors:
        return []
    lines, columns = look.grid(len(by_factors), 4)
    figure, panels = new_panels(look, lines, columns, 1.9, sharex=True, sharey=True)
    named = {}
    for axes, (factors, entries) in zip(panels.flat, sorted(by_factors.items()), strict=False):
        starts = {start for _, _, ranks in entries for start in ranks["starts"]}
        for start in sorted(starts)[:MOST_MARKED]:
            axes.axvline(start, **START)
        for number, label, ranks in entries:
            along = ranks["along"]
            x, style = along["position"], marked(number, len(along["position"]))
            axes.plot(x, along["mean"], label=label, **style)
            band = {"color": style["color"], "alpha": 0.15, "linewidth": 0}
            axes.fill_between(x, along["low"], along["high"], **band)
        for trained in sorted({ranks["trained"] for _, _, ranks in entries} - {None}):
            mark_trained(axes, trained)
        axes.set_title(f"$n_h$ = {factors}")
        named |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    panels[0, 0].set_ylim(bottom=0)
    close_grid(panels, len(by_factors), "position, tokens", "effective rank")
    add_legend(figure, named | {"a document begins": mark(**START)})
    return save(figure, path, look)
