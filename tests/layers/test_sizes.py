"""The layer, the cell and the ops by token or over a mesh: symbolic, empty and cut batches."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import Case, cast
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deltaproduct_jax.layers import DeltaProductCell, GatedDeltaProduct
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.ops import delta_product_step, sharded_delta_product

SIZES = {"num_heads": 2, "head_dim": 4, "num_householder": 2}
CASE = Case(T=4, R=2, B=2, H=2, G=2, K=4, V=3)


def close(got, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, expected)


def arrays_of(**sizes):
    arrays = cast(Case(**{**vars(CASE), **sizes}).arrays(), "float32")
    return {name: jnp.asarray(x) for name, x in arrays.items()}


def token_of(B):
    arrays = arrays_of(B=B)
    state = arrays.pop("initial_state")
    return {"state": state, **{name: x[:, 0] for name, x in arrays.items()}}


def symbolic(tree):
    """The shapes of a tree with a batch of any size."""
    (b,) = jax.export.symbolic_shape("b")
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((b, *x.shape[1:]), x.dtype), tree)


def saved(function, *before, shapes):
    """``function`` after a way through bytes, with its derivative."""
    exported = jax.export.export(jax.jit(function))(*before, shapes)
    return jax.export.deserialize(exported.serialize(vjp_order=1)).call


@pytest.mark.slow
def test_a_step_is_exported_for_any_batch(unchecked):
    step = jax.jit(lambda token: delta_product_step(**token, use_qk_l2norm=True))
    back = saved(step, shapes=symbolic(token_of(2)))
    for B in (1, 3):
        close(back(token_of(B)), step(token_of(B)))
    total = lambda step: lambda token: sum(jnp.sum(jnp.sin(x)) for x in step(token))
    one, other = (jax.jit(jax.grad(total(f)))(token_of(3)) for f in (back, step))
    close(one, other)


@pytest.mark.slow
def test_a_layer_is_exported_for_any_batch(unchecked):
    layer = GatedDeltaProduct(8, **SIZES, use_short_conv=True, rngs=nnx.Rngs(0))
    graph, params = nnx.split(layer)
    leaves, tree = jax.tree.flatten(params)

    def run(leaves, given):
        layer = nnx.merge(graph, tree.unflatten(leaves))
        y, state = layer(given["x"], state=given["state"], mask=given["mask"])
        return y, jax.tree.leaves(state)

    def given(B):
        x = jax.random.normal(jax.random.key(B), (B, 5, 8))
        mask = jnp.arange(5)[None] < 5 - jnp.arange(B)[:, None]
        return {"x": x, "state": layer.init_state(B), "mask": mask}

    run = jax.jit(run)
    back = saved(run, leaves, shapes=symbolic(given(2)))
    for B in (1, 3):
        close(back(leaves, given(B)), run(leaves, given(B)))


@pytest.mark.parametrize("sequence_axis", [None, "sequence"])
@pytest.mark.parametrize(("B", "T"), [(0, 4), (2, 0)])
def test_empty_in_empty_out_over_a_mesh(B, T, sequence_axis):
    mesh = jax.make_mesh((2, 2), ("data", "sequence"), axis_types=(AxisType.Auto,) * 2)
    run = functools.partial(
        sharded_delta_product, mesh=mesh, batch_axis="data", sequence_axis=sequence_axis
    )
    arrays = arrays_of(B=B, T=T)
    o, state = run(**arrays)
    assert o.shape == (B, T, 4, 3)
    np.testing.assert_array_equal(state, arrays["initial_state"])
    gradients = jax.grad(lambda a: run(**a)[1].sum())(arrays)
    np.testing.assert_array_equal(gradients["initial_state"], np.ones_like(state))


def of_two_blocks(mixer):
    """Description and shapes of a small model's parameters, and a function of both and of tokens.

    Later blocks may read what the first computed.
    """
    sizes = {"num_heads": 2, "head_dim": 4}
    sizes = {name: size for name, size in sizes.items() if MIXERS[mixer].takes(name)}
    config = ModelConfig(5, mixer=mixer, hidden_size=8, intermediate_size=8, num_layers=2, **sizes)
    graph, params = nnx.split(nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0))))

    def run(params, tokens):
        model = nnx.merge(graph, params)
        start = model.init_state(tokens.shape[0])
        segments, mask = jnp.zeros_like(tokens), jnp.zeros_like(tokens, bool)
        after = model.step(start, tokens[:, 0])[1] if tokens.shape[1] else start
        return model(tokens, segment_ids=segments, mask=mask), start, after

    return run, params


@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_empty_in_empty_out_of_several_blocks(mixer):
    """Traced alone."""
    run, params = of_two_blocks(mixer)
    for shape in ((0, 3), (2, 0), (0, 0)):
        logits, start, after = jax.eval_shape(run, params, jax.ShapeDtypeStruct(shape, jnp.int32))
        assert logits.shape == (*shape, 5)
        assert after == start


@pytest.mark.parametrize(
    ("devices", "axes"), [((2, 2), (("data", "more"),)), ((1, 1), ("data", "more"))]
)
@pytest.mark.parametrize("mixer", sorted(MIXERS))
def test_several_blocks_over_explicit_axes(mixer, devices, axes):
    """Traced alone: JAX refuses then what does not lie as it must. Of one device along tokens."""
    run, params = of_two_blocks(mixer)
    mesh = jax.make_mesh(devices, ("data", "more"), axis_types=(AxisType.Explicit,) * 2)
    with jax.set_mesh(mesh):
        rows = NamedSharding(mesh, PartitionSpec(*axes))
        tokens = jax.ShapeDtypeStruct((4, 3), jnp.int32, sharding=rows)
        everywhere = NamedSharding(mesh, PartitionSpec())
        laid = lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=everywhere)
        logits, _, _ = jax.eval_shape(run, jax.tree.map(laid, params), tokens)
    assert logits.sharding.spec[0] == axes[0]


@pytest.mark.parametrize("options", [{}, {"use_short_conv": False}, {"conv_size": 1}])
def test_a_cell_takes_rows_of_any_axes_and_none(options):
    """Whatever it keeps of a convolution, which is nothing without one."""
    make = lambda: DeltaProductCell(8, **SIZES, **options, rngs=nnx.Rngs(0))
    graph, params = nnx.split(nnx.eval_shape(make))

    def run(params, x):
        cell = nnx.merge(graph, params)
        carry = cell.initialize_carry(x.shape)
        return carry, *cell(carry, x)

    for batch in ((), (3,), (2, 3), (0,), (2, 0), (0, 3)):
        before, after, y = jax.eval_shape(run, params, jax.ShapeDtypeStruct((*batch, 8), "f4"))
        assert y.shape == (*batch, 8)
        assert after == before


@pytest.mark.slow
def test_a_cell_over_an_explicit_axis():
    """A carry of its own making or a cut one; the outputs lie as the tokens do."""
    cell = DeltaProductCell(8, **SIZES, rngs=nnx.Rngs(0))
    graph, params = nnx.split(cell)
    x = jax.random.normal(jax.random.key(0), (4, 3, 8))

    @jax.jit
    def run(params, carry, x):
        cell = nnx.merge(graph, params)
        outputs = []
        for t in range(x.shape[1]):
            carry, y = cell(carry, x[:, t])
            outputs.append(y)
        return jnp.stack(outputs, axis=1), jax.tree.leaves(carry)

    carry = cell.initialize_carry((4, 8), nnx.Rngs(carry=1), nnx.initializers.normal(1.0))
    expected = run(params, carry, x)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Explicit,))
    rows, whole = (NamedSharding(mesh, PartitionSpec(*axes)) for axes in (["data"], []))
    got = run(*jax.device_put((params, carry, x), (whole, rows, rows)))
    assert got[0].sharding.spec[0] == "data"
    assert got[1][0].sharding.spec[0] == "data"
    close(got, expected)


@pytest.mark.slow
@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto, AxisType.Manual])
def test_a_layer_and_a_cell_whose_states_lie_along_heads(kind):
    """The state of one token to the next; outputs lie as the inputs do. Manual ones: rows alone."""
    cell = DeltaProductCell(8, **SIZES, use_short_conv=True, rngs=nnx.Rngs(0))
    graph, params = nnx.split(cell)
    x = jax.random.normal(jax.random.key(0), (4, 3, 8))
    carry = cell.initialize_carry((4, 8), nnx.Rngs(carry=1), nnx.initializers.normal(1.0))

    def run(params, carry, x):
        cell = nnx.merge(graph, params)
        one, y = cell(carry, x[:, 0])
        whole, after = cell.mixer(x[:, 1:], state=one)
        return y, whole, jax.tree.leaves(after)

    expected = jax.jit(run)(params, carry, x)
    rows, whole = PartitionSpec("data"), PartitionSpec()
    if kind == AxisType.Manual:
        mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))
        cut = jax.shard_map(run, mesh=mesh, in_specs=(whole, rows, rows), out_specs=rows)
        close(jax.jit(cut)(params, carry, x), expected)
        return
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(kind,) * 2)
    along_heads = jax.tree.map(lambda x: rows, carry)._replace(
        recurrent=PartitionSpec("data", "tensor")
    )
    lies = jax.tree.map(lambda spec: NamedSharding(mesh, spec), (whole, along_heads, rows))
    got = jax.jit(run)(
        *(jax.device_put(a, s) for a, s in zip((params, carry, x), lies, strict=True))
    )
    if kind == AxisType.Explicit:
        assert [x.sharding.spec[0] for x in got[:2]] == ["data", "data"]
        assert got[2][0].sharding.spec[:2] == ("data", "tensor")
    close(got, expected)


@pytest.mark.parametrize("kind", [np.uint8, np.int16, np.int64])
def test_sizes_of_numpy_are_those_of_python(kind):
    """A width of 16 x 16 is 0 in uint8, without an error."""

    def shapes(number):
        sizes = {"num_heads": 16, "head_dim": 16, "num_v_heads": 16, "num_householder": 3}
        sizes = {name: number(size) for name, size in sizes.items()}
        layer = GatedDeltaProduct(number(8), **sizes, chunk_size=number(100), rngs=nnx.Rngs(0))
        x, ids = jnp.zeros((2, 4, 8)), jnp.zeros((2, 4), int)
        states = layer(x, segment_ids=ids, num_segments=number(150))[1]
        return nnx.state(layer), layer.init_state(number(2)), states

    assert jax.eval_shape(lambda: shapes(kind)) == jax.eval_shape(lambda: shapes(int))
