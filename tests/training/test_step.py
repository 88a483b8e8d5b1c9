"""Pure steps: loss, gradients, accumulation and norms, on a model small enough to do by hand."""

import types

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from quick import quick

from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.parallel.layout import Layout, make_mesh
from deltaproduct_jax.tasks.task import Batch
from deltaproduct_jax.training.compiled import compiler_options
from deltaproduct_jax.training.config import TrainConfig
from deltaproduct_jax.training.evaluation import scored
from deltaproduct_jax.training.optimizer import make_optimizer, make_schedule
from deltaproduct_jax.training.step import (
    global_norm,
    init_state,
    loss_and_correct,
    make_train_step,
    split_model,
)

VOCAB = 5


class Bigram(nnx.Module):
    """Logits from the last token alone."""

    def __init__(self, rngs: nnx.Rngs, dtype=jnp.float32):
        self.table = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, VOCAB), dtype))

    def __call__(self, tokens):
        return self.table[...][tokens]


def random_batch(batch_size=8, length=6, seed=0) -> Batch:
    rng = np.random.default_rng(seed)
    tokens = rng.integers(VOCAB, size=(2, batch_size, length)).astype(np.int32)
    mask = rng.random((batch_size, length)) < 0.7  # rows count different numbers of positions
    return Batch(*map(jnp.asarray, (*tokens, mask)))


def step_with(train: TrainConfig, model: nnx.Module):
    definition, params = split_model(model)
    optimizer = make_optimizer(train)
    step = make_train_step(definition, optimizer, make_schedule(train), train.accumulation_steps)
    return jax.jit(step), init_state(params, optimizer)


def test_loss_and_answers_by_hand():
    definition, params = split_model(Bigram(nnx.Rngs(0)))
    batch = random_batch()
    loss, correct = loss_and_correct(definition, params, batch)
    logits = np.asarray(params["table"], dtype=np.float64)[batch.inputs]
    probabilities = np.exp(logits) / np.exp(logits).sum(axis=-1, keepdims=True)
    taken = np.take_along_axis(probabilities, np.asarray(batch.targets)[..., None], axis=-1)
    want = -np.log(taken[..., 0])[np.asarray(batch.mask)].sum()
    assert float(loss) == pytest.approx(want, rel=1e-5)
    np.testing.assert_array_equal(correct, logits.argmax(axis=-1) == batch.targets)


def test_loss_is_float32_for_a_bfloat16_model():
    definition, params = split_model(Bigram(nnx.Rngs(0), dtype=jnp.bfloat16))
    loss, _ = loss_and_correct(definition, params, random_batch())
    assert loss.dtype == jnp.float32


def moments_of(state):
    return [optax.tree_utils.tree_get(state.opt_state, name) for name in ("mu", "nu")]


def test_a_bfloat16_model_trains():
    """Its norm scales start at 1, where bfloat16 has no number nearer than 4e-3."""
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=8, num_heads=2, head_dim=4,
        intermediate_size=8, param_dtype="bfloat16",
    )  # fmt: skip
    train = TrainConfig(batch_size=4, accumulation_steps=2, schedule="constant", weight_decay=0.0)
    step, state = step_with(train, SequenceModel(config, rngs=nnx.Rngs(0)))
    kinds = {leaf.dtype.name for leaf in jax.tree.leaves((state.params, moments_of(state)))}
    assert kinds == {"float32"}
    for seed in range(60):
        state, metrics = step(state, random_batch(batch_size=4, seed=seed))
        assert np.isfinite(metrics["loss"])
    scales = [
        np.asarray(leaf)
        for path, leaf in jax.tree.leaves_with_path(state.params)
        if "scale" in jax.tree_util.keystr(path)
    ]
    moved = np.abs(np.concatenate(scales) - 1)
    assert len(moved) == 3 * 8 + 4
    assert np.all(moved > 0)
    # Once gradients are 0, both moments decay as they should.
    grads = jax.tree.map(lambda x: jnp.zeros(x.shape, jnp.bfloat16), state.params)
    _, after = make_optimizer(train).update(grads, state.opt_state, state.params)
    after = state._replace(opt_state=after)
    for old, new, kept in zip(moments_of(state), moments_of(after), (0.9, 0.999), strict=True):
        jax.tree.map(lambda a, b, k=kept: np.testing.assert_allclose(b, k * a, rtol=1e-6), old, new)


