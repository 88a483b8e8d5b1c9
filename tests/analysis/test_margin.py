"""The margin of states: factors, laws and failures that are known by hand, and constructions."""

import dataclasses
import json
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from interop.golden_models import drawn
from tiny_run import flags_for

from deltaproduct_jax.analysis import margin
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.theory import construct
from experiments import state_tracking
from experiments.analysis import margin as script
from experiments.lib import flags
from experiments.lib.group_runs import run_name

CENTRE = 1.2
PLACES = np.array([20, 50, 100, 200])
SHRUNK = 0.005  # of the logits of step sizes: 2 becomes 1.998


@pytest.mark.parametrize("true", [1 / 3, 0.99, 1.0, 7.3, 5e6])
def test_a_margin_is_found(true):
    found = margin.margin_of(lambda factor: factor < true)
    assert found == pytest.approx(true, rel=0.003)
    # What holds at 1 is not taken to have used all, nor the other way round.
    assert (found > 1) == (true > 1)


def test_margins_that_are_too_small_or_too_large_to_be_told():
    assert margin.margin_of(lambda factor: factor < 0) <= margin.LEAST
    assert margin.margin_of(lambda factor: factor > 0) == np.inf


def test_the_nearest_of_two_classes_uses_what_the_quantile_says():
    """Normal errors of deviation .1, and classes 1 apart: 2 z .1 / 1 with z = 1.2816 at .9."""
    errors = jnp.asarray(np.random.default_rng(0).normal(size=200_000) * 0.1, jnp.float32)
    found = margin.margin_of(lambda factor: (factor * errors < 0.5).mean() >= 0.9)
    assert 1 / found == pytest.approx(0.2563, rel=0.01)


def test_a_growth_is_found_again_and_reaches_what_it_should():
    truth = margin.Growth(0.1, 0.01, CENTRE, 0.0)
    assert truth.reaches(0.5) == pytest.approx(100 * np.log(1.5))  # .1 + 1.2 (1 - 2/3) = .5
    assert truth.at(np.array([truth.reaches(0.5)])) == pytest.approx([0.5])
    assert truth.reaches(0.05) == 0
    s = np.arange(1.0, 61)
    found = margin.fit_growth(s, truth.at(s), CENTRE)
    assert found.residual < 1e-4 * truth.at(s).max()  # as rates are right to 1e-4
    assert found.reaches() == pytest.approx(truth.reaches(), rel=0.01)


def test_what_never_uses_all():
    s = np.arange(1.0, 9)
    still = margin.fit_growth(s, np.full(8, 0.1), CENTRE)
    assert still.floor == pytest.approx(0.1)
    assert still.reaches() > 1e6
    assert margin.fit_growth(s, np.zeros(8), CENTRE).reaches() == np.inf
    assert margin.Growth(0.0, 0.1, 0.9, 0.0).reaches() == np.inf
    with pytest.raises(ConfigError, match="2 points are too few for a growth"):
        margin.fit_growth(s[:2], s[:2], CENTRE)


def test_failures():
    correct = np.array([[1, 1, 0, 1], [1, 1, 1, 1]])
    assert margin.failing_position(correct, 0.9) == 3
    assert margin.failing_position(correct, 0.5) is None
    with pytest.raises(ConfigError, match=r"accuracy=1.0 must be between 0 and 1"):
        margin.require_accuracy(1.0)


def words_of(group, number, length, seed):
    draw = jax.jit(GroupTask(group=group).batch, static_argnums=(1, 2))  # op by op it takes longer
    batch = draw(jax.random.key(seed), number, length)
    return np.asarray(batch.inputs), np.asarray(batch.targets)


def read(made, dtype="float32"):
    """What 64 words of S3 have used; references are the states of 8 letters."""
    model = made.model(dtype)
    means = margin.reference_means(model, *words_of("S3", 64, 8, 1), 6)
    return margin.read_words(model, *words_of("S3", 64, 200, 0), means, PLACES)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_what_a_construction_uses_stays_put(dtype, most):
    """Its letters permute coordinates, which both floats do exactly but for the norm of keys."""
    found = read(construct("permutations_S3"), dtype)
    assert found.correct[:, 1:].all()
    assert found.used.max() < most
    assert found.centre == pytest.approx(1, abs=0.01)  # where nothing is left to be read


