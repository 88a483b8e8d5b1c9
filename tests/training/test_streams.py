"""Runs on text: after a kill, together, selection by the loss, rows over devices, packed rows."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from tiny_run import curve, rows_in

from deltaproduct_jax.data.config import PrepareConfig
from deltaproduct_jax.data.preparation import prepare
from deltaproduct_jax.data.stream import TokenStream
from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.parallel.layout import Layout
from deltaproduct_jax.tasks.task import Metric
from deltaproduct_jax.training import loop
from deltaproduct_jax.training.checkpoints import Checkpoints
from deltaproduct_jax.training.config import RunConfig, TrainConfig, seed_for
from deltaproduct_jax.training.evaluation import Evaluation, selection_of
from deltaproduct_jax.training.source import HELD_OUT_SEED, source_of
from deltaproduct_jax.training.stopping import Stopped
from deltaproduct_jax.training.text import TextTask
from deltaproduct_jax.training.together import group as together

ONE = DeviceConfig(mesh="data:1")
TRAIN = {
    "steps": 12,
    "batch_size": 4,
    "learning_rate": 0.1,
    "log_every": 1,
    "eval_every": 4,
    "checkpoint_every": 5,
    "eval_sequences": 4,
    "eval_batch_size": 2,
}


class NextToken(nnx.Module):
    """Stands in for SequenceModel: logits by the last token, larger where a segment starts."""

    def __init__(self, config, *, rngs):
        self.embeddings = nnx.Embed(config.vocab_size, config.vocab_size, rngs=rngs)

    def __call__(self, tokens, *, segment_ids=None):
        logits = self.embeddings(tokens)
        if segment_ids is None:
            return logits
        starts = jnp.diff(segment_ids, axis=1, prepend=0) != 0
        return jnp.where(starts[..., None], 30 * logits, logits)


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(autouse=True)
def tiny_model(monkeypatch):
    monkeypatch.setattr(loop, "SequenceModel", NextToken)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A few rows of text for each split."""
    path = tmp_path_factory.mktemp("text")
    lines = [json.dumps({"text": f"document {i} " + "abc" * (i % 5)}) for i in range(60)]
    (path / "text.jsonl").write_text("\n".join(lines))
    config = PrepareConfig(
        sources=(str(path / "text.jsonl"),), tokenizer="bytes", workers=1,
        valid_fraction=0.2, test_fraction=0.2,
    )  # fmt: skip
    prepare(config, path / "tokens")
    return str(path / "tokens")


def config_of(folder, **fields):
    values = TRAIN | {"data": (folder,), "train_length": 16, "eval_lengths": (16,)} | fields
    parts = []
    for kind in (TextTask, TrainConfig):
        names = kind.__dataclass_fields__.keys() & values.keys()
        parts.append(kind(**{name: values.pop(name) for name in names}))
    assert not values
    return RunConfig(parts[0], ModelConfig(vocab_size=257), parts[1])


@pytest.fixture(scope="module")
def undisturbed(folder, tmp_path_factory):
    workdir = tmp_path_factory.mktemp("undisturbed")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SequenceModel", NextToken)
        loop.train(config_of(folder), workdir, ["test"])
    return workdir


class KilledError(Exception):
    """Where a kill would have been."""


