"""The optimiser: AdamW, its learning rate over time, and clipping of the gradient."""

from collections.abc import Callable
from typing import Any

import jax
import optax

from deltaproduct_jax.training.config import TrainConfig


def make_schedule(config: TrainConfig) -> optax.Schedule:
    """Learning rate as a function of the updates made before: warm-up, then cosine or constant."""
    steps_left = config.steps - config.warmup_steps
    if config.schedule == "constant" or not steps_left:
        after = optax.constant_schedule(config.learning_rate)
    else:
        after = optax.cosine_decay_schedule(
            config.learning_rate, steps_left, alpha=config.end_learning_rate / config.learning_rate
        )
    if not config.warmup_steps:
        return _promoting(after)
    warmup = optax.linear_schedule(0.0, config.learning_rate, config.warmup_steps)
    return _promoting(optax.join_schedules([warmup, after], [config.warmup_steps]))


def make_optimizer(config: TrainConfig) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101), every parameter decayed."""
    adamw = optax.adamw(
        make_schedule(config),
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=config.adam_eps,
        weight_decay=config.weight_decay,
    )
    if config.clip_norm is not None:
        adamw = optax.chain(optax.clip_by_global_norm(config.clip_norm), adamw)

    return optax.GradientTransformation(adamw.init, _promoting(adamw.update))


def _promoting(function: Callable) -> Callable:
    # Optax mixes counts and numbers, which JAX refuses where promotion of dtypes is strict.
    def promoted(*arguments: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments)

    return promoted
