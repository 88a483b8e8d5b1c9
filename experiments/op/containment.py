"""What does it cost the op that NaN and infinities stay where they are?

    python -m experiments.op.containment --workdir=runs/containment

times the op as it is beside the same op without what looks for them and keeps them in place, in one
process and in turn, so that a busy moment of the machine meets both alike. Inputs are finite. First
it puts a NaN into one of two segments: what becomes NaN must be what does in the recurrence.

On a GPU: --implementations=triton --dtype=bfloat16 --batch_size=8 --length=4096 --num_heads=16
--head_dim=128. There the time on the GPU itself, the sum of the kernels that the profiler saw,
stands beside that of a call. With --packed rows have two segments.

For TPUs, on a machine without one, cycles of the schedule by their compiler (libtpu):

    python -m experiments.op.containment --workdir=runs/containment_tpu --estimate=v6e \
        --implementations=pallas_tpu --length=1024 --head_dim=128 --dtype=bfloat16

Source: this project; the bars are 1.05 times on a CPU, 1.02 on GPUs and TPUs.
Expect: ratios of at most 1.05 on a CPU that does nothing else.
Takes: 4 minutes on two CPU cores; a minute an estimate on a core of its own.
"""

import dataclasses
import functools
import json
import statistics
import sys
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from deltaproduct_jax.compilers.tpu import GENERATIONS
from deltaproduct_jax.ops import delta_product
from deltaproduct_jax.ops.selection import AVAILABLE
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.bench.device_time import time_on_device
from experiments.lib.bench.report import begun, markdown, write_report
from experiments.lib.bench.timing import (
    BACKWARD,
    CHECKED_TOKENS,
    FORWARD,
    Compiled,
    Shape,
    compile_program,
    machine,
    program,
    time_in_turn,
)
from experiments.lib.bench.tpu_compiler import (
    Compilation,
    compile_apart,
)
from experiments.lib.bench.uncontained import bare
from experiments.lib.compilers import require_compiler, versions

NAMES = ("implementation", "direction", "R")
HEADINGS = (*NAMES, "contained, ms", "without, ms", "ratio")
ON_DEVICE = ("contained, GPU ms", "without, GPU ms", "GPU ratio")
PROFILES = 3  # of each program, in turn; medians count
ESTIMATED = (*NAMES, "contained, cycles", "without, cycles", "ratio")
TIMEOUT_S = 1800.0  # of an estimate


@dataclasses.dataclass(frozen=True)
class ContainmentConfig:
    """What is timed."""

    implementations: tuple[str, ...] = setting(
        ("recurrent", "chunked"), f"any of {', '.join(AVAILABLE)}", filled=True, one_of=AVAILABLE
    )
    directions: tuple[str, ...] = setting(
        (FORWARD, BACKWARD),
        f"any of {FORWARD}, {BACKWARD}",
        filled=True,
        one_of=(FORWARD, BACKWARD),
    )
    num_householder: tuple[int, ...] = setting(
        (1, 2, 3), "Householder factors", filled=True, least=1
    )
    batch_size: int = setting(1, "sequences B", least=1)
    length: int = setting(2048, "tokens T", least=1)
    num_heads: int = setting(4, "heads H", least=1)
    head_dim: int = setting(64, "key width K and value width V", least=1)
    gated: bool = setting(True, "with a decay g")
    dtype: str = setting(
        "float32", "of q, k and v: float32 or bfloat16", one_of=("float32", "bfloat16")
    )
    packed: bool = setting(False, "rows of two segments")
    repeats: int = setting(25, "timed rounds; medians count", least=1)
    budget_s: float = setting(30.0, "seconds after which no further round of a row begins", above=0)
    estimate: str | None = setting(
        None, f"compile for one of {', '.join(GENERATIONS)} instead; none: time", one_of=GENERATIONS
    )

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        if self.estimate is not None:
            require_compiler("tpu")

    def shape(self, R: int) -> Shape:
        """With so many factors."""
        K = self.head_dim
        sizes = (self.batch_size, self.length, self.num_heads, K, K, R)
        return Shape(*sizes, self.dtype, self.gated)


