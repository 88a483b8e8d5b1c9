"""Reads a run directory back: its configuration, and the model of one of its checkpoints."""

import os
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.files import AnyPath, any_path, given_by, is_there, named, read_json
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.training.checkpoints import Checkpoints
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.records import CHECKPOINTS, CONFIG, ConfigFile, errors_of
from deltaproduct_jax.training.start import shapes_of
from deltaproduct_jax.training.step import ModelDefinition, TrainState


class Run(NamedTuple):
    """What :func:`deltaproduct_jax.load_run` returns.

    Attributes:
        model: the model with the checkpoint's parameters.
        config: the run's configuration: its task, model and training.
        step: the step of the checkpoint, which is the number of updates made.
    """

    model: SequenceModel
    config: RunConfig
    step: int


def load_run(directory: str | os.PathLike[str], checkpoint: str | int = "best") -> Run:
    """As :func:`deltaproduct_jax.load_run`, which imports this module when it is called."""
    path = any_path(directory, "directory")
    with given_by("directory", path):
        return restore_run(read_config(path), path, checkpoint)


def restore_run(config: RunConfig, directory: AnyPath, checkpoint: str | int) -> Run:
    """The run in ``directory``, whose configuration is known; see :func:`load_run`."""
    if not is_there(directory / CHECKPOINTS):
        raise RunDirectoryError(f"{named(directory)} has no {CHECKPOINTS} yet")
    definition, like = _shapes_of(config)
    with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
        step = _step_of(checkpoint, checkpoints, directory)
        params = checkpoints.restore(step, like=like).params
    return Run(definition.with_params(params), config, step)


def tokenizer_learnt(directory: AnyPath, step: int) -> str | None:
    """`data.tokenizer.identity` of what made the ids of a checkpoint's text; None without one."""
    with Checkpoints(directory / CHECKPOINTS, read_only=True) as checkpoints:
        return (checkpoints.data(step) or {}).get("tokenizer")


def read_config(directory: AnyPath) -> RunConfig:
    """The configuration of the run in ``directory``.

    Raises:
        RunDirectoryError: there is no run, or its configuration cannot be read or understood.
    """
    path = directory / CONFIG
    if not is_there(path):
        raise RunDirectoryError(f"{named(directory)} is no run directory: it has no {CONFIG}")
    with errors_of(path):
        return RunConfig.from_dict(read_json(path, ConfigFile))


def _shapes_of(config: RunConfig) -> tuple[ModelDefinition, TrainState]:
    """The model's description and the shapes of a checkpoint, without drawing parameters."""
    make_model = lambda: SequenceModel(config.model, rngs=nnx.Rngs(0))
    definition, state = shapes_of(config, make_model)
    # A checkpoint names the devices that it was written on; here it is to lie where arrays do.
    here = jnp.zeros(()).sharding
    return definition, jax.tree.map(
        lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=here), state
    )


def _step_of(checkpoint: str | int, checkpoints: Checkpoints, directory: AnyPath) -> int:
    steps = checkpoints.steps()
    if not steps:
        raise RunDirectoryError(
            f"{named(directory)} has no checkpoint yet that was written to its end"
        )
    if checkpoint == "best":
        best = checkpoints.best()
        if best is None:
            raise RunDirectoryError(
                f"{named(directory)} has no checkpoint that was evaluated yet, so none is the "
                "best; give checkpoint='newest'"
            )
        return best
    if checkpoint == "newest":
        return steps[-1]
    if isinstance(checkpoint, bool | float) or checkpoint not in steps:  # True is 1, 4.0 is 4
        raise ConfigError(
            f"checkpoint={checkpoint!r} is not in {directory}; it may be 'best', 'newest', or a "
            f"step among {', '.join(map(str, steps))}"
        )
    return int(checkpoint)
