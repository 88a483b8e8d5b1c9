"""Models over explicit axes of a mesh, with empty inputs, and saved with a symbolic batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from helpers import relative_error
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.parallel.names import cut, names_of_model

ALL = (
    "gated_delta_product", "transformer", "mamba2", "gla", "mlstm", "slstm", "rwkv7",
    "kimi_delta_attention", "complex_kimi_delta_attention", "erase_then_delta",
)  # fmt: skip
# One of them whenever tests run, the others, which take as long again each, with --slow.
MIXERS = [ALL[0], *(pytest.param(name, marks=pytest.mark.slow) for name in ALL[1:])]


def make(mixer):
    more = {"use_short_conv": True} if "delta" in mixer else {}
    sizes = {"hidden_size": 8, "num_heads": 2, "head_dim": 4, "intermediate_size": 8}
    config = ModelConfig(vocab_size=7, mixer=mixer, num_layers=1, **sizes, **more)
    return nnx.split(SequenceModel(config, rngs=nnx.Rngs(0)))


def inputs(B=2, T=5):
    rng = np.random.default_rng(3)
    ids = jnp.asarray(rng.integers(0, 7, (B, T)), jnp.int32)
    return ids, ids // 4, jnp.asarray(rng.uniform(size=(B, T)) < 0.7)


def read(graph, params, tokens, segment_ids, mask):
    """Logits of a sequence and of one token more, and the state after it."""
    model = nnx.merge(graph, params)
    y, state = model.forward(tokens, segment_ids=segment_ids, mask=mask)
    return y, *model.step(state, tokens[:, 0])


def close(got, expected):
    """Each array as a whole: its small numbers are sums of large ones, which rounding is of."""
    errors = jax.tree.leaves(jax.tree.map(relative_error, got, expected))
    assert max(errors) < 1e-5, errors


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ALL)
def test_the_batch_over_an_explicit_axis(mixer):
    graph, params = make(mixer)

    def run(params, *arrays):
        outs, pull = jax.vjp(lambda p: read(graph, p, *arrays)[:2], params)
        return outs, pull(outs)[0]

    run = jax.jit(run)
    mesh = jax.make_mesh((2,), ("data",))
    whole = jax.device_put(params, NamedSharding(mesh, PartitionSpec()))
    rows = jax.device_put(inputs(), NamedSharding(mesh, PartitionSpec("data")))
    got = run(whole, *rows)
    assert got[0][0].sharding.spec[0] == "data"
    close(got, run(params, *inputs()))


def over_two_axes(graph, params):
    """Parameters as the table of `deltaproduct_jax.parallel` has them, and rows of `inputs`."""
    mesh = jax.make_mesh((2, 2), ("data", "tensor"))
    names = names_of_model(nnx.merge(graph, params))
    sizes = {"data": 2, "fsdp": 1, "tensor": 2, "sequence": 1}

    def lies(keys, x):
        path = tuple(str(key.key) for key in keys)
        return NamedSharding(mesh, PartitionSpec(*cut(names[path], x.shape, sizes)))

    laid = jax.device_put(params, jax.tree_util.tree_map_with_path(lies, params))
    assert any("tensor" in x.sharding.spec for x in jax.tree.leaves(laid))
    return laid, jax.device_put(inputs(), NamedSharding(mesh, PartitionSpec("data")))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ALL)
def test_batch_and_heads_over_explicit_axes(mixer):
    graph, params = make(mixer)
    params = nnx.to_pure_dict(params)

    def run(params, *arrays):
        outs, pull = jax.vjp(lambda p: read(graph, p, *arrays), params)
        return outs, pull(outs)[0]

    run = jax.jit(run)
    laid, rows = over_two_axes(graph, params)
    (y, one, state), gradients = run(laid, *rows)
    assert y.sharding.spec == PartitionSpec("data", None, None)
    assert one.sharding.spec == PartitionSpec("data", None)
    assert all(x.sharding.spec[0] == "data" for x in jax.tree.leaves(state))
    jax.tree.map(lambda x, p: x.sharding.spec == p.sharding.spec or 1 / 0, gradients, laid)
    close(((y, one, state), gradients), run(params, *inputs()))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ALL)
def test_states_that_lie_along_heads(mixer):
    """Of a mixer that reads on from one; the new state lies as the old one did."""
    graph, params = make(mixer)
    mesh = jax.make_mesh((2, 2), ("data", "tensor"))
    x = jax.random.normal(jax.random.key(0), (2, 5, 8))

    def lies(x):
        along = ("data", "tensor") if x.ndim > 1 and x.shape[1] % 2 == 0 else ("data",)
        return NamedSharding(mesh, PartitionSpec(*along))

    @jax.jit
    def run(params, state, x):
        mixer = nnx.merge(graph, params).layers[0].attn
        passed_on = mixer.for_later_blocks and mixer.for_later_blocks(x)
        y, state = mixer(x[:, :-1], state=state)
        return y, *mixer.step(state, x[:, -1]), passed_on

    layer = nnx.merge(graph, params).layers[0].attn
    _, state = jax.jit(lambda x: layer(x))(x)
    laid = jax.tree.map(lambda x: jax.device_put(x, lies(x)), state)
    assert any("tensor" in x.sharding.spec for x in jax.tree.leaves(laid))
    rows = jax.device_put(x, NamedSharding(mesh, PartitionSpec("data")))
    got = run(jax.device_put(params, NamedSharding(mesh, PartitionSpec())), laid, rows)
    assert [got[0].sharding.spec[0], got[1].sharding.spec[0]] == ["data", "data"]
    for new, old in zip(jax.tree.leaves(got[2]), jax.tree.leaves(laid), strict=True):
        assert [n or None for n in new.sharding.spec if n] == [n for n in old.sharding.spec if n]
    close(got, run(params, state, x))


@pytest.mark.usefixtures("unchecked")
def test_a_number_of_numpy_is_none_of_the_arrays_that_are_laid_out():
    graph, params = make(ALL[0])
    laid, (ids, segments, _) = over_two_axes(graph, nnx.to_pure_dict(params))

    def read(number):
        run = lambda params: nnx.merge(graph, params).forward(
            ids, segment_ids=segments, num_segments=number
        )
        return jax.tree.map(lambda x: (x.shape, x.dtype), jax.eval_shape(run, laid))

    assert read(np.int64(3)) == read(3)


@pytest.mark.slow
@pytest.mark.parametrize("mixer", [ALL[0], "transformer"])
def test_features_over_explicit_axes(mixer):
    """What losses in chunks read, and its gradient."""
    graph, params = make(mixer)
    params = nnx.to_pure_dict(params)

    def run(params, ids, *_):
        features = lambda p: nnx.merge(graph, p).features(ids)
        x, pull = jax.vjp(features, params)
        return x, pull(0.1 * jnp.sin(x))[0]

    run = jax.jit(run)
    laid, rows = over_two_axes(graph, params)
    x, gradients = run(laid, *rows)
    assert x.sharding.spec == PartitionSpec("data", None, None)
    jax.tree.map(lambda x, p: x.sharding.spec == p.sharding.spec or 1 / 0, gradients, laid)
    close((x, gradients), run(params, *inputs()))


@pytest.mark.slow
@pytest.mark.parametrize("mixer", ALL)
def test_inside_shard_map(mixer):
    """Manual axes: each device has its rows, and gradients of parameters are summed."""
    graph, params = make(mixer)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(AxisType.Auto,))

    def run(params, *arrays):
        def loss(params):
            outs = read(graph, params, *arrays)
            return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(outs)), outs

        gradients, outs = jax.grad(loss, has_aux=True)(params)
        return outs, gradients

    rows = PartitionSpec("data")
    specs = {"in_specs": (PartitionSpec(), rows, rows, rows), "out_specs": (rows, PartitionSpec())}
    got = jax.jit(jax.shard_map(run, mesh=mesh, **specs))(params, *inputs())
    close(got, jax.jit(run)(params, *inputs()))


@pytest.mark.parametrize("mixer", MIXERS)
def test_empty_in_empty_out(mixer):
    model = nnx.merge(*make(mixer))
    for B, T in ((0, 3), (2, 0)):
        y, state = model.forward(jnp.zeros((B, T), jnp.int32), mask=jnp.ones((B, T), bool))
        assert y.shape == (B, T, 7)
        close(state, model.init_state(B))
    y, _ = model.step(model.init_state(0), jnp.zeros(0, jnp.int32))
    assert y.shape == (0, 7)


@pytest.mark.parametrize("mixer", MIXERS)
def test_a_model_is_saved_with_its_parameters_as_arguments(mixer, unchecked):
    graph, params = make(mixer)
    leaves, tree = jax.tree.flatten(params)
    run = jax.jit(lambda leaves, *arrays: read(graph, tree.unflatten(leaves), *arrays))
    (b,) = jax.export.symbolic_shape("b")
    shapes = [jax.ShapeDtypeStruct((b, 5), x.dtype) for x in inputs()]
    saved = jax.export.export(run)(leaves, *shapes).serialize()
    got = jax.export.deserialize(saved).call(leaves, *inputs())
    assert type(got[2][0]).__name__.endswith("State")
    close(got, run(leaves, *inputs()))
