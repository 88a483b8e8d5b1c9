"""Blocks as a scan, hybrids and named points: the same numbers, the same parameters, less work."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers import SoftmaxAttention
from deltaproduct_jax.layers.attention import AttentionState
from deltaproduct_jax.layers.delta_product import DeltaProductState
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.models.config import ATTENTION
from deltaproduct_jax.models.stack import repetition
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.parallel.layout import Layout
from deltaproduct_jax.tasks.task import Batch
from deltaproduct_jax.training.step import loss_and_correct, split_model

SMALL = ModelConfig(
    vocab_size=11, hidden_size=8, num_layers=4, num_heads=2, head_dim=4, intermediate_size=8,
    implementation="recurrent",
)  # fmt: skip
HYBRID = dataclasses.replace(SMALL, attention_every=2)


@functools.cache
def tokens(T=6):
    return jax.random.randint(jax.random.key(0), (2, T), 0, 11)


def model_of(config, seed=0):
    return SequenceModel(config, rngs=nnx.Rngs(seed))


def loss_and_gradients(config):
    definition, params = split_model(model_of(config))
    ids = tokens()
    batch = Batch(
        ids, jnp.roll(ids, -1, 1), jnp.ones(ids.shape, bool), jnp.array([[0, 0, 0, 1, 1, 1]] * 2)
    )
    run = jax.jit(jax.value_and_grad(lambda params: loss_and_correct(definition, params, batch)[0]))
    return run, params


def assert_close(a, b):
    jax.tree.map(lambda x, y: np.testing.assert_allclose(x, y, rtol=2e-4, atol=1e-6), a, b)


@pytest.mark.slow
@pytest.mark.parametrize(
    "config", [SMALL, HYBRID, dataclasses.replace(SMALL, mixer="rwkv7", implementation=None)],
    ids=["alike", "hybrid", "first_differs"],
)  # fmt: skip
def test_a_scan_of_blocks_is_the_blocks(config):
    """With the same parameters, packed rows, and the states behind the last token."""
    scanned = dataclasses.replace(config, scan_layers=True, remat="blocks")
    (run, params), (again, same) = map(loss_and_gradients, (config, scanned))
    assert_close(params, same)  # so a checkpoint is of either
    assert_close(run(params), again(params))
    logits, states = jax.jit(lambda m, t: m.forward(t))(model_of(config), tokens())
    wanted = jax.jit(lambda m, t: m.forward(t))(model_of(scanned), tokens())
    assert_close((logits, states), wanted)
    assert [type(state) for state in states] == [config.mixer_of(i).state for i in range(4)]


def test_what_repeats_is_found():
    for kinds, want in (
        ("aaaa", (0, 1, 4)),
        ("abbb", (1, 1, 3)),
        ("aaabaaab", (0, 4, 2)),
        ("aaabaaabaaabaa", (0, 4, 3)),
        ("caaabaaab", (1, 4, 2)),
        ("abc", None),
        ("a", None),
    ):
        assert repetition(list(kinds)) == want, kinds


def jaxpr_of(config, derive=lambda run: run):
    graphdef, params = nnx.split(nnx.eval_shape(lambda: model_of(config)))
    run = derive(lambda params, ids: nnx.merge(graphdef, params)(ids).sum())
    return str(jax.make_jaxpr(run)(params, tokens()))


def test_a_scan_traces_each_kind_once():
    for config, want in ((SMALL, 1), (HYBRID, 2)):
        text = jaxpr_of(dataclasses.replace(config, scan_layers=True))
        assert text.count("name=mlp_output") == want


@pytest.mark.slow
@pytest.mark.usefixtures("all_devices")
def test_a_scan_over_a_mesh_is_the_blocks():
    config = dataclasses.replace(SMALL, scan_layers=True, remat="blocks")
    run, params = loss_and_gradients(SMALL)
    want = run(params)
    layout = Layout.of_model(DeviceConfig(mesh="data:2,fsdp:2"), lambda: model_of(config))
    definition, _ = split_model(model_of(config))
    ids = jnp.concatenate([tokens()] * 2)
    segments = jnp.array([[0, 0, 0, 1, 1, 1]] * 4)
    batch = Batch(ids, jnp.roll(ids, -1, 1), jnp.ones(ids.shape, bool), segments)

    def loss(params):
        return loss_and_correct(definition, params, layout.cut_batch(batch), layout)[0] / 2

    spread = jax.device_put(params, layout.shardings(params))
    assert_close(want, jax.jit(jax.value_and_grad(loss))(spread))


@pytest.mark.slow
def test_a_hybrid_decodes_as_it_reads():
    """Every second block is attention; states go from reading to steps and are checked."""
    model = model_of(HYBRID)
    kinds = [isinstance(block.attn, SoftmaxAttention) for block in model.layers]
    assert kinds == [False, True, False, True]
    whole = jax.jit(lambda m, t: m(t))(model, tokens())
    logits, state = jax.jit(lambda m, t: m.forward(t))(model, tokens()[:, :4])
    step = jax.jit(lambda m, s, t: m.step(s, t))
    for place in (4, 5):
        after, state = step(model, state, tokens()[:, place])
        np.testing.assert_allclose(after, whole[:, place], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(logits, whole[:, :4], rtol=1e-4, atol=1e-5)
    assert [type(entry) for entry in state] == [DeltaProductState, AttentionState] * 2
    with pytest.raises(ValueError, match="4 of DeltaProductState or AttentionState, one per block"):
        model.step(state[::-1], tokens()[:, 0])


@pytest.mark.slow
@pytest.mark.parametrize("name", sorted(MIXERS.keys() - {ATTENTION}))
def test_every_mixer_makes_a_hybrid(name):
    config = ModelConfig.variant({"mixer": name})(
        vocab_size=11, mixer=name, hidden_size=8, num_layers=5, num_heads=2, head_dim=4,
        intermediate_size=8, attention_every=3, max_length=7,
    )  # fmt: skip
    shapes = nnx.eval_shape(lambda: model_of(config))
    attention = [type(block.attn) is SoftmaxAttention for block in shapes.layers]
    assert attention == [False, False, True, False, False]
    assert shapes.layers[2].attn.max_length == 7
    graphdef, state = nnx.split(shapes)
    run = lambda state, ids: nnx.merge(graphdef, state).forward(ids)
    logits, states = jax.eval_shape(run, state, tokens())
    assert logits.shape == (2, 6, 11)
    assert len(states) == 5


def test_named_points_are_kept_and_no_others():
    """Widened products that are kept are not computed anew for the gradient."""
    counts = []
    for points in ((), ("mlp_hidden",)):
        config = dataclasses.replace(SMALL, num_layers=1, remat="named", saved_points=points)
        counts.append(jaxpr_of(config, jax.grad).count("dot_general["))
    assert counts[0] == counts[1] + 2


def test_products_keep_a_number_a_row_and_round_kernels_once():
    """Neither norms' rows nor kernels are gone over again for the gradient."""
    config = dataclasses.replace(SMALL, num_layers=1, dtype="bfloat16", remat="products")
    plain, blocks, products = (
        jaxpr_of(dataclasses.replace(config, remat=remat), jax.grad)
        for remat in ("none", "blocks", "products")
    )
    sums_of_rows = "f32[2,6] = reduce_sum[axes=(2,)"
    rounded = "bf16[8,8] = convert_element_type"  # every kernel has 8 channels on both sides
    for text in (sums_of_rows, rounded):
        assert blocks.count(text) > products.count(text) == plain.count(text) > 0


