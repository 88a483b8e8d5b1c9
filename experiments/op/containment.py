"""What does it cost the op that NaN and infinities stay where they are?

    python -m experiments.op.containment --workdir=runs/containment

times the op as it is beside the same op without what looks for them and keeps them in place, in one
process and in turn, so that a busy moment of the machine meets both alike. Inputs are finite. First
it puts a NaN into one of two segments: what becomes NaN must be what does in the recurrence.

On a GPU: --implementations=triton --dtype=bfloat16 --batch_size=8 --length=4096 --num_heads=16
--head_dim=128. The kernels then look for what is not finite, which they do not otherwise. In those
of TPUs the sums stay in both.

Source: this project; the bars are 1.05 times on a CPU, 1.02 on GPUs and TPUs.
Expect: ratios of at most 1.05 on a CPU that does nothing else.
Takes: 4 minutes on two CPU cores.
"""

import contextlib
import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from typing import Any
from unittest import mock

import jax
import jax.numpy as jnp

from deltaproduct_jax.errors import require_at_least, require_one_of
from deltaproduct_jax.ops import chunked, delta_product, dispatch, layout
from deltaproduct_jax.ops.kernels import containment
from deltaproduct_jax.ops.kernels.triton import looking
from deltaproduct_jax.ops.selection import AVAILABLE
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.bench.report import command_line, markdown, write_report
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

HEADINGS = ("implementation", "direction", "R", "contained, ms", "without, ms", "ratio")


@dataclasses.dataclass(frozen=True)
class ContainmentConfig:
    """What is timed."""

    implementations: tuple[str, ...] = setting(
        ("recurrent", "chunked"), f"any of {', '.join(AVAILABLE)}", filled=True
    )
    directions: tuple[str, ...] = setting(
        (FORWARD, BACKWARD), f"any of {FORWARD}, {BACKWARD}", filled=True
    )
    num_householder: tuple[int, ...] = setting((1, 2, 3), "Householder factors", filled=True)
    batch_size: int = setting(1, "sequences B")
    length: int = setting(2048, "tokens T")
    num_heads: int = setting(4, "heads H")
    head_dim: int = setting(64, "key width K and value width V")
    dtype: str = setting("float32", "of q, k and v: float32 or bfloat16")
    repeats: int = setting(25, "timed rounds; medians count")
    budget_s: float = setting(30.0, "seconds after which no further round of a row begins", above=0)

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        for name in ("batch_size", "length", "num_heads", "head_dim", "repeats"):
            require_at_least(name, getattr(self, name), 1)
        require_at_least("num_householder", min(self.num_householder), 1)
        require_one_of("dtype", self.dtype, ("float32", "bfloat16"))
        for name, known in (("implementations", AVAILABLE), ("directions", (FORWARD, BACKWARD))):
            for entry in getattr(self, name):
                require_one_of(name, entry, known)


@contextlib.contextmanager
def bare() -> Iterator[None]:
    """Inside, the op is traced without containment: a NaN goes wherever products take it."""
    same = lambda x: x
    changes = [
        (dispatch, "contained", lambda run, tokens, state, *_, **__: run(tokens, state)),
        (dispatch, "only_finite", same),
        (dispatch, "forgets", same),
        (layout, "only_finite", same),
        (chunked, "to_chunks", _without_a_look),
        (containment, "_again", lambda run, bad, operands, results: results),
    ]
    with contextlib.ExitStack() as patches:
        patches.enter_context(mock.patch.object(looking._Choice, "looks", False))
        for module, name, function in changes:
            patches.enter_context(mock.patch.object(module, name, function))
        jax.clear_caches()
        yield
    jax.clear_caches()


def _without_a_look(*arguments: Any, by_case: bool) -> Any:
    del by_case
    return layout.to_chunks(*arguments, by_case=False)


def check(shape: Shape, implementation: str) -> None:
    """RuntimeError unless a NaN in one of two segments reaches what it does in the recurrence."""
    T = min(shape.T, CHECKED_TOKENS)
    arrays = dataclasses.replace(shape, T=T).inputs()
    arrays["v"] = arrays["v"].at[0, T // 4, 0, 0, 0].set(jnp.nan)
    ids = jnp.broadcast_to(jnp.arange(T) >= T // 2, (shape.B, T)).astype(jnp.int32)

    def where_nan(implementation: str) -> Any:
        run = lambda a: delta_product(**a, segment_ids=ids, implementation=implementation)
        outputs, pull = jax.vjp(run, arrays)
        return jax.tree.map(jnp.isnan, (outputs, pull(jax.tree.map(jnp.ones_like, outputs))))

    found, wanted = (jax.jit(where_nan, static_argnums=0)(x) for x in (implementation, "recurrent"))
    if not all(jax.tree.leaves(jax.tree.map(jnp.array_equal, found, wanted))):
        raise RuntimeError(f"{implementation} does not keep a NaN where the recurrence does")


def measure(config: ContainmentConfig, implementation: str, direction: str, R: int) -> list[Any]:
    """A row of the table."""
    K = config.head_dim
    shape = Shape(config.batch_size, config.length, config.num_heads, K, K, R, config.dtype)
    check(shape, implementation)
    # Made anew for each: JAX would know the trace of a function that it has seen.
    make, arrays = functools.partial(program, implementation, direction), shape.inputs()
    programs: dict[str, Compiled] = {"contained": compile_program(make(), arrays)}
    with bare():
        programs["without"] = compile_program(make(), arrays)
    time_in_turn(programs, config.repeats, config.budget_s)
    times = [entry.summary()["median_ms"] for entry in programs.values()]
    return [implementation, direction, R, *times, times[0] / times[1]]


def command(argv: Sequence[str]) -> None:
    """Measures, and writes containment.json and containment.md."""
    parsed = flags.parse(argv, {"containment": ContainmentConfig}, {"default": {}})
    config = ContainmentConfig(**parsed.sections["containment"])
    looking.choose_containment(True)
    rows = []
    for implementation in config.implementations:
        for direction in config.directions:
            for R in config.num_householder:
                rows.append(measure(config, implementation, direction, R))
                print(json.dumps(rows[-1]), file=sys.stderr)
    record = {
        "command": command_line("op.containment", argv),
        "machine": machine(),
        "config": dataclasses.asdict(config),
        "rows": [dict(zip(HEADINGS, row, strict=True)) for row in rows],
    }
    lines = [[*row[:3], *(f"{x:.3f}" for x in row[3:])] for row in rows]
    found = markdown(list(HEADINGS), lines)
    print(write_report(parsed.workdir, "containment", record, machine(), found))


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
