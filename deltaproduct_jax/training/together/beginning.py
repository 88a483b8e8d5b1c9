"""What runs of the same model have in common before their first step, found once for all."""

import dataclasses
from collections.abc import Sequence
from functools import partial
from typing import Any, NamedTuple

import jax
import numpy as np
from flax import nnx

from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.parallel.layout import Layout
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.loop import initial_model
from deltaproduct_jax.training.start import layout_of, shapes_of
from deltaproduct_jax.training.step import ModelDefinition, TrainState


class Beginning(NamedTuple):
    """What runs of one model have in common.

    Attributes:
        definition: of the model.
        like: the shapes of a state, and that it lies on the first device.
        statics: what the model keeps beside parameters, by its place.
        layout: of a run that has one device.
    """

    definition: ModelDefinition
    like: TrainState
    statics: dict[str, Any]
    layout: Layout


def beginnings_of(configs: Sequence[RunConfig]) -> list[Beginning]:
    """Of each of the runs, which differ in their numbers alone."""
    found: dict[ModelConfig, Beginning] = {}
    for config in configs:
        if config.model not in found:
            found[config.model] = _beginning_of(config)
    return [found[config.model] for config in configs]


def _beginning_of(config: RunConfig) -> Beginning:
    make_model = partial(initial_model, config)
    layout = layout_of(config, make_model, DeviceConfig(mesh="data:1"))
    definition, shapes = shapes_of(config, make_model)
    device = jax.sharding.SingleDeviceSharding(layout.mesh.devices.flat[0])
    like = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=device), shapes)
    return Beginning(definition, like, statics_of(nnx.eval_shape(make_model)), layout)


def statics_of(model: nnx.Module) -> dict[str, Any]:
    """Numbers, texts and configurations that the parts of a model keep, by their place."""
    found: dict[str, Any] = {}
    for path, part in nnx.iter_modules(model):
        for name, value in vars(part).items():
            is_plain = isinstance(value, bool | int | float | str | tuple | np.generic)
            # The model's own configuration is read for what all runs of a program share.
            if is_plain or (path and dataclasses.is_dataclass(value)):
                found[".".join(map(str, (*path, name)))] = value
    return found
