"""What a cross entropy reads logits for, the largest array of a language model, once each way.

By kernels on a GPU and plainly elsewhere; with them there is no forward mode.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.blocks.dispatch import by_kernel_or_plain, flat, may_launch
from deltaproduct_jax.ops.kernels.triton import row_passes as of_triton
from deltaproduct_jax.ops.parts import placement

# Of fewer XLA's reductions take a row at a time, and a program for each is slower.
LEAST_VOCABULARY = 4096


def takes_kernel(logits: jax.Array) -> bool:
    """Whether a GPU runs `sums` of these by kernels."""
    return (
        may_launch(logits)
        and logits.size > 0
        and logits.shape[-1] >= LEAST_VOCABULARY
        and of_triton.unsupported(dtype=logits.dtype, D=1) is None
        and placement() is None
    )


@jax.custom_vjp
def sums(
    logits: jax.Array, targets: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The logarithm of the sum of exponentials, the target's logit, and correct answers.

    Args:
      logits: [B, T, V], of which `takes_kernel` says so.
      targets: ids [B, T].
      mask: [B, T] bool; where it is False all logits count as 0.

    Returns:
      Both in float32, and whether the target is the likeliest id, the smallest of several.
    """
    return _forward(None, logits, targets, mask)


def _sums_forward(logits, targets, mask):
    found = sums(logits, targets, mask)
    return found, (logits, targets, mask, found[0])


def _sums_backward(residuals, cotangents):
    dlog_sum, dof_target, _ = cotangents
    return *_back(None, *residuals, dlog_sum, dof_target), None, None


sums.defvjp(_sums_forward, _sums_backward)


def plain(logits, targets, mask):
    """`sums` as JAX has it, which can be differentiated either way."""
    wide = widened(logits, mask)
    highest = jnp.max(wide, axis=-1)
    # Of an infinite highest logit the difference would be NaN.
    shift = jnp.where(jnp.isfinite(highest), highest, 0)
    log_sum = shift + jnp.log(jnp.sum(jnp.exp(wide - shift[..., None]), axis=-1))
    targets = targets[..., None]
    target = jnp.take_along_axis(logits, targets, axis=-1)
    behind = (logits < target) | ((logits == target) & (ids(logits) >= targets))
    of_target = jnp.where(mask, target[..., 0].astype(jnp.float32), 0)
    return log_sum, of_target, jnp.all(behind, axis=-1)


def plain_back(logits, targets, mask, log_sum, dlog_sum, dof_target):
    """The cotangent of the logits, in their dtype."""
    probabilities = jnp.exp(widened(logits, mask) - log_sum[..., None])
    of_target = jnp.where(ids(logits) == targets[..., None], dof_target[..., None], 0)
    dlogits = probabilities * dlog_sum[..., None] + of_target
    return (jnp.where(mask[..., None], dlogits, 0).astype(logits.dtype),)


def widened(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """In float32, and 0 where the mask is False."""
    return jnp.where(mask[..., None], logits.astype(jnp.float32), 0)


def ids(logits: jax.Array) -> jax.Array:
    """The id of each."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)


def _by_kernel(logits, *of_tokens):
    arrays = flat(logits), *(x.reshape(-1) for x in of_tokens)
    return tuple(x.reshape(logits.shape[:-1]) for x in of_triton.logit_sums(*arrays))


def _back_by_kernel(logits, *of_tokens):
    arrays = flat(logits), *(x.reshape(-1) for x in of_tokens)
    return (of_triton.logit_back(*arrays).reshape(logits.shape),)


# Never over a mesh, so that layouts are not asked for.
_forward = by_kernel_or_plain(_by_kernel, plain, (), ())
_back = by_kernel_or_plain(_back_by_kernel, plain_back, (), ())
