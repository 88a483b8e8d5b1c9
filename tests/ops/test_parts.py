"""Batch and heads over explicit and Auto axes of a mesh; empty and symbolic sizes."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Case, cast
from jax.sharding import AxisType, NamedSharding, PartitionSpec

from deltaproduct_jax.ops import checks, delta_product, delta_product_step

CASE = Case(T=5, R=2, B=2, H=2, G=2, K=4, V=3)
COLLECTIVES = ("all-gather", "all-reduce", "all-to-all", "collective-permute")
AXES = {"B": "data", "H": "tensor", "Hv": "tensor"}


def arrays_of(case=CASE):
    return {n: jnp.asarray(x) for n, x in cast(case.arrays(), "float32").items()}


def laid_out(arrays, kind, axes=AXES, one_token=False, devices=(2, 2)):
    mesh = jax.make_mesh(devices, ("data", "tensor"), axis_types=(kind,) * 2)
    layouts = {n: [d for d in checks.LAYOUT[n] if not (one_token and d == "T")] for n in arrays}
    specs = {n: PartitionSpec(*map(axes.get, layouts[n])) for n in arrays}
    return {n: jax.device_put(x, NamedSharding(mesh, specs[n])) for n, x in arrays.items()}


def outputs_and_gradients(arrays, implementation):
    outputs, pull = jax.vjp(lambda a: delta_product(**a, implementation=implementation), arrays)
    return outputs, pull(outputs)


@pytest.mark.parametrize(
    ("kind", "implementation"),
    [
        (AxisType.Explicit, "recurrent"),
        pytest.param(AxisType.Explicit, "chunked", marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, "associative", marks=pytest.mark.slow),
        pytest.param(AxisType.Explicit, None, marks=pytest.mark.slow),
        pytest.param(AxisType.Auto, "chunked", marks=pytest.mark.slow),
        pytest.param(AxisType.Auto, None, marks=pytest.mark.slow),
    ],
)
def test_batch_and_heads_over_a_mesh_need_no_collective(kind, implementation):
    run = jax.jit(outputs_and_gradients, static_argnums=1)
    arrays = laid_out(arrays_of(), kind)
    text = run.lower(arrays, implementation).compile().as_text()
    assert not [name for name in COLLECTIVES if f"{name}(" in text or f"{name}-start(" in text]
    got = run(arrays, implementation)
    assert got[0][0].sharding.spec[:3] == ("data", None, "tensor")
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5),
        got,
        run(arrays_of(), implementation),
    )


@pytest.mark.parametrize(
    ("devices", "axes", "implementation"),
    [
        ((1, 1), AXES, "chunked"),
        ((1, 1), AXES | {"T": "tensor", "H": None, "Hv": None}, "recurrent"),
        pytest.param((2, 1), {"B": "data"}, "pallas_tpu", marks=pytest.mark.slow),
        pytest.param((2, 2), {"B": "data"}, "pallas_tpu", marks=pytest.mark.slow),
    ],
)
def test_explicit_axes_of_one_device_and_those_that_nothing_lies_along(
    devices, axes, implementation
):
    run = jax.jit(outputs_and_gradients, static_argnums=1)
    arrays = arrays_of()
    got = run(laid_out(arrays, AxisType.Explicit, axes, devices=devices), implementation)
    assert got[0][0].sharding.spec[0] == "data"
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5, rtol=1e-5),
        got,
        run(arrays, implementation),
    )


def sharded_specs(arrays, one_token=False):
    layouts = {n: [d for d in checks.LAYOUT[n] if not (one_token and d == "T")] for n in arrays}
    return {n: PartitionSpec(*map(AXES.get, layouts[n])) for n in arrays}


@pytest.mark.parametrize(
    "implementation",
    ["recurrent", *(pytest.param(name, marks=pytest.mark.slow) for name in ("chunked", None))],
)
def test_batch_and_heads_over_manual_axes(implementation):
    arrays = arrays_of()
    mesh = jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2)
    specs = sharded_specs(arrays)
    of_state = specs["initial_state"]
    run = jax.jit(lambda arrays: outputs_and_gradients(arrays, implementation))
    cut = jax.shard_map(
        run, mesh=mesh, in_specs=(specs,), out_specs=((specs["q"], of_state), (specs,))
    )
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), jax.jit(cut)(arrays), run(arrays)
    )


@pytest.mark.parametrize("kind", [AxisType.Explicit, AxisType.Auto, AxisType.Manual])
def test_a_step_over_axes_of_every_kind(kind):
    arrays = arrays_of()
    arrays = {n: x if n == "initial_state" else x[:, 0] for n, x in arrays.items()}
    arrays["state"] = arrays.pop("initial_state")
    if kind == AxisType.Manual:
        mesh, specs = (
            jax.make_mesh((2, 2), ("data", "tensor"), axis_types=(AxisType.Auto,) * 2),
            sharded_specs(arrays, True),
        )
        cut = jax.shard_map(
            lambda arrays: delta_product_step(**arrays),
            mesh=mesh,
            in_specs=(specs,),
            out_specs=(specs["q"], specs["state"]),
        )
        got = jax.jit(cut)(arrays)
    else:
        got = jax.jit(delta_product_step)(**laid_out(arrays, kind, one_token=True))
    jax.tree.map(
        lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, delta_product_step(**arrays)
    )


def test_an_array_that_is_whole_is_cut_as_the_others():
    arrays = arrays_of(Case(**{**vars(CASE), "T": 2}))
    cut = laid_out(arrays, AxisType.Explicit)
    run = jax.jit(lambda a: delta_product(**a, implementation="recurrent")[0])
    some = arrays | {name: cut[name] for name in ("q", "v")}
    np.testing.assert_allclose(run(some), run(arrays), atol=1e-6)


@pytest.mark.parametrize(
    ("axes", "text"),
    [
        ({"T": "data"}, r"along T; .*sharded_delta_product\(..., sequence_axis='data'\)"),
        ({"K": "tensor"}, "q lies over the mesh axis 'tensor' along K; it may lie over"),
        ({"H": "tensor", "Hv": "data"}, "v lies over the mesh axis 'data' along Hv, where others"),
    ],
)
def test_other_layouts_are_refused_in_one_line(axes, text, unchecked):
    arrays = arrays_of(Case(**{**vars(CASE), "T": 4, "V": 4}))
    with pytest.raises(ValueError, match=text) as caught:
        delta_product(**laid_out(arrays, AxisType.Explicit, axes))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("implementation", ["chunked", "recurrent", "associative", None])
def test_empty_in_empty_out_and_the_state_stays(implementation):
    for B, T in ((0, 3), (2, 0)):
        arrays = arrays_of(Case(**{**vars(CASE), "B": B, "T": T}))
        o, state = delta_product(**arrays, implementation=implementation)
        assert o.shape == (B, T, 4, 3)
        np.testing.assert_array_equal(state, arrays["initial_state"])
        gradients = jax.grad(lambda a: delta_product(**a)[1].sum())(arrays)
        np.testing.assert_array_equal(gradients["initial_state"], np.ones_like(state))


@pytest.mark.parametrize("implementation", ["chunked", None, "recurrent"])
def test_a_symbolic_batch_is_exported(implementation, unchecked):
    b, t = jax.export.symbolic_shape("b, t")
    sizes = {"B": b, "T": t if implementation == "recurrent" else 5}
    arrays = arrays_of()
    letters = checks.LAYOUT
    shapes = {
        n: jax.ShapeDtypeStruct(
            [sizes.get(*p) for p in zip(letters[n], x.shape, strict=True)], "f4"
        )
        for n, x in arrays.items()
    }
    run = jax.jit(lambda a: delta_product(**a, implementation=implementation))
    saved = jax.export.export(run)(shapes).serialize(vjp_order=int(implementation == "chunked"))
    got = jax.export.deserialize(saved).call(arrays)
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-6), got, run(arrays))


def test_a_symbolic_length_is_refused_by_name(unchecked):
    (t,) = jax.export.symbolic_shape("t")
    shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct((2, t, *x.shape[2:]), "f4"), arrays_of())
    del shapes["initial_state"]
    with pytest.raises(ValueError, match="implementation=None cannot run T=t, a symbolic length"):
        jax.export.export(jax.jit(lambda a: delta_product(**a)))(shapes)
