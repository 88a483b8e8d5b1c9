"""What a run starts from: where its arrays lie, the state before its first step, its keys."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
from flax import nnx

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.parallel import processes
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.parallel.drawing import laid_out
from deltaproduct_jax.parallel.layout import Layout
from deltaproduct_jax.settings import make_key
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.optimizer import make_optimizer
from deltaproduct_jax.training.step import ModelDefinition, TrainState, init_state, split_model

MakeModel = Callable[[], nnx.Module]


def layout_of(
    config: RunConfig,
    make_model: MakeModel,
    devices: DeviceConfig,
    chips: Sequence[jax.Device] | None = None,
) -> Layout:
    """The mesh of a run, and what lies where on it.

    Args:
        config: of the run.
        make_model: its model before the first step; only its shapes are looked at.
        devices: how many lie along each axis of the mesh.
        chips: the devices; None is all that JAX finds. Those of a topology may not be there.

    Raises:
        ConfigError: there are not as many devices, or an axis does not divide what it cuts.
    """
    layout = Layout.of_model(devices, make_model, chips)
    train, model = config.train, config.model
    layout.require_divisible("batch", batch_size=train.batch_size)
    layout.require_divisible("batch", eval_batch_size=train.eval_batch_size)
    if (train.batch_size // train.accumulation_steps) % layout.devices_of("batch"):
        rows = train.batch_size // train.accumulation_steps
        layout.require_divisible("batch", **{"batch_size over accumulation_steps": rows})
    heads = ("num_heads", "num_v_heads", "attention_heads")
    layout.require_divisible("heads", **{name: getattr(model, name) for name in heads})
    layout.require_divisible("mlp", intermediate_size=model.mlp_width)
    layout.require_divisible("embed", hidden_size=model.hidden_size)
    return layout


def require_same_run(config: RunConfig, devices: DeviceConfig, **others: Any) -> None:
    """Raises ConfigError unless all processes are to train the same, over the same mesh.

    Args:
        config: of the run.
        devices: where it runs.
        **others: what else all must have been given, or found, alike; ``resume_from`` by one alone.
    """
    sections = config.to_dict().items()
    fields = {
        name: value
        for section, content in sections
        for name, value in (content if isinstance(content, dict) else {section: content}).items()
    }
    of_devices = {name: getattr(devices, name) for name in ("mesh", "dcn_mesh")}
    processes.require_same({**fields, **of_devices, **others})
    if others.get("resume_from") is not None and jax.process_count() > 1:
        raise ConfigError(
            f"resume_from={others['resume_from']} is for a single process; go on with one, and "
            f"then with {jax.process_count()}"
        )


def shapes_of(config: RunConfig, make_model: MakeModel) -> tuple[ModelDefinition, TrainState]:
    """The model's description and the shapes of its state, without drawing parameters."""
    definition, params = split_model(nnx.eval_shape(make_model))
    optimizer = make_optimizer(config.train)
    return definition, jax.eval_shape(lambda params: init_state(params, optimizer), params)


def first_state(config: RunConfig, make_model: MakeModel, layout: Layout) -> TrainState:
    """The state before the first step, the same over every mesh, where no device holds it all."""

    def draw() -> TrainState:
        _, params = split_model(make_model())
        return init_state(params, make_optimizer(config.train))

    if layout.is_one:
        return draw()
    return laid_out(draw, layout.shardings(jax.eval_shape(draw)))


def data_key(config: RunConfig, layout: Layout) -> jax.Array:
    """The key that all batches are drawn from, the same on every device."""
    if layout.is_one:
        return make_key(config.seeds()["data"])
    return jax.jit(lambda: make_key(config.seeds()["data"]), out_shardings=layout.whole)()
