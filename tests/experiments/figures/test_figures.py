"""Figures and tables from records: medians, fractions and curves are those of the files."""

import csv
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from tiny_run import flags_for

from deltaproduct_jax.errors import ConfigError
from experiments import figures as paper_figures
from experiments.lib import flags, run_records
from experiments.lib.bench import report
from experiments.lib.figures import curves, published, style

ROOT = Path(__file__).resolve().parents[3]
# (group, n_h, seed) -> sequence accuracy at 8, of which that at 4 is twice.
ACCURACY = {
    ("S3", 1, 0): 0.0, ("S3", 1, 1): 0.1, ("S3", 1, 2): 0.05,
    ("S3", 2, 0): 0.5, ("S3", 2, 1): 0.4, ("S3", 2, 2): 0.1,
    ("A5", 2, 0): 0.45, ("A5", 2, 1): 0.05,
}  # fmt: skip


def add_run(folder, name, settings, accuracy):
    run = folder / name
    run.mkdir(parents=True)
    config = {
        "task": {"group": settings["group"], "train_length": 2, "eval_lengths": [4, 8]},
        "model": {"num_householder": settings["n_h"], "num_layers": 1, "chunk_size": None}
        | {"mixer": settings.get("mixer", "delta_product")},
        "train": {"seed": settings["seed"]},
    }
    (run / "config.json").write_text(json.dumps(config))
    if accuracy is None:
        return
    entries = []
    for length, value in ((4, 2 * accuracy), (8, accuracy)):
        cumulative = np.linspace(1, value, length + 1).tolist()
        strict = {
            "sequence_accuracy": value,
            "cumulative": cumulative,
            "scaled_accuracy": value / 2,
        }
        entries.append({"length": length, "loss": 1, "strict": strict})
    results = {"steps": 3, "best_step": 3, "parameters": {"total": 7}, "test": entries}
    (run / "results.json").write_text(json.dumps(results))


def finished(source):
    return run_records.finished(run_records.read_runs(source))


@pytest.fixture
def source(tmp_path):
    for (group, n_h, seed), accuracy in ACCURACY.items():
        settings = {"group": group, "n_h": n_h, "seed": seed}
        add_run(tmp_path / "s" / "runs", f"{group}-{n_h}-{seed}", settings, accuracy)
    add_run(tmp_path / "s" / "runs", "unfinished", {"group": "A5", "n_h": 2, "seed": 2}, None)
    names = [path.name for path in sorted((tmp_path / "s" / "runs").iterdir())]
    runs = [{"name": n, "settings": {}, "keys": [], "config": {}} for n in names]
    (tmp_path / "s" / "runs.json").write_text(json.dumps({"script": "x", "runs": runs}))
    return tmp_path / "s"


def draw(source, out, *arguments):
    return flags.run(paper_figures.command, [f"--source={source}", f"--workdir={out}", *arguments])


def test_curves_are_medians_over_seeds(source, tmp_path, capsys):
    assert draw(source, tmp_path / "out", "--preset=factors") == 0
    assert (tmp_path / "out" / "factors.png").read_bytes().startswith(b"\x89PNG")
    record = json.loads((tmp_path / "out" / "factors.json").read_text())
    assert list(record["trained"].items()) == [("group = S3", 2), ("group = A5", 2)]
    drawn = record["panels"]
    assert list(drawn) == ["group = S3", "group = A5"]  # not by the names of runs
    assert list(drawn["group = S3"]) == ["n_h = 1", "n_h = 2"]
    assert list(drawn["group = A5"]) == ["n_h = 2"]
    curves = drawn["group = S3"]["n_h = 2"]
    np.testing.assert_allclose(curves["median"], np.linspace(1, 0.4, 9))
    assert sorted(run[-1] for run in curves["runs"]) == [0.1, 0.4, 0.5]
    assert draw(source, tmp_path / "out", "--preset=factors", "--length=4", "--name=four") == 0
    drawn = json.loads((tmp_path / "out" / "four.json").read_text())["panels"]
    np.testing.assert_allclose(drawn["group = S3"]["n_h = 2"]["median"], np.linspace(1, 0.8, 5))


