"""Steps that are not made: which, what is left of them, and when a run ends for them."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import tiny_run
from event_files import read_events, scalars
from flax import nnx
from tiny_run import curve, leaves_equal, rows_in, run_config

from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.tasks.task import Batch
from deltaproduct_jax.training import loop
from deltaproduct_jax.training.events import FILE_NAME
from deltaproduct_jax.training.optimizer import make_optimizer, make_schedule
from deltaproduct_jax.training.progress import Progress
from deltaproduct_jax.training.records import refuse_other_config
from deltaproduct_jax.training.skipping import WINDOW, Skipped, Skipping, none_skipped
from deltaproduct_jax.training.start import first_state, layout_of, shapes_of
from deltaproduct_jax.training.step import make_train_step

NAN, INF = float("nan"), float("inf")


def judged(skipping: Skipping, numbers) -> tuple[list[bool], Skipped]:
    """Which steps of these losses and gradient norms are made, and what is remembered then."""

    def step(skipped, pair):
        made, skipped = skipping.judge(skipped, pair[0], pair[1])
        return skipped, made

    numbers = jnp.asarray(numbers, jnp.float32)
    skipped, made = jax.jit(lambda x: jax.lax.scan(step, none_skipped(), x))(numbers)
    return made.tolist(), jax.device_get(skipped)


def test_what_is_not_finite_is_skipped_and_counted():
    numbers = [(1, 1), (NAN, 1), (1, 1), (1, INF), (1, NAN), (-INF, 1), (1, 1), (1, NAN)]
    made, skipped = judged(Skipping(max_in_a_row=4), numbers)
    assert made == [True, False, True, False, False, False, True, False]
    assert (skipped.total, skipped.in_a_row) == (5, 1)


def test_after_enough_in_a_row_no_step_is_made():
    made, skipped = judged(Skipping(max_in_a_row=3), [(1, 1), *[(NAN, 1)] * 3, *[(1, 1)] * 5])
    assert made == [True] + [False] * 8
    assert (skipped.total, skipped.in_a_row) == (8, 8)


def test_a_spike_is_skipped_once_there_were_enough_steps():
    rng = np.random.default_rng(0)
    usual = np.stack([rng.normal(2, 0.1, 400), rng.normal(1, 0.05, 400)], axis=1)
    for at, column in ((50, 0), (200, 0), (250, 1)):
        usual[at, column] += 1.5
    usual[300] = NAN
    made, skipped = judged(Skipping(deviations=8), usual)
    assert [i for i, m in enumerate(made) if not m] == [200, 250, 300]
    assert (skipped.total, skipped.seen) == (3, 399)
    assert all(judged(Skipping(), usual[:300])[0])  # nobody asked
    np.testing.assert_allclose(skipped.mean, usual[301:].mean(axis=0), rtol=0.05)
    np.testing.assert_allclose(np.sqrt(skipped.variance), usual[301:].std(axis=0), rtol=0.5)


def test_mean_and_variance_by_hand_at_first():
    numbers = np.random.default_rng(1).normal(3, 1, (WINDOW, 2))
    _, skipped = judged(Skipping(deviations=9), numbers)
    np.testing.assert_allclose(skipped.mean, numbers.mean(axis=0), rtol=1e-5)
    np.testing.assert_allclose(skipped.variance, numbers.var(axis=0), rtol=1e-5)


def test_a_loss_that_stays_where_it_jumped_to_is_no_spike_for_long():
    rng = np.random.default_rng(0)
    loss = np.concatenate([rng.normal(1, 0.1, 200), rng.normal(4, 0.1, 100)])
    made, _ = judged(Skipping(max_in_a_row=20, deviations=6), np.stack([loss, loss], axis=1))
    skipped = [i for i, m in enumerate(made) if not m]
    assert skipped == list(range(200, 200 + len(skipped)))
    assert 3 < len(skipped) < 16


def is_bad(tokens):
    """Of a batch of training's size, by its tokens: about every fourth."""
    return (tokens.shape[0] == 8) & (jnp.sum(tokens) % 4 == 0)


class BrittleModel(tiny_run.TinyModel):
    """Has no numbers for some batches."""

    def __call__(self, tokens):
        return super().__call__(tokens) + jnp.where(is_bad(tokens), jnp.nan, 0.0)


def steps_over(mesh: str, batches: list[Batch]):
    """States before and after each step, and its metrics, of the brittle model over a mesh."""
    config = run_config(schedule="cosine", clip_norm=1.0)
    make = lambda: BrittleModel(config.model, rngs=nnx.Rngs(0))
    layout = layout_of(config, make, DeviceConfig(mesh=mesh))
    definition, _ = shapes_of(config, make)
    optimizer, schedule = make_optimizer(config.train), make_schedule(config.train)
    update = jax.jit(make_train_step(definition, optimizer, schedule, 1, layout))
    states, metrics = [first_state(config, make, layout)], []
    for batch in batches:
        state, found = update(states[-1], jax.device_put(batch, layout.whole))
        states.append(state)
        metrics.append(jax.device_get(found))
    return states, metrics


