"""The training loop: reads from top to bottom in the order in which things happen."""

import contextlib
import math
import sys
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import jax
import numpy as np
from flax import nnx

from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.files import AnyPath, is_there, require_directory, require_writable
from deltaproduct_jax.models import SequenceModel, count_parameters
from deltaproduct_jax.parallel import processes
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.parallel.layout import Layout
from deltaproduct_jax.settings import make_key
from deltaproduct_jax.training import compiled, resume
from deltaproduct_jax.training.buckets import Bucket, open_bucket
from deltaproduct_jax.training.checkpoints import Checkpoints
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.evaluation import evaluate, selection_of
from deltaproduct_jax.training.locks import run_lock
from deltaproduct_jax.training.measuring.memory import (
    evaluation_sizes,
    require_memory_of_config,
    require_memory_of_state,
    training_sizes,
)
from deltaproduct_jax.training.measuring.profiling import PROFILE, Profiler
from deltaproduct_jax.training.measuring.throughput import Goodput, Throughput, in_words
from deltaproduct_jax.training.progress import Progress, Stopwatch
from deltaproduct_jax.training.provenance import describe_start
from deltaproduct_jax.training.records import CONFIG, Row, RunRecords, fetch, open_records
from deltaproduct_jax.training.skipping import require_progress
from deltaproduct_jax.training.source import source_of
from deltaproduct_jax.training.start import (
    first_state,
    layout_of,
    require_same_run,
    shapes_of,
)
from deltaproduct_jax.training.step import (
    Metrics,
    ModelDefinition,
    Params,
    TrainState,
    loss_and_correct,
    step_of_run,
)
from deltaproduct_jax.training.stopping import SAVING, Stopped, StopRequest, stop_on_signals


def train(
    config: RunConfig,
    workdir: Path,
    argv: Sequence[str],
    *,
    resume_from: int | None = None,
    devices: DeviceConfig | None = None,
    bucket: str | None = None,
) -> dict[str, Any]:
    """Trains a model, or goes on where a killed run of the same configuration stood.

    The parameters, the data and so the curve of losses depend on ``config`` alone, to rounding on
    whatever devices, and bit for bit on the same mesh. A finished run
    is not touched: its results are returned again. With more ``steps`` it goes further, where no
    step that it has made depends on their number.

    Args:
        config: the run.
        workdir: the run directory, created if need be.
        argv: the command, for the record.
        resume_from: step of the checkpoint to go on from, those after it and damaged ones being
            renamed; 0 begins again beside the old records; None is the newest.
        devices: where it runs; None is all devices, along the batch. Several processes call this
            alike, each once it has joined.
        bucket: where checkpoints are saved and records copied, as gs://BUCKET/FOLDER, or a folder
            on a disk; each process may then have a ``workdir`` of its own, and a run that is not
            in it goes on from there. None keeps all in ``workdir``.

    Returns:
        What results.json holds: the best checkpoint's scores on the test split at all lengths.

    Raises:
        ConfigError: this machine cannot run ``config``.
        RunDirectoryError: ``workdir`` or ``bucket`` holds another run, is in use by another
            process, or cannot be read or written.
        FloatingPointError: too many steps in a row were skipped, or a norm is no longer finite.
        Stopped: a signal asked for the end; all is saved.
    """
    began = time.time()
    require_directory(workdir, "workdir")
    store = None if bucket is None else open_bucket(bucket, workdir)
    home = workdir if store is None else store.path  # where all processes see the run
    fresh = not is_there(home / CONFIG)
    alike = {"bucket": bucket, "resume_from": resume_from, "workdir_has_a_run": not fresh}
    require_same_run(config, devices or DeviceConfig(), **alike)
    if fresh and resume_from:
        raise RunDirectoryError(f"resume_from={resume_from} is of no use: {home} holds no run")
    results = None if fresh else _results_before(config, workdir, home, store)
    if results is not None:
        return _finished(results, home, resume_from)
    with processes.first_goes_first("look for room"):  # now, not when all is compiled
        places = {home: "bucket", workdir: "workdir"} if processes.is_first() else {}
        for place, name in places.items():
            require_writable(place, name)
    with jax.threefry_partitionable(True), stop_on_signals(SAVING) as request:
        trainer, state = _first(config, devices or DeviceConfig(), workdir, began)
        if fresh:  # what this machine cannot run leaves nothing behind
            trainer.prepare(state, trainer.source.training(0), request)
        _go_on(request, "before the first step", home)
        with contextlib.ExitStack() as held:
            with processes.first_goes_first("claim the run directory"):
                held.enter_context(run_lock(workdir))
                records = open_records(workdir, config, store)
                results = records.results()  # another process may have ended the run since
            if results is not None:
                return _finished(results, home, resume_from)
            return _train(trainer, state, records, argv, request, resume_from)


def _results_before(
    config: RunConfig, workdir: Path, home: AnyPath, store: Bucket | None
) -> dict[str, Any] | None:
    """The results of a finished run, whose records are brought from its bucket; else None."""
    results = RunRecords(home, config, store).results()
    if results is not None and store is not None and processes.is_first():
        with run_lock(workdir):
            fetch(workdir, config, store)
    return results


