"""The step that a run jits, with shapes in the place of arrays, over devices that may not be there.

Dimension key: ``B`` sequences, ``T`` positions.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from deltaproduct_jax.compilers import tpu
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.parallel.layout import Layout
from deltaproduct_jax.parallel.names import MESH_AXES
from deltaproduct_jax.tasks.task import Batch
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.loop import initial_model
from deltaproduct_jax.training.start import layout_of, shapes_of
from deltaproduct_jax.training.step import TrainState, step_of_run


class StepProgram(NamedTuple):
    """A run's step, traced.

    Attributes:
        traced: what ``jax.jit(...).trace`` gives.
        state: shapes of the state and where they lie.
        batch: shapes of what a stream gives the step.
        layout: of the mesh.
    """

    traced: jax.stages.Traced
    state: TrainState
    batch: Batch
    layout: Layout

    def lower(self) -> jax.stages.Lowered:
        """For the devices of the mesh."""
        with tpu.lowering_for(self.layout.mesh):
            return self.traced.lower()


def step_program(
    config: RunConfig, devices: DeviceConfig, chips: Sequence[jax.Device] | None = None
) -> StepProgram:
    """Traces the step of a run on text; no array is made.

    Args:
        config: the run.
        devices: its mesh.
        chips: the devices; None is all that JAX finds.

    Raises:
        ConfigError: there are not as many devices, or an axis does not divide what it cuts.
    """
    make_model = functools.partial(initial_model, config)
    layout = layout_of(config, make_model, devices, chips)
    definition, shapes = shapes_of(config, make_model)
    state = _lying(shapes, layout.shardings(shapes))
    length = config.length_at(1)
    rows = jax.ShapeDtypeStruct((config.train.batch_size, length), jnp.int32)
    ids = rows if config.task.packing == "first_fit" else None
    batch = Batch(rows, rows, jax.ShapeDtypeStruct(rows.shape, jnp.bool_), ids)
    cut = NamedSharding(layout.mesh, PartitionSpec(MESH_AXES["batch"]))
    batch = _lying(batch, jax.tree.map(lambda _: cut, batch))
    step = step_of_run(config, definition, layout, _as_it_is)
    with tpu.lowering_for(layout.mesh):
        jitted = jax.jit(functools.partial(step, length), donate_argnums=0)
        return StepProgram(jitted.trace(state, batch), state, batch, layout)


def _as_it_is(given: Batch, step: jax.Array, length: int) -> Batch:
    """What a stream gives is the batch."""
    del step, length
    return given


def _lying(tree: Any, shardings: Any) -> Any:
    return jax.tree.map(
        lambda x, sharding: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding),
        tree,
        shardings,
    )


def bytes_on_a_device(tree: Any) -> int:
    """Of shapes that lie somewhere, without what a device adds to fill its tiles."""
    return sum(
        math.prod(x.sharding.shard_shape(x.shape)) * x.dtype.itemsize for x in jax.tree.leaves(tree)
    )
