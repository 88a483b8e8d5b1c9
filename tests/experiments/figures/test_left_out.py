"""Runs without results: what tables and pictures say of them, cell by cell."""

import json
import shutil

import pytest

from experiments import figures, redraw
from experiments.lib import run_records
from experiments.lib.figures import curves, style


def add_run(folder, name, settings, *, steps=None, results=False):
    run = folder / name
    run.mkdir(parents=True)
    train = {"seed": settings["seed"], "steps": 4000}
    model = {"mixer": "delta_product", "num_householder": settings["n_h"]}
    task = {"group": settings["group"], "train_length": 4}
    config = {"task": task, "model": model, "train": train}
    (run / "config.json").write_text(json.dumps(config))
    if steps is not None:
        row = {"step": steps, "accuracy": 0.5, "tokens": 8, "tokens_per_second": 1, "time": 1}
        (run / "metrics.jsonl").write_text(json.dumps(row) + "\n")
    if results:
        score = {"sequence_accuracy": 0.5, "cumulative": [1.0, 0.5]}
        found = {"steps": 4000, "best_step": 1, "parameters": {"total": 7}}
        found["test"] = [{"length": 8, "loss": 1, "strict": score}]
        (run / "results.json").write_text(json.dumps(found))
    return {"name": name, "settings": {}, "keys": [], "config": config}


@pytest.fixture
def source(tmp_path):
    """A sweep of S3 and S5: of S5 one run ended, two are under way, one was not begun."""
    folder = tmp_path / "s" / "runs"
    s5, s3 = {"group": "S5", "n_h": 4}, {"group": "S3", "n_h": 2, "seed": 0}
    runs = [
        add_run(folder, "s3", s3, results=True),
        add_run(folder, "a", s5 | {"seed": 0}, steps=4000, results=True),
        add_run(folder, "b", s5 | {"seed": 1}, steps=1200),
        add_run(folder, "c", s5 | {"seed": 2}, steps=20),
        add_run(folder, "d", s5 | {"seed": 3}),
        add_run(folder, "e", s5 | {"n_h": 1, "seed": 0}),
    ]
    for file in (folder / "e").iterdir():
        file.unlink()
    (folder / "e").rmdir()
    (folder.parent / "runs.json").write_text(json.dumps({"script": "x", "runs": runs}))
    return folder.parent


def note_of(source, *wanted, **keys):
    return run_records.left_out(run_records.read_runs(source), *wanted, **keys)


SAYS = (
    "4 of 6 runs have no results and are left out: group = S5, n_h = 1: 1 of 1; "
    "group = S5, n_h = 4: 3 of 4, 2 of them at step 20 to 1,200 of 4,000"
)


def test_what_is_left_out_is_counted_by_cell(source):
    keys = ["group", "num_householder"]
    assert note_of(source, keys=keys) == SAYS
    assert note_of(source, "group=S3", keys) is None  # of what is shown, all is there
    assert note_of(source, "seed=2", keys) == (
        "1 of 1 runs have no results and are left out: group = S5, n_h = 4: 1 of 1, at step 20 of "
        "4,000"
    )
    assert note_of(source, keys=["nothing", "group"]).startswith("4 of 6 runs")
    # Of a folder of runs nobody knows what else there was to be.
    assert note_of(source / "runs").startswith("3 of 5 runs")
    (source.parent / "some.csv").symlink_to(source)  # a folder of such a name
    assert note_of(source.parent / "some.csv", keys=keys) == SAYS
    lines = "run,group,num_householder\na,S5,4\nb,S5,4\ngone,S5,3\n"
    (source / "some.csv").write_text(lines)
    assert note_of(source / "some.csv", keys=keys) == (
        "2 of 3 runs have no results and are left out: group = S5, n_h = 3: 1 of 1; "
        "group = S5, n_h = 4: 1 of 2, at step 1,200 of 4,000"
    )


