"""Which implementation of a short convolution runs, by a rule that can be asked."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops import checks, kernels
from deltaproduct_jax.ops.convolution.plain import Form
from deltaproduct_jax.ops.kernels.triton import convolution_passes as of_triton
from deltaproduct_jax.ops.selection import PLATFORMS

AVAILABLE = ("plain", *kernels.KERNELS)


class Convolution(NamedTuple):
    """One of a layer's, or what stands behind it where there are no taps.

    Attributes:
      form: what is done to the sum of taps.
      channels: of all heads.
      head_width: channels of a head, as the op takes what comes out.
    """

    form: Form
    channels: int
    head_width: int


class Choice(NamedTuple):
    """What a convolution runs, on a platform that is known when its program is lowered.

    Attributes:
      named: the implementation that the caller named, or None.
      on_cuda: what runs on an NVIDIA GPU.
      on_tpu: what runs on a TPU. On all other platforms "plain" does, unless a kernel was named:
        a CPU then interprets "pallas_tpu", and all else is an error.
    """

    named: str | None
    on_cuda: str = "plain"
    on_tpu: str = "plain"

    @property
    def may_run_kernel(self) -> bool:
        """Whether some platform runs a kernel."""
        return (self.on_cuda, self.on_tpu) != ("plain", "plain")

    @property
    def is_interpreted(self) -> bool:
        """Whether a CPU runs a kernel, see `kernels.is_interpreted`."""
        return kernels.is_interpreted(self.named)


PLAIN = Choice("plain")


def select_convolution(
    platform: str,
    *,
    op: str,
    B: int,
    T: int,
    C: int,
    head_width: int,
    conv_size: int | None = 4,
    activation: Callable[[jax.Array], jax.Array] = jax.nn.silu,
    unit_width: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
) -> str:
    """What ``conv_implementation=None`` runs, in a program that this process traces now.

    IMPLEMENTATIONS.md of the folder above has the rule. A kernel runs only where that of the op
    does, which waits for all that the convolution gives.

    Args:
      platform: "cpu", "cuda", "rocm" or "tpu": what the program is lowered for.
      op: what the layer's op runs there in a gradient, see `select_implementation`.
      B: sequences.
      T: tokens.
      C: channels.
      head_width: channels of a head, as the op takes what comes out.
      conv_size: taps; None: no convolution, only what stands behind it.
      activation: applied to the sum of taps.
      unit_width: channels that are divided by their length together; None: none are.
      dtype: of the inputs.

    Returns:
      "plain", "triton" or "pallas_tpu".

    Raises:
      ValueError: the platform is not known, or a size is none.
    """
    if platform not in PLATFORMS:
        names = ", ".join(repr(name) for name in PLATFORMS)
        raise ValueError(f"platform={platform!r} is not known; it may be one of {names}")
    B, T, C = (checks.check_size(n, x, 0) for n, x in {"B": B, "T": T, "C": C}.items())
    is_of_platform = op in kernels.KERNELS and kernels.KERNELS[op].platform == platform
    if not is_of_platform or not isinstance(T, int) or T < 2:
        return "plain"
    if op == "pallas_tpu" and head_width % of_tpu().LANES:
        return "plain"  # XLA would lay out anew what the kernel writes
    form = Form(activation, unit_width)
    sizes = {"B": B, "T": T, "C": C, "conv_size": conv_size, "dtype": jnp.dtype(dtype)}
    is_taken = reason_against(op, form, **sizes) is None
    return op if is_taken and kernels.load(op).is_ready() else "plain"


def choose(
    implementation: str | None,
    convolutions: Sequence[Convolution],
    *,
    op: Callable[[str], str],
    B: int,
    T: int,
    conv_size: int | None,
    dtype: jax.typing.DTypeLike,
) -> Choice:
    """What the convolutions of a layer run, all alike.

    Args:
      implementation: one of `AVAILABLE`, or None for `select_convolution`.
      convolutions: each of them.
      op: what the layer's op runs on a platform, as in `select_convolution`.
      B, T, conv_size, dtype: as in `select_convolution`.

    Raises:
      ValueError: the implementation is not known, or is named and cannot run one of them.
    """
    checks.check_implementation(implementation, AVAILABLE, "conv_implementation")
    sizes = {"B": B, "T": T, "conv_size": conv_size, "dtype": jnp.dtype(dtype)}
    if implementation is None:

        def on(platform: str) -> str:
            fixed = {"op": op(platform), **sizes}
            names = {
                select_convolution(platform, C=C, head_width=width, **form._asdict(), **fixed)
                for form, C, width in convolutions
            }
            return names.pop() if len(names) == 1 else "plain"

        return Choice(None, on("cuda"), on("tpu"))
    for form, C, _ in convolutions:
        _require(implementation, form, C=C, **sizes)
    return by_name(implementation)


def for_part(choice: Choice, form: Form, u: jax.Array, conv_size: int) -> Choice:
    """What the part of a convolution runs that a device of a mesh has, of inputs [B, T, C].

    Raises:
      ValueError: what is named cannot run it.
    """
    B, T, C = u.shape
    sizes = {"B": B, "T": T, "C": C, "conv_size": conv_size, "dtype": u.dtype}
    if choice.named is not None:
        _require(choice.named, form, **sizes)
        return choice
    for name, field in (("triton", "on_cuda"), ("pallas_tpu", "on_tpu")):
        if getattr(choice, field) == name and reason_against(name, form, **sizes) is not None:
            choice = choice._replace(**{field: "plain"})
    return choice


def by_name(name: str) -> Choice:
    """What runs where an implementation is named, if it can."""
    return Choice(name, *(n if n == name else "plain" for n in ("triton", "pallas_tpu")))


def _require(name: str, form: Form, **sizes) -> None:
    reason = None if name == "plain" else reason_against(name, form, **sizes)
    if reason is not None:
        raise ValueError(
            f"conv_implementation={name!r} cannot run this: {reason}; 'plain' can, and None "
            "chooses by platform and shape"
        )


def reason_against(
    name: str, form: Form, *, B: int, T: int, C: int, conv_size: int | None, dtype: jnp.dtype
) -> str | None:
    """Why a kernel cannot run these, as the end of a sentence, or None."""
    if not all(isinstance(size, int) for size in (B, T)):
        return "a batch or length that is symbolic is not one that it is written for"
    if not kernels.is_installed(name):
        return f"package {kernels.KERNELS[name].package} is not installed, or does not import"
    if name == "triton":
        return of_triton.unsupported(form, B=B, conv_size=conv_size, dtype=dtype)
    if conv_size is None:
        return "there is no short convolution, without which it has nothing to do"
    return of_tpu().unsupported(form, C=C, conv_size=conv_size, dtype=dtype)


def of_tpu():
    """The kernels for TPUs, whose package need not be there."""
    from deltaproduct_jax.ops.kernels.pallas import convolution_passes

    return convolution_passes
