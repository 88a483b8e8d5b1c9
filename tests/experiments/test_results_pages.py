"""Tables that a person copied onto a page of results: they say what the records beside them say."""

import csv
import re
from pathlib import Path

import pytest

RESULTS = Path(__file__).resolve().parents[2] / "experiments" / "results"
RECIPES = RESULTS / "recipes"
SCORE = "results.test.{}.strict.sequence_accuracy"


def tables_of(page):
    """Head and rows of each table."""
    found = re.findall(r"(?:^\|.*\|\n)+", page.read_text(), re.MULTILINE)
    cut = ([[c.strip() for c in line.split("|")[1:-1]] for line in t.splitlines()] for t in found)
    return [(lines[0], lines[2:]) for lines in cut]


def rows_of(path):
    with path.open() as file:
        return list(csv.DictReader(file))


def rounded(cells):
    return [round(float(cell), 3) for cell in cells]


# A table with a column for seeds, whose others are the settings beside them and lengths tested.
BY_SEED = [
    (page.parent, head, rows)
    for page in sorted(RESULTS.rglob("README.md"))
    if page.with_name("results.csv").exists()
    for head, rows in tables_of(page)
    if "seed" in head and any("(trained)" in name for name in head)
]


@pytest.mark.parametrize(("folder", "head", "rows"), BY_SEED, ids=lambda x: getattr(x, "name", ""))
def test_scores_by_seed_are_those_of_the_runs(folder, head, rows):
    settings = [{"layers": "num_layers"}.get(name, name) for name in head[: head.index("seed") + 1]]
    lengths = [name.split()[0] for name in head[len(settings) :]]
    runs = rows_of(folder / "results.csv")
    assert len(rows) == len(runs)
    scores = {tuple(r[s] for s in settings): [r[SCORE.format(n)] for n in lengths] for r in runs}
    for row in rows:
        assert rounded(row[len(settings) :]) == rounded(scores[tuple(row[: len(settings)])])
        (trained,) = {run["train_length"] for run in runs}
        assert f"{trained} (trained)" in head


def test_such_tables_are_there():
    assert {folder.name for folder, _, _ in BY_SEED} >= {"A5", "A5_cpu", "S4", "S5", "S5_128", "s4"}


CHANGES = next(t for t in tables_of(RECIPES / "README.md") if t[0][0] == "change")


@pytest.mark.parametrize("column", [1, 2, 3], ids=lambda column: CHANGES[0][column])
def test_what_one_change_does_is_what_its_runs_say(column):
    preset = CHANGES[0][column]
    runs = rows_of(RECIPES / preset / "results.csv")
    length = SCORE.format(4 * int(runs[0]["train_length"]))
    scores = {"none": rounded(run[length] for run in runs)}
    for row in rows_of(RECIPES / "changes.csv"):
        assert row["state"] == "done"
        if row["preset"] == preset:
            change = row["changed"].split(":")[0].replace("paper", "the paper's recipe")
            scores.setdefault(change, []).extend(rounded([row["times_4"]]))
    shown = {row[0].split(" (")[0].strip("`"): row[column] for row in CHANGES[1]}
    for change, cell in filter(lambda entry: entry[1], shown.items()):
        least, _, most = cell.partition(" to ")
        found = scores[change]
        assert rounded([least, most or least]) == [min(found), max(found)], change
    assert shown.keys() >= {c for c in scores if ";" not in c}