def test_a_killed_run_goes_on_in_the_middle_of_an_epoch(folder, undisturbed, tmp_path, monkeypatch):
    """With the same batches bit by bit, also those that the kill took back."""
    read = {"killed": {}, "resumed": {}}
    plain = TokenStream.batch

    def batch(stream, step, kind):
        rows = plain(stream, step)
        if stream.split == "train":
            if kind == "killed" and step == 8:
                raise KilledError
            read[kind][step] = rows.inputs.copy()
        return rows

    for kind in ("killed", "resumed"):
        monkeypatch.setattr(TokenStream, "batch", lambda *args, kind=kind: batch(*args, kind))
        if kind == "killed":
            with pytest.raises(KilledError):
                loop.train(config_of(folder), tmp_path, ["test"])
            with Checkpoints(tmp_path / "checkpoints", read_only=True) as checkpoints:
                assert checkpoints.newest() in (5, 8)
                state = checkpoints.data(checkpoints.newest())
            assert state["step"] == checkpoints.newest()
            stream = TokenStream.from_state(state)
            assert state["step"] * stream.batch_size % stream.rows_per_epoch
        else:
            loop.train(config_of(folder), tmp_path, ["test"])
    assert set(read["resumed"]) == set(range(state["step"], 12))
    for step in set(read["killed"]) & set(read["resumed"]):
        np.testing.assert_array_equal(read["killed"][step], read["resumed"][step])
    assert curve(rows_in(tmp_path)) == curve(rows_in(undisturbed))
    again, wanted = (json.loads((d / "results.json").read_text()) for d in (tmp_path, undisturbed))
    assert again | {"throughput": None} == wanted | {"throughput": None}


def test_runs_together_read_what_each_reads_alone(folder, undisturbed, tmp_path, monkeypatch):
    """Two of one seed, whose stream is read once; one goes on alone before all do on two devices.

    Of their four slots one repeats a run, and nobody looks at it.
    """
    configs = [config_of(folder, **own) for own in ({}, {"learning_rate": 0.3}, {"seed": 2})]
    alone = [undisturbed, tmp_path / "alone1", tmp_path / "alone2"]
    places = [tmp_path / str(number) for number in range(3)]
    for config, workdir in zip(configs[1:], alone[1:], strict=True):
        loop.train(config, workdir, ["alone"])
    step_of, read, plain = together.Group._step, [], TokenStream.batch
    with pytest.MonkeyPatch.context() as patch:
        stop = lambda group, step: (step == 3 and group._request.set(15)) or step_of(group, step)
        patch.setattr(together.Group, "_step", stop)
        with pytest.raises(Stopped, match="after step 3 of 12"):
            together.train_together(configs, places, ["first"])
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop.Trainer, "_suffices", lambda self, rows: len(rows) == 6)
        loop.train(configs[0], places[0], ["second"])
    (places[0] / "results.json").unlink()
    monkeypatch.setattr(
        TokenStream,
        "batch",
        lambda s, step: (s.split == "train" and read.append((s.seed, step))) or plain(s, step),
    )
    two = lambda: jax.devices()[:2]
    monkeypatch.setattr("deltaproduct_jax.parallel.layout.all_devices", two)
    together.train_together(configs, places, ["third"])
    assert sorted(read) == sorted((c.seeds()["data"], n) for c in configs[1:] for n in range(3, 12))
    starts = [json.loads((place / "run.json").read_text())["starts"] for place in places]
    assert [of_one[-1]["resumed_from"] for of_one in starts] == [5, 3, 3]
    assert len({rows_in(place)[-1]["loss"] for place in alone}) == 3
    for place, other in zip(places, alone, strict=True):
        for row, want in zip(curve(rows_in(place)), curve(rows_in(other)), strict=True):
            assert row == pytest.approx(want, rel=1e-4)
            assert row["loss"] == pytest.approx(want["loss"], rel=1e-5)
        (entry,), (want,) = (
            json.loads((folder / "results.json").read_text())["test"] for folder in (place, other)
        )
        assert entry == pytest.approx(want, rel=1e-4)
        stood = []
        for directory in (place, other):
            with Checkpoints(directory / "checkpoints", read_only=True) as checkpoints:
                stood.append((checkpoints.steps(), checkpoints.data(checkpoints.newest())))
        assert stood[0] == stood[1]


def test_the_smallest_loss_is_the_best(undisturbed):
    evaluated = {
        row["step"]: row["valid_loss"] for row in rows_in(undisturbed) if "valid_loss" in row
    }
    results = json.loads((undisturbed / "results.json").read_text())
    assert len(set(evaluated.values())) == 3
    assert results["best_step"] == min(evaluated, key=evaluated.get)
    with Checkpoints(undisturbed / "checkpoints", read_only=True) as checkpoints:
        assert checkpoints.best() == results["best_step"]