@pytest.mark.usefixtures("all_devices")
def test_a_skipped_step_leaves_all_as_it_is_but_the_counts():
    mesh = "data:2,fsdp:2"
    tokens = np.random.default_rng(0).integers(0, 3, (12, 8, 4)).astype(np.int32)
    bad = [bool(is_bad(t)) for t in tokens]
    assert 1 < sum(bad) < 8
    assert not bad[-1]
    mask = jnp.ones((8, 4), bool)
    batches = [Batch(jnp.asarray(t), jnp.asarray(t), mask) for t in tokens]
    states, metrics = steps_over(mesh, batches)
    for before, after, number, is_skipped in zip(states, states[1:], metrics, bad, strict=False):
        kept = [(s.params, s.opt_state) for s in (before, after)]
        assert leaves_equal(*kept) == is_skipped
        assert np.isfinite(number["loss"]) != is_skipped
        assert (number["update_norm"] == 0) == is_skipped
        assert np.isfinite(number["param_norm"])
    assert int(states[-1].step) == 12
    assert int(states[-1].skipped.total) == int(metrics[-1]["skipped_steps"]) == sum(bad)
    # As if nobody had ever drawn the bad ones, the learning rate too.
    good = [batch for batch, is_skipped in zip(batches, bad, strict=True) if not is_skipped]
    alone, numbers = steps_over(mesh, good)
    assert leaves_equal(alone[-1].params, states[-1].params)
    assert leaves_equal(alone[-1].opt_state, states[-1].opt_state)
    assert numbers[-1]["learning_rate"] == metrics[-1]["learning_rate"]


pytestmark = pytest.mark.usefixtures("compiled_once")


RUN = {"steps": 14, "log_every": 1}


class Killed(BaseException):
    """Stands in for SIGKILL: nobody handles it."""


def test_a_run_passes_over_bad_batches_and_says_so(tmp_path, monkeypatch, capsys):
    """Killed and resumed on its way, so that the counts go on from a checkpoint."""
    monkeypatch.setattr(loop, "SequenceModel", BrittleModel)
    show = Progress.show

    def shown(self, row):
        show(self, row)
        if row["step"] == 9:
            raise Killed

    with monkeypatch.context() as patch:
        patch.setattr(Progress, "show", shown)
        with pytest.raises(Killed):
            loop.train(run_config(**RUN), tmp_path, ["test"])
    before = curve(rows_in(tmp_path))
    results = loop.train(run_config(**RUN), tmp_path, ["test"])
    said = capsys.readouterr().err
    rows = rows_in(tmp_path)
    assert curve(rows)[:8] == before[:8]
    skipped = [row["step"] for row in rows if "loss" not in row]
    assert 1 < len(skipped) < 10
    assert min(skipped) < 8  # so that the second start has some to go on from
    counts = [row["skipped_steps"] for row in rows]
    assert counts == [sum(step <= row["step"] for step in skipped) for row in rows]
    assert results["skipped_steps"] == len(skipped)
    assert f"{len(skipped)} steps skipped" in said
    assert "loss not finite" in said
    assert f"skipped {len(skipped)}  left" in said
    assert 0 < results["throughput"]["goodput"] < 1
    events = scalars(read_events(tmp_path / FILE_NAME))
    assert [int(values["train/skipped_steps"]) for _, values in events] == counts
    assert 0 < events[-1][1]["train/goodput"] < 1


def test_too_many_in_a_row_end_the_run_however_seldom_it_is_logged(tmp_path, monkeypatch):
    class Broken(tiny_run.TinyModel):
        def __call__(self, tokens):
            return super().__call__(tokens) * jnp.where(tokens.shape[0] == 8, jnp.nan, 1.0)

    monkeypatch.setattr(loop, "SequenceModel", Broken)
    config = run_config(max_skipped_steps=3, log_every=5, eval_every=12)
    with pytest.raises(FloatingPointError) as error:
        loop.train(config, tmp_path, ["test"])
    assert str(error.value).startswith(
        "training broke down in steps 1 to 3: max_skipped_steps=3 were skipped in a row, as"
    )
    assert "\n" not in str(error.value)


def test_a_run_of_a_version_without_these_settings_has_them_at_their_defaults(tmp_path):
    config = run_config().to_dict()
    older = config | {"train": dict(config["train"])}
    del older["train"]["max_skipped_steps"], older["train"]["spike_deviations"]
    refuse_other_config(older, config, tmp_path)
    with pytest.raises(RunDirectoryError, match=r"differing in spike_deviations \(null there, 6"):
        refuse_other_config(older, run_config(spike_deviations=6.0).to_dict(), tmp_path)
