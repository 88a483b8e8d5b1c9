"""Rows that are not finite are run again: `kernels.containment` around a kernel that spreads them.

The kernels themselves: tests/ops/test_nonfinite.py for the one of TPUs, test_triton.py.
"""

import functools
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ARGUMENTS, Case, cast, draw_cotangents

from deltaproduct_jax.ops import checks, delta_product
from deltaproduct_jax.ops.containment import confined
from deltaproduct_jax.ops.kernels import Options, containment
from deltaproduct_jax.ops.layout import Tokens
from deltaproduct_jax.ops.packing import starts_of_segments
from deltaproduct_jax.ops.recurrent import recurrent

CASE = Case(T=6, R=2, B=3, H=1, G=2, K=4, V=3)
IDS = np.array([[0, 0, 0, 1, 1, 1], [0, 0, 2, 2, 2, 2], [5, 5, 5, 5, 3, 3]])
OPTIONS = Options(0.5, None, spans=1, interpret=True, kernels=("pallas_tpu",))
RUNS = []


def bad_rows(*arrays):
    """Of each whether anything is not finite."""
    rows = [
        jnp.any(~jnp.isfinite(x), axis=tuple(range(1, x.ndim))) for x in jax.tree.leaves(arrays)
    ]
    return functools.reduce(jnp.logical_or, rows)


def spread(bad, tree):
    """NaN in all of a row, which is the worst that a kernel does to it."""
    return jax.tree.map(lambda x: jnp.where(bad.reshape(-1, *[1] * (x.ndim - 1)), jnp.nan, x), tree)


def forward(tokens, state, options, *, keep_states):
    jax.debug.callback(RUNS.append, jnp.int32(tokens.q.shape[0]))
    bad = bad_rows(tokens._replace(resets=None), state)
    *arrays, resets = tokens
    results = recurrent(*arrays, state, resets, scale=options.scale, precision=None)
    o, final_state = spread(bad, results)
    kept = (spread(bad, state).reshape(1, -1, 1, *state.shape[1:]),) if keep_states else None
    return o, final_state, kept, bad


def backward(tokens, kept, do, dfinal_state, options):
    state = kept[0].reshape(dfinal_state.shape)
    bad = bad_rows(do, dfinal_state)
    *arrays, resets = tokens

    def run(arrays, state):
        return recurrent(*arrays, state, resets, scale=options.scale, precision=None)

    _, pull = jax.vjp(run, tuple(arrays), state)
    darrays, dstate = pull((do, dfinal_state))
    seen = bad | bad_rows(tokens._replace(resets=None), state)
    darrays, dstate = spread(seen, (darrays, dstate))
    was_run_again = jnp.any(kept[-1] != 0, axis=1)  # of tokens `forward` has told
    return Tokens(*darrays, None), dstate, bad | was_run_again


KERNEL = types.ModuleType("kernel")
KERNEL.forward, KERNEL.backward = forward, backward


def contained(arrays, resets, cotangents, options=OPTIONS):
    """Outputs and gradients, as the op's `custom_vjp` runs them."""
    tokens = Tokens(*(arrays[name] for name in ARGUMENTS[:5]), resets)
    run = {"kernel": KERNEL, "options": options}
    o, state, kept = containment.forward(tokens, arrays["initial_state"], **run, keep_states=True)
    dtokens, dstate = containment.backward(tokens, kept, *cotangents, **run)
    gradients = dict(zip(ARGUMENTS, (*dtokens[:5], dstate), strict=True))
    return (o, state), gradients


def expected(arrays, _, cotangents, ids=IDS):
    run = lambda a: delta_product(**a, scale=0.5, segment_ids=ids, implementation="recurrent")
    outputs, pull = jax.vjp(run, arrays)
    return outputs, pull(cotangents)[0]


RESETS = jnp.asarray(starts_of_segments(jnp.asarray(IDS)))
contained_jit, expected_jit = jax.jit(contained), jax.jit(expected)


