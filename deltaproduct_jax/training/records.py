"""The record of a run in its directory: what was run, what came out, and how to go on.

=================  ==========================================================================
config.json        the resolved configuration; only a larger number of steps may replace it
run.json           one entry a start: argv, commit, versions, devices, every seed by name
metrics.jsonl      one object a logged step, in order, no step twice
events.*           the same numbers for TensorBoard; derived from metrics.jsonl at any time
checkpoints/       Orbax checkpoints, the best and the newest
results.json       the outcome; a run that has it is finished
*.aside1*          what a run that began again or went further has put out of its way
=================  ==========================================================================

Whole files appear at once or not at all; a line that a kill has torn is cut off on resume. What is
read is checked by the schemas below. With a bucket (buckets.py) checkpoints and owner.json are
there alone, the other files except events there too.
"""

import contextlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, NotRequired, TypedDict

import jax

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.files import (
    AnyPath,
    errors_as_one_line,
    is_there,
    read_json,
    read_lines,
    set_aside,
    sync,
    write_file,
)
from deltaproduct_jax.strict_json import to_json
from deltaproduct_jax.training import events
from deltaproduct_jax.training.buckets import Bucket
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.extending import (
    ABSENT,
    differences,
    is_extension,
    with_defaults,
)

CONFIG, RUN, METRICS, RESULTS = "config.json", "run.json", "metrics.jsonl", "results.json"
CHECKPOINTS = "checkpoints"
Row = dict[str, Any]


class _Columns(TypedDict):
    """What every line of metrics.jsonl has; lines of evaluated steps have the valid ones too."""

    step: int
    loss: NotRequired[float]  # of a step that was skipped, if it was no number
    accuracy: float
    tokens: int
    tokens_per_second: float
    time: float
    skipped_steps: NotRequired[int]  # so far; version 0.1 skipped none
    valid_sequence_accuracy: NotRequired[float]
    valid_token_accuracy: NotRequired[float]


class _Start(TypedDict):
    time: NotRequired[str]
    # The steps that the run had before it was told to go further.
    extended_from: NotRequired[int]


class _Run(TypedDict):
    starts: list[_Start]


class ScoreRecord(TypedDict):
    """What each score in results.json has; those of a task have more."""

    sequence_accuracy: float
    token_accuracy: NotRequired[float]


class LengthScores(TypedDict):
    """The scores at one test length."""

    length: int
    strict: NotRequired[ScoreRecord]


class Results(TypedDict):
    """What results.json holds."""

    steps: int
    best_step: int
    parameters: dict[str, int]
    skipped_steps: NotRequired[int]
    throughput: NotRequired[dict[str, Any]]
    test: list[LengthScores]


MOVED = {"task.data"}  # what differs where only the folders of text have other paths
ConfigFile = dict[str, dict[str, Any]]
MetricsLine = Annotated[dict[str, float], _Columns]


