"""A run that is trained together with others: all that a run does, but for computing.

It has the directory, locks, records, checkpoints and the rules of a run that is trained alone, by
being one (`Trainer`); its steps and evaluations are computed for it. What goes wrong with it, such
as a loss that is no number or a damaged checkpoint, ends it and none of the others. Its speed and
MFU are its own part of what the devices do for all.
"""

import contextlib
import time
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.models import count_parameters
from deltaproduct_jax.training import resume
from deltaproduct_jax.training.checkpoints import Checkpoints
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.evaluation import Evaluation
from deltaproduct_jax.training.locks import run_lock
from deltaproduct_jax.training.loop import Trainer, initial_model
from deltaproduct_jax.training.measuring.profiling import PROFILE, Profiler
from deltaproduct_jax.training.measuring.throughput import Throughput
from deltaproduct_jax.training.records import CHECKPOINTS, Row, RunRecords
from deltaproduct_jax.training.start import first_state
from deltaproduct_jax.training.step import Metrics, TrainState
from deltaproduct_jax.training.together.beginning import Beginning

Outcome = dict[str, Any] | ConfigError | RunDirectoryError | FloatingPointError


class Member(Trainer):
    """One of the runs of a group.

    Args:
        config: of the run.
        workdir: its directory.
        beginning: of its model.
        mesh_size: devices that the group is spread over.

    Attributes:
        step: the last one made.
        outcome: what results.json holds, or what went wrong; None before the end.
        state: where it goes on, or before its first step; None while the group has it.
        like: the shapes of a state.
        statics: what its model keeps beside parameters, by its place.
    """

    def __init__(self, config: RunConfig, workdir: Path, beginning: Beginning, mesh_size: int):
        self.workdir = workdir
        self.step = 0
        self.outcome: Outcome | None = None
        self.state: TrainState | None = None
        self.like, self.statics = beginning.like, beginning.statics
        self.definition, layout = beginning.definition, beginning.layout
        self._held = contextlib.ExitStack()
        parameters = count_parameters(self.like.params)["total"]
        throughput = Throughput(mesh_size, layout.device_kind, parameters)
        profiler = Profiler(None, workdir / PROFILE)
        super().__init__(config, self.definition, layout, throughput, profiler, time.time())

    @contextlib.contextmanager
    def contained(self) -> Iterator[None]:
        """What goes wrong inside becomes the run's outcome."""
        try:
            yield
        except (ConfigError, RunDirectoryError, FloatingPointError) as error:
            self.outcome = error

    def open(self, start: Mapping[str, Any]) -> None:
        """Takes the run directory, and what is in it: a finished run, or one that goes on.

        Args:
            start: what run.json is to say of this start, but for what is the run's own.
        """
        with self.contained():
            self._held.enter_context(run_lock(self.workdir))
            self.records = RunRecords(self.workdir, self.config)
            self.outcome = self.records.results()
            if self.outcome is not None:
                return
            resume.prepare(self.records, None, self.like)
            self.checkpoints = Checkpoints(self.workdir / CHECKPOINTS)
            self._held.enter_context(self.checkpoints)
            newest = self.checkpoints.newest()
            self.state = resume.newest_state(self.checkpoints, self.like)
            if newest is not None:
                self.source.resume(self.checkpoints.data(newest))
            self.step = newest or 0
            self.records.cut_back(self.step)
            own = {"resumed_from": newest, "seeds": self.config.seeds()}
            self.records.add_start({**start, **own})
            self.count_goodput(self.records)
            if newest is None:
                make_model = partial(initial_model, self.config)
                self.state = first_state(self.config, make_model, self.layout)

    def close(self) -> None:
        """Gives the directory back, once every save has reached the disk."""
        with self.contained():
            self._held.close()

    def is_over(self) -> bool:
        """Whether it makes no more steps."""
        if self.outcome is not None or self.step >= self.config.train.steps:
            return True
        return self._suffices(self.records.rows)

    def note(self, step: int, metrics: Metrics) -> None:
        """Records a step behind which nothing else is done."""
        if self.outcome is not None:
            return
        with self.contained():
            self.records.append(self._row(step, metrics, self.records.rows))

    def look(self, step: int, metrics: Metrics, evaluation: Evaluation | None) -> Row | None:
        """Records a step behind which there is more to do; returns its row, None once it failed.

        Args:
            step: its number.
            metrics: of the step.
            evaluation: of the validation split, if it was evaluated.
        """
        if self.outcome is not None:
            return None
        with self.contained():
            row = self._row(step, metrics, self.records.rows)
            if evaluation is not None:
                row |= evaluation.to_row()
            if self.config.is_logged(step):
                self.records.append(row)
            return row
        return None

    def save(self, state: TrainState, row: Row, *, always: bool) -> None:
        """Saves the state behind the step of a row, if that is due or ``always``."""
        with self.contained():
            self._save(state, row, self.records, self.checkpoints, always=always)

    def best(self) -> TrainState | None:
        """The state of its best checkpoint; None, and an outcome, where there is none."""
        with self.contained():
            self._best_step, state = resume.best_state(self.checkpoints, self.like)
            return state
        return None

    def end(self, tests: Sequence[dict[str, Any]]) -> None:
        """Writes the results; ``tests`` has an entry for each test length."""
        with self.contained():
            results = {
                "steps": self.step,
                "best_step": self._best_step,
                "parameters": count_parameters(self.like.params),
                **self.of_run(self.records),
                "test": list(tests),
            }
            self.records.write_results(results)
            self.outcome = results


def require_same_models(members: Sequence[Member]) -> None:
    """ConfigError if a number in which runs differ is kept by a model, to be read at every step."""
    first = members[0]
    for member in members[1:]:
        for place, value in member.statics.items():
            there = first.statics.get(place)
            if value != there:
                raise ConfigError(
                    f"{member.workdir.name} cannot be trained together with {first.workdir.name}: "
                    f"their models differ beyond parameters, {place} being {value} and {there}; "
                    "give another launcher"
                )
