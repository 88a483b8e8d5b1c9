"""What does the op cost as sequences grow, and as tokens take more Householder factors?

    python -m experiments.op.scaling --workdir=runs/scaling

times the forward pass for T from 1k to 1M and n_h from 1 to 8 at small heads, reads the temporary
memory that the compiler reports, fits straight lines in log-log and draws them. A slope of 1 in T
is linear cost. Outputs and inputs themselves are not counted as temporary memory.

Source: this project; https://arxiv.org/abs/2502.10297 says that cost is linear in both.
Expect: slopes of the time of 1.00 in T and 1.04 in n_h; experiments/results/op/scaling/ has all.
Takes: 3 minutes on two CPU cores.
"""

import dataclasses
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from deltaproduct_jax.errors import require_at_least
from deltaproduct_jax.ops.selection import AVAILABLE
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.bench.report import TIMES, begun, markdown, shown, times, write_report
from experiments.lib.bench.timing import (
    FORWARD,
    Shape,
    compile_program,
    machine,
    program,
    time_in_turn,
)
from experiments.lib.figures.benchmarks import MEASURES, draw_scaling
from experiments.lib.figures.style import SECTION, Look


@dataclasses.dataclass(frozen=True)
class ScalingConfig:
    """What is timed."""

    lengths: tuple[int, ...] = setting(
        tuple(2**n for n in range(10, 21)),
        "tokens T, each with the first of num_householder",
        least=1,
    )
    num_householder: tuple[int, ...] = setting(
        (2, 1, 3, 4, 5, 6, 7, 8), "Householder factors, each at base_length", least=1
    )
    base_length: int = setting(8192, "tokens T while the factors vary", least=1)
    num_heads: int = setting(2, "heads H", least=1)
    head_dim: int = setting(16, "key width K and value width V", least=1)
    implementation: str = setting("chunked", f"one of {', '.join(AVAILABLE)}", one_of=AVAILABLE)
    repeats: int = setting(7, "timed calls per point; the median counts", least=1)
    budget_s: float = setting(
        30.0, "seconds after which no further call of a point begins", above=0
    )

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        for name in ("lengths", "num_householder"):
            require_at_least(f"entries of {name}", len(getattr(self, name)), 2)


def measure(config: ScalingConfig, T: int, R: int) -> dict[str, Any]:
    """One point."""
    shape = Shape(1, T, config.num_heads, config.head_dim, config.head_dim, R)
    compiled = compile_program(program(config.implementation, FORWARD), shape.inputs())
    time_in_turn({"": compiled}, config.repeats, config.budget_s)
    return {"T": T, "num_householder": R, **compiled.summary()}


def slope(rows: Sequence[dict[str, Any]], x: str, y: str) -> float | None:
    """Exponent of a power law fitted to ``y`` over ``x`` by least squares in log-log.

    Of the rows that have a ``y`` above 0: no compiler has to report temporary memory, and a program
    may need none. None where fewer than two sizes are left.
    """
    points = [(row[x], row[y]) for row in rows if row[y]]
    if len({size for size, _ in points}) < 2:
        return None
    return float(np.polyfit(*np.log(points).T, 1)[0])


def command(argv: Sequence[str]) -> None:
    """Measures, prints the slopes, writes scaling.json and scaling.md, draws scaling."""
    parsed = flags.parse(argv, {"scaling": ScalingConfig, **SECTION}, {"default": {}})
    config = ScalingConfig(**parsed.sections["scaling"])
    look = Look(**parsed.sections["figures"])
    first, *_ = config.num_householder
    points = {
        "T": [(T, first) for T in config.lengths],
        "num_householder": [(config.base_length, R) for R in sorted(config.num_householder)],
    }
    rows = {x: [] for x in points}
    for x, sizes in points.items():
        for T, R in sizes:
            rows[x].append(measure(config, T, R))
            print(json.dumps(rows[x][-1]), file=sys.stderr)
    slopes = {f"{y} over {x}": slope(rows[x], x, y) for x in rows for y in MEASURES}
    record = begun(
        "op.scaling",
        argv,
        machine=machine(),
        config=dataclasses.asdict(config),
        slopes=slopes,
        by_length=rows["T"],
        by_num_householder=rows["num_householder"],
    )
    print(write_report(parsed.workdir, "scaling", record, page))
    draw_scaling(rows, slopes, parsed.workdir / "scaling", look)


def page(record: Mapping[str, Any]) -> list[str]:
    """What scaling.md holds."""
    slopes = record["slopes"].items()
    lines = [(*name.split(" over "), shown(value, ".2f")) for name, value in slopes]
    return [
        record["machine"],
        markdown(["of", "over", "slope in log-log"], lines),
        *_points(record),
    ]


def _points(record: Mapping[str, Any]) -> list[str]:
    """A table of each of what is varied."""
    tables = []
    for varied in ("by_length", "by_num_householder"):
        lines = [
            (f"{row['T']:,}", row["num_householder"], *times(row), shown(row["temp_mib"], ".3f"))
            for row in record[varied]
        ]
        tables.append(markdown(["T", "n_h", *TIMES, "temp MiB"], lines))
    return tables


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
