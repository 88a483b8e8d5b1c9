"""Finished runs as figures and tables want them: settings and results, chosen and grouped.

Everything comes from records: a sweep's folder, its results.csv (whose lines say which runs), or
any folder that holds run directories.
"""

import csv
import dataclasses
import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import is_there, read_lines
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.training.records import (
    CONFIG,
    METRICS,
    MetricsLine,
    read_results,
    saved_config,
)
from experiments.lib.folders import SWEEP, held_by
from experiments.lib.sweeps.grid import LIST, RUNS, identity, is_run_name, parse_grid, read_list
from experiments.lib.sweeps.records import RunFolder, settings_of, spell

MOST_NAMED = 16  # groups of runs that are left out
# Numbers of results.json of which less is better, by the end of their path.
LESS_IS_BETTER = ("loss", "bits_per_byte")
Group = tuple[str, ...]  # values of the grouping keys, as they are written


@dataclasses.dataclass(frozen=True)
class Record:
    """A run: its name, its settings by field, what its results.json holds, and its last step."""

    name: str
    settings: dict[str, Any]
    results: dict[str, Any]
    step: int = 0

    def value(self, key: str) -> str:
        """A setting as it is written; ConfigError, naming the closest, if there is none."""
        if key not in self.settings:
            closest = difflib.get_close_matches(key, sorted(self.settings), n=1, cutoff=0)
            rest = f"did you mean {closest[0]!r}?" if closest else "it has none"
            raise ConfigError(f"{key!r} is no setting of run {self.name}; {rest}")
        return spell(self.settings[key]) or "none"

    def entry(self, length: int | None) -> dict[str, Any]:
        """The test scores at a length, the longest if None; ConfigError if it was not tested."""
        entries = {entry["length"]: entry for entry in self.results["test"]}
        if not entries:
            raise ConfigError(f"the results of run {self.name} have no test lengths")
        wanted = max(entries) if length is None else length
        if wanted not in entries:
            tested = ", ".join(map(str, entries))
            raise ConfigError(
                f"length={length} was not tested in run {self.name}; it may be {tested}"
            )
        return entries[wanted]

    def score(self, metric: str, length: int | None) -> float:
        """A number at a test length by its path, as strict.sequence_accuracy."""
        entry = self.entry(length)
        found: Any = entry
        for name in metric.split("."):
            found = found.get(name) if isinstance(found, dict) else None
        if not _is_number(found):
            raise ConfigError(
                f"metric={metric!r} is not in the results of run {self.name}; it may be one of "
                f"{', '.join(_numbers(entry))}"
            )
        return float(found)


def less_is_better(metric: str) -> bool:
    """Whether a number of results.json, by its path, is better where it is less."""
    return metric.rpartition(".")[2] in LESS_IS_BETTER


def best_score(scores: Iterable[float], metric: str) -> float | None:
    """The best of them; None of none."""
    return (min if less_is_better(metric) else max)(scores, default=None)


def reaches(score: float, metric: str, threshold: float) -> bool:
    """Whether a score is as good as the threshold."""
    return score <= threshold if less_is_better(metric) else score >= threshold


def _numbers(entry: Any, path: str = "") -> list[str]:
    if isinstance(entry, dict):
        return [p for name in entry for p in _numbers(entry[name], f"{path}.{name}".strip("."))]
    return [path] if _is_number(entry) else []


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def read_runs(source: Path) -> list[Record]:
    """The runs of a sweep's folder, of its results.csv, or of a folder of runs.

    Those that are not finished have no results; a run at least is finished.

    Raises:
        ConfigError: there is no such place, or no finished run in it.
        RunDirectoryError: a record cannot be read, or a run is not the one that the sweep's list
            has by its name.
    """
    runs = []
    for folder, listed in _folders(source):
        results = read_results(folder)
        settings = settings_of(saved_config(folder)) if is_there(folder / CONFIG) else dict(listed)
        settings |= _factors(settings)
        runs.append(Record(folder.name, settings, results or {}, _last_step(folder, results)))
    if not finished(runs):
        held = [what for what in held_by(source) if what != SWEEP]
        raise ConfigError(
            f"source={str(source)!r} holds {' and '.join(held) or 'no finished run'}; it may be "
            "the folder of a sweep, as tried and chosen of a search are, its results.csv with the "
            "runs beside it, or a folder of run directories"
        )
    return runs


def finished(runs: Iterable[Record]) -> list[Record]:
    """Those that have results."""
    return [run for run in runs if run.results]


def _last_step(folder: Path, results: Mapping[str, Any] | None) -> int:
    if results is not None:
        return results["steps"]
    rows = read_lines(folder / METRICS, MetricsLine)
    return int(rows[-1]["step"]) if rows else 0


def left_out(runs: Iterable[Record], where: str = "", keys: Sequence[str] = ()) -> str | None:
    """Which runs are not `finished`, as a note; None where all are.

    Args:
        runs: with those that are.
        where: as of `choose`; others are not looked at.
        keys: settings by which the runs are counted.
    """
    wanted = parse_grid("--where", where) if where else {}
    runs = [run for run in runs if all(_value(run, key) in wanted[key] for key in wanted)]
    count = len(runs) - len(finished(runs))
    if not count:
        return None
    cells = grouped(runs, keys, _value).items()
    parts = [
        _missing_of(label(keys, cell), members)
        for cell, members in cells
        if len(finished(members)) < len(members)
    ]
    said = "; ".join(parts[:MOST_NAMED]) + ("; ..." if len(parts) > MOST_NAMED else "")
    return f"{count} of {len(runs)} runs have no results and are left out: {said}"