def test_a_metric_has_a_direction():
    row = {"valid_loss": 2.0, "valid_token_accuracy": 0.5}
    by = (Metric("valid_loss", larger_is_better=False), Metric("valid_token_accuracy"))
    assert selection_of(row, by) == (-2.0, 0.5)
    assert selection_of({"loss": 1.0}, by) is None


def test_bits_per_byte_stand_beside_the_loss(folder, undisturbed):
    splits = {}
    for split in ("train", "valid", "test"):
        stream = TextTask(data=(folder,)).stream(split, batch_size=1, length=16, seed=0)
        splits[split] = stream.bytes_per_token
    assert len(set(splits.values())) == 3
    for row in rows_in(undisturbed):
        want = row["loss"] / np.log(2) / splits["train"]
        assert row["bits_per_byte"] == pytest.approx(want)
    want = row["valid_loss"] / np.log(2) / splits["valid"]
    assert row["valid_bits_per_byte"] == pytest.approx(want)
    (entry,) = json.loads((undisturbed / "results.json").read_text())["test"]
    assert entry["bits_per_byte"] == pytest.approx(entry["loss"] / np.log(2) / splits["test"])
    assert (entry["length"], entry["tokens"]) == (16, 4 * 16)
    assert 0 <= entry["token_accuracy"] < 1


def test_bits_per_byte_of_a_mixture_are_of_each_lengths_own_padding(folder, tmp_path):
    """Short documents fill a row of any length, others leave the more the shorter it is."""
    path = tmp_path / "long.jsonl"
    path.write_text("\n".join(json.dumps({"text": f"{i:034d}"}) for i in range(80)))
    fields = {"tokenizer": "bytes", "workers": 1, "valid_fraction": 0.2, "test_fraction": 0.2}
    prepare(PrepareConfig((str(path),), **fields), tmp_path / "long")
    lengths = (32, 40, 70)
    fields = {"data": (folder, str(tmp_path / "long")), "packing": "first_fit"}
    config = config_of(None, **fields, eval_lengths=lengths)
    make = lambda: NextToken(config.model, rngs=nnx.Rngs(0))
    source = source_of(config, Layout.of_model(ONE, make))
    measures, seed = [], seed_for(HELD_OUT_SEED, "data")
    for length in lengths:
        stream = config.task.stream("test", batch_size=1, length=length, seed=seed)
        answers = np.ones((2, length), bool)
        numbers, _ = source.scores("test", np.log(2), answers, answers)
        assert numbers["bits_per_byte"] == pytest.approx(1 / stream.bytes_per_token, rel=1e-12)
        measures.append(stream.bytes_per_token)
    assert len(set(measures)) == len(lengths)


class SomeBad(NextToken):
    """Without a number for some batches that are trained on, which have 4 rows."""

    def __call__(self, tokens, *, segment_ids=None):
        is_bad = (tokens.shape[0] == 4) & (jnp.sum(tokens) % 3 == 0)
        return super().__call__(tokens) * jnp.where(is_bad, jnp.nan, 1)


class AllBad(NextToken):
    """Without a number for all that is evaluated, 2 rows at a time."""

    def __call__(self, tokens, *, segment_ids=None):
        return super().__call__(tokens) * (jnp.nan if tokens.shape[0] == 2 else 1)


