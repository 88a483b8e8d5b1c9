"""A loss that counts a prefix of every sequence, which grows with the steps (``grow_from``)."""

import jax
import jax.numpy as jnp

from deltaproduct_jax.tasks.task import Batch
from deltaproduct_jax.training.config import RunConfig


def counted_part(config: RunConfig, batch: Batch, updates: jax.Array, length: int) -> Batch:
    """A batch of ``length`` tokens of which the next update counts what its step says.

    Args:
        config: of the run; without ``grow_from`` all counts.
        batch: arrays ``[B, T]``; T also has what the task puts before a sequence.
        updates: made before, which may be traced.
        length: tokens of a sequence.
    """
    if config.train.grow_from is None:
        return batch
    ahead = batch.mask.shape[1] - length
    counted = ahead + config.counted_at(updates + 1)
    is_counted = jnp.arange(ahead + length)[None, :] < counted
    return batch._replace(mask=batch.mask & is_counted)
