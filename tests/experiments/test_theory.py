"""The commands about theory: records, going on, errors in one line."""

import dataclasses
import json
import re

import jax
import numpy as np
import pytest
from tiny_run import snapshot

from experiments import theory
from experiments.analysis import theory_geometry, theory_limits
from experiments.lib import flags
from experiments.lib.theory import geometry, reading

QUICK = ["--constructions=permutations_S3", "--length=40", "--words=2", "--piece=20"]
ONE_RUN = ("float32", "recurrent")
QUICK += ["--implementations=recurrent"]


def test_results_and_going_on(tmp_path, capsys, monkeypatch):
    argv = [f"--workdir={tmp_path}", *QUICK]
    assert flags.run(theory.command, [*argv, "--dtypes=float32"]) == 0
    (row,) = json.loads((tmp_path / "results.json").read_text())
    assert {
        "construction": "permutations_S3", "group": "S3", "num_layers": 1, "num_householder": 2,
        "dtype": "float32", "device": "cpu", "length": 40, "length_read": 40, "errors": 0,
    }.items() <= row.items()  # fmt: skip
    assert row["min_margin"] == pytest.approx(0.5, abs=1e-5)
    assert row["deviation"] < 1e-6
    assert [point["length"] for point in row["curve"]] == [20, 40]
    assert (tmp_path / "theory.png").read_bytes().startswith(b"\x89PNG")
    real, ran = reading.run, []
    monkeypatch.setattr(reading, "run", lambda *a: ran.append(a[1]) or real(*a))
    assert flags.run(theory.command, argv) == 0
    assert ran == ["bfloat16"]  # the other was there already
    rows = json.loads((tmp_path / "results.json").read_text())
    assert rows[0] == row
    assert len(rows) == 2
    assert "| permutations_S3 | S3 |" in (tmp_path / "theory.md").read_text()
    assert "| bfloat16 |" in capsys.readouterr().out
    said = " ".join(["python -m experiments.theory", *QUICK])
    assert rows[1]["made_by"].startswith(f"`{said}` on {jax.device_count()} x cpu, host with ")
    text = " ".join((tmp_path / "theory.md").read_text().split())  # long commands are wrapped
    assert f" 2. {rows[1]['made_by']}" in text

    # Rows of another length are made anew, and each is kept though the next be broken off.
    def shorter(made, dtype, implementation, config):
        if dtype == "bfloat16":
            raise KeyboardInterrupt
        return row | {"length_wanted": config.length}

    monkeypatch.setattr(reading, "run", shorter)
    with pytest.raises(KeyboardInterrupt):
        theory.command([*argv, "--length=30"])
    kept = json.loads((tmp_path / "results.json").read_text())
    assert [(row["dtype"], row["length_wanted"]) for row in kept] == [
        ("float32", 30), ("bfloat16", 40),
    ]  # fmt: skip


def test_wrong_answers_are_counted():
    logits = np.array([[[1.0, 3, 2], [1, 1, 0], [np.nan, 0, 0], [-4, 2, 1]]])
    wrong, margin = map(np.asarray, reading.judge(logits, np.array([[1, 0, 0, 2]])))
    assert wrong.tolist() == [[False, True, True, True]]
    np.testing.assert_allclose(margin[0, [0, 1, 3]], [1 / 3, 0, -1 / 4], rtol=1e-6)


def test_the_first_error_ends_the_length():
    made = theory.construct("permutations_S3")
    config = theory.TheoryConfig(length=40, words=2, piece=10).as_reading
    swapped = made.answers.copy()
    swapped[[1, 2]] = [2, 1]  # the model is right, and is told that it is not in two states
    row = reading.run(dataclasses.replace(made, answers=swapped), *ONE_RUN, config)
    assert 0 <= row["length"] < 20 < row["length_read"] == 40
    assert 0 < row["errors"] < 60
    every = dataclasses.replace(made, answers=np.roll(made.answers, 1))
    row = reading.run(every, *ONE_RUN, config)
    wanted = {"length": 0, "length_read": 10, "errors": 20, "min_margin": None}
    assert wanted.items() <= row.items()


