"""Mapped over some of its arguments only, the op and its gradients equal a loop."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import ARGUMENTS, Case, cast

from deltaproduct_jax.ops import delta_product

CASE = Case(T=5, R=2, B=2, H=2, K=4, V=3, segments=True)


def close(got, expected):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, atol=2e-5, rtol=2e-5), got, expected)


def equals_a_loop(function, arrays, mapped, copies):
    """``function(arrays)`` with the arrays ``mapped`` replaced by stacked ``copies`` of them."""
    stacked = arrays | {name: jnp.stack([copy[name] for copy in copies]) for name in mapped}
    axes = {name: 0 if name in mapped else None for name in arrays}
    got = jax.jit(jax.vmap(function, in_axes=(axes,)))(stacked)
    one = jax.jit(function)
    loop = [one(arrays | {name: copy[name] for name in mapped}) for copy in copies]
    close(got, jax.tree.map(lambda *x: jnp.stack(x), *loop))


def loss(arrays, op, **options):
    return sum(jnp.sum(jnp.sin(x)) for x in jax.tree.leaves(op(**arrays, **options)))


def inputs(seed):
    arrays = cast(Case(**{**vars(CASE), "seed": seed}).arrays(), "float32")
    return {name: jnp.asarray(x) for name, x in arrays.items()}


QUICK = {("recurrent", "v")}
CASES = [(form, name) for form in ("recurrent", "chunked") for name in ARGUMENTS]


@pytest.mark.parametrize(
    ("implementation", "mapped"),
    [pytest.param(*case, marks=[] if case in QUICK else [pytest.mark.slow]) for case in CASES],
)
def test_gradients_with_one_argument_mapped(implementation, mapped):
    """Of all arguments, those too that every mapped call shares; with segments."""
    op = functools.partial(
        delta_product, segment_ids=CASE.segment_ids(), implementation=implementation
    )
    gradients = jax.value_and_grad(functools.partial(loss, op=op))
    equals_a_loop(gradients, inputs(0), [mapped], [inputs(1), inputs(2)])


@pytest.mark.parametrize(
    "mapped", ["beta", *(pytest.param(n, marks=pytest.mark.slow) for n in ("v", "initial_state"))]
)
def test_what_is_not_finite_stays_in_the_call_that_it_is_mapped_to(mapped):
    bad = inputs(1)
    bad[mapped] = bad[mapped].at[0, 0].set(jnp.nan)
    run = functools.partial(delta_product, implementation="recurrent")
    stacked = inputs(0) | {mapped: jnp.stack([bad[mapped], inputs(2)[mapped]])}
    axes = {name: 0 if name == mapped else None for name in stacked}
    o, _ = jax.jit(jax.vmap(lambda a: run(**a), in_axes=(axes,)))(stacked)
    assert np.isnan(o[0, 0]).any()
    assert np.isfinite(o[0, 1]).all()  # the other row
    assert np.isfinite(o[1]).all()


@pytest.mark.slow
@pytest.mark.parametrize("implementation", ["recurrent", "chunked"])
def test_cotangents_alone_are_mapped(implementation):
    """One pull back for several functions of the outputs, as `jax.jacrev` makes it."""
    run = functools.partial(delta_product, implementation=implementation)
    outputs, pull = jax.vjp(lambda a: run(**a), inputs(0))
    many = [jax.tree.map(lambda x, n=n: jnp.cos(n * x), outputs) for n in (1, 2)]
    got = jax.jit(jax.vmap(pull))(jax.tree.map(lambda *x: jnp.stack(x), *many))
    close(got, jax.tree.map(lambda *x: jnp.stack(x), *map(pull, many)))


@pytest.mark.parametrize(
    "mapped", ["beta", *(pytest.param(n, marks=pytest.mark.slow) for n in ("v", "initial_state"))]
)
def test_gradients_of_the_mapped_op(mapped):
    """The other way round: what the calls share has the sum of their gradients."""
    op = functools.partial(delta_product, implementation="recurrent")
    one, arrays, copies = functools.partial(loss, op=op), inputs(0), [inputs(1), inputs(2)]
    axes = {name: 0 if name == mapped else None for name in arrays}
    stacked = arrays | {mapped: jnp.stack([copy[mapped] for copy in copies])}
    got = jax.jit(jax.grad(lambda a: jax.vmap(one, in_axes=(axes,))(a).sum()))(stacked)
    gradient = jax.jit(jax.grad(one))
    loop = [gradient(arrays | {mapped: copy[mapped]}) for copy in copies]
    expected = jax.tree.map(lambda x, y: x + y, *loop)
    expected[mapped] = jnp.stack([each[mapped] for each in loop])
    close(got, expected)
