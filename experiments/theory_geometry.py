"""Do trained models find the constructions? The geometry of both, side by side.

    python -m experiments.theory_geometry --workdir=runs/theory_geometry \
        --constructions=permutations_S3,plane_Z5 --runs=runs/s3,runs/z5

looks at the first layer's Householder factors of constructions with one layer and of the best
checkpoints of state-tracking runs, all of whose letters are read after BOS. A row of
``geometry.png`` is a model: betas, principal components of the keys of each head, and eigenvalues
of the transitions. ``geometry.json`` holds for every head what the picture shows, and

- ``smallest_beta``: of the factors of letters that move something (beta at least 1);
- ``dimensions``: components that hold 95% of the keys' square sum about zero, as key and negative
  are one reflection;
- ``off_circle``: largest distance of an eigenvalue from the unit circle;
- ``off_angle``: largest angle, in turns, from an eigenvalue to the nearest root of unity that the
  group's orders allow; with E the exponent of the group, guessing gives 1 / (2 E) at most.
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

from deltaproduct_jax.analysis.householder_geometry import factors_of_tokens, geometry
from deltaproduct_jax.errors import ConfigError, require_one_of
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.settings import setting
from deltaproduct_jax.tasks.finite_groups import finite_group
from deltaproduct_jax.theory import CATALOGUE, construct
from deltaproduct_jax.training.loop import restore_best
from deltaproduct_jax.training.records import write_file
from experiments import flags
from experiments.figures import save
from experiments.householder_geometry import read_config

ONE_LAYER = tuple(
    name
    for name in CATALOGUE
    if name.split("_")[0] in ("permutations", "cube", "icosahedron", "plane")
)
COMPONENTS = 0.95


@dataclasses.dataclass(frozen=True)
class GeometryConfig:
    """What is compared; raises ConfigError where nothing is left."""

    constructions: tuple[str, ...] = setting(
        ("permutations_S3", "plane_Z5"), f"some of {', '.join(ONE_LAYER)}"
    )
    runs: tuple[str, ...] = setting((), "directories of experiments.state_tracking")

    def __post_init__(self) -> None:
        """Checks the names."""
        for name in self.constructions:
            require_one_of("constructions", name, ONE_LAYER)
        if not self.constructions + self.runs:
            raise ConfigError("constructions and runs are both empty; give some of either")


def exponent(group: str) -> int:
    """The smallest number of times that every element, multiplied, is the identity."""
    table = finite_group(group).table
    elements = np.arange(len(table))
    power, count = elements, 1
    while power.any():
        power, count = table[power, elements], count + 1
    return count


def describe(
    name: str, group: str, model: SequenceModel, letters: Sequence[int], bos: int
) -> dict[str, Any]:
    """What the module's text lists, of one model."""
    factors = factors_of_tokens(model, letters, before=bos)
    heads = geometry(factors)["heads"]
    E = exponent(group)
    for head in heads:
        beta = np.array(head["beta"])
        values = np.array(head["eigenvalues"]) @ [1, 1j]
        turns = np.angle(values) / (2 * np.pi) * E
        moving = beta[beta >= 1]
        head["smallest_beta"] = float(moving.min()) if len(moving) else None
        about_zero = np.array(head["explained_about_zero"])
        head["dimensions"] = int(np.searchsorted(about_zero, COMPONENTS) + 1)
        head["off_circle"] = float(np.abs(np.abs(values) - 1).max())
        head["off_angle"] = float(np.abs(turns - np.round(turns)).max() / E)
    return {"name": name, "group": group, "exponent": E, "heads": heads}


def draw(models: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws a row a model, all of its heads together."""
    figure = Figure(figsize=(11, 3.1 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
    rows = figure.subplots(len(models), 3, squeeze=False)
    for (betas, components, plane), model in zip(rows, models, strict=True):
        heads = model["heads"]
        labels = [f"head {index}" for index in range(len(heads))]
        every = [np.ravel(head["beta"]) for head in heads]
        betas.hist(every, bins=np.linspace(0, 2, 41), stacked=True, label=labels)
        betas.set(title=model["name"], xlabel="beta", ylabel="factors of all letters")
        betas.legend(fontsize="small")
        angle = np.linspace(0, 2 * np.pi, 200)
        plane.plot(np.cos(angle), np.sin(angle), color="grey", linewidth=0.8)
        roots = np.exp(2j * np.pi * np.arange(model["exponent"]) / model["exponent"])
        plane.plot(roots.real, roots.imag, "k+", markersize=12, label="roots of unity")
        for label, head in zip(labels, heads, strict=True):
            curve = head["explained_about_zero"][:10]
            components.plot(range(1, len(curve) + 1), curve, "o-", markersize=3, label=label)
            values = np.array(head["eigenvalues"])
            plane.scatter(values[..., 0], values[..., 1], s=14, alpha=0.5)
        components.axhline(COMPONENTS, color="grey", linestyle="--", linewidth=0.8)
        components.set(xlabel="principal components of the keys, about zero", ylim=(0, 1.05))
        plane.set(xlabel="Re", ylabel="Im", title=f"eigenvalues, {model['group']}")
        plane.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal")
        for axes in (betas, components, plane):
            axes.grid(alpha=0.3)
    save(figure, path)


def table(models: Sequence[dict[str, Any]]) -> str:
    """A line a head, as Markdown."""
    names = ("smallest_beta", "dimensions", "off_circle", "off_angle")
    lines = [["model", "group", "head", *names], ["---"] * 7]
    for model in models:
        for index, head in enumerate(model["heads"]):
            numbers = ["-" if head[n] is None else f"{head[n]:.3g}" for n in names]
            lines.append([model["name"], model["group"], str(index), *numbers])
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def command(argv: Sequence[str]) -> None:
    """Reads the models, writes geometry.json, geometry.md and geometry.png."""
    parsed = flags.parse(argv, {"geometry": GeometryConfig}, {"default": {}})
    options = GeometryConfig(**parsed.sections["geometry"])
    models = []
    for name in options.constructions:
        made = construct(name)
        models.append(describe(name, made.group, made.model(), made.letters.tolist(), made.bos))
    for run in options.runs:
        config = read_config(Path(run))
        model, task = restore_best(config, Path(run)), config.task
        name = f"trained: {Path(run).name}"
        models.append(describe(name, task.group, model, task.letters().tolist(), task.bos_id))
    write_file(parsed.workdir / "geometry.json", json.dumps(models).encode() + b"\n")
    command_line = " ".join(["python -m experiments.theory_geometry", *argv])
    text = f"{table(models)}\n\nCommand: `{command_line}`\n"
    write_file(parsed.workdir / "geometry.md", text.encode())
    draw(models, parsed.workdir / "geometry.png")
    print(text)


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