def test_published_points_stand_beside_their_curve():
    curve = {"median": [1, 0.5], "runs": [[1, 0.5]]}
    panels = {"group = S5": {"n_h = 3": curve, "n_h = 5": curve}, "group = S3": {"n_h = 3": curve}}
    found = published.published_points(panels, [])
    assert found == {"group = S5": {"n_h = 3": [(17, 0.5), (55, 0.0)]}, "group = S3": {}}
    record = {"panels": panels, "trained": dict.fromkeys(panels, 1), "band": False}
    look = style.Look()
    figure = curves.draw_panels(record | {"metric": "strict.cumulative", "published": found}, look)
    of_panels = [[x for x in a.lines if x.get_fillstyle() == "none"] for a in figure.axes]
    ([hollow], [key]) = of_panels
    assert (key.get_label(), len(key.get_xdata())) == ("published", 0)
    assert hollow.get_xydata().tolist() == [[17, 0.5], [55, 0]]
    assert hollow.get_color() == style.series(0)["color"]


def test_factors_left_to_the_mixer_count_as_what_they_were(tmp_path):
    mixers = {"delta_net": "1", "gated_delta_product": "2", "gla": "none"}
    for mixer in mixers:
        settings = {"group": "S3", "n_h": None, "seed": 0, "mixer": mixer}
        add_run(tmp_path, mixer, settings, 0.5)
    records = finished(tmp_path)
    assert {r.value("mixer"): r.value("num_householder") for r in records} == mixers


@pytest.mark.parametrize("band", [False, True])
def test_what_is_drawn_is_what_was_given(band):
    runs = np.array([[1, 0.5, 0.1], [1, 0.7, 0.3], [1, 0.9, 0.8]])
    axes = Figure().subplots()
    curves.draw_curves(axes, {"a": runs, "b": runs[:1]}, ["b", "a"], band=band)
    thick = [line for line in axes.lines if line.get_linewidth() > 1]
    np.testing.assert_array_equal(thick[0].get_ydata(), [1, 0.7, 0.3])
    assert [line.get_label() for line in thick] == ["a", "b"]
    assert [line.get_color() for line in thick] == [*style.COLORS[1::-1]]  # as in other panels
    thin = [line.get_ydata().tolist() for line in axes.lines if line.get_linewidth() < 1]
    assert thin == ([] if band else runs.tolist())
    assert len(axes.collections) == (2 if band else 0)
    if band:
        corners = axes.collections[0].get_paths()[0].vertices
        assert {(2.0, 0.1), (2.0, 0.8)} <= set(map(tuple, corners.round(6).tolist()))


