"""On a CPU, is what ``implementation=None`` picks ever slower than the other form?

    python -m experiments.op.rule --workdir=runs/rule
    python -m experiments.op.rule --workdir=runs/rule_back --direction=forward+backward \\
        --states=16,64,256 --head_dim=16,32

times "recurrent" and "chunked" in turn over sizes and numbers of states, and holds what
`select_implementation` picks against the faster of them. This is the measurement behind the rule.
Where it picks the scan, the scan is timed as None runs it, whose gradient keeps other states than
"recurrent" by name.

Source: this project.
Expect: few sizes at which the rule picks the slower, by a third at most;
    experiments/results/op/rule/ has the table.
Takes: 6 minutes on a CPU that is otherwise quiet, the second command about as long.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.ops.selection import select_implementation
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.bench.report import begun, markdown, write_report
from experiments.lib.bench.timing import (
    BACKWARD,
    FORWARD,
    Shape,
    compile_program,
    machine,
    program,
    time_in_turn,
)

SCAN, CHUNKED = "recurrent", "chunked"
# Slower than the other by less than this is not told from noise.
NOISE = 1.05


@dataclasses.dataclass(frozen=True)
class RuleConfig:
    """The sizes that are timed: every combination."""

    states: tuple[int, ...] = setting(
        (1, 4, 32, 128), "states, B times Hv, in turn", filled=True, least=1
    )
    head_dim: tuple[int, ...] = setting(
        (16, 32, 64, 128), "key width K and value width V, in turn", filled=True, least=1
    )
    num_householder: tuple[int, ...] = setting(
        (1, 2, 3, 4), "Householder factors per token, in turn", filled=True, least=1
    )
    length: int = setting(
        1024, "tokens T with up to 4 states; with more, fewer in proportion", least=2
    )
    direction: str = setting(FORWARD, f"{FORWARD} or {BACKWARD}", one_of=(FORWARD, BACKWARD))
    gated: bool = setting(True, "with a decay g")
    repeats: int = setting(15, "timed rounds", least=1)
    budget_s: float = setting(3.0, "seconds after which no further round of a case begins", above=0)

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)

    def shapes(self) -> list[Shape]:
        """One shape per combination; states are heads, up to 4 per sequence."""
        shapes = []
        for states, K, R in itertools.product(self.states, self.head_dim, self.num_householder):
            H = next(h for h in (4, 3, 2, 1) if states % h == 0)
            T = max(min(self.length, 128), self.length * 4 // max(states, 4))
            shapes.append(Shape(states // H, T, H, K, K, R, gated=self.gated))
        return shapes


def measure(config: RuleConfig, shape: Shape) -> dict[str, Any]:
    """Times of both at one shape, and what the rule picks."""
    arrays = shape.inputs()
    sizes = {"B": shape.B, "T": shape.T, "R": shape.R, "Hv": shape.H, "K": shape.K, "V": shape.V}
    picked = select_implementation("cpu", **sizes, differentiated=config.direction == BACKWARD)
    forms = {SCAN: None if picked == SCAN else SCAN, CHUNKED: CHUNKED}
    programs = {
        name: compile_program(program(form, config.direction), arrays)
        for name, form in forms.items()
    }
    time_in_turn(programs, config.repeats, config.budget_s)
    times = {name: entry.summary()["median_ms"] for name, entry in programs.items()}
    return {
        **sizes,
        "states": shape.B * shape.H,
        "median_ms": times,
        "picked": picked,
        "scan_over_chunked": times[SCAN] / times[CHUNKED],
        "picked_over_best": times[picked] / min(times.values()),
    }


def table(rows: Sequence[dict[str, Any]]) -> str:
    """Time of the scan over time of "chunked", bold where the rule picks "chunked"."""
    factors = sorted({row["R"] for row in rows})
    head = ["B Hv", "K = V", "T", *(f"n_h = {R}" for R in factors)]
    cases: dict[tuple[int, int, int], dict[int, str]] = {}
    for row in rows:
        cell = f"{row['scan_over_chunked']:.2f}"
        case = cases.setdefault((row["states"], row["K"], row["T"]), {})
        case[row["R"]] = f"**{cell}**" if row["picked"] == CHUNKED else cell
    lines = [[*case, *(cells[R] for R in factors)] for case, cells in cases.items()]
    slower = [
        f"- B Hv = {row['states']}, K = V = {row['K']}, n_h = {row['R']}: {row['picked']} takes "
        f"{row['picked_over_best']:.2f} times as long as the other"
        for row in rows
        if row["picked_over_best"] > NOISE
    ]
    heading = f"Where what the rule picks was slower by more than {NOISE - 1:.0%}:"
    return "\n".join([markdown(head, lines), "", heading, "", *(slower or ["- nowhere"])])


def command(argv: Sequence[str]) -> None:
    """Measures, prints the table, writes rule.json and rule.md."""
    parsed = flags.parse(argv, {"rule": RuleConfig}, {"default": {}})
    config = RuleConfig(**parsed.sections["rule"])
    if jax.default_backend() != "cpu":
        raise ConfigError(
            f"the rule is one for a CPU, and this runs on {jax.default_backend()!r}; "
            "set JAX_PLATFORMS=cpu"
        )
    rows = []
    for shape in config.shapes():
        rows.append(measure(config, shape))
        print(json.dumps(rows[-1]), file=sys.stderr)
    timed = {"direction": config.direction, "gated": config.gated}
    record = begun("op.rule", argv, machine=machine(), **timed, rows=rows)
    print(write_report(parsed.workdir, "rule", record, page))


def page(record: Mapping[str, Any]) -> list[str]:
    """What rule.md holds."""
    title = (
        f"Time of the plain scan over time of the chunked form, {record['direction']}, float32, "
        f"{'gated' if record['gated'] else 'ungated'}; bold where None picks the chunked form; "
        f"{record['machine']}"
    )
    return [title, table(record["rows"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
