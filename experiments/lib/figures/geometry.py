"""Betas, keys and eigenvalues of Householder factors, of a head or of a model a row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from experiments.lib.figures.style import beside_records, draw_unit_circle, new_figure, save
from experiments.lib.theory.geometry import CLOSE, COMPONENTS, spectra

# Curves of a head's components, and what they are called.
CURVES = {"explained_variance": "about the mean", "explained_about_zero": "about zero"}
MOST_COMPONENTS = 10


@beside_records
def draw_heads(found: Mapping[str, Any], title: str, path: Path) -> None:
    """Draws three panels for every head: betas, variance explained, eigenvalues."""
    heads = found["heads"]
    figure = new_figure(11, 3.2 * len(heads))
    figure.suptitle(title)
    panels = figure.subplots(len(heads), 3, squeeze=False)
    for index, head in enumerate(heads):
        betas, variances, plane = panels[index]
        beta = np.array(head["beta"])
        factors = [f"factor {r + 1}" for r in range(beta.shape[1])]
        betas.hist(list(beta.T), bins=np.linspace(0, 2, 41), stacked=True, label=factors)
        mark = ", reflecting" if index in found["reflecting_heads"] else ""
        betas.set(title=f"head {index}{mark}", xlabel="beta", ylabel="tokens")
        betas.legend(fontsize="small")
        for name, text in CURVES.items():
            curve = head[name][:MOST_COMPONENTS]
            variances.plot(range(1, len(curve) + 1), curve, "o-", markersize=3, label=text)
        variances.axhline(0.95, color="grey", linestyle="--", linewidth=0.8)
        variances.set(
            xlabel="principal components of the keys", ylabel="variance explained", ylim=(0, 1.05)
        )
        variances.legend(fontsize="small")
        values = np.array(head["eigenvalues"])
        draw_unit_circle(plane)
        plane.scatter(values[..., 0], values[..., 1], s=14, alpha=0.4)
        plane.set(title="eigenvalues")
        for axes in panels[index]:
            axes.grid(alpha=0.3)
    save(figure, path)


@beside_records
def draw_models(models: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draws every model in a row: heads that hold a copy in colours, before the grey others."""
    figure = new_figure(11, 2.6 * len(models))
    rows = figure.subplots(len(models), 3, squeeze=False, width_ratios=(1.3, 1.3, 1))
    for (betas, components, plane), model in zip(rows, models, strict=True):
        off = [head["off_copy"] for head in model["heads"]]
        order = sorted(range(len(off)), key=lambda index: -(off[index] or 0))
        heads, styles = [model["heads"][index] for index in order], []
        for index in order:
            # Colours by rank, so that none is the grey of the others.
            rank, copies_it = len(off) - 1 - len(styles), (off[index] or 0) <= CLOSE
            label = f"head {index}"
            if off[index] is not None:
                label += f": {off[index]:.1g} off a copy"
            if copies_it and model["heads"][index]["copy_of"] not in (None, "itself"):
                label += f" ({model['heads'][index]['copy_of']})"
            color = f"C{rank}" if copies_it else "0.75"
            styles.append({"color": color, "label": label if copies_it else "other heads"})
        every = [np.ravel(head["beta"]) for head in heads]
        colors = [style["color"] for style in styles]
        betas.hist(every, bins=np.linspace(0, 2, 41), stacked=True, color=colors)
        betas.set(title=model["name"], xlabel="beta", ylabel="factors of all letters")
        draw_unit_circle(plane)
        for style, head in zip(styles, heads, strict=True):
            curve = head["explained_about_zero"][:MOST_COMPONENTS]
            components.plot(range(1, len(curve) + 1), curve, "o-", markersize=3, **style)
            values = np.array(head["eigenvalues"])
            plane.scatter(values[..., 0], values[..., 1], s=14, color=style["color"])
        wanted = np.unique(np.round(np.ravel(spectra(model["group"])[:1]), 6))
        plane.plot(wanted.real, wanted.imag, "k+", markersize=12)
        labelled = dict(zip(*components.get_legend_handles_labels()[::-1], strict=True))
        components.legend(labelled.values(), labelled, fontsize="small", loc="lower right")
        components.axhline(COMPONENTS, color="grey", linestyle="--", linewidth=0.8)
        components.set(xlabel="principal components of the keys, about zero")
        components.set(xlim=(0.7, 10.3), ylim=(0, 1.05), ylabel="part of their squares")
        plane.set(title=f"eigenvalues (+: {model['group']} constructed)")
        for axes in (betas, components, plane):
            axes.grid(alpha=0.3)
    save(figure, path)
