"""How the TPU kernels cut a sequence and its heads, and what that takes of vector memory."""

import itertools
from typing import NamedTuple

import jax.numpy as jnp
from jax.experimental.pallas import tpu as pltpu

from deltaproduct_jax.ops.kernels.pallas.products import BASE

# Updates in a chunk where products are float32: with more, the rounding of k_m . k_n would show,
# which adds up where keys are equal and beta is near 2.
WIDE_UPDATES = 32
# A block of heads is this many key heads, the rows of a register, or all of them.
HEADS_IN_BLOCK = 8
# What a kernel takes of a core's vector memory, which is 16 MiB on v4, 64 on v5p and TPU7x and 128
# on v5e and v6e: the rest is for what the compiler prefetches. More only where no cut fits in this.
MOST_MEMORY = 48 * 2**20


class Plan(NamedTuple):
    """How the sequence and the heads are cut.

    Attributes:
      span: tokens of a program, from one kept state to the next.
      chunk: tokens in a chunk; divides ``span``.
      spans: how many programs walk a sequence.
      heads: key heads in a block.
      together: key heads that are worked on at once; divides ``heads``.
      keeps: on the way back, what walking a span again finds is kept; else only its states are.
      joined: chunks of a span that are prepared at once; divides their number.
      buffers: of every input block; with 1 the next block is not fetched ahead.
      bytes: of vector memory, about.
      limit: what there is for the plan.
    """

    span: int
    chunk: int
    spans: int
    heads: int
    together: int
    keeps: bool
    joined: int
    buffers: int
    bytes: int
    limit: int


def plan_of(dtype, *, spans: int, T: int, R: int, H: int, Hv: int, K: int, V: int) -> Plan:
    """The cut for at most ``spans`` spans: as many heads at once as the memory allows.

    Spans are twice as long, for half of the states in HBM, where their number is even, and no work
    is done twice, where neither costs a head. Chunks are cut shorter only where no head fits
    otherwise, and inputs are fetched ahead unless that leaves room for no head. Where not even one
    fits then, nearly all memory of the core is taken; if that is too little, ``bytes`` is above
    ``limit``.
    """
    least = round_up(-(-T // spans), BASE)
    spans = -(-T // least)
    heads = HEADS_IN_BLOCK if H % HEADS_IN_BLOCK == 0 else H
    counts = [n for n in range(heads, 0, -1) if heads % n == 0]
    lengths = [(2, True), (1, True), (1, False)][spans % 2 :]
    cuts = itertools.product(_limits(), _chunks(dtype, least, R), (2, 1), counts, lengths)
    for limit, chunk, buffers, together, (length, keeps) in cuts:
        span = length * least
        keeps &= span > chunk
        needed = _fixed_bytes(dtype, span, chunk, keeps, heads, buffers, R, Hv // H, K, V)
        needed += together * (Hv // H) * _working_bytes(dtype, chunk, R, K, V)
        if needed <= limit:
            break
    joined = 2 if keeps and span // chunk % 2 == 0 else 1
    spans //= length
    return Plan(span, chunk, spans, heads, together, keeps, joined, buffers, needed, limit)


def _chunks(dtype, span: int, R: int) -> list[int]:
    """Lengths that a chunk may have, the best first."""
    most = span if dtype == jnp.bfloat16 else max(WIDE_UPDATES // R, BASE)
    return [c for c in range(span, 0, -BASE) if span % c == 0 and c <= most]


def memory_of_core() -> int | None:
    """Bytes of vector memory of the TPU that is traced for; None where JAX does not know which.

    JAX lowers no kernel then; on a CPU, which interprets them, any number would do.
    """
    try:
        return pltpu.get_tpu_info().vmem_capacity_bytes
    except ValueError:
        return None


def _limits() -> list[int]:
    """Bytes that a plan may take, and those where it finds no cut for so few."""
    memory = memory_of_core()
    if memory is None:
        return [MOST_MEMORY]
    # On v4, whose 16 MiB fill up, the compiler reported up to 1.12 times what is counted here.
    most = memory * 7 // 8
    return [MOST_MEMORY, most] if most > MOST_MEMORY else [most]


def vector_memory(plan: Plan) -> int:
    """Bytes that the compiler may take for a kernel."""
    return min(memory_of_core() or MOST_MEMORY, max(plan.limit, MOST_MEMORY))


def _fixed_bytes(dtype, span, chunk, keeps, heads, buffers, R, G, K, V) -> int:
    """Of the backward kernel, the larger one: blocks, scratch, and what turning both around takes.

    Fitted to what the compiler reported of 2 to 8 heads of 64 x 64 to 256 x 256, on v4, v5e and
    v5p; on the last two the truth is down to half of it in bfloat16.
    """
    K, V, itemsize = round_up(K, 128), round_up(V, 128), jnp.dtype(dtype).itemsize
    per_token = K + R * K + G * R * V  # q, k and v, and their cotangents
    rows = span * round_up(heads, 32 // itemsize) * itemsize
    state = 4 * heads * G * K * V
    inputs, outputs = rows * (per_token + G * V) + 2 * state, rows * per_token + state
    turned = _copies(dtype) * 3 * 4 * chunk * heads * (per_token + G * V)
    kept = 0 if chunk == span else span // chunk * state
    if keeps:
        turned += 4 * (span - chunk) * heads * per_token
        kept += state + 4 * span * R * heads * G * round_up(chunk * R, 128)
    return buffers * inputs + 2 * outputs + turned + state + kept


def _working_bytes(dtype, chunk: int, R: int, K: int, V: int) -> int:
    """Of the float32 matrices of one value head that the backward pass holds at once."""
    M = chunk * R
    return (
        _copies(dtype)
        * 4
        * M
        * (8 * round_up(M, 128) + 5 * round_up(V, 128) + 3 * round_up(K, 128))
    )


def _copies(dtype) -> int:
    """Of an operand: products of float32 split it into bfloat16 parts, kept beside it."""
    return 1 if dtype == jnp.bfloat16 else 3


def round_up(n: int, multiple: int) -> int:
    """The next multiple, or ``n`` itself."""
    return -(-n // multiple) * multiple
