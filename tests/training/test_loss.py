"""The loss in chunks is the loss at once: values, gradients, answers, NaN, memory."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.ops.blocks import short
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.parallel.layout import Layout
from deltaproduct_jax.tasks.task import Batch
from deltaproduct_jax.training import cross_entropy
from deltaproduct_jax.training.config import TrainConfig
from deltaproduct_jax.training.loss import PLAIN, LossSettings, losses_of
from deltaproduct_jax.training.optimizer import make_optimizer, make_schedule
from deltaproduct_jax.training.step import init_state, make_train_step, split_model

B, T, D, VOCAB = 4, 10, 6, 11


class Head(nnx.Module):
    """What the loss asks of a model, with the last map alone; tokens choose the features."""

    def __init__(self, tied: bool, dtype=jnp.float32):
        rngs, kind = nnx.Rngs(0), {"dtype": dtype, "param_dtype": dtype}
        self.x = nnx.Param(jax.random.normal(rngs.params(), (VOCAB, D), dtype))
        if tied:
            self.head = nnx.Embed(VOCAB, D, rngs=rngs, **kind)
        else:
            self.head = nnx.Linear(D, VOCAB, use_bias=False, rngs=rngs, **kind)

    def features(self, tokens, segment_ids=None):
        return self.x[...][tokens]

    def __call__(self, tokens, segment_ids=None):
        x = self.features(tokens)
        return self.head.attend(x) if isinstance(self.head, nnx.Embed) else self.head(x)


def random_batch(seed=0, length=T):
    rng = np.random.default_rng(seed)
    tokens = rng.integers(VOCAB, size=(2, B, length)).astype(np.int32)
    return Batch(*map(jnp.asarray, (*tokens, rng.random((B, length)) < 0.7)))


def with_gradients(model, batch, settings, layout=None):
    graphdef, params = nnx.split(model)

    def objective(params):
        losses = losses_of(nnx.merge(graphdef, params), batch, settings, layout)
        return losses.objective, losses

    run = jax.jit(jax.grad(objective, has_aux=True))
    gradients, losses = run(params)
    return losses, jax.tree.map(lambda x: np.asarray(x, np.float64), nnx.to_pure_dict(gradients))


@pytest.mark.parametrize(("tied", "chunk_size"), [(True, 1), (True, 12), (False, 1000)])
def test_chunks_are_the_whole(tied, chunk_size):
    """Chunks of 1 and of 3 tokens a row, where T is no multiple of 3, and one of all."""
    model, batch = Head(tied), random_batch()
    (want, gradients), (got, chunked) = (
        with_gradients(model, batch, LossSettings(size, 0.1)) for size in (None, chunk_size)
    )
    for name in ("objective", "cross_entropy", "z"):
        assert float(getattr(got, name)) == pytest.approx(float(getattr(want, name)), rel=1e-6)
    np.testing.assert_array_equal(got.correct & batch.mask, want.correct & batch.mask)
    assert (got.correct & batch.mask).any()
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradients, chunked
    )


def test_the_losses_by_hand():
    model, batch = Head(True), random_batch()
    logits = np.asarray(model(batch.inputs), np.float64)
    normalisers = np.log(np.exp(logits).sum(axis=-1))
    taken = np.take_along_axis(logits, np.asarray(batch.targets)[..., None], axis=-1)[..., 0]
    mask = np.asarray(batch.mask)
    losses, _ = with_gradients(model, batch, LossSettings(4, 0.25))
    assert float(losses.cross_entropy) == pytest.approx((normalisers - taken)[mask].sum(), rel=1e-6)
    assert float(losses.z) == pytest.approx(0.25 * (normalisers**2)[mask].sum(), rel=1e-6)
    assert float(losses.objective) == pytest.approx(float(losses.cross_entropy + losses.z))


def test_gradients_of_many_chunks_of_a_bfloat16_model_are_added_in_float32():
    model, batch = Head(True, jnp.bfloat16), random_batch(length=256)
    wide = Head(True)
    nnx.update(wide, jax.tree.map(lambda x: x.astype(jnp.float32), nnx.state(model)))
    exact = with_gradients(wide, batch, PLAIN)[1]["head"]["embedding"]
    found = [
        with_gradients(model, batch, LossSettings(size))[1]["head"]["embedding"]
        for size in (None, 4)
    ]
    errors = [np.linalg.norm(each - exact) / np.linalg.norm(exact) for each in found]
    assert errors[1] < 1.5 * errors[0] < 0.05


def test_what_does_not_count_is_nowhere():
    """A NaN at a masked position reaches neither the loss nor a parameter."""
    model, batch = Head(True), random_batch()
    model.x[...] = model.x[...].at[0].set(jnp.nan)
    for counted in (batch.inputs != 0, batch.mask):
        batch = batch._replace(mask=counted)
        losses, gradients = with_gradients(model, batch, LossSettings(8))
        is_finite = np.isfinite(float(losses.objective))
        assert is_finite == bool(jnp.all(counted <= (batch.inputs != 0)))
        assert is_finite == np.isfinite(gradients["head"]["embedding"]).all()


@pytest.mark.usefixtures("all_devices")
@pytest.mark.parametrize(
    ("mesh", "parts"), [("data:2,sequence:2", (2, 2)), ("fsdp:2,tensor:2", (2, 1))]
)
def test_chunks_over_a_mesh_are_the_whole(mesh, parts, monkeypatch):
    model, batch = Head(True), random_batch()
    want, gradients = with_gradients(model, batch, PLAIN)
    layout = Layout.of_model(DeviceConfig(mesh=mesh), lambda: Head(True))
    got, spread = with_gradients(model, batch, LossSettings(12), layout)
    assert float(got.objective) == pytest.approx(float(want.objective), rel=1e-6)
    np.testing.assert_array_equal(got.correct & batch.mask, want.correct & batch.mask)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-6), gradients, spread
    )
    # Every device has a part of every chunk.
    met, attend = [], nnx.Embed.attend
    watched = lambda self, x: met.append(x.shape) or attend(self, x)
    monkeypatch.setattr(nnx.Embed, "attend", watched)
    jax.eval_shape(lambda: losses_of(model, batch, LossSettings(12), layout))
    assert {shape[:2] for shape in met} == {parts}


@pytest.mark.slow
def test_a_whole_model_trains_alike_by_chunks():
    config = ModelConfig(
        vocab_size=VOCAB, hidden_size=8, num_heads=1, head_dim=4, intermediate_size=8,
        tie_embeddings=True, implementation="recurrent",
    )  # fmt: skip
    after = []
    for size in (None, 8):
        train = TrainConfig(batch_size=4, accumulation_steps=2, loss_chunk_size=size, z_loss=1e-2)
        definition, params = split_model(SequenceModel(config, rngs=nnx.Rngs(0)))
        optimizer = make_optimizer(train)
        step = make_train_step(
            definition, optimizer, make_schedule(train), 2, settings=train.loss_settings
        )
        batch = random_batch()._replace(segment_ids=jnp.repeat(jnp.arange(5), 2)[None].repeat(B, 0))
        after.append(jax.jit(step)(init_state(params, optimizer), batch)[1])
    assert set(after[0]) == set(after[1]) >= {"loss", "z_loss", "grad_norm"}
    for name, value in after[0].items():
        assert float(after[1][name]) == pytest.approx(float(value), rel=1e-5), name


def test_logits_are_never_there_at_once():
    """340M parameters' head on 8 x 4,096 tokens, by the compiler's own account."""
    tokens, width, vocab = (8, 4096), 1024, 32_000
    shape = jax.ShapeDtypeStruct
    batch = Batch(shape(tokens, jnp.int32), shape(tokens, jnp.int32), shape(tokens, jnp.bool_))
    head = nnx.eval_shape(lambda: nnx.Embed(vocab, width, dtype=jnp.bfloat16, rngs=nnx.Rngs(0)))
    graphdef, params = nnx.split(head)

    class Whole(nnx.Module):
        def __init__(self, head, x):
            self.head, self.x = head, x

        features = lambda self, tokens: self.x
        __call__ = lambda self, tokens: self.head.attend(self.x)

    def bytes_of(size):
        def objective(params, x, batch):
            model = Whole(nnx.merge(graphdef, params), x)
            return losses_of(model, batch, LossSettings(size)).objective

        lowered = jax.jit(jax.grad(objective, (0, 1))).lower(
            params, shape((*tokens, width), jnp.bfloat16), batch
        )
        return lowered.compile().memory_analysis().temp_size_in_bytes

    logits = 4 * 8 * 4096 * vocab
    whole, chunked = bytes_of(None), bytes_of(2048)
    assert whole > 1.5 * logits
    assert chunked < 0.3 * logits  # with the head's gradient, 131 MB, and that of what it reads


def test_settings_are_checked():
    with pytest.raises(ConfigError, match="loss_chunk_size=0 is too small"):
        TrainConfig(loss_chunk_size=0)
    with pytest.raises(ConfigError, match=r"z_loss=-1\.0 is too small"):
        TrainConfig(z_loss=-1.0)


@functools.cache
def small():
    """A model that is run without kernels, in two parts."""
    sizes = {"hidden_size": 8, "num_heads": 1, "head_dim": 4, "num_layers": 1, "vocab_size": VOCAB}
    config = ModelConfig(implementation="recurrent", **sizes)
    return nnx.split(SequenceModel(config, rngs=nnx.Rngs(0)))


def test_a_head_without_logits_has_the_losses_of_one_with_them(monkeypatch):
    """Answers, and NaN from a bad embedding on, where tokens count."""
    model = nnx.merge(*small())
    table = model.embeddings.embedding
    table[...] = table[...].at[0, 0].set(jnp.nan)
    batch = random_batch(length=5)
    batch = batch._replace(inputs=batch.inputs.at[1:].set(jnp.maximum(batch.inputs[1:], 1)))
    clean = batch._replace(mask=batch.mask & (jnp.arange(B) > 0)[:, None])

    monkeypatch.setattr(SequenceModel, "runs_kernel", lambda *_: True)

    def found(is_short):
        monkeypatch.setattr(short, "takes", lambda *_: is_short)
        return [with_gradients(model, each, LossSettings(z_loss=0.1)) for each in (clean, batch)]

    for (got, got_gradient), (want, want_gradient) in zip(found(True), found(False), strict=True):
        np.testing.assert_allclose(got[:3], want[:3], rtol=1e-6)
        np.testing.assert_array_equal(got.correct, want.correct)
        for a, b in zip(*map(jax.tree.leaves, (got_gradient, want_gradient)), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def test_a_model_that_no_kernel_runs_has_forward_mode_whatever_is_installed(monkeypatch):
    monkeypatch.setattr(short, "takes", lambda *_: True)
    graphdef, params = small()
    batch = random_batch(length=3)
    loss = lambda params: losses_of(nnx.merge(graphdef, params), batch).objective
    pushed = jax.jit(lambda p: jax.jvp(loss, (p,), (p,))[1])(params)
    gradient = jax.jit(jax.grad(loss))(params)
    along = jax.tree.map(lambda p, d: jnp.vdot(p, d), params, gradient)
    np.testing.assert_allclose(pushed, sum(jax.tree.leaves(along)), rtol=1e-4)


def test_what_rows_will_be_made_of_says_how_they_will_lie(monkeypatch):
    """A batch may lie over explicit axes, and what has only a shape does not tell."""
    asked, batch = [], random_batch(length=3)
    monkeypatch.setattr(short, "takes", lambda x, width, *of: asked.append(of))
    model = nnx.merge(*small())
    jax.eval_shape(lambda: losses_of(model, batch))
    of_head, of_embedding = asked
    assert all(a is b for a, b in zip(of_head, batch[:3], strict=True))
    table, ids = of_embedding
    assert table.shape == (VOCAB, 8)
    assert ids.shape == batch.inputs.shape


def test_logits_of_each_device_under_shard_map():
    """The gradient of a matrix that all have is the sum over their tokens."""
    batch, keys = random_batch(), jax.random.split(jax.random.key(0), 2)
    x, kernel = jax.random.normal(keys[0], (B, T, D)), jax.random.normal(keys[1], (D, VOCAB))

    def gradient(kernel, x, targets, mask):
        found = lambda kernel: cross_entropy.of_tokens(x @ kernel, targets, mask)
        return jax.grad(lambda kernel: jnp.sum(found(kernel).cross_entropy))(kernel)

    mesh = jax.make_mesh((2,), ("rows",), (AxisType.Auto,), devices=jax.devices()[:2])
    in_specs = (P(), *3 * (P("rows"),))
    each = jax.shard_map(gradient, mesh=mesh, in_specs=in_specs, out_specs=P())
    got, want = (jax.jit(f)(kernel, x, *batch[1:3]) for f in (each, gradient))
    np.testing.assert_allclose(got, want, atol=1e-5)
