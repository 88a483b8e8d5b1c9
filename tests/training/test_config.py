"""Configuration, learning rate and curriculum: functions of the fields and the step alone."""

import dataclasses
import math
from fractions import Fraction

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from deltaproduct_jax.data.config import PrepareConfig, StreamConfig
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.models.generation.sampling import Sampling
from deltaproduct_jax.strict_json import to_json
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.tasks.recall import RecallTask
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.optimizer import make_optimizer, make_schedule
from deltaproduct_jax.training.plugins import PluginConfig
from deltaproduct_jax.training.text import TextTask


def run_config(task: GroupTask | None = None, **train) -> RunConfig:
    task = task or GroupTask("S3", train_length=32)
    return RunConfig(task, ModelConfig(vocab_size=task.vocab_size), TrainConfig(**train))


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"steps": 0}, "steps=0 is too small"),
        ({"steps": 2**31}, "steps=2147483648 is too large"),
        ({"max_skipped_steps": 2**31}, "max_skipped_steps=2147483648 is too large; it may be up"),
        ({"loss_chunk_size": 2**63}, "loss_chunk_size=9223372036854775808 is too large"),
        ({"batch_size": 0}, "batch_size=0 is too small"),
        ({"batch_size": 10, "accumulation_steps": 4}, "batch_size=10 must be a multiple of accum"),
        ({"eval_sequences": 100, "eval_batch_size": 64}, "eval_sequences=100 must be a multiple"),
        ({"learning_rate": 0.0}, "learning_rate=0.0 must be greater than 0"),
        ({"learning_rate": math.nan}, "learning_rate=nan must be a finite number"),
        ({"learning_rate": math.inf}, "learning_rate=inf must be a finite number"),
        ({"weight_decay": -math.inf}, "weight_decay=-inf must be a finite number"),
        ({"clip_norm": "1"}, "clip_norm='1' must be a finite number or none"),
        ({"adam_eps": 10**400}, r"adam_eps=10+\.\.\. must be a finite number"),
        (
            {"learning_rate": 1e39},
            r"learning_rate=1e\+39 cannot be held in float32; it may be 0 or",
        ),
        ({"adam_eps": 1e-46}, r"adam_eps=1e-46 cannot be held in float32"),
        ({"clip_norm": 10**39}, r"clip_norm=1e\+39 cannot be held in float32"),
        ({"steps": 10.0}, r"steps=10\.0 must be a whole number"),
        ({"batch_size": True}, "batch_size=True must be a whole number"),
        ({"seed": None}, "seed=None must be a whole number"),
        ({"curriculum": (4, 8.5)}, r"curriculum\[1\]=8\.5 must be a whole number"),
        ({"schedule": 3}, "schedule=3 must be a text"),
        ({"schedule": "linear"}, "schedule='linear' is not known"),
        ({"schedule": "constant", "end_learning_rate": 1e-5}, "needs schedule=cosine"),
        ({"learning_rate": 1e-3, "end_learning_rate": 1e-2}, "must not exceed learning_rate"),
        ({"steps": 10, "warmup_steps": 11}, "warmup_steps=11 must not exceed steps=10"),
        ({"warmup_steps": -1}, "warmup_steps=-1 is too small"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1 is too small"),
        ({"adam_b1": 1.0}, "adam_b1=1.0 must be in"),
        ({"adam_b2": -0.1}, "adam_b2=-0.1 must be in"),
        ({"adam_eps": 0.0}, "adam_eps=0.0 must be greater"),
        ({"clip_norm": 0.0}, "clip_norm=0.0 must be greater"),
        ({"curriculum": (4, 0)}, "curriculum=0 is too small"),
        ({"curriculum": (4,), "curriculum_fraction": 1.0}, "curriculum_fraction=1.0 must be in"),
        ({"curriculum": (4, 64)}, "must not exceed train_length=32"),
        ({"grow_from": 0}, "grow_from=0 is too small"),
        ({"grow_from": 33}, "grow_from=33 must not exceed train_length=32"),
        ({"grow_from": 3, "curriculum": (4,)}, "exclude each other"),
        ({"grow_from": 3, "growth": "fast"}, "growth='fast' is not known"),
        ({"growth": "geometric"}, "growth='geometric' means nothing without grow_from"),
        ({"seed": -1}, "seed=-1 is too small"),
        ({"stop_accuracy": 1.5}, "stop_accuracy=1.5 is too large; it may be up to 1"),
        ({"select_length": 0}, "select_length=0 is too small"),
        ({"log_every": 0}, "log_every=0 is too small"),
        ({"eval_every": 0}, "eval_every=0 is too small"),
        ({"checkpoint_every": 0}, "checkpoint_every=0 is too small"),
    ],
)
def test_senseless_fields_are_refused(fields, message):
    with pytest.raises(ConfigError, match=message):
        run_config(**fields)