def test_steps_without_a_number_are_skipped_and_have_no_bits_either(
    folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(loop, "SequenceModel", SomeBad)
    results = loop.train(config_of(folder), tmp_path / "some", ["test"])
    rows = rows_in(tmp_path / "some")
    skipped = [row["step"] for row in rows if "loss" not in row]
    assert 0 < len(skipped) == results["skipped_steps"] < 12
    assert [row["step"] for row in rows if "bits_per_byte" not in row] == skipped
    assert "loss not finite" in capsys.readouterr().err
    monkeypatch.setattr(loop, "SequenceModel", AllBad)
    with pytest.raises(RunDirectoryError, match="no checkpoint whose evaluation gave a finite num"):
        loop.train(config_of(folder), tmp_path / "all", ["test"])
    assert "valid not finite" in capsys.readouterr().err
    assert not any("valid_loss" in row for row in rows_in(tmp_path / "all"))


def test_an_evaluation_without_a_number_ranks_nothing_and_ends_in_one_line():
    bad = Evaluation(float("nan"), {"bits_per_byte": float("inf"), "token_accuracy": 0.5}, {})
    assert bad.to_row() == {"valid_token_accuracy": 0.5}
    by = (Metric("valid_token_accuracy"), Metric("valid_loss", larger_is_better=False))
    assert selection_of(bad.to_row(), by) is selection_of(bad.to_row(), by[1:]) is None
    assert selection_of(bad.to_row(), by[:1]) == (0.5,)
    with pytest.raises(FloatingPointError, match=r"on the test split is nan, at length 7; a lower"):
        bad.to_dict(7)


def test_packed_rows_reach_the_model_with_their_segments(folder, tmp_path):
    config = config_of(folder, packing="first_fit", train_length=32, steps=1, accumulation_steps=2)
    loop.train(config, tmp_path, ["test"])
    model = NextToken(config.model, rngs=nnx.Rngs(config.seeds()["init"]))
    stream = config.task.stream("train", batch_size=4, length=32, seed=config.seeds()["data"])
    inputs, targets, mask, segment_ids = stream.batch(0)
    assert len(np.unique(segment_ids[0])) > 1
    losses = -jax.nn.log_softmax(model(inputs, segment_ids=segment_ids))
    losses = np.take_along_axis(np.asarray(losses), targets[..., None], axis=-1)[..., 0]
    assert rows_in(tmp_path)[0]["loss"] == pytest.approx(losses[mask].mean(), rel=1e-5)
    plain = np.asarray(-jax.nn.log_softmax(model(inputs)))
    plain = np.take_along_axis(plain, targets[..., None], axis=-1)[..., 0]
    assert rows_in(tmp_path)[0]["loss"] != pytest.approx(plain[mask].mean(), rel=1e-3)


@pytest.mark.usefixtures("all_devices")
def test_rows_lie_over_the_devices_of_a_mesh(folder):
    config = config_of(folder, eval_batch_size=4)
    make = lambda: NextToken(config.model, rngs=nnx.Rngs(0))
    layout = Layout.of_model(DeviceConfig(mesh="data:2,fsdp:2"), make)
    one = Layout.of_model(ONE, make)
    spread, whole = (source_of(config, each).training(3) for each in (layout, one))
    assert len({str(shard.index) for shard in spread.inputs.addressable_shards}) == 4
    assert spread.segment_ids is None
    for a, b in zip(spread[:3], whole[:3], strict=True):
        np.testing.assert_array_equal(a, b)


def test_seeds_part_in_what_is_trained_on_and_are_evaluated_on_the_same(folder):
    configs = [config_of(folder, seed=seed) for seed in (0, 5)]
    layout = Layout.of_model(ONE, lambda: NextToken(configs[0].model, rngs=nnx.Rngs(0)))
    sources = [source_of(config, layout) for config in configs]
    trained = [np.asarray(source.training(0).inputs) for source in sources]
    assert (trained[0] != trained[1]).any()
    for split in ("valid", "test"):
        first, second = (source.evaluation(split, 16) for source in sources)
        for batch, other in zip(first, second, strict=True):
            np.testing.assert_array_equal(batch.inputs, other.inputs)


@pytest.mark.usefixtures("all_devices")
@pytest.mark.parametrize("packing", ["concatenate", "first_fit"])
def test_held_out_rows_that_are_fewer_than_asked_count_once(folder, packing):
    fields = {"eval_sequences": 64, "eval_batch_size": 8, "packing": packing}
    config, both = (config_of(None, data=data, **fields) for data in ((folder,), (folder,) * 2))
    make = lambda: NextToken(config.model, rngs=nnx.Rngs(0))
    layouts = [Layout.of_model(DeviceConfig(mesh=f"data:{count}"), make) for count in (1, 4)]
    stream = config.task.stream(
        "valid", batch_size=1, length=16, seed=seed_for(HELD_OUT_SEED, "data")
    )
    rows = [stream.batch(step) for step in range(stream.rows_per_epoch)]
    assert len(rows) < 64
    assert len(rows) % 8
    for layout in layouts:
        found = list(source_of(config, layout).evaluation("valid", 16))
        assert len(found) == -(-len(rows) // 8)
        masks = np.concatenate([np.asarray(batch.mask) for batch in found])
        np.testing.assert_array_equal(masks[: len(rows)], np.concatenate([of.mask for of in rows]))
        assert not masks[len(rows) :].any()
    shared = list(source_of(both, layouts[0]).evaluation("valid", 16))
    assert len(shared) == 8
    assert all(np.asarray(batch.mask).any(axis=1).all() for batch in shared)


def test_other_text_is_not_gone_on_with(folder, undisturbed, tmp_path):
    """A folder that was prepared anew under the same name."""
    with Checkpoints(undisturbed / "checkpoints", read_only=True) as checkpoints:
        checkpoints.data(checkpoints.newest())
        state = checkpoints.data(checkpoints.newest())
    config = config_of(folder)
    layout = Layout.of_model(ONE, lambda: NextToken(config.model, rngs=nnx.Rngs(0)))
    source = source_of(config, layout)
    source.resume(state)
    with pytest.raises(ConfigError, match="does not hold the tokens that the run began with"):
        source.resume(state | {"fingerprints": ["of another text"]})


def test_what_a_stream_lacks_is_refused(folder, tmp_path):
    for fields, words in (
        ({"curriculum": (8,)}, r"curriculum=\(8,\) needs a task whose batches are drawn"),
        ({"stop_accuracy": 0.5}, "stop_accuracy=0.5 needs a task whose batches are drawn"),
        ({"train_length": 0}, "train_length=0 is too small"),
        ({"eval_lengths": (16, 8)}, r"eval_lengths=\(16, 8\) must ascend"),
    ):
        with pytest.raises(ConfigError, match=words):
            config_of(folder, **fields)
    config = config_of(folder)
    small = RunConfig(config.task, ModelConfig(vocab_size=256), config.train)
    with pytest.raises(ConfigError, match="vocab_size=256 must be at least that of the text's"):
        loop.train(small, tmp_path, ["test"], devices=ONE)
    (tmp_path / "a.txt").write_text("one document of a few words")
    prepare(PrepareConfig((str(tmp_path / "a.txt"),), tokenizer="bytes", workers=1), tmp_path / "a")
    with pytest.raises(ConfigError, match=r"no split 'valid'.* larger valid_fraction"):
        loop.train(config_of(str(tmp_path / "a")), tmp_path / "run", ["test"], devices=ONE)
    assert not (tmp_path / "run" / "metrics.jsonl").exists()
    missing = config_of(str(tmp_path / "nothing"))
    with pytest.raises(RunDirectoryError, match="nothing"):
        loop.train(missing, tmp_path, ["test"], devices=ONE)


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"train_length": 70_000}, "^train_length=70000 is too long: .* in split 'train', and a"),
        ({"eval_lengths": (16, 60_000)}, "^eval_lengths=60000 is too long: .* in split 'valid'"),
        ({"select_length": 50_000}, "^select_length=50000 is too long: .* in split 'valid'"),
    ],
)
def test_rows_that_the_text_is_too_short_for_are_named_by_their_setting(folder, fields, says):
    config = config_of(folder, **fields)
    layout = Layout.of_model(ONE, lambda: NextToken(config.model, rngs=nnx.Rngs(0)))
    with pytest.raises(ConfigError, match=says):
        source_of(config, layout)


def test_a_run_on_text_comes_back_from_its_record(folder, undisturbed):
    saved = json.loads((undisturbed / "config.json").read_text())
    assert RunConfig.from_dict(saved) == config_of(folder)
    saved["task"]["data"] = ["elsewhere"]  # where there is no text
    assert RunConfig.from_dict(saved).task.data == ("elsewhere",)
