"""What is published beside ours: which number stands beside which row, and points that are seen."""

import json

import numpy as np
import pytest

from experiments import figures, redraw
from experiments.lib.figures import curves, published, style
from experiments.lib.run_records import Record

# (mixer, factors, range of eigenvalues) -> the published score of parity.
ROWS = {
    ("delta_net", 1, True): 1.0,
    ("delta_net", 1, False): 0.017,
    ("delta_net", 1, None): 1.0,  # what the mixer does by itself
    ("transformer", None, None): 0.022,
    ("slstm", None, None): 1.0,
    ("delta_product", 2, True): None,
    ("mamba2", None, False): None,  # the published one is Mamba
}


@pytest.fixture
def source(tmp_path):
    for index, (mixer, factors, reach) in enumerate(ROWS):
        for language in published.LANGUAGES[:2]:
            for seed in range(2):
                run = tmp_path / "runs" / f"{index}-{language}-{seed}"
                run.mkdir(parents=True)
                model = {"mixer": mixer, "num_householder": factors, "allow_neg_eigval": reach}
                config = {"task": {"language": language}, "model": model, "train": {"seed": seed}}
                (run / "config.json").write_text(json.dumps(config))
                strict = {"scaled_accuracy": index / 10 + seed / 20}
                strict |= {"sequence_accuracy": 0.5, "cumulative": [0.5]}
                entries = [{"length": 256, "loss": 1, "strict": strict}]
                results = {"steps": 1, "best_step": 1, "parameters": {"total": 7}, "test": entries}
                (run / "results.json").write_text(json.dumps(results))
    return tmp_path / "runs"


def test_published_scores_stand_in_the_row_of_their_mixer(source, tmp_path, capsys):
    out = tmp_path / "out"
    flags = [f"--workdir={out}", f"--source={source}"]
    assert figures.main([*flags, "--preset=paper_languages"]) == 0
    record = json.loads((out / "paper_languages.json").read_text())
    found = {}
    for row in record["rows"]:
        reach = {"true": True, "false": False, "none": None}[row["allow_neg_eigval"]]
        factors = None if row["num_householder"] == "none" else int(row["num_householder"])
        found[row["mixer"], factors, reach] = row["parity published"]
        index = list(ROWS).index((row["mixer"], factors, reach))
        assert row["parity median"] == pytest.approx(index / 10 + 0.025)
        assert row["parity best"] == pytest.approx(index / 10 + 0.05)
    assert found == ROWS
    table = (out / "paper_languages.md").read_text()
    assert "| delta_net | 1 | false | 0.125 | 0.150 | 0.314 | 0.125 | 0.150 | 0.017 |" in table
    picture = (out / "paper_languages.png").read_bytes()
    redraw.command([f"--workdir={out}"])
    assert (out / "paper_languages.png").read_bytes() == picture
    # Runs of two ranges in one row have no number of either.
    assert figures.main([*flags, "--preset=paper_languages", "--by=mixer"]) == 0
    rows = json.loads((out / "paper_languages.json").read_text())["rows"]
    assert {row["mixer"]: row["parity published"] for row in rows}["delta_net"] is None
    for wrong in ("--by=seed", "--metric=strict.token_accuracy", "--length=40", "--x=seed"):
        assert figures.main([*flags, "--preset=paper_languages", wrong]) == 2
        assert "published=True needs" in capsys.readouterr().err
    asked = {"x": "language", "by": ["mixer"], "metric": None, "length": None}
    assert [published.keys_fit(kind, **asked) for kind in ("table", "escape")] == [True, False]


@pytest.mark.parametrize("last", [0.9, 0.02])
def test_published_points_are_seen_where_no_run_comes_to(last):
    run = np.linspace(1, last, 65).tolist()
    panels = {"group = S5": {"n_h = 4": {"median": run, "runs": [run]}}}
    record = {"panels": panels, "trained": dict.fromkeys(panels, 8), "band": False}
    record |= {"metric": "strict.cumulative", "published": published.published_points(panels, [])}
    axes = curves.draw_panels(record, style.Look()).axes[0]
    (hollow,) = (x for x in axes.lines if x.get_fillstyle() == "none" and len(x.get_xdata()))
    for values, (low, high) in (
        (hollow.get_xdata(), axes.get_xlim()),
        (hollow.get_ydata(), axes.get_ylim()),
    ):
        assert low <= min(values) <= max(values) <= high


def of(length, **settings):
    return Record("r", settings, {"test": [{"length": length}]})


def test_nothing_published_stands_beside_runs_of_another_protocol():
    panels = {"group = S5": {"n_h = 4": None, "n_h = 3": None}}
    long, short = (of(512, group="S5", num_householder=4, train_length=n) for n in (128, 16))
    points = lambda *records: list(published.published_points(panels, records)["group = S5"])
    assert points(long) == ["n_h = 4", "n_h = 3"]
    assert points(long, short) == ["n_h = 3"]
    as_published = {"train_length": 128, "num_layers": 1, "max_displaced": None}
    as_published |= {"merge_elements": 1, "repeat_elements": 1}
    three = lambda **other: of(512, group="S5", num_householder=3, **as_published | other)
    assert points(long, three()) == ["n_h = 4", "n_h = 3"]
    for name in as_published:
        assert points(long, three(**{name: 2})) == ["n_h = 4"]
    kinds = {"mixer": "slstm", "allow_neg_eigval": None, "train_length": 40}
    parity = of(256, language="parity", **kinds)
    brackets = {"language": "modular_arithmetic_brackets"} | kinds
    scores = lambda *records: published.published_scores(records, None)
    assert scores(parity, of(256, **brackets)).keys() == set(published.LANGUAGES)
    times = of(256, **brackets, bracket_multiplication=True)
    assert scores(parity, times).keys() == {"parity", "modular_arithmetic"}
    assert "parity" not in scores(of(512, language="parity", **kinds))
    as_published = {"train_length": 40, "min_train_length": 3, "min_eval_length": 40}
    assert "parity" in scores(of(256, language="parity", **kinds | as_published))
    for name in as_published:
        assert "parity" not in scores(of(256, language="parity", **kinds | {name: 64}))


def test_where_nothing_is_published_is_said(source, tmp_path, capsys):
    flags = [f"--workdir={tmp_path}", f"--source={source}", "--preset=paper_languages"]
    assert figures.main([*flags, "--where=mixer=mamba2"]) == 0
    assert "note: nothing is published of runs with these settings" in capsys.readouterr().err
    assert figures.main([*flags, "--where=mixer=slstm"]) == 0
    assert "nothing is published" not in capsys.readouterr().err