def test_a_model_computes_with_parameters_of_its_own_dtypes():
    definition, params = split_model(Bigram(nnx.Rngs(0), dtype=jnp.bfloat16))
    state = init_state(params, make_optimizer(TrainConfig()))
    table = definition.with_params(state.params).table[...]
    assert (table.dtype, state.params["table"].dtype) == (jnp.bfloat16, jnp.float32)
    np.testing.assert_array_equal(table, params["table"])
    nudged = {"table": state.params["table"] * (1 + 2**-12)}  # lost when it is rounded
    losses = [loss_and_correct(definition, p, random_batch())[0] for p in (params, nudged)]
    assert losses[0] == losses[1]


def test_moments_are_float32_for_bfloat16_parameters_given_to_the_optimizer():
    params = {"a": jnp.ones((3,), jnp.bfloat16)}
    optimizer = make_optimizer(TrainConfig())
    updates, state = optimizer.update(params, optimizer.init(params), params)
    assert updates["a"].dtype == jnp.float32
    assert optax.tree_utils.tree_get(state, "nu")["a"].dtype == jnp.float32


@pytest.mark.parametrize("accumulation_steps", quick([2, 8], [2]))
def test_accumulated_step_is_the_step_of_the_whole_batch(accumulation_steps):
    after = []
    for parts in (1, accumulation_steps):
        train = TrainConfig(batch_size=8, accumulation_steps=parts, clip_norm=0.5)
        step, state = step_with(train, Bigram(nnx.Rngs(0)))
        after.append(step(state, random_batch()))
    (whole, whole_metrics), (parted, parted_metrics) = after
    for name in whole_metrics:
        np.testing.assert_allclose(whole_metrics[name], parted_metrics[name], rtol=1e-5)
    # Not the parameters: AdamW's first update has the size of the learning rate wherever a gradient
    # is not quite 0, so it magnifies rounding. Its first moment is the gradient to a factor.
    moments = [optax.tree_utils.tree_get(state.opt_state, "mu") for state in (whole, parted)]
    np.testing.assert_allclose(*(moment["table"] for moment in moments), rtol=1e-5, atol=1e-8)


@pytest.mark.usefixtures("all_devices")
@pytest.mark.parametrize("parts", quick([1, 2], [2]))
def test_a_step_over_devices_is_the_step_of_the_whole_batch(parts):
    """Devices count different numbers of positions."""
    train = TrainConfig(batch_size=8, accumulation_steps=parts, clip_norm=0.5)
    definition, params = split_model(Bigram(nnx.Rngs(0)))
    optimizer, schedule = make_optimizer(train), make_schedule(train)
    state, batch = init_state(params, optimizer), random_batch()
    layout = Layout.of_model(DeviceConfig(mesh="data:2,fsdp:2"), lambda: Bigram(nnx.Rngs(0)))
    step = make_train_step(definition, optimizer, schedule, parts, layout)
    spread = jax.device_put(state, layout.shardings(state))
    after, metrics = jax.jit(step)(spread, jax.device_put(batch, layout.whole))
    step = make_train_step(definition, optimizer, schedule, accumulation_steps=1)
    expected, expected_metrics = jax.jit(step)(state, batch)
    for name in expected_metrics:
        np.testing.assert_allclose(metrics[name], expected_metrics[name], rtol=1e-5)
    moments = [optax.tree_utils.tree_get(state.opt_state, "mu") for state in (after, expected)]
    np.testing.assert_allclose(*(moment["table"] for moment in moments), rtol=1e-5, atol=1e-8)


