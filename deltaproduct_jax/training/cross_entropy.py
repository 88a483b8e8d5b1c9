"""Cross entropy of logits that are read as seldom as can be.

Logits are the largest array of a language model by far, so what is derived from them must not
become another such array in float32. Here two reductions read them on the way forward, and the way
back reads them once more and writes their cotangent in their own dtype.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp


class OfTokens(NamedTuple):
    """What is known of every token's logits.

    Attributes:
        cross_entropy: of the target, in nats, [B, T] float32.
        log_sum: the logarithm of the softmax's denominator, [B, T] float32.
        correct: whether the target is the likeliest id, the smallest of several, [B, T] bool; False
            where a logit is NaN.
    """

    cross_entropy: jax.Array
    log_sum: jax.Array
    correct: jax.Array


def of_tokens(logits: jax.Array, targets: jax.Array, mask: jax.Array) -> OfTokens:
    """Cross entropy, logarithm of the denominator, and correct answers, computed in float32.

    Args:
        logits: [..., V], of any floating dtype.
        targets: ids [...].
        mask: [...] bool; where it is False all logits count as 0, whatever they are, and their
            cotangent is 0.
    """
    log_sum, of_target = _sums(logits, targets, mask)
    fixed, targets = jax.lax.stop_gradient(logits), targets[..., None]
    target = jnp.take_along_axis(fixed, targets, axis=-1)
    behind = (fixed < target) | ((fixed == target) & (_ids(fixed) >= targets))
    return OfTokens(log_sum - of_target, log_sum, jnp.all(behind, axis=-1))


@jax.custom_jvp
def _sums(logits, targets, mask):
    """The logarithm of the sum of exponentials, and the target's logit."""
    wide = _wide(logits, mask)
    highest = jnp.max(wide, axis=-1)
    # Of an infinite highest logit the difference would be NaN.
    shift = jnp.where(jnp.isfinite(highest), highest, 0)
    log_sum = shift + jnp.log(jnp.sum(jnp.exp(wide - shift[..., None]), axis=-1))
    of_target = jnp.take_along_axis(logits, targets[..., None], axis=-1)[..., 0]
    return log_sum, jnp.where(mask, of_target.astype(jnp.float32), 0)


@_sums.defjvp
def _sums_jvp(primals, tangents):
    logits, targets, mask = primals
    log_sum, of_target = _sums(*primals)
    # Of the probabilities nothing is kept for the way back: they are as large as the logits.
    pushed = jax.checkpoint(_pushed, prevent_cse=False)(tangents[0], logits, targets, mask, log_sum)
    return (log_sum, of_target), pushed


def _pushed(tangent, logits, targets, mask, log_sum):
    tangent = _wide(tangent, mask)
    probabilities = jnp.exp(_wide(logits, mask) - log_sum[..., None])
    is_target = _ids(logits) == targets[..., None]
    return (
        jnp.sum(probabilities * tangent, axis=-1),
        jnp.sum(jnp.where(is_target, tangent, 0), axis=-1),
    )


def _wide(logits, mask):
    return jnp.where(mask[..., None], logits.astype(jnp.float32), 0)


def _ids(logits):
    return jax.lax.broadcasted_iota(jnp.int32, logits.shape, logits.ndim - 1)
