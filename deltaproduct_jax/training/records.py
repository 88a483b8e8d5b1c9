"""The record of a run in its directory: what was run, what came out, and how to go on.

=================  ==========================================================================
config.json        the resolved configuration; it never changes
run.json           one entry a start: argv, commit, versions, devices, every seed by name
metrics.jsonl      one object a logged step, in order, no step twice
events.*           the same numbers for TensorBoard; derived from metrics.jsonl at any time
checkpoints/       Orbax checkpoints, the best and the newest
results.json       the outcome; a run that has it is finished
=================  ==========================================================================

Whole files appear at once or not at all; a line that a kill has torn is cut off on resume.
"""

import json
from pathlib import Path
from typing import Any

import jax

from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.files import errors_as_one_line, read_json, sync, to_json, write_file
from deltaproduct_jax.training import events
from deltaproduct_jax.training.config import RunConfig

CONFIG, RUN, METRICS, RESULTS = "config.json", "run.json", "metrics.jsonl", "results.json"
CHECKPOINTS = "checkpoints"
Row = dict[str, Any]


class RunRecords:
    """The files of one run directory, except its checkpoints.

    Raises:
        RunDirectoryError: the directory holds another run, or cannot be read or written.
    """

    def __init__(self, directory: Path, config: RunConfig):
        self.directory = directory
        self._log_steps = config.is_logged
        self.rows: list[Row] = []
        self._claim(config.to_dict())

    def _claim(self, config: dict[str, Any]) -> None:
        path = self.directory / CONFIG
        if path.exists():
            refuse_other_config(read_json(path), config, self.directory)
            return
        for name in (RUN, METRICS, RESULTS, CHECKPOINTS):
            if (self.directory / name).exists():
                raise RunDirectoryError(
                    f"{self.directory} has {name} but no {CONFIG}, so it cannot be told which run "
                    "it holds; give another workdir"
                )
        write_file(path, to_json(config))

    def results(self) -> dict[str, Any] | None:
        """The results of a finished run, None before its end."""
        path = self.directory / RESULTS
        return read_json(path) if path.exists() else None

    def write_results(self, results: dict[str, Any]) -> None:
        """Ends the run."""
        write_file(self.directory / RESULTS, to_json(results))

    def add_start(self, start: dict[str, Any]) -> None:
        """Adds how and where the run was started, or resumed."""
        path = self.directory / RUN
        starts = read_json(path)["starts"] if path.exists() else []
        write_file(path, to_json({"starts": [*starts, start]}))

    def cut_back(self, step: int) -> None:
        """Forgets everything recorded after ``step``, a torn last line included."""
        path = self.directory / METRICS
        self.rows = _read_rows(path, step)
        expected = [s for s in range(1, step + 1) if self._log_steps(s)]
        if [row["step"] for row in self.rows] != expected:
            raise RunDirectoryError(
                f"{path} does not hold every record up to step {step}, where the run would go on; "
                "give another workdir"
            )
        write_file(path, b"".join(_line(row) for row in self.rows))
        for stale in self.directory.glob("events.*"):
            if stale.name != events.FILE_NAME:
                with errors_as_one_line(stale, "removed"):
                    stale.unlink()
        content = events.header() + b"".join(events.encode(row) for row in self.rows)
        write_file(self.directory / events.FILE_NAME, content)

    def append(self, row: Row) -> None:
        """Records one step."""
        write_file(self.directory / METRICS, _line(row), append=True)
        write_file(self.directory / events.FILE_NAME, events.encode(row), append=True)
        self.rows.append(row)

    def sync(self) -> None:
        """Waits until the rows are on the disk: a checkpoint must never be ahead of them."""
        if jax.process_index() == 0:
            with errors_as_one_line(self.directory / METRICS, "written"):
                sync(self.directory / METRICS)


def _line(row: Row) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def _read_rows(path: Path, last_step: int) -> list[Row]:
    """The rows up to ``last_step``; the part after the last line break is a torn line."""
    if not path.exists():
        return []
    with errors_as_one_line(path, "read"):
        lines = path.read_bytes().split(b"\n")[:-1]
    rows = []
    for number, line in enumerate(lines, start=1):
        try:
            row = json.loads(line)
            if row["step"] > last_step:
                break
        except (ValueError, KeyError, TypeError) as error:
            raise RunDirectoryError(f"{path}, line {number}, is no record: {error}") from error
        rows.append(row)
    return rows


def refuse_other_config(saved: Any, config: dict[str, Any], directory: Path) -> None:
    """Raises RunDirectoryError, naming the fields, unless both configurations are the same."""
    have, want = _flat(saved), _flat(config)
    differing = [name for name in want | have if have.get(name, ...) != want.get(name, ...)]
    if differing:
        shown = ", ".join(
            f"{name.rpartition('.')[2]} ({_show(have, name)} there, {_show(want, name)} here)"
            for name in differing
        )
        raise RunDirectoryError(
            f"{directory} holds a run with another configuration, differing in {shown}; "
            "give another workdir"
        )


def _flat(config: Any) -> dict[str, Any]:
    if not isinstance(config, dict):
        return {"config": config}
    return {
        f"{section}.{name}": value
        for section, values in config.items()
        for name, value in (values if isinstance(values, dict) else {"": values}).items()
    }


def _show(config: dict[str, Any], name: str) -> str:
    return json.dumps(config[name]) if name in config else "absent"
