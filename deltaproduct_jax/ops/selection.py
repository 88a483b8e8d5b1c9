"""The rule for ``implementation=None``, which IMPLEMENTATIONS.md has as a table."""

from collections.abc import Mapping

import jax
import jax.numpy as jnp

from deltaproduct_jax.ops import checks, kernels

AVAILABLE = ("chunked", "recurrent", "associative", *kernels.KERNELS)
PLATFORMS = ("cpu", "cuda", "rocm", "tpu")

# On a CPU, entries of a state below which the scan over tokens was measured to be the faster.
SCAN_BELOW_ONE_FACTOR = 64 * 128
SCAN_BELOW_SEVERAL_FACTORS = 128 * 128
# The same of a gradient, entries of a state at most, where as many states or more are worked on at
# once: what a token costs whatever its size is shared by them.
GRADIENT_UP_TO_ONE_FACTOR = 16 * 16
GRADIENT_UP_TO_SEVERAL_FACTORS = 32 * 32
GRADIENT_FROM_STATES = 16


def select_implementation(
    platform: str,
    *,
    B: int,
    T: int,
    R: int,
    Hv: int,
    K: int,
    V: int,
    differentiated: bool,
    H: int | None = None,
    dtype: jax.typing.DTypeLike = jnp.float32,
    chunk_size: int | None = None,
    precision: str | None = None,
) -> str:
    """What ``implementation=None`` runs, in a program that this process traces now.

    IMPLEMENTATIONS.md beside this file has the rule. A kernel is named only where it will run: its
    package imports, and what is known while tracing suffices to lower it. So a machine without a
    TPU answers "chunked" for "tpu", unless an abstract mesh (`jax.sharding.use_abstract_mesh`) says
    which TPU the program is for.

    Args:
      platform: "cpu", "cuda", "rocm" or "tpu": what the program is lowered for.
      B: sequences.
      T: tokens.
      R: Householder factors per token.
      Hv: value heads.
      K: key width.
      V: value width; over a mesh with a sequence axis the op runs at V + K.
      differentiated: whether this is the forward pass of a gradient.
      H: key heads; None: as many as value heads.
      dtype: of q, k and v.
      chunk_size: as in `delta_product`.
      precision: as in `delta_product`.

    Returns:
      The name of an implementation.

    Raises:
      ValueError: an argument may not have that value, or the sizes do not fit each other.
    """
    sizes = {"B": B, "T": T, "R": R, "H": Hv if H is None else H, "Hv": Hv, "K": K, "V": V}
    sizes = _checked(platform, sizes)
    B, T, R, Hv, K, V = (sizes[letter] for letter in ("B", "T", "R", "Hv", "K", "V"))
    checks.check_flag("differentiated", differentiated)
    dtype = checks.as_dtype("dtype", dtype)
    chunk_size = checks.check_chunk_size(chunk_size, None)
    precision = checks.check_precision(precision)
    if chunk_size is None and T > 1:
        for name in kernels.KERNELS:
            if _kernel_runs(name, platform, sizes, dtype, precision):
                return name
    if differentiated:
        is_narrow = platform == "cpu" and T > 1 and _is_narrow(B * Hv, R, K * V)
        return "recurrent" if is_narrow else "chunked"
    if T <= 1 or (platform == "cpu" and _scan_is_faster(R, K * V)):
        return "recurrent"
    return "chunked"


def _checked(platform: str, sizes: Mapping[str, int]) -> dict[str, int]:
    if platform not in PLATFORMS:
        names = ", ".join(repr(name) for name in PLATFORMS)
        raise ValueError(f"platform={platform!r} is not known; it may be one of {names}")
    # H, where nobody gave it, is Hv, of which the error is then.
    checked = {
        name: checks.check_size(name, size, 0 if name in ("B", "T") else 1)
        for name, size in reversed(sizes.items())
    }
    if checked["Hv"] % checked["H"]:
        raise ValueError(f"Hv={checked['Hv']} must be a multiple of H={checked['H']}")
    return checked


def _kernel_runs(
    name: str,
    platform: str,
    sizes: Mapping[str, int],
    dtype: jnp.dtype,
    precision: jax.lax.Precision | None,
) -> bool:
    kernel = kernels.KERNELS[name]
    return (
        platform == kernel.platform
        and min(sizes["K"], sizes["V"]) >= kernel.least_width
        and kernels.reason_against(name, **sizes, dtype=dtype, precision=precision) is None
        and kernels.load(name).is_ready()
    )


def _is_narrow(states: int, R: int, entries: int) -> bool:
    """Whether the gradient is that of the scan; a symbolic number of states may be one."""
    is_known = not jax.export.is_symbolic_dim(states)
    most = GRADIENT_UP_TO_ONE_FACTOR if R == 1 else GRADIENT_UP_TO_SEVERAL_FACTORS
    return is_known and states >= GRADIENT_FROM_STATES and entries <= most


def _scan_is_faster(R: int, entries: int) -> bool:
    return entries < (SCAN_BELOW_ONE_FACTOR if R == 1 else SCAN_BELOW_SEVERAL_FACTORS)
