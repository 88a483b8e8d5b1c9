"""Pictures of several models trained on one text: losses of training, and by position; ranks."""

import collections
import statistics
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from experiments.lib.figures import names
from experiments.lib.figures.language import MOST_MARKED, START, by_octave
from experiments.lib.figures.style import (
    TRAINED,
    Look,
    add_legend,
    beside_records,
    close_and_far_axis,
    close_grid,
    mark,
    mark_trained,
    marked,
    new_panels,
    plain_log,
    points,
    save,
)

Record = Mapping[str, Any]
Curve = tuple[Sequence[float], Sequence[float]]  # places and what is there
SMOOTHED = 15  # records of a training loss, of which one is drawn
THIN = {"linewidth": 0.5, "alpha": 0.6, "marker": ""}
TRAINED_ON = {"linewidth": 0.6, "markersize": 2.5, "alpha": 0.8}
CLOSE = 0.2  # nats per token by which models are told apart; an axis is linear so far


def draw_all(found: Sequence[Record], folder: Path, look: Look) -> Iterator[Path]:
    """Draws losses, positions and ranks of legs, as `records_of` reads them; the files written."""
    yield from draw_losses_of_legs(found, folder / "losses", look)
    yield from draw_positions(found, folder / "positions", look)
    yield from draw_ranks_of_legs(found, folder / "ranks", look)


def _size_and_model(record: Record) -> tuple[str, str]:
    """As "36m" and "2_gated"; a leg without more than a size is its own model."""
    size, _, model = record["leg"].partition("_")
    return size, model or size


class _Models:
    """Legs by size, then by model: one of every seed. A model looks the same in all panels."""

    def __init__(self, found: Sequence[Record]):
        self.by_size: dict[str, dict[str, list[Record]]] = {}
        for record in sorted(found, key=lambda record: record["leg"]):
            size, model = _size_and_model(record)
            self.by_size.setdefault(size, {}).setdefault(model, []).append(record)
        every = sorted({model for of_size in self.by_size.values() for model in of_size})
        self._numbers = {model: number for number, model in enumerate(every)}

    def number(self, model: str) -> int:
        """Of its colour, line and marker."""
        return self._numbers[model]

    def draw(self, axes: Any, model: str, curves: Sequence[Curve], *, log: bool = False) -> None:
        """Curves of its seeds: their median, and thinly each where there are several."""
        number = self._numbers[model]
        if len(curves) > 1:
            for x, y in curves:
                axes.plot(x, y, **points(number) | THIN)
        x, y = _median(curves)
        few = len(x) <= 16
        style = points(number) if few else marked(number, len(x), log=log)
        axes.plot(x, y, label=names.leg_model(model), **style)


def _median(curves: Sequence[Curve]) -> Curve:
    """The median at every place that all curves have."""
    at: dict[float, list[float]] = collections.defaultdict(list)
    for x, y in curves:
        for place, value in zip(x, y, strict=True):
            at[float(place)].append(float(value))
    places = sorted(place for place, values in at.items() if len(values) == len(curves))
    return places, [statistics.median(at[place]) for place in places]


@beside_records
def draw_losses_of_legs(found: Sequence[Record], path: Path, look: Look) -> list[Path]:
    """Draws a panel for each size: losses held out, and below them those trained on, thin.

    They are drawn from the first validation on; of training medians of `SMOOTHED` records.

    Args:
        found: entries with "leg", "seed" and "curve", rows with "tokens", "loss" and some
            "valid_loss".
        path: where the picture goes, without an ending.
        look: width and formats.
    """
    models = _Models(found)
    lines, columns = look.grid(len(models.by_size), 3)
    figure, panels = new_panels(look, lines, columns, 2.4, sharex=True, sharey=True)
    for axes, (size, of_size) in zip(panels.flat, models.by_size.items(), strict=False):
        for model, records in of_size.items():
            held_out = [_column(record["curve"], "valid_loss") for record in records]
            held_out = [curve for curve in held_out if curve[0]]
            if held_out:
                models.draw(axes, model, held_out)
            first = min((curve[0][0] for curve in held_out), default=0)
            for record in records:
                x, y = _column(record["curve"], "loss")
                kept = [i for i, tokens in enumerate(x) if tokens >= first]
                style = marked(models.number(model), len(kept), log=True) | TRAINED_ON
                axes.plot([x[i] for i in kept], [_around(y, i) for i in kept], **style)
        axes.set_title(names.leg_size(size))
        axes.set(xscale="log", yscale="log")
    plain_log(panels[0, 0].xaxis, panels[0, 0].get_xlim())
    plain_log(panels[0, 0].yaxis, panels[0, 0].get_ylim())
    close_grid(panels, len(models.by_size), "tokens", "loss, nats per token")
    _legend(figure, {"trained on": mark(color="0.3", **TRAINED_ON)})
    return save(figure, path, look)


def _column(rows: Sequence[Mapping[str, Any]], name: str) -> Curve:
    found = [(row["tokens"], row[name]) for row in rows if name in row]
    return [tokens for tokens, _ in found], [value for _, value in found]