class RunRecords:
    """The files of one run directory, except its checkpoints.

    Args:
        directory: of the run; the bucket's own for a process that only reads what is there.
        config: of the run.
        bucket: what takes copies of the files; None without one.

    Raises:
        RunDirectoryError: the directory holds another run, or cannot be read or written.
    """

    def __init__(self, directory: AnyPath, config: RunConfig, bucket: Bucket | None = None):
        self.directory = directory
        self.checkpoints = (directory if bucket is None else bucket.path) / CHECKPOINTS
        self._flag = "bucket" if bucket is not None and bucket.path == directory else "workdir"
        self._bucket = bucket
        self._config = config
        self.rows: list[Row] = []
        self._claim(config.to_dict())

    def _claim(self, config: ConfigFile) -> None:
        path = self.directory / CONFIG
        if is_there(path):
            saved = self._saved_config()
            if not is_extension(saved, self._config):
                refuse_other_config(saved, config, self.directory, self._flag)
            return
        for name in (RUN, METRICS, RESULTS, CHECKPOINTS):
            if is_there(self.directory / name):
                raise RunDirectoryError(
                    f"{self.directory} has {name} but no {CONFIG}, so it cannot be told which run "
                    f"it holds; give another {self._flag}"
                )
        write_file(path, to_json(config))

    @property
    def is_extended(self) -> bool:
        """Whether the run is to make more steps than config.json says."""
        return self._saved_config() != self._config.to_dict()

    def _saved_config(self) -> ConfigFile:
        saved = saved_config(self.directory)
        with errors_of(self.directory / CONFIG):
            RunConfig.check_sections(saved)
        return with_defaults(saved, self._config)

    def results(self) -> dict[str, Any] | None:
        """The results of a finished run, None before its end."""
        return None if self.is_extended else read_results(self.directory)

    def write_results(self, results: dict[str, Any]) -> None:
        """Ends the run."""
        write_file(self.directory / RESULTS, to_json(results))
        self._copy(RESULTS)

    def _copy(self, *names: str) -> None:
        if self._bucket is not None:
            self._bucket.put(self.directory, names)

    def starts(self) -> list[dict[str, Any]]:
        """How and where the run was started and resumed."""
        path = self.directory / RUN
        return read_json(path, _Run)["starts"] if is_there(path) else []

    def add_start(self, start: dict[str, Any]) -> None:
        """Adds how and where the run was started, or resumed.

        The first start with more steps puts the results of the fewer aside.
        """
        if not self.is_extended:
            write_file(self.directory / RUN, to_json({"starts": [*self.starts(), start]}))
        else:
            self._extend(start)
        if self._bucket is not None and jax.process_index() == 0:
            # What was put aside comes first, before anything takes its name.
            aside = sorted(path.name for path in self.directory.glob("*.aside*.json*"))
            self._copy(*aside, METRICS, RUN)
            if not is_there(self.directory / RESULTS):
                self._bucket.drop(RESULTS)
            self._copy(CONFIG)

    def _extend(self, start: dict[str, Any]) -> None:
        path = self.directory / CONFIG
        # In this order a kill in between leaves a run that can be extended by the same command.
        start = start | {"extended_from": read_json(path, ConfigFile)["train"]["steps"]}
        write_file(self.directory / RUN, to_json({"starts": [*self.starts(), start]}))
        if is_there(self.directory / RESULTS):
            set_aside(self.directory / RESULTS)
        write_file(path, to_json(self._config.to_dict()))

    def saved_rows(self) -> list[Row]:
        """The rows on the disk, without a torn last line."""
        return read_lines(self.directory / METRICS, MetricsLine)

    def saves_due(self, rows: Sequence[Row]) -> int:
        """How many of the steps that these rows record were due to be saved."""
        every = self._config.train.checkpoint_every
        return sum(row["step"] % every == 0 for row in rows)

    def begin_again(self) -> list[AnyPath]:
        """Puts what was recorded aside; returns where it is now."""
        recorded = (self.directory / METRICS, self.checkpoints)
        return [set_aside(path) for path in recorded if is_there(path)]

    def cut_back(self, step: int) -> None:
        """Forgets everything recorded after ``step``, a torn last line included."""
        path = self.directory / METRICS
        rows = [row for row in self.saved_rows() if row["step"] <= step]
        # The last step of a run that is extended was logged for being the last.
        ends = {start.get("extended_from") for start in self.starts()}
        expected = [s for s in range(1, step + 1) if self._config.is_logged(s) or s in ends]
        if [row["step"] for row in rows] != expected:
            raise RunDirectoryError(
                f"{path} does not hold every record up to step {step}, where the run would go on; "
                "give another workdir, or --resume_from=0 to begin again beside these records"
            )
        self.rows = rows
        write_file(path, b"".join(_line(row) for row in self.rows))
        for stale in self.directory.glob("events.*") if jax.process_index() == 0 else ():
            if stale.name != events.FILE_NAME:
                with errors_as_one_line(stale, "removed"):
                    stale.unlink()
        header = events.header(self._config.to_dict())
        content = header + b"".join(events.encode(row) for row in self.rows)
        write_file(self.directory / events.FILE_NAME, content)

    def append(self, row: Row) -> None:
        """Records one step."""
        write_file(self.directory / METRICS, _line(row), append=True)
        write_file(self.directory / events.FILE_NAME, events.encode(row), append=True)
        self.rows.append(row)

    def sync(self) -> None:
        """Waits until the rows are on the disk, and in the bucket if there is one.

        A checkpoint must never be ahead of them.
        """
        if jax.process_index() == 0:
            with errors_as_one_line(self.directory / METRICS, "written"):
                sync(self.directory / METRICS)
        self._copy(METRICS)


