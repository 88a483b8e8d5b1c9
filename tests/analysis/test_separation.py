"""Ratio of spread to distance: states whose spread, distance and crossing are known by hand."""

import json
import re

import jax
import numpy as np
import pytest
from interop.golden_models import drawn
from tiny_run import flags_for

from deltaproduct_jax.analysis import separation
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.theory import construct
from experiments import state_tracking
from experiments.analysis import separation as script
from experiments.lib import flags

# Two classes, 4 apart along the first axis; the second tells nothing.
MEANS = np.array([[0.0, 1.0], [4.0, 1.0]])


def test_ratio_and_shift_by_hand():
    """Errors of 1 and 3 along the line are a root mean square of root 5, and a shift of 2."""
    classes = np.array([[0], [0], [1], [1]])
    states = np.array([[[1.0, 9]], [[3.0, -9]], [[4.0, 1]], [[4.0, 7]]])
    found = separation.separation(states, classes, MEANS)
    np.testing.assert_allclose(found.ratio, [(5**0.5 / 4 + 0) / 2])
    np.testing.assert_allclose(found.shift, [(2 / 4 + 0) / 2])
    # Turned and moved, it is the same.
    turn = np.array([[0.6, -0.8], [0.8, 0.6]])
    again = separation.separation(states @ turn + 5, classes, MEANS @ turn + 5)
    np.testing.assert_allclose(again, found)
    np.testing.assert_allclose(
        separation.separation(states[:2], classes[:2], MEANS).ratio, [5**0.5 / 4]
    )


def test_the_line_that_is_worst_counts():
    """An error of 1 to the near class, at 2, is worse than one of 3 to the far one, at 10."""
    means = np.array([[0.0, 0], [2.0, 0], [0.0, 10]])
    found = separation.separation(np.array([[[1.0, 3]]]), np.array([[0]]), means)
    np.testing.assert_allclose([found.ratio, found.shift], 0.5)


@pytest.mark.parametrize(("wide", "states_of_a_class"), [(2000, 10), (300, 40), (2000, 100)])
def test_what_tells_nothing_is_no_shift(wide, states_of_a_class):
    """Errors that stay as they are, and are far larger across the line than along it."""
    rng = np.random.default_rng(0)
    centres = np.zeros((3, wide))
    centres[:, :3] = np.eye(3) * 8  # 11.3 apart, errors of 1 in each direction
    classes = np.arange(3).repeat(states_of_a_class)[:, None]
    draw = lambda: centres[classes] + rng.normal(size=(len(classes), 1, wide))
    first, second = (separation.reference_means(draw(), classes, 3) for _ in range(2))
    found = [separation.separation(draw(), classes, first, second) for _ in range(4)]
    ratio, shift = np.mean(found, axis=0)
    assert ratio == pytest.approx(1 / 128**0.5, rel=0.25)
    assert abs(shift) < 0.02 + 3 * wide**0.5 / states_of_a_class / 128  # what chance leaves
    alone = separation.separation(draw(), classes, first)
    assert alone.shift > 0.5 * wide / states_of_a_class / (128 + 2 * wide / states_of_a_class)


def test_references_and_directions():
    states = np.array([[[0.0, 0, 5], [2.0, 0, 5]], [[4.0, 0, 5], [8.0, 0, 5]]], np.float32)
    classes = np.array([[0, 0], [1, 1]])
    means = separation.reference_means(states, classes, 2)
    np.testing.assert_array_equal(means, [[1, 0, 5], [6, 0, 5]])
    np.testing.assert_allclose(np.abs(separation.discriminating_directions(means)), [[1], [0], [0]])
    with pytest.raises(ConfigError, match=re.escape("classes [2] of 3 have no state among 4")):
        separation.reference_means(states, classes, 3)
    with pytest.raises(ConfigError, match="all 2 classes have the same mean state"):
        separation.reference_means(np.zeros((2, 2, 3)), classes, 2)
    with pytest.raises(ConfigError, match="classes 0 and 2 have the same mean state"):
        separation.separation(states[..., :2], classes, np.array([[0.0, 1], [4, 1], [0, 1]]))


def test_the_limit_is_where_normal_errors_are_wrong():
    assert separation.limit_of_ratio(0.9) == pytest.approx(0.39015, abs=1e-5)
    error = np.random.default_rng(0).normal(size=100_000) * separation.limit_of_ratio(0.8)
    assert np.mean(error < 0.5) == pytest.approx(0.8, abs=0.01)
    for accuracy in (0.5, 1.0):
        with pytest.raises(ConfigError, match=f"accuracy={accuracy} must be between .5 and 1"):
            separation.limit_of_ratio(accuracy)