@pytest.mark.parametrize(
    "fields",
    [
        {"steps": 10, "warmup_steps": 10},
        {"schedule": "wsd", "steps": 10, "warmup_steps": 4, "decay_fraction": 0.6},
        {"schedule": "wsd", "decay_fraction": 1.0, "warmup_steps": 0},
        {"learning_rate": 1e-3, "end_learning_rate": 1e-3},
        {"adam_b1": 0.0, "adam_b2": 0.0},
        {"curriculum": (4, 32), "curriculum_fraction": 0.0},
        {"grow_from": 32},
        {"stop_accuracy": 1.0},
    ],
)
def test_bounds_themselves_are_allowed(fields):
    made = run_config(**fields).train
    assert {name: getattr(made, name) for name in fields} == fields


def test_the_model_must_speak_the_task():
    with pytest.raises(ConfigError, match="vocab_size=5 must be the task's, 13"):
        RunConfig(GroupTask("S3"), ModelConfig(vocab_size=5), TrainConfig())


@pytest.mark.parametrize("config", [TrainConfig, GroupTask])
def test_every_field_is_explained(config):
    for field in dataclasses.fields(config):
        assert field.metadata["help"].strip(), field.name


def of_other_kinds(value):
    """What a caller may well give for a value: NumPy's numbers and texts, lists, whole floats."""
    if isinstance(value, tuple):
        return [of_other_kinds(entry) for entry in value]
    if isinstance(value, bool | int | str):
        return np.asarray(value)[()]
    if isinstance(value, float):
        return int(value) if value.is_integer() else Fraction(value)
    return value


@pytest.mark.parametrize(
    "config",
    [
        TrainConfig(curriculum=(4, 8), clip_norm=1.0, spike_deviations=3.5),
        ModelConfig(
            remat="named", saved_points=("mixer_input",), num_layers=2, attention_layers=(0,)
        ),
        GroupTask("S3", train_length=8, eval_lengths=(4, 8)),
        RecallTask(eval_lengths=(64, 128), eval_pairs=(4, 8)),
        TextTask(data=("a", "b"), data_weights=(0.75, 1.0)),
        StreamConfig(data=("a", "b"), data_weights=(0.75, 1.0)),
        PrepareConfig(sources=("a",), valid_fraction=0.5),
        PluginConfig(plugins=("a.py",)),
        Sampling(temperature=0.5),
    ],
    ids=lambda config: type(config).__name__,
)
def test_fields_are_kept_as_the_kinds_that_they_are_of(config, unchecked):
    """However they were given, a configuration is hashable, and its record is the same."""
    values = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)}
    again = dataclasses.replace(config, **{n: of_other_kinds(v) for n, v in values.items()})
    kept = {name: getattr(again, name) for name in values}
    assert repr(kept) == repr(values)  # which shows kinds that are equal
    assert again == config
    assert hash(again) == hash(config)
    assert to_json(kept) == to_json(values)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"scan_layers": np.asarray(True)}, r"scan_layers=array\(True\) must be true or false"),
        ({"num_heads": np.bool_(True)}, r"num_heads=np\.True_ must be a whole number"),
        ({"num_heads": np.float32(4)}, r"num_heads=np\.float32\(4\.0\) must be a whole number"),
        ({"norm_eps": np.float32("nan")}, r"norm_eps=np\.float32\(nan\) must be a finite number"),
        ({"saved_points": {"mixer_input"}}, r"saved_points={'mixer_input'} must be texts"),
        ({"num_layers": 1001}, "num_layers=1001 is too large; it may be up to 1000$"),
        ({"attention_layers": [np.int8(0), 1.0]}, r"attention_layers\[1\]=1\.0 must be a whole"),
    ],
)
def test_kinds_that_would_change_a_value_are_refused(fields, message, unchecked):
    with pytest.raises(ConfigError, match=message):
        ModelConfig(**fields)


def test_warmup_then_cosine():
    config = TrainConfig(
        steps=110, warmup_steps=10, learning_rate=2.0, end_learning_rate=0.2, schedule="cosine"
    )
    schedule = make_schedule(config)
    for count in range(110):
        if count < 10:
            want = 2.0 * count / 10
        else:
            want = 0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * (count - 10) / 100))
        assert float(schedule(count)) == pytest.approx(want, rel=1e-5)


@pytest.mark.parametrize("warmup_steps", [0, 4, 10])
def test_constant_schedule(warmup_steps):
    schedule = make_schedule(
        TrainConfig(steps=10, warmup_steps=warmup_steps, learning_rate=3.0, schedule="constant")
    )
    for count in range(10):
        want = 3.0 * min(1, count / warmup_steps) if warmup_steps else 3.0
        assert float(schedule(count)) == pytest.approx(want, rel=1e-6)


