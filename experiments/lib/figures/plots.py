"""The picture of a single run, which the commands that train draw from its records."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaproduct_jax.files import read_lines
from deltaproduct_jax.training.records import METRICS, MetricsLine
from experiments.lib.figures.style import beside_records, mark_trained, new_axes, save


@beside_records
def plot_cumulative(
    results_by_label: Mapping[str, Mapping[str, Any]], path: Path, train_length: int
) -> None:
    """Draws the fraction of sequences right up to each position, at the longest test length.

    Args:
        results_by_label: contents of results.json, by the name of their curve.
        path: where the picture goes.
        train_length: position up to which the models were trained, marked by a line.
    """
    figure, axes = new_axes()
    for label, results in results_by_label.items():
        curve = max(results["test"], key=lambda entry: entry["length"])["strict"]["cumulative"]
        axes.plot(range(len(curve)), curve, label=label, linewidth=2)
    mark_trained(axes, train_length)
    axes.set(
        xlabel="position (group elements read)",
        ylabel="fraction of sequences right so far",
        xlim=(0, len(curve) - 1),
        ylim=(-0.02, 1.02),
    )
    axes.legend()
    save(figure, path)


@beside_records
def plot_ranges(results: Mapping[str, Any], path: Path, train_length: int) -> None:
    """Draws scaled accuracy over ranges of the sequence length, a bar as wide as its range.

    Args:
        results: contents of results.json, with scores that name their shortest and longest length.
        path: where the picture goes.
        train_length: longest length that the model was trained at, marked by a line.
    """
    figure, axes = new_axes()
    for entry in results["test"]:
        scores = [score for score in entry.values() if isinstance(score, dict)]
        # Where there are ranges, the score of all lengths together would only hide them.
        for score in scores[1:] or scores:
            x = score["shortest"], score["longest"]
            axes.plot(x, [score["scaled_accuracy"]] * 2, color="C0", linewidth=4)
    mark_trained(axes, train_length)
    axes.axhline(0, color="grey", linestyle=":", label="guessing")
    axes.set(xlabel="tokens of a sequence, the answer included", ylabel="scaled accuracy")
    axes.set_ylim(top=1.02)
    axes.legend()
    save(figure, path)


@beside_records
def plot_recall(results: Mapping[str, Any], path: Path) -> None:
    """Draws the fraction of queries answered at each length and number of pairs tested.

    Args:
        results: contents of results.json, with scores that name their number of pairs.
        path: where the picture goes.
    """
    figure, axes = new_axes()
    scores = [(entry["length"], entry["strict"]) for entry in results["test"]]
    labels = [f"{length}\n{score['num_pairs']}" for length, score in scores]
    axes.bar(labels, [score["token_accuracy"] for _, score in scores])
    axes.set(
        xlabel="tokens of a sequence, and pairs in it",
        ylabel="fraction of queries answered",
        ylim=(0, 1.02),
    )
    save(figure, path)


@beside_records
def plot_bits(run: Path, path: Path) -> None:
    """Draws bits per byte over the tokens trained on, of batches and of the validation split.

    Args:
        run: a run directory of text.
        path: where the picture goes.
    """
    rows = read_lines(run / METRICS, MetricsLine)
    figure, axes = new_axes()
    for name, label in (("bits_per_byte", "training"), ("valid_bits_per_byte", "validation")):
        points = [(row["tokens"], row[name]) for row in rows if name in row]
        axes.plot(*zip(*points, strict=True), label=label, marker="o" if "valid" in name else None)
    # The first steps are far above all that follows.
    lowest, half = min(row["bits_per_byte"] for row in rows), rows[len(rows) // 10]
    axes.set(xlabel="tokens", ylabel="bits per byte")
    axes.set_ylim(0.95 * lowest, 1.05 * half["bits_per_byte"])
    axes.legend()
    save(figure, path)
