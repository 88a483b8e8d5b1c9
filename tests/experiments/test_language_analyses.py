"""The paper's analyses of language models: shapes that match, tables, figures, whole commands."""

import json
import shutil

import numpy as np
import pytest
from interop.golden_models import drawn

from deltaproduct_jax.data.config import PrepareConfig, StreamConfig
from deltaproduct_jax.data.preparation import prepare
from deltaproduct_jax.data.stream import open_corpora
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.interop import fla
from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.training.records import RunRecords
from experiments.analysis import effective_rank, length_extrapolation, scaling, throughput
from experiments.lib import flags, language_runs
from experiments.lib.bench import training_steps
from experiments.lib.bench.report import write_report
from experiments.lib.figures import language
from experiments.lib.figures.style import Look
from experiments.lib.language_presets import SIZES
from experiments.lib.matched_shapes import Shape, sizes_of


def test_heads_become_fewer_or_narrower_as_in_the_paper():
    for name in ("392m", "700m", "805m"):
        heads = [of for _, of in SIZES[name][2]]
        one = Shape(1, heads[0], 128)
        found = [one.with_factors(n, "heads").num_heads for n in (1, 2, 3)]
        assert found == [heads[0], round(heads[0] * 2 / 3), heads[0] // 2]
        assert found[2] == heads[2]
    widths = [Shape(1, 8, 128).with_factors(n, "head_dim").head_dim for n in (1, 2, 3, 4)]
    assert widths == [128, 85, 64, 51]
    assert Shape.of_text("shapes", "3x24x85") == Shape(3, 24, 85)
    for text in ("3x24", "0x1x1", "axbxc", "1x2x3x4"):
        with pytest.raises(ConfigError, match=f"shapes='{text}' must be 3 whole numbers, as in"):
            sizes_of("shapes", text, 3)


def cells(**fields):
    return {cell.name: cell for cell in scaling.ScalingConfig(**fields).cells()}


def test_a_model_with_one_factor_stands_in_both_panels():
    found = cells(sizes=("48x6x12x128",), steps_of_sizes=(7,))
    assert list(found) == ["48_1", "48_2_heads", "48_2_head_dim", "48_3_heads", "48_3_head_dim"]
    assert found["48_1"].matched == ("heads", "head_dim")
    assert found["48_3_heads"].shape == Shape(3, 3, 12)
    assert found["48_2_head_dim"].shape == Shape(2, 6, 8)
    assert found["48_1"].steps == 7


def test_the_presets_describe_their_runs():
    parsed = flags.parse(
        ["--workdir=w"], scaling.SECTIONS, scaling.PRESETS, exclude=scaling.DECIDED
    )
    runs = {cell.name: config for cell, config in scaling.runs_of(parsed.sections)}
    assert len(runs) == 15
    assert runs["96_3_heads"].model.num_heads == 3
    assert runs["96_3_head_dim"].model.head_dim == 12
    paper = scaling.PRESETS["paper"]
    assert paper["train_length"] * paper["batch_size"] == 524_288
    assert [int(size.split("x")[1]) for size in paper["sizes"]] == [
        SIZES[name][2][0][1] for name in ("213m", "392m", "805m")
    ]


@pytest.mark.parametrize(
    ("module", "arguments", "says"),
    [
        (length_extrapolation, [], "--runs is missing"),
        (
            length_extrapolation,
            ["--rows=3", "--batch_size=2"],
            "rows=3 must be a multiple of batch_size=2",
        ),
        (length_extrapolation, ["--runs=a,"], "--runs=a,: it must be"),
        (length_extrapolation, ["--window=100"], "window=100 must divide length=32768"),
        (length_extrapolation, ["--split=all"], "split='all' is not known"),
        (effective_rank, [], "--run is missing"),
        (effective_rank, ["--run=x", "--every=3"], "every=3 must divide length=16384"),
        (effective_rank, ["--run=nowhere"], "config.json"),
        (throughput, ["--shapes=2x8"], "shapes='2x8' must be 3 whole numbers"),
        (throughput, ["--decode_rows=0"], "decode_rows"),
        (scaling, ["--only=7_1"], "only=7_1 is no model; there are 48_1, "),
        (scaling, ["--sizes=8x2x4"], "sizes='8x2x4' must be 4 whole numbers"),
        (scaling, ["--sizes=8x2x4x8,9x2x4x8,8x1x4x8"], "8x1x4x8 have a width D twice, by which"),
        (
            scaling,
            ["--matched_by=width"],
            r"matched_by='width' is not known; it may be one of ['heads', 'head_dim']",
        ),
        (scaling, ["--steps_of_sizes=1,2"], "must be as many as sizes="),
    ],
)
def test_what_makes_no_sense_is_one_line(module, arguments, says, tmp_path, capsys):
    assert flags.run(module.command, [f"--workdir={tmp_path / 'w'}", *arguments]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


CURVES = {"position": [4, 8], "loss": [2.0, 1.0], "running_loss": [2.0, 1.5]}
CURVES |= {"running_accuracy": [0.25, 0.5], "error": [0.1, 0.2]}


def test_tables_say_what_came_out():
    entry = {"data": "code", "label": "n_h = 2", "trained": 4, **CURVES}
    text = length_extrapolation.table([entry, entry | {"trained": None, "error": None}])
    assert "| code | n_h = 2 | 4 | 2.000 | 1.000 | 1.500 | 0.500 |" in text
    assert "| code | n_h = 2 | - | - | 1.000 | 1.500 | 0.500 |" in text
    head = {"trained": None, "end": 2.5, "kept_at_starts": 0.5}
    assert "| 3 | 0 | - | 2.50 | 0.50 |" in effective_rank.table({3: [head]})
    shape = {"num_householder": 2, "num_heads": 4, "head_dim": 8}
    times = {"median_ms": 2.0, "min_ms": 1.0, "max_ms": 3.0, "compile_s": 1.0}
    row = {**shape, **times, "parameters": 1000, "tokens_per_s": 5e3, "relative": 0.5}
    row |= {"mfu": 0.25, "temp_mib": 512, "peak_mib": None, "decoding_ms": {1: 0.5, 8: 1.25}}
    text = throughput.table([row, {**shape, "error": "no memory"}], (1, 8))
    assert (
        "| 2 | 4 | 8 | 1,000 | 2 | 1 | 3 | 5,000 | 0.50 | 25.0 | 0.50 | - | 1.0 | 0.5 | 1.25 |"
        in text
    )
    assert "n_h = 2, 4 x 8: no memory" in text


def test_a_model_without_a_number_beyond_some_place_is_shown_so(tmp_path):
    """Its loss is NaN from there on, and its ranks: the answer, and no fault of who asks."""
    nan, inf = float("nan"), float("inf")
    worse = CURVES | {"loss": [2.0, nan], "running_loss": [2.0, inf], "error": [0.1, nan]}
    entry = {"data": "code", "label": "n_h = 2", "trained": 4, **worse}
    config = {"rows": 2, "length": 8, "split": "test", "data": "code"}
    record = {"config": config, "machine": "a", "curves": [entry], "command": "python -m x.y"}
    record["page"] = "analysis.length_extrapolation"
    text = write_report(tmp_path, "extrapolation", record, length_extrapolation.page)
    assert "| code | n_h = 2 | 4 | 2.000 | nan | inf | 0.500 |" in text
    head = {"trained": 2.0, "end": nan, "kept_at_starts": None}
    record |= {"label": "n_h = 2", "starts": [0], "heads": {"0": [head]}}
    text = write_report(tmp_path, "ranks", record, effective_rank.page)
    assert "| 0 | 0 | 2.00 | nan | - |" in text
    language.draw_extrapolation([entry], tmp_path / "extrapolation", Look())
    ranks = {0: np.array([1.0, nan, nan]).reshape(3, 1, 1)}
    language.draw_ranks(ranks, 4, [0], 4, "a title", tmp_path / "ranks", Look())
    assert (tmp_path / "ranks.png").stat().st_size > 5000


def test_figures_show_what_records_hold(tmp_path, monkeypatch):
    figures = []
    monkeypatch.setattr(language, "save", lambda figure, path, look: figures.append(figure))
    look = Look()
    entries = [
        {"data": data, "label": f"n_h = {n}", "trained": 4, **CURVES}
        for data in ("code", "prose")
        for n in (1, 2)
    ]
    language.draw_extrapolation(entries, tmp_path, look)
    axes = figures.pop().axes
    assert [a.get_title() for a in axes[:2]] == ["code", "prose"]
    assert [line.get_label() for line in axes[0].lines[:2]] == ["$n_h$ = 1", "$n_h$ = 2"]
    np.testing.assert_array_equal(axes[2].lines[1].get_ydata(), [2.0, 1.5])

    ranks = {0: np.arange(12.0).reshape(3, 2, 2), 5: np.ones((3, 2, 2))}
    language.draw_ranks(ranks, 10, [0, 15], 20, "a title", tmp_path, look)
    first, second = figures.pop().axes
    assert (first.get_title(), second.get_title()) == ("block 0", "block 5")
    assert [line.get_xdata()[0] for line in first.lines[:2]] == [0, 15]  # starts of documents
    np.testing.assert_array_equal(first.lines[2].get_xdata(), [0, 0.5, 10, 10.5, 20, 20.5])
    np.testing.assert_array_equal(first.lines[3].get_ydata(), ranks[0][:, :, 1].reshape(-1))

    rows = [
        {"matched": way, "num_householder": n, "parameters": 100 * size, "loss": 1 / (n + size)}
        for n, way in ((1, ("heads", "head_dim")), (2, ("heads",)))
        for size in (1, 2)
    ]
    language.draw_losses(rows, tmp_path, look)
    by_heads, by_width = figures.pop().axes
    assert [line.get_label() for line in by_heads.lines] == ["$n_h$ = 1", "$n_h$ = 2"]
    assert [line.get_label() for line in by_width.lines] == ["$n_h$ = 1"]

    row = {"num_householder": 2, "num_heads": 4, "head_dim": 8, "tokens_per_s": 10.0}
    row |= {"relative": 1.0, "decoding_ms": {1: 2.0, 8: 3.0}, "machine": "1 x cpu"}
    config = {"batch_size": 2, "length": 8, "hidden_size": 16, "dtype": "float32"}
    language.draw_throughput([row], config, tmp_path, look)
    speed, latency = figures.pop().axes
    assert [bar.get_width() for bar in speed.patches] == [10.0]
    assert [bar.get_width() for bar in latency.patches] == [2.0, 3.0]


def test_folders_of_other_worlds_have_labels_of_their_own(tmp_path):
    config = ModelConfig(vocab_size=257, hidden_size=8, num_heads=2, head_dim=4)
    for name in "ab":
        fla.save(drawn(config), tmp_path / name)
    found = language_runs.open_language_models([str(tmp_path / "a")], dtype="bfloat16")
    assert [(label, trained) for label, _, trained, _ in found] == [("n_h = 2", None)]
    assert found[0].model.config.dtype == "bfloat16"
    found = language_runs.open_language_models([str(tmp_path / name) for name in "ab"])
    assert [one.label for one in found] == ["n_h = 2 (a)", "n_h = 2 (b)"]


def test_names_tell_texts_and_runs_apart_and_none_is_there_twice(tmp_path):
    assert language_runs.names_of_texts(["stdlib", "code/tokens"]) == ["stdlib", "tokens"]
    found = language_runs.names_of_texts(["a/code/tokens/", "a/prose/tokens"])
    assert found == ["code/tokens", "prose/tokens"]
    with pytest.raises(ConfigError, match=r"data has .*/tokens 2 times; once is enough"):
        language_runs.names_of_texts(["tokens", "./tokens"])
    with pytest.raises(ConfigError, match=r"runs has .*/a 2 times"):
        language_runs.open_language_models([str(tmp_path / "a"), str(tmp_path / "b" / ".." / "a")])


def test_a_model_reads_no_ids_of_another_tokenizer(tmp_path):
    (tmp_path / "text.txt").write_text("to be or not to be " * 20)
    fields = {"sources": (str(tmp_path / "text.txt"),), "workers": 1}
    fields |= {"tokenizer": "bpe", "valid_fraction": 0.0, "test_fraction": 0.0}
    for size in (258, 260):
        prepare(PrepareConfig(**fields, vocab_size=size), tmp_path / str(size))
    (kept,) = open_corpora(StreamConfig((str(tmp_path / "258"),)), "train")
    model = language_runs.LanguageModel("n_h = 2", None, 16, kept.tokenizer)
    asked = {"split": "train", "count": 2, "length": 8, "seed": 0, "models": [model]}
    assert language_runs.rows_of(str(tmp_path / "258"), **asked).rows.shape == (2, 9)
    with pytest.raises(ConfigError, match=r"data=.*260 was made by another tokenizer .* n_h = 2 "):
        language_runs.rows_of(str(tmp_path / "260"), **asked)
    asked["models"] = [model._replace(tokenizer=None)]  # not known, as of another project's
    assert language_runs.rows_of(str(tmp_path / "260"), **asked).rows.shape == (2, 9)


def test_a_figure_has_no_models_of_other_settings(tmp_path, monkeypatch, capsys):
    """As where some are there, and the others are trained with more steps."""
    argv = [f"--workdir={tmp_path}", "--sizes=8x2x4x8,12x3x4x8", "--factors=1"]

    def trains(config, folder, *_, **__):
        records = RunRecords(folder, config)
        score = {"length": 256, "loss": 2.0, "bits_per_byte": 2.9}
        records.write_results(
            {"steps": 1, "best_step": 1, "parameters": {"total": 9}, "test": [score]}
        )

    monkeypatch.setattr(scaling, "train", trains)
    monkeypatch.setattr(scaling, "draw_losses", lambda *_: None)
    assert flags.run(scaling.command, [*argv, "--only=8_1"]) == 0
    assert "1 of 2 models are trained" in capsys.readouterr().out
    for other in ("--batch_size=8", "--learning_rate=1e-4"):
        assert flags.run(scaling.command, [*argv, "--only=12_1", other]) == 2
        assert "8_1 holds a run with another configuration, differing in" in capsys.readouterr().err
    assert flags.run(scaling.command, [*argv, "--only=12_1"]) == 0
    assert "2 of 2 models are trained" in capsys.readouterr().out
    # What is wrong with a later model is said before one is trained.
    monkeypatch.setattr(scaling, "train", lambda *_, **__: pytest.fail("a model was trained"))
    shutil.rmtree(tmp_path / "runs/8_1")
    assert flags.run(scaling.command, [*argv, "--only=8_1", "--batch_size=8"]) == 2
    assert "12_1 holds a run with another configuration" in capsys.readouterr().err
    steps = ["--steps_of_sizes=90,9", "--warmup_steps=10", f"--workdir={tmp_path / 'new'}"]
    assert flags.run(scaling.command, [*argv[1:], *steps]) == 2
    assert "warmup_steps=10 must not exceed steps=9" in capsys.readouterr().err


@pytest.mark.slow
def test_models_are_trained_compared_and_looked_at(tmp_path, capsys):
    small = [
        "--sizes=8x2x4x8",
        "--factors=1,3",
        "--matched_by=heads",
        "--steps=2",
        "--batch_size=2",
    ]
    small += ["--train_length=16", "--eval_lengths=16", "--eval_every=2", "--checkpoint_every=2"]
    small += ["--eval_sequences=4", "--eval_batch_size=2", "--select_length=none"]
    small += ["--warmup_steps=0", "--num_layers=1"]
    folder = tmp_path / "scaling"
    assert scaling.command([f"--workdir={folder}", *small, "--only=8_1"]) is None
    assert "1 of 2 models are trained" in capsys.readouterr().out
    assert scaling.command([f"--workdir={folder}", *small]) is None
    rows = json.loads((folder / "scaling.json").read_text())["rows"]
    assert [row["name"] for row in rows] == ["8_1", "8_3_heads"]
    assert [(row["num_householder"], row["num_heads"]) for row in rows] == [(1, 2), (3, 1)]
    assert abs(rows[0]["parameters"] / rows[1]["parameters"] - 1) < 0.05
    runs = [str(folder / "runs" / row["name"]) for row in rows]
    out = tmp_path / "extrapolation"
    argv = [f"--workdir={out}", f"--runs={','.join(runs)}", "--length=64", "--rows=2"]
    length_extrapolation.command([*argv, "--piece=32", "--window=16"])
    first, second = json.loads((out / "extrapolation.json").read_text())["curves"]
    assert (first["label"], second["label"], first["trained"]) == ("n_h = 1", "n_h = 3", 16)
    assert first["position"] == [16, 32, 48, 64]
    out = tmp_path / "ranks"
    effective_rank.command([f"--workdir={out}", f"--run={runs[1]}", "--length=32", "--every=4"])
    with np.load(out / "ranks.npz") as file:
        assert file["block0"].shape == (8, 3, 1)
    for name in ("scaling/scaling", "extrapolation/extrapolation", "ranks/effective_rank"):
        assert (tmp_path / f"{name}.png").stat().st_size > 10_000


def test_a_shape_is_measured_apart(monkeypatch):
    """Or says why not."""
    config, shape = throughput.ThroughputConfig(), Shape(2, 1, 8)
    sizes = {"num_householder": 2, "num_heads": 1, "head_dim": 8}
    monkeypatch.setattr(training_steps, "apart", lambda function, *given: [{"ms": len(given)}])
    assert throughput.measure(config, shape) == {"ms": 7, **sizes}

    def refuse(function, *given):
        raise ConfigError("too large")

    monkeypatch.setattr(training_steps, "apart", refuse)
    row = throughput.measure(config, shape)
    assert row == {
        "implementation": training_steps.OURS,
        "error": "ConfigError: too large",
        **sizes,
    }


@pytest.mark.slow
def test_each_shape_is_trained_and_writes(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(training_steps, "apart", lambda function, *given: function(*given))
    argv = [f"--workdir={tmp_path}", "--preset=small", "--shapes=1x2x8,2x1x8", "--hidden_size=16"]
    argv += ["--length=8", "--num_layers=1", "--decode_rows=1,2", "--decode_tokens=4"]
    throughput.command([*argv, "--steps=2", "--repeats=2"])
    rows = json.loads((tmp_path / "throughput.json").read_text())["rows"]
    assert [row["num_householder"] for row in rows] == [1, 2]
    assert rows[0]["relative"] == 1
    assert rows[0]["tokens_per_s"] == pytest.approx(1e3 * 2 * 8 / rows[0]["median_ms"])
    assert all(ms > 0 for row in rows for ms in row["decoding_ms"].values())
    assert rows[0]["mfu"] is None  # of a CPU no peak is known
    assert (tmp_path / "throughput.png").stat().st_size > 10_000
    assert "| 2 | 1 | 8 |" in capsys.readouterr().out
