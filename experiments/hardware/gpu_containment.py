"""Does what is not finite stay where it is, where a GPU's kernels run?

    python -m experiments.hardware.gpu_containment --workdir=runs/gpu_containment

One number of one operand, or of one cotangent, of one row becomes NaN or infinite, in the middle of
a segment, at its start and at its end; rows are packed, or whole. What is NaN then must be NaN by
the recurrence: outputs, final state and all gradients, with a loss that sees the bad outputs and
with one that leaves them out. The rest of that row and of the heads that share the number must be
as by the recurrence, within bars, as it is made anew; all else the same bits as without the number.

Rounding may also differ in the gradient of g, as sums over chunks make it; where a sequence is in
pieces, of which fewer are looked at the more they forget; and under `jax.vmap`: there the rest is
held against bars.

Source: this project.
Expect: no row with a fault.
Takes: about five minutes on an H100, mostly compiling.
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
# Relative errors of what need not be the same bits, in whole arrays and in what is made anew.
BARS = {"bfloat16": 1e-2, "float32": 1e-5}
ANEW = {"bfloat16": 3e-2, "float32": 1e-4}
BAD = {"nan": np.nan, "inf": np.inf}
ARGUMENTS = ("q", "k", "v", "beta", "g", "initial_state")
COTANGENTS = ("o", "final_state")
ROW, HEAD = 1, 1  # where something is bad
DG = "[1]['g']"  # sums over a chunk, in which what is in another segment cancels
# The axis of heads of results.
HEADS = {"[0][0]": 2, "[0][1]": 1, "[1]['initial_state']": 1, DG: 2, "[1]['q']": 2}
HEADS |= {f"[1]['{name}']": 3 for name in ("k", "v", "beta")}
ROWS = ("packed", "whole", "mapped")
HEADINGS = ("case", "runs", "NaN", "NaN too many or few", "other bits", "error", "error anew")


@dataclasses.dataclass(frozen=True)
class GpuContainmentConfig:
    """What is looked at."""

    cases: tuple[str, ...] = setting(
        tuple(CASES), f"some of {', '.join(CASES)}", filled=True, one_of=CASES
    )
    rows: tuple[str, ...] = setting(
        ROWS, "packed, whole, and, packed too, mapped by jax.vmap", filled=True, one_of=ROWS
    )

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)


@functools.partial(jax.jit, static_argnames=("implementation", "mapped"))
def results_of(arrays: Any, cotangents: Any, *, implementation: str, mapped: bool = False) -> Any:
    """Outputs and gradients of every input."""

    def one(arrays: Any, cotangents: Any) -> Any:
        ids = arrays.get("segment_ids")
        inputs = {name: x for name, x in arrays.items() if name != "segment_ids"}

        def run(inputs: Any) -> Any:
            return delta_product(**inputs, segment_ids=ids, implementation=implementation)

        outputs, pull = jax.vjp(run, inputs)
        return outputs, pull(tuple(cotangents[name] for name in COTANGENTS))[0]

    return (jax.vmap(one) if mapped else one)(arrays, cotangents)


@functools.partial(jax.jit, static_argnames="heads")
def compared(found: Any, wanted: Any, finite: Any, heads: Any) -> dict[str, jax.Array]:
    """What is reached, how far NaN are not where they should be, and the rest from ``finite``.

    What belongs to a row and value heads that are made anew, if ``heads`` says which of how many,
    is held against ``wanted`` beside that.
    """
    names, found = zip(*jax.tree_util.tree_flatten_with_path(found)[0], strict=True)
    leaves = zip(names, found, *map(jax.tree.leaves, (wanted, finite)), strict=True)
    totals: dict[str, Any] = dict.fromkeys(("reached", "wrong", "different"), 0)
    totals |= dict.fromkeys(("error", "anew"), jnp.float32(0))
    for path, x, should, same in leaves:
        is_nan, shall = jnp.isnan(x), jnp.isnan(should)
        rest = ~shall
        totals["reached"] += jnp.sum(shall)
        totals["wrong"] += jnp.sum(is_nan != shall) + jnp.sum(rest & ~jnp.isfinite(x))
        key = jax.tree_util.keystr(path)
        x, same, should = (
            jnp.where(rest & jnp.isfinite(a), a, 0).astype(jnp.float32) for a in (x, same, should)
        )
        if heads is not None:
            anew = made_anew(key, x.shape, *heads)
            totals["different"] += jnp.sum(~anew & (x != same)) * (key != DG)
            error = _apart(jnp.where(anew, x, 0), jnp.where(anew, should, 0))
            totals["anew"] = jnp.maximum(totals["anew"], error)
        totals["error"] = jnp.maximum(totals["error"], _apart(x, same))
    return totals


def _apart(x: jax.Array, y: jax.Array) -> jax.Array:
    return jnp.linalg.norm(x - y) / jnp.maximum(jnp.linalg.norm(y), 1e-30)


def made_anew(key: str, shape: tuple[int, ...], some: Sequence[int], of: int) -> np.ndarray:
    """Where a result belongs to `ROW` and to some ``of`` the value heads, or what they share."""
    axis = HEADS[key]
    chosen = {head * shape[axis] // of for head in some}
    is_head = np.asarray([head in chosen for head in range(shape[axis])])
    is_row = np.arange(shape[0]) == ROW
    is_head = is_head.reshape([-1 if a == axis else 1 for a in range(len(shape))])
    return is_row.reshape(-1, *[1] * (len(shape) - 1)) & is_head


def inputs_of(shape: Shape, *, packed: bool) -> tuple[dict[str, jax.Array], dict[str, jax.Array]]:
    """Arrays of rows, of three segments if ``packed``, and cotangents."""
    arrays = shape.inputs()
    B, T, Hv = arrays["v"].shape[0], shape.T, shape.Hv or shape.H
    arrays["initial_state"] = jax.random.normal(jax.random.key(2), (B, Hv, shape.K, shape.V)) / 8
    bounds = jnp.asarray([T // 3, 2 * T // 3])
    ids = jnp.sum(jnp.arange(T)[:, None] >= bounds, axis=1)
    if packed:
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


def heads_of(shape: Shape, what: str) -> tuple[tuple[int, ...], int]:
    """Value heads that are made anew, of how many."""
    Hv = shape.Hv or shape.H
    group = Hv // shape.H
    some = range(HEAD * group, (HEAD + 1) * group) if what in ("q", "k") else (HEAD,)
    return tuple(some), Hv


def row_of(name: str, rows: str) -> dict[str, Any]:
    """What was found in all runs of a case, of such rows."""
    shape, mapped = CASES[name], rows == "mapped"
    arrays, cotangents = inputs_of(shape, packed=rows != "whole")
    totals = {"reached": 0, "wrong": 0, "different": 0, "error": 0.0, "anew": 0.0}
    faults = []
    runs = runs_of(shape)
    if rows != "packed":
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
        heads = None if mapped else heads_of(shape, what)
        exact = not mapped and "in pieces" not in name
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
            found = compared(results(*given, "triton"), should, same, heads)
            found = {key: x.item() for key, x in found.items()}
            near = found["error"] <= BARS[shape.dtype] and found["anew"] <= ANEW[shape.dtype]
            if found["wrong"] or not near or (exact and found["different"]):
                fault = {"bad": what, "token": token, "value": str(bad), "mode": mode}
                faults.append(fault | found)
            for key in ("reached", "wrong", "different"):
                totals[key] += found[key]
            for key in ("error", "anew"):
                totals[key] = max(totals[key], found[key])
    return {"case": f"{name}, {rows}", "runs": len(runs), **totals, "faults": faults}


def command(argv: Sequence[str]) -> None:
    """Prints the table, writes containment.json and containment.md."""
    parsed = flags.parse(argv, {"gpu_containment": GpuContainmentConfig}, {"default": {}})
    config = GpuContainmentConfig(**parsed.sections["gpu_containment"])
    require_gpu("gpu_containment")
    rows = []
    for name, kind in itertools.product(config.cases, config.rows):
        rows.append(row_of(name, kind))
        print(rows[-1], file=sys.stderr, flush=True)
    record = begun("hardware.gpu_containment", argv, machine=machine(), rows=rows)
    print(write_report(parsed.workdir, "gpu_containment", record, page))


def page(record: Mapping[str, Any]) -> list[str]:
    """What gpu_containment.md holds."""
    keys = ("case", "runs", "reached", "wrong", "different")
    errors = ("error", "anew")
    lines = [
        [*(row[key] for key in keys), *(f"{row[key]:.1e}" for key in errors)]
        for row in record["rows"]
    ]
    faults = sum(len(row["faults"]) for row in record["rows"])
    return [f"{faults} faults; {record['machine']}.", markdown(HEADINGS, lines)]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
