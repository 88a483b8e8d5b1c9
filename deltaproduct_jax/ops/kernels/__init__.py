"""Kernels written for one platform, reached only through `delta_product`.

A kernel is a module of this folder, named in `KERNELS`, with six functions:

``unsupported(*, dtype, B, T, R, H, Hv, K, V, precision) -> str | None``
    Why it cannot run these, as the end of a sentence, or None.
``is_ready() -> bool``
    Whether it can be lowered by what is known while tracing; if not, nobody chooses it.
``kept_span(span, *, dtype, B, T, R, H, Hv, K, V) -> int``
    Tokens from one state that it keeps to the next, where the op would keep one every ``span``.
``kept_more(tokens, options) -> tuple[jax.ShapeDtypeStruct, ...]``
    What it keeps beside states, if it alone says what the residuals are; () if nothing.
``forward(tokens, initial_state, options, *, keep_states) -> (o, final_state, kept, bad)``
    As `chunked`, but that g may be -inf (`decays.forgets`), and that ``kept`` is None or
    ``(states, *more)``. States are [N, B, H, G, K, V] with N = ``options.slots``, in float32: one
    for each of its own spans, except on a machine that is ready for kernels of two platforms; slots
    left over then may hold anything. With ``options.more`` the arrays that ``kept_more`` names
    follow. Only its own ``backward`` reads it. ``bad`` [B, ...] is not 0 for the rows of which
    anything was not finite, which are run again; None: there are none.
``backward(tokens, kept, do, dfinal_state, options) -> (dtokens, dinitial_state, bad)``
    As `chunked_backward`, from what its own ``forward`` kept, and behind it what
    `containment.kept_last` says; of flags those are not 0 whose rows were run again. ``bad`` are
    those, and rows of whose cotangents anything was not finite, or None.

One that reads tokens otherwise than the op lays them out has two more, and is given what the first
returns; `containment` calls them:

``lay_out(tokens, options) -> tokens`` and ``restore(tokens, like) -> tokens``
    To its own layout, rows still first, and back; of cotangents too. ``like`` has shapes, rows
    aside, and dtypes. Segment boundaries need not come back.

One that JAX cannot lower everywhere has another:

``reason_when_lowered(axis_context) -> str | None``
    Why it cannot, by what is known then, as the end of a sentence, or None.

The modules import packages that need not be there, so they are imported where they are used.
"""

import functools
import importlib
from types import ModuleType
from typing import NamedTuple

import jax
from jax.sharding import Mesh


class Kernel(NamedTuple):
    """Where a kernel stands.

    Attributes:
      module: its name in this folder.
      package: the package that it cannot do without.
      platform: what it is written for.
      least_width: K and V from which on it is chosen where nobody names it.
      interpreted: runs on a CPU too, slowly, when it is named.
    """

    module: str
    package: str
    platform: str
    least_width: int
    interpreted: bool


KERNELS = {
    "pallas_tpu": Kernel(
        "pallas.passes", "jax.experimental.pallas.tpu", "tpu", 64, interpreted=True
    ),
    "triton": Kernel("triton.choice", "jax_triton", "cuda", 16, interpreted=False),
}


class Options(NamedTuple):
    """What a kernel is told beside its arrays.

    Attributes:
      scale: multiplies q.
      precision: "default", "high", "highest" or None, as in `delta_product`.
      spans: how many pieces of about 128 updates a sequence has.
      interpret: run on a CPU.
      slots: how many states the residuals have room for; None: ``spans``.
      more: whether they have room for what the kernel keeps beside states.
      rows: sequences of the call, where it is run again on some of them; None: all.
      known_finite: whether all operands are: then only cotangents are looked at.
      kernels: names of those that a gradient runs on some platform, sorted.
      raw: q, k and v are to go through SiLU first, and q and k are divided by their lengths then;
        of a kernel whose ``takes_raw(tokens, options)`` says so.
    """

    scale: float
    precision: str | None
    spans: int
    interpret: bool
    slots: int | None = None
    more: bool = False
    rows: int | None = None
    known_finite: bool = False
    raw: bool = False
    kernels: tuple[str, ...] = ()


@functools.cache
def is_installed(name: str) -> bool:
    """Whether the package that a kernel needs is there, and imports."""
    try:
        importlib.import_module(KERNELS[name].package)
    except (ImportError, AttributeError):  # jax-triton without JAX's own part for CUDA
        return False
    return True


def load(name: str) -> ModuleType:
    """The module of a kernel."""
    return importlib.import_module(f"{__name__}.{KERNELS[name].module}")


def axis_of_rows(rank: int) -> int:
    """The axis of sequences: the first, but in arrays of kept states [spans, B, H, G, K, V]."""
    return 1 if rank == 6 else 0


def reason_against(name: str, **request) -> str | None:
    """Why a kernel cannot run what `unsupported` is asked for, or None."""
    if not all(isinstance(request[size], int) for size in ("B", "T")):
        return "a batch or length that is symbolic is not one that it is written for"
    if not is_installed(name):
        return f"package {KERNELS[name].package} is not installed, or does not import"
    return load(name).unsupported(**request)


def is_interpreted(name: str | None, mesh: Mesh | None = None) -> bool:
    """Whether a CPU runs a kernel: JAX's interpreter of kernels does not say what varies.

    Args:
      name: of an implementation, or None.
      mesh: of the devices; None: those of the default backend.
    """
    platform = jax.default_backend() if mesh is None else mesh.devices.flat[0].platform
    return name in KERNELS and KERNELS[name].interpreted and platform == "cpu"
