"""Compiles the op for a TPU on a machine that has none, in a process of its own."""

import contextlib
import dataclasses
import tempfile
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from deltaproduct_jax.compilers import child, hlo_cost, kernel_bundles, kernel_traffic, tpu
from deltaproduct_jax.compilers.memory import memory_of
from deltaproduct_jax.ops import delta_product
from experiments.lib import environment
from experiments.lib.bench.peers import tokamax
from experiments.lib.bench.timing import FORWARD, Shape
from experiments.lib.bench.uncontained import bare
from experiments.lib.compilers import require_compiler

EXTRA = environment.extra_folder("tpu")


@dataclasses.dataclass(frozen=True)
class Compilation:
    """What is compiled: the op, its direction and sizes, and the chip.

    ``contained`` is whether what is not finite stays where it is, as ever.
    """

    generation: str
    implementation: str
    direction: str
    shape: Shape
    chunk_size: int | None = None
    contained: bool = True


def interleaved(q, k, v, beta, g=None, *, chunk_size=None):
    """The op in the published form: a gated delta rule over a sequence R times longer.

    Each factor is a token of its own; the gate stands on the first of a token's R, the query on the
    last, where the output is read (the official fork of flash-linear-attention). Arguments as in
    `delta_product`; a chunk holds as many factors as one of ``chunk_size`` tokens would.
    """
    B, T, R, H, K = k.shape

    def on_one(x, r):
        """[B, T, ...] as [B, T * R, ...], zero but on factor r."""
        zeros = jnp.zeros((B, T, R, *x.shape[2:]), x.dtype)
        return zeros.at[:, :, r].set(x).reshape(B, T * R, *x.shape[2:])

    o, state = delta_product(
        on_one(q, R - 1),
        k.reshape(B, T * R, 1, H, K),
        v.reshape(B, T * R, 1, *v.shape[3:]),
        beta.reshape(B, T * R, 1, *beta.shape[3:]),
        None if g is None else on_one(g, 0),
        chunk_size=chunk_size and chunk_size * R,
        implementation="chunked",
    )
    return o[:, R - 1 :: R], state


def _chunked(**arrays):
    return delta_product(**arrays, implementation="chunked")


def _scan(*, chunk_size=None, **arrays):
    del chunk_size
    return delta_product(**arrays, implementation="recurrent")


def _pallas(*, chunk_size=None, **arrays):
    del chunk_size
    return delta_product(**arrays, implementation="pallas_tpu")


IMPLEMENTATIONS = {
    "chunked": _chunked,
    "scan": _scan,
    "interleaved": interleaved,
    "pallas_tpu": _pallas,
    tokamax.NAME: tokamax.op,
}
PEERS = {tokamax.NAME: tokamax}


def function_and_arguments(wanted: Compilation) -> tuple[Callable, tuple[Any, ...]]:
    """A function and the abstract arguments to compile it for.

    It gives ``(o, final_state)``; with the gradient also that of q, k, v, beta and g, where the
    cotangents of both outputs are arguments.
    """
    arrays = jax.eval_shape(wanted.shape.inputs)
    run = IMPLEMENTATIONS[wanted.implementation]

    def forward(arrays):
        return run(**arrays, chunk_size=wanted.chunk_size)

    def backward(arrays, cotangents):
        outputs, pullback = jax.vjp(forward, arrays)
        return outputs, pullback(cotangents)

    if wanted.direction == FORWARD:
        return forward, (arrays,)
    return backward, (arrays, jax.eval_shape(forward, arrays))


def compile_here(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Compiles one program in this process, which must have been started for it.

    Args:
      fields: of a `Compilation`, as plain values; and the folder "code", where the compiler of this
        process writes the code of kernels.

    Returns:
      The fields of `hlo_cost.Cost`, the bundles that all Pallas kernels issue ("kernel_cycles";
      None without a kernel, or where the code does not show the passes of a loop), and the bytes of
      temporary memory, arguments and outputs; or only "error", the compiler's first line, where it
      refuses the program.
    """
    fields = dict(fields)
    code = Path(fields.pop("code"))
    for path in code.iterdir():  # of the program before, whose kernels have the same labels
        path.unlink()
    wanted = Compilation(**{**fields, "shape": Shape(**fields["shape"])})
    with contextlib.nullcontext() if wanted.contained else bare():
        try:
            return figures_of(wanted.generation, lambda: function_and_arguments(wanted), code)
        except jax.errors.JaxRuntimeError as error:
            return {"error": str(error).splitlines()[0]}


def figures_of(
    generation: str, make: Callable[[], tuple[Callable, tuple[Any, ...]]], code: Path
) -> dict[str, Any]:
    """Compiles a program for one TPU, and reads what `compile_here` gives.

    Args:
      generation: of `tpu.GENERATIONS`.
      make: gives a function and its abstract arguments, for these chips.
      code: where the compiler of this process writes the code of kernels.
    """
    mesh = tpu.mesh_of(tpu.GENERATIONS[generation].topology, (1,), ("device",))
    here = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    with tpu.lowering_for(mesh):
        function, arguments = make()
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=here), arguments
        )
        traced = jax.jit(function).trace(*arguments)
        kernels = kernel_traffic.kernel_bytes(traced.jaxpr.jaxpr)
        compiled = traced.lower().compile()
    cost = hlo_cost.cost(compiled.as_text(), kernels)
    issued = {"kernel_cycles": bundles_issued(code, cost.kernels)}
    return {**dataclasses.asdict(cost), **issued, **memory_of(compiled)}


def bundles_issued(code: Path, kernels: Mapping[str, int]) -> int | None:
    """By all kernels of a program; None without a kernel, or with one whose code is not clear.

    Args:
      code: the folder where the compiler wrote their code.
      kernels: how often each is called, by its label.
    """
    try:
        each = [n * kernel_bundles.kernel_bundles(code, label) for label, n in kernels.items() if n]
    except ValueError:
        return None
    return sum(each) if each else None


def compile_apart(
    wanted: Sequence[Compilation], *, profile: bool, timeout_s: float
) -> list[dict[str, Any]]:
    """Compiles programs in one child process, one after the other.

    Args:
      wanted: what to compile.
      profile: with the profile of the schedule, which takes long for large programs and on which
        the compiler aborts at times.
      timeout_s: seconds for all of them, after which the child is ended.

    Returns:
      What `compile_here` gives, an entry a program. From the first that ended the child, or was cut
      off, on: only "error".

    Raises:
      ConfigError: libtpu is missing.
      RuntimeError: the child failed in its own code.
    """
    require_compiler("tpu")
    with (
        tempfile.TemporaryDirectory(prefix="tpu_profile_") as folder,
        tempfile.TemporaryDirectory(prefix="tpu_code_") as code,
    ):
        results, ending = child.call_apart(
            f"{__name__}:{compile_here.__name__}",
            [{**dataclasses.asdict(each), "code": code} for each in wanted],
            folder=environment.ROOT,
            environment=tpu.child_environment(EXTRA, folder if profile else None, code),
            timeout_s=timeout_s,
        )
    if ending == "aborted":
        ending = "profiler aborted" if profile else "compiler aborted"
    return results + [{"error": ending}] * (len(wanted) - len(results))
