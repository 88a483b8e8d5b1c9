"""Whole training steps of our model, timed; and processes of their own, whose end frees a GPU."""

import concurrent.futures
import multiprocessing
import time
import traceback
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaproduct_jax.compilers.memory import memory_of
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.models import ModelConfig, SequenceModel, count_parameters
from deltaproduct_jax.tasks.task import Batch
from deltaproduct_jax.training.config import TrainConfig
from deltaproduct_jax.training.measuring.throughput import Throughput
from deltaproduct_jax.training.optimizer import make_optimizer, make_schedule
from deltaproduct_jax.training.step import init_state, make_train_step, split_model
from experiments.lib.bench.device_time import by_kind, kernel_times
from experiments.lib.bench.peers.fla_model import one_line
from experiments.lib.bench.timing import Compiled, machine, time_in_turn

OURS = "deltaproduct_jax"
PROFILED_ROUNDS = 2
Row = dict[str, Any]


def our_rows(
    training: TrainConfig,
    model_config: ModelConfig,
    tokens: np.ndarray,
    steps: int,
    repeats: int,
    budget_s: float,
) -> list[Row]:
    """One row: our model, trained for the rounds that are timed.

    Args:
        training: optimiser and clipping.
        model_config: what is trained.
        tokens: ``[B, T + 1]``.
        steps: a timed round.
        repeats: timed rounds, after one that warms up.
        budget_s: no further round begins after so many seconds.
    """
    optimizer = make_optimizer(training)
    model = SequenceModel(model_config, rngs=nnx.Rngs(0))
    parameters = count_parameters(model)["total"]
    definition, params = split_model(model)
    state = init_state(params, optimizer)
    del model, params  # the first step donates the arrays
    inputs, targets = jnp.asarray(tokens[:, :-1]), jnp.asarray(tokens[:, 1:])
    batch = Batch(inputs, targets, jnp.ones(inputs.shape, bool))
    step = make_train_step(definition, optimizer, make_schedule(training), 1)
    began = time.perf_counter()
    compiled = jax.jit(step, donate_argnums=0).lower(state, batch).compile()
    seconds = time.perf_counter() - began
    losses: list[jax.Array] = []

    def train() -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = compiled(state, batch)
            losses.append(metrics["loss"])
        jax.block_until_ready((state, losses))

    entry = Compiled(train, seconds, memory_of(compiled)["temp_bytes"], steps)
    time_in_turn({OURS: entry}, repeats, budget_s)
    kernels = by_kind(kernel_times(entry, PROFILED_ROUNDS))
    device = jax.devices()[0]
    peak = (device.memory_stats() or {}).get("peak_bytes_in_use")
    speed = 1e3 * inputs.size / entry.summary()["median_ms"]
    row = {
        "implementation": OURS,
        "parameters": parameters,
        **entry.summary(),
        "device_ms": sum(kernels.values()) or None,
        "kernels_ms": kernels,
        "mfu": Throughput(1, device.device_kind, parameters).utilisation(speed),
        "moved_mib": moved_bytes(compiled) / 2**20,
        "peak_mib": None if peak is None else peak / 2**20,
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
        "steps": len(losses),
        "machine": machine(),
    }
    return [row]


def moved_bytes(compiled: jax.stages.Compiled) -> float:
    """Bytes of all that a program's operations read and write, as XLA counts them.

    What an operation finds in a cache is counted too.
    """
    return compiled.cost_analysis().get("bytes accessed", 0.0)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, whose end frees what it held of a GPU."""
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def measured(function: Callable[..., list[Row]], name: str, *arguments: Any) -> list[Row]:
    """What ``function`` measures, apart; what stops it becomes a row that says so."""
    try:
        return apart(function, *arguments)
    except Exception as error:  # of another library, or of a GPU: any kind
        if not isinstance(error, ConfigError):
            traceback.print_exception(error)
        return [{"implementation": name, "error": one_line(error)}]
