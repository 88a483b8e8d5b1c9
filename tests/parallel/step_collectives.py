"""Compiles a training step for 16 devices and lists what they send; a program of its own.

``python -m tests.parallel.step_collectives cpu|tpu MIXER MESH ...``: for simulated CPU devices, or
for 16 chips of TPU v5e by their compiler alone (package libtpu), over meshes as ``--mesh`` has
them. How many devices there are must be settled before JAX starts, hence the program. It prints a
JSON object a mesh: ``sent``, entries [kind, bytes, axes of the mesh, how often], and ``most``,
bytes of what a device has of each kind of array.
"""

import collections
import json
import os
import sys
from typing import Any

PLATFORM, MIXER, *MESHES = sys.argv[1:]
DEVICES = 16
os.environ["JAX_PLATFORMS"] = "cpu"
# Nothing is run on a TPU, so nobody needs to be asked about one, or kept from it.
os.environ["TPU_SKIP_MDS_QUERY"] = os.environ["ALLOW_MULTIPLE_LIBTPU_LOAD"] = "1"
os.environ["XLA_FLAGS"] = (
    f"--xla_force_host_platform_device_count={DEVICES} --xla_backend_optimization_level=0"
)

import jax

from deltaproduct_jax.compilers import topologies
from deltaproduct_jax.compilers.collectives import collectives_by_axis
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.text import TextTask
from experiments.lib.pod.step_program import step_program

# Tokens of a device are many beside its channels, so that whoever sends them stands out.
ROWS, TOKENS = 32, 1024
FIELDS = {"use_short_conv": True, "num_householder": 2, "use_output_gate": True}
MODEL = ModelConfig(
    vocab_size=96, mixer=MIXER, hidden_size=32, num_heads=4, head_dim=8, intermediate_size=64,
    remat="blocks", **{name: value for name, value in FIELDS.items() if MIXERS[MIXER].takes(name)},
)  # fmt: skip
RUN = RunConfig(
    TextTask(train_length=TOKENS, eval_lengths=(TOKENS,)), MODEL, TrainConfig(batch_size=ROWS)
)


def main() -> None:
    """Compiles and prints."""
    chips = topologies.devices_of("v5e:4x4") if PLATFORM == "tpu" else jax.devices()
    for mesh in MESHES:
        print(json.dumps(found_over(DeviceConfig(mesh=mesh), chips)), flush=True)


def found_over(mesh: DeviceConfig, chips: list[jax.Device]) -> dict[str, Any]:
    """What is sent over a mesh, and the sizes that it is compared with."""
    program = step_program(RUN, mesh, chips)
    layout = program.layout
    text = program.lower().compile().as_text()
    sent = collections.Counter(collectives_by_axis(text, layout.sizes))
    rows = ROWS // layout.devices_of("batch")
    tokens = TOKENS // layout.sizes["sequence"]
    heads = MODEL.num_heads // layout.sizes["tensor"]
    return {
        "sent": [[*found, count] for found, count in sorted(sent.items())],
        "most": {
            "residual": 4 * rows * tokens * MODEL.hidden_size,
            "parameter": 4 * max(x.size for x in jax.tree.leaves(program.state.params)),
            "state": 4 * rows * heads * MODEL.head_dim**2,
            "heads": 4 * rows * tokens * heads * MODEL.head_dim,
            "past": 4 * rows * 3 * 2 * heads * MODEL.head_dim,
        },
    }


main()