def test_metrics_of_a_step():
    train = TrainConfig(steps=10, learning_rate=0.5, schedule="cosine")
    step, state = step_with(train, Bigram(nnx.Rngs(0)))
    batch = random_batch()
    after, metrics = step(state, batch)
    table, new_table = (np.asarray(s.params["table"], np.float64) for s in (state, after))

    def loss_of(table):
        definition, _ = split_model(Bigram(nnx.Rngs(0)))
        loss, correct = loss_and_correct(definition, {"table": table}, batch)
        return loss / float(batch.mask.sum()), correct

    (loss, correct), grad = jax.value_and_grad(loss_of, has_aux=True)(state.params["table"])
    mask = np.asarray(batch.mask)
    want = {
        "loss": loss,
        "accuracy": np.asarray(correct)[mask].mean(),
        "grad_norm": np.linalg.norm(grad),
        "param_norm": np.linalg.norm(new_table),
        "update_norm": np.linalg.norm(new_table - table),
        "learning_rate": 0.5,
        "skipped_steps": 0,
        "skipped_in_a_row": 0,
    }
    assert set(metrics) == set(want)
    for name, value in want.items():
        assert float(metrics[name]) == pytest.approx(float(value), rel=1e-5), name
    assert int(after.step) == 1
    assert float(step(after, batch)[1]["learning_rate"]) == pytest.approx(
        0.25 * (1 + np.cos(np.pi / 10)), rel=1e-5
    )


def test_global_norm_of_bfloat16_is_summed_in_float32():
    tree = {"a": jnp.ones((1000,), jnp.bfloat16), "b": jnp.full((24,), 1.0)}
    norm = global_norm(tree)
    assert norm.dtype == jnp.float32
    assert float(norm) == 32.0


def test_a_norm_of_many_leaves_and_what_is_clipped_by_it():
    """Small ones, whole and by rows; the other way over a mesh."""
    drawn = np.random.default_rng(0)
    shapes = [(3,), (130, 130), (), (5, 2)] * 20
    tree = [jnp.asarray(drawn.normal(size=shape), jnp.float32) for shape in shapes]
    flat = np.concatenate([np.ravel(x).astype(np.float64) for x in tree])
    layout = Layout(make_mesh(DeviceConfig(mesh="data:2"), jax.devices()[:2]), {})

    def over_a_mesh(tree):
        with layout.placed():
            return global_norm(tree)

    for norm in (jax.jit(global_norm)(tree), jax.jit(over_a_mesh)(tree)):
        assert float(norm) == pytest.approx(np.linalg.norm(flat), rel=1e-6)
    assert float(global_norm([])) == 0
    for most in (1.0, 1e4):
        config = TrainConfig(clip_norm=most, learning_rate=1.0, warmup_steps=0, weight_decay=0.0)
        optimizer = make_optimizer(config)
        published = optax.clip_by_global_norm(most)
        wanted, _ = jax.jit(published.update)(tree, published.init(tree))
        _, state = jax.jit(optimizer.update)(tree, optimizer.init(tree), tree)
        moments = optax.tree_utils.tree_get(state, "mu")
        for found, x in zip(moments, wanted, strict=True):
            np.testing.assert_allclose(found, (1 - config.adam_b1) * x, rtol=1e-5)


@pytest.mark.parametrize(("platform", "width"), [("gpu", 1024), ("gpu", 128), ("cpu", 1024)])
def test_cublas_makes_the_products_of_wide_models_on_a_gpu(platform, width):
    device = types.SimpleNamespace(platform=platform)
    options = compiler_options(types.SimpleNamespace(devices=np.array([device])), width)
    expected = {"xla_gpu_enable_triton_gemm": False} if (platform, width) == ("gpu", 1024) else None
    assert options == expected


def test_training_lowers_the_loss_and_never_compiles_twice():
    step, state = step_with(TrainConfig(learning_rate=0.1), Bigram(nnx.Rngs(0)))
    batch = random_batch()
    losses = []
    for _ in range(20):
        state, metrics = step(state, batch)
        losses.append(float(metrics["loss"]))
    assert losses[-1] < 0.7 * losses[0]
    assert step._cache_size() == 1


def test_the_loss_of_an_evaluation_is_summed_in_float64():
    """In float32 a batch's loss is lost beside the sum of very many."""
    source = types.SimpleNamespace(scores=lambda split, loss, correct_BT, mask_BT: ({}, {}))
    mask_BT = np.ones((1, 4), bool)
    outputs = [(np.float32(loss), mask_BT, mask_BT) for loss in (2.0**24, 1, 1, 1)]
    assert scored(source, "test", outputs).loss == (2.0**24 + 3) / 16
