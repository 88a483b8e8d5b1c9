"""Compiles programs around the TPU kernel for TPUs that are not there; a program of its own.

``python -m tests.tpu_programs NAME ...`` prints one JSON object a name: how often each custom call
and each collective stands in the compiled program. libtpu reads its environment once, when it is
loaded, hence the program; `tests/test_tpu_compile.py` has the names.
"""

import collections
import functools
import json
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental import topologies
from jax.sharding import NamedSharding, PartitionSpec

from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.ops import delta_product, sharded_delta_product
from deltaproduct_jax.ops.checks import LAYOUT
from deltaproduct_jax.tasks.task import Batch
from deltaproduct_jax.training.config import TrainConfig
from deltaproduct_jax.training.optimizer import make_optimizer, make_schedule
from deltaproduct_jax.training.step import init_state, make_train_step, split_model

WHOLE = PartitionSpec()
MODEL = ModelConfig(
    vocab_size=64,
    mixer="gated_delta_product",
    hidden_size=128,
    num_layers=1,
    num_heads=2,
    head_dim=64,
    num_householder=2,
    dtype="bfloat16",
)
SIZES = {"B": 2, "T": 512, "R": 2, "H": 2, "Hv": 4, "K": 64, "V": 128}


def mesh_of(topology: str, shape: tuple[int, ...], names: tuple[str, ...]) -> jax.sharding.Mesh:
    devices = topologies.get_topology_desc(topology, platform="tpu").devices
    return jax.sharding.Mesh(np.array(devices[: np.prod(shape)]).reshape(shape), names)


def abstract(tree, mesh, spec=WHOLE):
    """Shapes and dtypes of a tree, spread over a mesh."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def op_inputs(mesh, spec=WHOLE, stacked: tuple[int, ...] = ()):
    """Of the op: q, k and v in bfloat16, ids of segments apart."""

    def argument(name):
        shape = stacked + tuple(SIZES[letter] for letter in LAYOUT[name])
        return jnp.zeros(shape, jnp.bfloat16 if name in "qkv" else jnp.float32)

    arrays = jax.eval_shape(lambda: {n: argument(n) for n in ("q", "k", "v", "beta", "g")})
    ids = jax.ShapeDtypeStruct((SIZES["B"], SIZES["T"]), jnp.int32)
    return abstract(arrays, mesh, spec), abstract(ids, mesh, spec)


def loss(arrays, ids, op=delta_product):
    o, state = op(**arrays, segment_ids=ids)
    return jnp.sum(jnp.sin(o.astype(jnp.float32))) + jnp.sum(jnp.cos(state))


def train_step(*, in_shard_map: bool):
    """A step of training on 256 chips, the batch cut over all of them."""
    mesh = mesh_of("v5e:16x16", (256,), ("data",))
    optimizer, schedule = make_optimizer(TrainConfig()), make_schedule(TrainConfig())
    graphdef, params = split_model(SequenceModel(MODEL, rngs=nnx.Rngs(0)))
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), params)
    cut = PartitionSpec("data")
    batch = Batch(*(jax.ShapeDtypeStruct((256, 128), d) for d in (jnp.int32, jnp.int32, bool)))
    axis = "data" if in_shard_map else None
    step = make_train_step(graphdef, optimizer, schedule, accumulation_steps=1, axis_name=axis)
    if in_shard_map:
        specs = {"in_specs": (WHOLE, cut), "out_specs": (WHOLE, WHOLE)}
        step = jax.shard_map(step, mesh=mesh, **specs)
    return mesh, step, (abstract(state, mesh), abstract(batch, mesh, cut))


def transformed():
    """Grouped heads and segments, mapped, rematerialised and differentiated."""
    mesh = mesh_of("v5e:2x2", (1,), ("data",))
    arrays, ids = op_inputs(mesh, stacked=(2,))
    gradient = jax.vmap(jax.grad(jax.checkpoint(loss)), in_axes=(0, None))
    return mesh, gradient, (arrays, ids)


def newest():
    """The gradient on the newest chip that the compiler knows; `tpu_compiler` has the others."""
    mesh = mesh_of("tpu7x:2x2x1", (1,), ("data",))
    return mesh, jax.grad(loss), op_inputs(mesh)


def sequence():
    """The gradient of the op over four chips that share each row."""
    mesh = mesh_of("v5e:2x2", (1, 4), ("data", "sequence"))
    op = functools.partial(
        sharded_delta_product, mesh=mesh, batch_axis="data", sequence_axis="sequence"
    )
    inputs = op_inputs(mesh, PartitionSpec("data", "sequence"))
    return mesh, jax.grad(functools.partial(loss, op=op)), inputs


PROGRAMS = {
    "step in shard_map": functools.partial(train_step, in_shard_map=True),
    "step under jit": functools.partial(train_step, in_shard_map=False),
    "transformed": transformed,
    "newest": newest,
    "sequence": sequence,
}


def main() -> None:
    """Compiles and prints."""
    for name in sys.argv[1:]:
        mesh, function, arguments = PROGRAMS[name]()
        # A kernel asks the mesh around it which TPU it is for.
        with jax.sharding.use_abstract_mesh(mesh.abstract_mesh):
            text = jax.jit(function).lower(*arguments).compile().as_text()
        calls = re.findall(r'custom_call_target="(\w+)"', text)
        sent = re.findall(r" (all-\w+|collective-permute|reduce-scatter)(?:-start)?\(", text)
        print(json.dumps(collections.Counter(calls + sent)), flush=True)


if __name__ == "__main__":
    main()
