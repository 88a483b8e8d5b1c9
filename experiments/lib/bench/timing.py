"""What the benchmarks of the op share: inputs, programs, fair timing, and errors in float64."""

import contextlib
import dataclasses
import math
import os
import statistics
import time
from collections.abc import Callable, Mapping, Sequence
from importlib import metadata
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.compilers.memory import memory_of
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.ops import delta_product, delta_product_step
from deltaproduct_jax.ops.precision import accumulator_dtype
from experiments.lib.bench.report import begun

# Larger errors than these mean a wrong result, not rounding (design: 1e-5 and 3e-5 in float32).
ERROR_LIMIT = {"float32": 1e-4, "bfloat16": 1e-1}
# What is timed is first held against float64 on so many tokens at most.
CHECKED_TOKENS = 256
FORWARD, BACKWARD, STEP = "forward", "forward+backward", "step"
# (o, final_state), or the gradient of each input by name.
Results = tuple[Any, ...] | dict[str, Any]


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of one call of the op, by the letters of the dimension key; Hv none: H."""

    B: int
    T: int
    H: int
    K: int
    V: int
    R: int
    dtype: str = "float32"
    gated: bool = True
    Hv: int | None = None

    def inputs(self, seed: int = 0) -> dict[str, jax.Array]:
        """q, k, v, beta and g: unit queries and keys, beta in (0, 2), g mostly mild."""
        keys = jax.random.split(jax.random.key(seed), 5)
        B, T, H, K, V, R = self.B, self.T, self.H, self.K, self.V, self.R
        Hv = self.Hv or H

        def unit(key: jax.Array, shape: tuple[int, ...]) -> jax.Array:
            x = jax.random.normal(key, shape)
            return x / jnp.linalg.norm(x, axis=-1, keepdims=True)

        arrays = {
            "q": unit(keys[0], (B, T, H, K)),
            "k": unit(keys[1], (B, T, R, H, K)),
            "v": jax.random.normal(keys[2], (B, T, R, Hv, V)),
            "beta": 2 * jax.nn.sigmoid(jax.random.normal(keys[3], (B, T, R, Hv))),
        }
        if self.gated:
            arrays["g"] = jax.nn.log_sigmoid(2 + jax.random.normal(keys[4], (B, T, Hv)))
        dtype = jnp.dtype(self.dtype)
        return {
            name: x.astype(dtype if name in "qkv" else accumulator_dtype(dtype))
            for name, x in arrays.items()
        }


def program(
    implementation: str | Callable | None, direction: str, chunk_size: int | None = None
) -> Callable:
    """The op, or the gradient of a sum over its outputs with respect to every input.

    Args:
        implementation: of the op; or another op, a function of the same arrays.
        direction: `FORWARD` or `BACKWARD`.
        chunk_size: of "chunked".
    """

    def forward(arrays: Mapping[str, jax.Array]) -> tuple[jax.Array, jax.Array]:
        if callable(implementation):
            return implementation(**arrays)
        size = chunk_size if implementation in (None, "chunked") else None
        return delta_product(**arrays, implementation=implementation, chunk_size=size)

    def loss(arrays: Mapping[str, jax.Array]) -> jax.Array:
        outputs = forward(arrays)
        return sum(jnp.sum(x * cotangent(x.shape)) for x in outputs)

    return forward if direction == FORWARD else jax.grad(loss)


def cotangent(shape: tuple[int, ...]) -> jax.Array:
    """Weights in (-1, 1) that differ from entry to entry; float32, but bfloat16 holds them too.

    They take next to no time to make: on a GPU a cosine of every entry took a tenth of a gradient.
    """
    index = jnp.arange(math.prod(shape), dtype=jnp.uint32).reshape(shape)
    high_bits = (index * jnp.uint32(0x9E3779B1)) >> 24  # Fibonacci hashing
    return (high_bits.astype(jnp.float32) - 127.5) / 128


# Decoding goes over its tokens again and again: each has arrays of its own, and handing hundreds of
# them to a program would take longer than a step on them.
DECODING_ROUNDS = 16


def decoding(arrays: Mapping[str, Any]) -> tuple[jax.Array, jax.Array]:
    """Outputs and final state, token by token in one program, of what `by_token` returns."""

    def once(state: jax.Array, _: None) -> tuple[jax.Array, jax.Array]:
        outputs = []
        for token in arrays["tokens"]:
            o, state = delta_product_step(state, **token)
            outputs.append(o)
        return state, jnp.stack(outputs)

    state, o = jax.lax.scan(once, arrays["state"], None, length=DECODING_ROUNDS)
    return jnp.moveaxis(o.reshape(-1, *o.shape[2:]), 0, 1), state


def by_token(arrays: Mapping[str, jax.Array]) -> dict[str, Any]:
    """The inputs cut into tokens, which lie by themselves in memory, and a state of zeros."""
    B, T, _, H, V = arrays["v"].shape
    state = jnp.zeros((B, H, arrays["k"].shape[-1], V), accumulator_dtype(arrays["q"].dtype))
    tokens = [{name: x[:, t] for name, x in arrays.items()} for t in range(T)]
    return {"state": state, "tokens": tokens}


@dataclasses.dataclass
class Compiled:
    """A program compiled for its inputs, what that cost, and the times of its runs.

    Attributes:
        run: runs it once and waits.
        compile_seconds: what compiling took.
        temp_bytes: temporary memory, where the compiler reports it.
        calls: of the operation in one run; times in `summary` are those of one.
        seconds: of each run.
    """

    run: Callable[[], Any]
    compile_seconds: float
    temp_bytes: int | None
    calls: int = 1
    seconds: list[float] = dataclasses.field(default_factory=list)

    def summary(self) -> dict[str, Any]:
        """Median and range of a call in milliseconds, compile time and temporary memory."""
        per_call = 1e3 / self.calls
        return {
            "median_ms": per_call * statistics.median(self.seconds),
            "min_ms": per_call * min(self.seconds),
            "max_ms": per_call * max(self.seconds),
            "compile_s": self.compile_seconds,
            "temp_mib": None if self.temp_bytes is None else self.temp_bytes / 2**20,
        }


def compile_program(
    function: Callable, arrays: Mapping[str, jax.Array], calls: int = 1
) -> Compiled:
    """Compiles ``function(arrays)``, which calls what is timed ``calls`` times."""
    began = time.perf_counter()
    compiled = jax.jit(function).lower(arrays).compile()
    seconds = time.perf_counter() - began
    temp_bytes = memory_of(compiled)["temp_bytes"]
    return Compiled(lambda: jax.block_until_ready(compiled(arrays)), seconds, temp_bytes, calls)


def time_in_turn(programs: Mapping[str, Compiled], repeats: int, budget_s: float) -> None:
    """Runs all programs in turn, so that a busy moment of the machine meets them alike.

    Args:
        programs: what to time; each gets its times.
        repeats: rounds after one that warms up.
        budget_s: no further round begins after so many seconds; at least two are made.
    """
    for entry in programs.values():
        entry.run()
    began = time.perf_counter()
    for turn in range(repeats):
        if turn >= 2 and time.perf_counter() - began > budget_s:
            break
        for entry in programs.values():
            start = time.perf_counter()
            entry.run()
            entry.seconds.append(time.perf_counter() - start)


def exact_results(arrays: Mapping[str, jax.Array], direction: str) -> Results:
    """What `program` computes of these inputs, by the recurrence in float64."""
    with jax.enable_x64(True):
        wide = {name: jnp.asarray(np.asarray(x, np.float64)) for name, x in arrays.items()}
        return jax.device_get(jax.jit(program("recurrent", direction))(wide))


def worst_error(got: Results, want: Results) -> float:
    """Largest ``||x - ref|| / ||ref||`` over the results."""
    return max(jax.tree.leaves(jax.tree.map(_error, jax.device_get(got), want)))


def checked_error(name: str, shape: Shape, got: Results, want: Results) -> float:
    """The worst error; a ConfigError that names who is wrong if it is too large to be rounding."""
    error = worst_error(got, want)
    if not error <= ERROR_LIMIT[shape.dtype]:
        raise ConfigError(f"{name} is wrong at {shape}: off by {error:.1e}")
    return error


def _error(x: np.ndarray, ref: np.ndarray) -> float:
    return float(np.linalg.norm(np.asarray(x, np.float64) - ref) / np.linalg.norm(ref))


def started(script: str, argv: Sequence[str], **more: Any) -> dict[str, Any]:
    """The record of a measurement before its first row: command, machine and what more there is."""
    return begun(script, argv, machine=machine(), **more, rows=[])


def require_gpu(script: str) -> None:
    """Raises ConfigError, naming the script, where JAX runs on anything else."""
    if jax.default_backend() != "gpu":
        raise ConfigError(f"{script} needs a GPU; JAX runs on {jax.default_backend()}")


def machine() -> str:
    """Device kind, cores of the host and versions of what compiles for it, for the record."""
    devices = jax.devices()
    kind = f"{len(devices)} x {devices[0].device_kind}"
    described = f"{kind}, host with {os.cpu_count()} cores, jax {jax.__version__}"
    for name in ("jax-triton", "triton") if devices[0].platform == "gpu" else ():
        with contextlib.suppress(metadata.PackageNotFoundError):
            described += f", {name} {metadata.version(name)}"
    return described
