"""What one call of the op runs on each platform, resolved once, when the call is traced.

Everything here follows from shapes, dtypes and what the caller named. The forward and the backward
pass read the same `Route`, so they agree on which implementation runs and on what it keeps.
"""

import dataclasses
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops import kernels
from deltaproduct_jax.ops.chunked import Settings
from deltaproduct_jax.ops.cut import cut_for, default_chunk_size, default_span
from deltaproduct_jax.ops.kernels.containment import kept_last
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.precision import Matmul
from deltaproduct_jax.ops.selection import select_implementation

# "default" stands for all others, of which "rocm" is one.
PLATFORMS = ("cpu", "tpu", "cuda", "default")


class Branch(NamedTuple):
    """What one platform runs.

    Attributes:
      platform: one of `PLATFORMS`.
      primal: the implementation where nothing is differentiated.
      gradient: the implementation of a gradient, forward and backward.
      settings: of "chunked", should it be one of the two.
      options: of a kernel, should it be one of the two.
    """

    platform: str
    primal: str
    gradient: str
    settings: Settings
    options: kernels.Options


class Route(NamedTuple):
    """What a call runs.

    Attributes:
      named: the implementation that the caller named, or None.
      scale: multiplies q.
      precision: as in `delta_product`.
      branches: one per platform.
      kept_more: the arrays that a gradient keeps beside states, on every platform.
      raw: tokens are those of `ops.convolution.raw.entered`, which whatever runs sees to.
    """

    named: str | None
    scale: float
    precision: str | None
    branches: tuple[Branch, ...]
    kept_more: tuple[jax.ShapeDtypeStruct, ...]
    raw: bool = False

    @property
    def may_run_kernel(self) -> bool:
        """Whether some platform runs a kernel."""
        return any({b.primal, b.gradient} & kernels.KERNELS.keys() for b in self.branches)

    def for_finite(self, known: bool) -> "Route":
        """The same for operands of which it is known, or not, that they are finite."""
        branches = (
            branch._replace(options=branch.options._replace(known_finite=known))
            for branch in self.branches
        )
        return self._replace(branches=tuple(branches))

    def branch(self, platform: str) -> Branch:
        """That of one of `PLATFORMS`."""
        return self.branches[PLATFORMS.index(platform)]


def resolve(
    tokens: Tokens,
    *,
    scale: float,
    precision: str | None,
    chunk_size: int | None,
    implementation: str | None,
    raw: bool = False,
) -> Route:
    """The route of a call; of ``tokens`` only shapes and dtypes matter."""
    sizes, dtype = sizes_of(tokens), jnp.dtype(tokens.q.dtype)

    def name(platform, differentiated):
        if implementation is not None:
            return implementation
        return select_implementation(
            "rocm" if platform == "default" else platform,
            **sizes,
            differentiated=differentiated,
            dtype=dtype,
            chunk_size=chunk_size,
            precision=precision,
        )

    gradients = {platform: name(platform, True) for platform in PLATFORMS}
    T, span = sizes["T"], _span(dtype, chunk_size, sizes)
    # Residuals are the same on all platforms. Where one kernel alone may run, it says what they
    # are; those of two platforms have to do with room for a state per span.
    chosen = set(gradients.values()) & kernels.KERNELS.keys()
    kernel = kernels.load(next(iter(chosen))) if len(chosen) == 1 else None
    kept_span = span if kernel is None else kernel.kept_span(span, dtype=dtype, **sizes)
    spans, slots = -(-T // span), -(-T // kept_span)
    options = kernels.Options(scale, precision, spans, interpret=False, slots=slots)
    kept_more = () if kernel is None else kernel.kept_more(tokens, options)
    options = options._replace(more=bool(kept_more))
    raw = raw and bool(kept_more) and chosen == {"triton"} and kernel.takes_raw(tokens, options)
    options = options._replace(raw=raw)
    options = options._replace(kernels=tuple(sorted(chosen)))
    kept_more = (*kept_more, *kept_last(tokens, options.kernels))
    fixed = {"scale": scale, "precision": precision, "span": kept_span, "chunk_size": chunk_size}
    branches = (
        Branch(
            platform,
            name(platform, False),
            gradients[platform],
            chunked_settings(platform, dtype, sizes, **fixed),
            options._replace(interpret=platform == "cpu"),
        )
        for platform in PLATFORMS
    )
    return Route(implementation, scale, precision, tuple(branches), kept_more, raw)


def sizes_of(tokens: Tokens) -> dict[str, int]:
    """Lengths of the dimensions, by the letters of the op."""
    B, T, R, H, K = tokens.k.shape
    Hv, V = tokens.v.shape[-2:]
    return {"B": B, "T": T, "R": R, "H": H, "Hv": Hv, "K": K, "V": V}


def _span(dtype: jnp.dtype, chunk_size: int | None, sizes: dict[str, int]) -> int:
    """Tokens from one kept state to the next, unless a kernel keeps fewer."""
    if chunk_size is not None:
        return min(chunk_size, sizes["T"])
    return default_span(dtype, **{name: sizes[name] for name in ("T", "R", "K", "V")})


def chunked_settings(
    platform: str,
    dtype: jnp.dtype,
    sizes: dict[str, int],
    *,
    scale: float,
    precision: str | None,
    span: int,
    chunk_size: int | None,
) -> Settings:
    """How the chunked implementation runs on one of `PLATFORMS`, with a kept state per ``span``."""
    platform = platform if platform in ("cpu", "tpu") else "default"
    sizes = {name: size for name, size in sizes.items() if name != "H"}
    if chunk_size is None:
        of_cut = {name: sizes[name] for name in ("T", "R", "K", "V")}
        chunk_size = default_chunk_size(platform, dtype, **of_cut)
    else:
        chunk_size = span
    # A CPU has no bfloat16: it would convert whole arrays anew for every chunk, and round every
    # operand only to widen it again.
    is_cpu = platform == "cpu"
    matmul = (Matmul.wide if is_cpu else Matmul.of)(dtype, precision)
    matmul = dataclasses.replace(matmul, skips_groups_of_one=is_cpu)
    return Settings(
        scale,
        precision,
        cut_for(platform, span, chunk_size, **sizes),
        matmul,
        *Matmul.of_inverse_and_gates(platform, dtype, precision),
        widen=is_cpu,
        refine=not is_cpu and matmul.is_true_float32,
    )