def test_a_curve_keeps_its_worst_and_its_end():
    points = [{"length": n, "errors": 0, "deviation": float(n == 7)} for n in range(1, 60)]
    kept = reading.thinned(points)
    assert len(kept) < 12
    assert [point["length"] for point in kept if point["deviation"]] == [8]
    assert kept[-1]["length"] == 59


@pytest.mark.parametrize(
    ("argument", "says"),
    [
        ("--constructions=S9", r"constructions='S9' is not known; it may be one of \['perm"),
        ("--dtypes=", "dtypes is empty; give one entry at least .some of float32, bfloat16"),
        ("--length=0", "length=0 is too small; it must be at least 1"),
        ("--budget_s=0", r"budget_s=0\.0 must be greater than 0"),
    ],
)
def test_errors_are_one_line(argument, says, tmp_path, capsys):
    assert flags.run(theory.command, [f"--workdir={tmp_path / 'out'}", argument]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error)
    assert error.count("\n") == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_rows_of_other_directories(tmp_path, capsys):
    short, long, other = (tmp_path / name for name in ("short", "long", "other"))
    argv = [f"--workdir={short}", *QUICK, "--dtypes=float32"]
    assert flags.run(theory.command, argv) == 0
    (row,) = json.loads((short / "results.json").read_text())
    further = row | {"length_read": 80, "made_by": "a longer run"}
    elsewhere = row | {"length_read": 20, "device": "a GPU"}
    for path, rows in ((long, [further]), (other, [elsewhere, row])):
        path.mkdir()
        (path / "results.json").write_text(json.dumps(rows))
    files = ",".join(str(path / "results.json") for path in (other, long))
    assert flags.run(theory.command, [f"--workdir={short}", f"--rows_from={files}"]) == 0
    assert json.loads((short / "results.json").read_text()) == [further, elsewhere]
    assert "1. a longer run\n2. `python -m" in (short / "theory.md").read_text()
    capsys.readouterr()
    before = snapshot(short)
    for row, says in (
        ({"construction": "permutations_S3"}, "[0].group is missing"),
        ({**elsewhere, "construction": "mine"}, "[0].construction='mine' is not known; it may be"),
        ({**elsewhere, "deviation": "small"}, "[0].deviation='small' must be a finite number"),
        ({**elsewhere, "curve": [{"length": 8}]}, "[0].curve[0].errors is missing"),
    ):
        (other / "results.json").write_text(json.dumps([row]))
        assert flags.run(theory.command, [f"--workdir={short}", f"--rows_from={files}"]) == 2
        error = capsys.readouterr().err
        assert "other/results.json is not a list of results: " in error
        assert says in error
        assert error.count("\n") == 1
    assert snapshot(short) == before


def test_a_broken_record_is_one_line(tmp_path, capsys):
    (tmp_path / "results.json").write_text("{")
    assert flags.run(theory.command, [f"--workdir={tmp_path}", *QUICK]) == 2
    assert "is not a list of results" in capsys.readouterr().err


@pytest.mark.slow
def test_geometry_of_constructions(tmp_path, capsys):
    argv = [f"--workdir={tmp_path}", "--constructions=plane_Z5,cube_S4"]
    assert flags.run(theory_geometry.command, argv) == 0
    z5, cube = json.loads((tmp_path / "geometry.json").read_text())["models"]
    assert (z5["exponent"], cube["exponent"]) == (5, 12)
    for model, dimensions in ((z5, 2), (cube, 3)):
        for head in model["heads"]:
            assert head["dimensions"] == dimensions
            assert head["smallest_beta"] == 2
            assert head["off_circle"] < 1e-6
            assert head["off_angle"] < 1e-6
            assert head["as_constructed"] == 1
            assert head["off_copy"] < 1e-6
    assert (tmp_path / "geometry.png").read_bytes().startswith(b"\x89PNG")
    assert "| plane_Z5 | Z5 | all 2 | 2 |" in capsys.readouterr().out