def shrinking(made):
    """The construction with step sizes somewhat below 2: its states go to their centre."""
    path = "layers.0.attn.b_proj.kernel"
    return dataclasses.replace(made, params=made.params | {path: made.params[path] * SHRUNK})


def with_a_head_more(made, read):
    """The construction with one more head, of states that stray, read as so large a part of it."""
    rng, params = np.random.default_rng(0), dict(made.params)
    for name, axis in (("q", 1), ("k", 2), ("v", 2), ("b", 2), ("o", 0)):
        path = f"layers.0.attn.{name}_proj.kernel"
        shape = list(params[path].shape)
        shape[axis] = 1
        drawn = np.abs(params[path]).max() * rng.normal(size=shape)
        params[path] = np.concatenate([params[path], drawn * (read if name == "o" else 1)], axis)
    config = dataclasses.replace(made.config, num_heads=made.config.num_heads + 1)
    return dataclasses.replace(made, config=config, params=params)


def test_a_head_uses_what_is_read_of_it_until_the_model_fails():
    made = shrinking(construct("permutations_S3"))
    alone = read(made)
    unread, in_the_way = (read(with_a_head_more(made, part)) for part in (0, 0.03))
    assert 0.1 < alone.used[0] < 0.2
    assert (np.diff(alone.used) > 0.1).all()
    np.testing.assert_allclose(unread.used, alone.used, rtol=1e-2)
    np.testing.assert_array_equal(unread.correct, alone.correct)
    assert (in_the_way.used > alone.used + 0.1).all()
    holds = in_the_way.correct[:, PLACES].mean(0) >= 0.9
    np.testing.assert_array_equal(in_the_way.used <= 1, holds)
    assert holds[0]
    assert not holds[-1]


def test_references_and_layers():
    config = ModelConfig(
        vocab_size=7, mixer="delta_product", hidden_size=8, num_heads=2, head_dim=4,
        num_householder=2, intermediate_size=8, implementation="recurrent",
    )  # fmt: skip
    model, words = drawn(config), np.arange(6).reshape(2, 3)
    classes = np.array([[6, 0, 1], [6, 1, 1]])
    means = margin.reference_means(model, words, classes, 2)
    first, second = (
        np.asarray(jax.jit(model.forward)(words[:, :length])[1][0].recurrent) for length in (2, 3)
    )
    want = [first[0], (first[1] + second[0] + second[1]) / 3]
    np.testing.assert_allclose(means, want, atol=1e-5)
    with pytest.raises(ConfigError, match=re.escape("classes [2] of 3 have no state among 4")):
        margin.reference_means(model, words, classes, 3)
    with pytest.raises(ConfigError, match="classes hold 0 to 1; there are 0 to 0"):
        margin.reference_means(model, words, classes, 1)
    with pytest.raises(ConfigError, match="words hold 1 to 7; the model has ids 0 to 6"):
        margin.reference_means(model, words + np.array([1, 1, 2]), classes, 2)
    with pytest.raises(ConfigError, match=re.escape("words=[2, 3] and classes=[2, 2] must both")):
        margin.reference_means(model, words, classes[:, 1:], 2)
    for places in ([2, 2], [1, 2], [3], [], [2.0]):
        with pytest.raises(ConfigError, match=re.escape(f"places={places} must ascend, from 2")):
            margin.read_words(model, words, classes, means, places)
    with pytest.raises(ConfigError, match="all 1 classes have the same mean state"):
        margin.reference_means(model, words, 0 * classes, 1)
    with pytest.raises(ConfigError, match="layer=1 is not there; it may be 0 to 0"):
        margin.read_words(model, words, classes, means, [2], layer=1)
    other = drawn(ModelConfig(vocab_size=7, mixer="transformer"))
    with pytest.raises(ConfigError, match="mixer='transformer' has no state that is one array"):
        margin.read_words(other, words, classes, means, [2])
    small = {"vocab_size": 7, "hidden_size": 8, "num_heads": 2, "head_dim": 4}
    for mixer in set(MIXERS) - {"transformer", "mlstm", "slstm"}:
        made = ModelConfig.variant({"mixer": mixer})(mixer=mixer, intermediate_size=8, **small)
        state = jax.eval_shape(lambda made=made: drawn(made).init_state(1))[0]
        assert state._replace(recurrent=None).recurrent is None, mixer
        assert state.recurrent.shape == (1, 2, 4, 4), mixer