@pytest.mark.parametrize(
    ("law", "floor", "rate", "end"),
    [
        ("linear", 0.03, 0.004, 10),  # .03^2 + (.004 * 10)^2 = .05^2
        ("sqrt", 0.03, 0.01, 16),  # .03^2 + .01^2 * 16 = .05^2
        ("contraction", 0.03, 0.01, -100 * np.log(0.92)),  # (1 - .92) / 2 = .04
        ("exponential", 0.03, 0.02, 50 * np.log(5 / 3)),
    ],
)
def test_laws_are_found_again_and_cross_where_they_should(law, floor, rate, end):
    truth = separation.Growth(law, floor, rate, 0.0)
    assert truth.reaches(0.05) == pytest.approx(end)
    assert truth.at(np.array([end])) == pytest.approx([0.05])
    assert truth.reaches(0.02) == 0
    s = np.arange(1.0, 61)
    found = separation.fit_growth(s, truth.at(s))
    assert found.law == law
    assert found.residual < 1e-4 * truth.at(s).max()  # as rates are right to 1e-4
    assert found.reaches(0.05) == pytest.approx(end, rel=0.01)


def test_what_never_reaches_the_limit():
    s = np.arange(1.0, 9)
    still = separation.fit_growth(s, np.full(8, 0.1))
    assert still.floor == pytest.approx(0.1)
    assert still.reaches(0.39) > 1e6
    assert separation.fit_growth(s, np.zeros(8)).reaches(0.39) == np.inf
    assert separation.Growth("contraction", 0.0, 0.1, 0.0).reaches(0.5) == np.inf
    with pytest.raises(ConfigError, match="2 points cannot choose a law"):
        separation.fit_growth(s[:2], s[:2])


def test_crossings_and_failures():
    positions = np.array([1, 2, 4, 8])
    assert separation.first_above(positions, np.array([0.1, 0.2, 0.4, 0.3]), 0.25) == 2.5
    assert separation.first_above(positions, np.array([0.3, 0.2, 0.4, 0.3]), 0.25) == 1
    assert separation.first_above(positions, np.full(4, 0.2), 0.25) is None
    correct = np.array([[1, 1, 0, 1], [1, 1, 1, 1]])
    assert separation.failing_position(correct, 0.9) == 3
    assert separation.failing_position(correct, 0.5) is None


def test_states_that_contract_fail_where_the_law_says():
    """States of two classes go to their centre by 1% a token: the ratio is (1 - .99^s) / 2."""
    s = np.arange(1, 33)
    states = np.stack([1 - 0.99**s, 1 + 0.99**s])[..., None]
    classes = np.stack([0 * s, 0 * s + 1])
    found = separation.separation(states, classes, np.array([[0.0], [2.0]]))
    np.testing.assert_allclose(found.ratio, (1 - 0.99**s) / 2)
    np.testing.assert_allclose(found.shift, found.ratio)
    growth = separation.fit_growth(s, found.ratio)
    assert growth.law == "contraction"
    assert growth.reaches(0.39) == pytest.approx(np.log(0.22) / np.log(0.99), rel=0.01)


def test_states_are_those_after_each_token():
    config = ModelConfig(
        vocab_size=7, mixer="delta_product", hidden_size=8, num_heads=2, head_dim=4,
        num_householder=2, intermediate_size=8, implementation="recurrent",
    )  # fmt: skip
    model, words = drawn(config), np.arange(6).reshape(2, 3)
    found = separation.read_words(model, words)
    assert found.states.shape == (2, 3, 32)
    logits, state = jax.jit(model.forward)(words)
    np.testing.assert_array_equal(found.answers, np.argmax(logits, -1))
    want = np.asarray(state[0].recurrent).reshape(2, -1)
    np.testing.assert_allclose(found.states[:, -1], want, atol=1e-5)
    along = np.eye(32)[:, [3, 5]]
    np.testing.assert_allclose(
        separation.read_words(model, words, directions=along).states, found.states[..., [3, 5]]
    )
    some = separation.read_words(model, words, directions=along, places=np.array([0, 2]))
    np.testing.assert_array_equal(some.answers, found.answers)
    np.testing.assert_allclose(some.states, found.states[:, [0, 2]][..., [3, 5]])
    with pytest.raises(ConfigError, match="layer=1 is not there; it may be 0 to 0"):
        separation.read_words(model, words, layer=1)
    with pytest.raises(ConfigError, match="mixer='transformer' has no state that is one array"):
        separation.read_words(drawn(ModelConfig(vocab_size=7, mixer="transformer")), words)
    small = {"vocab_size": 7, "hidden_size": 8, "num_heads": 2, "head_dim": 4}
    for mixer in set(MIXERS) - {"transformer", "mlstm", "slstm"}:
        made = ModelConfig.variant({"mixer": mixer})(mixer=mixer, intermediate_size=8, **small)
        state = jax.eval_shape(lambda made=made: drawn(made).init_state(1))[0]
        assert state.recurrent.shape == (1, 2, 4, 4), mixer


