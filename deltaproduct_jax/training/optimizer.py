"""The optimiser: AdamW or Muon, its learning rate over time, and clipping of the gradient."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax

from deltaproduct_jax.ops.parts import placement
from deltaproduct_jax.training.config import TrainConfig

RMS_OF_ADAMW = 0.2  # root mean square of its updates over the learning rate
# Parameters with several axes that are no matrices, by the end of their paths: norms, biases,
# convolutions, RWKV-7's blends and bonus.
SPARED = ("scale", "bias", "weight", "k_k", "k_a", "r_k")


class Numbers(NamedTuple):
    """Fields of `TrainConfig`, by their names, that a compiled step may take as arguments.

    Attributes:
        learning_rate, end_learning_rate, weight_decay, adam_eps, clip_norm: of one run floats, of
            several float32 ``[runs]``; the last may be None.
    """

    learning_rate: Any
    end_learning_rate: Any
    weight_decay: Any
    adam_eps: Any
    clip_norm: Any

    @classmethod
    def of(cls, train: TrainConfig) -> "Numbers":
        """Those of a run."""
        return cls(*(getattr(train, name) for name in cls._fields))


def make_schedule(config: TrainConfig, numbers: Numbers | None = None) -> optax.Schedule:
    """Learning rate as a function of the updates made before: warm-up, then as ``schedule`` says.

    ``wsd`` stays at the peak until a last part of the steps, in which it falls linearly (Hu et al.,
    https://arxiv.org/abs/2404.06395). ``numbers``, which may be traced, take the place
    of the configuration's.
    """
    numbers = numbers or Numbers.of(config)
    peak, end = numbers.learning_rate, numbers.end_learning_rate
    steps_left = config.steps - config.warmup_steps
    if config.schedule == "constant" or not steps_left:
        after = optax.constant_schedule(peak)
    elif config.schedule == "wsd":
        stable = steps_left - config.decay_steps
        after = optax.linear_schedule(peak, end, config.decay_steps, transition_begin=stable)
    else:
        after = optax.cosine_decay_schedule(peak, steps_left, alpha=end / peak)
    if not config.warmup_steps:
        return _promoting(after)
    warmup = optax.linear_schedule(0.0, peak, config.warmup_steps)
    return _promoting(optax.join_schedules([warmup, after], [config.warmup_steps]))


def make_optimizer(
    config: TrainConfig, numbers: Numbers | None = None
) -> optax.GradientTransformation:
    """AdamW (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101), or Muon beside it.

    Muon (Jordan et al., https://kellerjordan.github.io/posts/muon) is for the matrices between
    hidden channels. Its updates have the size of AdamW's (Liu et al.,
    https://arxiv.org/abs/2502.16982), so that both take the same learning rate and decay.

    Moments and updates are in float32 at least, whatever the dtype of the parameters: in bfloat16
    the second moment would never decay, since .999 of a number is rounded to that number.
    Parameters in bfloat16 would lose the updates in the same way; ``step.init_state`` keeps them
    in float32. ``numbers``, which may be traced, take the place of the configuration's.
    """
    numbers = numbers or Numbers.of(config)
    inner = optax.adamw(
        make_schedule(config, numbers),
        b1=config.adam_b1,
        b2=config.adam_b2,
        eps=numbers.adam_eps,
        weight_decay=numbers.weight_decay,
        mask=_matrices if config.decayed == "matrices" else None,
    )
    if config.optimizer == "muon":
        muon = optax.contrib.muon(
            make_schedule(config, numbers),
            beta=config.muon_momentum,
            weight_decay=numbers.weight_decay,
            consistent_rms=RMS_OF_ADAMW,
        )
        inner = optax.partition({"muon": muon, "adamw": inner}, _optimizer_of_each)
    if numbers.clip_norm is not None:
        inner = optax.chain(_clipped(numbers.clip_norm), inner)

    def init(params: optax.Params) -> optax.OptState:
        return inner.init(at_least_float32(params))

    def update(
        grads: optax.Updates, state: optax.OptState, params: optax.Params | None = None
    ) -> tuple[optax.Updates, optax.OptState]:
        return inner.update(at_least_float32(grads), state, at_least_float32(params))

    return optax.GradientTransformation(init, _promoting(update))


def _keys(path: Any) -> list[str]:
    return [str(getattr(entry, "key", entry)) for entry in path]


def _matrices(params: Any) -> Any:
    """True for what maps channels: neither norms, biases and blends nor convolutions."""
    is_matrix = lambda path, x: x.ndim > 1 and _keys(path)[-1] not in SPARED
    return jax.tree_util.tree_map_with_path(is_matrix, params)


def _optimizer_of_each(params: Any) -> Any:
    """Muon for the kernels of linear maps; AdamW for embedding, head and all that is no matrix."""

    def of_leaf(path: Any, x: jax.Array) -> str:
        *before, name = _keys(path)
        is_hidden = x.ndim == 2 and name == "kernel" and "lm_head" not in before
        return "muon" if is_hidden else "adamw"

    return jax.tree_util.tree_map_with_path(of_leaf, params)


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


# Leaves of which one kernel sums what was summed by rows, and numbers of a leaf that it sums whole.
LEAVES_AT_ONCE, FEW = 64, 2**14


def global_norm(tree: Any) -> jax.Array:
    """Euclidean norm of all leaves together, in float32 whatever their dtype.

    On a GPU XLA sums a large leaf in two kernels, and of hundreds of leaves the second ones, each
    of a few numbers, take as long as the first. So rows are summed, and their sums together, but
    over a mesh, which may cut them.
    """
    squares = [jnp.square(leaf.astype(jnp.float32)) for leaf in jax.tree.leaves(tree)]
    if placement() is not None or not squares:
        return jnp.sqrt(sum(map(jnp.sum, squares), start=jnp.float32(0)))
    rows = [x.ravel() if x.size < FEW else jnp.sum(x, axis=-1).ravel() for x in squares]
    several = [rows[at : at + LEAVES_AT_ONCE] for at in range(0, len(rows), LEAVES_AT_ONCE)]
    # XLA would undo it: of a sum of what stands side by side it makes sums of each.
    joined = (jax.lax.optimization_barrier(jnp.concatenate(of_leaves)) for of_leaves in several)
    return jnp.sqrt(sum(map(jnp.sum, joined), start=jnp.float32(0)))


def _clipped(most: float | jax.Array) -> optax.GradientTransformation:
    """`optax.clip_by_global_norm`, by the norm that the step reports, which is found once."""

    def update(grads: optax.Updates, state: optax.OptState, params: Any = None) -> Any:
        del params
        norm = global_norm(grads)
        clipped = lambda g: jnp.where(norm < most, g, g / norm.astype(g.dtype) * most)
        return jax.tree.map(clipped, grads), state

    return optax.GradientTransformation(lambda _: optax.EmptyState(), update)
