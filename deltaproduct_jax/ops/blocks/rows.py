"""Parts of a model that are bound by memory, both ways of which read everything once.

A norm of rows whose input goes on beside it, one in front of a product, a whole residual SwiGLU,
what a mixer reads, a model's head and its table. A GPU's kernels have two forms of rows, and here
it is decided which: `short`, of few channels, where a row meets whole matrices in registers, or
`wide`, which leaves products to XLA. Elsewhere all is `plain`. The way back is a custom one, and
there is no forward mode but of `norm` and `lookup`.

A head and a mixer's inputs have the short form alone, so that who calls asks `takes_head` and
`takes_products` first, and has another where the answer is no.

Shape suffixes: B batch, T tokens, D channels, F channels between the products of a SwiGLU, V
vocabulary.
"""

import jax

from deltaproduct_jax.ops.blocks import lookup as of_lookup
from deltaproduct_jax.ops.blocks import short, wide
from deltaproduct_jax.ops.blocks.plain import HIDDEN_POINT as HIDDEN_POINT
from deltaproduct_jax.ops.blocks.plain import MIDDLE as MIDDLE
from deltaproduct_jax.ops.blocks.plain import NORM_POINT as NORM_POINT
from deltaproduct_jax.ops.blocks.plain import norm as norm
from deltaproduct_jax.ops.blocks.short import head_sums as head_sums
from deltaproduct_jax.ops.blocks.short import products as products
from deltaproduct_jax.ops.blocks.wide import forked_norm as forked_norm


def may_run(x: jax.Array, F: int = 0) -> bool:
    """Whether kernels take tokens [B, T, D] and an MLP's width, on devices with whole rows.

    To be asked before `forked_norm`, `norm_product` and `residual_swiglu`.
    """
    return wide.takes(x, F)  # and so all that `short` takes


def norm_product(o: jax.Array, scale: jax.Array, kernel: jax.Array, eps: float) -> jax.Array:
    """The product of norms of heads with a matrix, on devices that have whole arrays.

    Args:
      o: [B, T, H, V].
      scale: [V].
      kernel: [H V, D], in the dtype of ``o``.
      eps: added to the mean square.
    """
    out = jax.ShapeDtypeStruct((*o.shape[:2], kernel.shape[1]), o.dtype)
    form = short if short.takes(out, o.shape[3], o) else wide
    return form.norm_product(o, scale, kernel, eps)


def residual_swiglu(
    x: jax.Array,
    more: jax.Array,
    reached: jax.Array,
    scale: jax.Array,
    first: jax.Array,
    down: jax.Array,
    eps: float,
    keeps: bool = False,
) -> jax.Array:
    """``z + (silu(y gate) * (y up)) down``, with y the norm of ``z = x + more``.

    Args:
      x: [B, T, D].
      more: the same.
      reached: tokens whose ``more`` is NaN, whatever it is, and so are their cotangents that are
        not 0, [B, T] bool.
      scale: of the norm, [D].
      first: gate and up, in the dtype of ``x``: [D, 2 F], or where a mesh cuts F [D, 2, F].
      down: [F, D], in that dtype too.
      eps: added to the mean square.
      keeps: keep what SwiGLU makes, instead of making it again on the way back; the short form
        always makes it again.
    """
    arrays = x, more, reached, scale, first, down, eps
    if short.takes(x):
        return short.residual_swiglu(*arrays)
    return wide.residual_swiglu(*arrays, keeps)


def takes_products(x: jax.Array) -> bool:
    """Whether a kernel makes the cotangent of tokens [B, T, D] from those of their `products`."""
    return short.takes(x)


def takes_head(x: jax.Array, V: int, *sources: jax.Array) -> bool:
    """Whether kernels make `head_sums` of tokens [B, T, D] and so many ids, without logits.

    Of an ``x`` that is yet to be made only shape and dtype are known; ``sources`` are what it is
    made of, and tell how it will lie.
    """
    return short.takes(x, V, *sources)


def lookup(table: jax.Array, ids: jax.Array) -> jax.Array:
    """``table[ids]``, whose gradient is summed in float32; NaN for ids out of range.

    Args:
      table: [rows, D].
      ids: [*ids].

    Returns:
      [*ids, D].
    """
    x = jax.ShapeDtypeStruct((*ids.shape, table.shape[1]), table.dtype)
    is_short = short.takes(x, len(table), table, ids)
    return (short.lookup if is_short else of_lookup.plain)(table, ids)
