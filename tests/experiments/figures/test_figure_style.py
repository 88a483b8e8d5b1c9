"""What a figure looks like: files, widths, one legend, no colour needed, names, and its flags."""

import importlib
import io
import itertools
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest
from matplotlib.text import Text
from PIL import Image
from tiny_run import TinyModel, flags_for

from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.theory import CATALOGUE
from deltaproduct_jax.training import loop
from experiments import redraw, state_tracking
from experiments.lib import flags
from experiments.lib.figures import curves, margin, names, records, style
from experiments.lib.figures.style import Look

ROOT = Path(__file__).resolve().parents[3]
RESULTS = ROOT / "experiments" / "results"
BEGIN = {"png": b"\x89PNG", "pdf": b"%PDF", "svg": b"<?xml"}


def record(panels=2, series=3, runs=2, lowest=0.0):
    """Of curves that fall from 1 over 33 positions."""
    fall = [np.linspace(1, lowest, 33).tolist() for _ in range(runs)]
    of_panel = {f"n_h = {n}": {"median": fall[0], "runs": fall} for n in range(1, series + 1)}
    titles = [f"group = S{n}" for n in range(3, 3 + panels)]
    return {
        "figure": "cumulative", "metric": curves.CURVE, "band": False,
        "trained": dict.fromkeys(titles, 8), "panels": dict.fromkeys(titles, of_panel),
    }  # fmt: skip


def write(folder, content, name="cumulative"):
    folder.mkdir(exist_ok=True)
    (folder / f"{name}.json").write_text(json.dumps(content))
    return folder


@pytest.mark.parametrize(
    ("panels", "columns", "lines"), [(1, 3, (1, 1)), (3, 3, (1, 3)), (4, 3, (2, 2)), (9, 4, (3, 3))]
)
def test_panels_fill_their_lines_evenly(panels, columns, lines):
    assert Look(width="page").grid(panels, columns) == lines
    assert Look(width="column").grid(panels, columns)[1] <= 2


def test_every_format_is_written_and_nothing_else(tmp_path, capsys):
    folder = write(tmp_path / "a", record(panels=1))
    redraw.command([f"--workdir={folder}", "--format=pdf,svg,png,pdf"])
    assert len(capsys.readouterr().out.splitlines()) == 3
    written = {path.suffix[1:]: path for path in folder.iterdir() if path.suffix != ".json"}
    assert written.keys() == BEGIN.keys()
    for name, path in written.items():
        assert path.read_bytes().startswith(BEGIN[name])
    again = {name: path.read_bytes() for name, path in written.items()}
    redraw.command([f"--workdir={folder}", "--format=pdf,svg"])
    assert all(written[name].read_bytes() == again[name] for name in ("pdf", "svg"))
    assert b"/Type3" not in again["pdf"]


@pytest.mark.parametrize(("panels", "given", "inches"), [
    (1, [], 3.3), (2, [], 6.9), (2, ["--width=column"], 3.3), (1, ["--width=page"], 6.9),
])  # fmt: skip
def test_a_figure_is_as_wide_as_said(panels, given, inches, tmp_path, capsys):
    redraw.command([f"--workdir={write(tmp_path / 'a', record(panels))}", *given])
    with Image.open(tmp_path / "a" / "cumulative.png") as picture:
        assert picture.size[0] == pytest.approx(inches * style.DPI, abs=1)