def test_errors_name_the_field():
    for fields, words in (
        ({"attention_every": 1}, "attention_every=1 is too small"),
        ({"attention_every": 5}, "attention_every=5 makes none of num_layers=4 blocks attention"),
        ({"num_layers": 1, "attention_every": 2}, "makes none of num_layers=1 blocks attention"),
        (
            {"attention_every": 2, "mixer": "transformer", "implementation": None},
            "is attention itself",
        ),
        ({"saved_points": ("mlp_output",)}, "needs remat=named, got remat=none"),
        ({"remat": "named", "saved_points": ("nothing",)}, "saved_points='nothing' is not known"),
        ({"max_length": 8}, "max_length=8 does not fit mixer='delta_product'"),
        ({"attention_every": 2, "head_dim": 3}, "head_dim=3"),
        ({"attention_every": 2, "attention_layers": (1,)}, "both say where attention is"),
        (
            {"attention_layers": (1, 4)},
            r"attention_layers=\(1, 4\) must be .* from 0 to 3, and leave",
        ),
        ({"attention_layers": (0, 1, 2, 3)}, "leave a block to mixer='delta_product'"),
        ({"attention_heads": 2}, "attention_heads=2 is of a hybrid's attention; give"),
        (
            {"attention_layers": (1,), "attention_heads": 3},
            "attention_heads=3 must divide hidden_s",
        ),
        ({"attention_layers": (1,), "attention_heads": 8}, "head_dim=1 must be even"),
        ({"window_size": 4}, "window_size=4 does not fit mixer='delta_product'"),
    ):
        with pytest.raises(ConfigError, match=words):
            dataclasses.replace(SMALL, **fields)
    assert dataclasses.replace(HYBRID, max_length=8).max_length == 8


@pytest.mark.parametrize("remat", ["none", "products"])
def test_a_scanned_model_has_a_gradient(remat):
    """Of its states nothing is asked, and those of all blocks are stacked."""
    sizes = {"hidden_size": 8, "num_heads": 1, "head_dim": 8, "num_layers": 3, "vocab_size": 8}
    config = ModelConfig(mixer="gated_delta_product", scan_layers=True, remat=remat, **sizes)
    graph, params = nnx.split(SequenceModel(config, rngs=nnx.Rngs(0)))
    loss = lambda params, ids: jnp.sum(nnx.merge(graph, params)(ids))
    traced = jax.jit(jax.grad(loss)).trace(params, jnp.zeros((2, 40), int))
    assert jax.tree.structure(traced.out_info) == jax.tree.structure(params)
