"""Steps that are skipped: their loss or gradient is not finite, or stands out from those before.

A skipped step leaves the parameters and the optimiser's state as they are, and is counted. The test
is of two numbers that a step computes anyway, and the choice between old and new is part of the
pass over the parameters that the optimiser makes.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from deltaproduct_jax.training.config import TrainConfig

# Mean and deviation are of about so many steps, and nothing is a spike before there were as many.
WINDOW = 100
# Of the mean: where the loss hardly varies at all, rounding is no spike.
LEAST_DEVIATION = 1e-3


class Skipped(NamedTuple):
    """What a run remembers of the steps that it skipped; part of its state.

    Attributes:
        total: steps skipped so far, int32.
        in_a_row: those of them behind which no step was made yet, int32.
        seen: steps that went into the two below, int32; 0 where spikes are not looked for.
        mean, variance: of loss and gradient norm in the last steps, ``[2]``, float32.
    """

    total: jax.Array
    in_a_row: jax.Array
    seen: jax.Array
    mean: jax.Array
    variance: jax.Array


def none_skipped() -> Skipped:
    """Before the first step."""
    counts = [jnp.zeros((), jnp.int32) for _ in range(3)]
    return Skipped(*counts, *(jnp.zeros((2,), jnp.float32) for _ in range(2)))


@dataclasses.dataclass(frozen=True)
class Skipping:
    """Which steps are skipped.

    Attributes:
        max_in_a_row: after so many in a row no step is made any more, finite or not, so that the
            run ends at the same step however seldom anybody looks.
        deviations: above the mean of the last steps, from which on a loss or gradient norm is a
            spike; None: no spike is looked for.
    """

    max_in_a_row: int = TrainConfig.max_skipped_steps
    deviations: float | None = TrainConfig.spike_deviations

    @classmethod
    def of(cls, train: TrainConfig) -> "Skipping":
        """As the settings of a run say."""
        return cls(train.max_skipped_steps, train.spike_deviations)

    def judge(
        self, skipped: Skipped, loss: jax.Array, grad_norm: jax.Array
    ) -> tuple[jax.Array, Skipped]:
        """Whether a step of this loss and gradient is made, a bool, and what is remembered then.

        Args:
            skipped: of the steps before.
            loss, grad_norm: of the whole batch, the same on every device.
        """
        now = jnp.stack([loss, grad_norm]).astype(jnp.float32)
        finite = jnp.all(jnp.isfinite(now))
        made = finite & (skipped.in_a_row < self.max_in_a_row)
        if self.deviations is not None:
            highest = self._highest(skipped)
            made &= jnp.all(now <= highest)
            # A spike counts as the highest that is none: should it be no spike but the new height,
            # mean and deviation reach it after some steps.
            noted = _with(skipped, jnp.minimum(now, highest))
            skipped = jax.tree.map(lambda new, old: jnp.where(finite, new, old), noted, skipped)
        return made, skipped._replace(
            total=jnp.where(made, skipped.total, skipped.total + 1),
            in_a_row=jnp.where(made, 0, skipped.in_a_row + 1),
        )

    def _highest(self, skipped: Skipped) -> jax.Array:
        """Loss and gradient norm up to which a step is made, infinite at first."""
        deviation = jnp.sqrt(skipped.variance)
        deviation = jnp.maximum(deviation, LEAST_DEVIATION * jnp.abs(skipped.mean))
        highest = skipped.mean + self.deviations * deviation
        return jnp.where(skipped.seen < WINDOW, jnp.inf, highest)


def _with(skipped: Skipped, now: jax.Array) -> Skipped:
    """Mean and variance with one more step: of all at first, of about the last `WINDOW` then."""
    share = 1 / jnp.minimum(skipped.seen + 1, WINDOW).astype(jnp.float32)
    difference = now - skipped.mean
    variance = (1 - share) * (skipped.variance + share * difference**2)
    mean = skipped.mean + share * difference
    return skipped._replace(seen=skipped.seen + 1, mean=mean, variance=variance)


def chosen(made: jax.Array, after: Any, before: Any) -> Any:
    """A tree of arrays after a step if it is made, else before it."""
    return jax.tree.map(lambda new, old: jnp.where(made, new, old), after, before)


def require_progress(
    numbers: Mapping[str, float], in_a_row: int, last: int, step: int, most: int
) -> None:
    """Raises FloatingPointError, in one line, if no step is made any more or parameters are lost.

    Args:
        numbers: metrics of a step.
        in_a_row: steps skipped up to it.
        last, step: of the record before and of this one.
        most: steps in a row that end a run.
    """
    remedy = "a lower learning_rate, a warm-up or clip_norm may help"
    if in_a_row >= most:
        first = step - in_a_row + 1
        raise FloatingPointError(
            f"training broke down in steps {first} to {first + most - 1}: "
            f"max_skipped_steps={most} were skipped in a row, as their loss or gradient was not "
            f"finite or a spike; {remedy}"
        )
    for name, value in numbers.items():
        if in_a_row == 0 and not math.isfinite(value):
            raise FloatingPointError(
                f"{name} is {value} at step {step}: training broke down in steps {last + 1} to "
                f"{step}; {remedy}"
            )
