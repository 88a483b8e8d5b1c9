"""Rows of a table: all forms of the gradient are the sums, whatever transforms them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deltaproduct_jax.ops.blocks import lookup, rows, short
from deltaproduct_jax.ops.blocks.lookup import FEW_ROWS

ROWS, D = 11, 8
WHOLE = {"plain": lookup.plain, "short": short.lookup}
FORMS = WHOLE | {"taken": lookup.taken, "multiplied": lookup.multiplied}


def case(dtype):
    keys = jax.random.split(jax.random.key(0), 3)
    table = jax.random.normal(keys[0], (ROWS, D)).astype(dtype)
    ids = jax.random.randint(keys[1], (6, 50), 0, ROWS + 2)  # some that no row has
    return table, ids, jax.random.normal(keys[2], (*ids.shape, D)).astype(dtype)


def exact_gradient(ids, cotangents):
    table = np.zeros((ROWS + 2, D))
    np.add.at(table, np.ravel(ids), np.asarray(cotangents, np.float64).reshape(-1, D))
    return table[:ROWS]


@pytest.mark.parametrize(("dtype", "bound"), [("float32", 1e-6), ("bfloat16", 2**-8)])
@pytest.mark.parametrize("form", FORMS)
def test_all_gradients_are_the_sums(form, dtype, bound, monkeypatch):
    monkeypatch.setattr(lookup, "TOKENS_OF_A_SUM", 60)
    table, ids, cotangents = case(dtype)
    rows_of = FORMS[form]
    both = jax.jit(lambda table, ids, cotangents: _with_gradient(rows_of, table, ids, cotangents))
    rows, got = both(table, ids, cotangents)
    inside = np.asarray(ids) < ROWS
    assert np.array_equal(np.asarray(rows)[inside], np.asarray(table)[np.asarray(ids)[inside]])
    want = exact_gradient(ids, cotangents)
    assert np.linalg.norm(np.asarray(got, np.float64) - want) <= bound * np.linalg.norm(want)
    if form in WHOLE:
        assert np.all(np.isnan(rows[~inside]))


def _with_gradient(rows_of, table, ids, cotangents):
    rows, pull = jax.vjp(lambda table: rows_of(table, ids), table)
    return rows, pull(cotangents)[0]


@pytest.mark.parametrize("form", WHOLE)
def test_rows_that_are_short_have_that_form(form, monkeypatch):
    monkeypatch.setattr(short, "takes", lambda *_: form == "short")
    monkeypatch.setattr(short, "lookup", lambda *_: "short")
    monkeypatch.setattr(lookup, "plain", lambda *_: "plain")
    assert rows.lookup(*case("bfloat16")[:2]) == form


@pytest.mark.parametrize("form", ["taken", "multiplied"])
def test_sums_of_thousands_do_not_stop_growing(form):
    """Where one id stands thousands of times, a sum in bfloat16 would end at 256."""
    table = jnp.zeros((FEW_ROWS + 1, 2), jnp.bfloat16)
    ids = jnp.zeros((2, 1536), jnp.int32)
    pull = jax.vjp(lambda table: FORMS[form](table, ids), table)[1]
    assert np.all(pull(jnp.ones((2, 1536, 2), jnp.bfloat16))[0][0] == 3072)


@pytest.mark.parametrize("form", WHOLE)
def test_other_transformations(form):
    table, ids, cotangents = case("float32")
    ids = jnp.minimum(ids, ROWS - 1)
    loss = lambda table: jnp.sum(FORMS[form](table, ids) * cotangents)
    pushed = jax.jvp(loss, (table,), (table,))[1]
    np.testing.assert_allclose(pushed, loss(table), rtol=1e-5)
    both = jax.vmap(jax.grad(loss))(jnp.stack([table, table]))
    np.testing.assert_allclose(both[1], exact_gradient(ids, cotangents), atol=1e-5)


@pytest.mark.parametrize("form", WHOLE)
def test_ids_of_each_device_under_shard_map(form):
    """Which a table that all have is told apart from by its type."""
    table, ids, cotangents = case("float32")
    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Auto,), devices=jax.devices()[:2])

    def gradient(table, ids, cotangents):
        loss = lambda table: jnp.sum(FORMS[form](table, ids) * cotangents)
        return jax.grad(loss)(table)

    in_specs, out_specs = (P(), P("rows"), P("rows")), P()
    each = jax.shard_map(gradient, mesh=mesh, in_specs=in_specs, out_specs=out_specs)
    got = jax.jit(each)(table, ids, cotangents)
    np.testing.assert_allclose(got, exact_gradient(ids, cotangents), atol=1e-5)