def test_positions():
    found = script.positions_of(1000, 16)
    assert found[:15].tolist() == list(range(2, 17))
    assert found[-1] == 1000
    assert len(found) <= 15 + script.POINTS_BEYOND
    assert script.positions_of(16, 16).tolist() == list(range(2, 17))
    found = script.positions_of(128, 128)
    assert (found[0], found[-1], len(found)) == (2, 128, script.POINTS_WITHIN)


def test_runs_of_a_sweep_have_its_name():
    assert run_name(Path("sweep/runs/seed=1")) == "sweep"
    assert run_name(Path("runs/s3")) == "s3"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    workdir = tmp_path_factory.mktemp("run")
    sizes = {"num_heads": 1, "head_dim": 4, "intermediate_size": 8, "implementation": "recurrent"}
    fields = {"steps": 2, "eval_lengths": (8,), "train_length": 8}
    assert state_tracking.main(flags_for(workdir, **sizes, **fields)) == 0
    return workdir


@pytest.mark.slow
def test_the_script_reads_runs_and_constructions_and_draws_them_again(trained, tmp_path, capsys):
    argv = [f"--runs={trained}", "--constructions=plane_Z5", "--words=64", "--length=40"]
    assert flags.run(script.command, [f"--workdir={tmp_path / 'a'}", *argv]) == 0
    text = capsys.readouterr().out
    record = json.loads((tmp_path / "a" / "margin.json").read_text())
    run, made = record["models"]
    assert (run["trained"], run["fit_length"], run["reference_to"]) == (8, 8, 2)
    assert (made["trained"], made["fit_length"], made["failed"]) == (None, 32, None)
    assert run["failed"] is not None  # after two steps of training
    assert max(made["used"]) < 1e-4
    assert made["accuracy"] == [1.0] * len(made["positions"])
    assert f"| {trained.name} | 0 | Z3 | delta_product |" in text
    drawn_again = ["--workdir", str(tmp_path / "b"), f"--rows_from={tmp_path}/a/margin.json"]
    assert flags.run(script.command, drawn_again) == 0
    again = json.loads((tmp_path / "b" / "margin.json").read_text())
    assert again.pop("command") != record.pop("command")
    assert again == record
    pictures = [(tmp_path / name / "margin.png").read_bytes() for name in "ab"]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "runs and constructions are both empty"),
        (["--runs=absent"], r"runs=absent is no run directory: it has no config\.json"),
        (["--constructions=gated_turns"], "constructions='gated_turns' is not known"),
        (["--constructions=plane_Z5", "--dtypes="], "dtypes is empty; it may be some of float32"),
        (["--constructions=plane_Z5", "--dtypes=int8"], "dtypes='int8' is not known"),
        (["--constructions=plane_Z5", "--length=20"], "fit_length=32 of plane_Z5, float32 must be"),
        (["--runs=a", "--fit_length=4"], "fit_length=4 is too small; it must be at least 8"),
        (["--runs=a", "--accuracy=1"], "accuracy=1.0 must be between 0 and 1"),
        (["--runs=a", "--rows_from=b"], "rows_from reads no runs and no constructions"),
        (["--rows_from=absent.json"], r"absent\.json cannot be read"),
    ],
)
def test_errors_are_one_line(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert flags.run(script.command, ["--workdir=out", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error)
    assert error.count("\n") == 1


def test_records_of_another_kind_are_refused(tmp_path, capsys):
    for content, says in (
        ([], "must be an object of keys and values"),
        ({"accuracy": 0.9, "models": [{}]}, "models[0].name is missing"),
        ({"accuracy": 0.8, "models": []}, "is for accuracy=0.8, not 0.9"),
    ):
        path = tmp_path / "given.json"
        path.write_text(json.dumps(content))
        assert flags.run(script.command, [f"--workdir={tmp_path}", f"--rows_from={path}"]) == 2
        assert says in capsys.readouterr().err