def _first(
    config: RunConfig, devices: DeviceConfig, workdir: Path, began: float
) -> tuple["Trainer", TrainState]:
    """What trains the run, and the state before its first step."""
    require_memory_of_config(config)
    profiler = Profiler(devices.profiled_steps(), workdir / PROFILE)
    profiler.require_within(config.train.steps)
    make_model = partial(initial_model, config)
    layout = layout_of(config, make_model, devices)
    definition, shapes = shapes_of(config, make_model)
    require_memory_of_state(shapes)
    state = first_state(config, make_model, layout)
    parameters = count_parameters(shapes.params)["total"]
    throughput = Throughput(layout.mesh.size, layout.device_kind, parameters)
    return Trainer(config, definition, layout, throughput, profiler, began), state


def _finished(results: dict[str, Any], home: AnyPath, resume_from: int | None) -> dict[str, Any]:
    if resume_from is not None:
        raise RunDirectoryError(f"resume_from={resume_from} is of no use: {home} is finished")
    return results


def _train(
    trainer: "Trainer",
    state: TrainState,
    records: RunRecords,
    argv: Sequence[str],
    request: StopRequest,
    resume_from: int | None,
) -> dict[str, Any]:
    config, home = trainer.config, records.checkpoints.parent
    with processes.first_goes_first("prepare the run directory"):
        if processes.is_first():
            resume.prepare(records, resume_from, state)

    with Checkpoints(records.checkpoints) as checkpoints:
        newest = checkpoints.newest()
        state = resume.newest_state(checkpoints, state)
        if newest is not None:
            trainer.source.resume(checkpoints.data(newest))
        sizes = trainer.layout.sizes
        start = describe_start(argv, config.seeds(), newest, sizes, trainer.began)
        with processes.first_goes_first("cut the records back"):
            records.cut_back(newest or 0)
            records.add_start(start)

        state = trainer.run(state, records, checkpoints, request)
        _go_on(request, f"after step {int(state.step)} of {config.train.steps}", home)

        # Opened anew: to a process that is not the first, what Orbax saved to a bucket by this
        # very object is still being saved.
        with Checkpoints(records.checkpoints, read_only=True) as saved:
            best, selected = resume.best_state(saved, state)
        tests = []
        for length in config.task.test_lengths:
            evaluation = trainer.evaluate(selected.params, "test", length)
            tests.append(evaluation.to_dict(length))
            _go_on(request, "before its results", home)
        results = {
            "steps": int(state.step),
            "best_step": best,
            "parameters": count_parameters(selected.params),
            **trainer.of_run(records),
            "test": tests,
        }
    records.write_results(results)
    if processes.is_first():
        print(in_words(results["throughput"], results["skipped_steps"]), file=sys.stderr)
    return results


def _go_on(request: StopRequest, where: str, home: AnyPath) -> None:
    """Raises Stopped if the end was asked for; all that was done must be saved."""
    if request.is_set():
        raise Stopped(
            f"stopped by {request.name} {where}; the same command goes on in {home}",
            request.signal_number,
        )


def initial_model(config: RunConfig) -> nnx.Module:
    """A run's model before its first step."""
    return SequenceModel(config.model, rngs=nnx.Rngs(make_key(config.seeds()["init"])))


