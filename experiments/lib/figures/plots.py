"""The picture of a single run, which the commands that train draw from its records."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaproduct_jax.files import read_lines
from deltaproduct_jax.training.records import METRICS, MetricsLine
from experiments.lib.figures.curves import CURVE, draw_panels
from experiments.lib.figures.style import (
    Look,
    add_legend,
    bars,
    beside_records,
    mark_trained,
    new_panels,
    plain_log,
    points,
    save,
    series,
)

BITS = "bits_per_byte"


def cumulative_record(
    results_by_label: Mapping[str, Mapping[str, Any]], group: str, train_length: int
) -> dict[str, Any]:
    """What `experiments.lib.figures.curves` draws of single runs, at the longest test length.

    Args:
        results_by_label: contents of results.json, by the name of their curve.
        group: that they were trained on.
        train_length: position up to which they were.
    """
    curves = {}
    for label, results in results_by_label.items():
        curve = max(results["test"], key=lambda entry: entry["length"])["strict"]["cumulative"]
        curve = [round(value, 4) for value in curve]
        curves[label] = {"median": curve, "runs": [curve]}
    title = f"group = {group}"
    record = {"figure": "cumulative", "metric": CURVE, "band": False}
    return record | {"trained": {title: train_length}, "panels": {title: curves}}


@beside_records
def plot_cumulative(record: Mapping[str, Any], path: Path, look: Look) -> list[Path]:
    """Draws the fraction of sequences right up to each position; of a `cumulative_record`."""
    return save(draw_panels(record, look), path, look)


@beside_records
def plot_ranges(
    results: Mapping[str, Any], path: Path, train_length: int, look: Look
) -> list[Path]:
    """Draws scaled accuracy over ranges of the sequence length, a bar as wide as its range.

    Args:
        results: contents of results.json, with scores that name their shortest and longest length.
        path: where the picture goes, without an ending.
        train_length: longest length that the model was trained at, marked by a line.
        look: width and formats.
    """
    figure, ((axes,),) = new_panels(look, 1, 1, 2.0)
    for entry in results["test"]:
        scores = [score for score in entry.values() if isinstance(score, dict)]
        # Where there are ranges, the score of all lengths together would only hide them.
        for score in scores[1:] or scores:
            x = score["shortest"], score["longest"]
            color = series(0)["color"]
            axes.plot(x, [score["scaled_accuracy"]] * 2, color=color, linewidth=3)
    mark_trained(axes, train_length)
    axes.axhline(0, color="0.35", linestyle="-.", linewidth=0.8, label="guessing")
    axes.set(xlabel="tokens of a sequence, the answer included", ylabel="scaled accuracy")
    axes.set_ylim(top=1.05)
    add_legend(figure)
    return save(figure, path, look)


@beside_records
def plot_recall(results: Mapping[str, Any], path: Path, look: Look) -> list[Path]:
    """Draws the fraction of queries answered at each length and number of pairs tested.

    Args:
        results: contents of results.json, with scores that name their number of pairs.
        path: where the picture goes, without an ending.
        look: width and formats.
    """
    figure, ((axes,),) = new_panels(look, 1, 1, 2.0)
    scores = [(entry["length"], entry["strict"]) for entry in results["test"]]
    labels = [f"{length}\n{score['num_pairs']}" for length, score in scores]
    places = range(len(labels))
    axes.bar(places, [score["token_accuracy"] for _, score in scores], 0.6, **bars(0))
    axes.set_xticks(places, labels)
    axes.set(
        xlabel="tokens of a sequence, and pairs in it", ylabel="queries answered", ylim=(0, 1.02)
    )
    return save(figure, path, look)


@beside_records
def plot_bits(run: Path, path: Path, look: Look) -> list[Path]:
    """Draws bits per byte over the tokens trained on, of batches and of the validation split.

    Both axes are logarithmic, as the first steps are far above all that follows.

    Args:
        run: a run directory of text.
        path: where the picture goes, without an ending.
        look: width and formats.
    """
    rows = [row for row in read_lines(run / METRICS, MetricsLine) if BITS in row]
    figure, ((axes,),) = new_panels(look, 1, 1, 2.0)
    for index, (name, label) in enumerate(((BITS, "training"), (f"valid_{BITS}", "validation"))):
        found = [(row["tokens"], row[name]) for row in rows if name in row]
        style = points(index) | ({} if index else {"marker": "none", "linewidth": 0.9})
        axes.loglog(*zip(*found, strict=True), label=label, **style)
    axes.set(xlabel="tokens trained on", ylabel="bits per byte")
    tokens, bits = ([row[name] for row in rows] for name in ("tokens", BITS))
    plain_log(axes.xaxis, (min(tokens), max(tokens)))
    plain_log(axes.yaxis, (min(bits), max(bits)))
    add_legend(figure)
    return save(figure, path, look)
