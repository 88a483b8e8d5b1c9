"""Checks of values: what they find, through what transformations, and that they leave no trace."""

import doctest
import re

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from quick import quick

from deltaproduct_jax.layers import SoftmaxAttention
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.ops import checked, debug, delta_product, delta_product_step

B, T, R, H, K = 2, 6, 2, 2, 4


def inputs(**changes):
    k = jax.random.normal(jax.random.key(0), (B, T, R, H, K))
    k = k / jnp.linalg.norm(k, axis=-1, keepdims=True)
    ones = jnp.ones((B, T, R, H))
    return {"q": k[:, :, 0], "k": k, "v": k, "beta": ones, "g": -ones[:, :, 0]} | changes


BAD = {
    "a long key": ({"k": inputs()["k"].at[1, 2, 0, 1].mul(1.5)}, "k must hold vectors of length 1"),
    "a key that is no number": (
        {"k": inputs()["k"].at[0, 0].set(jnp.nan)},
        "got one of length nan",
    ),
    "a large beta": ({"beta": inputs()["beta"] * 2.5}, "beta must be in [0, 2], got values from"),
    "a negative beta": ({"beta": inputs()["beta"].at[0, 5].set(-0.1)}, "beta must be in [0, 2]"),
    "growth": ({"g": inputs()["g"].at[1, 3, 0].set(0.25)}, "g must be at most 0, got values from"),
}


@pytest.fixture(scope="module")
def ops():
    return checked(delta_product), checked(delta_product_step)


@pytest.mark.parametrize("name", BAD)
def test_what_is_out_of_range(name, ops):
    change, text = BAD[name]
    with pytest.raises(ValueError, match=re.escape(text)) as error:
        ops[0](**inputs(**change))
    assert "\n" not in str(error.value)
    token = 2 if name == "a long key" else 5 if name == "a negative beta" else 3
    token = 0 if "no number" in name else token
    one = {n: x[:, token] for n, x in inputs(**change).items()}
    with pytest.raises(ValueError, match=re.escape(text)):
        ops[1](jnp.zeros((B, H, K, K)), **one)


def test_what_is_right_passes(ops):
    """-inf forgets everything; what was normalised in bfloat16 is not quite of length 1."""
    arrays = inputs(g=inputs()["g"].at[0, 1].set(-jnp.inf))
    o, _ = ops[0](**arrays)
    np.testing.assert_allclose(o, jax.jit(delta_product)(**arrays)[0], rtol=1e-6)
    long = inputs(k=3 * inputs()["k"])
    ops[0](**long, use_qk_l2norm=True, implementation="chunked")
    narrow = inputs(**{n: inputs()[n].astype(jnp.bfloat16) for n in "qkv"})
    ops[0](**narrow)


@pytest.mark.slow
def test_through_transformations():
    """Gradients of what is computed anew, one after another, as steps of training have them."""
    op = jax.checkpoint(lambda beta: delta_product(**inputs(beta=beta), implementation="chunked"))
    slope = jax.grad(lambda beta: jnp.sum(op(beta)[0] ** 2))
    total = lambda betas: jax.lax.scan(lambda c, beta: (c + slope(beta), None), betas[0], betas)[0]
    gradient, beta = checked(jax.jit(total)), inputs()["beta"]
    assert np.all(np.isfinite(gradient(jnp.stack([beta]))))
    with pytest.raises(ValueError, match=re.escape("beta must be in [0, 2]")):
        gradient(jnp.stack([beta * 3]))
    mapped = checked(jax.vmap(lambda a: delta_product(**a)[0]))
    with pytest.raises(ValueError, match="g must be at most 0, got values from"):
        mapped(jax.tree.map(lambda x: x[:, None], inputs(g=inputs()["g"].at[1].set(1))))