@pytest.mark.parametrize(
    ("flag", "says"),
    [
        ("--format=gif", "format='gif' is not known; it may be one of ['png', 'pdf', 'svg']"),
        ("--format=png,", "flag --format=png,: it must be"),
        ("--format=", "format"),
        ("--width=7", "width='7' is not known; it may be one of ['column', 'page']"),
    ],
)
def test_bad_values_are_refused_in_one_line(flag, says, tmp_path, capsys):
    assert flags.run(redraw.command, [f"--workdir={tmp_path}", flag]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert says in line


@pytest.mark.parametrize("content", [7, [], [1], [{"construction": "S3"}], {"rows": []}])
def test_what_only_has_the_name_of_a_record_is_passed_over(content, tmp_path, capsys):
    for name in ("results", "speed", "margin"):
        write(tmp_path, content, name)
    assert flags.run(redraw.command, [f"--workdir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert "holds no record that can be drawn" in line


@pytest.mark.parametrize("content", [b"", b"\n", b'{"a"', b"7\n", b"\xff\n"])
def test_damaged_records_of_runs_are_one_line(content, tmp_path, capsys):
    (tmp_path / "metrics.jsonl").write_bytes(content)
    (tmp_path / "other.json").write_bytes(content)  # another command's
    assert flags.run(redraw.command, [f"--workdir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    says = (
        "metrics.jsonl, line 1" if content.endswith(b"\n") else "holds no record that can be drawn"
    )
    assert says in line


def scripts_that_draw():
    """Modules of experiments that import how something is drawn."""
    found = []
    for path in sorted((ROOT / "experiments").rglob("*.py")):
        text = path.read_text()
        if "lib" not in path.parts and "experiments.lib.figures" in text:
            found.append(".".join(path.relative_to(ROOT).with_suffix("").parts))
    return found


@pytest.mark.parametrize("name", scripts_that_draw())
def test_every_script_that_draws_has_the_flags(name, capsys):
    module = importlib.import_module(name)
    command = module.EXPERIMENT.command if hasattr(module, "EXPERIMENT") else module.command
    with pytest.raises(SystemExit):
        command(["--workdir=w", "--format=svg", "--width=page", "--help"])
    assert {"  --format:", "  --width:"} <= {
        line.partition(":")[0] + ":" for line in capsys.readouterr().out.splitlines()
    }
    assert flags.run(command, ["--workdir=w", "--width=wide"]) == 2
    assert "width='wide' is not known" in capsys.readouterr().err


def test_one_legend_has_every_label_once():
    figure = curves.draw_panels(record(), Look())
    assert [axes.get_legend() for axes in figure.axes] == [None, None]
    (legend,) = figure.legends
    said = [text.get_text() for text in legend.get_texts()]
    assert said == ["$n_h$ = 1", "$n_h$ = 2", "$n_h$ = 3", "single runs", "length trained"]


def test_what_only_later_panels_have_stands_with_the_other_curves():
    given = record()
    first, second = given["panels"]
    kinds = given["panels"][first]
    given["panels"] = {first: {"n_h = 2": kinds["n_h = 2"]}, second: {"n_h = 3": kinds["n_h = 3"]}}
    given["published"] = {second: {"n_h = 3": [[4, 0.5]]}}
    (legend,) = curves.draw_panels(given, Look()).legends
    said = [text.get_text() for text in legend.get_texts()]
    assert said == ["$n_h$ = 2", "$n_h$ = 3", "single runs", "published", "length trained"]


@pytest.mark.parametrize("width", style.WIDTHS)
def test_nothing_is_cut_and_panels_stand_apart_from_the_legend(width):
    figure = curves.draw_panels(record(series=9), Look(width=width))
    figure.savefig(io.BytesIO())
    renderer, whole = figure.canvas.get_renderer(), figure.bbox
    legend = figure.legends[0].get_window_extent(renderer)
    for axes in figure.axes:
        box = axes.get_tightbbox(renderer)
        assert whole.x0 - 1 <= box.x0
        assert box.x1 <= whole.x1 + 1
        assert legend.y1 <= box.y0 + 1
    assert whole.x0 - 1 <= legend.x0
    assert legend.x1 <= whole.x1 + 1
    sizes = [text.get_fontsize() for text in figure.findobj(Text)]
    assert min(sizes) >= 6


def test_series_differ_without_colour():
    looks = [style.series(index) for index in range(36)]
    assert len({(look["linestyle"], look["marker"]) for look in looks}) == len(looks)
    bars = [style.bars(index)["hatch"] for index in range(len(style.HATCHES))]
    assert len(set(bars)) == len(bars)
    brightness = [np.dot([0.299, 0.587, 0.114], _rgb(color)) for color in style.COLORS]
    assert max(brightness) < 0.75 * 255  # none is pale on white


def _rgb(color):
    return [int(color[place : place + 2], 16) for place in (1, 3, 5)]


def test_a_construction_looks_alike_in_every_dtype_but_for_its_marker():
    models = ["s3", "permutations_S3, float32", "permutations_S3, bfloat16", "s4"]
    (run, solid, hollow, other), named = margin._styles(models)
    assert list(named) == ["$S_{3}$", "permutations $S_{3}$", "$S_{4}$", "in bfloat16"]
    assert len({(style["color"], style["marker"]) for style in (run, solid, other)}) == 3
    for key in ("color", "marker"):
        assert solid[key] == hollow[key]
    for key in ("markerfacecolor", "linestyle"):
        assert solid[key] != hollow[key]


@pytest.mark.parametrize(("lowest", "scale", "floor"), [
    (0.0, "linear", -0.03), (0.8, "linear", 0.75), (-3.0, "log", -0.03),
])  # fmt: skip
def test_axes_show_where_something_happens(lowest, scale, floor):
    content = record(panels=1)
    fall = np.maximum(np.linspace(1, lowest, 33) if lowest >= 0 else np.exp(-np.arange(33)), 0)
    for curve in content["panels"]["group = S3"].values():
        curve["runs"] = [fall.tolist()]
    (axes,) = curves.draw_panels(content, Look()).axes
    assert axes.get_xscale() == scale
    assert axes.get_ylim()[0] == pytest.approx(floor)
    marks = [line for line in axes.lines if line.get_transform() == axes.transAxes]
    assert bool(marks) == (floor > 0)  # a cut axis says so


def test_names_are_those_of_papers():
    for name in MIXERS:
        assert names.pretty(f"mixer = {name}") == names.VALUES[name] != name
    assert names.pretty("group = Z5") == "$Z_{5}$"
    assert names.pretty("num_householder = 2, S10") == "$n_h$ = 2, $S_{10}$"
    assert names.pretty("n_h = 2 (run_a)") == "$n_h$ = 2 (run_a)"
    assert names.metric("paper.token_accuracy") == "answers right, BOS counted"
    assert names.metric("loss") == "loss"
    said = {names.construction(name) for name in CATALOGUE}
    assert {("rotations", "$S_{4}$"), ("three layers", "$S_{5}$, all letters")} <= said
    assert names.model("trained: preset_S4") == "trained\n$S_{4}$"
    assert (names.leg_size("213m"), names.leg_model("2_gated")) == ("213M", "$n_h$ = 2, gated")
    assert (names.leg_size("tiny"), names.leg_model("mamba2")) == ("tiny", "Mamba-2")
    assert names.run("s3_nh3_16") == "$S_{3}$, $n_h$ = 3, 16 tokens"
    assert names.run("seed=4") == "seed 4"
    assert names.run("cube_S4, bfloat16") == "rotations $S_{4}$, bfloat16"
    raw = re.compile("|".join(name for name in MIXERS if "_" in name))
    assert not any(raw.search(" ".join(pair)) for pair in said)


@pytest.mark.parametrize(("limits", "columns"), [((230, 6700), 3), ((2, 2e4), 3)])
def test_numbers_along_an_axis_do_not_meet(limits, columns):
    figure, panels = style.new_panels(Look(width="column"), 1, columns, 2.4)
    axes = panels[0, 0]
    axes.set_xscale("log")
    axes.set_xlim(*limits)
    style.plain_log(axes.xaxis, limits)
    figure.draw_without_rendering()
    labels = [t for t in axes.get_xticklabels() if limits[0] <= t.get_position()[0] <= limits[1]]
    places = [label.get_window_extent() for label in labels]
    assert places
    assert all(one.x1 < other.x0 for one, other in itertools.pairwise(places))


@pytest.mark.parametrize("limits", [(0.65, 4.5), (1.2, 7), (0.11, 0.9), (30, 210), (20, 150)])
def test_less_than_a_decade_upwards_has_three_numbers_or_more(limits):
    _, panels = style.new_panels(Look(), 1, 1, 2.4)
    axes = panels[0, 0]
    axes.set_yscale("log")
    axes.set_ylim(*limits)
    style.plain_log(axes.yaxis, limits)
    least, most = limits
    assert sum(least <= tick <= most for tick in axes.get_yticks()) >= 3


@pytest.mark.parametrize("name", ["xaxis", "yaxis"])
@pytest.mark.parametrize("base", [2, 10])
@pytest.mark.filterwarnings("error")
def test_a_single_point_has_its_number_along_an_axis(name, base):
    _, panels = style.new_panels(Look(), 1, 1, 2.0)
    axes = panels[0, 0]
    axes.loglog([1024], [1024])
    axis = getattr(axes, name)
    style.plain_log(axis, (1024, 1024), base)
    assert axis.get_major_formatter()(1024) == ("1k" if base == 2 else "1024")


def pictures():
    return set(RESULTS.rglob("*.png"))


def tables_of(folder):
    """Those that scripts wrote: all Markdown but what a person writes."""
    by_hand = re.compile(r"README|LOG|full_size")
    return {path for path in folder.rglob("*.md") if not by_hand.match(path.name)}


def test_every_figure_and_table_of_the_results_is_what_its_record_gives(tmp_path, monkeypatch):
    """No pixel is drawn here: which record makes which picture is enough. Tables are equal."""
    drawn = set()

    def noted(figure, path, look):
        files = look.files(path)
        drawn.update(files)
        return files

    rooms = ("benchmarks", "geometry", "language", "legs", "margin", "plots", "theory")
    for module in (records, *(getattr(records, room) for room in rooms)):
        monkeypatch.setattr(module, "save", noted)
    folder = tmp_path / "results"
    shutil.copytree(RESULTS, folder, ignore=shutil.ignore_patterns("*.png"))
    for path in tables_of(folder):
        path.unlink()
    tables = {path for path in records.drawn(folder, Look(), pytest.fail) if path not in drawn}
    there = {path.relative_to(RESULTS) for path in pictures()}
    assert len(there) >= 19
    assert {path.relative_to(folder) for path in drawn} == there
    there = {path.relative_to(RESULTS) for path in tables_of(RESULTS)}
    assert len(there) >= 43
    assert {p.relative_to(folder) for p in tables if p.suffix == ".md"} == there
    for path in tables:
        assert path.read_bytes() == (RESULTS / path.relative_to(folder)).read_bytes()
    for path in pictures():
        assert path.stat().st_size < 200_000, path


def test_what_cannot_be_drawn_is_one_line(tmp_path, capsys):
    assert flags.run(redraw.command, [f"--workdir={tmp_path}"]) == 2
    assert "holds no record that can be drawn" in capsys.readouterr().err
    write(tmp_path, {"figure": "cumulative", "panels": {}})
    assert flags.run(redraw.command, [f"--workdir={tmp_path}"]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert re.search(r"cumulative\.json cannot be drawn: ", line)
    for script in ("op.nothing", "lib.flags", "../x"):
        write(tmp_path, {"page": script, "command": "python -m experiments.x"})
        with pytest.raises(RunDirectoryError, match=f"page='{script}' is not known; it may be"):
            redraw.command([f"--workdir={tmp_path}"])
    write(tmp_path, {"figure": "pie"})
    with pytest.raises(RunDirectoryError, match=r"json cannot be drawn: figure='pie' is not known"):
        redraw.command([f"--workdir={tmp_path}"])


def test_damaged_records_are_told_each_and_keep_no_other_from_being_drawn(
    tmp_path, capsys, recwarn
):
    write(tmp_path / "a", {"figure": "cumulative", "panels": {}})
    huge = record(panels=1, series=1, runs=1)
    (curve,) = huge["panels"]["group = S3"].values()
    curve["median"] = [1e308, -1e308, 1.0] * 11
    curve["runs"] = [curve["median"]]
    write(tmp_path / "b", huge)
    write(tmp_path / "c", {}).joinpath("cumulative.json").write_text('{"figure": ')
    write(tmp_path / "d", record(panels=1, series=1, runs=1))
    (tmp_path / "a" / "metrics.jsonl").write_text("7\n")
    assert flags.run(redraw.command, [f"--workdir={tmp_path}"]) == 2
    written, said = (text.splitlines() for text in capsys.readouterr())
    assert written == [f"written: {tmp_path / 'd' / 'cumulative.png'}"]
    names = ("a/cumulative.json", "b/cumulative.json", "c/cumulative.json", "a/metrics.jsonl")
    assert [line.split()[:2] for line in said] == [
        ["error:", f"{tmp_path / name}" + ("," if "metrics" in name else "")] for name in names
    ]
    assert not len(recwarn)


@pytest.mark.parametrize(
    "places",
    [
        ("theory/geometry", "models", 0, "heads", 0, "beta", 0, 1),
        ("theory/geometry", "models", 0, "heads", 0, "explained_about_zero", 1),
        ("state_tracking/ends/margin", "models", 0, "used", 1),
        ("state_tracking/ends/margin", "models", 0, "positions", 1),
    ],
)
def test_a_text_among_numbers_is_no_category(places, tmp_path, capsys):
    """Which matplotlib makes of it, and of the numbers beside it, in a picture like any other."""
    file, *keys, last = places
    content = inside = json.loads((RESULTS / f"{file}.json").read_text())
    for key in keys:
        inside = inside[key]
    inside[last] = "x"
    name = file.rpartition("/")[2]
    write(tmp_path, content, name)
    assert flags.run(redraw.command, [f"--workdir={tmp_path}"]) == 2
    assert re.search(rf"{name}\.json cannot be drawn: [TV]\w+Error", capsys.readouterr().err)
    assert not list(tmp_path.glob("*.png"))


def test_models_of_which_none_ran_have_no_picture(tmp_path, capsys):
    failed = {"num_householder": 1, "error": "ConfigError: out of memory"}
    write(tmp_path, {"config": {"batch_size": 8}, "rows": [failed]}, "throughput")
    assert flags.run(redraw.command, [f"--workdir={tmp_path}"]) == 2
    assert "holds no record that can be drawn" in capsys.readouterr().err


def test_a_finished_run_is_drawn_again_where_a_flag_says_how(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(loop, "SequenceModel", TinyModel)
    run = tmp_path / "run"
    assert state_tracking.main(flags_for(run, steps=4)) == 0
    first = (run / "cumulative.png").read_bytes()
    assert state_tracking.main([*flags_for(run, steps=4), "--format=svg"]) == 0
    assert 'width="237.6pt"' in (run / "cumulative.svg").read_text()  # 3.3 inches
    assert state_tracking.main([*flags_for(run, steps=4), "--format=svg", "--width=page"]) == 0
    assert 'width="496.8pt"' in (run / "cumulative.svg").read_text()
    assert (run / "cumulative.png").read_bytes() == first
    assert state_tracking.main([*flags_for(tmp_path / "new"), "--format=jpg"]) == 2
    assert "format='jpg' is not known" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