def test_the_table_has_median_and_best(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert draw(source, out, "--preset=languages", "--x=group", "--by=num_householder") == 0
    rows = list(csv.DictReader((out / "languages.csv").read_text().splitlines()))
    assert [row["num_householder"] for row in rows] == ["1", "2"]
    got = {name: rows[1][f"S3 {name}"] for name in ("median", "best", "runs")}
    assert {name: float(value) for name, value in got.items()} == {
        "median": 0.2, "best": 0.25, "runs": 3,
    }  # fmt: skip
    assert rows[0]["A5 median"] == ""
    text = (out / "languages.md").read_text()
    assert text.splitlines() == [
        "| num_householder | S3 median | S3 best | S3 runs | A5 median | A5 best | A5 runs |",
        "| --- | --- | --- | --- | --- | --- | --- |",
        "| 1 | 0.025 | 0.050 | 3 | - | - | 0 |",
        "| 2 | 0.200 | 0.250 | 3 | 0.125 | 0.225 | 2 |",
        "",
        "Note: 1 of 9 runs have no results and are left out: group = A5, n_h = 2: 1 of 3.",
    ]
    assert text in capsys.readouterr().out


def test_escapes_are_counted(source, tmp_path, capsys):
    out = tmp_path / "out"
    assert draw(source, out, "--preset=escape", "--threshold=0.4") == 0
    assert (out / "escape.md").read_text().splitlines()[2:] == [
        "| 1 | 0/3 | - |",
        "| 2 | 2/3 | 1/2 |",
        "",
        "Note: 1 of 9 runs have no results and are left out: group = A5, n_h = 2: 1 of 3.",
    ]
    assert (out / "escape.png").read_bytes().startswith(b"\x89PNG")
    assert (
        "strict.sequence_accuracy of at least 0.4 at the longest length" in capsys.readouterr().out
    )
    assert draw(source, out, "--preset=escape", "--length=4", "--by=seed") == 0  # from 0.9
    rows = list(csv.DictReader((out / "escape.csv").read_text().splitlines()))
    assert [(row["seed"], row["A5 escaped"], row["A5 runs"]) for row in rows] == [
        ("0", "1", "1"), ("1", "0", "1"), ("2", "0", "0"),
    ]  # fmt: skip
    assert [(row["S3 escaped"], row["S3 runs"]) for row in rows] == [
        ("1", "2"),
        ("0", "2"),
        ("0", "2"),
    ]


def test_points_of_a_table_are_its_medians_and_bests():
    rows = [
        {"mixer": "gla", "S3 median": 0.5, "S3 best": 0.75, "S3 runs": 2, "A5 median": None,
         "A5 best": None, "A5 runs": 0},
        {"mixer": "mamba2", "S3 median": 0.25, "S3 best": 1.0, "S3 runs": 2, "A5 median": 0.1,
         "A5 best": 0.1, "A5 runs": 1},
    ]  # fmt: skip
    record = {"rows": rows, "by": ["mixer"], "x": "group", "length": 4}
    figure = curves.scores_of(record | {"metric": "strict.token_accuracy"}, style.Look())
    s3, a5 = figure.axes
    drawn = [[line.get_xydata().tolist() for line in axes.lines] for axes in (s3, a5)]
    assert drawn == [
        [[[0.5, 0], [0.25, 1]], [[0.75, 0], [1.0, 1]]],
        [[[0.1, 1]], [[0.1, 1]]],
    ]
    assert [text.get_text() for text in s3.get_yticklabels()] == ["GLA", "Mamba-2"]
    assert figure.get_suptitle() == "answers right at 4 tokens"


def test_bars_are_as_long_as_their_fraction():
    rows = [
        {"n": "1", "S3 escaped": 1, "S3 runs": 4, "A5 escaped": 0, "A5 runs": 0},
        {"n": "2", "S3 escaped": 4, "S3 runs": 4, "A5 escaped": 1, "A5 runs": 2},
    ]
    s3, a5 = Figure().subplots(1, 2)
    for axes, group in ((s3, "S3"), (a5, "A5")):
        curves.draw_bars(axes, rows, ["n"], group)
    assert [bar.get_width() for bar in s3.patches] == [0.25, 1]
    assert [bar.get_center()[1] for bar in s3.patches] == pytest.approx([0, 1])
    assert [bar.get_width() for bar in a5.patches] == [0.5]
    assert [bar.get_center()[1] for bar in a5.patches] == pytest.approx([1])
    assert [text.get_text() for text in [*s3.texts, *a5.texts]] == ["1/4", "4/4", "1/2"]
    assert s3.get_ylim()[0] > s3.get_ylim()[1]  # the first row at the top


def test_sources(source, tmp_path):
    whole = finished(source)
    assert len(whole) == len(ACCURACY)
    assert {r.name for r in finished(source / "runs")} == {r.name for r in whole}
    (source / "some.csv").write_text("run,state\nS3-1-0,done\nunfinished,started\nA5-2-1,done\n")
    some = finished(source / "some.csv")
    assert [record.name for record in some] == ["S3-1-0", "A5-2-1"]
    assert some[0].value("eval_lengths") == "4,8"
    assert some[0].value("chunk_size") == "none"


def test_groups_are_in_the_order_of_numbers_and_of_the_grid():
    def record(value):
        return run_records.Record("r", {"key": value}, {})

    values = [10, "Z5", None, 9, "S4", 0.5, "D4", "S10", "A5", "A4", "S3", "S5", "A5_x_Z9"]
    groups = run_records.grouped([record(value) for value in values], ["key"])
    shown = "0.5 9 10 S3 A4 S4 A5 S5 S10 Z5 D4 A5_x_Z9 none"
    assert [value for (value,) in groups] == shown.split()
    assert run_records.label(["num_householder", "group"], ("2", "S3")) == "n_h = 2, group = S3"


def test_where_leaves_what_it_says(source):
    records = finished(source)
    chosen = run_records.choose(records, "group=S3;seed=0:2;num_householder=2")
    assert [record.name for record in chosen] == ["S3-2-0", "S3-2-1"]
    with pytest.raises(ConfigError, match=r"where='group=S9' leaves no run; there are .*A5.*S3"):
        run_records.choose(records, "group=S9")


ERRORS = {
    "no source": (["--source="], "--source is missing; give the folder"),
    "nothing there": (["--source=absent"], "source='absent' holds no finished run"),
    "no csv": (["--source=absent.csv"], r"source='absent\.csv' cannot be read: No such file"),
    "published points": (
        ["--preset=paper", "--by=seed"],
        "published=True needs kind=cumulative, x=group and by=num_householder, or .* by=seed",
    ),
    "unknown kind": (["--kind=pie"], "kind='pie' is not known; it may be one of"),
    "unknown setting": (["--x=grup"], "'grup' is no setting of run .*; did you mean 'group'"),
    "unknown row": (["--by=sead"], "'sead' is no setting of run .*; did you mean 'seed'"),
    "both": (["--by=group"], "x='group' is among by='group' too"),
    "length": (["--length=5"], "length=5 was not tested in run .*; it may be 4, 8"),
    "no number": (
        ["--kind=escape", "--metric=strict.x"],
        r"metric='strict\.x' is not in the results of run .*; it may be one of .*scaled_accuracy",
    ),
    "no curve": (["--metric=loss"], "metric='loss' is no curve in the results of run"),
    "idle threshold": (["--threshold=0.5"], "threshold=0.5 needs kind=escape"),
    "idle band": (["--kind=table", "--band"], "band=True needs kind=cumulative"),
    "no threshold": (["--kind=escape", "--threshold=nan"], "threshold=nan must be a finite number"),
    "no name": (["--name="], "name='' must be the name of a file"),
    "a key twice": (["--by=seed,group,seed", "--x=n"], "by='seed,group,seed' has 'seed' twice"),
    "the folder above": (["--name=.."], r"name='\.\.' must be the name of a file"),
    "a folder": (["--name=../x"], r"name='\.\./x' must be the name of a file, without folders"),
    "bad filter": (["--where=seed"], "--where='seed': 'seed' must be key=value"),
}


DAMAGED = [
    ("results.json", b"{}", r"results\.json: \w+ is missing"),
    ("results.json", b"\xff", r"results\.json is not valid JSON"),
    ("config.json", b"[]", r"config\.json: \[\] must be an object"),
    ("config.json", b'{"task": "S3"}', r"config\.json: task='S3' must be an object"),
    ("config.json", b'{"a": ' * 100_000, r"config\.json is nested too deeply"),
    ("cumulative", ["a", 0.5], "metric='strict.cumulative' is no curve"),
    ("cumulative", [], "metric='strict.cumulative' is no curve"),
    (
        "token_accuracy",
        None,
        r"results\.json: test\[0\]\.strict\.token_accuracy=None must be a fin",
    ),
    ("length", "4", r"results\.json: test\[0\]\.length='4' must be a whole number"),
]


@pytest.mark.parametrize(("what", "content", "says"), DAMAGED)
def test_damaged_records_are_one_line(what, content, says, source, tmp_path, capsys):
    run = source / "runs" / "S3-2-0"
    if isinstance(content, bytes):
        (run / what).write_bytes(content)
    else:
        results = json.loads((run / "results.json").read_text())
        for entry in results["test"]:
            (entry if what == "length" else entry["strict"])[what] = content
        (run / "results.json").write_text(json.dumps(results))
    assert draw(source, tmp_path / "out") == 2
    error = capsys.readouterr().err
    assert re.search(says, error)
    assert error.count("\n") == 1


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ("run\n../../evil\n", "run='../../evil' is no name of a run's folder"),
        ("name\nx\n", "has no column 'run'"),
        ("run\n\xff\xfe", "is no table: 'utf-8' codec"),
    ],
)
def test_a_damaged_table_of_runs_is_one_line(content, says, tmp_path, capsys):
    (tmp_path / "results.csv").write_bytes(content.encode("latin1"))
    assert draw(tmp_path / "results.csv", tmp_path / "out") == 2
    assert says in capsys.readouterr().err


