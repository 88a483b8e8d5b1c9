"""Runs trained together are the runs that they would be alone, in one program and over devices."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from flax import nnx
from tiny_run import curve, rows_in, run_config

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig, SequenceModel
from deltaproduct_jax.parallel import layout
from deltaproduct_jax.training import loop
from deltaproduct_jax.training.optimizer import Numbers, make_optimizer
from deltaproduct_jax.training.stopping import Stopped
from deltaproduct_jax.training.together import group as together
from deltaproduct_jax.training.together.beginning import statics_of
from deltaproduct_jax.training.together.group import is_worth_compiling, train_together
from deltaproduct_jax.training.together.numbers import FREE, STARTS, program_of

COMMON = {
    "train_length": 2, "eval_lengths": (2, 3), "select_length": 2, "grow_from": 1,
    "curriculum_fraction": 0.5, "warmup_steps": 2, "clip_norm": 1.0, "beta_bias": 2.0,
}  # fmt: skip
# One stops as soon as any sequence is right, which is at once, and leaves the others behind.
OWN = [
    {"seed": 1, "stop_accuracy": 1e-9, "learning_rate": 0.2},
    {"seed": 2, "stop_accuracy": 1.0, "learning_rate": 0.1, "end_learning_rate": 0.01,
     "weight_decay": 0.3, "clip_norm": 0.2, "adam_eps": 1e-3, "beta_bias": 1.0},
]  # fmt: skip
CONFIGS = [run_config(**(COMMON | own)) for own in OWN]


pytestmark = pytest.mark.usefixtures("compiled_once", "tiny_model")


def folders(root):
    return [root / str(number) for number in range(len(CONFIGS))]


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Each run by itself; tests only read them."""
    root = tmp_path_factory.mktemp("alone")
    for config, folder in zip(CONFIGS, folders(root), strict=True):
        loop.train(config, folder, ["alone"])
    return root


def check_same(root, alone):
    """Records, results and kept checkpoints are those of the runs alone, to rounding."""
    for one, other in zip(folders(root), folders(alone), strict=True):
        assert {path.name for path in one.iterdir()} == {path.name for path in other.iterdir()}
        rows, wanted = curve(rows_in(one)), curve(rows_in(other))
        assert [row.keys() for row in rows] == [row.keys() for row in wanted]
        for row, want in zip(rows, wanted, strict=True):
            assert row == pytest.approx(want, rel=1e-4, abs=1e-7)
            assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
        ends = [json.loads((path / "results.json").read_text()) for path in (one, other)]
        assert [ends[0][key] for key in ("steps", "best_step", "parameters")] == [
            ends[1][key] for key in ("steps", "best_step", "parameters")
        ]
        for entry, want in zip(ends[0]["test"], ends[1]["test"], strict=True):
            assert entry["loss"] == pytest.approx(want["loss"], rel=1e-5)
            assert entry["strict"] == want["strict"]
        kept = [
            {path.name for path in (folder / "checkpoints").iterdir()} for folder in (one, other)
        ]
        assert kept[0] == kept[1]
        assert (one / "config.json").read_bytes() == (other / "config.json").read_bytes()


def test_runs_are_what_they_are_alone(tmp_path, alone, monkeypatch):
    made = []
    program = together.MappedProgram
    monkeypatch.setattr(together, "MappedProgram", lambda *a: made.append(a) or program(*a))
    monkeypatch.setattr(together, "is_worth_compiling", lambda have, want, *_: want < have)
    outcomes = train_together(CONFIGS, folders(tmp_path), ["together"])
    assert len(made) == 2  # for two, and when one had stopped for the other
    assert [outcome["steps"] for outcome in outcomes] == [4, 12]
    check_same(tmp_path, alone)
    (start,) = json.loads((folders(tmp_path)[0] / "run.json").read_text())["starts"]
    assert start["argv"] == ["together"]
    assert start["seeds"] == CONFIGS[0].seeds()
    assert (start["runs_together"], start["mesh"]) == (2, {"runs": 1})
    again = train_together(CONFIGS, folders(tmp_path), ["together"])
    assert again == outcomes


def stop_at(monkeypatch, step_to_stop_at):
    """Has the end asked for while a step is under way."""
    step_of = together.Group._step

    def step(group, step):
        if step == step_to_stop_at:
            group._request.set(15)
        return step_of(group, step)

    monkeypatch.setattr(together.Group, "_step", step)


