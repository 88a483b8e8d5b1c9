"""The optimiser: AdamW, its learning rate over time, and clipping of the gradient."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax

from deltaproduct_jax.training.config import TrainConfig
from deltaproduct_jax.training.together.numbers import Numbers


def make_schedule(config: TrainConfig, numbers: Numbers | None = None) -> optax.Schedule:
    """Learning rate as a function of the updates made before: warm-up, then cosine or constant.

    ``numbers``, which may be traced, take the place of the configuration's.
    """
    numbers = numbers or Numbers.of(config)
    peak, end = numbers.learning_rate, numbers.end_learning_rate
    steps_left = config.steps - config.warmup_steps
    if config.schedule == "constant" or not steps_left:
        after = optax.constant_schedule(peak)
    else:
        after = optax.cosine_decay_schedule(peak, steps_left, alpha=end / peak)
    if not config.warmup_steps:
        return _promoting(after)
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return _promoting(optax.join_schedules([warmup, after], [config.warmup_steps]))


def make_optimizer(
    config: TrainConfig, numbers: Numbers | None = None
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101), every parameter decayed.

    Moments and updates are in float32 at least, whatever the dtype of the parameters: in bfloat16
    the second moment would never decay, since .999 of a number is rounded to that number.
    Parameters in bfloat16 would lose the updates in the same way; ``step.init_state`` keeps them
    in float32. ``numbers``, which may be traced, take the place of the configuration's.
    """
    numbers = numbers or Numbers.of(config)
    adamw = optax.adamw(
        make_schedule(config, numbers),
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=numbers.adam_eps,
        weight_decay=numbers.weight_decay,
    )
    if numbers.clip_norm is not None:
        adamw = optax.chain(optax.clip_by_global_norm(numbers.clip_norm), adamw)

    def init(params: optax.Params) -> optax.OptState:
        return adamw.init(at_least_float32(params))

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return adamw.update(at_least_float32(grads), state, at_least_float32(params))

    return optax.GradientTransformation(init, _promoting(update))


def at_least_float32(tree: Any) -> Any:
    """A tree of arrays with those of narrower floating dtypes in float32."""

    def widen(x: jax.Array) -> jax.Array:
        narrow = jnp.issubdtype(x.dtype, jnp.floating) and jnp.finfo(x.dtype).bits < 32
        return x.astype(jnp.float32) if narrow else x

    return jax.tree.map(widen, tree)


def _promoting(function: Callable) -> Callable:
    # Optax mixes counts and numbers, which JAX refuses where promotion of dtypes is strict.
    def promoted(*arguments: Any) -> Any:
        with jax.numpy_dtype_promotion("standard"):
            return function(*arguments)

    return promoted
