"""The op over a mesh equals the op on one device, and sends nothing larger than states."""

import collections
import doctest
import functools
import importlib.util
import json
import re
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from children import printed
from helpers import Case, cast, draw_cotangents, relative_error
from quick import quick

from deltaproduct_jax.ops import delta_product, sharded_delta_product, sharding

ROOT = Path(__file__).resolve().parents[2]
NAMES = ("data", "tensor", "sequence")
AXES = {"batch_axis": "data", "head_axis": "tensor", "sequence_axis": "sequence"}
CASE = Case(T=24, R=2, B=2, H=2, G=2, K=4, V=3, chunk_size=2)

CASES = {
    "gated": CASE,
    "ungated": Case(**{**vars(CASE), "gate": None, "beta": (2.0, 2.0), "R": 3}),
    "strong decay": Case(**{**vars(CASE), "gate": "mixed", "G": 1}),
    "no initial state": Case(**{**vars(CASE), "state": False, "l2norm": True, "scale": 0.3}),
}


def make_mesh(*shape, kind=jax.sharding.AxisType.Auto):
    return jax.make_mesh(shape, NAMES, axis_types=(kind,) * 3)


def arrays_of(case, dtype="float32"):
    arrays = cast(case.arrays(), dtype)
    return {name: jnp.asarray(x) for name, x in arrays.items() if x is not None}


@functools.partial(jax.jit, static_argnames=("mesh", "options"))
def run(arrays, segment_ids, cotangents, mesh, options):
    """Outputs and gradients, on one device or, with a mesh, on all of its."""
    op = delta_product
    if mesh is not None:
        op = functools.partial(sharded_delta_product, mesh=mesh, **AXES)
    outputs, pullback = jax.vjp(lambda a: op(**a, segment_ids=segment_ids, **dict(options)), arrays)
    cotangents = jax.tree.map(lambda c, x: c.astype(x.dtype), cotangents, outputs)
    return outputs, pullback(cotangents)[0]


def worst_error(case, mesh, dtype="float32", segment_ids=None):
    """The largest relative difference in outputs and gradients between a mesh and one device."""
    with jax.enable_x64(dtype == "float64"):
        arrays = arrays_of(case, dtype)
        cotangents = tuple(jnp.asarray(c) for c in draw_cotangents(arrays))
        options = {"scale": case.scale, "use_qk_l2norm": case.l2norm, "precision": None}
        options = tuple((options | {"chunk_size": case.chunk_size}).items())
        one, many = (run(arrays, segment_ids, cotangents, m, options) for m in (None, mesh))
    assert jax.tree.map(lambda x: x.dtype, one) == jax.tree.map(lambda x: x.dtype, many)
    return max(jax.tree.leaves(jax.tree.map(relative_error, many, one)))


@pytest.mark.parametrize("name", quick(CASES, ["gated"]))
@pytest.mark.parametrize("shape", quick([(2, 2, 2), (1, 1, 8), (1, 2, 3)], [(2, 2, 2)]), ids=str)
def test_a_mesh_equals_one_device(shape, name):
    """In float64, so that nothing but the order of sums can differ."""
    assert worst_error(CASES[name], make_mesh(*shape), "float64") < 1e-12


# Pieces of 3 tokens on 8 devices: boundaries at edges, one token beside them, inside, or nowhere.
SEGMENTS = {
    "at edges": [3, 12, 15],
    "beside edges": [2, 4, 11, 13],
    "every token": range(1, 24),
    "one in the last piece": [23],
    "one in the first piece": [1],
    "uneven": [5, 6, 7, 16, 21],
}


@pytest.mark.parametrize("shape", quick([(1, 1, 8), (2, 1, 2)], [(1, 1, 8)]), ids=str)
def test_segments_may_begin_anywhere(shape):
    """Ids return, so that a change, and not a value, must count; rows differ in theirs."""
    mesh = make_mesh(*shape)
    patterns = [np.isin(np.arange(24), list(starts)) for starts in SEGMENTS.values()]
    for first, second in zip(patterns, [*patterns[1:], patterns[0] & False], strict=True):
        ids = jnp.asarray(np.cumsum([first, second], axis=1) % 2, jnp.int32)
        assert worst_error(CASE, mesh, "float64", ids) < 1e-12


@pytest.mark.slow
def test_float32_and_one_token_a_device():
    for T in (24, 8):
        case = Case(**{**vars(CASE), "T": T, "chunk_size": None})
        assert worst_error(case, make_mesh(1, 1, 8)) < 3e-6


