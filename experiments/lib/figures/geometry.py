"""Betas, keys and eigenvalues of Householder factors, of a head or of a model a row."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from experiments.lib.figures import names
from experiments.lib.figures.style import (
    GREY,
    Look,
    add_legend,
    beside_records,
    draw_unit_circle,
    mark,
    new_panels,
    plain_log,
    points,
    save,
)
from experiments.lib.theory.geometry import CLOSE, COMPONENTS, spectra

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Curves of a head's components, and what they are called.
CURVES = {"explained_variance": "about the mean", "explained_about_zero": "about zero"}
MOST_COMPONENTS = 10
BINS = np.linspace(0, 2, 41)
FEWEST = 0.5  # factors that an axis shows: a logarithmic one has no zero
OTHERS = {"color": GREY, "linewidth": 0.7, "marker": ".", "markersize": 3}
CONSTRUCTED = {"color": "k", "marker": "+", "markersize": 9, "linestyle": "none"}
LINE = {"color": "k", "linestyle": ":", "linewidth": 0.7}


def _panels(look: Look, rows: int, part: str) -> "tuple[Figure, np.ndarray]":
    """Betas, components and eigenvalues, in as many rows, named at the top and the bottom.

    Rows have names at their left, so that what is upright in a column stands in its title.
    """
    narrow = look.is_narrow(3 * rows)
    height = 1.35 if rows < 6 else 1.1
    ratios = (1, 1, 1 if narrow else 0.9)
    figure, panels = new_panels(
        look, rows, 3, height, sharex="col", sharey="col", width_ratios=ratios
    )
    said = (
        ("step sizes, how many", "beta"),
        (f"keys, part of {part}", "components"),
        ("eigenvalues, imaginary part", "real part"),
    )
    for axes, (title, label) in zip(panels.T, said, strict=True):
        axes[0].set_title(title)
        axes[-1].set_xlabel(label)
    for betas, components, plane in panels:
        betas.set(xlim=(-0.05, 2.05), yscale="log", xticks=(0, 1, 2))
        components.axhline(COMPONENTS, **LINE)
        components.set(xlim=(0.5, MOST_COMPONENTS + 0.5), ylim=(0, 1.08), xticks=(1, 4, 7, 10))
        components.set_yticks((0, 0.5, 1))
        draw_unit_circle(plane)
        plane.tick_params(labelleft=not narrow)
    return figure, panels


def _counts_axis(axes: Any, betas: Sequence[Any]) -> None:
    """From below one factor to the fullest bin of all panels, which share this axis."""
    fullest = max(np.histogram(_numbers(values), BINS)[0].max() for values in betas)
    axes.set_ylim(FEWEST, 2 * fullest)
    plain_log(axes.yaxis, (1, 100 * fullest))  # powers of ten


@beside_records
def draw_heads(found: Mapping[str, Any], title: str, path: Path, look: Look) -> list[Path]:
    """Draws three panels for every head: betas, parts of the keys' variance, eigenvalues."""
    heads = found["heads"]
    figure, panels = _panels(look, len(heads), "variance")
    figure.suptitle(names.pretty(title))
    for index, head in enumerate(heads):
        betas, variances, plane = panels[index]
        beta = np.array(head["beta"], float)
        for factor, values in enumerate(beta.T):
            _histogram(betas, values, factor, f"factor {factor + 1}")
        mark_ = ",\nreflecting" if index in found["reflecting_heads"] else ""
        betas.set_ylabel(f"head {index}{mark_}")
        for number, (name, text) in enumerate(CURVES.items()):
            curve, style = head[name][:MOST_COMPONENTS], points(number + beta.shape[1])
            open_ = {"markerfacecolor": "none", "markersize": 6} if number else {}  # they coincide
            variances.plot(range(1, len(curve) + 1), curve, label=text, **style | open_)
        real, imaginary = _apart(head["eigenvalues"])
        plane.plot(real, imaginary, "o", color=points(0)["color"], alpha=0.6)
    each = [np.array(head["beta"], float)[:, r] for head in heads for r in range(beta.shape[1])]
    _counts_axis(panels[0, 0], each)
    add_legend(figure)
    return save(figure, path, look)