def test_inside_transformations_it_says_where_to_stand():
    beta = inputs()["beta"]
    total = lambda beta: jnp.sum(delta_product(**inputs(beta=beta))[0])
    run = checked(total)
    for inside in (jax.grad(run), jax.jit(run), checked(run)):
        with pytest.raises(ValueError, match="put it outermost, as checked"):
            inside(beta)
    with pytest.raises(ValueError, match="put it outermost, as checked"):
        jax.vmap(run)(jnp.stack([beta]))
    with pytest.raises(ValueError, match="put it outermost, as checked"):
        jax.jit(lambda beta: checked(lambda: total(beta))())(beta)


def test_it_leaves_no_trace():
    """A function that was compiled before is compiled anew with checks, and used without after."""
    op = jax.jit(delta_product)
    arrays = inputs(beta=jnp.full((B, T, R, H), 2.5))
    before = str(jax.make_jaxpr(op)(**arrays))
    assert "check" not in re.sub("checkpoint", "", before)
    op(**arrays)
    with pytest.raises(ValueError, match="beta must be"):
        checked(op)(**arrays)
    assert str(jax.make_jaxpr(op)(**arrays)) == before
    op(**arrays)


def test_token_ids():
    config = ModelConfig(
        vocab_size=5, hidden_size=8, num_heads=2, head_dim=4, intermediate_size=8, remat="blocks"
    )
    with jax.numpy_dtype_promotion("standard"):
        graph, params = nnx.split(SequenceModel(config, rngs=nnx.Rngs(0)))
        run = checked(lambda params, ids, mask: nnx.merge(graph, params)(ids, mask=mask))
        ids, mask = jnp.array([[0, 4, 2], [1, 3, -1]]), jnp.array([[1, 1, 1], [1, 1, 0]]) > 0
        assert np.all(np.isfinite(run(params, ids, mask)[:, :2]))
        with pytest.raises(ValueError, match=re.escape("tokens must be in [0, 4], got values")):
            run(params, ids.at[0, 1].set(5), mask)


def test_room_of_a_transformer():
    with jax.numpy_dtype_promotion("standard"):
        layer = SoftmaxAttention(8, num_heads=2, head_dim=4, max_length=3, rngs=nnx.Rngs(0))
        state = layer.init_state(2)._replace(length=jnp.array([2, 3]))
        with pytest.raises(ValueError, match=re.escape("state.length must be in [0, 2], got val")):
            checked(lambda state, x: layer.step(state, x))(state, jnp.ones((2, 8)))


def test_its_example():
    failed, tried = doctest.testmod(debug, optionflags=doctest.ELLIPSIS)
    assert (failed, tried) == (0, 4)


@pytest.mark.parametrize(
    "function", quick(["op", "segments", "delta_product", "transformer", "rwkv7"], ["op"])
)
def test_no_operation_finds_a_nan_where_there_is_none(function):
    """`jax.debug_nans` goes through operations one by one once it has seen a NaN, whoever's."""
    ids = jnp.zeros((B, T), jnp.int32)
    if function == "op":
        total = lambda arrays: sum(map(jnp.sum, delta_product(**arrays, segment_ids=ids)))
        arguments = inputs()
    elif function == "segments":
        by_segment = {"segment_ids": ids, "num_segments": 2}
        total = lambda arrays: sum(map(jnp.sum, delta_product(**arrays, **by_segment)))
        arguments = inputs()
    else:
        sizes = {"hidden_size": 8, "num_heads": 2, "head_dim": 4, "num_layers": 2}
        config = ModelConfig(vocab_size=5, mixer=function, **sizes)
        graph, arguments = nnx.split(
            nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
        )
        total = lambda params: jnp.sum(nnx.merge(graph, params)(ids, segment_ids=ids))
    jax.clear_caches()  # what was traced before
    with jax.debug_nans(True), jax.numpy_dtype_promotion("standard"):
        assert "nan:" not in str(jax.make_jaxpr(jax.grad(total))(arguments))
    jax.clear_caches()
    assert "nan:" in str(jax.make_jaxpr(jax.grad(total))(arguments))
