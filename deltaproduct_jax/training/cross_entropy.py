"""Cross entropy of logits that are read as seldom as can be.

Logits are the largest array of a language model by far, so what is derived from them must not
become another such array in float32. Here two reductions read them on the way forward, or a GPU's
kernel once (`ops/blocks/logits.py`), and the way back reads them once more and writes their
cotangent in their own dtype.

Shape suffixes: B batch, T tokens, V vocabulary.
"""

from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops.blocks import logits as of_logits
from deltaproduct_jax.ops.containment import nan_where


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


def of_tokens(
    logits: jax.Array, targets: jax.Array, mask: jax.Array, reached: jax.Array | None = None
) -> OfTokens:
    """Cross entropy, logarithm of the denominator, and correct answers, computed in float32.

    Args:
        logits: [..., V], of any floating dtype.
        targets: ids [...].
        mask: [...] bool; where it is False all logits count as 0, whatever they are, and their
            cotangent is 0.
        reached: [...] bool or None; where it is True, and the mask too, logits count as NaN.
    """
    sums = of_logits.sums if of_logits.takes_kernel(logits) else _sums
    return of_sums(sums(logits, targets, mask), mask, reached)


def of_sums(
    sums: tuple[jax.Array, jax.Array, jax.Array], mask: jax.Array, reached: jax.Array | None
) -> OfTokens:
    """The same of what `ops.blocks.logits.sums` returns."""
    log_sum, of_target, correct = sums
    if reached is not None:
        correct &= ~reached
        log_sum, of_target = (nan_where(reached & mask, x) for x in (log_sum, of_target))
    return OfTokens(log_sum - of_target, log_sum, correct)


def _sums(logits, targets, mask):
    """The logarithm of the sum of exponentials, the target's logit, and correct answers."""
    *found, correct = _of_logits(logits, targets, mask)
    return *found, correct != 0


@jax.custom_jvp
def _of_logits(logits, targets, mask):
    """The same in numbers: what a bool has for a tangent cannot vary over a mesh."""
    log_sum, of_target, correct = of_logits.plain(logits, targets, mask)
    return log_sum, of_target, correct.astype(log_sum.dtype)


@_of_logits.defjvp
def _of_logits_jvp(primals, tangents):
    logits, targets, mask = primals
    log_sum, of_target, correct = _of_logits(*primals)
    # Of the probabilities nothing is kept for the way back: they are as large as the logits.
    pushed = jax.checkpoint(_pushed, prevent_cse=False)(tangents[0], logits, targets, mask, log_sum)
    return (log_sum, of_target, correct), (*pushed, jnp.zeros_like(correct))


def _pushed(tangent, logits, targets, mask, log_sum):
    tangent = of_logits.widened(tangent, mask)
    probabilities = jnp.exp(of_logits.widened(logits, mask) - log_sum[..., None])
    is_target = of_logits.ids(logits) == targets[..., None]
    return (
        jnp.sum(probabilities * tangent, axis=-1),
        jnp.sum(jnp.where(is_target, tangent, 0), axis=-1),
    )