def test_stopped_and_resumed_alone_and_together(tmp_path, alone, monkeypatch):
    """One goes on alone, and is ahead of the other when both go on together over three devices.

    Of their three slots one repeats a run, and nobody looks at it.
    """
    with pytest.MonkeyPatch.context() as patch:
        stop_at(patch, 3)
        with pytest.raises(Stopped, match="stopped by SIGTERM after step 3 of 12"):
            train_together(CONFIGS, folders(tmp_path), ["first"])
    for folder in folders(tmp_path):
        assert [path.name for path in (folder / "checkpoints").iterdir()] == ["3"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_suffices", lambda self, rows: len(rows) == 3)
        loop.train(CONFIGS[1], folders(tmp_path)[1], ["second"])
    (folders(tmp_path)[1] / "results.json").unlink()
    monkeypatch.setattr(layout, "all_devices", lambda: jax.devices()[:3])
    train_together(CONFIGS, folders(tmp_path), ["third"])
    check_same(tmp_path, alone)
    starts = [json.loads((f / "run.json").read_text())["starts"] for f in folders(tmp_path)]
    assert [start["resumed_from"] for start in starts[0]] == [None, 3]
    assert [start["resumed_from"] for start in starts[1]] == [None, 3, 6]


def test_what_ends_one_run_leaves_the_others(tmp_path):
    lost = dataclasses.replace(CONFIGS[1].train, learning_rate=1e30)
    configs = [CONFIGS[0], dataclasses.replace(CONFIGS[1], train=lost), CONFIGS[1]]
    places = [tmp_path / name for name in ("right", "lost", "damaged")]
    places[2].mkdir()
    (places[2] / "results.json").write_text("{}")  # of nobody knows which run
    right, lost, damaged = train_together(configs, places, ["together"])
    assert right["steps"] == 4
    assert isinstance(lost, FloatingPointError)
    assert "training broke down in steps" in str(lost)
    assert isinstance(damaged, RunDirectoryError)
    assert "has results.json but no config.json" in str(damaged)
    assert (places[0] / "results.json").exists()
    assert not (places[1] / "results.json").exists()
    assert {path.name for path in places[2].iterdir()} == {"results.json"}


def test_what_cannot_be_one_program_is_refused(tmp_path, monkeypatch):
    configs = [run_config(seed=0), run_config(seed=1, batch_size=16)]
    with pytest.raises(ConfigError, match=r"may differ in learning_rate, .*seed.* alone"):
        train_together(configs, folders(tmp_path), [])

    class Reading(tiny_run.TinyModel):
        def __init__(self, config, *, rngs):
            super().__init__(config, rngs=rngs)
            self.bias = config.beta_bias

    monkeypatch.setattr(loop, "SequenceModel", Reading)
    configs = [run_config(beta_bias=1.0), run_config(beta_bias=2.0)]
    with pytest.raises(ConfigError, match=r"1 cannot be trained .* bias being 2.0 and 1.0"):
        train_together(configs, folders(tmp_path), [])
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("mixer", ["gated_delta_product", "erase_then_delta", "rwkv7", "slstm"])
def test_models_keep_no_number_in_which_runs_may_differ(mixer):
    fields = [name for name in FREE["model"] if name in DRAWN or MIXERS[mixer].takes(name)]
    sizes = {"vocab_size": 9, "mixer": mixer, "hidden_size": 8, "num_heads": 1, "head_dim": 8}
    first, second = (
        ModelConfig(**sizes, intermediate_size=8, **dict.fromkeys(fields, start))
        for start in (0.7, 0.9)
    )
    without = dataclasses.replace(first, **dict.fromkeys(STARTS))
    shapes = lambda config: nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
    models = [shapes(config) for config in (first, second, without)]
    assert statics_of(models[0]) == statics_of(models[1]) == statics_of(models[2])
    assert nnx.state(models[0]) == nnx.state(models[1]) == nnx.state(models[2])


DRAWN = ("initializer_range",)


def test_numbers_are_fields_and_all_else_is_the_program():
    gated = {"mixer": "gated_delta_net", "initial_gate": 0.5}
    config = run_config(clip_norm=1.0, stop_accuracy=0.5, beta_bias=1.0, **gated)
    base = program_of(config.to_dict())
    for section, names in FREE.items():
        for name in names:
            other = config.to_dict()
            other[section][name] += 1
            assert program_of(other) == base, name
            other[section][name] = None
            assert (program_of(other) == base) is (name in STARTS), name
            del other[section][name]  # as a record has it that is none
            assert (program_of(other) == base) is (name in STARTS), name
    for section, values in config.to_dict().items():
        for name in values.keys() - FREE.get(section, ()):
            other = config.to_dict()
            other[section][name] = "another"
            assert program_of(other) != base, name


def test_numbers_of_a_program_are_those_of_a_configuration():
    """The update with traced numbers is the one with the numbers built in."""
    numbers = Numbers(0.1, 0.02, 0.3, 1e-2, 0.5)
    plain = run_config(warmup_steps=3, clip_norm=1.0).train
    train = dataclasses.replace(plain, **numbers._asdict())
    params = {"w": jnp.array([1.0, -2.0, 0.5])}
    grads = {"w": jnp.array([0.3, 0.1, -2.0])}

    def updates(optimizer):
        state, found = optimizer.init(params), []
        for _ in range(5):
            update, state = optimizer.update(grads, state, params)
            found.append(update["w"])
        return jnp.stack(found)

    traced = jax.tree.map(np.float32, numbers)
    found = jax.jit(lambda numbers: updates(make_optimizer(plain, numbers)))(traced)
    np.testing.assert_allclose(found, updates(make_optimizer(train)), rtol=1e-5)
    for name in Numbers._fields:
        others = traced._replace(**{name: getattr(traced, name) * 2})
        assert not np.allclose(found, updates(make_optimizer(plain, others)), rtol=1e-4), name


def test_a_smaller_program_is_made_where_that_pays():
    assert is_worth_compiling(8, 4, seconds_left=100, compiling=20)
    assert not is_worth_compiling(8, 4, seconds_left=30, compiling=20)
    assert not is_worth_compiling(8, 5, seconds_left=1000, compiling=20)
    assert not is_worth_compiling(1, 1, seconds_left=1000, compiling=0)
