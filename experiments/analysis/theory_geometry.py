"""Do trained models find the constructions? The geometry of both, side by side.

    python -m experiments.analysis.theory_geometry --workdir=runs/theory_geometry \
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
  the determinant as one more direction, in which reflections turn by a half;
- ``off_copy``: whether the head holds a copy of the construction's representation R, in any
  directions: the smallest root mean square over letters of ``|A T - T R^T|`` for a matrix ``T [K,
  d]`` of norm 1, with A the letter's transition. 0 is a copy. Permutations times their signs, outer
  automorphisms of An, for Zm turns taken k times, and for S5 how it permutes its six subgroups of
  order 5 are copies as well; ``copy_of`` names the closest.
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
    factors_of_tokens,
    geometry,
    transitions,
)
from deltaproduct_jax.errors import ConfigError, require_one_of
from deltaproduct_jax.files import write_file
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.settings import setting
from deltaproduct_jax.tasks.finite_groups import finite_group
from deltaproduct_jax.theory import CATALOGUE, construct
from deltaproduct_jax.theory.one_layer import representation
from deltaproduct_jax.theory.representations import permutation_matrices, subgroup_matrices
from deltaproduct_jax.training.loop import restore_best
from experiments.analysis.householder_geometry import read_config
from experiments.lib import flags
from experiments.lib.figures.plots import save

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


def copies(group: str) -> dict[str, np.ndarray]:
    """The construction's representation and relatives, each ``[G, d, d]``; {} without one."""
    if group not in CONSTRUCTED:
        return {}
    kind = CONSTRUCTED[group]
    matrices = representation(group, KINDS.get(kind, kind))[0]
    if kind == "plane":
        # Further turns are mirror images of these; powers of Dm's mirrors are no copies.
        half = exponent(group) // 2 if group[0] == "Z" else 1
        powers = [k for k in range(1, half + 1) if np.gcd(k, exponent(group)) == 1]
        return {f"turns x {k}": np.linalg.matrix_power(matrices, k) for k in powers}
    permutations = permutation_matrices(group)
    found = {"itself": matrices if kind != "permutations" else without_ones(matrices)}
    if group == "S5":
        found["on six points"] = without_ones(subgroup_matrices(group, 5))
    if group[0] == "S":
        signs = np.linalg.det(permutations)[:, None, None]
        return found | {f"{name}, signed": signs * made for name, made in found.items()}
    swap = np.eye(permutations.shape[-1])
    swap[[0, 1]] = swap[[1, 0]]
    moved = (swap @ permutations @ swap)[:, None] == permutations
    return found | {"letters renamed": matrices[moved.all((2, 3)).argmax(1)]}


def without_ones(permutations: np.ndarray) -> np.ndarray:
    """Permutations ``[G, n, n]`` on what is orthogonal to the vector of ones, which they fix."""
    rest = np.linalg.svd(np.ones((1, permutations.shape[-1])))[2][1:]
    return rest @ permutations @ rest.T


def closest_copy(
    acts: np.ndarray, group: str, letters: Sequence[int]
) -> tuple[float | None, str | None]:
    """``off_copy`` of a head with transitions ``[L, K, K]`` and of what; None, None without one."""
    K, found = acts.shape[-1], []
    for name, matrices in copies(group).items():
        d = matrices.shape[-1]
        # What a letter does to T, its columns one after the other; see the module's text for R^T.
        square = np.zeros((K * d, K * d))
        for act, letter in zip(acts, letters, strict=True):
            row = np.kron(np.eye(d), act) - np.kron(matrices[letter], np.eye(K))
            square += row.T @ row
        smallest = max(np.linalg.eigvalsh(square)[0], 0.0)
        found.append((float(np.sqrt(smallest / len(letters))), name))
    return min(found, default=(None, None))


def describe(
    name: str, group: str, model: SequenceModel, letters: Sequence[int], bos: int
) -> dict[str, Any]:
    """What the module's text lists, of one model."""
    factors = factors_of_tokens(model, letters, before=bos)
    heads, acts = geometry(factors)["heads"], transitions(factors)
    E = exponent(group)
    for index, head in enumerate(heads):
        beta = np.array(head["beta"])
        values = np.array(head["eigenvalues"]) @ [1, 1j]
        turns = np.angle(values) / (2 * np.pi) * E
        moving = beta[beta >= 1]
        head["smallest_beta"] = float(moving.min()) if len(moving) else None
        about_zero = np.array(head["explained_about_zero"])
        head["dimensions"] = int(np.searchsorted(about_zero, COMPONENTS) + 1)
        head["off_circle"] = float(np.abs(np.abs(values) - 1).max())
        head["as_constructed"] = share_as_constructed(values, group, letters)
        head["off_copy"], head["copy_of"] = closest_copy(acts[:, index], group, letters)
        head["off_angle"] = float(np.abs(turns - np.round(turns)).max() / E)
    return {"name": name, "group": group, "exponent": E, "heads": heads}


def draw(models: Sequence[dict[str, Any]], path: Path) -> None:
    """Draws a row a model; heads that hold a copy in colours, in front of the others in grey."""
    figure = Figure(figsize=(11, 2.6 * len(models)), layout="constrained")
    FigureCanvasAgg(figure)
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
        angle = np.linspace(0, 2 * np.pi, 200)
        plane.plot(np.cos(angle), np.sin(angle), color="grey", linewidth=0.8)
        for style, head in zip(styles, heads, strict=True):
            curve = head["explained_about_zero"][:10]
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
        plane.set(xlabel="Re", ylabel="Im", title=f"eigenvalues (+: {model['group']} constructed)")
        plane.set(xlim=(-1.15, 1.15), ylim=(-1.15, 1.15), aspect="equal")
        for axes in (betas, components, plane):
            axes.grid(alpha=0.3)
    save(figure, path)


def table(models: Sequence[dict[str, Any]]) -> str:
    """A line a head, as Markdown."""
    names = ("smallest_beta", "dimensions", "off_circle", "off_angle", "as_constructed")
    names += ("off_copy",)
    lines = [["model", "group", "head", *names, "copy_of"], ["---"] * (4 + len(names))]
    for model in models:
        rows = []
        for head in model["heads"]:
            row = ["-" if head[n] is None else f"{head[n]:.3g}" for n in names]
            is_copy = head["off_copy"] is not None and head["off_copy"] <= CLOSE
            rows.append([*row, head["copy_of"] if is_copy else "-"])
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
    short = json.loads(json.dumps(models), parse_float=lambda number: float(f"{float(number):.6g}"))
    write_file(parsed.workdir / "geometry.json", json.dumps(short).encode() + b"\n")
    command_line = " ".join(["python -m experiments.analysis.theory_geometry", *argv])
    text = f"{table(models)}\n\nCommand: `{command_line}`\n"
    write_file(parsed.workdir / "geometry.md", text.encode())
    draw(models, parsed.workdir / "geometry.png")
    print(text)


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
