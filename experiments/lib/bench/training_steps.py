"""Whole training steps of our model, timed; and processes of their own, whose end frees a GPU."""

import contextlib
import functools
import os
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from typing import Any, NamedTuple

import jax
import numpy as np

from deltaproduct_jax.compilers.memory import memory_of
from deltaproduct_jax.data.workers import Processes
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.models import ModelConfig, count_parameters
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.tasks.task import Batch
from deltaproduct_jax.training.compiled import compiler_options
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.loop import initial_model
from deltaproduct_jax.training.measuring.memory import require_memory_of_state
from deltaproduct_jax.training.measuring.throughput import Throughput
from deltaproduct_jax.training.optimizer import make_optimizer, make_schedule
from deltaproduct_jax.training.start import first_state, layout_of, shapes_of
from deltaproduct_jax.training.step import make_train_step
from deltaproduct_jax.training.text import TextTask
from experiments.lib.bench.device_time import by_kind, kernel_times
from experiments.lib.bench.peers.fla_model import one_line
from experiments.lib.bench.timing import Compiled, machine, time_in_turn

OURS = "deltaproduct_jax"
ALONE = "data:1"  # a mesh of one device
PROFILED_ROUNDS = 2
Row = dict[str, Any]


def our_rows(
    training: TrainConfig,
    model_config: ModelConfig,
    tokens: np.ndarray,
    steps: int,
    repeats: int,
    budget_s: float,
    mesh: str = ALONE,
    turn: str | None = None,
) -> list[Row]:
    """One row: our model, trained for the rounds that are timed.

    Args:
        training: optimiser and clipping.
        model_config: what is trained.
        tokens: ``[B, T + 1]``.
        steps: a timed round.
        repeats: timed rounds, after one that warms up.
        budget_s: no further round begins after so many seconds.
        mesh: devices along each axis, as ``--mesh`` of the training scripts has it.
        turn: to be `taken` to compile and run; None: nothing else is under way.

    Raises:
        ConfigError: there are not as many devices, an axis does not divide what it cuts, or there
            is not as much memory.
    """
    run = RunConfig(TextTask(), model_config, training)
    make_model = functools.partial(initial_model, run)
    layout = layout_of(run, make_model, DeviceConfig(mesh=mesh))
    definition, shapes = shapes_of(run, make_model)
    require_memory_of_state(shapes)
    parameters = count_parameters(shapes.params)["total"]
    lying = lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding)
    state = jax.tree.map(lying, shapes, layout.shardings(shapes))
    step = make_train_step(definition, make_optimizer(training), make_schedule(training), 1, layout)
    batch = jax.jit(layout.cut_batch)(_batch_of(tokens))  # it stays where the step wants it
    began = time.perf_counter()
    options = compiler_options(layout.mesh, model_config.hidden_size)
    lowered = jax.jit(step, donate_argnums=0, compiler_options=options).lower(state, batch)
    lower_s = time.perf_counter() - began
    losses: list[jax.Array] = []

    def train() -> None:
        nonlocal state
        for _ in range(steps):
            state, metrics = compiled(state, batch)
            losses.append(metrics["loss"])
        jax.block_until_ready((state, losses))

    devices = list(layout.mesh.devices.flat)
    with taken(turn):
        state = first_state(run, make_model, layout)
        began = time.perf_counter()
        compiled = lowered.compile()
        compile_s = lower_s + time.perf_counter() - began
        entry = Compiled(train, compile_s, memory_of(compiled)["temp_bytes"], steps)
        time_in_turn({OURS: entry}, repeats, budget_s)
        on_devices = _on_devices(entry, devices)
    speed = 1e3 * batch.inputs.size / entry.summary()["median_ms"]
    return [
        {
            "implementation": OURS,
            "mesh": mesh,
            "parameters": parameters,
            **entry.summary(),
            **on_devices,
            "mfu": Throughput(len(devices), layout.device_kind, parameters).utilisation(speed),
            "moved_mib": moved_bytes(compiled) / 2**20,
            "first_losses": [float(loss) for loss in losses[:4]],
            "first_loss": float(losses[0]),
            "last_loss": float(losses[-1]),
            "steps": len(losses),
            "machine": machine(),
        }
    ]


