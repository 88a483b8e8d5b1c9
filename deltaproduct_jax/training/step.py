"""One step of training and one of evaluation, as pure functions of arrays.

The model is split once: ``definition`` is static, ``params`` is a plain nested dict of arrays.
What is trained is in float32 at least, whatever the model holds: in bfloat16 a weight near 1 stays
where it is when 1e-3 is added to it. The model computes with these numbers rounded to its dtypes.

Dimension key: ``B`` sequences, ``T`` positions, ``A`` parts of an accumulated batch.
"""

import contextlib
import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from flax import nnx

from deltaproduct_jax.parallel.layout import Layout
from deltaproduct_jax.tasks.task import Batch
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.loss import PLAIN, Losses, LossSettings, losses_of
from deltaproduct_jax.training.optimizer import (
    at_least_float32,
    global_norm,
    make_optimizer,
    make_schedule,
)
from deltaproduct_jax.training.skipping import Skipped, Skipping, chosen, none_skipped

Params = dict[str, Any]
Metrics = dict[str, jax.Array]


class TrainState(NamedTuple):
    """All that changes from step to step, and all that a checkpoint holds.

    Attributes:
        step: steps behind it, int32, those that were skipped among them.
        params: parameters, in float32 at least.
        opt_state: the optimiser's state, its moments in float32 at least.
        skipped: which steps made no update. It comes last: all zero it adds nothing to the
            checksum of a checkpoint, and older ones have none.
    """

    step: jax.Array
    params: Params
    opt_state: optax.OptState
    skipped: Skipped


@dataclasses.dataclass(frozen=True)
class ModelDefinition:
    """A model without its parameters: their structure, and the dtypes in which it holds them."""

    graphdef: nnx.GraphDef
    dtypes: dict[str, Any]

    def with_params(self, params: Params) -> nnx.Module:
        """The model with these parameters, rounded to its dtypes."""
        rounded = jax.tree.map(lambda x, dtype: x.astype(dtype), params, self.dtypes)
        return nnx.merge(self.graphdef, rounded)


def split_model(model: nnx.Module) -> tuple[ModelDefinition, Params]:
    """The model as a static description and a plain nested dict of its parameters."""
    graphdef, state = nnx.split(model, nnx.Param)
    params = nnx.to_pure_dict(state)
    return ModelDefinition(graphdef, jax.tree.map(lambda x: x.dtype, params)), params


def init_state(params: Params, optimizer: optax.GradientTransformation) -> TrainState:
    """The state before the first step; it holds the parameters in float32 at least."""
    params = at_least_float32(params)
    step = jnp.zeros((), dtype=jnp.int32)
    # Of 64 bits under jax_enable_x64, a number of Muon's would be none that others can read.
    wide = any(x.dtype == jnp.float64 for x in jax.tree.leaves(params))
    narrow = lambda x: x.astype(jnp.float32) if x.dtype == jnp.float64 and not wide else x
    opt_state = jax.tree.map(narrow, optimizer.init(params))
    return TrainState(step, params, opt_state, none_skipped())


def counting_first(batch: Batch, counted: jax.Array, length: int) -> Batch:
    """A batch of ``length`` tokens of which the first ``counted``, which may be traced, count.

    What a task puts before a sequence counts as well.
    """
    ahead = batch.mask.shape[1] - length
    is_counted = jnp.arange(ahead + length)[None, :] < ahead + counted
    return batch._replace(mask=batch.mask & is_counted)


def losses_of_params(
    definition: ModelDefinition,
    params: Params,
    batch: Batch,
    layout: Layout | None = None,
    settings: LossSettings = PLAIN,
) -> Losses:
    """The losses of a model with ``params``; with a ``layout`` it runs over its mesh."""
    if layout is None:
        return losses_of(definition.with_params(params), batch, settings)
    with layout.placed():
        model = definition.with_params(layout.gather(params))
        return losses_of(model, batch, settings, layout)


def loss_and_correct(
    definition: ModelDefinition,
    params: Params,
    batch: Batch,
    layout: Layout | None = None,
    settings: LossSettings = PLAIN,
) -> tuple[jax.Array, jax.Array]:
    """Cross-entropy summed over the counted positions, in float32, and correct answers ``[B, T]``.

    The answer at a position is the likeliest token, the smallest id where several are.
    """
    losses = losses_of_params(definition, params, batch, layout, settings._replace(z_loss=0.0))
    return losses.objective, losses.correct


Gradients = Callable[[Params, Batch, jax.Array], tuple[Params, Metrics]]


