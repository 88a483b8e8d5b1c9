"""Pictures of language models: losses and ranks along a text, speeds, losses over parameters."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lib.figures import names
from experiments.lib.figures.style import (
    Look,
    add_legend,
    bars,
    beside_records,
    close_grid,
    mark,
    mark_trained,
    marked,
    new_panels,
    plain,
    plain_log,
    points,
    save,
    series,
)

PER_OCTAVE = 4  # points of a loss by position in every doubling
MOST_MARKED = 100  # starts of documents; more of them would be a grey field
START = {"color": "0.5", "linewidth": 0.6, "linestyle": ":"}


@beside_records
def draw_extrapolation(found: Sequence[Mapping[str, Any]], path: Path, look: Look) -> list[Path]:
    """Draws a column for each text: the loss at each place, and the mean up to there.

    Far places are drawn as means of several, `PER_OCTAVE` to every doubling.

    Args:
        found: entries with the text's "data", a model's "label" and "trained", and curves.
        path: where the picture goes, without an ending.
        look: width and formats.
    """
    texts = list(dict.fromkeys(entry["data"] for entry in found))
    labels = list(dict.fromkeys(entry["label"] for entry in found))
    figure, panels = new_panels(look, 2, len(texts), 1.9, sharex=True)
    for column, text in zip(panels.T, texts, strict=True):
        entries = [entry for entry in found if entry["data"] == text]
        for entry in entries:
            number, label = labels.index(entry["label"]), names.pretty(entry["label"])
            style = lambda count, number=number: marked(number, count, log=True)
            x, loss, error = by_octave(entry)
            column[0].plot(x, loss, label=label, **style(len(x)))
            if error is not None:
                band = {"color": style(len(x))["color"], "alpha": 0.12}
                column[0].fill_between(x, loss - error, loss + error, **band)
            x = entry["position"]
            column[1].plot(x, entry["running_loss"], label=label, **style(len(x)))
        for trained in sorted({entry["trained"] for entry in entries if entry["trained"]}):
            for axes in column:
                mark_trained(axes, trained)
        column[0].set_title(text)
    # Models part in the first tokens and beyond the length trained: neither end is a point.
    places = [place for entry in found for place in entry["position"]]
    panels[0, 0].set_xscale("log", base=2)
    plain_log(panels[0, 0].xaxis, (min(places), max(places)), base=2)
    panels[0, 0].set_ylabel("loss, nats per token")
    panels[1, 0].set_ylabel("mean up to here")
    close_grid(panels, panels.size, "position, tokens")
    add_legend(figure)
    return save(figure, path, look)


def by_octave(entry: Mapping[str, Any]) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Positions, losses and their errors, far ones as means.

    Windows of the same rows err together, so that the error of a mean is not less than theirs.
    """
    x = np.array(entry["position"], float)
    group = np.unique(np.round(PER_OCTAVE * np.log2(x)), return_inverse=True)[1]
    count = np.bincount(group)
    means = lambda values: np.bincount(group, weights=np.array(values, float)) / count
    error = None if entry["error"] is None else means(entry["error"])
    return means(x), means(entry["loss"]), error


@beside_records
def draw_ranks(
    ranks_by_block: Mapping[int, np.ndarray],
    every: int,
    starts: Sequence[int],
    trained: int | None,
    title: str,
    path: Path,
    look: Look,
) -> list[Path]:
    """Draws a panel for each block: every head's rank along the text, starts of documents marked.

    Args:
        ranks_by_block: ``[S, R, Hv]`` by the number of the block.
        every: tokens from one to the next.
        starts: of documents, in tokens.
        trained: length of training, or None.
        title: of the figure.
        path: where the picture goes, without an ending.
        look: width and formats.
    """
    lines, columns = look.grid(len(ranks_by_block), 4)
    figure, cells = new_panels(look, lines, columns, 1.4, sharex=True, sharey=True)
    figure.suptitle(names.pretty(title))
    most_heads = 0
    for (block, ranks), axes in zip(ranks_by_block.items(), cells.flat, strict=False):
        S, R, Hv = ranks.shape
        most_heads = max(most_heads, Hv)
        # An update is a part of a token, as in the paper.
        x = (every * np.arange(S)[:, None] + np.arange(R)[None] / R).reshape(-1)
        for start in starts[:MOST_MARKED]:
            axes.axvline(start, **START)
        for head in range(Hv):
            style = marked(head, len(x)) | {"linewidth": 0.7}
            axes.plot(x, ranks[:, :, head].reshape(-1), **style)
        if trained is not None:
            mark_trained(axes, trained)
        axes.set_title(f"block {block}")
    cells[0, 0].set_ylim(bottom=0)
    close_grid(cells, len(ranks_by_block), "position, tokens", "effective rank")
    named = {f"head {head}": mark(**_plain(series(head))) for head in range(most_heads)}
    named["a document begins"] = mark(**START)
    if trained is not None:
        handles, labels = cells[0, 0].get_legend_handles_labels()
        named |= dict(zip(labels, handles, strict=True))
    add_legend(figure, named)
    return save(figure, path, look)


