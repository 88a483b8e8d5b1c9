"""Muon beside AdamW, what decays, and the schedule that stays and then falls."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.training.config import TrainConfig
from deltaproduct_jax.training.extending import spread_over_steps
from deltaproduct_jax.training.optimizer import make_optimizer, make_schedule
from deltaproduct_jax.training.step import init_state

RATE = 0.1


def parameters():
    """Of a model in miniature, by the names that ours have."""
    draw = iter(jax.random.split(jax.random.key(0), 9))
    of = lambda *shape: jax.random.normal(next(draw), shape)
    block = {
        "attn": {
            "q_proj": {"kernel": of(4, 6)},
            "q_conv1d": {"weight": of(4, 6)},
            "b_proj": {"bias": of(2, 3)},
            "o_norm": {"scale": of(2, 3)},
            "q_blocks": of(2, 3, 3),
        },
        "mlp_norm": {"scale": of(4)},
    }
    embeddings, head = {"embedding": of(7, 4)}, {"kernel": of(4, 7)}
    return {"layers": {"0": block}, "embeddings": embeddings, "lm_head": head}


def by_path(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {"/".join(str(entry.key) for entry in path): np.asarray(x) for path, x in leaves}


def first_updates(grads, **fields):
    params = parameters()
    optimizer = make_optimizer(TrainConfig(learning_rate=RATE, schedule="constant", **fields))
    return by_path(optimizer.update(grads, optimizer.init(params), params)[0])


@pytest.mark.parametrize("optimizer", ["adamw", "muon"])
def test_matrices_alone_decay_where_so_asked(optimizer):
    """Without gradients what is left of an update is the decay."""
    zeros, params = jax.tree.map(jnp.zeros_like, parameters()), by_path(parameters())
    spared = {
        "layers/0/attn/q_conv1d/weight", "layers/0/attn/b_proj/bias", "layers/0/attn/o_norm/scale",
        "layers/0/mlp_norm/scale",
    }  # fmt: skip
    for decayed, still in (("matrices", spared), ("all", set())):
        fields = {"optimizer": optimizer, "weight_decay": 0.5, "decayed": decayed}
        updates = first_updates(zeros, **fields)
        for path, update in updates.items():
            want = 0 if path in still else -RATE * 0.5 * params[path]
            np.testing.assert_allclose(update, want, rtol=1e-6, atol=1e-9, err_msg=path)


def test_muon_is_for_kernels_between_hidden_channels():
    grads = jax.tree.map(lambda x: 0.1 * jnp.sin(7 * x), parameters())
    muon, adamw = (first_updates(grads, optimizer=name) for name in ("muon", "adamw"))
    (path,) = [path for path in muon if not np.array_equal(muon[path], adamw[path])]
    assert path == "layers/0/attn/q_proj/kernel"
    update = muon[path] + RATE * 0.01 * by_path(parameters())[path]
    # Orthogonal to what five iterations give, and as large as AdamW's: .2 for every entry.
    sizes = np.linalg.svd(update, compute_uv=False) / (RATE * 0.2 * np.sqrt(6))
    assert np.all((0.6 < sizes) & (sizes < 1.3))


def test_a_rate_stays_and_then_falls():
    config = TrainConfig(
        steps=100, warmup_steps=10, learning_rate=2.0, end_learning_rate=0.5, schedule="wsd",
        decay_fraction=0.3,
    )  # fmt: skip
    schedule = make_schedule(config)
    for count, want in ((0, 0), (5, 1), (10, 2), (69, 2), (70, 2), (85, 1.25), (100, 0.5)):
        assert float(schedule(count)) == pytest.approx(want), count
    assert spread_over_steps(config) == "schedule=wsd"


def test_settings_are_checked():
    for fields, words in (
        ({"optimizer": "sgd"}, "optimizer='sgd' is not known"),
        ({"decayed": "none"}, "decayed='none' is not known"),
        ({"schedule": "wsd", "decay_fraction": 0.0}, r"decay_fraction=0\.0 must be greater than 0"),
        ({"schedule": "wsd", "decay_fraction": 0.9, "warmup_steps": 100}, "must not overlap"),
        ({"muon_momentum": 0.9}, r"muon_momentum=0\.9 needs optimizer=muon"),
        ({"decay_fraction": 0.5}, r"decay_fraction=0\.5 needs schedule=wsd"),
    ):
        with pytest.raises(ConfigError, match=words):
            TrainConfig(**fields)


def test_no_state_is_of_64_bits_unless_parameters_are():
    """Else a process without `jax_enable_x64` could not read a checkpoint of one with it."""
    params = {"kernel": jnp.ones((4, 4), jnp.float32), "scale": jnp.ones(4, jnp.float32)}
    with jax.enable_x64(True):
        optimizer = make_optimizer(TrainConfig(optimizer="muon"))
        state = jax.eval_shape(lambda: init_state(params, optimizer))
    assert {x.dtype.itemsize for x in jax.tree.leaves(state)} == {4}