def _missing_of(cell: str, members: Sequence[Record]) -> str:
    """How many of a cell's runs are missing, and how far those came that were begun."""
    missing = [run for run in members if not run.results]
    begun = sorted((run for run in missing if run.step), key=lambda run: run.step)
    said = f"{cell}: {len(missing)} of {len(members)}"
    if not begun:
        return said
    some = "" if len(begun) == len(missing) else f"{len(begun)} of them "
    came = " to ".join(dict.fromkeys(f"{run.step:,}" for run in (begun[0], begun[-1])))
    steps = {run.settings.get("steps") for run in begun}
    whole = f" of {int(steps.pop()):,}" if len(steps) == 1 and None not in steps else ""
    return f"{said}, {some}at step {came}{whole}"


def _value(record: Record, key: str) -> str:
    """A setting as it is written, "none" where a run has none of that name."""
    return record.value(key) if key in record.settings else "none"


def _folders(source: Path) -> list[tuple[Path, dict[str, Any]]]:
    """The runs' folders, each with the settings that the list of them says, if there is one."""
    if source.suffix == ".csv" and not source.is_dir():
        return [(source.parent / RUNS / row["run"], row) for row in _lines(source)]
    if not is_there(source / LIST):
        return [(folder, {}) for folder in _run_directories(source)]
    found = []
    for run in read_list(source)[1]:
        folder = RunFolder(source, run)
        folder.require_own()
        found.append((folder.path, settings_of(run.config)))
    return found


def _factors(settings: Mapping[str, Any]) -> dict[str, int]:
    """The factors per token where a run left them to its mixer, which has its own default."""
    mixer = MIXERS.get(str(settings.get("mixer")))
    if mixer is None or settings.get("num_householder") is not None:
        return {}
    factors = mixer.default("num_householder")
    return {} if factors is None else {"num_householder": factors}


def _run_directories(source: Path) -> list[Path]:
    """The run directories in a folder; ConfigError where a run is there twice, as after copying."""
    found: dict[str, Path] = {}
    for path in sorted(source.glob(f"*/{CONFIG}")):
        same = found.setdefault(identity(saved_config(path.parent)), path.parent)
        if same != path.parent:
            raise ConfigError(
                f"source={str(source)!r} has one run twice, {same.name} and {path.parent.name}, "
                "which would count as two; leave one of them"
            )
    return list(found.values())


def _lines(path: Path) -> list[dict[str, Any]]:
    """The lines of a results.csv, settings as they are written."""
    try:
        with open(path, newline="") as file:
            rows = [{**row, "run": row["run"] or ""} for row in csv.DictReader(file)]
    except OSError as error:
        raise ConfigError(f"source={str(path)!r} cannot be read: {error.strerror}") from error
    except (ValueError, csv.Error) as error:  # bytes that are no text, a field without an end
        raise ConfigError(f"source={str(path)!r} is no table: {error}") from error
    except KeyError as error:
        raise ConfigError(f"source={str(path)!r} has no column 'run'") from error
    seen: set[str] = set()
    for name in (row["run"] for row in rows):
        if not is_run_name(name):
            raise ConfigError(f"source={str(path)!r}: run={name!r} is no name of a run's folder")
        if name in seen:
            raise ConfigError(
                f"source={str(path)!r} has run={name!r} twice, which would count twice"
            )
        seen.add(name)
    return rows


def choose(records: Sequence[Record], where: str) -> list[Record]:
    """The runs whose settings are among those of ``where``, written as a grid."""
    if not where:
        return list(records)
    wanted = parse_grid("--where", where)
    chosen = [r for r in records if all(r.value(key) in wanted[key] for key in wanted)]
    if not chosen:
        found = {key: sorted({record.value(key) for record in records}) for key in wanted}
        raise ConfigError(f"where={where!r} leaves no run; there are {json.dumps(found)}")
    return chosen


def grouped(
    records: Iterable[Record],
    keys: Sequence[str],
    value: Callable[[Record, str], str] = Record.value,
) -> dict[Group, list[Record]]:
    """The runs by their values of the keys: numbers by size, then texts in the grid's order.

    That is the order in which the records have them, which for a folder of runs is that of their
    names; permutation groups come by size all the same, as papers have them: S3, S4, A5, S5. A
    setting that is none comes last.
    """
    records, seen = list(records), {}
    for record in records:
        for key in keys:
            seen.setdefault(value(record, key), len(seen))
    groups: dict[Group, list[Record]] = {}
    for record in records:
        groups.setdefault(tuple(value(record, key) for key in keys), []).append(record)
    order = lambda group: [_order(text, seen[text]) for text in group]
    return {group: groups[group] for group in sorted(groups, key=order)}


def _order(value: str, place: int) -> tuple[int, float, float]:
    if value == "none":
        return 3, 0, 0
    if permutations := re.fullmatch("([AS])([0-9]+)", value):
        return 1, int(permutations[2]), permutations[1] == "S"  # An is half of Sn
    try:
        return 0, float(value), 0
    except ValueError:
        return 2, place, 0


def label(keys: Sequence[str], group: Group) -> str:
    """A group as a legend shows it; the number of factors has the paper's name."""
    shown = {"num_householder": "n_h", "num_layers": "layers"}
    parts = [f"{shown.get(key, key)} = {value}" for key, value in zip(keys, group, strict=True)]
    return ", ".join(parts) or "all runs"