def test_there_are_no_more_cells_than_a_figure_has_room_for(tmp_path):
    for seed in range(run_records.MOST_NAMED + 2):
        add_run(tmp_path, f"x{seed}", {"group": "S3", "n_h": 1, "seed": seed}, results=not seed)
    note = note_of(tmp_path, keys=["seed"])
    assert note.count("1 of 1") == run_records.MOST_NAMED
    assert note.endswith("; ...")


@pytest.mark.parametrize("kind", ["cumulative", "table", "escape"])
def test_a_picture_says_what_it_leaves_out(kind, source, tmp_path, capsys):
    flags = [f"--workdir={tmp_path}", f"--source={source}", f"--kind={kind}", "--name=x"]
    flags += ["--metric=strict.sequence_accuracy"] if kind == "table" else []
    assert figures.main(flags) == 0
    assert SAYS in capsys.readouterr().err
    record = json.loads((tmp_path / "x.json").read_text())
    assert record["left_out"] == SAYS
    draw = {"cumulative": curves.draw_panels, "table": curves.scores_of, "escape": curves.bars_of}
    for look in (style.Look(), style.Look(width="column")):
        figure = draw[kind](record, look)
        texts = [legend.get_title().get_text() for legend in figure.legends]
        (note,) = (t for t in [*texts, figure.get_supxlabel()] if "4 of 6 runs have no" in t)
        figure.draw_without_rendering()
        boxes = [artist.get_tightbbox() for artist in [*figure.legends, *figure.axes]]
        boxes += [text.get_window_extent() for text in figure.texts if text.get_text()]
        assert all(figure.bbox.x0 <= box.x0 and box.x1 <= figure.bbox.x1 for box in boxes)
        said = " ".join(note.replace("\N{NO-BREAK SPACE}", " ").split())
        assert "S5, $n_h$ = 4: 3 of 4, 2 of them at step 20 to 1,200 of 4,000" in said
    if kind != "cumulative":
        assert (tmp_path / "x.md").read_text().endswith(f"Note: {SAYS}.\n")


def test_it_is_said_again_when_drawn_again_and_not_where_all_have_ended(source, tmp_path):
    flags = [f"--workdir={tmp_path}", f"--source={source}", "--name=x"]
    assert figures.main(flags) == 0
    picture = (tmp_path / "x.png").read_bytes()
    redraw.command([f"--workdir={tmp_path}"])
    assert (tmp_path / "x.png").read_bytes() == picture
    assert figures.main([*flags, "--where=group=S3"]) == 0
    assert "left_out" not in json.loads((tmp_path / "x.json").read_text())


def test_a_run_in_the_place_of_another_is_not_shown_as_that(source, tmp_path, capsys):
    config = json.loads((source / "runs" / "a" / "config.json").read_text())
    config["model"]["num_householder"] = 3
    (source / "runs" / "a" / "config.json").write_text(json.dumps(config))
    assert figures.main([f"--workdir={tmp_path}", f"--source={source}"]) == 2
    says = "holds another run, differing in num_householder (3 there, 4 in runs.json)"
    assert says in capsys.readouterr().err


def test_a_run_that_is_there_twice_does_not_count_twice(source, tmp_path, capsys):
    flags = [f"--workdir={tmp_path}", "--where=group=S5"]
    shutil.copytree(source / "runs" / "a", source / "runs" / "copy")
    assert figures.main([*flags, f"--source={source / 'runs'}"]) == 2
    assert "has one run twice, a and copy, which would count as two" in capsys.readouterr().err
    (source / "some.csv").write_text("run\na\nb\na\n")
    assert figures.main([*flags, f"--source={source / 'some.csv'}"]) == 2
    assert "some.csv' has run='a' twice" in capsys.readouterr().err
    saved = json.loads((source / "runs.json").read_text())
    saved["runs"].append(saved["runs"][1])
    (source / "runs.json").write_text(json.dumps(saved))
    assert figures.main([*flags, f"--source={source}"]) == 2
    assert "runs.json: runs[6].name='a' is there twice" in capsys.readouterr().err
