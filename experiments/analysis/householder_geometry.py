"""What do the Householder factors of a trained model look like: betas, keys, eigenvalues?

    python -m experiments.analysis.householder_geometry --run=runs/s4 --workdir=runs/s4_geometry

reads the best checkpoint of a state-tracking run, gives it every element of the group as a token
after BOS, and draws for each head the histogram of betas, the variance that the first principal
components of the keys explain, and the eigenvalues of the transitions in the complex plane.
``geometry.json`` holds the numbers. A head is marked as reflecting if each of its betas is within
``--tolerance`` of 2.

Source: https://arxiv.org/abs/2502.10297, the figure on S4 (betas near 2, keys in three dimensions).
Expect: of a run of S3 by the default preset all betas at least 1.98, eigenvalues near 1, -1 and
    the cube roots of 1; of S4 experiments/results/state_tracking/s4/geometry/.
Takes: seconds on a CPU, after the run.
"""

import dataclasses
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np

from deltaproduct_jax.analysis.householder_geometry import (
    TOLERANCE,
    factors_of_tokens,
    geometry,
)
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import any_path
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.bench.report import write_json
from experiments.lib.figures.geometry import CURVES, draw_heads
from experiments.lib.figures.style import SECTION, Look
from experiments.lib.group_runs import load_group_run


@dataclasses.dataclass(frozen=True)
class GeometryConfig:
    """What is looked at; raises ConfigError where the fields make no sense."""

    run: str = setting("", "run directory of experiments.state_tracking")
    layer: int = setting(0, "which block, from 0")
    tolerance: float = setting(TOLERANCE, "farthest that a reflecting head's betas are from 2")

    def __post_init__(self):
        check_fields(self)
        if not self.run:
            raise ConfigError("--run is missing; give the directory of a state-tracking run")
        if not 0 <= self.tolerance <= 2:
            raise ConfigError(f"tolerance={self.tolerance} must be in [0, 2]")


def command(argv: Sequence[str]) -> None:
    """Reads the checkpoint, writes geometry.json, draws geometry."""
    parsed = flags.parse(argv, {"geometry": GeometryConfig, **SECTION}, {"default": {}})
    look = Look(**parsed.sections["figures"])
    options = GeometryConfig(**parsed.sections["geometry"])
    model, config, _ = load_group_run("run", any_path(options.run, "run"))
    factors = factors_of_tokens(
        model, config.task.letters().tolist(), before=config.task.bos_id, layer=options.layer
    )
    found = geometry(factors, options.tolerance)
    record = {"config": config.to_dict(), **dataclasses.asdict(options), **found}
    write_json(parsed.workdir / "geometry.json", record, indent=None)
    title = f"{config.task.group}, layer {options.layer}"
    draw_heads(found, title, parsed.workdir / "geometry", look)
    print(table(found))


def table(found: dict[str, Any]) -> str:
    """A line for every head."""
    lines = ["head  reflecting  smallest beta  components for 95% (about zero)"]
    for index, head in enumerate(found["heads"]):
        needed = [int(np.searchsorted(head[name], 0.95) + 1) for name in CURVES]
        reflects = "yes" if index in found["reflecting_heads"] else "no"
        smallest = min(map(min, head["beta"]))
        lines.append(f"{index:>4}  {reflects:>10}  {smallest:>13.3f}  {needed[0]} ({needed[1]})")
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
