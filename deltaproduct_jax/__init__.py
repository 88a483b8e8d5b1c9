"""DeltaProduct in JAX: linear RNNs whose state transition is a product of Householder factors.

====================================  ==============================================================
:func:`delta_product`                 the recurrence on whole sequences, with its own backward pass
:func:`delta_product_step`            the same for one token
:func:`sharded_delta_product`         the same over the devices of a mesh
:func:`select_implementation`         which form of it runs where, and why
:class:`GatedDeltaProduct`            the layer, a Flax NNX module
:class:`DeltaProductCell`             the layer as a recurrent cell
:class:`DeltaProductState`            what layer and cell remember of the tokens so far
:class:`ModelConfig`                  what a model is made of
:class:`SequenceModel`                token ids to logits: tagger and language model in one
:func:`load_run`                      the model, configuration and step of a run directory
====================================  ==============================================================

What trains is in ``deltaproduct_jax.training``, what is learnt in ``deltaproduct_jax.tasks``.
"""

import os
from typing import TYPE_CHECKING

from deltaproduct_jax.layers import DeltaProductCell, DeltaProductState, GatedDeltaProduct
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.ops import (
    delta_product,
    delta_product_step,
    select_implementation,
    sharded_delta_product,
)

if TYPE_CHECKING:
    from deltaproduct_jax.training.runs import Run

__all__ = [
    "DeltaProductCell",
    "DeltaProductState",
    "GatedDeltaProduct",
    "ModelConfig",
    "SequenceModel",
    "__version__",
    "delta_product",
    "delta_product_step",
    "load_run",
    "select_implementation",
    "sharded_delta_product",
]

__version__ = "0.2.0"


def load_run(directory: "str | os.PathLike[str]", checkpoint: "str | int" = "best") -> "Run":
    """The model, configuration and step of a run directory, which is left as it is.

    A run that is going on may be read too, and so may one of version 0.1.

    >>> run = load_run("runs/s3")  # doctest: +SKIP
    >>> logits = run.model(run.config.task.batch(key, 4, 32).inputs)  # doctest: +SKIP

    Args:
        directory: the run directory, the ``--workdir`` or ``--bucket`` of an experiment.
        checkpoint: ``"best"`` (by validation accuracy), ``"newest"``, or the step of one.

    Returns:
        A named tuple ``(model, config, step)``: the :class:`SequenceModel` with the checkpoint's
        parameters, the ``deltaproduct_jax.training.config.RunConfig`` of the run, and the number of
        updates made.

    Raises:
        RunDirectoryError: ``directory`` is no run, has no such checkpoint yet, or cannot be read.
        ConfigError: ``checkpoint`` is not there; the text says which steps are.
    """
    # Orbax and the training loop are for those who read runs, not for every user of the op.
    from deltaproduct_jax.training import runs

    return runs.load_run(directory, checkpoint)