@pytest.mark.parametrize(("dtype", "most"), [("float32", 1e-6), ("bfloat16", 1e-2)])
def test_the_ratio_of_a_construction_stays_put(dtype, most):
    """Its letters permute coordinates, which both floats do exactly but for the norm of keys."""
    made, task = construct("permutations_S3"), GroupTask(group="S3")
    draw = jax.jit(task.batch, static_argnums=(1, 2))  # op by op it takes ten times as long
    batch = draw(jax.random.key(0), 64, 200)
    words, classes = np.asarray(batch.inputs), np.asarray(batch.targets)[:, 1:]
    answers, states = separation.read_words(made.model(dtype), words)
    assert (answers[:, 1:] == classes).all()
    means = separation.reference_means(states[:, 1:9], classes[:, :8], 6)
    assert separation.discriminating_directions(means).shape[1] == 2  # of S3's plane
    found = separation.separation(states[:, 1:], classes, means)
    assert found.ratio.max() < most


def test_positions():
    found = script.positions_of(1000, 16)
    assert found[:16].tolist() == list(range(1, 17))
    assert found[-1] == 1000
    assert len(found) <= 16 + script.POINTS_BEYOND
    assert script.positions_of(16, 16).tolist() == list(range(1, 17))


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
    record = json.loads((tmp_path / "a" / "separation.json").read_text())
    run, made = record["models"]
    assert record["limit"] == 0.39015
    assert (run["trained"], run["fit_length"], run["reference_to"]) == (8, 8, 2)
    assert (made["trained"], made["fit_length"], made["failed"]) == (None, 32, None)
    assert run["failed"] is not None  # after two steps of training
    assert max(made["ratio"]) < 1e-4
    assert made["accuracy"] == [1.0] * len(made["positions"])
    assert f"| {trained.name} | Z3 | delta_product |" in text
    drawn_again = ["--workdir", str(tmp_path / "b"), f"--rows_from={tmp_path}/a/separation.json"]
    assert flags.run(script.command, drawn_again) == 0
    again = json.loads((tmp_path / "b" / "separation.json").read_text())
    assert again.pop("command") != record.pop("command")
    assert again == record
    pictures = [(tmp_path / name / "separation.png").read_bytes() for name in "ab"]
    assert pictures[0] == pictures[1]


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "runs and constructions are both empty"),
        (["--runs=absent"], r"absent is no run directory: it has no config\.json"),
        (["--constructions=gated_turns"], "constructions='gated_turns' is not known"),
        (["--constructions=plane_Z5", "--dtypes="], "dtypes is empty; it may be some of float32"),
        (["--constructions=plane_Z5", "--dtypes=int8"], "dtypes='int8' is not known"),
        (["--constructions=plane_Z5", "--length=20"], "fit_length=32 of plane_Z5, float32 must be"),
        (["--runs=a", "--fit_length=4"], "fit_length=4 is too small; it must be at least 8"),
        (["--runs=a", "--accuracy=1"], "accuracy=1.0 must be between .5 and 1"),
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
        ({"accuracy": 0.9, "limit": 0.39, "models": [{}]}, "models[0].name is missing"),
        ({"accuracy": 0.8, "limit": 0.59, "models": []}, "is for accuracy=0.8, not 0.9"),
    ):
        path = tmp_path / "given.json"
        path.write_text(json.dumps(content))
        assert flags.run(script.command, [f"--workdir={tmp_path}", f"--rows_from={path}"]) == 2
        assert says in capsys.readouterr().err