def _line(row: Row) -> bytes:
    return json.dumps(row, allow_nan=False).encode() + b"\n"


def open_records(directory: Path, config: RunConfig, bucket: Bucket | None) -> RunRecords:
    """The records of a run that is to be written; see `RunRecords` for what it raises.

    Of the processes of a run with a bucket, the first makes ``directory`` hold what the bucket
    has; all others read there, and write nothing.
    """
    if bucket is None:
        if jax.process_index() != 0 and not is_there(directory / CONFIG):
            raise RunDirectoryError(
                f"{directory} does not hold the run that process 0 has begun; all processes see "
                "one workdir, or have --bucket"
            )
        return RunRecords(directory, config)
    if jax.process_index() == 0:
        _require_fit(directory, config, bucket)
    shared = RunRecords(bucket.path, config, bucket)
    if jax.process_index() != 0:
        return shared
    bucket.take_over()
    fetch(directory, config, bucket)
    return RunRecords(directory, config, bucket)


def fetch(directory: Path, config: RunConfig, bucket: Bucket) -> None:
    """Makes ``directory`` hold what the bucket has of its run.

    Raises:
        RunDirectoryError: the directory holds what the bucket has not.
    """
    _require_fit(directory, config, bucket)
    if is_there(directory / RESULTS) and RESULTS not in bucket.names():
        # Of fewer steps, or not copied before a kill: the bucket's checkpoints give them again.
        set_aside(directory / RESULTS)
    bucket.get(directory)


def _require_fit(directory: Path, config: RunConfig, bucket: Bucket) -> None:
    if is_there(directory / CHECKPOINTS):
        raise RunDirectoryError(
            f"{directory} has {CHECKPOINTS} of its own, which are not those of bucket="
            f"{bucket.path}; give another workdir, or leave --bucket out"
        )
    if not is_there(directory / CONFIG):
        return
    RunRecords(directory, config)
    if not is_there(bucket.path / CONFIG):
        raise RunDirectoryError(
            f"{directory} holds a run that is not in bucket={bucket.path}; give another workdir, "
            "or the bucket that it was saved to"
        )


@contextlib.contextmanager
def errors_of(config: AnyPath) -> Iterator[None]:
    """Of a file that is no run's configuration, says so; RunDirectoryError."""
    try:
        yield
    except (ValueError, TypeError) as error:  # what is missing, or has another type
        raise RunDirectoryError(f"{config} describes no run: {error}") from error


def saved_config(directory: AnyPath) -> ConfigFile:
    """The configuration of a run; RunDirectoryError if it cannot be read."""
    return read_json(directory / CONFIG, ConfigFile)


def read_results(directory: AnyPath) -> dict[str, Any] | None:
    """The results of a run, None where there are none; RunDirectoryError if they are not whole."""
    path = directory / RESULTS
    return read_json(path, Results) if is_there(path) else None


def refuse_other_config(
    saved: Any, config: dict[str, Any], directory: AnyPath, flag: str = "workdir"
) -> None:
    """Raises RunDirectoryError, naming the fields, unless both configurations are the same.

    A field that the version which saved the one did not have is the same at its default.
    """
    differing = differences(saved, config)
    if any(there is ABSENT for there, _ in differing.values()):
        with contextlib.suppress(ConfigError):  # of a script that has sections of its own
            differing = differences(with_defaults(saved, RunConfig.from_dict(config)), config)
    if differing:
        shown = ", ".join(
            f"{name.rpartition('.')[2]} ({_show(there)} there, {_show(here)} here)"
            for name, (there, here) in differing.items()
        )
        back = "move the text back, if it is only elsewhere, or " if set(differing) == MOVED else ""
        raise RunDirectoryError(
            f"{directory} holds a run with another configuration, differing in {shown}; "
            f"{back}give another {flag}"
        )


def _show(value: Any) -> str:
    return "absent" if value is ABSENT else json.dumps(value)
