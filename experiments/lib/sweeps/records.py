"""What the records of a sweep say: the state of every run, and the tables of all of them.

Each run has its folder under ``runs/`` with the records of any run, and beside them ``log.txt``,
what it printed, and ``attempts.jsonl``, a line for every attempt that ended in the sweep's sight.
``results.csv`` and ``results.parquet`` are derived from these at any time.
"""

import contextlib
import csv
import importlib.util
import io
import json
import math
import os
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.files import read_json, read_lines, write_file
from deltaproduct_jax.strict_json import decode
from deltaproduct_jax.training.extending import ABSENT, differences
from deltaproduct_jax.training.records import (
    CONFIG,
    METRICS,
    MOVED,
    RUN,
    read_results,
    saved_config,
)
from experiments.lib.sweeps.grid import LIST, RUNS, Run, folder_lock, read_list

LOG, ATTEMPTS = "log.txt", "attempts.jsonl"
CSV, PARQUET = "results.csv", "results.parquet"
TAIL_BYTES = 1 << 16
Row = dict[str, Any]  # column -> value


class Ended(TypedDict):
    """A line of attempts.jsonl; ``error`` is empty if the attempt ended well."""

    time: float
    exit_code: int
    seconds: float
    error: str


class Start(TypedDict):
    """How and where a run was started or gone on with, an entry of run.json."""

    time: NotRequired[str]
    commit: NotRequired[str | None]
    dirty: NotRequired[bool | None]
    device_kind: NotRequired[str]
    device_count: NotRequired[int]
    runs_together: NotRequired[int]


class _Starts(TypedDict):
    starts: list[Start]


class _Columns(TypedDict, total=False):
    """What is looked at of metrics.jsonl, where a script of somebody else's may have less."""

    step: int
    tokens: float
    tokens_per_second: float
    time: float


_MetricsLine = Annotated[dict[str, float], _Columns]


