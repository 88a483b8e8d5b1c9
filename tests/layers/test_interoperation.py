"""The op, the layer and the cell in plain JAX, Flax, Equinox and Haiku, and in jax.export."""

import functools
import re
from pathlib import Path

import equinox as eqx
import haiku as hk
import jax
import jax.monitoring
import jax.numpy as jnp
import numpy as np
import pytest
from flax import linen as nn
from flax import nnx
from flax.nnx import bridge
from helpers import Case, cast, relative_error
from quick import quick

from deltaproduct_jax import DeltaProductCell, GatedDeltaProduct, delta_product
from deltaproduct_jax.ops import sharded_delta_product

README = Path(__file__).resolve().parents[2] / "deltaproduct_jax" / "layers" / "README.md"
EXAMPLES = {
    title: code
    for title, code in re.findall(
        r"## ([^\n]*)\n(?:(?!\n## ).)*?```python\n(.*?)```", README.read_text(), re.DOTALL
    )
}
SIZES = {"num_heads": 2, "head_dim": 8}


def make_cell():
    return DeltaProductCell(16, **SIZES, rngs=nnx.Rngs(0))


def leaves(tree):
    """Arrays of a tree of parameters by the last part of their path, whatever library made it."""
    found = {}
    for path, leaf in jax.tree.flatten_with_path(tree)[0]:
        names = re.findall(r"\w+", jax.tree_util.keystr(path))
        start = max(i for i, name in enumerate(names) if name in NAMES)
        found[".".join(n for n in names[start:] if n != "value")] = leaf
    return found


NAMES = [name for name in vars(make_cell().mixer) if not name.startswith("_")]


@functools.cache
def reference():
    """A layer's state and one program for all libraries: outputs, gradients of their squares."""
    graph, state = nnx.split(GatedDeltaProduct(16, **SIZES, rngs=nnx.Rngs(5)))
    x = jax.random.normal(jax.random.key(1), (2, 6, 16))

    def loss(state):
        y, _ = nnx.merge(graph, state)(x)
        return jnp.sum(y**2), y

    return state, jax.jit(jax.grad(loss, has_aux=True))


def expected_of(params):
    """Outputs of the layer with the given parameters, and the gradients of the sum of squares."""
    state, program = reference()
    own = {name: params[name] for name in leaves(state)}
    gradients, y = program(jax.tree.unflatten(jax.tree.structure(state), own.values()))
    return y, leaves(gradients)


SAVED = ("A saved program", "A saved program without its parameters")


def test_the_readme_has_an_example_of_each():
    expected = ["Plain JAX", "Flax NNX", "Flax Linen", "Equinox", "Haiku"]
    assert list(EXAMPLES) == [*expected, "What no error can say", *SAVED]


# Where the example keeps its parameters.
PARAMETERS = {
    "Plain JAX": lambda names: names["params"],
    "Flax NNX": lambda names: nnx.state(names["rnn"], nnx.Param),
    "Flax Linen": lambda names: names["variables"],
    "Equinox": lambda names: names["mixer"].params,
    "Haiku": lambda names: names["params"],
    SAVED[0]: lambda names: nnx.state(names["layer"], nnx.Param),
    SAVED[1]: lambda names: names["params"],
}


def test_values_are_looked_at():
    names = {}
    exec(compile(EXAMPLES["What no error can say"], README.name, "exec"), names)
    assert names["said"].startswith("k must hold vectors of length 1 at most, got one of length 1")
    assert np.all(np.isfinite(names["o"]))


class WrongBlock(nn.Module):
    @nn.compact
    def __call__(self, x):
        return GatedDeltaProduct(16, **SIZES, rngs=nnx.Rngs(0))(x)[0]


def test_made_in_the_wrong_place_nothing_trains():
    """As the page says; made in the right one, all of it does: the examples."""
    x = jnp.ones((2, 6, 16))
    wrong = hk.transform(lambda x: GatedDeltaProduct(16, **SIZES, rngs=nnx.Rngs(0))(x)[0])
    for init in (WrongBlock().init, wrong.init):
        assert not jax.tree.leaves(jax.eval_shape(init, jax.random.key(0), x))
    layer = nnx.eval_shape(lambda: GatedDeltaProduct(16, **SIZES, rngs=nnx.Rngs(0)))
    size = lambda tree: sum(leaf.size for leaf in jax.tree.leaves(tree))
    right = bridge.to_linen(GatedDeltaProduct, 16, **SIZES)
    assert size(jax.eval_shape(right.init, jax.random.key(0), x)["params"]) == size(
        nnx.state(layer, nnx.Param)
    )