def check(shape: Shape, implementation: str) -> None:
    """RuntimeError unless a NaN in one of two segments reaches what it does in the recurrence."""
    T = min(shape.T, CHECKED_TOKENS)
    arrays = dataclasses.replace(shape, T=T).inputs()
    arrays["v"] = arrays["v"].at[0, T // 4, 0, 0, 0].set(jnp.nan)
    ids = jnp.broadcast_to(jnp.arange(T) >= T // 2, (shape.B, T)).astype(jnp.int32)

    def where_nan(arrays: Any, implementation: str) -> Any:
        run = lambda a: delta_product(**a, segment_ids=ids, implementation=implementation)
        outputs, pull = jax.vjp(run, arrays)
        return jax.tree.map(jnp.isnan, (outputs, pull(jax.tree.map(jnp.ones_like, outputs))))

    run = jax.jit(where_nan, static_argnums=1)
    found, wanted = (run(arrays, name) for name in (implementation, "recurrent"))
    if not all(jax.tree.leaves(jax.tree.map(jnp.array_equal, found, wanted))):
        raise RuntimeError(f"{implementation} does not keep a NaN where the recurrence does")


def measure(config: ContainmentConfig, implementation: str, direction: str, R: int) -> list[Any]:
    """A row of the table."""
    shape = config.shape(R)
    if config.estimate is not None:
        return _estimated(config.estimate, implementation, direction, shape)
    # Made anew for each: JAX would know the trace of a function that it has seen.
    op = _packed(shape, implementation) if config.packed else implementation
    make, arrays = functools.partial(program, op, direction), shape.inputs()
    programs: dict[str, Compiled] = {"contained": compile_program(make(), arrays)}
    with bare():
        programs["without"] = compile_program(make(), arrays)
    time_in_turn(programs, config.repeats, config.budget_s)
    times = [entry.summary()["median_ms"] for entry in programs.values()]
    return [implementation, direction, R, *times, times[0] / times[1], *_on_device(programs)]


def _packed(shape: Shape, implementation: str) -> Callable[..., Any]:
    """The op on rows of two segments."""
    ids = jnp.broadcast_to(jnp.arange(shape.T) >= shape.T // 2, (shape.B, shape.T))
    return functools.partial(
        delta_product, segment_ids=ids.astype(jnp.int32), implementation=implementation
    )


def _on_device(programs: Mapping[str, Compiled]) -> list[float]:
    """What `ON_DEVICE` names; nothing without a GPU."""
    found = [time_on_device(programs) for _ in range(PROFILES)]
    print(json.dumps(found[-1]), file=sys.stderr)  # by kernel
    times = [statistics.median(sum(x[name].values()) for x in found) for name in programs]
    return [*times, times[0] / times[1]] if all(times) else []


def _estimated(generation: str, implementation: str, direction: str, shape: Shape) -> list[Any]:
    """A row by the compiler's profiler; RuntimeError where that refuses or aborts."""
    one = Compilation(generation, implementation, direction, shape)
    both = [one, dataclasses.replace(one, contained=False)]
    cycles = []
    for found in compile_apart(both, profile=True, timeout_s=TIMEOUT_S):
        if "error" in found:
            raise RuntimeError(f"{implementation} for {generation}, {direction}: {found['error']}")
        cycles.append(found["schedule_cycles"])
    return [implementation, direction, shape.R, *cycles, cycles[0] / cycles[1]]


def command(argv: Sequence[str]) -> None:
    """Measures, and writes containment.json and containment.md."""
    parsed = flags.parse(argv, {"containment": ContainmentConfig}, {"default": {}})
    config = ContainmentConfig(**parsed.sections["containment"])
    rows = []
    for implementation in config.implementations:
        for R in config.num_householder if config.estimate is None else ():
            check(config.shape(R), implementation)
        for direction in config.directions:
            for R in config.num_householder:
                rows.append(measure(config, implementation, direction, R))
                print(json.dumps(rows[-1]), file=sys.stderr)
    headings, title = HEADINGS, machine()
    if config.estimate is not None:
        headings, title = ESTIMATED, f"{config.estimate}, nothing was run; {versions('tpu')}"
    elif len(rows[0]) > len(HEADINGS):
        headings += ON_DEVICE
    record = begun(
        "op.containment",
        argv,
        machine=title,
        config=dataclasses.asdict(config),
        rows=[dict(zip(headings, row, strict=True)) for row in rows],
    )
    print(write_report(parsed.workdir, "containment", record, page))


def page(record: Mapping[str, Any]) -> list[str]:
    """What containment.md holds."""
    lines = [
        [f"{value:.3f}" if isinstance(value, float) else value for value in row.values()]
        for row in record["rows"]
    ]
    return [record["machine"], markdown(list(record["rows"][0]), lines)]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