def _batch_of(tokens: np.ndarray) -> Batch:
    """Every token is to be told from those before it."""
    inputs, targets = tokens[:, :-1], tokens[:, 1:]
    return Batch(inputs, targets, np.ones(inputs.shape, bool))


def _on_devices(entry: Compiled, devices: Sequence[jax.Device]) -> Row:
    """Times of the kernels of one device, and the most memory that any of them has taken."""
    # The profiler sees all devices, of which each runs the same.
    seen = kernel_times(entry, PROFILED_ROUNDS)
    kernels = by_kind({name: milliseconds / len(devices) for name, milliseconds in seen.items()})
    peaks = [(device.memory_stats() or {}).get("peak_bytes_in_use") for device in devices]
    return {
        "device_ms": sum(kernels.values()) or None,
        "kernels_ms": kernels,
        "devices": len(devices),
        "peak_mib": None if None in peaks else max(peaks) / 2**20,
    }


def moved_bytes(compiled: jax.stages.Compiled) -> float:
    """Bytes of all that a program's operations read and write, as XLA counts them.

    What an operation finds in a cache is counted too.
    """
    return compiled.cost_analysis().get("bytes accessed", 0.0)


def apart(function: Callable[..., Any], *arguments: Any) -> Any:
    """Calls a function in a process of its own, whose end frees what it held of a GPU."""
    with Processes(1) as pool:
        return pool.submit(function, *arguments).result()


class Case(NamedTuple):
    """What one process measures.

    Attributes:
        function: gives rows; ours takes a turn behind its arguments.
        name: of the implementation.
        arguments: of the function.
        known: joins each row.
    """

    function: Callable[..., list[Row]]
    name: str
    arguments: tuple[Any, ...]
    known: Row


def measured(cases: Sequence[Case], gpus: int = 1, at_once: int = 1) -> Iterator[list[Row]]:
    """The rows of each case, apart; what stops one becomes a row that says so.

    Args:
        cases: what is measured; on several GPUs each is given one of them.
        gpus: they are shared out to.
        at_once: under way on a GPU, which each compiles and runs for when it is its turn.

    Raises:
        ConfigError: fewer GPUs are visible.
    """
    if gpus * at_once == 1:
        yield from map(_measured, cases)
        return
    named = os.environ.get("CUDA_VISIBLE_DEVICES", ",".join(map(str, range(gpus))))
    visible = named.split(",")
    if len(visible) < gpus:
        raise ConfigError(f"gpus={gpus} is more than CUDA_VISIBLE_DEVICES={named!r} shows")
    with tempfile.TemporaryDirectory() as folder, ThreadPoolExecutor(gpus * at_once) as threads:
        under_way = []
        for place, case in enumerate(cases):
            gpu = visible[place % gpus] if gpus > 1 else None
            turn = f"{folder}/{place % gpus}" if case.name == OURS else None
            under_way.append(threads.submit(_measured, case, gpu, turn))
        for done in as_completed(under_way):
            yield done.result()


def _measured(case: Case, gpu: str | None = None, turn: str | None = None) -> list[Row]:
    arguments = (*case.arguments, turn) if turn else case.arguments
    try:
        if gpu is None:
            rows = apart(case.function, *arguments)
        else:
            rows = apart(_on_gpu, gpu, case.function, *arguments)
    except Exception as error:  # of another library, or of a GPU: any kind
        if not isinstance(error, ConfigError):
            traceback.print_exception(error)
        rows = [{"implementation": case.name, "error": one_line(error)}]
    return [row | case.known for row in rows]


def _on_gpu(gpu: str, function: Callable[..., Any], *arguments: Any) -> Any:
    """In a process that has not asked for GPUs yet, and then sees one."""
    os.environ["CUDA_VISIBLE_DEVICES"] = gpu
    return function(*arguments)


@contextlib.contextmanager
def taken(turn: str | None) -> Iterator[None]:
    """Inside no other process has the turn, a file's name."""
    if turn is None:
        yield
        return
    import fcntl

    with open(turn, "w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