def _plain(style: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in style.items() if name != "markevery"}


@beside_records
def draw_throughput(
    rows: Sequence[Mapping[str, Any]], config: Mapping[str, Any], path: Path, look: Look
) -> list[Path]:
    """Draws bars of training speed, and of the time of a token written at each number of rows.

    Args:
        rows: of models that ran.
        config: "batch_size", "length", "hidden_size" and "dtype" of all.
        path: where the picture goes, without an ending.
        look: width and formats.
    """
    said = [f"$n_h$ = {r['num_householder']}, {r['num_heads']} x {r['head_dim']}" for r in rows]
    lines, columns = look.grid(2, 2)
    figure, panels = new_panels(look, lines, columns, 0.6 + 0.25 * len(rows), sharey=True)
    sizes = zip("BTD", ("batch_size", "length", "hidden_size"), strict=True)
    title = " ".join(f"{letter}={config[name]}" for letter, name in sizes)
    figure.suptitle(f"{title}, {config['dtype']};\n{rows[0]['machine']}", fontsize="small")
    speed, latency = panels.flat
    places = np.arange(len(rows))
    drawn = speed.barh(places, [row["tokens_per_s"] for row in rows], 0.7, **bars(0))
    shares = [f"{row['relative']:.0%}" for row in rows]
    speed.bar_label(drawn, shares, fontsize="small", padding=2)
    speed.set_xlim(right=1.35 * max(row["tokens_per_s"] for row in rows))
    speed.set_xlabel("training, tokens/s")
    speed.xaxis.set_major_formatter(lambda value, _: plain(value))
    decoded = list(rows[0]["decoding_ms"])
    for index, count in enumerate(decoded):
        offset = (index - (len(decoded) - 1) / 2) * 0.7 / len(decoded)
        widths = [row["decoding_ms"][count] for row in rows]
        label = f"{count} at a time"
        latency.barh(places + offset, widths, 0.7 / len(decoded), label=label, **bars(index + 1))
    latency.set_xlabel("writing, ms a token")
    speed.set_yticks(places, said)
    speed.invert_yaxis()
    add_legend(figure)
    return save(figure, path, look)


@beside_records
def draw_losses(rows: Sequence[Mapping[str, Any]], path: Path, look: Look) -> list[Path]:
    """Draws test loss over parameters, a panel for each way of matching, a curve for each n_h.

    Args:
        rows: entries with "matched" (both ways where n_h is 1), "num_householder", "parameters"
            and "loss".
        path: where the picture goes, without an ending.
        look: width and formats.
    """
    said = {"heads": "fewer heads", "head_dim": "narrower heads"}
    ways = {way: n for way, n in said.items() if any(way in row["matched"] for row in rows)}
    lines, columns = look.grid(len(ways), 2)
    figure, panels = new_panels(look, lines, columns, 2.0, sharex=True, sharey=True)
    for axes, (way, name) in zip(panels.flat, ways.items(), strict=True):
        for factors in sorted({row["num_householder"] for row in rows}):
            found = sorted(
                (row["parameters"], row["loss"])
                for row in rows
                if row["num_householder"] == factors and way in row["matched"]
            )
            if found:
                x, y = zip(*found, strict=True)
                axes.plot(x, y, label=f"$n_h$ = {factors}", **points(factors - 1))
        axes.set(xscale="log", title=name)
    sizes = [row["parameters"] for row in rows]
    plain_log(panels[0, 0].xaxis, (min(sizes), max(sizes)))
    close_grid(panels, len(ways), "parameters", "test loss, nats per token")
    add_legend(figure)
    return save(figure, path, look)