def test_adamw_against_its_equations():
    config = TrainConfig(
        steps=50, learning_rate=0.1, schedule="constant", weight_decay=0.3, adam_b1=0.8,
        adam_b2=0.95, adam_eps=1e-3, clip_norm=1.0,
    )  # fmt: skip
    optimizer = make_optimizer(config)
    rng = np.random.default_rng(0)
    w, m, v = rng.normal(size=4), np.zeros(4), np.zeros(4)
    params = jnp.asarray(w, dtype=jnp.float32)
    state = optimizer.init(params)
    for t in range(1, 6):
        g = rng.normal(size=4)
        updates, state = optimizer.update(jnp.asarray(g, dtype=jnp.float32), state, params)
        params = optax.apply_updates(params, updates)
        g = g * min(1, 1 / np.linalg.norm(g))
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        w = w - 0.1 * (m / (1 - 0.8**t) / (np.sqrt(v / (1 - 0.95**t)) + 1e-3) + 0.3 * w)
        np.testing.assert_allclose(params, w, rtol=1e-5, atol=1e-6)


def test_curriculum_divides_its_part_of_the_steps_evenly():
    config = run_config(steps=100, curriculum=(4, 8, 16), curriculum_fraction=0.6)
    lengths = [config.length_at(step) for step in range(1, 101)]
    assert lengths == [4] * 20 + [8] * 20 + [16] * 20 + [32] * 40


def test_curriculum_is_off_by_default_and_with_no_part_of_the_steps():
    assert {run_config(steps=9).length_at(step) for step in range(1, 10)} == {32}
    config = run_config(steps=9, curriculum=(4,), curriculum_fraction=0.0)
    assert {config.length_at(step) for step in range(1, 10)} == {32}


def test_growth_counts_one_token_more_at_a_time():
    task = GroupTask("S3", train_length=6)
    config = run_config(task, steps=100, grow_from=3, curriculum_fraction=0.6)
    counted = [config.counted_at(step) for step in range(1, 101)]
    assert counted == [3] * 15 + [4] * 15 + [5] * 15 + [6] * 55
    traced = jax.vmap(config.counted_at)(jnp.arange(1, 101))
    assert traced.tolist() == counted
    assert {config.length_at(step) for step in range(1, 101)} == {6}
    assert run_config(steps=9, curriculum=(4,)).counted_at(1) == 4


def test_geometric_growth_takes_as_long_for_every_doubling():
    task = GroupTask("S3", train_length=127)
    fields = {"grow_from": 4, "growth": "geometric", "curriculum_fraction": 0.5}
    config = run_config(task, steps=200, **fields)
    counted = [config.counted_at(step) for step in range(1, 201)]
    assert counted == sorted(counted)
    # From 4 to 128 are five doublings, of 20 steps each.
    assert [counted[20 * n] for n in range(5)] == [4, 8, 16, 32, 64]
    assert [counted[20 * n - 1] for n in range(1, 6)] == [7, 15, 30, 61, 123]
    assert set(counted[100:]) == {127}
    assert jax.vmap(config.counted_at)(jnp.arange(1, 201)).tolist() == counted
    alone = run_config(GroupTask("S3", train_length=4), steps=200, **fields)
    assert {alone.counted_at(step) for step in range(1, 201)} == {4}


def test_growth_needs_an_answer_at_every_token():
    with pytest.raises(ConfigError, match="grow_from=3 needs a task that has an answer at every"):
        run_config(GroupTask("S3", train_length=32, repeat_elements=2), grow_from=3)


def test_steps_with_an_evaluation_or_checkpoint_are_logged():
    config = run_config(steps=23, log_every=4, eval_every=10, checkpoint_every=7)
    logged = [step for step in range(1, 24) if config.is_logged(step)]
    assert logged == [4, 7, 8, 10, 12, 14, 16, 20, 21, 23]
    assert [step for step in logged if config.is_evaluated(step)] == [10, 20, 23]


def test_the_longest_length_selects_unless_one_is_given():
    assert run_config().select_length == 256
    assert run_config(select_length=5).select_length == 5


def test_seeds_are_named_and_differ():
    first, second = run_config(seed=0).seeds(), run_config(seed=1).seeds()
    assert set(first) == {"init", "data"}
    assert len({*first.values(), *second.values()}) == 4
    assert first == run_config(seed=0).seeds()
    for seed in first.values():
        jax.random.key(seed)


def test_to_dict_is_plain():
    config = run_config(curriculum=(4, 8)).to_dict()
    assert set(config) == {"task", "model", "train"}
    assert config["train"]["curriculum"] == [4, 8]
    assert config["task"]["eval_lengths"] is None
