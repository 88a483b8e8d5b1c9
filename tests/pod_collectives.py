"""Compiles the sharded op for 256 devices and prints its collectives; a program of its own.

``python -m tests.pod_collectives cpu|tpu SEQUENCE``: for simulated CPU devices, or for a TPU v5e
pod of 16 x 16 chips by its compiler alone (package libtpu); SEQUENCE of the devices lie along T.
How many devices there are must be settled before JAX starts, hence the program. It prints one JSON
object: kind and bytes of each collective of the forward pass, and of outputs with all gradients;
and the bytes of a state and of a map on one device.
"""

import json
import os
import re
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
from jax.experimental import topologies

from deltaproduct_jax.ops import sharded_delta_product
from deltaproduct_jax.ops.checks import LAYOUT

SIZES = {"B": 8, "T": 256 * SEQUENCE, "R": 2, "H": 4, "Hv": 8, "K": 32, "V": 64}
AXES = {"batch_axis": "data", "head_axis": "tensor", "sequence_axis": "sequence"}
TENSOR = 4
CUT = {"B": "data", "T": "sequence", "H": "tensor", "Hv": "tensor"}
BYTES = {"f32": 4, "bf16": 2, "s32": 4, "u32": 4, "pred": 1}
COLLECTIVE = re.compile(
    r" = (?P<shapes>\S.*?) (?P<kind>all-reduce|all-gather|all-to-all|reduce-scatter|"
    r"collective-permute|collective-broadcast|ragged-all-to-all|send|recv)(?:-start)?\("
)


def collectives(program: str) -> list[tuple[str, int]]:
    """Kind and bytes of every array that a compiled program sends."""
    found = []
    for match in COLLECTIVE.finditer(program):
        sizes = [
            BYTES[dtype] * int(np.prod([int(n) for n in shape.split(",") if n]))
            for dtype, shape in re.findall(r"\b(\w+)\[([\d,]*)\]", match["shapes"])
        ]
        # The compiler joins sums; a permute started ahead names its operand, result and handles.
        found += [
            (match["kind"], n) for n in (sizes if "reduce" in match["kind"] else [max(sizes)])
        ]
    return sorted(found)


def main() -> None:
    """Compiles and prints."""
    if PLATFORM == "tpu":
        devices = topologies.get_topology_desc("v5e:16x16", platform="tpu").devices
    else:
        devices = jax.devices()
    shape = (256 // SEQUENCE // TENSOR, TENSOR, SEQUENCE)
    mesh = jax.sharding.Mesh(np.array(devices).reshape(shape), ("data", "tensor", "sequence"))

    def argument(layout, dtype=jnp.float32):
        spec = jax.sharding.PartitionSpec(*(CUT.get(d) for d in layout))
        sharding = jax.sharding.NamedSharding(mesh, spec)
        return jax.ShapeDtypeStruct([SIZES[d] for d in layout], dtype, sharding=sharding)

    names = ("q", "k", "v", "beta", "g", "initial_state")
    arrays = {name: argument(LAYOUT[name]) for name in names}
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
