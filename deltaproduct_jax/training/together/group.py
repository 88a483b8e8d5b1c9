"""Runs that differ only in numbers (`numbers.FREE`), trained together by one compiled program.

Each run is what it would be alone: the same data, the same losses to rounding, its own directory,
early stop and best checkpoint. It may have been begun alone, and may go on alone. Whoever is behind
catches up first; whoever has stopped is left out of the program once that saves more time than
compiling a smaller one takes.
"""

import contextlib
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh

from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import is_there, require_writable
from deltaproduct_jax.training.compiled import (
    SPLITS,
    UnderWay,
    evaluated_with,
    prepare,
    trained_after,
)
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.evaluation import Evaluation, scored
from deltaproduct_jax.training.measuring.memory import (
    require_memory_of_config,
    require_memory_of_state,
)
from deltaproduct_jax.training.progress import Stopwatch
from deltaproduct_jax.training.provenance import describe_start
from deltaproduct_jax.training.records import CONFIG
from deltaproduct_jax.training.step import Metrics, Params
from deltaproduct_jax.training.stopping import SAVING, Stopped, StopRequest, stop_on_signals
from deltaproduct_jax.training.together.beginning import beginnings_of
from deltaproduct_jax.training.together.given import given_to, share_streams
from deltaproduct_jax.training.together.mapped import (
    MappedProgram,
    mesh_of_runs,
    numbers_of,
    put,
    shapes_in_slots,
    slots_for,
    stacked,
)
from deltaproduct_jax.training.together.member import Member, Outcome, require_same_models
from deltaproduct_jax.training.together.numbers import FREE, program_of


def train_together(
    configs: Sequence[RunConfig], workdirs: Sequence[Path], argv: Sequence[str]
) -> list[Outcome]:
    """Trains runs in one program on the devices of this process, or goes on where they stood.

    Args:
        configs: of the runs; they differ in the numbers of `numbers.FREE` alone.
        workdirs: a run directory each, as `loop.train` takes it.
        argv: the command, for the record.

    Returns:
        Of each run what results.json holds, or the error that ended it. The others went on.

    Raises:
        ConfigError: the runs do not fit into one program, or not into this machine.
        Stopped: a signal asked for the end; all is saved.
    """
    _require_one_program(configs)
    for workdir in workdirs:
        require_writable(workdir, "workdir")
    require_memory_of_config(configs[0])
    with jax.threefry_partitionable(True), stop_on_signals(SAVING) as request:
        mesh = mesh_of_runs()
        runs = zip(configs, workdirs, beginnings_of(configs), strict=True)
        members = [Member(*run, mesh.size) for run in runs]
        require_same_models(members)
        share_streams(members)
        try:
            Group(members, mesh, request).train(argv)
        finally:
            for member in reversed(members):
                member.close()
    return [member.outcome for member in members]


def _require_one_program(configs: Sequence[RunConfig]) -> None:
    if len({program_of(config.to_dict()) for config in configs}) != 1:
        names = ", ".join(name for names in FREE.values() for name in names)
        raise ConfigError(f"runs that are trained together may differ in {names} alone")


class Pauses:
    """Pauses of one kind, in which all stopwatches stand still; ``seconds`` is their sum."""

    def __init__(self, watches: Sequence[Stopwatch]):
        self._watches = watches
        self.seconds = 0.0

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        """Leaves the time inside out of every account but this one."""
        began = time.perf_counter()
        with contextlib.ExitStack() as stack:
            for watch in self._watches:
                stack.enter_context(watch.paused())
            yield
        self.seconds += time.perf_counter() - began


