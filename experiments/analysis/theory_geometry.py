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

Source: this project, after https://arxiv.org/abs/2502.10297, theorem 1 and the keys of S4 there.
Expect: of the presets S3, S4 and A5 some heads within .05 of a copy, the others above 1;
    experiments/results/theory/geometry.md has them.
Takes: a minute on a CPU, after the runs.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import any_path
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.theory import construct
from experiments.lib import flags
from experiments.lib.bench.report import begun, markdown, shown, write_report
from experiments.lib.figures.geometry import draw_models
from experiments.lib.figures.style import SECTION, Look
from experiments.lib.group_runs import load_group_run
from experiments.lib.theory.geometry import CLOSE, ONE_LAYER, describe


@dataclasses.dataclass(frozen=True)
class ComparisonConfig:
    """What is compared; raises ConfigError where nothing is left."""

    constructions: tuple[str, ...] = setting(
        ("permutations_S3", "plane_Z5"), f"some of {', '.join(ONE_LAYER)}", one_of=ONE_LAYER
    )
    runs: tuple[str, ...] = setting((), "directories of experiments.state_tracking")

    def __post_init__(self) -> None:
        """Checks the names."""
        check_fields(self)
        if not self.constructions + self.runs:
            raise ConfigError("constructions and runs are both empty; give some of either")


def table(models: Sequence[dict[str, Any]]) -> str:
    """A line for every head, as Markdown."""
    names = ("smallest_beta", "dimensions", "off_circle", "off_angle", "as_constructed")
    names += ("off_copy",)
    lines = []
    for model in models:
        rows = []
        for head in model["heads"]:
            row = [shown(head[n], ".3g") for n in names]
            is_copy = head["off_copy"] is not None and head["off_copy"] <= CLOSE
            rows.append([*row, head["copy_of"] if is_copy else None])
        alike = all(row == rows[0] for row in rows)  # as a construction's are
        for index, row in enumerate(rows[:1] if alike else rows):
            heads = f"all {len(rows)}" if alike and len(rows) > 1 else str(index)
            lines.append([model["name"], model["group"], heads, *row])
    return markdown(["model", "group", "head", *names, "copy_of"], lines)


def command(argv: Sequence[str]) -> None:
    """Reads the models, writes geometry.json and geometry.md, draws geometry."""
    parsed = flags.parse(argv, {"geometry": ComparisonConfig, **SECTION}, {"default": {}})
    options = ComparisonConfig(**parsed.sections["geometry"])
    look = Look(**parsed.sections["figures"])
    models = []
    for name in options.constructions:
        made = construct(name)
        models.append(describe(name, made.group, made.model(), made.letters.tolist(), made.bos))
    for run in options.runs:
        directory = any_path(run, "runs")
        model, config, _ = load_group_run("runs", directory)
        task, name = config.task, f"trained: {directory.name}"
        models.append(describe(name, task.group, model, task.letters().tolist(), task.bos_id))
    short = json.loads(json.dumps(models), parse_float=lambda number: float(f"{float(number):.6g}"))
    record = begun("analysis.theory_geometry", argv, models=short)
    text = write_report(parsed.workdir, "geometry", record, page, indent=None)
    draw_models(models, parsed.workdir / "geometry", look)
    print(text)


def page(record: Mapping[str, Any]) -> list[str]:
    """What geometry.md holds."""
    return [table(record["models"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