def _histogram(axes: Any, values: Any, index: int, label: str) -> None:
    """An outline, so that what stands behind is seen."""
    style = {name: points(index)[name] for name in ("color", "linestyle")} | {"linewidth": 1.2}
    counts, _ = np.histogram(_numbers(values), BINS)
    axes.stairs(np.maximum(counts, FEWEST), BINS, baseline=FEWEST, label=label, **style)


def _apart(eigenvalues: Any) -> np.ndarray:
    """Real and imaginary parts, each place of the picture once."""
    values = _numbers(eigenvalues).reshape(-1, 2)
    return np.unique(values.round(2), axis=0).T


@beside_records
def draw_models(models: Sequence[Mapping[str, Any]], path: Path, look: Look) -> list[Path]:
    """Draws every model in a row: heads that hold a copy in colours, before the grey others."""
    figure, panels = _panels(look, len(models), "squares")
    most = 0
    for (betas, components, plane), model in zip(panels, models, strict=True):
        heads = sorted(model["heads"], key=_distance)
        copying = [head for head in heads if _distance(head) <= CLOSE]
        others = heads[len(copying) :]
        if all(_distance(head) < 1e-6 for head in copying):
            copying = copying[:1]  # of a construction, where all are alike
        most = max(most, len(copying))
        for head in others:
            _components(components, head, OTHERS)
        if others:
            _plane(plane, [head["eigenvalues"] for head in others], OTHERS | {"marker": "."})
            counts, _ = np.histogram(_pooled(others), BINS)
            betas.stairs(np.maximum(counts, FEWEST), BINS, baseline=FEWEST, fill=True, color="0.8")
        for index, head in enumerate(copying):
            _histogram(betas, head["beta"], index, "")
            _components(components, head, points(index))
            _plane(plane, [head["eigenvalues"]], points(index) | {"markersize": 2.2})
        said = [
            f"{head['off_copy']:.2g} off ({head['copy_of']})"
            if head["copy_of"] != "itself" and not look.is_narrow(3 * len(models))
            else f"{head['off_copy']:.2g} off"
            for head in copying
            if _distance(head) >= 1e-6
        ]
        components.text(
            0.97, 0.05, "\n".join(said), transform=components.transAxes, ha="right", fontsize=6
        )
        betas.set_ylabel(names.model(model["name"]), fontsize="small")
        wanted = np.unique(np.round(np.ravel(spectra(model["group"])[:1]), 6))
        plane.plot(wanted.real, wanted.imag, **CONSTRUCTED)
    _counts_axis(panels[0, 0], [_pooled(model["heads"]) for model in models])
    ranks = ("closest to a copy", "second closest", "third closest")
    named = {text: mark(**points(i)) for i, text in enumerate(ranks[:most])}
    if any(_distance(head) > CLOSE for model in models for head in model["heads"]):
        named["other heads"] = mark(**OTHERS)
    named["constructed"] = mark(**CONSTRUCTED)
    add_legend(figure, named)
    return save(figure, path, look)


def _pooled(heads: Sequence[Mapping[str, Any]]) -> np.ndarray:
    return np.concatenate([_numbers(head["beta"]) for head in heads])


def _numbers(values: Any) -> np.ndarray:
    """All that is in nested lists; ValueError or TypeError where one is no number."""
    return np.ravel(np.asarray(values, float))


def _distance(head: Mapping[str, Any]) -> float:
    """How far from a copy; without one, farther than any."""
    return float("inf") if head["off_copy"] is None else head["off_copy"]


def _components(axes: Any, head: Mapping[str, Any], style: Mapping[str, Any]) -> None:
    curve = head["explained_about_zero"][:MOST_COMPONENTS]
    axes.plot(range(1, len(curve) + 1), curve, **style)


def _plane(axes: Any, eigenvalues: Sequence[Any], style: Mapping[str, Any]) -> None:
    real, imaginary = _apart(np.concatenate([_numbers(v) for v in eigenvalues]))
    axes.plot(real, imaginary, **{**style, "linestyle": "none"})