class Group:
    """The members, who has which slot of the program, and the loop over its steps."""

    def __init__(self, members: Sequence[Member], mesh: Mesh, request: StopRequest):
        self.members = members
        self.config = members[0].config  # for what all have in common
        self._request = request
        self._mesh = mesh
        self._watch = Stopwatch()
        watches = [self._watch, *(member.stopwatch for member in members)]
        self._compiling, self._aside = Pauses(watches), Pauses(watches)
        self._programs: dict[int, MappedProgram] = {}  # by their number of slots
        self._training: list[Member] = []
        self._steps_made, self._seconds = 0, 0.0

    def train(self, argv: Sequence[str]) -> None:
        """Trains every member to its end."""
        slots = slots_for(len(self.members), self._mesh)
        first = self.members[0]
        require_memory_of_state(shapes_in_slots(first.like, slots, self._mesh))
        if not all(is_there(member.workdir / CONFIG) for member in self.members):
            # What this machine cannot run leaves nothing behind.
            rest = first.source.training(0), numbers_of(self.config.train), np.bool_(True)
            self._prepare(slots, 0, *shapes_in_slots((first.like, *rest), slots, self._mesh))
        self._go_on("before the first step")
        start = describe_start(argv, {}, None, dict(self._mesh.shape), first.began)
        for member in self.members:
            member.open(start | {"runs_together": len(self.members)})
        self._run()
        self._test()

    def _go_on(self, where: str) -> None:
        if self._request.is_set():
            raise Stopped(
                f"stopped by {self._request.name} {where}; the same command goes on",
                self._request.signal_number,
            )

    def _program(self, slots: int) -> MappedProgram:
        if slots not in self._programs:
            first = self.members[0]
            self._programs[slots] = MappedProgram(
                self.config, first.source, first.definition, self._mesh, self._compiling
            )
        return self._programs[slots]

    def _prepare(self, slots: int, step: int, *of_step: Any) -> None:
        """Makes the programs of all that is ahead behind ``step`` in so many slots.

        ``of_step``: what the next step is called with, arrays ``[S, ...]`` or their shapes.
        """
        first, program, config = self.members[0], self._program(slots), self.config
        of_evaluation = lambda one: shapes_in_slots((first.like.params, one), slots, self._mesh)
        # Where this one is smaller than that of all, all are tested by the other.
        unfinished = sum(member.outcome is None for member in self.members)
        splits = SPLITS if slots == slots_for(unfinished, self._mesh) else ("valid",)
        wanted = [
            *trained_after(step, config, program.train_step, of_step),
            *evaluated_with(config, first.source, program.eval_step, of_evaluation, splits),
        ]
        # Behind a step there is something to be saved, which takes all that is wanted.
        request = None if self._steps_made else self._request
        prepare(wanted, self._compiling, config.model.implementation, request)

    def _seat(self, members: Sequence[Member]) -> None:
        """Moves the states of these members into slots of a program that is no larger than needed.

        What is left of the slots repeats the first member, and nobody looks at it.
        """
        slots = slots_for(len(members), self._mesh)
        in_slots = [*members, *[members[0]] * (slots - len(members))]
        place = lambda tree: put(tree, self._mesh)
        self.program, self._seated = self._program(slots), list(members)
        self._state = place(stacked([member.state for member in in_slots]))
        self._given = given_to(self.config, in_slots, self._mesh)
        self._numbers = place(stacked([numbers_of(member.config.train) for member in in_slots]))
        self._training = []
        for member in members:
            member.state = None

    def _let_train(self, training: list[Member]) -> None:
        """From here on these make steps, and the rest of those seated do not."""
        if training == self._training:
            return
        for member in training:
            if member not in self._training:
                member.stopwatch.lap()
        self._training = training
        takes_part = [member in training for member in self._seated]
        spare = slots_for(len(self._seated), self._mesh) - len(self._seated)
        self._takes_part = put(np.array(takes_part + [False] * spare), self._mesh)

    def _run(self) -> None:
        """Steps until every member is over, or until asked to end."""
        going = [member for member in self.members if not member.is_over()]
        if going:
            self._seat(going)
        self._watch.lap()
        pending: tuple[int, Metrics, list[Member]] | None = None
        under_way = UnderWay()
        while going:
            step = 1 + min(member.step for member in going)
            self._let_train([member for member in going if member.step == step - 1])
            metrics = self._step(step)
            under_way.add(metrics)
            # Only now that this step is under way are the numbers of an earlier one fetched.
            if pending is not None:
                self._note(*pending)
                pending = None
            stopping = self._request.reached(step)
            if not (stopping or self._training[0].stops_at(step)):
                if self.config.is_logged(step):
                    pending = step, metrics, self._training
                continue
            self._look(step, metrics, save=stopping)
            self._go_on(f"after step {step} of {self.config.train.steps}")
            going = [member for member in going if not member.is_over()]
            self._make_room(going)

    def _step(self, step: int) -> Metrics:
        given = self._given.training(step - 1, self._training)
        arguments = self._state, given, self._numbers, self._takes_part
        length = self.config.length_at(step)
        if not self.program.train_step.has(length):
            self._prepare(len(self._takes_part), step - 1, *arguments)
            if not self._steps_made:
                self._go_on("before the first step")
        self._state, metrics = self.program.train_step(length, *arguments)
        for member in self._training:
            member.step = step
        self._steps_made += 1
        return metrics

    def _of_each(self, tree: Any, members: Sequence[Member]) -> Iterator[tuple[Member, Any]]:
        """Each of these members with its part of arrays [S, ...], in the host's memory."""
        on_host = jax.device_get(tree)
        for slot, member in enumerate(self._seated):
            if member in members:
                yield member, jax.tree.map(lambda x, slot=slot: x[slot], on_host)

    def _note(self, step: int, metrics: Metrics, training: Sequence[Member]) -> None:
        for member, own in self._of_each(metrics, training):
            member.note(step, own)
        self._show(step)

    def _look(self, step: int, metrics: Metrics, *, save: bool) -> None:
        """Evaluates, records and saves those that made a step."""
        evaluations: dict[Member, Evaluation] = {}
        numbers = dict(self._of_each(metrics, self._training))
        if self.config.is_evaluated(step):
            with self._aside.paused():
                length = self.config.select_length
                evaluations = self._evaluate(self._state.params, "valid", length, self._training)
        rows = {
            member: member.look(step, numbers[member], evaluations.get(member))
            for member in self._training
        }
        with self._aside.paused():
            for member, state in self._of_each(self._state, self._training):
                if (row := rows[member]) is not None:
                    member.save(jax.device_put(state), row, always=save)
        self._show(step)

    def _evaluate(
        self, params: Params, split: str, length: int, members: Sequence[Member]
    ) -> dict[Member, Evaluation]:
        """What the parameters of each of these members, in its slot of ``params``, are worth."""
        outputs: dict[Member, list[Any]] = {member: [] for member in members}
        for given in self._given.evaluation(split, length, members):
            found = self.program.eval_step(length, params, given)
            for member, own in self._of_each(found, members):
                outputs[member].append(own)
        return {member: scored(member.source, split, own) for member, own in outputs.items()}

    def _make_room(self, going: Sequence[Member]) -> None:
        """Goes on with a smaller program where that pays."""
        self._seconds += self._watch.lap()
        if not going:
            return
        steps_left = self.config.train.steps - min(member.step for member in going)
        seconds_left = steps_left * self._seconds / self._steps_made
        have, want = (slots_for(len(each), self._mesh) for each in (self._seated, going))
        if is_worth_compiling(have, want, seconds_left, self._compiling.seconds):
            for member, state in self._of_each(self._state, going):
                member.state = state
            self._seat(going)

    def _test(self) -> None:
        """Scores the best checkpoint of every member that came to its end."""
        over = []
        for member in self.members:
            if member.outcome is None:
                member.state = member.best()
                over += [member] if member.outcome is None else []
        if not over:
            return
        self._seat(over)
        tests: dict[Member, list[dict[str, Any]]] = {member: [] for member in over}
        for length in self.config.task.test_lengths:
            found = self._evaluate(self._state.params, "test", length, over)
            for member, evaluation in found.items():
                with member.contained():
                    tests[member].append(evaluation.to_dict(length))
            self._go_on("before the results")
        for member in over:
            if member.outcome is None:
                member.end(tests[member])

    def _show(self, step: int) -> None:
        """A line on standard error: the least and the largest of the runs."""
        last = [member.records.rows[-1:] for member in self._training if member.outcome is None]
        rows = [row for (row,) in filter(None, last) if row["step"] == step]
        if not rows:
            return
        text = f"step {step}/{self.config.train.steps}  {len(rows)} runs"
        for name in ("loss", "accuracy", "valid_sequence_accuracy"):
            values = [row[name] for row in rows if name in row]
            if values:
                text += f"  {name} {min(values):.4f} to {max(values):.4f}"
        speed = sum(row["tokens_per_second"] for row in rows)
        print(f"{text}  tokens/s {speed:,.0f}", file=sys.stderr, flush=True)


def is_worth_compiling(have: int, want: int, seconds_left: float, compiling: float) -> bool:
    """Whether a program of fewer slots saves more time than making it takes.

    Args:
        have: slots of the program in use.
        want: slots that are needed.
        seconds_left: until the end, with the program in use.
        compiling: seconds that compiling has taken so far.
    """
    return want <= have // 2 and (1 - want / have) * seconds_left > compiling