def test_eigenvalues_like_the_constructions():
    turn = np.exp(2j * np.pi / 3)
    # S3 in space, where its swaps turn by a half.
    half, third = [-1, -1, 1, 1], [turn, turn.conjugate(), 1, 1]
    orders = [geometry.finite_group("S3").table[x, x] for x in range(6)]
    values = np.array([[1, 1, 1, 1], *(half if orders[x] == 0 else third for x in range(1, 6))])
    share = lambda values: geometry.share_as_constructed(values, "S3", range(6))
    assert share(values) == 1
    assert share(values[:, :2]) == 1  # narrower, and as if the rest stood still
    values[1] = np.exp(0.2j) * values[1]
    assert share(values) == pytest.approx(0.8)
    assert share(np.ones((6, 4))) == 0  # no head that does nothing
    assert geometry.share_as_constructed(values, "Z7", range(6)) is None


@pytest.mark.parametrize("group", ["S3", "S4", "A5", "S5", "Z5", "D5"])
def test_copies_of_the_constructions(group):
    letters = range(len(geometry.finite_group(group).table))
    if group == "S5":
        letters = letters[:: len(letters) // 24]
    found = geometry.copies(group)
    turned = np.linalg.qr(np.random.default_rng(0).normal(size=(6, 6)))[0]
    for name, matrices in found.items():
        acts = np.tile(np.eye(6), (len(letters), 1, 1))
        d = matrices.shape[-1]
        acts[:, :d, :d] = matrices[letters].swapaxes(1, 2)
        acts = turned @ acts @ turned.T
        off, copied = geometry.closest_copy(acts, group, letters)
        assert off < 1e-6
        assert copied == name or group == "S3"  # whose signs only mirror it
        assert geometry.closest_copy(acts[::-1], group, letters)[0] > 0.3
    if group == "A5":  # the automorphism is no mere change of basis
        traces = np.trace(found["itself"] - found["letters renamed"], axis1=1, axis2=2)
        assert np.abs(traces).max() > 2
    if group == "S5":  # a swap of two letters exchanges all six points in pairs
        assert np.round(np.trace(found["on six points"], axis1=1, axis2=2)).tolist()[1] == -1
    assert geometry.closest_copy(turned[None], "Z7", [0]) == (None, None)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--runs=absent"], r"runs=absent is no run directory: it has no config\.json"),
        (["--constructions="], "constructions and runs are both empty"),
        (["--constructions=gated_turns"], "constructions='gated_turns' is not known"),
    ],
)
def test_errors_of_geometry_are_one_line(arguments, says, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert flags.run(theory_geometry.command, ["--workdir=out", *arguments]) == 2
    error = capsys.readouterr().err
    assert re.search(says, error)
    assert error.count("\n") == 1


def test_limits_are_recorded(tmp_path, capsys):
    argv = [f"--workdir={tmp_path}", "--products=20", "--lengths=10,1000", "--seed=3"]
    assert flags.run(theory_limits.command, argv) == 0
    found = json.loads((tmp_path / "limits.json").read_text())
    assert max(found["proposition_1_worst_violation"].values()) < 1e-13
    assert found["one_factor_states_apart_at_most"].keys() == {"10", "1000"}
    assert found["one_factor_states_apart_at_most"]["1000"] < 1e-3
    assert 0.3 < found["one_factor_share_of_the_bound"] <= 1 + 1e-9
    assert found["commutator_orders_in_s5"] == [3] * 10
    assert found["commutator_orders_of_rotations_by_one_angle"] == [1, 5]
    assert found["factors_of_permutation_matrices"]["S5"] == 4
    assert json.loads(capsys.readouterr().out) == found
    assert flags.run(theory_limits.command, [*argv, "--products=0"]) == 2
    assert "products=0 is too small; it must be at least 1" in capsys.readouterr().err
