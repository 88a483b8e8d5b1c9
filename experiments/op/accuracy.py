"""How far each implementation of the op is from float64, on easy, long and nasty inputs.

    python -m experiments.op.accuracy --workdir=runs/accuracy

The error of x is ``||x - ref|| / ||ref||``, where ref is computed token by token in NumPy float64
(`experiments.lib.bench.exact`) from the very same inputs, so that bfloat16 is not charged for
rounding q, k and v. A cell holds the errors of o, of the worst gradient (of q, k, v, beta and g,
for random cotangents of o and of the last state), and of g's own, which strong decay ruins first.

What exceeds the project's bars is marked and listed. In float32 they are 1e-5 for o and 3e-5 for a
gradient, or 30 times what the plain recurrence errs in float32, if that is more. In bfloat16 they
are 1e-2 and 2e-2; on inputs without decay whose beta exceeds 1, where errors of the state never die
out, both are scaled up to 4 times what the recurrence errs in o when it rounds the operands of its
products to bfloat16, which the last column shows. In float16 they are an eighth of bfloat16's, in
float64 1e-13 and 1e-12, or 30 times what the recurrence errs. The recurrence of the op itself
computes in float32 at least and rounds only its results. What an implementation does not take has
no column. On a CPU "pallas_tpu" is interpreted; "triton" runs on a GPU alone.

A CPU multiplies bfloat16 inputs in float32. "chunked_as_gpu" and "chunked_as_tpu" cut the sequence
and round operands as "chunked" does on those platforms, and run anywhere. The order in which a GPU
adds, and that a TPU makes a float32 product of bfloat16 passes, are not part of it.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.errors import ConfigError, require_at_least, require_one_of
from deltaproduct_jax.files import write_file
from deltaproduct_jax.ops import delta_product
from deltaproduct_jax.ops.chunked import chunked, chunked_backward
from deltaproduct_jax.ops.dispatch import AVAILABLE, Request
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.precision import PRECISIONS
from deltaproduct_jax.settings import setting
from experiments.lib import flags
from experiments.lib.bench import exact
from experiments.lib.bench.peers.jax_packages import PACKAGES, peer_op
from experiments.lib.bench.timing import machine

BARS = {
    "float64": (1e-13, 1e-12),
    "float32": (1e-5, 3e-5),
    "float16": (1.25e-3, 2.5e-3),
    "bfloat16": (1e-2, 2e-2),
}
NARROW = ("float16", "bfloat16")
OUTPUTS = ("o", "final_state")
OVER_RECURRENCE, OVER_PLAIN_BFLOAT16 = 30, 4
# What those take that do not take every dtype.
TAKEN = {"pallas_tpu": ("float32", "bfloat16"), "triton": ("float32", "float16", "bfloat16")}
TAKEN |= dict.fromkeys(("chunked_as_gpu", "chunked_as_tpu", *PACKAGES), TAKEN["triton"])
# Names of ours for "chunked" as another platform runs it, and the platform.
ELSEWHERE = {"chunked_as_gpu": "cuda", "chunked_as_tpu": "tpu"}


@dataclasses.dataclass(frozen=True)
class Input:
    """A row of the table: how keys, step sizes and decay are drawn; the rest is Gaussian."""

    keys: str = "independent"  # or identical, or parallel: a cosine of about .9999
    beta: tuple[float, float] = (0.0, 2.0)
    decay: str | None = None  # mild, slow, strong (g = -20) or every8 (g = -20 at every 8th)
    is_long: bool = False

    @property
    def forgets(self) -> bool:
        """Whether rounding errors of the state die out."""
        return self.decay is not None or self.beta[1] <= 1

    def arrays(self, rng: np.random.Generator, B: int, T: int, R: int, H: int, K: int) -> dict:
        """q, k, v, beta and g in float64, g zero where there is no decay; V is K."""
        k = rng.normal(size=(B, T, R, H, K))
        if self.keys != "independent":
            same = rng.normal(size=(B, 1, 1, H, K))
            k = same + (0.01 * k if self.keys == "parallel" else np.zeros_like(k))
        position = np.broadcast_to(np.arange(T)[:, None], (B, T, H))
        g = {
            None: lambda: np.zeros((B, T, H)),
            "mild": lambda: -rng.uniform(0, 0.3, size=(B, T, H)),
            "slow": lambda: -rng.uniform(1e-3, 1e-2, size=(B, T, H)),
            "strong": lambda: np.full((B, T, H), -20.0),
            "every8": lambda: np.where(position % 8 == 7, -20.0, -0.01),
        }[self.decay]()
        return {
            "q": rng.normal(size=(B, T, H, K)),
            "k": k / np.linalg.norm(k, axis=-1, keepdims=True),
            "v": rng.normal(size=(B, T, R, H, K)),
            "beta": rng.uniform(*self.beta, size=(B, T, R, H)),
            "g": g,
        }


REFLECTIONS = (2.0, 2.0)
INPUTS = {
    "random": Input(decay="mild"),
    "random, ungated": Input(),
    "random, long": Input(decay="slow", is_long=True),
    "random, long, ungated": Input(is_long=True),
    "beta 2, long, ungated": Input(beta=REFLECTIONS, is_long=True),
    "beta 2": Input(beta=REFLECTIONS, decay="slow"),
    "beta 2, ungated": Input(beta=REFLECTIONS),
    "beta 2, identical keys": Input("identical", REFLECTIONS, "slow"),
    "beta 2, identical keys, ungated": Input("identical", REFLECTIONS),
    "beta 2, keys of cosine .9999": Input("parallel", REFLECTIONS, "slow"),
    "beta 2, keys of cosine .9999, ungated": Input("parallel", REFLECTIONS),
    "g = -20 everywhere": Input(decay="strong"),
    "g = -20 at every 8th token": Input(decay="every8"),
}


@dataclasses.dataclass(frozen=True)
class AccuracyConfig:
    """What is compared."""

    length: int = setting(2048, "tokens T of the short inputs")
    long_length: int = setting(65536, "tokens T of the long inputs")
    head_dim: int = setting(64, "key width K and value width V of the short inputs")
    long_head_dim: int = setting(16, "key width K and value width V of the long inputs")
    num_heads: int = setting(1, "heads H")
    num_householder: int = setting(2, "Householder factors a token")
    implementations: str = setting(
        ",".join(("recurrent", "associative", "chunked", *ELSEWHERE)),
        "comma list; recurrent, which bars refer to, among them",
    )
    peer: str | None = setting(
        None, f"comma list of JAX packages to compare with: {', '.join(PACKAGES)}"
    )
    dtypes: str = setting(
        "float32,bfloat16",
        f"comma list of {', '.join(BARS)}: q, k and v; beta and g are float32 at least",
    )
    chunk_size: int | None = setting(None, "tokens in a chunk of chunked; none: the op's choice")
    precision: str | None = setting(
        None, f"of our products: {', '.join(PRECISIONS)}; none: what the op does by itself"
    )
    seed: int = setting(0, "of the inputs")

    def __post_init__(self) -> None:
        """Checks every field."""
        for name in ("length", "long_length", "num_heads", "num_householder"):
            require_at_least(name, getattr(self, name), 1)
        for name in ("head_dim", "long_head_dim"):
            require_at_least(name, getattr(self, name), 2)
        require_at_least("seed", self.seed, 0)
        if self.chunk_size is not None:
            require_at_least("chunk_size", self.chunk_size, 1)
        require_one_of("precision", self.precision, [None, *PRECISIONS])
        for name in self.implementations.split(","):
            require_one_of("implementations", name, [*AVAILABLE, *ELSEWHERE])
        if "recurrent" not in self.implementations.split(","):
            raise ConfigError(
                f"implementations={self.implementations!r} lacks 'recurrent', which the bars refer "
                f"to; it may hold any of {[*AVAILABLE, *ELSEWHERE]}, and that one"
            )
        for name in self.peers:
            require_one_of("peer", name, PACKAGES)
            peer_op(name)  # an error now, not after the first rows
        for name in self.dtypes.split(","):
            require_one_of("dtypes", name, BARS)

    @property
    def peers(self) -> list[str]:
        """The peers, in order."""
        return self.peer.split(",") if self.peer else []


def measure(config: AccuracyConfig, is_long: bool) -> list[dict[str, Any]]:
    """One row an input and dtype: the errors of every implementation.

    All of them share one pass of the reference, as rows of a batch.
    """
    T = config.long_length if is_long else config.length
    K = config.long_head_dim if is_long else config.head_dim
    H, R = config.num_heads, config.num_householder
    names = [name for name, entry in INPUTS.items() if entry.is_long == is_long]
    cases = [(name, dtype) for name in names for dtype in config.dtypes.split(",")]
    drawn = []
    for name, dtype in cases:
        rng = np.random.default_rng([config.seed, list(INPUTS).index(name)])
        arrays = INPUTS[name].arrays(rng, 1, T, R, H, K)
        do, dfinal = rng.normal(size=(1, T, H, K)), rng.normal(size=(1, H, K, K))
        narrow = jnp.dtype(dtype)
        wide = np.promote_types(narrow, np.float32)
        arrays = {n: x.astype(narrow if n in "qkv" else wide) for n, x in arrays.items()}
        drawn.append((arrays, do.astype(narrow), dfinal.astype(wide)))
    stacked = jax.tree.map(
        lambda *rows: np.concatenate([np.asarray(row, np.float64) for row in rows]), *drawn
    )
    references, gradients = exact.outputs_and_gradients(*stacked)
    plain = exact.outputs(stacked[0], rounded=_to_bfloat16)["o"]
    rows = []
    for index, (name, dtype) in enumerate(cases):
        here = slice(index, index + 1)
        wanted = jax.tree.map(lambda x, here=here: x[here], {**references, **gradients})
        if INPUTS[name].decay is None:
            del drawn[index][0]["g"], wanted["g"]
        errors = {}
        for implementation in [*config.implementations.split(","), *config.peers]:
            if dtype not in TAKEN.get(implementation, BARS):
                continue
            size = config.chunk_size if implementation.startswith("chunked") else None
            how = {"implementation": implementation, "chunk_size": size}
            with jax.enable_x64(dtype == "float64"):
                got = _run(*drawn[index], **how, precision=config.precision)
            errors[implementation] = {n: _error(got[n], wanted[n]) for n in wanted}
        row = {"input": name, "dtype": dtype, "T": T, "K": K, "errors": errors}
        rows.append({**row, "plain_bfloat16": _error(plain[here], wanted["o"])})
        print(json.dumps(rows[-1]), file=sys.stderr)
    return rows


def _to_bfloat16(x: np.ndarray) -> np.ndarray:
    return x.astype(jnp.bfloat16).astype(np.float64)


@functools.partial(jax.jit, static_argnames=("implementation", "chunk_size", "precision"))
def _run(arrays, do, dfinal, *, implementation, chunk_size, precision):
    """Outputs and gradients by name."""
    if implementation in ELSEWHERE:
        return _run_as(ELSEWHERE[implementation], arrays, do, dfinal, chunk_size, precision)

    how = {"implementation": implementation, "chunk_size": chunk_size, "precision": precision}
    own = functools.partial(delta_product, **how)
    call = peer_op(implementation) if implementation in PACKAGES else own

    def op(arrays):
        o, state = call(**arrays)
        return {"o": o, "final_state": state}

    outputs, pullback = jax.vjp(op, arrays)
    return {**outputs, **pullback({"o": do, "final_state": dfinal})[0]}


def _run_as(platform, arrays, do, dfinal, chunk_size, precision):
    """The two passes of "chunked", as ``platform`` runs them."""
    tokens = Tokens(**{"g": None, **arrays}, resets=None)
    request = Request(tokens.q.shape[-1] ** -0.5, precision, chunk_size, "chunked")
    settings = request.settings(platform, tokens)
    no_state = jnp.zeros_like(dfinal)
    o, final_state, states = chunked(tokens, no_state, settings, keep_states=True)
    gradients, _ = chunked_backward(tokens, states, do, dfinal, settings)
    named = {name: x for name, x in gradients._asdict().items() if x is not None}
    return {"o": o, "final_state": final_state, **named}


def _error(x: np.ndarray, reference: np.ndarray) -> float:
    difference = np.linalg.norm(np.asarray(x, np.float64) - reference)
    return float(difference / np.linalg.norm(reference))


def over_the_bars(row: dict[str, Any]) -> dict[str, dict[str, tuple[float, float]]]:
    """By implementation and result: the error and the bar that it exceeds, where it does."""
    of_o, of_gradient = BARS[row["dtype"]]
    if row["dtype"] in NARROW and not INPUTS[row["input"]].forgets:
        of_plain = OVER_PLAIN_BFLOAT16 * row["plain_bfloat16"]
        factor = max(1.0, of_plain / BARS["bfloat16"][0])
        of_o, of_gradient = factor * of_o, factor * of_gradient
    found: dict[str, dict[str, tuple[float, float]]] = {}
    for implementation, errors in row["errors"].items():
        for name, error in errors.items():
            bar = of_o if name in OUTPUTS else of_gradient
            if row["dtype"] not in NARROW:
                bar = max(bar, OVER_RECURRENCE * row["errors"]["recurrent"][name])
            if not error <= bar:  # so written, a NaN is over every bar
                found.setdefault(implementation, {})[name] = (error, bar)
    return found


def table(rows: Sequence[dict[str, Any]]) -> str:
    """The rows as Markdown, a table a dtype, and below them what exceeds the bars."""
    blocks, listed = [], []
    for dtype in dict.fromkeys(row["dtype"] for row in rows):
        of_dtype = [row for row in rows if row["dtype"] == dtype]
        names = list(of_dtype[0]["errors"])
        plain = ["o with bfloat16 products"] * (dtype == "bfloat16")
        lines = [[f"{dtype}: o / worst gradient / dg", "T", "K = V", *names, *plain]]
        lines.append(["---"] * len(lines[0]))
        for row in of_dtype:
            over, cells = over_the_bars(row), [row["input"], str(row["T"]), str(row["K"])]
            for name in names:
                cell = _cell(row["errors"][name])
                cells.append(f"**{cell}**" if name in over else cell)
            cells += [f"{row['plain_bfloat16']:.1e}"] * len(plain)
            lines.append(cells)
            for name, found in over.items():
                what = ", ".join(
                    f"{n} {error:.1e} ({bar:.1e})" for n, (error, bar) in found.items()
                )
                listed.append(f"- {row['input']}, {name} {dtype}: {what}")
        blocks.append("\n".join(f"| {' | '.join(line)} |" for line in lines))
    heading = "Over the bars, which stand in brackets (q, k, v, beta, g: their gradients):"
    return "\n\n".join([*blocks, heading, "\n".join(listed or ["- nothing"])])


def _cell(errors: dict[str, float]) -> str:
    gradients = [error for name, error in errors.items() if name not in OUTPUTS]
    dg = f"{errors['g']:.1e}" if "g" in errors else "-"
    return f"{errors['o']:.1e} / {float(np.max(gradients)):.1e} / {dg}"


def command(argv: Sequence[str]) -> None:
    """Measures, prints the table, writes accuracy.json and accuracy.md."""
    parsed = flags.parse(argv, {"accuracy": AccuracyConfig}, {"default": {}})
    config = AccuracyConfig(**parsed.sections["accuracy"])
    rows = measure(config, is_long=False) + measure(config, is_long=True)
    title = (
        f"B=1 H={config.num_heads} n_h={config.num_householder}, errors against float64; "
        f"{machine()}"
    )
    command_line = " ".join(["python -m experiments.op.accuracy", *argv])
    over = [
        {"input": row["input"], "dtype": row["dtype"], "over": found}
        for row in rows
        if (found := over_the_bars(row))
    ]
    record = {"command": command_line, "machine": machine(), "over_the_bars": over, "rows": rows}
    write_file(parsed.workdir / "accuracy.json", json.dumps(record, indent=1).encode() + b"\n")
    text = f"{title}\n\n{table(rows)}\n\nCommand: `{command_line}`\n"
    write_file(parsed.workdir / "accuracy.md", text.encode())
    print(text)


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