def test_long_rows_of_reflections_are_as_exact_as_on_one_device():
    """Without gates and with beta = 2 no rounding error of the state is ever forgotten."""
    case = Case(T=2048, R=2, B=1, H=1, K=16, V=16, gate=None, beta=(2.0, 2.0))
    with jax.enable_x64(True):
        exact = jax.jit(delta_product)(**arrays_of(case, "float64"))
    arrays = arrays_of(case)
    op = functools.partial(sharded_delta_product, mesh=make_mesh(1, 1, 8), **AXES)
    one, many = (
        jax.tree.map(relative_error, jax.jit(run)(**arrays), exact) for run in (delta_product, op)
    )
    assert max(many) < max(1e-5, 2 * max(one)), (one, many)


@pytest.mark.slow
def test_bfloat16_rounds_outputs_once_more_and_states_as_before():
    case = Case(T=64, R=2, B=2, H=2, K=16, V=16)
    arrays = arrays_of(case, "bfloat16")
    exact = jax.jit(delta_product)(**{n: x.astype(jnp.float32) for n, x in arrays.items()})
    op = functools.partial(sharded_delta_product, mesh=make_mesh(1, 1, 8), **AXES)
    for precision, most_of_state in ((None, 1e-2), ("highest", 1e-6)):
        options = {"precision": precision, "implementation": "chunked"}
        (o_one, state_one), (o, state) = (
            jax.jit(functools.partial(run, **options))(**arrays) for run in (delta_product, op)
        )
        assert o.dtype == jnp.bfloat16
        assert relative_error(o, exact[0]) < 1.5 * relative_error(o_one, exact[0])
        assert relative_error(state, exact[1]) < most_of_state
        assert relative_error(state_one, exact[1]) < most_of_state


def test_every_device_gets_its_part():
    mesh, arrays = make_mesh(2, 2, 2), arrays_of(CASE)
    o, final_state = sharded_delta_product(**arrays, mesh=mesh, **AXES)
    assert {s.data.shape for s in o.addressable_shards} == {(1, 12, 2, 3)}
    assert {s.data.shape for s in final_state.addressable_shards} == {(1, 2, 4, 3)}
    assert final_state.sharding.spec[:2] == ("data", "tensor")


@pytest.mark.slow
def test_meshes_of_every_kind():
    """Several axes for one dimension, none at all, one device; explicit, mixed and abstract."""
    kinds = jax.sharding.AxisType
    arrays = arrays_of(CASE)
    expected = delta_product(**arrays)
    together = {"batch_axis": ("data",), "sequence_axis": ("tensor", "sequence")}
    for mesh, axes in (
        (make_mesh(1, 2, 4), together),
        (make_mesh(2, 2, 2), {}),
        (make_mesh(2, 2, 1), AXES),
        (make_mesh(2, 2, 2), {"head_axis": "data"}),
        (make_mesh(2, 2, 2, kind=kinds.Explicit), AXES),
        (jax.make_mesh((2, 4), NAMES[1:], axis_types=(kinds.Auto, kinds.Explicit)), together),
    ):
        axes = {k: v for k, v in axes.items() if "data" not in v or "data" in mesh.axis_names}
        got = sharded_delta_product(**arrays, mesh=mesh, **axes)
        assert max(jax.tree.map(relative_error, got, expected)) < 1e-6
    with jax.set_mesh(make_mesh(2, 2, 2)) as mesh:
        del mesh
        abstract = jax.sharding.get_abstract_mesh()
        got = sharded_delta_product(**arrays, mesh=abstract, **AXES)
        assert max(jax.tree.map(relative_error, got, expected)) < 1e-6


def test_one_device_along_the_sequence_needs_no_maps():
    op = functools.partial(sharded_delta_product, mesh=make_mesh(2, 2, 1), **AXES)
    assert "ppermute" not in str(jax.make_jaxpr(lambda a: op(**a))(arrays_of(CASE)))


def test_no_token():
    arrays = arrays_of(Case(**{**vars(CASE), "T": 0}))
    ids = jnp.zeros((2, 0), jnp.int32)
    o, final = sharded_delta_product(**arrays, segment_ids=ids, mesh=make_mesh(1, 1, 8), **AXES)
    assert o.shape == (2, 0, 4, 3)
    np.testing.assert_array_equal(final, arrays["initial_state"])


