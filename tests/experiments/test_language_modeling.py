"""The experiment on text: sizes of its presets, a run from its command line, what it refuses."""

import json

import jax
import pytest
import tiny_run
from flax import nnx

from deltaproduct_jax.models import ModelConfig, SequenceModel, count_parameters
from deltaproduct_jax.tasks.registry import NamedTask
from deltaproduct_jax.training import loop
from deltaproduct_jax.training.config import TrainConfig
from experiments import language_modeling, train
from experiments.lib.language_presets import PRESETS

# With the paper's vocabulary of 32,000.
PARAMETERS = {
    "213m": (213_802_752, 214_095_072, 213_925_632),
    "340m": (341_594_112, 316_379_136, 341_741_568),
    "392m": (392_171_520, 392_318_976, 392_392_704),
    "700m": (695_635_968, 696_078_336, 696_299_520),
    "805m": (805_384_704, 806_262_780, 805_777_920),
    "1300m": (1_300_141_056, 1_351_013_376, 1_300_632_576),
}  # fmt: skip
SIZES = {f"{name}_{n}": counts[n - 1] for name, counts in PARAMETERS.items() for n in (1, 2, 3)}


def model_of(preset, **fields):
    names = ModelConfig.__dataclass_fields__.keys() & PRESETS[preset].keys()
    return ModelConfig(**{name: PRESETS[preset][name] for name in names} | fields)


@pytest.mark.parametrize("preset", SIZES)
def test_parameters_are_those_of_the_table(preset):
    """Of one block, which all 24 are like, and of what is around them."""
    assert PRESETS[preset]["num_layers"] == 24
    config = model_of(preset, vocab_size=32_000, num_layers=1)
    shapes = nnx.eval_shape(lambda: SequenceModel(config, rngs=nnx.Rngs(0)))
    block = sum(leaf.size for leaf in jax.tree.leaves(nnx.state(shapes.layers, nnx.Param)))
    assert count_parameters(shapes)["total"] + 23 * block == SIZES[preset]


@pytest.mark.slow
def test_a_model_of_24_blocks_has_the_parameters_of_the_table():
    shapes = nnx.eval_shape(
        lambda: SequenceModel(model_of("805m_2", vocab_size=32_000), rngs=nnx.Rngs(0))
    )
    assert count_parameters(shapes)["total"] == SIZES["805m_2"]


def test_there_is_a_preset_for_every_size():
    assert PRESETS.keys() == {"default", "tiny"} | SIZES.keys()
    assert PRESETS["default"] is PRESETS["tiny"]
    for preset in SIZES:
        values = PRESETS[preset]
        assert values["batch_size"] * values["train_length"] == 524_288


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A few steps on the standard library, of a model that compiles at once."""
    workdir = tmp_path_factory.mktemp("text")
    argv = ["--preset=tiny", f"--workdir={workdir}", "--steps=4", "--eval_every=2"]
    argv += ["--warmup_steps=0", "--log_every=1", "--eval_sequences=8", "--optimizer=muon"]
    argv += ["--schedule=wsd", "--train_length=32", "--eval_lengths=32,64", "--select_length=32"]
    with tiny_run.compiled_once(workdir / "compiled"), pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SequenceModel", tiny_run.TinyModel)
        assert language_modeling.main(argv) == 0
        yield workdir, argv


def test_a_run_on_the_standard_library(finished, capsys):
    workdir, argv = finished
    assert language_modeling.main(argv) == 0  # it is finished, and says the same again
    results = json.loads((workdir / "results.json").read_text())
    head, names, *lines = capsys.readouterr().out.splitlines()
    assert head == f"best checkpoint: step {results['best_step']} of 4; test split:"
    assert names.split() == ["length", "tokens", "loss", "bits", "per", "byte", "accuracy"]
    assert [line.split()[:2] for line in lines] == [["32", "256"], ["64", "512"]]
    assert (workdir / "bits_per_byte.png").read_bytes().startswith(b"\x89PNG")
    saved = json.loads((workdir / "config.json").read_text())
    assert saved["model"]["vocab_size"] == 257
    assert (saved["train"]["optimizer"], saved["train"]["schedule"]) == ("muon", "wsd")
    rows = (workdir / "metrics.jsonl").read_text().splitlines()
    rates = [json.loads(row)["learning_rate"] for row in rows]
    assert rates == pytest.approx([3e-3] * 4)  # the last step's update is the first to fall


def test_the_script_for_any_task_shows_text_as_well(finished):
    results = json.loads((finished[0] / "results.json").read_text())
    (row,) = train.rows(results["test"][0])
    assert row["bits_per_byte"] > 0
    assert NamedTask.variant({"task": "text"})().stream("valid", batch_size=1, length=8, seed=0)


@pytest.mark.parametrize(
    ("flag", "words"),
    [
        ("--stop_accuracy=.5", "stop_accuracy=0.5 needs a task whose batches are drawn"),
        ("--decay_fraction=.5", "decay_fraction=0.5 needs schedule=wsd, got schedule=cosine"),
        (
            "--optimizer=adamw --muon_momentum=.9",
            "muon_momentum=0.9 needs optimizer=muon, got optimizer=adamw",
        ),
        ("--data=nowhere", "nowhere"),
    ],
)
def test_what_makes_no_sense_is_one_line(flag, words, tmp_path, capsys):
    assert language_modeling.main(["--preset=tiny", f"--workdir={tmp_path}", *flag.split()]) == 2
    error = capsys.readouterr().err
    assert words in error
    assert error.count("\n") == 1


def test_records_name_what_is_set_and_no_more():
    """So that records of before a field was there are those of its default."""
    config = language_modeling.configure(
        {"task": {}, "model": {"scan_layers": True}, "train": {"z_loss": 1e-4}, "plugins": {}}
    )
    saved = config.to_dict()
    assert (saved["model"]["scan_layers"], saved["train"]["z_loss"]) == (True, 1e-4)
    left_out = TrainConfig.__dataclass_fields__.keys() - saved["train"].keys()
    assert left_out >= {"optimizer", "decayed", "decay_fraction", "loss_chunk_size"}