def gradients_of(
    definition: ModelDefinition, layout: Layout | None, settings: LossSettings
) -> Gradients:
    """(params, batch, count) -> gradients and metrics of a batch, both divided by ``count``."""

    def gradients(params: Params, batch: Batch, count: jax.Array) -> tuple[Params, Metrics]:
        def loss_fn(params: Params) -> tuple[jax.Array, Losses]:
            losses = losses_of_params(definition, params, batch, layout, settings)
            return losses.objective / count, losses

        grads, losses = jax.grad(loss_fn, has_aux=True)(params)
        correct = jnp.sum(losses.correct, where=batch.mask, dtype=jnp.float32)
        metrics = {"loss": losses.cross_entropy / count, "accuracy": correct / count}
        return grads, metrics | ({"z_loss": losses.z / count} if settings.z_loss else {})

    return gradients


def accumulated(gradients: Gradients, parts: int, layout: Layout | None) -> Gradients:
    """The same of so many parts of a batch, one after another."""

    def of_parts(params: Params, batch: Batch, count: jax.Array) -> tuple[Params, Metrics]:
        parts_ABT = jax.tree.map(lambda x: x.reshape(parts, -1, *x.shape[1:]), batch)
        if layout is not None:
            parts_ABT = layout.cut_batch(parts_ABT, parts=True)

        def add_part(total: Any, part: Batch) -> tuple[Any, None]:
            return jax.tree.map(jnp.add, total, gradients(params, part, count)), None

        first = jax.tree.map(lambda x: x[0], parts_ABT)
        shapes = jax.eval_shape(gradients, params, first, count)
        zeros = jax.tree.map(lambda x: jnp.zeros(x.shape, x.dtype), shapes)
        return jax.lax.scan(add_part, zeros, parts_ABT)[0]

    return of_parts


def make_train_step(
    definition: ModelDefinition,
    optimizer: optax.GradientTransformation,
    schedule: optax.Schedule,
    accumulation_steps: int,
    layout: Layout | None = None,
    settings: LossSettings = PLAIN,
    skipping: Skipping | None = None,
) -> Callable[[TrainState, Batch], tuple[TrainState, Metrics]]:
    """A pure function (state, batch) -> (state, metrics), to be jitted by the caller.

    With ``accumulation_steps`` A > 1 the batch is cut into A parts whose gradients are added one
    after another: the same update to rounding, with the activations of one part in memory.

    With ``layout`` it is to be jitted on a state and a batch that lie as the layout says, and the
    new state lies so again. ``settings`` say what is minimised, ``skipping`` which steps change
    nothing; None is the default.
    """
    skipping = skipping or Skipping()
    compute = gradients_of(definition, layout, settings)
    if accumulation_steps > 1:
        compute = accumulated(compute, accumulation_steps, layout)

    def train_step(state: TrainState, batch: Batch) -> tuple[TrainState, Metrics]:
        count = jnp.sum(batch.mask, dtype=jnp.float32)
        grads, metrics = compute(state.params, batch, count)
        if layout is not None:
            grads = layout.pin(grads)
        with contextlib.nullcontext() if layout is None else layout.placed():
            grad_norm = global_norm(grads)
            made, skipped = skipping.judge(state.skipped, metrics["loss"], grad_norm)
            updates, opt_state = optimizer.update(grads, state.opt_state, state.params)
            params = optax.apply_updates(state.params, updates)
            params, opt_state = chosen(made, (params, opt_state), (state.params, state.opt_state))
            param_norm, update_norm = global_norm(params), global_norm(updates)
        updates_before = state.step - state.skipped.total  # what the optimiser counts
        metrics |= {
            "grad_norm": grad_norm,
            "param_norm": param_norm,
            "update_norm": jnp.where(made, update_norm, 0),
            "learning_rate": jnp.asarray(schedule(updates_before), dtype=jnp.float32),
            "skipped_steps": skipped.total,
            "skipped_in_a_row": skipped.in_a_row,
        }
        after = TrainState(state.step + 1, params, opt_state, skipped)
        if layout is None:
            return after, metrics
        return layout.pin(after), layout.everywhere(metrics)

    return train_step


def step_of_run(
    config: RunConfig,
    definition: ModelDefinition,
    layout: Layout,
    read: Callable[[Any, jax.Array, int], Batch],
) -> Callable[[int, TrainState, Any], tuple[TrainState, Metrics]]:
    """The step that a run jits: (length, state, given) -> (state, metrics).

    Args:
        config: of the run.
        definition: of its model.
        layout: of its mesh.
        read: makes the batch of what the step is given, the updates behind it and the length, as
            `source.Source.train_batch` does.
    """
    train = config.train
    update = make_train_step(
        definition,
        make_optimizer(train),
        make_schedule(train),
        train.accumulation_steps,
        layout,
        train.loss_settings,
        Skipping.of(train),
    )

    def train_step(length: int, state: TrainState, given: Any) -> tuple[TrainState, Metrics]:
        batch = read(given, state.step, length)
        if train.grow_from is not None:
            batch = counting_first(batch, config.counted_at(state.step + 1), length)
        return update(state, layout.cut_batch(batch))

    return train_step