@pytest.mark.parametrize("title", quick(PARAMETERS, ["Flax NNX", "Flax Linen"]))
def test_examples_compute_what_the_layer_does(title, unchecked):
    names = {}
    exec(compile(EXAMPLES[title], f"{README.name}: {title}", "exec"), names)
    params = leaves(PARAMETERS[title](names))
    assert len(params) == 13
    y, gradients = expected_of(params)
    assert relative_error(names["y"], y) < 1e-5
    if "y_parallel" in names:
        assert relative_error(names["y_parallel"], y) < 1e-5
    if "gradients" in names:
        found = leaves(names["gradients"])
        assert found.keys() == gradients.keys()
        for name, gradient in gradients.items():
            assert relative_error(found[name], gradient) < 1e-4, name


class LinenReader(nn.Module):
    @nn.compact
    def __call__(self, x):
        cell = bridge.to_linen(DeltaProductCell, 16, **SIZES, name="cell")
        read = nn.scan(
            lambda cell, carry, x: cell(carry, x),
            variable_broadcast="params",
            split_rngs={"params": False},
            in_axes=1,
            out_axes=1,
        )
        return read(cell, make_cell().initialize_carry(x[:, 0].shape), x)[1]


class EquinoxReader(eqx.Module):
    params: nnx.State
    graph: nnx.GraphDef = eqx.field(static=True)

    def __call__(self, x):
        cell = nnx.merge(self.graph, self.params)
        carry = cell.initialize_carry(x[0].shape)
        return jax.lax.scan(lambda carry, x: cell(carry, x), carry, x)[1]


class HaikuCore(hk.RNNCore):
    def __call__(self, inputs, prev_state):
        graph, start = nnx.split(make_cell())
        paths, tree = jax.tree.flatten_with_path(start)
        params = [
            hk.get_parameter(
                jax.tree_util.keystr(path, simple=True, separator="."),
                leaf.shape,
                leaf.dtype,
                init=lambda *_, leaf=leaf: leaf,
            )
            for path, leaf in paths
        ]
        state, y = nnx.merge(graph, jax.tree.unflatten(tree, params))(prev_state, inputs)
        return y, state

    def initial_state(self, batch_size):
        return make_cell().initialize_carry((batch_size, 16))


def haiku_reader(x):
    core = HaikuCore()
    start = core.initial_state(x.shape[0])
    return hk.dynamic_unroll(core, x, start, time_major=False)[0]


def read_in_linen(x):
    variables = LinenReader().init(jax.random.key(0), x)
    return variables, jax.jit(LinenReader().apply)(variables, x)


def read_in_equinox(x):
    graph, params = nnx.split(make_cell())
    reader = EquinoxReader(params, graph)
    return reader.params, eqx.filter_jit(eqx.filter_vmap(reader))(x)


def read_in_haiku(x):
    net = hk.without_apply_rng(hk.transform(haiku_reader))
    params = net.init(jax.random.key(0), x)
    return params, jax.jit(net.apply)(params, x)


def read_in_plain_jax(x):
    graph, params = nnx.split(make_cell())

    @jax.jit
    def read(params, x):
        cell = nnx.merge(graph, params)
        carry = cell.initialize_carry(x[:, 0].shape)
        return jax.lax.scan(lambda c, x: cell(c, x), carry, x.swapaxes(0, 1))[1].swapaxes(0, 1)

    return params, read(params, x)


# The examples above call the layer from each of them; the cell is a layer's step.
@pytest.mark.parametrize(
    "read",
    [
        read_in_plain_jax,
        read_in_equinox,
        *(pytest.param(read, marks=pytest.mark.slow) for read in (read_in_linen, read_in_haiku)),
    ],
)
def test_the_cell_reads_token_by_token(read):
    x = jax.random.normal(jax.random.key(1), (2, 6, 16))
    params, y = read(x)
    assert relative_error(y, expected_of(leaves(params))[0]) < 1e-5


