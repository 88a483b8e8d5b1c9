"""How far implementations of the op are from float64: inputs, errors, and the project's bars."""

import dataclasses
import functools
from collections.abc import Iterator, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.ops import delta_product
from deltaproduct_jax.ops.chunked import chunked, chunked_backward
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.route import resolve
from experiments.lib.bench import exact
from experiments.lib.bench.peers.jax_packages import PACKAGES, peer_op

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


def measure(
    names: Sequence[str],
    dtypes: Sequence[str],
    implementations: Sequence[str],
    *,
    T: int,
    R: int,
    H: int,
    K: int,
    chunk_size: int | None = None,
    precision: str | None = None,
    seed: int = 0,
) -> Iterator[dict[str, Any]]:
    """One row an input and dtype: the errors of every implementation.

    All of them share one pass of the reference, as rows of a batch.

    Args:
        names: among `INPUTS`.
        dtypes: of q, k and v, among `BARS`.
        implementations: of the op, names in `ELSEWHERE`, or peers; "recurrent" among them.
        T, R, H, K: sizes, with V = K.
        chunk_size: of "chunked".
        precision: of our products.
        seed: of the inputs.
    """
    cases = [(name, dtype) for name in names for dtype in dtypes]
    drawn = [
        _drawn(INPUTS[name], [seed, list(INPUTS).index(name)], dtype, T, R, H, K)
        for name, dtype in cases
    ]
    stacked = jax.tree.map(
        lambda *rows: np.concatenate([np.asarray(row, np.float64) for row in rows]), *drawn
    )
    references, gradients = exact.outputs_and_gradients(*stacked)
    plain = exact.outputs(stacked[0], rounded=_to_bfloat16)["o"]
    for index, (name, dtype) in enumerate(cases):
        here = slice(index, index + 1)
        wanted = jax.tree.map(lambda x, here=here: x[here], {**references, **gradients})
        if INPUTS[name].decay is None:
            del drawn[index][0]["g"], wanted["g"]
        errors = {}
        for implementation in implementations:
            if dtype not in TAKEN.get(implementation, BARS):
                continue
            size = chunk_size if implementation.startswith("chunked") else None
            how = {"implementation": implementation, "chunk_size": size}
            with jax.enable_x64(dtype == "float64"):
                got = _run(*drawn[index], **how, precision=precision)
            errors[implementation] = {n: _error(got[n], wanted[n]) for n in wanted}
        row = {"input": name, "dtype": dtype, "T": T, "K": K, "errors": errors}
        yield {**row, "plain_bfloat16": _error(plain[here], wanted["o"])}


def _drawn(given: Input, seed: Sequence[int], dtype: str, T: int, R: int, H: int, K: int):
    """Inputs, and the cotangents of o and of the last state, in the dtypes of the op."""
    rng = np.random.default_rng(seed)
    arrays = given.arrays(rng, 1, T, R, H, K)
    do, dfinal = rng.normal(size=(1, T, H, K)), rng.normal(size=(1, H, K, K))
    narrow = jnp.dtype(dtype)
    wide = np.promote_types(narrow, np.float32)
    arrays = {n: x.astype(narrow if n in "qkv" else wide) for n, x in arrays.items()}
    return arrays, do.astype(narrow), dfinal.astype(wide)


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
    options = {"precision": precision, "chunk_size": chunk_size, "implementation": "chunked"}
    route = resolve(tokens, scale=tokens.q.shape[-1] ** -0.5, **options)
    settings = route.branch(platform).settings
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
