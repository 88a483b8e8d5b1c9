"""What the Householder factors of a trained model look like: betas, keys, eigenvalues.

    python -m experiments.analysis.householder_geometry --run=runs/s4 --workdir=runs/s4_geometry

reads the best checkpoint of a state-tracking run, gives it every element of the group as a token
after BOS, and draws for each head the histogram of betas, the variance that the first principal
components of the keys explain, and the eigenvalues of the transitions in the complex plane.
``geometry.json`` holds the numbers. A head is marked as reflecting if each of its betas is within
``--tolerance`` of 2.
"""

import dataclasses
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deltaproduct_jax.analysis.householder_geometry import (
    TOLERANCE,
    factors_of_tokens,
    geometry,
)
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import write_file
from deltaproduct_jax.settings import setting
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.loop import restore_best
from deltaproduct_jax.training.records import CONFIG
from experiments import state_tracking
from experiments.lib import flags
from experiments.lib.figures.plots import save
from experiments.lib.sweeps.grid import NO_FLAGS

CURVES = {"explained_variance": "about the mean", "explained_about_zero": "about zero"}
MOST_COMPONENTS = 10


@dataclasses.dataclass(frozen=True)
class GeometryConfig:
    """What is looked at; raises ConfigError where the fields make no sense."""

    run: str = setting("", "run directory of experiments.state_tracking")
    layer: int = setting(0, "which block, from 0")
    tolerance: float = setting(TOLERANCE, "farthest that a reflecting head's betas are from 2")

    def __post_init__(self):
        if not self.run:
            raise ConfigError("--run is missing; give the directory of a state-tracking run")
        if not 0 <= self.tolerance <= 2:
            raise ConfigError(f"tolerance={self.tolerance} must be in [0, 2]")


def read_config(run: Path) -> RunConfig:
    """The configuration of a state-tracking run; ConfigError if it is another's or none."""
    argv = [f"--config={run / CONFIG}", "--workdir=."]
    parsed = flags.parse(argv, state_tracking.SECTIONS, state_tracking.PRESETS, exclude=NO_FLAGS)
    return state_tracking.configure(parsed.sections)


def draw(found: dict[str, Any], title: str, path: Path) -> None:
    """Draws three panels a head: betas, variance explained, eigenvalues."""
    heads = found["heads"]
    figure = Figure(figsize=(11, 3.2 * len(heads)), layout="constrained")
    FigureCanvasAgg(figure)
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
        angle = np.linspace(0, 2 * np.pi, 200)
        plane.plot(np.cos(angle), np.sin(angle), color="grey", linewidth=0.8)
        plane.scatter(values[..., 0], values[..., 1], s=14, alpha=0.4)
        plane.set(xlabel="Re", ylabel="Im", title="eigenvalues", aspect="equal")
        plane.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15))
        for axes in panels[index]:
            axes.grid(alpha=0.3)
    save(figure, path)


def command(argv: Sequence[str]) -> None:
    """Reads the checkpoint, writes geometry.json, draws geometry.png."""
    parsed = flags.parse(argv, {"geometry": GeometryConfig}, {"default": {}})
    options = GeometryConfig(**parsed.sections["geometry"])
    config = read_config(Path(options.run))
    model = restore_best(config, Path(options.run))
    factors = factors_of_tokens(
        model, config.task.letters().tolist(), before=config.task.bos_id, layer=options.layer
    )
    found = geometry(factors, options.tolerance)
    record = {"config": config.to_dict(), **dataclasses.asdict(options), **found}
    write_file(parsed.workdir / "geometry.json", json.dumps(record).encode() + b"\n")
    title = f"{config.task.group}, layer {options.layer}"
    draw(found, title, parsed.workdir / "geometry.png")
    print(table(found))


def table(found: dict[str, Any]) -> str:
    """A line a head."""
    lines = ["head  reflecting  smallest beta  components for 95% (about zero)"]
    for index, head in enumerate(found["heads"]):
        needed = [int(np.searchsorted(head[name], 0.95) + 1) for name in CURVES]
        reflects = "yes" if index in found["reflecting_heads"] else "no"
        smallest = min(map(min, head["beta"]))
        lines.append(f"{index:>4}  {reflects:>10}  {smallest:>13.3f}  {needed[0]} ({needed[1]})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
