"""Checkpoints: the best and the newest both stay, and only the same model is restored."""

import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.training.checkpoints import BestAndNewest, Checkpoints
from deltaproduct_jax.training.config import TrainConfig
from deltaproduct_jax.training.optimizer import make_optimizer
from deltaproduct_jax.training.step import TrainState, init_state

OPTIMIZER = make_optimizer(TrainConfig())


def state_at(step: int, width: int = 3) -> TrainState:
    params = {"layers": {0: {"kernel": jnp.full((2, width), float(step))}}, "bias": jnp.ones((4,))}
    return init_state(params, OPTIMIZER)._replace(step=jnp.int32(step))


def steps_in(directory) -> set[str]:
    return {entry.name for entry in directory.iterdir()}


def test_best_and_newest_both_stay(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest() is None
        assert checkpoints.best() is None
        accuracy = {2: (0.1, 0.5), 4: (0.9, 0.9), 6: (0.3, 0.9), 7: None, 8: (0.2, 0.9)}
        kept = {2: {"2"}, 4: {"4"}, 6: {"4", "6"}, 7: {"4", "7"}, 8: {"4", "8"}}
        for step, selection in accuracy.items():
            checkpoints.save(state_at(step), step, selection)
            checkpoints.wait()
            assert steps_in(tmp_path) == kept[step]
            assert checkpoints.newest() == step
        assert checkpoints.best() == 4
        restored = checkpoints.restore(4, like=state_at(0))
    jax.tree.map(np.testing.assert_array_equal, restored, state_at(4))
    with Checkpoints(tmp_path) as checkpoints:  # as another process sees them
        assert (checkpoints.best(), checkpoints.newest()) == (4, 8)
        restored = checkpoints.restore(8, like=state_at(0))
    jax.tree.map(np.testing.assert_array_equal, restored, state_at(8))


def test_later_of_equals_is_the_best():
    selections = {1: (0.5, 0.9), 2: (0.5, 0.9), 3: (0.5, 0.8), 4: ()}
    infos = [types.SimpleNamespace(step=step) for step in (1, 2, 3, 4, 5)]
    policy = BestAndNewest(selections)
    assert policy.should_preserve(infos, context=None) == [False, True, False, False, True]
    assert policy.should_preserve([], context=None) == []


def test_what_version_0_1_trained_in_bfloat16_goes_on_in_float32(tmp_path):
    """It had parameters and moments in the model's dtype, and no checksum."""
    narrow = lambda x: x.astype(jnp.bfloat16) if jnp.issubdtype(x.dtype, jnp.floating) else x
    saved = jax.tree.map(narrow, state_at(3))
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(saved, 3, (0.5, 0.5))
    metrics = tmp_path / "3" / "metrics" / "metrics"
    metrics.write_text(json.dumps({"selection": json.loads(metrics.read_text())["selection"]}))
    with Checkpoints(tmp_path) as checkpoints:
        restored = checkpoints.restore(3, like=init_state(saved.params, OPTIMIZER))
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(restored))
    jax.tree.map(np.testing.assert_array_equal, restored, state_at(3))


def test_a_save_keeps_its_values_while_training_goes_on(tmp_path):
    bump = jax.jit(lambda state: jax.tree.map(lambda x: x + 1, state), donate_argnums=0)
    state = state_at(5, width=50_000)
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state, 5, None)
        for _ in range(20):
            state = bump(state)
        restored = checkpoints.restore(5, like=state)
    assert (np.asarray(restored.params["layers"][0]["kernel"]) == 5).all()


def test_left_overs_of_a_killed_save_are_cleared(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(3), 3, (0.5, 0.5))
    (tmp_path / "6.orbax-checkpoint-tmp" / "default").mkdir(parents=True)
    with Checkpoints(tmp_path) as checkpoints:
        assert checkpoints.newest() == 3
        checkpoints.save(state_at(6), 6, (0.6, 0.5))
    assert steps_in(tmp_path) == {"6"}


def test_another_model_is_refused_by_name(tmp_path):
    with Checkpoints(tmp_path) as checkpoints:
        checkpoints.save(state_at(3), 3, None)
    with Checkpoints(tmp_path) as checkpoints, pytest.raises(RunDirectoryError) as error:
        checkpoints.restore(3, like=state_at(0, width=7))
    assert "checkpoint 3" in str(error.value)
    assert "layers/0/kernel is float32[2, 3] there, float32[2, 7] here" in str(error.value)
    assert "\n" not in str(error.value)
