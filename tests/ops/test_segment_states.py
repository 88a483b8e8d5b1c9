"""A state before and after every segment of a packed row, against segments run one by one."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle
import pytest
from helpers import Case, relative_error

from deltaproduct_jax.ops import delta_product
from deltaproduct_jax.ops.packing import PIECE, by_segment

# Of the rows: one segment of several pieces, one of a token, one that ends with a piece; an id that
# returns; and a row with one segment less.
LENGTHS = [[2 * PIECE + 5, 1, PIECE], [3, 2 * PIECE + 3 + PIECE]]
IDS = [[0, 1, 0], [7, 2]]
T, S = 3 * PIECE + 6, 3
OPTIONS = {"use_qk_l2norm": True, "scale": 0.7}
IMPLEMENTATIONS = [
    "chunked",
    pytest.param("recurrent", marks=pytest.mark.slow),
    pytest.param("associative", marks=pytest.mark.slow),
    pytest.param("pallas_tpu", marks=pytest.mark.slow),
]


@pytest.fixture(scope="module")
def packed():
    case = Case(T, R=2, H=1, G=2, K=4, V=6)
    arrays = {n: np.asarray(x, np.float32) for n, x in case.arrays().items()}
    shape = (2, S, 2, 4, 6)
    arrays["initial_state"] = np.random.default_rng(1).normal(size=shape).astype(np.float32)
    ids = [np.repeat(ids, lengths) for ids, lengths in zip(IDS, LENGTHS, strict=True)]
    return arrays, np.stack(ids)


def one_by_one(arrays, row, number, cotangents=None):
    """Which tokens a segment has, and what the oracle says of it in a row of its own."""
    start = sum(LENGTHS[row][:number])
    where = (slice(row, row + 1), slice(start, start + LENGTHS[row][number]))
    own = {n: x[where] for n, x in arrays.items() if n != "initial_state"}
    if cotangents is not None:
        cotangents = (cotangents[0][where], cotangents[1][row : row + 1, number])
    state = arrays["initial_state"][row : row + 1, number]
    return where, oracle.delta_product(**own, initial_state=state, cotangents=cotangents, **OPTIONS)


SEGMENTS = [(row, number) for row, lengths in enumerate(LENGTHS) for number in range(len(lengths))]


@pytest.mark.parametrize("implementation", IMPLEMENTATIONS)
def test_every_segment_is_as_alone(packed, implementation):
    arrays, ids = packed
    run = lambda arrays, ids: delta_product(
        **arrays, segment_ids=ids, num_segments=S, implementation=implementation, **OPTIONS
    )
    o, states = jax.jit(run)(arrays, ids)
    assert states.shape == (2, S, 2, 4, 6)
    for row, number in SEGMENTS:
        where, (want_o, want_state) = one_by_one(arrays, row, number)
        assert relative_error(o[where], want_o) < 1e-5
        assert relative_error(states[row, number], want_state[0]) < 1e-5
    np.testing.assert_array_equal(states[1, 2], arrays["initial_state"][1, 2])


@pytest.mark.slow
def test_gradients_are_those_of_segments_alone(packed):
    """Of all inputs and of the states before; a segment that is not there passes its own on."""
    arrays, ids = packed
    rng = np.random.default_rng(2)
    do, dstates = rng.normal(size=(2, T, 2, 6)), rng.normal(size=(2, S, 2, 4, 6))

    def weighted(arrays):
        o, states = delta_product(**arrays, segment_ids=ids, num_segments=S, **OPTIONS)
        return jnp.sum(do.astype(np.float32) * o) + jnp.sum(dstates.astype(np.float32) * states)

    got = jax.jit(jax.grad(weighted))(arrays)
    want = {name: np.zeros(x.shape) for name, x in arrays.items()}
    want["initial_state"][1, 2] = dstates[1, 2]
    for row, number in SEGMENTS:
        where, (*_, gradients) = one_by_one(arrays, row, number, (do, dstates))
        for name, gradient in gradients.items():
            place = (row, number) if name == "initial_state" else where
            want[name][place] = gradient[0] if name == "initial_state" else gradient
    for name in arrays:
        assert relative_error(got[name], want[name]) < 3e-5, name


@pytest.mark.slow
def test_segments_beyond_the_number_are_nan_and_change_nothing_else(packed):
    arrays, ids = packed
    few = arrays | {"initial_state": arrays["initial_state"][:, :2]}
    run = lambda arrays, S: delta_product(**arrays, segment_ids=ids, num_segments=S, **OPTIONS)
    run = jax.jit(run, static_argnums=1)
    (o, states), (want_o, want_states) = run(few, 2), run(arrays, S)
    end = sum(LENGTHS[0][:2])
    assert np.isnan(o[0, end:]).all()
    np.testing.assert_allclose(o[0, :end], want_o[0, :end], atol=1e-5)
    np.testing.assert_allclose(o[1], want_o[1], atol=1e-5)
    np.testing.assert_allclose(states, want_states[:, :2], atol=1e-5)


@pytest.mark.slow
def test_what_is_not_finite_stays_in_its_segment(packed):
    arrays, ids = packed
    bad = {name: x.copy() for name, x in arrays.items()}
    bad["v"][0, 3], bad["k"][0, 3] = np.nan, np.inf
    run = jax.jit(lambda a: delta_product(**a, segment_ids=ids, num_segments=S, **OPTIONS))
    (o, states), (want_o, want_states) = run(bad), run(arrays)
    end = LENGTHS[0][0]
    assert np.isnan(o[0, 3:end]).all()
    assert np.isnan(states[0, 0]).all()
    for got, want in ((o[0, end:], want_o[0, end:]), (o[1], want_o[1])):
        np.testing.assert_array_equal(got, want)
    np.testing.assert_array_equal(states[0, 1:], want_states[0, 1:])
    np.testing.assert_array_equal(states[1], want_states[1])


def test_no_token_and_no_state():
    q = jnp.ones((2, 0, 1, 4), jnp.bfloat16)
    k, beta = q[:, :, None], jnp.ones((2, 0, 1, 1))
    ids = jnp.zeros((2, 0), jnp.int32)
    o, states = delta_product(q, k, k, beta, segment_ids=ids, num_segments=2)
    assert (o.shape, o.dtype) == ((2, 0, 1, 4), jnp.bfloat16)
    assert (states.shape, states.dtype) == ((2, 2, 1, 4, 4), jnp.float32)


@pytest.mark.parametrize(
    ("change", "text"),
    [
        ({"segment_ids": None}, "num_segments=3 needs segment_ids; without them a row is one"),
        ({"num_segments": 0}, "num_segments must be a whole number of at least 1, got 0"),
        (
            {"num_segments": 2},
            r"initial_state must have shape \[B, S, Hv, K, V\] with B=2, S=2, Hv=2, K=4, V=6, got",
        ),
        ({"initial_state": np.zeros((2, 2, 4, 6), np.float32)}, "initial_state must have 5 dimen"),
        (
            {"initial_state": np.zeros((2, 3, 2, 4, 6), np.float16)},
            "initial_state must be float32 when q is float32, got float16",
        ),
    ],
)
def test_what_does_not_fit_is_named(packed, change, text, unchecked):
    arrays, ids = packed
    with pytest.raises(ValueError, match=text):
        delta_product(**(arrays | {"segment_ids": ids, "num_segments": S} | change))


def test_pieces_hold_no_boundary_and_few_are_empty():
    """A row of T tokens and S segments takes at most T / P + S pieces."""
    rng = np.random.default_rng(0)
    ids = np.cumsum(rng.uniform(size=(3, 50)) < 0.1, axis=1)
    seen = []

    def run(tokens, state, counts):
        seen.append(counts.shape)
        number, place = tokens
        # What counts is of one segment, behind what was read of it before, and without a gap.
        same = jnp.all(~counts | (number == number[:, :1]), axis=1)
        last = jnp.max(jnp.where(counts, place, -1), axis=1)
        first = jnp.min(jnp.where(counts, place, 99), axis=1)
        same &= last - first == jnp.sum(counts, axis=1, dtype=jnp.float32) - 1
        same &= (state < 0) | (first == state + 1)
        return place, jnp.where(same, last, 1000)

    numbers, ids = jnp.asarray(ids + 1), jnp.asarray(ids)
    places = jnp.broadcast_to(jnp.arange(50.0)[None], ids.shape)
    S = int(ids.max()) + 1
    read = jax.jit(lambda *given: by_segment(run, *given, ids, piece=4))
    out, states = read((numbers, places), jnp.full((3, S), -1.0))
    assert seen[0] == (3, 4)
    np.testing.assert_array_equal(out, places)
    for row in range(3):
        starts = [0, *(np.flatnonzero(np.diff(np.asarray(ids[row]))) + 1), 50]
        np.testing.assert_array_equal(states[row, : len(starts) - 1], np.asarray(starts[1:]) - 1)


@pytest.mark.slow
def test_rows_over_an_explicit_axis(packed):
    arrays, ids = packed
    run = lambda arrays, ids: delta_product(**arrays, segment_ids=ids, num_segments=S, **OPTIONS)
    run = jax.jit(run)
    mesh = jax.make_mesh((2,), ("data",), axis_types=(jax.sharding.AxisType.Explicit,))
    lie = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    got, want = run(*jax.device_put((arrays, ids), lie)), run(arrays, ids)
    assert got[1].sharding.spec[0] == "data"
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=1e-5), got, want)


def test_finite_rows_make_no_nan():
    """Not even one that nobody sees, which `jax.debug_nans` would take for the fault."""
    tokens, states = jnp.ones((1, 3)), jnp.ones((1, 1, 2))
    with jax.debug_nans(True):
        outputs, _ = by_segment(lambda x, s, _: (x, s), tokens, states, jnp.zeros((1, 3), int))
    np.testing.assert_array_equal(outputs, tokens)
