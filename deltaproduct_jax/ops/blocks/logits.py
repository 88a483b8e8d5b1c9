"""What a cross entropy reads logits for, the largest array of a language model, once on a GPU.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops import kernels
from deltaproduct_jax.ops.kernels.triton import row_passes as of_triton
from deltaproduct_jax.ops.parts import explicit_names, placement

# Of fewer XLA's reductions take a row at a time, and a program for each is slower.
LEAST_VOCABULARY = 4096


def sums(
    logits: jax.Array, targets: jax.Array, mask: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """The logarithm of the sum of exponentials, the target's logit, and correct answers.

    By a kernel on a GPU that has whole arrays; it is not to be differentiated.

    Args:
      logits: [..., V], of any floating dtype.
      targets: ids [...].
      mask: [...] bool; where it is False all logits count as 0.

    Returns:
      Both in float32, and whether the target is the likeliest id, the smallest of several.
    """
    runs = {"cuda": _by_kernel} if takes_kernel(logits) else {}
    return jax.lax.platform_dependent(logits, targets, mask, **runs, default=_plain)


def takes_kernel(logits: jax.Array) -> bool:
    """Whether a GPU runs the kernel for these."""
    return (
        kernels.is_installed("triton")
        and all(isinstance(size, int) for size in logits.shape)
        and logits.size > 0
        and logits.shape[-1] >= LEAST_VOCABULARY
        and of_triton.unsupported(dtype=logits.dtype, D=1) is None
        and placement() is None
        and not any(explicit_names(logits))
    )


@jax.custom_batching.custom_vmap
def _by_kernel(logits, targets, mask):
    found = of_triton.logit_sums(
        logits.reshape(-1, logits.shape[-1]), targets.reshape(-1), mask.reshape(-1)
    )
    return tuple(x.reshape(targets.shape) for x in found)


@_by_kernel.def_vmap
def _mapped(axis_size, in_batched, *arrays):
    joined = (
        x if batched else jnp.broadcast_to(x, (axis_size, *x.shape))
        for x, batched in zip(arrays, in_batched, strict=True)
    )
    return _by_kernel(*joined), (True,) * 3


def _plain(logits, targets, mask):
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


def widened(logits: jax.Array, mask: jax.Array) -> jax.Array:
    """In float32, and 0 where the mask is False."""
    return jnp.where(mask[..., None], logits.astype(jnp.float32), 0)


def ids(logits: jax.Array) -> jax.Array:
    """The id of each."""
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
