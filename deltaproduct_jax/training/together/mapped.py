"""The steps of several runs as one program: mapped over the runs of a device, cut over devices.

Every array has the runs in front: ``[S, ...]`` for the ``S`` slots of a program, each of which
holds one run. A device of the mesh holds ``S / devices`` of them whole, and they exchange nothing.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deltaproduct_jax.parallel import layout
from deltaproduct_jax.training.compiled import CompiledByLength
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.measuring.memory import evaluation_sizes, training_sizes
from deltaproduct_jax.training.optimizer import Numbers, make_optimizer, make_schedule
from deltaproduct_jax.training.progress import Stopwatch
from deltaproduct_jax.training.skipping import Skipping
from deltaproduct_jax.training.source import Source
from deltaproduct_jax.training.step import (
    Metrics,
    ModelDefinition,
    Params,
    TrainState,
    counting_first,
    loss_and_correct,
    make_train_step,
)

RUNS = "runs"  # the mesh's only axis


def compiler_options(mesh: Mesh) -> dict[str, str] | None:
    """What keeps XLA for CPUs of jaxlib 0.10 from fusing a product with its sum.

    At rank 7, which mapping over runs reaches, it would write beside its buffers;
    tests/ops/test_mapped.py has the smallest such program.
    """
    is_old = tuple(map(int, jax.__version__.split(".")[:2])) < (0, 11)
    if mesh.devices.flat[0].platform != "cpu" or not is_old:
        return None
    return {"xla_cpu_experimental_ynn_fusion_type": ""}


def mesh_of_runs() -> Mesh:
    """All devices of this process, along the runs."""
    devices = np.array(layout.all_devices())
    return Mesh(devices, (RUNS,), axis_types=(AxisType.Auto,))


class MappedProgram:
    """The compiled steps for the slots of a group.

    Args:
        config: of any of the runs, which differ in their numbers alone.
        source: of any of them; it makes batches of what the steps are given.
        definition: of any of their models.
        mesh: over which the slots are cut.
        stopwatch: paused while something compiles.
    """

    def __init__(
        self,
        config: RunConfig,
        source: Source,
        definition: ModelDefinition,
        mesh: Mesh,
        stopwatch: Stopwatch,
    ):
        self._mesh = mesh
        train = config.train

        def train_one(
            length: int, state: TrainState, given: Any, numbers: Numbers, takes_part: jax.Array
        ) -> tuple[TrainState, Metrics]:
            batch = source.train_batch(given, state.step, length)
            if train.grow_from is not None:
                batch = counting_first(batch, config.counted_at(state.step + 1), length)
            optimizer, schedule = make_optimizer(train, numbers), make_schedule(train, numbers)
            update = make_train_step(
                definition,
                optimizer,
                schedule,
                train.accumulation_steps,
                settings=train.loss_settings,
                skipping=Skipping.of(train),
            )
            after, metrics = update(state, batch)
            keep = lambda new, old: jnp.where(takes_part, new, old)
            return jax.tree.map(keep, after, state), metrics

        def eval_one(length: int, params: Params, given: Any):
            batch = source.eval_batch(given, length)
            loss, correct_BT = loss_and_correct(
                definition, params, batch, settings=train.loss_settings
            )
            return loss, correct_BT, batch.mask

        options = {"compiler_options": compiler_options(mesh)}
        # (length, state, given [S, ...], numbers [S], takes_part [S]) -> (state, metrics [S])
        self.train_step = CompiledByLength(
            self._mapped(train_one),
            "the training step of all runs",
            training_sizes(config),
            stopwatch,
            donate=True,
            **options,
        )
        # (length, params, given [S, ...]) -> (loss [S], correct [S, B, T], mask [S, B, T])
        self.eval_step = CompiledByLength(
            self._mapped(eval_one),
            "the evaluation of all runs",
            evaluation_sizes(config),
            stopwatch,
            **options,
        )

    def _mapped(self, function: Callable) -> Callable:
        def mapped(length: int, *arrays: Any) -> Any:
            run = jax.vmap(partial(function, length))
            if self._mesh.size > 1:
                spec = PartitionSpec(RUNS)
                # In shard_map, so that kernels run on each device.
                run = jax.shard_map(
                    run, mesh=self._mesh, in_specs=spec, out_specs=spec, check_vma=False
                )
            return run(*arrays)

        return mapped


def slots_for(runs: int, mesh: Mesh) -> int:
    """Slots that so many runs take: as many on every device."""
    return -(-runs // mesh.size) * mesh.size


def put(tree: Any, mesh: Mesh) -> Any:
    """A tree of arrays ``[S, ...]`` where programs want it."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec(RUNS)))


def shapes_in_slots(tree: Any, slots: int, mesh: Mesh) -> Any:
    """Shapes of what one run has, in all slots."""
    sharding = NamedSharding(mesh, PartitionSpec(RUNS))
    return jax.tree.map(
        lambda x: jax.ShapeDtypeStruct((slots, *x.shape), x.dtype, sharding=sharding), tree
    )


def stacked(trees: Sequence[Any]) -> Any:
    """Trees of the same structure as one of arrays ``[S, ...]`` in the host's memory."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *jax.device_get(list(trees)))


def numbers_of(train: TrainConfig) -> Numbers:
    """The numbers of a run as a program takes them, float32."""
    return jax.tree.map(np.float32, Numbers.of(train))
