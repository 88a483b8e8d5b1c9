"""Records of legs that are damaged: one line each, before anything is drawn."""

import json

import pytest

from deltaproduct_jax.errors import RunDirectoryError
from experiments.language import paper
from experiments.lib.legs.leg import EXTRAPOLATION, RANKS, TRAINING, records_of

RESULTS = {"steps": 1, "best_step": 1, "parameters": {"total": 3}, "test": [{"length": 4}]}
WHOLE = {"leg": "213m_1", "seed": 0, "curve": [{"tokens": 1, "loss": 1.0}], "results": None}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"seed": "x"}, "seed='x' must be a whole number"),
        ({"curve": []}, "curve is empty; it must have an entry at least"),
        ({"curve": [{"loss": 1.0}]}, r"curve\[0\].tokens is missing"),
        ({"curve": [{"tokens": 9}, {"tokens": 0}]}, r"curve\[1\]\.tokens=0 is too small"),
        ({"results": {"steps": 1}}, "results.best_step is missing"),
        ({"results": RESULTS | {"parameters": {}}}, "results.parameters.total is missing"),
        ({"results": RESULTS | {"test": []}}, "results.test is empty; it must have an entry"),
        ({"results": RESULTS | {"test": [{"length": 4, "loss": "x"}]}}, r"results.test\[0\].loss"),
    ],
)
def test_a_damaged_record_of_a_leg_is_one_line(change, says, tmp_path):
    folder = tmp_path / "records" / "213m_1_seed0"
    folder.mkdir(parents=True)
    (folder / TRAINING).write_text(json.dumps(WHOLE | change))
    with pytest.raises(RunDirectoryError, match=rf"training\.json: {says}"):
        records_of(tmp_path)


BY_POSITION = {
    "data": "x", "label": "y", "trained": None, "position": [1.0, 2.0], "loss": [3.0, 2.0],
    "error": None, "running_loss": [3.0, 2.5],
}  # fmt: skip


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"loss": 3}, r"curves\[0\]\.loss=3 must be a list"),
        ({"loss": [3.0]}, r"curves\[0\]\.loss has 1 entries; it must have 2, as position"),
        ({"error": []}, r"curves\[0\]\.error has 0 entries; it must have 2"),
        ({"position": []}, r"curves\[0\]\.position must have a place at least"),
        ({"position": [0.0, 1.0]}, r"curves\[0\]\.position must .*, each from 1 on"),
    ],
)
def test_damaged_curves_of_a_leg_are_one_line(change, says, tmp_path):
    folder = tmp_path / "records" / "213m_1_seed0"
    folder.mkdir(parents=True)
    (folder / TRAINING).write_text(json.dumps(WHOLE))
    (folder / EXTRAPOLATION).write_text(json.dumps({"curves": [BY_POSITION]}))
    (record,) = records_of(tmp_path)
    assert record["positions"] == [BY_POSITION]
    (folder / EXTRAPOLATION).write_text(json.dumps({"curves": [BY_POSITION | change]}))
    with pytest.raises(RunDirectoryError, match=rf"extrapolation\.json: {says}"):
        records_of(tmp_path)


@pytest.mark.parametrize(
    ("name", "text", "says"),
    [
        (EXTRAPOLATION, '{"curves": [{"data": "x", "loss": 3}]}', r"curves\[0\]"),
        (RANKS, '{"trained": 4, "starts": [0], "heads": {"0": [{"end": "x"}]}}', r"heads\.0\[0\]"),
    ],
)
def test_damaged_measurements_of_a_leg_are_one_line(name, text, says, tmp_path):
    folder = tmp_path / "records" / "213m_1_seed0"
    folder.mkdir(parents=True)
    (folder / TRAINING).write_text(json.dumps(WHOLE))
    (folder / name).write_text(text)
    with pytest.raises(RunDirectoryError, match=rf"{name}: {says}"):
        records_of(tmp_path)


def test_numbers_that_no_picture_shows_are_one_line(tmp_path):
    folder = tmp_path / "records" / "213m_1_seed0"
    folder.mkdir(parents=True)
    (folder / TRAINING).write_text(json.dumps(WHOLE))
    along = {"position": [0, 8], "low": [0, 0], "high": [0, 0], "mean": [1e308, -1e308]}
    (folder / RANKS).write_text(
        json.dumps({"trained": 4, "starts": [], "heads": {}, "along": along})
    )
    with pytest.raises(RunDirectoryError, match=r"records cannot be drawn: "):
        paper.command([f"--workdir={tmp_path}", "--stages=draw"])