@pytest.mark.parametrize("case", ERRORS)
def test_errors_are_one_line(case, source, tmp_path, capsys, monkeypatch):
    arguments, says = ERRORS[case]
    monkeypatch.chdir(tmp_path)
    assert draw(source, "out", *arguments) == 2
    error = capsys.readouterr().err
    assert re.search(says, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_curves_of_several_lengths_are_refused(source, tmp_path, capsys):
    results = source / "runs" / "S3-2-0" / "results.json"
    content = json.loads(results.read_text())
    content["test"].pop()
    results.write_text(json.dumps(content))
    assert draw(source, tmp_path / "out") == 2
    assert "were tested at different lengths; give --length" in capsys.readouterr().err
    assert draw(source, tmp_path / "out", "--length=4") == 0


# In a process where no module of matplotlib is to be had.
WITHOUT_MATPLOTLIB = """
import contextlib, io, sys
sys.modules["matplotlib"] = None
from experiments import figures, quickstart, state_tracking
from experiments.lib.figures import benchmarks, geometry, theory
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()) as said:
    state_tracking.main(["--help"])
assert "--num_householder" in said.getvalue()
assert state_tracking.main([f"--workdir={sys.argv[1]}", *sys.argv[4:]]) == 0
figures.main([f"--source={sys.argv[2]}", f"--workdir={sys.argv[3]}", "--kind=table"])
sys.exit(figures.main([f"--source={sys.argv[2]}", f"--workdir={sys.argv[3]}"]))
"""


@pytest.mark.slow
def test_training_and_tables_go_without_matplotlib(source, tmp_path):
    run, out = tmp_path / "run", tmp_path / "out"
    sizes = {"num_heads": 1, "head_dim": 4, "intermediate_size": 8, "implementation": "recurrent"}
    _, *small = flags_for(run, **sizes, steps=2, eval_lengths=(4,))
    command = [sys.executable, "-c", WITHOUT_MATPLOTLIB, str(run), str(source), str(out), *small]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 2, done.stderr  # of the last command, which is there to draw
    missing = "no figure is drawn: package matplotlib is not installed; install it by pip install"
    notes = [line for line in done.stderr.splitlines() if "matplotlib" in line]
    assert [line.partition(missing)[:2] for line in notes] == [
        ("note: ", missing),
        ("error: ", missing),  # of the table, which is written by then
        ("error: ", missing),
    ]
    assert "Traceback" not in done.stderr
    assert "best checkpoint: step" in done.stdout
    assert json.loads((run / "results.json").read_text())["steps"] == 2
    assert not (run / "cumulative.png").exists()
    assert {path.name for path in out.iterdir()} == {
        *("table.csv", "table.md", "table.json"),
        "cumulative.json",
    }


def test_it_is_a_script_and_markdown_is_markdown(source, tmp_path):
    command = [sys.executable, "-m", "experiments.figures", f"--source={source}", "--band"]
    command.append(f"--workdir={tmp_path / 'out'}")
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert [line.rsplit(".")[-1] for line in done.stdout.splitlines()] == ["json", "png"]
    assert report.markdown(["a", "b"], [["1", None]]) == "| a | b |\n| --- | --- |\n| 1 | - |"
