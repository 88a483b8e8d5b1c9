"""Which implementation of a short convolution runs, by a rule that can be asked."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops import checks, kernels
from deltaproduct_jax.ops.convolution.plain import Form
from deltaproduct_jax.ops.kernels.triton import convolution_passes as of_triton
from deltaproduct_jax.ops.kernels.triton.passes import is_ready
from deltaproduct_jax.ops.selection import PLATFORMS

AVAILABLE = ("plain", "triton")


class Choice(NamedTuple):
    """What a convolution runs, on a platform that is known when its program is lowered.

    Attributes:
      named: the implementation that the caller named, or None.
      on_cuda: what runs on an NVIDIA GPU; elsewhere "plain" does, unless "triton" was named.
    """

    named: str | None
    on_cuda: str

    @property
    def may_run_kernel(self) -> bool:
        """Whether some platform runs a kernel."""
        return self.on_cuda == "triton"


PLAIN = Choice("plain", "plain")


def select_convolution(
    platform: str,
    *,
    op: str,
    B: int,
    T: int,
    conv_size: int | None = 4,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    unit_width: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> str:
    """What ``conv_implementation=None`` runs, in a program that this process traces now.

    The kernels run only where those of the op do, which wait for all that the convolution gives.

    Args:
      platform: "cpu", "cuda", "rocm" or "tpu": what the program is lowered for.
      op: what the layer's op runs there in a gradient, see `select_implementation`.
      B: sequences.
      T: tokens.
      conv_size: taps; None: no convolution, only what stands behind it.
      activation: applied to the sum of taps.
      unit_width: channels that are divided by their length together; None: none are.
      dtype: of the inputs.

    Returns:
      "plain" or "triton".

    Raises:
      ValueError: the platform is not known.
    """
    if platform not in PLATFORMS:
        names = ", ".join(repr(name) for name in PLATFORMS)
        raise ValueError(f"platform={platform!r} is not known; it may be one of {names}")
    if platform != "cuda" or op != "triton" or not isinstance(T, int) or T < 2:
        return "plain"
    form = Form(activation, unit_width)
    reason = reason_against(form, B=B, T=T, conv_size=conv_size, dtype=jnp.dtype(dtype))
    return "triton" if reason is None and is_ready() else "plain"


def choose(
    implementation: str | None,
    forms: tuple[Form, ...],
    *,
    op: str,
    B: int,
    T: int,
    conv_size: int | None,
    dtype: jax.typing.DTypeLike,
) -> Choice:
    """What the convolutions of a layer run, all alike.

    Args:
      implementation: one of `AVAILABLE`, or None for `select_convolution`.
      forms: of each convolution.
      op, B, T, conv_size, dtype: as in `select_convolution`.

    Raises:
      ValueError: the implementation is not known, or is named and cannot run one of them.
    """
    checks.check_implementation(implementation, AVAILABLE, "conv_implementation")
    sizes = {"B": B, "T": T, "conv_size": conv_size, "dtype": jnp.dtype(dtype)}
    if implementation is None:
        names = {select_convolution("cuda", op=op, **form._asdict(), **sizes) for form in forms}
        return Choice(None, names.pop() if len(names) == 1 else "plain")
    for form in forms if implementation == "triton" else ():
        reason = reason_against(form, **sizes)
        if reason is not None:
            raise ValueError(
                f"conv_implementation='triton' cannot run this: {reason}; 'plain' can, and None "
                "chooses by platform and shape"
            )
    return Choice(implementation, implementation)


def reason_against(
    form: Form, *, B: int, T: int, conv_size: int | None, dtype: jnp.dtype
) -> str | None:
    """Why the kernels cannot run these, as the end of a sentence, or None."""
    if not all(isinstance(size, int) for size in (B, T)):
        return "a batch or length that is symbolic is not one that it is written for"
    if not kernels.is_installed("triton"):
        return f"package {kernels.KERNELS['triton'].package} is not installed, or does not import"
    return of_triton.unsupported(form, B=B, conv_size=conv_size, dtype=dtype)