def inputs(bad=(), bad_cotangents=()):
    """Arrays and cotangents with what is bad: pairs of a name, or of 0 and 1, and an index."""
    arrays = {n: np.array(x) for n, x in cast(CASE.arrays(), "float32").items()}
    cotangents = [np.array(x, np.float32) for x in draw_cotangents(arrays)]
    for name, index in bad:
        arrays[name][index] = np.inf
    for which, index in bad_cotangents:
        cotangents[which][index] = np.nan
    return jax.tree.map(jnp.asarray, (arrays, RESETS, tuple(cotangents)))


def assert_same(x, y):
    def check(path, a, b):
        where = jax.tree_util.keystr(path)
        np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6, equal_nan=True, err_msg=where)

    jax.tree_util.tree_map_with_path(check, x, y)


CASES = {
    "nothing": ({}, 0, 0),
    "a value": ({"bad": [("v", (0, 1, 0, 1))]}, 1, 1),
    "two rows": ({"bad": [("k", (0, 4, 1)), ("g", (2, 0, 0))]}, 2, 2),
    "a state": ({"bad": [("initial_state", (1, 0, 2))]}, 1, 1),
    "a cotangent": ({"bad_cotangents": [(0, (1, 3, 0))]}, 0, 1),
    "a row's state, another's": (
        {"bad": [("initial_state", (0, 1))], "bad_cotangents": [(1, (2, 1, 0))]}, 1, 2
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_bad_rows_alone_are_run_again(name):
    """Forward by both passes: a bad row costs a run of one row, and a good one costs nothing."""
    bad, forwards, _ = CASES[name]
    RUNS.clear()
    found = jax.block_until_ready(contained_jit(*inputs(**bad)))
    jax.effects_barrier()
    assert sorted(map(int, RUNS)) == [1] * forwards + [CASE.B]
    assert_same(found, expected_jit(*inputs(**bad)))
    if name == "nothing":
        assert all(np.isfinite(x).all() for x in jax.tree.leaves(found))


def test_of_operands_that_are_known_to_be_finite_only_cotangents_are_looked_at():
    """Layers and models replace what is bad, and the op within knows."""
    seen = []

    def run(x, state):
        seen.append(checks.is_known_finite())
        return x, state

    confined(run, jnp.ones((1, 2, 1)), None, None)
    assert seen == [True]
    assert not checks.is_known_finite()
    known = jax.jit(functools.partial(contained, options=OPTIONS._replace(known_finite=True)))
    for name in ("a cotangent", "a value"):
        RUNS.clear()
        found = jax.block_until_ready(known(*inputs(**CASES[name][0])))
        jax.effects_barrier()
        assert list(map(int, RUNS)) == [CASE.B]  # forward no row is run again
        if name == "a cotangent":
            assert_same(found, expected_jit(*inputs(**CASES[name][0])))


@pytest.mark.slow
def test_mapped():
    """Of what is mapped together each has bad rows of its own."""
    cases = [inputs(**bad) for bad, _, _ in CASES.values()]
    stacked = jax.tree.map(lambda *x: jnp.stack(x), *cases)
    found = jax.jit(jax.vmap(contained))(*stacked)
    wanted = [expected_jit(*case) for case in cases]
    assert_same(found, jax.tree.map(lambda *x: jnp.stack(x), *wanted))


@pytest.mark.slow
def test_on_several_devices():
    """Each runs its own rows again, and waits for nobody."""
    mesh = jax.make_mesh((3,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    spec = jax.sharding.PartitionSpec("data")
    run = jax.jit(jax.shard_map(contained, mesh=mesh, in_specs=spec, out_specs=spec))
    arguments = inputs(**CASES["two rows"][0])
    assert_same(run(*arguments), expected_jit(*arguments))
    text = run.lower(*arguments).compile().as_text()
    assert "while(" in text
    assert "all-reduce" not in text
