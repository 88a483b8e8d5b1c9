"""Compiles programs around the TPU kernel for TPUs that are not there; a program of its own.

``python -m tests.tpu_programs NAME ...`` prints one JSON object a name: how often each custom call,
collective and loop stands in the compiled program. libtpu reads its environment once, when it is
loaded, hence the program; `tests/test_tpu_compile.py` has the names.
"""

import collections
import dataclasses
import functools
import json
import re
import sys
from typing import NamedTuple

import jax
import jax.numpy as jnp
from flax import nnx
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec

from deltaproduct_jax import GatedDeltaProduct
from deltaproduct_jax.compilers.tpu import lowering_for, mesh_of
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.ops import delta_product, sharded_delta_product
from deltaproduct_jax.ops.checks import LAYOUT
from deltaproduct_jax.parallel.config import AXES, DeviceConfig
from deltaproduct_jax.parallel.layout import Layout
from deltaproduct_jax.parallel.names import names_of_model
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
WITH_CONVOLUTIONS = dataclasses.replace(MODEL, use_short_conv=True, head_dim=128)
SIZES = {"B": 2, "T": 512, "R": 2, "H": 2, "Hv": 4, "K": 64, "V": 128}


class Gradient(NamedTuple):
    """Of the op on one chip: grouped heads, an initial state."""

    topology: str
    dtype: str
    R: int
    K: int
    V: int
    gated: bool = True
    packed: bool = True
    T: int = 64
    H: int = 1


# Both dtypes on every generation; in each dtype every R, the widest K and V, and padded ones.
GRADIENTS = {
    "v4 bfloat16": Gradient("v4:2x2x1", "bfloat16", 3, 100, 72, gated=False),
    "v4 float32": Gradient("v4:2x2x1", "float32", 4, 64, 128, gated=False, packed=False),
    "v5e bfloat16": Gradient("v5e:2x2", "bfloat16", 4, 256, 256, packed=False),
    "v5e float32": Gradient("v5e:2x2", "float32", 1, 192, 64),
    # 55 MiB of the 64 that there are: more than a kernel takes where it can do with less.
    "v5p bfloat16": Gradient("v5p:2x2x1", "bfloat16", 1, 256, 256, T=128, H=8),
    "v5p float32": Gradient("v5p:2x2x1", "float32", 2, 128, 256, packed=False),
    "v6e bfloat16": Gradient("v6e:2x2", "bfloat16", 2, 64, 64, gated=False, packed=False),
    "v6e float32": Gradient("v6e:2x2", "float32", 3, 256, 256),
    "newest bfloat16": Gradient("tpu7x:2x2x1", "bfloat16", 2, 192, 128),
    "newest float32": Gradient("tpu7x:2x2x1", "float32", 4, 100, 136, gated=False),
}
# Generation, dtype and ``conv_implementation``.
LAYERS = {
    "layer, v5e bfloat16": ("v5e:2x2", "bfloat16"),
    "layer, v5e float32": ("v5e:2x2", "float32"),
    "layer, v6e bfloat16": ("v6e:2x2", "bfloat16"),
    "layer, v4 bfloat16": ("v4:2x2x1", "bfloat16"),
    "layer, newest float32": ("tpu7x:2x2x1", "float32"),
    "layer, plain": ("v5e:2x2", "bfloat16", "plain"),
}


def abstract(tree, mesh, spec=WHOLE):
    """Shapes and dtypes of a tree, spread over a mesh."""
    sharding = NamedSharding(mesh, spec)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)


def op_inputs(
    mesh,
    spec=WHOLE,
    stacked: tuple[int, ...] = (),
    sizes=SIZES,
    dtype="bfloat16",
    names=("q", "k", "v", "beta", "g"),
):
    """Of the op: q, k and v in ``dtype``, ids of segments apart."""

    def argument(name):
        shape = stacked + tuple(sizes[letter] for letter in LAYOUT[name])
        return jax.ShapeDtypeStruct(shape, jnp.dtype(dtype if name in "qkv" else "float32"))

    ids = jax.ShapeDtypeStruct((sizes["B"], sizes["T"]), jnp.int32)
    return abstract({n: argument(n) for n in names}, mesh, spec), abstract(ids, mesh, spec)


def loss(arrays, ids, op=delta_product):
    o, state = op(**arrays, segment_ids=ids)
    return jnp.sum(jnp.sin(o.astype(jnp.float32))) + jnp.sum(jnp.cos(state))


