"""Does what is not finite stay where it is, where a GPU's kernels run?

    python -m experiments.hardware.gpu_containment --workdir=runs/gpu_containment

One number of one operand, or of one cotangent, of one row of packed ones becomes NaN or infinite,
in the middle of a segment, at its start and at its end. What is NaN then must be NaN by the
recurrence, and the rest the same bits as without that number: outputs, final state and all
gradients, with a loss that sees the bad outputs and with one that leaves them out.

Rounding may differ in the gradient of g and where a g is bad, as both make sums over chunks; where
a sequence is in pieces, of which fewer are looked at the more they forget; and under `jax.vmap`:
there the rest is held against bars.

Source: this project.
Expect: no row with a fault.
Takes: three minutes on an H100, mostly compiling.
"""

import dataclasses
import functools
import itertools
import sys
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.errors import require_one_of
from deltaproduct_jax.ops import delta_product
from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.bench.report import begun, markdown, write_report
from experiments.lib.bench.timing import Shape, cotangent, machine, require_gpu

# Rows of three segments; the sizes decide which kernels run, and that twice as many sequences are
# not in pieces.
CASES = {
    "gluon": Shape(3, 200, 2, 128, 128, 2, "bfloat16", True, 4),
    "gluon with one factor and no gates": Shape(2, 130, 2, 128, 128, 1, "bfloat16", False),
    "gluon with three factors and 64 wide": Shape(2, 150, 2, 64, 64, 3, "bfloat16", True),
    "gluon in pieces": Shape(8, 1100, 4, 128, 128, 1, "bfloat16", True),
    "narrow": Shape(256, 40, 2, 32, 32, 4, "bfloat16", True, 4),
    "narrow without gates": Shape(256, 40, 4, 32, 32, 2, "bfloat16", False),
    "narrow in float32": Shape(256, 40, 2, 24, 16, 2, "float32", True, 4),
    "triton": Shape(3, 150, 2, 48, 80, 2, "bfloat16", True, 4),
    "triton without gates": Shape(3, 150, 2, 96, 96, 1, "bfloat16", False),
    "triton in float32": Shape(3, 100, 2, 64, 64, 3, "float32", True, 4),
    "triton in pieces and float32": Shape(8, 1100, 4, 64, 64, 1, "float32", True),
}
# Relative errors of what need not be the same bits.
BARS = {"bfloat16": 1e-2, "float32": 1e-5}
BAD = {"nan": np.nan, "inf": np.inf}
ARGUMENTS = ("q", "k", "v", "beta", "g", "initial_state")
COTANGENTS = ("o", "final_state")
ROW, HEAD = 1, 1  # where something is bad
DG = "[1]['g']"  # sums over a chunk, in which what is in another segment cancels
HEADINGS = ("case", "runs", "NaN", "NaN too many or few", "other bits", "largest error")


@dataclasses.dataclass(frozen=True)
class GpuContainmentConfig:
    """What is looked at."""

    cases: tuple[str, ...] = setting(tuple(CASES), f"some of {', '.join(CASES)}", filled=True)
    mapped: bool = setting(True, "under jax.vmap too")

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        for name in self.cases:
            require_one_of("cases", name, CASES)


@functools.partial(jax.jit, static_argnames=("implementation", "mapped"))
def results_of(arrays: Any, cotangents: Any, *, implementation: str, mapped: bool = False) -> Any:
    """Outputs and gradients of every input."""

    def one(arrays: Any, cotangents: Any) -> Any:
        ids = arrays["segment_ids"]
        inputs = {name: x for name, x in arrays.items() if name != "segment_ids"}

        def run(inputs: Any) -> Any:
            return delta_product(**inputs, segment_ids=ids, implementation=implementation)

        outputs, pull = jax.vjp(run, inputs)
        return outputs, pull(tuple(cotangents[name] for name in COTANGENTS))[0]

    return (jax.vmap(one) if mapped else one)(arrays, cotangents)


@jax.jit
def compared(found: Any, wanted: Any, finite: Any) -> dict[str, jax.Array]:
    """What is reached, how far NaN are not where they should be, and the rest from ``finite``."""
    names, found = zip(*jax.tree_util.tree_flatten_with_path(found)[0], strict=True)
    leaves = zip(names, found, *map(jax.tree.leaves, (wanted, finite)), strict=True)
    totals = dict.fromkeys(("reached", "wrong", "different"), 0) | {"error": jnp.float32(0)}
    for path, x, should, same in leaves:
        is_nan, shall = jnp.isnan(x), jnp.isnan(should)
        rest = ~shall
        totals["reached"] += jnp.sum(shall)
        totals["wrong"] += jnp.sum(is_nan != shall) + jnp.sum(rest & ~jnp.isfinite(x))
        if jax.tree_util.keystr(path) != DG:
            totals["different"] += jnp.sum(rest & (x != same))
        x, same = (jnp.where(rest & jnp.isfinite(a), a, 0).astype(jnp.float32) for a in (x, same))
        error = jnp.linalg.norm(x - same) / jnp.maximum(jnp.linalg.norm(same), 1e-30)
        totals["error"] = jnp.maximum(totals["error"], error)
    return totals


