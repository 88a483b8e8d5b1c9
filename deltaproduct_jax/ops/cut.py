"""How the chunked form cuts a sequence: what is fixed at tracing and what each platform chooses.

The forward pass of a gradient keeps the state before every span. The number of spans is the shape
of a residual, so it is fixed when the program is traced; how a span is worked on is chosen when it
is lowered. IMPLEMENTATIONS.md has the rules as a table.
"""

import dataclasses
import math

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops import checks

# Updates (tokens times factors) in a chunk. With bfloat16 inputs: the width of a TPU's matrix unit,
# and what a GPU was measured to be fastest with. Otherwise, and on a CPU always, half the width of
# the state within these bounds: work inside a chunk and on the state are then in balance on a CPU,
# and the rounding of k_m . k_n, which adds up where keys are equal and beta is near 2, is
# bounded.
NARROW_UPDATES = {"default": 64, "tpu": 128}
FEWEST_UPDATES, MOST_UPDATES = 16, 32
# "default" stands for all but the first two.
NAMED = ("cpu", "tpu", "cuda", "rocm", "default")
# Updates in a span: the largest chunk of all.
SPAN_UPDATES = 128
# Entries of all matrices of one kind, M x M or M x K, that are worked on at once. On TPU 4 MiB of
# float32, of which several stay in vector memory (128 MiB on v5e); elsewhere enough to fill a GPU.
ENTRIES_AT_ONCE = {"cpu": 0, "default": 2**22, "tpu": 2**20}


@dataclasses.dataclass(frozen=True)
class Cut:
    """A sequence is cut into spans, between which states are kept, and these into chunks.

    Attributes:
      span: tokens in a span.
      chunk_size: tokens in a chunk; divides ``span``.
      spans_at_once: how many spans are worked on at once, but for what passes from state to state;
        divides their number. With 1 the forward pass takes chunk by chunk, the backward pass a
        span's chunks at once.
    """

    span: int
    chunk_size: int
    spans_at_once: int = 1

    @property
    def chunks_at_once(self) -> int:
        """Chunks in ``spans_at_once`` spans."""
        return self.spans_at_once * self.span // self.chunk_size


def default_chunk_size(
    platform: str, dtype: jax.typing.DTypeLike, *, T: int, R: int, K: int, V: int
) -> int:
    """Tokens in a chunk where the caller names no size: a power of two, unless T is shorter.

    Args:
      platform: "cpu", "tpu", "cuda", "rocm", or "default" for all others.
      dtype: of q, k and v.
      T: tokens.
      R: Householder factors per token.
      K: key width.
      V: value width.

    Raises:
      ValueError: an argument may not have that value.
    """
    if platform not in NAMED:
        names = ", ".join(repr(name) for name in NAMED)
        raise ValueError(f"platform={platform!r} is not known; it may be one of {names}")
    sizes = {"T": T, "R": R, "K": K, "V": V}
    T, R, K, V = (checks.check_size(n, x, 0 if n == "T" else 1) for n, x in sizes.items())
    dtype = checks.as_dtype("dtype", dtype)
    platform = platform if platform in ("cpu", "tpu") else "default"
    updates = max(FEWEST_UPDATES, min(max(K, V) // 2, MOST_UPDATES))
    if dtype == jnp.bfloat16:
        updates = NARROW_UPDATES.get(platform, updates)
    return min(T, _power_of_two(updates / R))


def default_span(dtype: jax.typing.DTypeLike, *, T: int, R: int, K: int, V: int) -> int:
    """Tokens from one kept state to the next where the caller names no chunk size.

    About `SPAN_UPDATES` updates, or fewer in favour of less padding; whole chunks of a CPU.
    """
    chunk_size = default_chunk_size("cpu", dtype, T=T, R=R, K=K, V=V)
    spans = -(-T // max(chunk_size, _power_of_two(SPAN_UPDATES / R)))
    return -(-T // (spans * chunk_size)) * chunk_size


def _power_of_two(most: float) -> int:
    return 2 ** max(0, math.floor(math.log2(most)))


def cut_for(
    platform: str, span: int, chunk_size: int, *, B: int, T: int, R: int, Hv: int, K: int, V: int
) -> Cut:
    """The cut on a platform.

    Short sequences are worked on all at once, large batches span by span.

    Args:
      platform: "cpu", "tpu", or "default" for all others.
      span: tokens from one kept state to the next.
      chunk_size: tokens in a chunk at most.
      B: batch; where it is symbolic (`jax.export`), spans are worked on one by one.
      T: tokens.
      R: Householder factors per token.
      Hv: value heads.
      K: key width.
      V: value width.
    """
    chunk_size = max(c for c in range(1, min(chunk_size, span) + 1) if span % c == 0)
    spans = -(-T // span)
    entries = B * Hv * span * R * max(chunk_size * R, K, V)
    if not isinstance(entries, int):  # a batch that is not known until the program runs
        return Cut(span, chunk_size)
    most = ENTRIES_AT_ONCE[platform] // entries
    at_once = max((n for n in range(1, min(spans, most) + 1) if spans % n == 0), default=1)
    return Cut(span, chunk_size, at_once)