class Trainer:
    """The compiled steps of a run, and the loop over them."""

    def __init__(
        self,
        config: RunConfig,
        definition: ModelDefinition,
        layout: Layout,
        throughput: Throughput,
        profiler: Profiler,
        began: float,
    ):
        self.config = config
        self.began = began  # in seconds since 1970
        self.layout = layout
        self.throughput = throughput
        self.profiler = profiler
        self.source = source = source_of(config, layout)
        self.stopwatch = Stopwatch()
        train = config.train

        def eval_step(length: int, params: Params, given: Any):
            batch = source.eval_batch(given, length)
            loss, correct_BT = loss_and_correct(
                definition, params, layout.cut_batch(batch), layout, train.loss_settings
            )
            outputs = loss, correct_BT[:, : batch.mask.shape[1]], batch.mask
            # Every process scores them.
            return layout.everywhere(outputs)

        # A save under way holds on to the arrays it writes; JAX then does not reuse their memory.
        self._train_step = compiled.CompiledByLength(
            step_of_run(config, definition, layout, source.train_batch),
            "the training step",
            training_sizes(config),
            self.stopwatch,
            donate=True,
            compiler_options=compiled.compiler_options(layout.mesh, config.model.hidden_size),
        )
        self._eval_step = compiled.CompiledByLength(
            eval_step, "the evaluation", evaluation_sizes(config), self.stopwatch
        )

    def prepare(self, state: TrainState, given: Any, request: StopRequest) -> None:
        """Makes all programs from ``state`` on; ConfigError if this machine has none or no room."""
        config, of_evaluation = self.config, lambda first: (state.params, first)
        wanted = [
            *compiled.trained_after(int(state.step), config, self._train_step, (state, given)),
            *compiled.evaluated_with(config, self.source, self._eval_step, of_evaluation),
        ]
        compiled.prepare(wanted, self.stopwatch, config.model.implementation, request)

    def evaluate(self, params: Params, split: str, length: int):
        """The evaluation of ``params`` on a split at one length."""
        return evaluate(self._eval_step, params, self.source, split, length)

    def count_goodput(self, records: RunRecords) -> None:
        """Begins to count from what is on record."""
        self._goodput = Goodput(records.rows, records.starts())

    def of_run(self, records: RunRecords) -> dict[str, Any]:
        """What results.json has of a whole run beside its scores."""
        return {
            "skipped_steps": records.rows[-1].get("skipped_steps", 0),
            "throughput": self.throughput.of_run(records.rows, records.starts(), time.time()),
        }

    def run(
        self,
        state: TrainState,
        records: RunRecords,
        checkpoints: Checkpoints,
        request: StopRequest,
    ) -> TrainState:
        """Steps until the last, until a validation suffices, or until asked to end."""
        config = self.config
        step = int(state.step)
        progress = Progress(step, config.train.steps)
        self.count_goodput(records)
        self.profiler.go_on(step)
        self.stopwatch.lap()
        pending: tuple[int, Metrics] | None = None
        under_way = compiled.UnderWay()

        def record(row: Row) -> None:
            records.append(row)
            progress.show(row)

        while step < config.train.steps and not self._suffices(records.rows):
            given = self.source.training(step)
            step += 1
            if not self._train_step.has(config.length_at(step)):
                self.prepare(state, given, request)
                if request.is_set():  # before the first step from here on: nothing is to be saved
                    break
            self.profiler.before(step, state)
            state, metrics = self._train_step(config.length_at(step), state, given)
            under_way.add(metrics)
            # Only now that this step is under way are the numbers of an earlier one fetched.
            if pending is not None:
                record(self._row(*pending, records.rows))
                pending = None
            stopping = request.reached(step)
            if not (self.stops_at(step) or stopping):
                if config.is_logged(step):
                    pending = step, metrics
                continue
            row = self._row(step, metrics, records.rows)
            if config.is_evaluated(step):
                row |= self._validate(state.params)
            if config.is_logged(step):
                record(row)
            with self.stopwatch.paused():
                self._save(state, row, records, checkpoints, always=stopping)
            if stopping:
                break
        self.profiler.close(state)
        progress.close()
        checkpoints.wait()
        return state

    def stops_at(self, step: int) -> bool:
        """Whether the loop looks at the state after ``step`` before it goes on."""
        return self.config.is_evaluated(step) or step % self.config.train.checkpoint_every == 0

    def _suffices(self, rows: list[Row]) -> bool:
        selection = selection_of(rows[-1], self.source.selected_by) if rows else None
        enough = self.config.train.stop_accuracy
        return selection is not None and enough is not None and selection[0] >= enough

    def _validate(self, params: Params) -> dict[str, float]:
        with self.stopwatch.paused():
            return self.evaluate(params, "valid", self.config.select_length).to_row()

    def _save(
        self,
        state: TrainState,
        row: Row,
        records: RunRecords,
        checkpoints: Checkpoints,
        *,
        always: bool,
    ) -> None:
        """Saves when a checkpoint is due, and after an evaluation that was not beaten before."""
        train, step, by = self.config.train, row["step"], self.source.selected_by
        selection = selection_of(row, by)
        before = filter(None, (selection_of(other, by) for other in records.rows))
        best_now = selection is not None and selection >= max(before)
        due = step % train.checkpoint_every == 0 or step == train.steps
        if always or due or best_now or self._suffices(records.rows):
            records.sync()
            checkpoints.save(state, step, selection, self.source.state())

    def _row(self, step: int, metrics: Metrics, rows: list[Row]) -> Row:
        """The record of one step; waits until its numbers are there."""
        config = self.config
        numbers = {name: np.asarray(x).item() for name, x in jax.device_get(metrics).items()}
        last = rows[-1] if rows else {"step": 0, "tokens": 0, "skipped_steps": 0}
        in_a_row = numbers.pop("skipped_in_a_row")
        require_progress(numbers, in_a_row, last["step"], step, config.train.max_skipped_steps)
        lengths = sum(config.length_at(s) for s in range(last["step"] + 1, step + 1))
        tokens = lengths * config.train.batch_size
        speed = tokens / self.stopwatch.lap()
        numbers |= self.source.columns(numbers["loss"])
        row = {
            "step": step,
            **{name: value for name, value in numbers.items() if math.isfinite(value)},
            "length": config.counted_at(step),
            "tokens": tokens + last["tokens"],
            "tokens_per_second": speed,
            "time": time.time(),
            **self.throughput.columns(speed),
        }
        self._goodput.add(row)
        goodput = self._goodput.until(row["time"])
        return row if goodput is None else row | {"goodput": goodput}
