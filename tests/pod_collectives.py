"""Compiles the sharded op for 256 devices and prints its collectives; a program of its own.

``python -m tests.pod_collectives cpu|tpu SEQUENCE``: for simulated CPU devices, or for a TPU v5e
pod of 16 x 16 chips by its compiler alone (package libtpu); SEQUENCE of the devices lie along T.
How many devices there are must be settled before JAX starts, hence the program. It prints one JSON
object: kind and bytes of each collective of the forward pass, and of outputs with all gradients;
and the bytes of a state and of a map on one device.
"""

import json
import os
import sys

PLATFORM, SEQUENCE = sys.argv[1], int(sys.argv[2])
os.environ["JAX_PLATFORMS"] = "cpu"
# Nothing is run on a TPU, so nobody needs to be asked about one, or kept from it.
os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["XLA_FLAGS"] = (
    "--xla_force_host_platform_device_count=256 --xla_backend_optimization_level=0"
)

import jax
import jax.numpy as jnp
import numpy as np

from deltaproduct_jax.compilers import tpu
from deltaproduct_jax.compilers.collectives import collectives
from deltaproduct_jax.ops import sharded_delta_product
from deltaproduct_jax.ops.checks import LAYOUT

SIZES = {"B": 8, "T": 256 * SEQUENCE, "R": 2, "H": 4, "Hv": 8, "K": 32, "V": 64}
AXES = {"batch_axis": "data", "head_axis": "tensor", "sequence_axis": "sequence"}
TENSOR = 4
CUT = {"B": "data", "T": "sequence", "H": "tensor", "Hv": "tensor"}


def main() -> None:
    """Compiles and prints."""
    shape, names = (256 // SEQUENCE // TENSOR, TENSOR, SEQUENCE), ("data", "tensor", "sequence")
    if PLATFORM == "tpu":
        mesh = tpu.mesh_of("v5e:16x16", shape, names)
    else:
        mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(shape), names)

    def argument(layout, dtype=jnp.float32):
        spec = jax.sharding.PartitionSpec(*(CUT.get(d) for d in layout))
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct([SIZES[d] for d in layout], dtype, sharding=sharding)

    inputs = ("q", "k", "v", "beta", "g", "initial_state")
    arrays = {name: argument(LAYOUT[name]) for name in inputs}
    cotangents = argument(("B", "T", "Hv", "V")), arrays["initial_state"]
    ids = argument(LAYOUT["segment_ids"], jnp.int32)

    def forward(arrays, ids):
        return sharded_delta_product(**arrays, segment_ids=ids, mesh=mesh, **AXES)

    def backward(arrays, ids, cotangents):
        outputs, pullback = jax.vjp(lambda a: forward(a, ids), arrays)
        return outputs, pullback(cotangents)

    cut = dict(zip(("B", "Hv"), shape[:2], strict=True))
    heads = np.prod([SIZES[d] // n for d, n in cut.items()], dtype=int)
    print(
        json.dumps(
            {
                "state": int(4 * heads * SIZES["K"] * SIZES["V"]),
                "map": int(4 * heads * SIZES["K"] ** 2),
                "forward": collectives(jax.jit(forward).lower(arrays, ids).compile().as_text()),
                "gradient": collectives(
                    jax.jit(backward).lower(arrays, ids, cotangents).compile().as_text()
                ),
            }
        )
    )


main()