def test_vmap_and_scan_over_layers():
    arrays = arrays_of(CASE)
    op = functools.partial(sharded_delta_product, mesh=make_mesh(1, 1, 4), **AXES)
    scales = jnp.array([0.5, 2.0])

    def final(op, scale):
        return op(**{**arrays, "v": scale * arrays["v"]})[1]

    expected = jnp.stack([final(delta_product, s) for s in scales])
    mapped = jax.jit(jax.vmap(lambda s: final(op, s)))(scales)
    _, scanned = jax.jit(lambda s: jax.lax.scan(lambda c, x: (c, final(op, x)), 0, s))(scales)
    assert relative_error(mapped, expected) < 1e-6
    assert relative_error(scanned, expected) < 1e-6


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"batch_axis": "fsdp"}, "batch_axis='fsdp' is not an axis of the mesh, which has 'data'"),
        ({"head_axis": "data"}, "head_axis='data' is taken: batch_axis names 'data' already"),
        ({"sequence_axis": ("sequence", "data")}, "is taken: batch_axis names 'data'"),
        ({"sequence_axis": 1}, "sequence_axis=1 must be the name of an axis of the mesh, a tuple"),
        ({"q": None}, "q must be a JAX or NumPy array, got NoneType"),
        ({"mesh": 8}, "mesh must be a jax.sharding.Mesh or AbstractMesh, got int"),
        ({"T": 15}, "T=15 must be a multiple of the 2 devices of sequence_axis='sequence'"),
        ({"B": 3}, "B=3 must be a multiple of the 2 devices of batch_axis='data'"),
        ({"H": 3}, "H=3 must be a multiple of the 2 devices of head_axis='tensor'"),
        ({"implementation": "fast"}, "implementation='fast' is not available"),
        ({"chunk_size": 0}, "chunk_size must be at least 1"),
        ({"q": np.zeros((2, 24, 2, 5), np.float32)}, "k must have shape [B, T, R, H, K]"),
        ({"segment_ids": np.zeros((2, 3), int)}, "segment_ids must have shape [B, T] with B=2, T"),
    ],
)
@pytest.mark.usefixtures("unchecked")
def test_errors_name_the_argument(changes, text):
    sizes = {k: v for k, v in changes.items() if k in ("T", "B", "H")}
    arrays = arrays_of(Case(**{**vars(CASE), **sizes}))
    changes = {k: v for k, v in changes.items() if k not in sizes}
    with pytest.raises(ValueError, match=re.escape(text)):
        sharded_delta_product(**{**arrays, "mesh": make_mesh(2, 2, 2), **AXES, **changes})


RUNS = ("forward", "gradient")


def pod(platform, sequence):
    """Collectives of the op compiled for 256 devices, ``sequence`` of them along T."""
    command = [sys.executable, "-m", "tests.pod_collectives", platform, sequence]
    return json.loads(printed(command, cwd=ROOT).splitlines()[-1])


# A TPU's compiler takes longest of all; test_tpu_compile.py has a cut sequence on four chips.
@pytest.mark.parametrize("platform", ["cpu", pytest.param("tpu", marks=pytest.mark.slow)])
@pytest.mark.slow
def test_a_pod_of_256_sends_nothing_larger_than_states(platform):
    if platform == "tpu" and importlib.util.find_spec("libtpu") is None:
        pytest.skip("needs libtpu, the compiler for TPUs (tests/run.py --extra=tpu)")
    found = pod(platform, 16)
    assert found["state"] == 4 * 2 * 2 * 32 * 64  # float32, B = 2 and Hv = 2 of a device
    for program in RUNS:
        assert max(size for _, size in found[program]) <= found["state"]
    # Four rounds over 16 devices, the last without maps, and the step from after to before; ids.
    counts = {name: collections.Counter(map(tuple, found[name])) for name in RUNS}
    permute, reduce, ids = "collective-permute", "all-reduce", 4 * 2
    one = {(permute, found["map"]): 3, (permute, found["state"]): 5, (reduce, found["state"]): 1}
    # Two flags a head of all 16 devices: whether NaN leaves a piece, and whether it passes through.
    one[("all-gather", 16 * 2 * 2 * 2)] = 1
    assert counts["forward"] == {**one, (permute, ids): 1}
    twice = {key: 2 * n for key, n in one.items()}
    # Back, a device is told whether a segment starts with the piece behind its own.
    assert counts["gradient"] == {**twice, (permute, ids): 1, (permute, 2): 1}


def test_the_example_in_the_docstring_runs():
    assert doctest.testmod(sharding).attempted > 0
    assert doctest.testmod(sharding).failed == 0