def op_inputs(T=20, **sizes):
    arrays = cast(Case(T=T, **sizes).arrays(), "float32")
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def run_op(implementation, differentiated=True):
    def outputs(arrays):
        return delta_product(**arrays, implementation=implementation)

    if not differentiated:
        return outputs
    return jax.grad(lambda arrays: sum(jnp.sum(jnp.sin(x)) for x in outputs(arrays)))


@pytest.mark.parametrize("differentiated", [False, True], ids=["outputs", "gradients"])
@pytest.mark.parametrize(
    "implementation", quick([None, "chunked", "recurrent", "associative"], ["recurrent"])
)
def test_exported_for_one_platform_and_back(implementation, differentiated):
    arrays, fn = op_inputs(), jax.jit(run_op(implementation, differentiated))
    saved = jax.export.export(fn)(arrays).serialize()
    got = jax.export.deserialize(saved).call(arrays)
    assert max(jax.tree.leaves(jax.tree.map(relative_error, got, fn(arrays)))) < 1e-6


@pytest.mark.slow
def test_exported_for_several_platforms_with_its_gradient():
    arrays, fn = op_inputs(), jax.jit(run_op("chunked", differentiated=False))
    platforms = ["cpu", "cuda", "rocm", "tpu"]
    exported = jax.export.export(fn, platforms=platforms)(arrays)
    back = jax.export.deserialize(exported.serialize(vjp_order=1))
    assert list(back.platforms) == platforms

    def loss(fn):
        return lambda arrays: sum(jnp.sum(jnp.sin(x)) for x in fn(arrays))

    got, expected = (jax.value_and_grad(loss(f))(arrays) for f in (back.call, fn))
    assert max(jax.tree.leaves(jax.tree.map(relative_error, got, expected))) < 1e-6


def test_a_platform_can_be_exported_where_it_is_not():
    arrays = op_inputs()
    for platform in ("tpu", "cuda"):
        exported = jax.export.export(jax.jit(run_op(None)), platforms=[platform])(arrays)
        back = jax.export.deserialize(exported.serialize())
        with pytest.raises(ValueError, match="cpu"):
            back.call(arrays)


def count(jaxpr) -> int:
    """Equations, those of inner programs included as often as they stand there."""
    found = len(jaxpr.eqns)
    for equation in jaxpr.eqns:
        for value in jax.tree.leaves(tuple(equation.params.values()), is_leaf=has_equations):
            inner = getattr(value, "jaxpr", value)
            found += count(inner) if hasattr(inner, "eqns") else 0
    return found


def has_equations(value) -> bool:
    return hasattr(value, "eqns")


@pytest.mark.parametrize(
    "differentiated", quick([False, True], [True]), ids=["outputs", "gradients"]
)
@pytest.mark.parametrize("implementation", quick([None, "chunked", "recurrent"], [None]))
def test_the_program_does_not_grow_with_the_tokens(implementation, differentiated):
    def equations(T):
        shapes = jax.eval_shape(lambda: op_inputs(T))
        return count(jax.make_jaxpr(run_op(implementation, differentiated))(shapes).jaxpr)

    # Platforms cut short sequences alike, and few chunks are written out; from here on all differ.
    assert equations(16384) == equations(131072) > 20


@pytest.mark.slow
def test_second_calls_do_not_compile():
    """Of the layer, of its step, of an Equinox module and of the op over a mesh."""
    compiled = []

    def listen(event, duration, **kwargs):
        del duration, kwargs
        if "backend_compile" in event:
            compiled.append(event)

    layer = GatedDeltaProduct(16, **SIZES, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    mixer = eqx.filter_jit(lambda params, x: nnx.merge(graph, params)(x))
    whole, step = nnx.jit(lambda layer, x: layer(x)), nnx.jit(lambda layer, *a: layer.step(*a))
    mesh = jax.make_mesh((2,), ("sequence",), axis_types=(jax.sharding.AxisType.Auto,))
    x, arrays = np.ones((2, 7, 16), np.float32), op_inputs(T=14)

    def call():
        _, state = whole(layer, x)
        _, state = step(layer, state, x[:, 0])
        _, state = step(layer, state, x[:, 1])
        o = sharded_delta_product(**arrays, mesh=mesh, sequence_axis="sequence")
        jax.block_until_ready((state, mixer(params, x), o))

    jax.monitoring.register_event_duration_secs_listener(listen)
    call()
    first = len(compiled)
    call()
    assert first >= 4
    assert len(compiled) == first