def inputs_of(shape: Shape) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Arrays of rows of three segments, and cotangents."""
    arrays = shape.inputs()
    B, T, Hv = arrays["v"].shape[0], shape.T, shape.Hv or shape.H
    arrays["initial_state"] = jax.random.normal(jax.random.key(2), (B, Hv, shape.K, shape.V)) / 8
    bounds = jnp.asarray([T // 3, 2 * T // 3])
    ids = jnp.sum(jnp.arange(T)[:, None] >= bounds, axis=1)
    arrays["segment_ids"] = jnp.broadcast_to(ids, (B, T))
    o = cotangent((B, T, Hv, shape.V)).astype(shape.dtype)
    return arrays, {"o": o, "final_state": cotangent((B, Hv, shape.K, shape.V))}


def places(shape: Shape) -> dict[str, int]:
    """Tokens at which something is bad."""
    T = shape.T
    return {"middle": T // 2, "start": T // 3, "end": 2 * T // 3 - 1, "last": T - 1, "first": 0}


def spoilt(arrays: Any, cotangents: Any, name: str, token: int, bad: float) -> tuple[Any, Any]:
    """Both with one number that is not finite."""

    def put(x: jax.Array) -> jax.Array:
        if name == "final_state" or name == "initial_state":
            return x.at[ROW, HEAD, 3, 2].set(bad)
        at = {"q": (HEAD, 5), "k": (0, HEAD, 5), "v": (0, HEAD, 5), "beta": (0, HEAD), "g": (HEAD,)}
        return x.at[(ROW, token, *at.get(name, (HEAD, 5)))].set(bad)

    if name in COTANGENTS:
        return arrays, cotangents | {name: put(cotangents[name])}
    return arrays | {name: put(arrays[name])}, cotangents


@jax.jit
def without_bad(outputs: Any, cotangents: Any) -> Any:
    """Cotangents of a loss that leaves out whatever output is NaN."""
    pairs = zip(COTANGENTS, outputs, strict=True)
    return {name: jnp.where(jnp.isnan(x), 0, cotangents[name]) for name, x in pairs}


def runs_of(shape: Shape) -> list[tuple[str, int, float]]:
    """What is bad: of which array, at which token, and how."""
    names = [n for n in (*ARGUMENTS, *COTANGENTS) if n != "g" or shape.gated]
    found = []
    for name, (place, token), (kind, bad) in itertools.product(
        names, places(shape).items(), BAD.items()
    ):
        of_state = name.endswith("state")
        if (of_state and place != "middle") or (kind == "inf" and place not in ("middle", "end")):
            continue
        found.append((name, token, bad))
    return found


def row_of(name: str, *, mapped: bool = False) -> dict[str, Any]:
    """What was found in all runs of a case."""
    shape = CASES[name]
    arrays, cotangents = inputs_of(shape)
    totals = {"reached": 0, "wrong": 0, "different": 0, "error": 0.0}
    faults = []
    runs = runs_of(shape)
    if mapped:
        runs = runs[::3]
    stack = lambda *trees: jax.tree.map(lambda *x: jnp.stack(x), *trees)

    def results(arrays: Any, cotangents: Any, implementation: str) -> Any:
        if mapped and implementation == "triton":  # the second of two is as it was
            both = stack(arrays, whole[0]), stack(cotangents, whole[1])
            return results_of(*both, implementation=implementation, mapped=True)
        found = results_of(arrays, cotangents, implementation=implementation)
        if mapped:
            found = stack(found, finite_by_recurrence)
        return found

    whole = arrays, cotangents
    finite_by_recurrence = results_of(arrays, cotangents, implementation="recurrent")
    finite = results(arrays, cotangents, "triton")
    for what, token, bad in runs:
        exact = not mapped and "in pieces" not in name and what != "g"
        worse = spoilt(arrays, cotangents, what, token, bad)
        wanted = results(*worse, "recurrent")
        modes = {"seen": (worse, wanted, finite)}
        if what not in COTANGENTS and not mapped:
            left_out = without_bad(wanted[0], cotangents)
            modes["left out"] = (
                (worse[0], left_out),
                results(worse[0], left_out, "recurrent"),
                results(arrays, left_out, "triton"),
            )
        for mode, (given, should, same) in modes.items():
            found = compared(results(*given, "triton"), should, same)
            found = {key: x.item() for key, x in found.items()}
            bar = BARS[shape.dtype]
            if found["wrong"] or not found["error"] <= bar or (exact and found["different"]):
                fault = {"bad": what, "token": token, "value": str(bad), "mode": mode}
                faults.append(fault | found)
            for key in ("reached", "wrong", "different"):
                totals[key] += found[key]
            totals["error"] = max(totals["error"], found["error"])
    label = name + " mapped" * mapped
    return {"case": label, "runs": len(runs), **totals, "faults": faults}


def command(argv: Sequence[str]) -> None:
    """Prints the table, writes containment.json and containment.md."""
    parsed = flags.parse(argv, {"gpu_containment": GpuContainmentConfig}, {"default": {}})
    config = GpuContainmentConfig(**parsed.sections["gpu_containment"])
    require_gpu("gpu_containment")
    rows = []
    for name, mapped in itertools.product(config.cases, (False, True)):
        if config.mapped or not mapped:
            rows.append(row_of(name, mapped=mapped))
            print(rows[-1], file=sys.stderr, flush=True)
    record = begun("hardware.gpu_containment", argv, machine=machine(), rows=rows)
    print(write_report(parsed.workdir, "gpu_containment", record, page))


def page(record: Mapping[str, Any]) -> list[str]:
    """What gpu_containment.md holds."""
    keys = ("case", "runs", "reached", "wrong", "different")
    lines = [[*(row[key] for key in keys), f"{row['error']:.1e}"] for row in record["rows"]]
    faults = sum(len(row["faults"]) for row in record["rows"])
    return [f"{faults} faults; {record['machine']}.", markdown(HEADINGS, lines)]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
