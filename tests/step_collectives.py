"""Compiles a training step for 16 devices and lists what they send; a program of its own.

``python -m tests.step_collectives cpu|tpu MIXER MESH ...``: for simulated CPU devices, or for 16
chips of TPU v5e by their compiler alone (package libtpu), over meshes as ``--mesh`` has them. How
many devices there are must be settled before JAX starts, hence the program. It prints a JSON object
a mesh: ``sent``, entries [kind, bytes, axes of the mesh, how often], and ``most``, bytes of what a
device has of each kind of array.
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
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import AxisType, Mesh

from deltaproduct_jax.compilers import tpu
from deltaproduct_jax.compilers.collectives import collectives_by_axis
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.parallel.config import AXES, DeviceConfig
from deltaproduct_jax.parallel.layout import Layout
from deltaproduct_jax.parallel.names import names_of_model
from deltaproduct_jax.tasks.task import Batch
from deltaproduct_jax.training.config import TrainConfig
from deltaproduct_jax.training.optimizer import make_optimizer, make_schedule
from deltaproduct_jax.training.step import init_state, make_train_step, split_model

# Tokens of a device are many beside its channels, so that whoever sends them stands out.
ROWS, TOKENS = 32, 1024
FIELDS = {"use_short_conv": True, "num_householder": 2, "use_output_gate": True}
MODEL = ModelConfig(
    vocab_size=96, mixer=MIXER, hidden_size=32, num_heads=4, head_dim=8, intermediate_size=64,
    remat="blocks", **{name: value for name, value in FIELDS.items() if MIXERS[MIXER].takes(name)},
)  # fmt: skip


def mesh_of(text: str) -> Mesh:
    """16 devices, simulated or described."""
    sizes = DeviceConfig(mesh=text).sizes_of(DEVICES)
    shape = tuple(sizes[axis] for axis in AXES)
    if PLATFORM == "tpu":
        grid = tpu.mesh_of("v5e:4x4", shape, AXES).devices
    else:
        grid = np.array(jax.devices()).reshape(shape)
    return Mesh(grid, AXES, axis_types=(AxisType.Auto,) * len(AXES))


def main() -> None:
    """Compiles and prints."""
    for text in MESHES:
        print(json.dumps(found_over(mesh_of(text))), flush=True)


def found_over(mesh: Mesh) -> dict[str, Any]:
    """What is sent over a mesh, and the sizes that it is compared with."""
    model = nnx.eval_shape(lambda: SequenceModel(MODEL, rngs=nnx.Rngs(0)))
    layout = Layout(mesh, names_of_model(model))
    optimizer, schedule = make_optimizer(TrainConfig()), make_schedule(TrainConfig())
    definition, params = split_model(model)
    state = jax.eval_shape(lambda params: init_state(params, optimizer), params)
    update = make_train_step(definition, optimizer, schedule, 1, layout)

    def step(state, batch):
        return update(state, layout.cut_batch(batch))

    abstract = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s)
    batch = Batch(*(jnp.empty((ROWS, TOKENS), d) for d in (jnp.int32, jnp.int32, bool)))
    arguments = (
        jax.tree.map(abstract, state, layout.shardings(state)),
        jax.tree.map(lambda x: abstract(x, layout.whole), batch),
    )
    with tpu.lowering_for(layout.mesh):
        text = jax.jit(step).lower(*arguments).compile().as_text()
    sent = collections.Counter(collectives_by_axis(text, layout.sizes))
    rows = ROWS // layout.devices_of("batch")
    tokens = TOKENS // layout.sizes["sequence"]
    heads = MODEL.num_heads // layout.sizes["tensor"]
    return {
        "sent": [[*found, count] for found, count in sorted(sent.items())],
        "most": {
            "residual": 4 * rows * tokens * MODEL.hidden_size,
            "parameter": 4 * max(x.size for x in jax.tree.leaves(params)),
            "state": 4 * rows * heads * MODEL.head_dim**2,
            "past": 4 * rows * 3 * 2 * heads * MODEL.head_dim,
        },
    }


main()
