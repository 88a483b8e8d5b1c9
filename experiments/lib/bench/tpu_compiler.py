"""Compiles the op for a TPU on a machine that has none, each program in a process of its own.

Package libtpu holds the compiler. It is loaded by a child, this
module run by Python, because it reads its options once, when it is loaded, and because its profiler
aborts the process on some programs. The child runs nothing on any device; the JAX of the parent is
left as it is.
"""

import dataclasses
import importlib.metadata
import importlib.util
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.experimental import topologies

from deltaproduct_jax.compilers import hlo_cost, kernel_traffic
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.ops import delta_product
from experiments.lib import environment
from experiments.lib.bench.timing import FORWARD, Shape

ROOT = Path(__file__).resolve().parents[3]
EXTRA = environment.extra_folder("tpu")
CHILD = [sys.executable, "-m", "experiments.lib.bench.tpu_compiler"]


@dataclasses.dataclass(frozen=True)
class Generation:
    """A kind of TPU: the smallest topology that its compiler knows, and the clock of its core."""

    topology: str
    hertz: float


# The clock follows from the published peaks of 275, 197, 459 and 918 TFLOP/s in bfloat16 and the
# multiply-adds of a chip a cycle: 8, 4 and 8 x 128 x 128; 4 x 256 x 256 on v6e. v4 and v5p have two
# cores a chip.
GENERATIONS = {
    "v4": Generation("v4:2x2x1", 1.05e9),
    "v5e": Generation("v5e:2x2", 1.5e9),
    "v5p": Generation("v5p:2x2x1", 1.75e9),
    "v6e": Generation("v6e:2x2", 1.75e9),
}


@dataclasses.dataclass(frozen=True)
class Job:
    """One program to compile: the op, its direction and sizes, and the chip."""

    generation: str
    implementation: str
    direction: str
    shape: Shape
    chunk_size: int | None = None


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
}


def program(job: Job) -> tuple[Callable, tuple[Any, ...]]:
    """A function and the abstract arguments to compile it for.

    It gives ``(o, final_state)``; with the gradient also that of q, k, v, beta and g, where the
    cotangents of both outputs are arguments.
    """
    arrays = jax.eval_shape(job.shape.inputs)
    run = IMPLEMENTATIONS[job.implementation]

    def forward(arrays):
        return run(**arrays, chunk_size=job.chunk_size)

    def backward(arrays, cotangents):
        outputs, pullback = jax.vjp(forward, arrays)
        return outputs, pullback(cotangents)

    if job.direction == FORWARD:
        return forward, (arrays,)
    return backward, (arrays, jax.eval_shape(forward, arrays))


def compile_here(job: Job) -> dict[str, Any]:
    """Compiles one program in this process, which must have been started for it.

    Returns:
      The fields of `hlo_cost.Cost`, and the bytes of temporary memory, arguments and outputs; or
      only "error", the compiler's first line, where it refuses the program.
    """
    chip = topologies.get_topology_desc(GENERATIONS[job.generation].topology, platform="tpu")
    mesh = jax.sharding.Mesh(np.array(chip.devices[:1]), ("device",))
    sharding = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec())
    # A Pallas kernel asks the mesh around it which TPU it is lowered for.
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        function, arguments = program(job)
        arguments = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), arguments
        )
        traced = jax.jit(function).trace(*arguments)
        kernels = kernel_traffic.kernel_bytes(traced.jaxpr.jaxpr)
        lowered = traced.lower()
    try:
        compiled = lowered.compile()
    except jax.errors.JaxRuntimeError as error:
        return {"error": str(error).splitlines()[0]}
    memory = compiled.memory_analysis()
    return {
        **dataclasses.asdict(hlo_cost.cost(compiled.as_text(), kernels)),
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
    }


def is_available() -> bool:
    """Whether package libtpu is there, in this environment or as the extra of ``.venv``."""
    return importlib.util.find_spec("libtpu") is not None or (EXTRA / "libtpu").is_dir()


def require_libtpu() -> None:
    """Raises ConfigError, saying how to get it, where package libtpu is missing."""
    if not is_available():
        raise ConfigError(
            "package libtpu, which holds the compiler for TPUs, is not installed; install it with "
            f"pip install {environment.extra_requirement('tpu')}, or as an extra of .venv with "
            "python3 tests/run.py --extra=tpu"
        )


def compile_apart(jobs: Sequence[Job], *, profile: bool, timeout_s: float) -> list[dict[str, Any]]:
    """Compiles programs in one child process, one after the other.

    Args:
      jobs: what to compile.
      profile: with the profile of the schedule, which takes long for large programs and on which
        the compiler aborts at times.
      timeout_s: seconds for all of them, after which the child is ended.

    Returns:
      What `compile_here` gives, an entry a job. From the first that ended the child, or was cut
      off, on: only "error".

    Raises:
      ConfigError: libtpu is missing.
      RuntimeError: the child failed in its own code.
    """
    require_libtpu()
    with tempfile.TemporaryDirectory(prefix="tpu_profile_") as folder:
        child = subprocess.Popen(
            CHILD,
            cwd=ROOT,
            env=child_environment(folder if profile else None),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        is_late = False
        try:
            text = json.dumps([dataclasses.asdict(job) for job in jobs])
            out, complaint = child.communicate(text, timeout=timeout_s)
        except subprocess.TimeoutExpired:
            is_late = True
            child.kill()
            out, complaint = child.communicate()
    if child.returncode > 0:
        raise RuntimeError(f"compiling {jobs} failed:\n{complaint[-3000:]}")
    # The last line may be half a line.
    results = [json.loads(line) for line in out.split("\n")[:-1]]
    ending = "timed out" if is_late else "profiler aborted" if profile else "compiler aborted"
    return results + [{"error": ending}] * (len(jobs) - len(results))


def child_environment(profile_folder: str | None) -> dict[str, str]:
    """Of a child: its JAX runs on the CPU, and libtpu asks nobody about a TPU."""
    options = os.environ.get("LIBTPU_INIT_ARGS", "")
    if profile_folder is not None:
        options += f" --xla_jf_dump_static_llo_profile_to={profile_folder}"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # the parent's, for its own devices; a TPU's are LIBTPU_INIT_ARGS
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(EXTRA)])),
        "LIBTPU_INIT_ARGS": options.strip(),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }


def versions() -> str:
    """Of JAX and of the compiler, for the record."""
    (found, *_) = importlib.metadata.distributions(name="libtpu", path=[*sys.path, str(EXTRA)])
    return f"jax {jax.__version__}, libtpu {found.version}"


def main() -> None:
    """Reads jobs from standard input, prints a line of figures for each."""
    for fields in json.load(sys.stdin):
        job = Job(**fields | {"shape": Shape(**fields["shape"])})
        print(json.dumps(compile_here(job)), flush=True)


if __name__ == "__main__":
    main()
