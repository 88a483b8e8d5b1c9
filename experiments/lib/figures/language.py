"""Pictures of language models: losses and ranks along a text, speeds, losses over parameters."""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lib.figures.style import (
    COLORS,
    add_legend,
    beside_records,
    mark_trained,
    new_figure,
    save,
)

MOST_MARKED = 100  # starts of documents; more of them would be a grey field


@beside_records
def draw_extrapolation(found: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws a column for each text: the loss at each place, and the mean up to there.

    Args:
        found: entries with the text's "data", a model's "label" and "trained", and curves.
        path: where the picture goes.
    """
    texts = list(dict.fromkeys(entry["data"] for entry in found))
    labels = list(dict.fromkeys(entry["label"] for entry in found))
    figure = new_figure(1.0 + 4.4 * len(texts), 6.6)
    panels = figure.subplots(2, len(texts), squeeze=False, sharex="col")
    for column, text in zip(panels.T, texts, strict=True):
        entries = [entry for entry in found if entry["data"] == text]
        for entry in entries:
            color = COLORS[labels.index(entry["label"]) % len(COLORS)]
            x, loss = np.array(entry["position"]), np.array(entry["loss"])
            column[0].plot(x, loss, color=color, label=entry["label"])
            if entry["error"] is not None:
                error = np.array(entry["error"])
                column[0].fill_between(x, loss - error, loss + error, color=color, alpha=0.2)
            column[1].plot(x, entry["running_loss"], color=color, label=entry["label"])
        for trained in sorted({entry["trained"] for entry in entries if entry["trained"]}):
            for axes in column:
                mark_trained(axes, trained)
        column[0].set(title=text, ylabel="loss (nats a token)")
        column[1].set(xlabel="position (tokens)", ylabel="mean loss up to here")
        for axes in column:
            axes.grid(alpha=0.3)
        add_legend(column[1])
    save(figure, path)


@beside_records
def draw_ranks(
    ranks_by_block: Mapping[int, np.ndarray],
    every: int,
    starts: Sequence[int],
    trained: int | None,
    title: str,
    path: Path,
) -> None:
    """Draws a panel for each block: every head's rank along the text, starts of documents marked.

    Args:
        ranks_by_block: ``[S, R, Hv]`` by the number of the block.
        every: tokens from one to the next.
        starts: of documents, in tokens.
        trained: length of training, or None.
        title: of the figure.
        path: where the picture goes.
    """
    columns = min(4, math.ceil(math.sqrt(len(ranks_by_block))))
    lines = math.ceil(len(ranks_by_block) / columns)
    figure = new_figure(1 + 4.2 * columns, 0.8 + 2.6 * lines)
    figure.suptitle(title)
    cells = figure.subplots(lines, columns, squeeze=False, sharex=True).flat
    for (block, ranks), axes in zip(ranks_by_block.items(), cells, strict=False):
        S, R, Hv = ranks.shape
        # An update is a part of a token, as in the paper.
        x = (every * np.arange(S)[:, None] + np.arange(R)[None] / R).reshape(-1)
        for start in starts[:MOST_MARKED]:
            axes.axvline(start, color="black", linewidth=0.8, linestyle=":")
        axes.plot(x, ranks.reshape(S * R, Hv), linewidth=0.8)
        if trained is not None:
            axes.axvline(trained, color="black", linestyle="--", linewidth=1)
        axes.set(title=f"block {block}", ylim=(0, None))
        axes.grid(alpha=0.3, axis="y")
    for axes in list(cells):  # places without a panel
        axes.set_axis_off()
    figure.supxlabel("position (tokens); dotted: a document begins; dashed: trained up to here")
    figure.supylabel("effective rank of each head's state")
    save(figure, path)


@beside_records
def draw_throughput(rows: Sequence[Mapping[str, Any]], path: Path, title: str) -> None:
    """Draws bars of training speed, and of the time of a token written at each number of rows."""
    names = [f"n_h = {r['num_householder']}\n{r['num_heads']} x {r['head_dim']}" for r in rows]
    figure = new_figure(2 + 1.9 * max(2, len(rows)), 4.0)
    figure.suptitle(title, fontsize="small")
    speed, latency = figure.subplots(1, 2)
    places = np.arange(len(rows))
    bars = speed.bar(places, [row["tokens_per_s"] for row in rows], color=COLORS[0])
    shares = [f"{row['relative']:.0%}" for row in rows]
    speed.bar_label(bars, shares, fontsize="small")
    speed.set(ylabel="training, tokens/s")
    decoded = list(rows[0]["decoding_ms"])
    for index, count in enumerate(decoded):
        offset = (index - (len(decoded) - 1) / 2) * 0.8 / len(decoded)
        heights = [row["decoding_ms"][count] for row in rows]
        latency.bar(places + offset, heights, 0.8 / len(decoded), label=f"{count} at a time")
    latency.set(ylabel="writing, ms a token")
    latency.legend(fontsize="small")
    for axes in (speed, latency):
        axes.set_xticks(places, names, fontsize="small")
        axes.grid(alpha=0.3, axis="y")
    save(figure, path)


@beside_records
def draw_losses(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws test loss over parameters, a panel for each way of matching, a curve for each n_h.

    Args:
        rows: entries with "matched" (both ways where n_h is 1), "num_householder", "parameters"
            and "loss".
        path: where the picture goes.
    """
    names = {"heads": "fewer heads", "head_dim": "narrower heads"}
    ways = {way: n for way, n in names.items() if any(way in row["matched"] for row in rows)}
    figure = new_figure(1.2 + 4.2 * len(ways), 4.0)
    panels = figure.subplots(1, len(ways), sharey=True, squeeze=False)[0]
    for axes, (way, name) in zip(panels, ways.items(), strict=True):
        for factors in sorted({row["num_householder"] for row in rows}):
            points = sorted(
                (row["parameters"], row["loss"])
                for row in rows
                if row["num_householder"] == factors and way in row["matched"]
            )
            if points:
                x, y = zip(*points, strict=True)
                color = COLORS[(factors - 1) % len(COLORS)]
                axes.plot(x, y, "o-", color=color, label=f"n_h = {factors}")
        axes.set(xlabel="parameters", xscale="log", title=f"as many parameters by {name}")
        axes.grid(alpha=0.3, which="both")
        axes.legend()
    panels[0].set(ylabel="test loss (nats a token)")
    save(figure, path)
