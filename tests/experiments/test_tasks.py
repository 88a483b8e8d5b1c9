"""The experiments on formal languages and recall: whole runs, records, refusals, every field."""

import dataclasses
import re

import pytest
import tiny_run
from tiny_run import curve, rows_in, snapshot

from deltaproduct_jax.tasks.formal_languages import FormalLanguageTask
from deltaproduct_jax.tasks.recall import RecallTask
from deltaproduct_jax.training import loop
from deltaproduct_jax.training.config import RunConfig
from experiments import formal_languages, recall
from experiments.lib import flags
from experiments.lib import task_experiment as run_task

TRAINING = {
    "hidden_size": 8, "steps": 6, "batch_size": 8, "learning_rate": 0.03, "warmup_steps": 0,
    "end_learning_rate": 0.0, "log_every": 2, "eval_every": 3, "checkpoint_every": 6,
    "eval_sequences": 32, "eval_batch_size": 16,
}  # fmt: skip
LANGUAGE = TRAINING | {
    "language": "parity", "train_length": 8, "eval_lengths": "8,24", "min_eval_length": 8,
    "curriculum": "",
}  # fmt: skip
RECALL = TRAINING | {
    "train_length": 16, "num_pairs": 2, "eval_lengths": "16,24", "eval_pairs": "2,3",
    "vocabulary": 16, "select_length": 24,
}  # fmt: skip
EXPERIMENTS = {"formal_languages": (formal_languages, LANGUAGE), "recall": (recall, RECALL)}


pytestmark = pytest.mark.usefixtures("compiled_once")


@pytest.fixture(scope="module")
def run_of(tmp_path_factory, compiled_once):
    """(experiment, fields) -> directory of that run, made once; tests only read it."""
    directories = {}

    def run(name, fields):
        call = (name, *sorted(fields.items()))
        if call not in directories:
            directories[call] = tmp_path_factory.mktemp(name)
            assert main(name, flags_for(directories[call], fields)) == 0
        return directories[call]

    return run


def main(name, argv):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(loop, "SequenceModel", tiny_run.TinyModel)
        return EXPERIMENTS[name][0].main(argv)


def flags_for(workdir, fields):
    return [f"--workdir={workdir}", *(f"--{name}={value}" for name, value in fields.items())]


def shown_again(name, run_of, capsys):
    """What the command prints of a finished run: the lines of its table, and the directory."""
    workdir = run_of(name, EXPERIMENTS[name][1])
    capsys.readouterr()
    before = snapshot(workdir)
    assert main(name, flags_for(workdir, EXPERIMENTS[name][1])) == 0
    assert snapshot(workdir) == before
    return capsys.readouterr().out.splitlines(), workdir


def results_in(workdir):
    return tiny_run.outcome(workdir)


def test_formal_languages_report_scaled_accuracy_by_length(run_of, capsys):
    (head, names, *lines), workdir = shown_again("formal_languages", run_of, capsys)
    results = results_in(workdir)
    trained, beyond = results["test"]
    assert (trained["length"], beyond["length"]) == (8, 24)
    ranges = {name: score for name, score in beyond.items() if name.startswith("lengths_")}
    assert list(ranges) == ["lengths_8_to_16", "lengths_17_to_24"]
    assert not any(name.startswith("lengths_") for name in trained)
    whole = beyond["strict"]
    assert (whole["shortest"], whole["longest"], whole["sequences"]) == (8, 24, 32)
    right = sum(score["token_accuracy"] * score["sequences"] for score in ranges.values())
    assert whole["token_accuracy"] == pytest.approx(right / 32)
    scores = [trained["strict"], whole, *ranges.values()]
    for score in scores:
        assert score["scaled_accuracy"] == pytest.approx(2 * score["token_accuracy"] - 1)

    assert head == f"best checkpoint: step {results['best_step']} of 6; test split:"
    assert re.split("  +", names.strip()) == ["lengths", "sequences", "accuracy", "scaled accuracy"]
    for line, score in zip(lines, scores, strict=True):
        lengths = f"{score['shortest']} to {score['longest']}"
        numbers = [f"{score[name]:.4f}" for name in ("token_accuracy", "scaled_accuracy")]
        assert re.split("  +", line.strip()) == [lengths, str(score["sequences"]), *numbers]
    assert (workdir / "scaled_accuracy.png").read_bytes().startswith(b"\x89PNG")


