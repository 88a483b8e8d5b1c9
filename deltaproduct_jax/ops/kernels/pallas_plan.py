"""How the TPU kernels cut a sequence and its heads, and what that takes of vector memory."""

from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from deltaproduct_jax.ops.kernels.pallas_products import BASE

# Updates in a chunk where products are float32: more, and the rounding of k_m . k_n, which adds up
# coherently where keys agree and beta is near 2, would show (README.md of ops).
WIDE_UPDATES = 32
# A block of heads is this many key heads, the rows of a register, or all of them.
HEADS_IN_BLOCK = 8
# What a kernel takes at most of a core's vector memory, which is 16 MiB on v4, 64 on v5p and 128 on
# v5e and v6e: the rest is for what the compiler prefetches.
MOST_MEMORY = 48 * 2**20


class Plan(NamedTuple):
    """How the sequence and the heads are cut.

    Attributes:
      span: tokens of a program.
      chunk: tokens in a chunk; divides ``span``.
      spans: how many programs walk a sequence.
      heads: key heads in a block.
      together: key heads that are worked on at once; divides ``heads``.
      buffers: of every input block; with 1 the next block is not fetched ahead.
      bytes: of vector memory, about.
      limit: what the compiler may take of it.
    """

    span: int
    chunk: int
    spans: int
    heads: int
    together: int
    buffers: int
    bytes: int
    limit: int


def plan_of(dtype, *, spans: int, T: int, R: int, H: int, Hv: int, K: int, V: int) -> Plan:
    """The cut for at most ``spans`` spans: as many heads at once as the memory allows.

    Inputs are fetched ahead unless that leaves room for no head. Where not even one fits then,
    ``bytes`` is above ``limit``.
    """
    span = round_up(-(-T // spans), BASE)
    chunk = span
    if dtype != jnp.bfloat16:
        fits = [c for c in range(BASE, span + 1, BASE) if span % c == 0 and c * R <= WIDE_UPDATES]
        chunk = max(fits, default=BASE)
    heads = HEADS_IN_BLOCK if H % HEADS_IN_BLOCK == 0 else H
    each = Hv // H * _working_bytes(chunk, R, K, V)
    limit = vector_memory()
    counts = [n for n in range(heads, 0, -1) if heads % n == 0]
    for buffers, together in [(buffers, n) for buffers in (2, 1) for n in counts]:
        needed = _fixed_bytes(dtype, span, chunk, heads, buffers, R, Hv // H, K, V)
        needed += together * each
        if needed <= limit:
            break
    return Plan(span, chunk, -(-T // span), heads, together, buffers, needed, limit)


def vector_memory() -> int:
    """Bytes that a kernel may take on the TPU that is traced for; interpreted, any number would do.

    JAX lowers no kernel for a TPU of which it does not know the kind.
    """
    try:
        return min(pltpu.get_tpu_info().vmem_capacity_bytes, MOST_MEMORY)
    except ValueError:
        return MOST_MEMORY


def _fixed_bytes(dtype, span, chunk, heads, buffers, R, G, K, V) -> int:
    """Of the backward kernel, the larger one: blocks, scratch, and what turning both around takes.

    Fitted to what the compiler reported, over 8 heads of 128 x 128, on v4.
    """
    K, V, itemsize = round_up(K, 128), round_up(V, 128), jnp.dtype(dtype).itemsize
    per_token = K + R * K + G * R * V  # q, k and v, and their cotangents
    rows = span * round_up(heads, 32 // itemsize) * itemsize
    state = 4 * heads * G * K * V
    inputs, outputs = rows * (per_token + G * V) + 2 * state, rows * per_token + state
    kept = 0 if chunk == span else span // chunk
    turned = 3 * 4 * chunk * heads * (per_token + G * V)
    return buffers * inputs + 2 * outputs + turned + (1 + kept) * state


def _working_bytes(chunk: int, R: int, K: int, V: int) -> int:
    """Of the float32 matrices of one value head that the backward pass holds at once."""
    M = chunk * R
    return 4 * M * (6 * round_up(M, 128) + 4 * round_up(V, 128) + 2 * round_up(K, 128))


def round_up(n: int, multiple: int) -> int:
    """The next multiple, or ``n`` itself."""
    return -(-n // multiple) * multiple
