"""What the op costs as sequences grow, and as tokens take more Householder factors.

    python -m experiments.op.scaling --workdir=runs/scaling

times the forward pass for T from 1k to 1M and n_h from 1 to 8 at small heads, reads the temporary
memory that the compiler reports, fits straight lines in log-log and draws them. A slope of 1 in T
is linear cost. Outputs and inputs themselves are not counted as temporary memory.
"""

import dataclasses
import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from deltaproduct_jax.errors import require_at_least, require_one_of
from deltaproduct_jax.files import write_file
from deltaproduct_jax.ops.dispatch import AVAILABLE
from deltaproduct_jax.settings import setting
from experiments.lib import flags
from experiments.lib.bench.timing import (
    FORWARD,
    Shape,
    compile_program,
    machine,
    program,
    time_in_turn,
)
from experiments.lib.figures.plots import save


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    """What is timed."""

    lengths: tuple[int, ...] = setting(
        tuple(2**n for n in range(10, 21)), "tokens T, each with the first of num_householder"
    )
    num_householder: tuple[int, ...] = setting(
        (2, 1, 3, 4, 5, 6, 7, 8), "Householder factors, each at base_length"
    )
    base_length: int = setting(8192, "tokens T while the factors vary")
    num_heads: int = setting(2, "heads H")
    head_dim: int = setting(16, "key width K and value width V")
    implementation: str = setting("chunked", f"one of {', '.join(AVAILABLE)}")
    repeats: int = setting(7, "timed calls a point; the median counts")
    budget_s: float = setting(30.0, "seconds after which no further call of a point begins")

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("base_length", "num_heads", "head_dim", "repeats"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("lengths", "num_householder"):
            require_at_least(f"entries of {name}", len(getattr(self, name)), 2)
            require_at_least(name, min(getattr(self, name)), 1)
        require_one_of("implementation", self.implementation, AVAILABLE)


def measure(config: ScalingConfig, T: int, R: int) -> dict[str, Any]:
    """One point."""
    shape = Shape(1, T, config.num_heads, config.head_dim, config.head_dim, R)
    compiled = compile_program(program(config.implementation, FORWARD), shape.inputs())
    time_in_turn({"": compiled}, config.repeats, config.budget_s)
    return {"T": T, "num_householder": R, **compiled.summary()}


def slope(rows: Sequence[dict[str, Any]], x: str, y: str) -> float:
    """Exponent of a power law fitted to ``y`` over ``x`` by least squares in log-log."""
    logs = [[math.log(row[name]) for row in rows] for name in (x, y)]
    return float(np.polyfit(*logs, 1)[0])


def plot(by_length: Sequence[dict], by_factors: Sequence[dict], path: Path) -> None:
    """Time and memory over T, and over the number of factors."""
    figure = Figure(figsize=(9, 6.4), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(2, 2)
    names = {"median_ms": "ms a call (median)", "temp_mib": "temporary memory, MiB"}
    columns = [(by_length, "T", "tokens T"), (by_factors, "num_householder", "factors a token n_h")]
    for column, (rows, x, label) in enumerate(columns):
        for row, (y, unit) in enumerate(names.items()):
            axes = panels[row, column]
            axes.plot([r[x] for r in rows], [r[y] for r in rows], "o-")
            if x == "T":
                axes.set(xscale="log", yscale="log")
            else:
                axes.set(ylim=(0, None))
            title = f"slope in log-log {slope(rows, x, y):.2f}"
            axes.set(xlabel=label, ylabel=unit, title=title)
            axes.grid(alpha=0.3)
    save(figure, path)


def command(argv: Sequence[str]) -> None:
    """Measures, prints, writes scaling.json and scaling.png."""
    parsed = flags.parse(argv, {"scaling": ScalingConfig}, {"default": {}})
    config = ScalingConfig(**parsed.sections["scaling"])
    by_length, by_factors = [], []
    for T in config.lengths:
        by_length.append(measure(config, T, config.num_householder[0]))
        print(json.dumps(by_length[-1]), file=sys.stderr)
    for R in sorted(config.num_householder):
        by_factors.append(measure(config, config.base_length, R))
        print(json.dumps(by_factors[-1]), file=sys.stderr)
    slopes = {
        f"{y} over {x}": slope(rows, x, y)
        for rows, x in ((by_length, "T"), (by_factors, "num_householder"))
        for y in ("median_ms", "temp_mib")
    }
    record = {
        "command": " ".join(["python -m experiments.op.scaling", *argv]),
        "machine": machine(),
        "config": dataclasses.asdict(config),
        "slopes": slopes,
        "by_length": by_length,
        "by_num_householder": by_factors,
    }
    write_file(parsed.workdir / "scaling.json", json.dumps(record, indent=1).encode() + b"\n")
    plot(by_length, by_factors, parsed.workdir / "scaling.png")
    for name, value in slopes.items():
        print(f"slope of {name} in log-log: {value:.2f}")


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