def settings_of(config: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The fields of all sections of a configuration."""
    return {name: value for section in config.values() for name, value in section.items()}


def has_parquet() -> bool:
    """Whether the optional package that writes Parquet is there."""
    return importlib.util.find_spec("pyarrow") is not None


class RunFolder:
    """The records of one run, read as they are now."""

    def __init__(self, folder: Path, run: Run):
        self.run = run
        self.path = folder / RUNS / run.name
        self._results: dict[str, Any] | None = None

    def results(self) -> dict[str, Any] | None:
        """The outcome, None before the end.

        A damaged one, or another run's, is left to the run to complain of.
        """
        if self._results is None:
            with contextlib.suppress(RunDirectoryError):
                found = read_results(self.path)
                if found is not None:
                    self.require_own()
                self._results = found
        return self._results

    def last_row(self) -> dict[str, float]:
        """The last whole line of its metrics, empty without any.

        Raises:
            RunDirectoryError: the line is damaged.
        """
        lines = _tail(self.path / METRICS).split(b"\n")[:-1]
        if not lines:
            return {}
        return decode(lines[-1], _MetricsLine, f"{self.path / METRICS}, last line")

    def starts(self) -> list[Start]:
        """How and where the run was started, by any command; RunDirectoryError if damaged."""
        path = self.path / RUN
        return read_json(path, _Starts)["starts"] if path.exists() else []

    def attempts(self) -> list[Ended]:
        """The attempts that ended in the sight of a sweep; RunDirectoryError if damaged."""
        return read_lines(self.path / ATTEMPTS, Ended)

    def add_attempt(self, exit_code: int, seconds: float, error: str) -> None:
        """Records how an attempt ended; ``error`` is empty if it ended well."""
        entry = {"time": time.time(), "exit_code": exit_code, "seconds": seconds, "error": error}
        # The whole file, so that no line is ever torn.
        lines = [json.dumps(attempt) + "\n" for attempt in (*self.attempts(), entry)]
        write_file(self.path / ATTEMPTS, "".join(lines).encode())

    def seconds(self) -> float:
        """Time that these attempts took together."""
        return sum(entry["seconds"] for entry in self.attempts())

    def state(self) -> str:
        """As far as records tell: done, failed, started or pending."""
        if self.results() is not None:
            return "done"
        attempts = self.attempts()
        if attempts and attempts[-1]["error"]:
            return "failed"
        return "started" if (self.path / CONFIG).exists() else "pending"

    def row(self) -> Row:
        """The run as a row of the tables: name, state, settings, outcome, what went wrong."""
        settings = settings_of(self.run.config)
        swept = {key: settings.get(key, self.run.settings[key]) for key in self.run.keys}
        row = {"run": self.run.name, "state": "damaged", **(swept | settings)}
        try:
            return row | self._outcome()
        except RunDirectoryError as error:
            return row | {"error": str(error)}

    def require_own(self) -> None:
        """Raises RunDirectoryError where the folder holds another run than the sweep's list says.

        Folders that were trained elsewhere are put into a sweep by hand. What one of both does not
        say, as another version or script may, is no difference.
        """
        if not (self.path / CONFIG).exists():
            return
        found = differences(saved_config(self.path), self.run.config)
        found = {name: pair for name, pair in found.items() if ABSENT not in pair}
        shown = ", ".join(
            f"{name.rpartition('.')[2]} ({json.dumps(there)} there, {json.dumps(listed)} in {LIST})"
            for name, (there, listed) in found.items()
            if name not in MOVED
        )
        if shown:
            raise RunDirectoryError(f"{self.path} holds another run, differing in {shown}")

    def _outcome(self) -> Row:
        """State, outcome and what went wrong; RunDirectoryError if a record is damaged."""
        if self.path.exists() and not self.path.is_dir():
            raise RunDirectoryError(f"{self.path} is no directory")
        self.require_own()
        results = read_results(self.path)
        state, attempts, starts = self.state(), self.attempts(), self.starts()
        return {
            "state": state,
            **outcomes("results", results or {}),
            "train_seconds": train_seconds(self.path / METRICS),
            "hardware": hardware_of(starts) or None,
            "commits": commits_of(starts) or None,
            # Some may have been out of every sweep's sight, on another machine.
            "attempts": max(len(attempts), len(starts), int(state == "done")),
            "error": attempts[-1]["error"] if state == "failed" else None,
        }


def size_of(path: Path) -> int:
    """Bytes in a file, 0 without one."""
    return os.path.getsize(path) if path.exists() else 0


def last_line(path: Path, since: int = 0) -> str:
    """The last line of a log, if it was written after its first ``since`` bytes."""
    with open(path, "rb") as file:
        file.seek(max(since, os.path.getsize(path) - TAIL_BYTES))
        lines = file.read().decode(errors="replace").split("\n")
    # A bar that redraws itself leaves what it drew before in the same line.
    lines = [line.rpartition("\r")[2].strip() for line in lines]
    return next(filter(None, reversed(lines)), "")


def _tail(path: Path) -> bytes:
    try:
        with open(path, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(0, size - TAIL_BYTES))
            data = file.read()
    except FileNotFoundError:
        return b""
    except OSError as error:
        raise RunDirectoryError(f"{path} cannot be read: {error.strerror}") from error
    return data if size <= TAIL_BYTES else data.partition(b"\n")[2]


def outcomes(name: str, value: Any) -> dict[str, float | int | str]:
    """Every number of results.json by its path; entries of a list go by their length.

    Lists of plain numbers, the curves, are left to results.json.
    """
    if isinstance(value, dict):
        parts = {f"{name}.{key}": entry for key, entry in value.items() if key != "length"}
    elif isinstance(value, list) and all(isinstance(e, dict) and "length" in e for e in value):
        parts = {f"{name}.{entry['length']}": entry for entry in value}
    elif isinstance(value, list) or value is None:
        return {}
    else:
        return {name: value}
    return {k: v for part, entry in parts.items() for k, v in outcomes(part, entry).items()}


def hardware_of(starts: Iterable[Start]) -> list[str]:
    """The devices that runs were started on, each kind once, as far as it is known."""
    known = (s for s in starts if "device_kind" in s and "device_count" in s)
    return sorted({f"{start['device_count']} x {start['device_kind']}" for start in known})


def commits_of(starts: Iterable[Start]) -> list[str]:
    """The commits of the code that runs were started by, in their order, as far as it is known.

    One whose files had been changed ends in "-dirty", as git itself says it.
    """
    known = [(start.get("commit"), start.get("dirty")) for start in starts]
    named = [f"{commit[:7]}{'-dirty' if dirty else ''}" for commit, dirty in known if commit]
    return list(dict.fromkeys(named))


def train_seconds(path: Path) -> float | None:
    """Seconds spent training, compiling and evaluating left out, over all attempts.

    Raises:
        RunDirectoryError: the metrics are damaged.
    """
    spent = list(spans(path))
    return sum(seconds for _, seconds in spent) if spent else None


def spans(path: Path) -> Iterator[tuple[float, float]]:
    """When each line of the metrics was written, and the seconds of training since the one before.

    None at all where a line does not say how fast its steps were. Raises as `train_seconds` does.
    """
    rows, before = read_lines(path, _MetricsLine), 0.0
    if not all({"tokens", "tokens_per_second"} <= row.keys() for row in rows):
        return
    for number, row in enumerate(rows, start=1):
        if not row["tokens_per_second"] > 0:
            raise RunDirectoryError(f"{path}, line {number}: tokens_per_second must be above 0")
        yield row.get("time", math.inf), (row["tokens"] - before) / row["tokens_per_second"]
        before = row["tokens"]


def write_tables(folder: Path, finished: dict[str, Row] | None = None) -> list[Row]:
    """Writes results.csv and, where pyarrow is installed, results.parquet; returns their rows.

    All runs of the saved list are in them, also those that another sweep has added.

    Args:
        folder: of the sweep.
        finished: rows of runs that are done, by name, which are not read again; it is added to.

    Raises:
        RunDirectoryError: the records cannot be read, or the tables not be written.
    """
    finished = {} if finished is None else finished
    with folder_lock(folder):
        rows = []
        for run in read_list(folder)[1]:
            row = finished.get(run.name) or RunFolder(folder, run).row()
            if row["state"] == "done":
                finished[run.name] = row
            rows.append(row)
        columns = columns_of(rows)
        write_file(folder / CSV, to_csv(rows, columns))
        if has_parquet():
            write_file(folder / PARQUET, to_parquet(rows, columns))
    return rows


def columns_of(rows: Sequence[Row]) -> list[str]:
    """All columns: what was swept first, then the settings, the outcomes, and how it went."""
    first, last = ["run", "state"], ["train_seconds", "hardware", "commits", "attempts", "error"]
    between = [name for row in rows for name in row if name not in first + last]
    settings = [name for name in between if not name.startswith("results.")]
    found = [name for name in between if name.startswith("results.")]
    return list(dict.fromkeys([*first, *settings, *found, *last]))


def to_csv(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    """A line for every run; lists as 4,8,16, truth as true and false, nothing for none."""
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(columns)
    writer.writerows([[spell(row.get(column)) for column in columns] for row in rows])
    return buffer.getvalue().encode()


def spell(value: Any) -> str:
    """A value as a cell of the CSV, and as one would write it in a flag."""
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, list | tuple):
        return ",".join(map(spell, value))
    return "" if value is None else str(value)


def to_parquet(rows: Sequence[Row], columns: Sequence[str]) -> bytes:
    """The same as Parquet; numbers stay numbers, a column of several kinds becomes text."""
    import pyarrow
    from pyarrow import parquet

    arrays = []
    for column in columns:
        values = [row.get(column) for row in rows]
        try:
            arrays.append(pyarrow.array(values))
        except (pyarrow.ArrowInvalid, pyarrow.ArrowTypeError, OverflowError):
            arrays.append(pyarrow.array([None if v is None else spell(v) for v in values]))
    buffer = io.BytesIO()
    parquet.write_table(pyarrow.Table.from_arrays(arrays, names=list(columns)), buffer)
    return buffer.getvalue()
