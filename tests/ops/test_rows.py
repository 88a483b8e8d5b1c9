"""A norm whose input goes on, and a residual SwiGLU: values and derivatives of what they mean."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P
from quick import quick

from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.models.sequence_model import Block
from deltaproduct_jax.ops import kernels
from deltaproduct_jax.ops.blocks import logits, rows, short, wide
from deltaproduct_jax.ops.kernels.triton import passes

B, T, D, F, EPS = 2, 5, 8, 12, 1e-5


def drawn():
    keys = jax.random.split(jax.random.key(0), 6)
    x, scale = jax.random.normal(keys[0], (B, T, D)), 1 + jax.random.normal(keys[1], (D,))
    gate, up = (0.3 * jax.random.normal(key, (D, F)) for key in keys[2:4])
    more = jax.random.normal(keys[5], (B, T, D))
    return x, scale, more, gate, up, 0.3 * jax.random.normal(keys[4], (F, D))


def norm(x, scale):
    along = scale.reshape((1,) * (x.ndim - 1) + (-1,))
    return x / jnp.sqrt(jnp.mean(x * x, axis=-1, keepdims=True) + EPS) * along


def swiglu(x, scale, more, gate, up, down):
    z = x + more
    y = norm(z, scale)
    return z + (jax.nn.silu(y @ gate) * (y @ up)) @ down


def heads(x):
    """[B, T, D] as heads of 4, with scales for them."""
    return x.reshape(B, T, -1, 4)


def down_from(products, down):
    return sum(jnp.cos(y) * (i + 1) for i, y in enumerate(products)) @ down


IDS = jnp.arange(B * T).reshape(B, T) % F
MASK = IDS != 3
PAIRS = {
    "swiglu": (
        lambda x, scale, more, gate, up, down: rows.residual_swiglu(
            x, more, jnp.zeros((B, T), bool), scale, jnp.hstack([gate, up]), down, EPS
        ),
        swiglu,
    ),
    "norm": (
        lambda x, scale, *_: sum(rows.forked_norm(x, scale, EPS)[:2]),
        lambda x, scale, *_: x + norm(x, scale),
    ),
    "short rows": (
        lambda x, scale, more, gate, up, down: (
            jnp.sin(
                rows.residual_swiglu(
                    x, more, jnp.zeros((B, T), bool), scale, jnp.hstack([gate, up]), down, EPS
                )
            )
            + down_from(rows.products(x, [gate, up, gate + up, down.T]), down)
            + down_from([rows.norm_product(heads(x), scale[:4], gate, EPS)], down)
            + sum(rows.head_sums(x, scale, gate, IDS, MASK, EPS)[:2])[..., None]
        ),
        lambda x, scale, more, gate, up, down: (
            jnp.sin(swiglu(x, scale, more, gate, up, down))
            + down_from([x @ gate, x @ up, x @ (gate + up), x @ down.T], down)
            + down_from([norm(heads(x), scale[:4]).reshape(B, T, D) @ gate], down)
            + sum(logits.plain(norm(x, scale) @ gate, IDS, MASK)[:2])[..., None]
        ),
    ),
    "product": (
        lambda x, scale, _, gate, *__: rows.norm_product(heads(x), scale[:4], gate, EPS),
        lambda x, scale, _, gate, *__: norm(heads(x), scale[:4]).reshape(B, T, D) @ gate,
    ),
}


def assert_close(a, b):
    error = lambda x, y: np.linalg.norm(x - y) / max(np.linalg.norm(y), 1e-3)
    assert max(jax.tree.leaves(jax.tree.map(error, a, b))) < 1e-5


def one_form(monkeypatch, form):
    """Rows are short or wide, and the other form of what has both is not there."""
    monkeypatch.setattr(short, "takes", lambda *_: form is short)
    for name in ("residual_swiglu", "norm_product"):
        monkeypatch.delattr(wide if form is short else short, name)


@pytest.mark.parametrize("name", PAIRS)
def test_values_and_derivatives_are_those_of_the_equation(name, monkeypatch):
    one_form(monkeypatch, short if name == "short rows" else wide)

    def derivatives(function):
        loss = lambda *arrays: jnp.sum(jnp.sin(function(*arrays)))
        gradient = jax.grad(loss, (0, 1, 2, 3, 4, 5))
        twice = jax.grad(lambda *arrays: jnp.sum(jnp.sin(gradient(*arrays)[0])))
        x, *others = drawn()
        mapped = jax.vmap(gradient, (0, 0, *4 * [None]))
        scales = jnp.stack([others[0], -others[0]])
        one = function(x, *others), gradient(x, *others), twice(x, *others)
        return one, mapped(jnp.stack([x, 2 * x]), scales, *others[1:])

    ours, wanted = (jax.jit(lambda f=f: derivatives(f))() for f in PAIRS[name])
    assert_close(ours, wanted)


@pytest.mark.parametrize("remat", quick(["none", "products"], ["products"]))
def test_a_block_that_is_fused_is_the_same(monkeypatch, remat):
    sizes = {"hidden_size": 16, "num_heads": 2, "head_dim": 4, "num_layers": 2, "vocab_size": 8}
    config = ModelConfig(mixer="delta_product", remat=remat, implementation="recurrent", **sizes)
    graph, params = nnx.split(SequenceModel(config, rngs=nnx.Rngs(0)))
    ids = jax.random.randint(jax.random.key(1), (2, 6), 0, 8)

    def gradient(fused):
        monkeypatch.setattr(Block, "_may_be_fused", lambda self, x: fused)
        loss = lambda params: jnp.sum(jnp.sin(nnx.merge(graph, params)(ids)))
        return jax.jit(jax.value_and_grad(loss))(params)

    assert_close(gradient(True), gradient(False))


def test_what_is_not_finite_reaches_as_far_as_in_a_block_that_is_not_fused(monkeypatch):
    sizes = {"hidden_size": 16, "num_heads": 2, "head_dim": 4, "vocab_size": 8}
    config = ModelConfig(mixer="delta_product", implementation="recurrent", num_layers=1, **sizes)
    graph, params = nnx.split(Block(config, 0, rngs=nnx.Rngs(0)))
    x = jax.random.normal(jax.random.key(1), (2, 6, 16)).at[1, 1, 3].set(jnp.inf)
    segment_ids = jnp.asarray([[0] * 6, [0, 0, 0, 1, 1, 1]])
    clean = (jnp.arange(6)[None] >= 3) | (jnp.arange(2)[:, None] == 0)

    def results(fused):
        monkeypatch.setattr(Block, "_may_be_fused", lambda self, x: fused)

        def run(x, counted):
            y, _ = nnx.merge(graph, params)(x, segment_ids=segment_ids, fused=True)
            return jnp.sum(jnp.sin(y), where=counted[..., None]), y

        return [jax.grad(run, has_aux=True)(x, c) for c in (clean, jnp.ones_like(clean))]

    ours, wanted = (jax.jit(lambda fused=fused: results(fused))() for fused in (True, False))
    bad = ~clean & (jnp.arange(6) >= 1)[None]
    for (dx, y), (dx_wanted, y_wanted) in zip(ours, wanted, strict=True):
        np.testing.assert_array_equal(np.isnan(y).any(axis=-1), bad)
        np.testing.assert_allclose(y[~bad], y_wanted[~bad], rtol=1e-5, atol=1e-5)
        np.testing.assert_array_equal(*(np.isnan(d).any(axis=-1) for d in (dx, dx_wanted)))


def test_short_rows_have_few_channels_and_ids_in_16_bits_on_a_large_gpu(monkeypatch):
    def takes(*shape, width=1, dtype="bfloat16", sources=()):
        return short.takes(jax.ShapeDtypeStruct(shape, dtype), width, *sources)

    monkeypatch.setattr(kernels, "is_installed", lambda name: False)
    assert not takes(B, T, 128)
    monkeypatch.setattr(kernels, "is_installed", lambda name: name == "triton")
    assert takes(B, T, 128)
    assert takes(B, T, 24, width=128, dtype="float16")
    assert not takes(B, T, 129)
    assert not takes(B, T, 128, width=129)
    assert not takes(B, T, 128, dtype="float32")
    assert not takes(B, 0, 128)
    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Explicit,), devices=jax.devices()[:2])
    for spec, whole in ((P(), True), (P("rows"), False)):
        ids = jax.device_put(jnp.zeros((2, T), int), NamedSharding(mesh, spec))
        assert takes(2, T, 128, sources=[ids]) == whole
    monkeypatch.setenv(passes.COMPUTE_CAPABILITY_VARIABLE, "89")
    assert not takes(B, T, 128)


def test_a_product_of_norms_is_short_where_its_output_and_a_head_are(monkeypatch):
    asked = []
    takes = lambda x, width, *sources: asked.append((x.shape, x.dtype, width, len(sources)))
    monkeypatch.setattr(short, "takes", takes)
    array = lambda *shape: jax.ShapeDtypeStruct(shape, "bfloat16")
    arrays = array(B, T, 8, 32), array(32), array(256, 16)
    assert jax.eval_shape(lambda *given: rows.norm_product(*given, EPS), *arrays).shape[-1] == 16
    assert asked == [((B, T, 16), jnp.bfloat16, 32, 1)]
