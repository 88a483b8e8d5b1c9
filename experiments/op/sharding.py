"""What does spreading the op over devices give, along each axis, in time, memory and error?

    python -m experiments.op.sharding --workdir=runs/sharding --devices=2 --dtype=bfloat16 \\
        --batch_size=8 --length=4096 --num_heads=16 --head_dim=128           # two GPUs
    XLA_FLAGS=--xla_force_host_platform_device_count=2 \\
        python -m experiments.op.sharding --workdir=runs/sharding --devices=2   # a CPU

times `delta_product` of whole arrays on one device beside `sharded_delta_product` of the same
arrays spread over all devices: along the batch and the heads, which share nothing, and along the
sequence, where the devices send each other what their pieces do to a state. Inputs lie where they
are needed, and gradients stay where they are made. Each is first held against the recurrence in
float64 on 256 tokens. Devices of one CPU share its cores: there the times say nothing.

Source: this project.
Expect: errors like those on one device; of two H100s experiments/results/gpu/LOG_speed.md.
Takes: half a minute on two CPU cores, minutes on two GPUs.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from deltaproduct_jax.errors import ConfigError, require_one_of
from deltaproduct_jax.ops import sharded_delta_product
from deltaproduct_jax.ops.selection import AVAILABLE
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.bench.report import TIMES, collect, markdown, shown, times, write_report
from experiments.lib.bench.timing import (
    BACKWARD,
    CHECKED_TOKENS,
    ERROR_LIMIT,
    FORWARD,
    Shape,
    checked_error,
    compile_program,
    exact_results,
    program,
    started,
    time_in_turn,
)

# The axes of a mesh, and where they stand in the inputs.
AXES = ("batch", "head", "sequence")
DIMENSIONS = {
    "q": ("batch", "sequence", "head", None),
    "k": ("batch", "sequence", None, "head", None),
    "v": ("batch", "sequence", None, "head", None),
    "beta": ("batch", "sequence", None, "head"),
    "g": ("batch", "sequence", "head"),
}
ALONE = "one device"


@dataclasses.dataclass(frozen=True)
class ShardingConfig:
    """What is timed."""

    devices: int = setting(2, "over how many devices; as many are needed", least=1)
    batch_size: int = setting(2, "sequences B", least=1)
    length: int = setting(1024, "tokens T", least=1)
    num_heads: int = setting(4, "heads H", least=1)
    head_dim: int = setting(32, "key width K and value width V", least=1)
    num_householder: tuple[int, ...] = setting(
        (2,), "Householder factors per token, in turn", filled=True, least=1
    )
    gated: bool = setting(True, "with a decay g")
    dtype: str = setting("float32", "float32 or bfloat16", one_of=ERROR_LIMIT)
    implementation: str | None = setting(
        None, "of the op; none: by platform and shape", one_of=AVAILABLE
    )
    axes: tuple[str, ...] = setting(
        AXES, "what is spread: batch, head or sequence, in turn", filled=True, one_of=AXES
    )
    directions: str = setting(f"{FORWARD},{BACKWARD}", "comma list of what is timed")
    repeats: int = setting(9, "timed rounds", least=1)
    budget_s: float = setting(
        60.0, "seconds after which no further round of a case begins", above=0
    )

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        for direction in self.directions.split(","):
            require_one_of("directions", direction, [FORWARD, BACKWARD])
        sizes = {"batch": "batch_size", "head": "num_heads", "sequence": "length"}
        for axis in self.axes:
            if getattr(self, sizes[axis]) % self.devices:
                raise ConfigError(
                    f"{sizes[axis]}={getattr(self, sizes[axis])} must be a multiple of "
                    f"devices={self.devices} to be spread over them (axes={self.axes})"
                )

    def shape(self, n_h: int) -> Shape:
        """The shape that is timed."""
        sizes = (self.batch_size, self.length, self.num_heads, self.head_dim, self.head_dim)
        return Shape(*sizes, n_h, self.dtype, self.gated)


def spread(arrays: dict[str, jax.Array], axis: str, devices: int) -> dict[str, jax.Array]:
    """The inputs of the op, each cut along ``axis``."""
    mesh = _mesh(axis, devices)
    specs = {
        name: PartitionSpec(*(part if part == axis else None for part in DIMENSIONS[name]))
        for name in arrays
    }
    return {name: jax.device_put(x, NamedSharding(mesh, specs[name])) for name, x in arrays.items()}


def _mesh(axis: str, devices: int) -> Mesh:
    return Mesh(np.array(jax.devices()[:devices]), (axis,))


def op_over(axis: str, devices: int, implementation: str | None) -> Callable:
    """`sharded_delta_product` along one axis."""
    return functools.partial(
        sharded_delta_product,
        mesh=_mesh(axis, devices),
        implementation=implementation,
        **{f"{axis}_axis": axis},
    )


def measure(config: ShardingConfig, n_h: int, direction: str) -> list[dict[str, Any]]:
    """One row a way of spreading the op, that on one device first."""
    shape = config.shape(n_h)
    arrays = shape.inputs()
    # As few as can be spread.
    tokens = min(shape.T, max(1, CHECKED_TOKENS // config.devices) * config.devices)
    short = dataclasses.replace(shape, B=min(shape.B, config.devices), T=tokens)
    checked = short.inputs()
    want = exact_results(checked, direction)
    programs, errors = {}, {}
    for axis in (ALONE, *config.axes):
        op, place = config.implementation, lambda x: x
        if axis != ALONE:
            op = op_over(axis, config.devices, config.implementation)
            place = functools.partial(spread, axis=axis, devices=config.devices)
        function = program(op, direction)
        programs[axis] = compile_program(function, place(arrays))
        errors[axis] = checked_error(axis, short, jax.jit(function)(place(checked)), want)
    time_in_turn(programs, config.repeats, config.budget_s)
    rows = []
    for axis, entry in programs.items():
        row = {"num_householder": n_h, "direction": direction, "axis": axis, **entry.summary()}
        rows.append({**row, "worst_error": errors[axis]})
        rows[-1]["times_faster"] = rows[0]["median_ms"] / row["median_ms"]
    return rows


HEAD = ("n_h", "direction", "spread along", *TIMES, "x faster than one device")
HEAD += ("temp MiB a device", "error")


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown."""
    lines = [
        [
            *(row[name] for name in ("num_householder", "direction", "axis")),
            *(*times(row), f"{row['times_faster']:.2f}"),
            *(shown(row["temp_mib"], ".1f"), f"{row['worst_error']:.1e}"),
        ]
        for row in rows
    ]
    return markdown(HEAD, lines)


def command(argv: Sequence[str]) -> None:
    """Measures, prints the table, writes sharding.json and sharding.md."""
    parsed = flags.parse(argv, {"sharding": ShardingConfig}, {"default": {}})
    config = ShardingConfig(**parsed.sections["sharding"])
    if len(jax.devices()) < config.devices:
        raise ConfigError(
            f"devices={config.devices} are asked for, and there are {len(jax.devices())}; on a CPU "
            f"XLA_FLAGS=--xla_force_host_platform_device_count={config.devices} makes as many"
        )
    record = started("op.sharding", argv, config=dataclasses.asdict(config))
    cases = itertools.product(config.num_householder, config.directions.split(","))
    measured = (measure(config, *case) for case in cases)
    write = lambda record: write_report(parsed.workdir, "sharding", record, page)
    print(collect(record, measured, table, write))


def page(record: Mapping[str, Any]) -> list[str]:
    """What sharding.md holds."""
    c = record["config"]
    head = (
        f"B={c['batch_size']} T={c['length']} H={c['num_heads']} K=V={c['head_dim']}, "
        f"{c['dtype']}, {'gated' if c['gated'] else 'ungated'}, over {c['devices']} devices; "
        f"{record['machine']}"
    )
    return [head, table(record["rows"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
