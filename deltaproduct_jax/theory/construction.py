"""A construction: parameters of the real model, and the machine whose answers they must give."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import numpy as np
from flax import nnx

from deltaproduct_jax.models import ModelConfig, SequenceModel


@dataclasses.dataclass(frozen=True, eq=False)
class Construction:
    """Weights of a :class:`SequenceModel` that make it a finite machine.

    Attributes:
        name: which construction.
        group: the group, or the automaton, that it tracks.
        config: of the model, in float32.
        params: value of every parameter that is not zero, by its path with dots.
        bos: id of the token that every sequence begins with.
        letters: ids ``[L]`` of the tokens that may follow.
        step: ``[S, L]``, the machine's next state; it begins in state 0.
        answers: ``[S]``, the id that the model is to give in each state.
        answer_to_bos: the id that it is to give at the first token.
        ideal: ``[S, A]``, logits of the ids ``0..A-1`` in each state in exact arithmetic, but for
            a positive factor.
    """

    name: str
    group: str
    config: ModelConfig
    params: Mapping[str, np.ndarray]
    bos: int
    letters: np.ndarray
    step: np.ndarray
    answers: np.ndarray
    answer_to_bos: int
    ideal: np.ndarray

    def model(
        self,
        dtype: str = "float32",
        implementation: str | None = None,
        chunk_size: int | None = None,
    ) -> SequenceModel:
        """The model, parameters and computation in ``dtype``; ConfigError as for ModelConfig."""
        config = dataclasses.replace(
            self.config,
            dtype=dtype,
            param_dtype=dtype,
            implementation=implementation,
            chunk_size=chunk_size,
        )
        # Its shapes alone: nothing of what it would draw is kept.
        model = nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
        unused = set(self.params)
        for path, leaf in nnx.to_flat_state(nnx.state(model, nnx.Param)):
            name, old = ".".join(map(str, path)), leaf.get_value()
            unused.discard(name)
            # Scales of norms are the only parameters that no construction touches.
            untouched = np.ones(old.shape) if name.endswith("scale") else np.zeros(old.shape)
            new = self.params.get(name, untouched)
            leaf.set_value(jnp.asarray(np.reshape(new, old.shape), old.dtype))
        if unused:
            raise AssertionError(f"no such parameters: {sorted(unused)}")
        return model