def train_step(*, placed: bool, config: ModelConfig = MODEL):
    """A step of training on 256 chips: batch, parameters and heads cut, or told nothing of it."""
    sizes = DeviceConfig(mesh="data:-1,fsdp:8,tensor:2").sizes_of(256)
    devices = mesh_of("v5e:16x16", tuple(sizes[axis] for axis in AXES), AXES).devices
    mesh = Mesh(devices, AXES, axis_types=(AxisType.Auto,) * len(AXES))
    model = nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
    layout = Layout(mesh, names_of_model(model))
    optimizer, schedule = make_optimizer(TrainConfig()), make_schedule(TrainConfig())
    definition, params = split_model(model)
    state = jax.eval_shape(functools.partial(init_state, optimizer=optimizer), params)
    batch = Batch(*(jax.ShapeDtypeStruct((256, 128), d) for d in (jnp.int32, jnp.int32, bool)))
    cut = abstract(batch, mesh, PartitionSpec(("data", "fsdp")))
    step = make_train_step(definition, optimizer, schedule, 1, layout if placed else None)
    shardings = layout.shardings(state)
    state = jax.tree.map(
        lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), state, shardings
    )
    return mesh, step, (state, cut)


def transformed():
    """Grouped heads and segments, mapped, rematerialised and differentiated."""
    mesh = mesh_of("v5e:2x2", (1,), ("data",))
    arrays, ids = op_inputs(mesh, stacked=(2,))
    gradient = jax.vmap(jax.grad(jax.checkpoint(loss)), in_axes=(0, None))
    return mesh, gradient, (arrays, ids)


def gradient(case: Gradient):
    """Of every array; both kernels are in it."""
    mesh = mesh_of(case.topology, (1,), ("data",))
    sizes = {"B": 1, "Hv": 2 * case.H} | {x: getattr(case, x) for x in "TRHKV"}
    names = ["q", "k", "v", "beta", "initial_state", *["g"] * case.gated]
    arrays, ids = op_inputs(mesh, sizes=sizes, dtype=case.dtype, names=names)
    return mesh, jax.grad(loss), (arrays, ids if case.packed else None)


def layer(topology: str, dtype: str, conv_implementation: str | None = None):
    """The gradient of a layer with convolutions on one chip, packed, from a state."""
    mesh = mesh_of(topology, (1,), ("data",))
    sizes = {"num_heads": 2, "head_dim": 128, "use_output_gate": False, "dtype": jnp.dtype(dtype)}
    options = sizes | {"conv_implementation": conv_implementation}
    make = lambda: GatedDeltaProduct(256, **options, rngs=nnx.Rngs(0))
    graph, params = nnx.split(nnx.eval_shape(make))
    state = jax.eval_shape(lambda: nnx.merge(graph, params).init_state(2))
    x, ids = (
        jax.ShapeDtypeStruct(shape, d) for shape, d in (((2, 77, 256), dtype), ((2, 77), int))
    )

    def loss(params, x, state, ids):
        y, after = nnx.merge(graph, params)(x, state=state, segment_ids=ids)
        return jnp.sum(y.astype(jnp.float32) ** 2) + jnp.sum(after.recurrent**2)

    given = (nnx.to_pure_dict(params), x, state, ids)
    return mesh, jax.grad(loss, (0, 1, 2)), abstract(given, mesh)


def sequence():
    """The gradient of the op over four chips that share each row."""
    mesh = mesh_of("v5e:2x2", (1, 4), ("data", "sequence"))
    op = functools.partial(
        sharded_delta_product, mesh=mesh, batch_axis="data", sequence_axis="sequence"
    )
    inputs = op_inputs(mesh, PartitionSpec("data", "sequence"))
    return mesh, jax.grad(functools.partial(loss, op=op)), inputs


PROGRAMS = {
    "step over a mesh": functools.partial(train_step, placed=True),
    "step without a layout": functools.partial(train_step, placed=False),
    "step with convolutions": functools.partial(train_step, placed=True, config=WITH_CONVOLUTIONS),
    "transformed": transformed,
    "sequence": sequence,
    **{name: functools.partial(layer, *case) for name, case in LAYERS.items()},
    **{name: functools.partial(gradient, case) for name, case in GRADIENTS.items()},
}


def main() -> None:
    """Compiles and prints."""
    for name in sys.argv[1:]:
        mesh, function, arguments = PROGRAMS[name]()
        with lowering_for(mesh):
            text = jax.jit(function).lower(*arguments).compile().as_text()
        calls = re.findall(r'custom_call_target="(\w+)"', text)
        sent = re.findall(r" (all-\w+|collective-permute|reduce-scatter|while)(?:-start)?\(", text)
        print(json.dumps(collections.Counter(calls + sent)), flush=True)


if __name__ == "__main__":
    main()