def test_recall_reports_each_length_and_its_pairs(run_of, capsys):
    (_, names, *lines), workdir = shown_again("recall", run_of, capsys)
    assert re.split("  +", names.strip()) == ["length", "pairs", "queries", "whole sequences"]
    tested = results_in(workdir)["test"]
    assert [(entry["length"], entry["strict"]["num_pairs"]) for entry in tested] == [
        (16, 2),
        (24, 3),
    ]
    for line, entry in zip(lines, tested, strict=True):
        numbers = [entry["strict"][f"{what}_accuracy"] for what in ("token", "sequence")]
        want = [str(entry["length"]), str(entry["strict"]["num_pairs"])]
        assert line.split() == want + [f"{number:.4f}" for number in numbers]
    assert (workdir / "recall.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_saved_config_runs_again_to_the_same_curve(name, run_of, tmp_path):
    first = run_of(name, EXPERIMENTS[name][1])
    assert main(name, [f"--config={first / 'config.json'}", f"--workdir={tmp_path}"]) == 0
    assert curve(rows_in(tmp_path)) == curve(rows_in(first))
    assert results_in(tmp_path) == results_in(first)


SLOW = ("vocabulary", "power", "filler", "min_train_length", "min_eval_length", "eval_pairs")
BRACKETS = {"language": "modular_arithmetic_brackets", "eval_lengths": "8"}
# Experiment, field of its task, another value, and what else the field needs to act.
CHANGES = [
    ("formal_languages", "language", "modular_arithmetic", {}),
    ("formal_languages", "train_length", 9, {}),
    ("formal_languages", "min_train_length", 5, {}),
    ("formal_languages", "eval_lengths", "8,20", {}),
    ("formal_languages", "min_eval_length", 20, {}),
    ("formal_languages", "bracket_multiplication", "true", BRACKETS),
    ("recall", "train_length", 18, {}),
    ("recall", "num_pairs", 3, {"eval_lengths": "24", "eval_pairs": "3"}),
    ("recall", "eval_lengths", "16,22", {"select_length": 16}),
    ("recall", "eval_pairs", "2,4", {}),
    ("recall", "vocabulary", 18, {}),
    ("recall", "power", 1.0, {}),
    ("recall", "filler", "zero", {}),
]


def test_every_field_of_the_tasks_has_its_change():
    for name, task in (("formal_languages", FormalLanguageTask), ("recall", RecallTask)):
        changed = {field for experiment, field, *_ in CHANGES if experiment == name}
        assert changed == {field.name for field in dataclasses.fields(task)}


@pytest.mark.parametrize(
    ("name", "field", "value", "needs"),
    [
        # Two runs, or with another vocabulary or generator compiled anew.
        pytest.param(*c, marks=[pytest.mark.slow] if c[3] or c[1] in SLOW else [])
        for c in CHANGES
    ],
)
def test_every_field_of_the_tasks_changes_the_run(name, field, value, needs, run_of):
    base = EXPERIMENTS[name][1] | needs
    before, after = run_of(name, base), run_of(name, base | {field: value})
    assert (curve(rows_in(after)), results_in(after)) != (
        curve(rows_in(before)),
        results_in(before),
    )


def preset_of(script, preset) -> RunConfig:
    parsed = flags.parse(
        ["--workdir=w", f"--preset={preset}"],
        script.SECTIONS,
        script.PRESETS,
        exclude=run_task.NOT_FLAGS,
    )
    return script.configure(parsed.sections)


PRESETS = [(script, preset) for script, _ in EXPERIMENTS.values() for preset in script.PRESETS]


@pytest.mark.parametrize(("script", "preset"), PRESETS, ids=[preset for _, preset in PRESETS])
def test_presets_are_whole_runs(script, preset):
    config = preset_of(script, preset)
    values = {}
    for section in (config.task, config.model, config.train):
        values |= dataclasses.asdict(section)
    for name, value in script.PRESETS[preset].items():
        assert values[name] == value


def test_paper_presets_are_the_published_setups():
    for language, layers in (
        ("parity", 2), ("modular_arithmetic", 3), ("modular_arithmetic_brackets", 3)
    ):  # fmt: skip
        config = preset_of(formal_languages, f"paper_{language}")
        task, model, train = config.task, config.model, config.train
        assert (task.language, model.num_layers, model.hidden_size) == (language, layers, 128)
        assert (task.min_train_length, task.train_length) == (3, 40)
        assert (task.min_eval_length, task.eval_lengths[-1]) == (40, 256)
        assert (train.steps, train.warmup_steps, train.batch_size) == (100_000, 10_000, 1024)
    for preset in ("64_4", "128_8", "256_16", "512_64"):
        task = preset_of(recall, preset).task
        assert f"{task.train_length}_{task.num_pairs}" == preset
        assert task.vocab_size == 8192


ERRORS = {
    "unknown language": ("formal_languages", ["--language=dyck"], "language='dyck' is not known"),
    "short curriculum": (
        "formal_languages", ["--curriculum=2"], "curriculum=2 is too small; it must be at least 3",
    ),
    "short selection": (
        "formal_languages", ["--min_eval_length=20", "--select_length=19"],
        "select_length=19 is too small; it must be at least 20",
    ),
    "idle multiplication": (
        "formal_languages", ["--bracket_multiplication"], "does not fit language='parity'",
    ),
    "no room": ("recall", ["--num_pairs=5", "--eval_pairs=5,5"], "train_length=16 does not fit 5"),
    "odd curriculum": ("recall", ["--curriculum=9"], "curriculum=9 does not fit 2 pairs"),
    "pairs too few": ("recall", ["--eval_pairs=2"], "eval_pairs=(2,) must have one number for"),
    "few keys": ("recall", ["--vocabulary=4"], "vocabulary=4 has 1 keys, fewer than the 3 pairs"),
}  # fmt: skip


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line_and_cost_nothing(case, tmp_path, capsys):
    name, added, says = ERRORS[case]
    assert main(name, [*flags_for(tmp_path / "run", EXPERIMENTS[name][1]), *added]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert says in line
    assert not (tmp_path / "run").exists()


def test_tables_align_their_columns():
    lines = run_task.table_lines([{"a": 5, "long name": 0.5}, {"a": "x to y", "long name": 1.0}])
    assert lines == ["     a  long name", "     5     0.5000", "x to y     1.0000"]
