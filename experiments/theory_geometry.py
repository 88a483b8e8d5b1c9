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
  group's orders allow; with E the exponent of the group, guessing gives 1 / (2 E) at most;
- ``as_constructed``: share of the letters, the identity left out, with the eigenvalues that the
  construction gives them, none farther than ``CLOSE`` from its own. A relative of its
  representation serves as well: all turns taken k times, times the sign for permutations, or with
  the determinant as one more direction, in which reflections turn by a half.
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
from deltaproduct_jax.theory.one_layer import representation
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
CLOSE = 0.1
# Group -> kind of the one-layer construction with the fewest factors.
KINDS = {"cube": "solid", "icosahedron": "solid"}
CONSTRUCTED = {name.split("_")[1]: name.split("_")[0] for name in ONE_LAYER}


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


def spectra(group: str) -> list[np.ndarray]:
    """Eigenvalues ``[G, d]`` of every element in the construction's and related representations.

    Empty where the catalogue has no construction of the group in one layer.
    """
    if group not in CONSTRUCTED:
        return []
    kind = CONSTRUCTED[group]
    matrices = representation(group, KINDS.get(kind, kind))[0]
    E = exponent(group)
    values = np.linalg.eigvals(matrices)
    found = [values**k for k in range(1, E) if np.gcd(k, E) == 1]
    signs = np.linalg.det(matrices)[:, None]
    found.append(np.concatenate([values, signs], axis=-1))
    if kind == "permutations":
        # The sign turns all but the one direction that every permutation fixes.
        order = np.argsort(np.abs(values - 1), axis=-1)
        found.append(signs * np.take_along_axis(values, order, 1)[:, 1:])
    return found


def share_as_constructed(values: np.ndarray, group: str, letters: Sequence[int]) -> float | None:
    """``as_constructed`` of a head with eigenvalues ``[L, K]``; None without a construction."""
    shares = []
    for wanted in spectra(group):
        width = max(values.shape[1], wanted.shape[1])
        ours, theirs = (_by_turn(each, width) for each in (values, wanted[list(letters)]))
        off = np.abs(ours - theirs).max(-1)
        shares.append(float((off <= CLOSE)[np.array(letters) != 0].mean()))
    return max(shares, default=None)


def _by_turn(values: np.ndarray, width: int) -> np.ndarray:
    """Eigenvalues and ones up to ``width``, conjugates folded on each other, by their angle."""
    values = np.pad(values, ((0, 0), (0, width - values.shape[1])), constant_values=1)
    values = values.real + 1j * np.abs(values.imag)
    return np.take_along_axis(values, np.argsort(np.angle(values), axis=-1), axis=-1)


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
        head["as_constructed"] = share_as_constructed(values, group, letters)
        head["off_angle"] = float(np.abs(turns - np.round(turns)).max() / E)
    return {"name": name, "group": group, "exponent": E, "heads": heads}


def draw(models: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws a row a model, all of its heads together."""
    figure = Figure(figsize=(11, 2.4 * len(models)), layout="constrained")
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
    names = ("smallest_beta", "dimensions", "off_circle", "off_angle", "as_constructed")
    lines = [["model", "group", "head", *names], ["---"] * 8]
    for model in models:
        rows = []
        for head in model["heads"]:
            rows.append(["-" if head[n] is None else f"{head[n]:.3g}" for n in names])
        alike = all(row == rows[0] for row in rows)  # as a construction's are
        for index, row in enumerate(rows[:1] if alike else rows):
            heads = f"all {len(rows)}" if alike and len(rows) > 1 else str(index)
            lines.append([model["name"], model["group"], heads, *row])
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