def _around(values: Sequence[float], index: int) -> float:
    half = SMOOTHED // 2
    return statistics.median(values[max(0, index - half) : index + half + 1])


def _legend(figure: Any, last: Mapping[str, Any]) -> None:
    """Every label of the panels once, models first, then those."""
    named: dict[str, Any] = {}
    for axes in figure.axes:
        named |= dict(zip(*reversed(axes.get_legend_handles_labels()), strict=True))
    trained = {label: named.pop(label) for label in (TRAINED,) if label in named}
    add_legend(figure, dict(sorted(named.items())) | trained | dict(last))


@beside_records
def draw_positions(found: Sequence[Record], path: Path, look: Look) -> list[Path]:
    """Draws losses by position, two rows for each size and a column for each text.

    The lower row has what a model's loss is above that of the first model of its size, on the same
    tokens: models part by less than places do. Where one parts by far more than the others, its
    axis is linear near the first model and logarithmic beyond. Legs without losses by position are
    left out, and without any nothing is drawn.

    Args:
        found: entries with "leg", "seed" and "positions", as `legs.leg.Positions`.
        path: where the picture goes, without an ending.
        look: width and formats.
    """
    models = _Models([record for record in found if record["positions"]])
    entries = [entry for record in found for entry in record["positions"]]
    if not entries:
        return []
    texts = list(dict.fromkeys(entry["data"] for entry in entries))
    figure, panels = new_panels(look, 2 * len(models.by_size), len(texts), 1.6, sharex=True)
    for row, (size, of_size) in enumerate(models.by_size.items()):
        upper, lower = panels[2 * row : 2 * row + 2]
        for text, axes, below in zip(texts, upper, lower, strict=True):
            curves = {model: _of_text(records, text) for model, records in of_size.items()}
            curves = {model: of_model for model, of_model in curves.items() if of_model}
            for model, of_model in curves.items():
                models.draw(axes, model, of_model, log=True)
                first = _median(next(iter(curves.values())))
                models.draw(below, model, [_above(curve, first) for curve in of_model], log=True)
            axes.set_title(f"{names.leg_size(size)}, {text}")
            close_and_far_axis(below, CLOSE)
        upper[0].set_ylabel("loss, nats per token")
        first_model = names.leg_model(next(iter(of_size)))
        lower[0].set_ylabel(f"above {first_model}, nats per token")
    for trained in sorted({entry["trained"] for entry in entries if entry["trained"]}):
        for axes in panels.flat:
            mark_trained(axes, trained)
    places = [place for entry in entries for place in entry["position"]]
    panels[0, 0].set_xscale("log", base=2)
    plain_log(panels[0, 0].xaxis, (min(places), max(places)), base=2)
    close_grid(panels, panels.size, "position, tokens")
    _legend(figure, {})
    return save(figure, path, look)


def _of_text(records: Sequence[Record], text: str) -> list[Curve]:
    entries = [entry for record in records for entry in record["positions"]]
    return [by_octave(entry)[:2] for entry in entries if entry["data"] == text]


def _above(curve: Curve, first: Curve) -> Curve:
    """What a curve is above the first, where that has places."""
    at = dict(zip(*first, strict=True))
    found = [(x, y - at[x]) for x, y in zip(*curve, strict=True) if x in at]
    return [x for x, _ in found], [y for _, y in found]


@beside_records
def draw_ranks_of_legs(found: Sequence[Record], path: Path, look: Look) -> list[Path]:
    """Draws the mean effective rank over all heads along a row, a panel for each model.

    Bands go from the 10th to the 90th percentile of the heads. Legs without ranks are left out;
    without any nothing is drawn.

    Args:
        found: entries with "leg", "seed" and "ranks", as `legs.leg.Ranks`, or None.
        path: where the picture goes, without an ending.
        look: width and formats.
    """
    models = _Models([record for record in found if record["ranks"] is not None])
    number = sum(map(len, models.by_size.values()))
    if not number:
        return []
    figure, panels = new_panels(look, *look.grid(number, 4), 1.7, sharex=True, sharey=True)
    cells = iter(panels.flat)
    for size, of_size in models.by_size.items():
        for model, records in of_size.items():
            axes, ranks = next(cells), [record["ranks"] for record in records]
            for start in sorted({start for of in ranks for start in of["starts"]})[:MOST_MARKED]:
                axes.axvline(start, **START)
            for along in (of["along"] for of in ranks):
                color = points(models.number(model))["color"]
                style = {"color": color, "alpha": 0.15, "linewidth": 0}
                axes.fill_between(along["position"], along["low"], along["high"], **style)
            curves = [(of["along"]["position"], of["along"]["mean"]) for of in ranks]
            models.draw(axes, model, curves)
            for trained in sorted({of["trained"] for of in ranks} - {None}):
                mark_trained(axes, trained)
            axes.set_title(f"{names.leg_size(size)}, {names.leg_model(model)}")
    panels[0, 0].set_ylim(bottom=0)
    close_grid(panels, number, "position, tokens", "effective rank")
    band = mark(color="0.3", linewidth=5, alpha=0.3)
    _legend(figure, {"a document begins": mark(**START), "80 % of the heads": band})
    return save(figure, path, look)
