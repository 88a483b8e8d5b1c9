"""TPUs that are not there: their topologies and clocks, and how a process compiles for them.

Package libtpu holds the compiler. It reads its options once, when it is loaded, and its profiler
aborts the process on some programs, so that it is loaded by children alone (`child`), which run
nothing on any device.
"""

import contextlib
import dataclasses
import os
from collections.abc import Iterator
from pathlib import Path

import jax
import numpy as np
from jax.experimental import topologies

from deltaproduct_jax.compilers import kernel_bundles


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


def mesh_of(topology: str, shape: tuple[int, ...], names: tuple[str, ...]) -> jax.sharding.Mesh:
    """A mesh of the first chips of a topology, such as "v5e:16x16", that is not there.

    Must be called in a process with libtpu; see `child_environment`.
    """
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    return jax.sharding.Mesh(np.array(devices[: np.prod(shape)]).reshape(shape), names)


@contextlib.contextmanager
def lowering_for(mesh: jax.sharding.Mesh) -> Iterator[None]:
    """Inside, Pallas kernels are lowered for the chips of a mesh: they ask the mesh around them."""
    with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
        yield


def child_environment(
    extra: Path, profile_folder: str | None = None, code_folder: str | None = None
) -> dict[str, str]:
    """Of a child that compiles: its JAX runs on the CPU, and libtpu asks nobody about a TPU.

    Args:
      extra: folder of packages that stands beside the environment, where libtpu may be.
      profile_folder: where the compiler writes the profile of its schedule; None: it makes none.
      code_folder: where it writes the code that `kernel_bundles` reads; None: it writes none.
    """
    options = os.environ.get("LIBTPU_INIT_ARGS", "")
    if profile_folder is not None:
        options += f" --xla_jf_dump_static_llo_profile_to={profile_folder}"
    if code_folder is not None:
        options += f" {kernel_bundles.DUMP.format(code_folder)}"
    return os.environ | {
        "JAX_PLATFORMS": "cpu",
        "XLA_FLAGS": "",  # the parent's, for its own devices; a TPU's are LIBTPU_INIT_ARGS
        "PYTHONPATH": os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(extra)])),
        "LIBTPU_INIT_ARGS": options.strip(),
        "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
        "TPU_SKIP_MDS_QUERY": "1",
        "TPU_ACCELERATOR_TYPE": "v5litepod-4",
        "TPU_WORKER_HOSTNAMES": "localhost",
    }
