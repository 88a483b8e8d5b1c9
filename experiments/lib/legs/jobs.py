"""Legs side by side on the GPUs of one machine: child processes, how far they are, what is said."""

import contextlib
import dataclasses
import statistics
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from deltaproduct_jax.errors import RunDirectoryError
from deltaproduct_jax.files import read_lines
from deltaproduct_jax.training.locks import Lock
from deltaproduct_jax.training.records import (
    METRICS,
    RESULTS,
    MetricsLine,
    refuse_other_config,
    saved_config,
)
from deltaproduct_jax.training.stopping import Stopped, stop_on_signals
from experiments.lib.children import Child
from experiments.lib.legs.config import LegConfig
from experiments.lib.legs.leg import TRAINED_BY, Leg, Part, keep, measurements, module
from experiments.lib.legs.schedule import Progress, Schedule, Terms
from experiments.lib.sweeps.attempts import environment
from experiments.lib.sweeps.grid import build, load_script
from experiments.lib.sweeps.view import clock

POLL_S = 1.0
SAY_EVERY_S = 30.0
MEASURED_IN = 0.31  # of a GPU's memory at most: attention at 32,768 tokens takes a fifth
TOGETHER = 0.92  # likewise of two legs that train, so that another can be measured
LATEST = 40  # records whose median is a leg's rate


@dataclasses.dataclass(frozen=True)
class Place:
    """Where legs run, and what their processes share.

    Attributes:
        workdir: of all legs.
        gpus: as CUDA_VISIBLE_DEVICES names them; empty for the CPU.
        programs: folder of compiled programs.
        memory_fraction: of a GPU's memory, for a process that trains; None: what its leg needs.
        lock: on the workdir, which all processes hold.
    """

    workdir: Path
    gpus: Sequence[str]
    programs: Path
    memory_fraction: float | None
    lock: Lock | None = None

    @property
    def slots(self) -> int:
        """Legs at a time, but for the ends of some."""
        return max(1, len(self.gpus))

    def name(self, slot: int) -> str:
        """Of a GPU."""
        return f"GPU {self.gpus[slot]}" if self.gpus else "CPU"

    def share(self, leg: Leg, config: LegConfig) -> float:
        """Of a GPU's memory, for training a leg."""
        return config.share(leg) if self.memory_fraction is None else self.memory_fraction

    def variables(self, slot: int, share: float | None = None) -> dict[str, str]:
        """The environment of a process, which takes its share of memory as it starts.

        Without one it takes what it needs, up to `MEASURED_IN`.
        """
        variables = environment(self.slots, self.gpus[slot : slot + 1])
        return variables | {
            "JAX_COMPILATION_CACHE_DIR": str(self.programs),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "XLA_PYTHON_CLIENT_MEM_FRACTION": f"{share or MEASURED_IN:g}",
            "XLA_PYTHON_CLIENT_PREALLOCATE": str(share is not None).lower(),
            "PYTHONUNBUFFERED": "1",
        }

    def log(self, name: str) -> Path:
        """Where a process's output goes."""
        return self.workdir / "logs" / f"{name}.log"

    def child(self, command: Sequence[str], variables: Mapping[str, str], **files: Path) -> Child:
        """A process that runs here; ``files`` as of `Child`."""
        return Child(command, variables=variables, lock=self.lock, **files)


class Parts:
    """Processes of one leg that run side by side.

    Args:
        leg: whose they are.
        place: where they run.
        slot: the number of their GPU.
        parts: what they are, none of which needs another.
        share: of the GPU's memory, which each takes as it starts; None: as it needs.
        failed: lines that are said with theirs.
    """

    def __init__(
        self,
        leg: Leg,
        place: Place,
        slot: int,
        parts: Sequence[Part],
        share: float | None,
        failed: Sequence[str] = (),
    ):
        self._leg, self._failed = leg, failed
        self._children: dict[str, tuple[Child, Path]] = {}
        variables = place.variables(slot, share)
        for part in parts:
            log = place.log(f"{leg.label}.{part.name}")
            child = place.child(part.command, variables, log=log, output=part.output)
            self._children[part.name] = child, log

    def poll(self) -> list[str] | None:
        """None while one runs; then a line for each that failed."""
        codes = [child.poll() for child, _ in self._children.values()]
        if None in codes:
            return None
        failed = list(self._failed)
        for name, (child, log) in self._children.items():
            if child.has_failed():
                said = child.last_line()
                why = f"{self._leg.label}: {name} failed with exit code {child.poll()}"
                failed.append(f"{why}, see {log}" + (f": {said}" if said else ""))
        if not any(codes):
            self._leg.remove_spares()
        return failed

    def ask_to_stop(self) -> None:
        """Tells them to save and end."""
        for child, _ in self._children.values():
            child.ask_to_stop()

    def stop(self) -> None:
        """Ends them, saved."""
        self.ask_to_stop()
        for child, _ in self._children.values():
            child.stop()

    def kill(self) -> None:
        """Ends them at once."""
        for child, _ in self._children.values():
            child.kill()


def progress_of(leg: Leg) -> Progress:
    """What a leg's run directory says; nothing where a record is damaged: its run will say so."""
    with contextlib.suppress(RunDirectoryError):
        rows = read_lines(leg.run / METRICS, MetricsLine)
        rates = [row["tokens_per_second"] for row in rows if "tokens_per_second" in row]
        losses = [row["loss"] for row in rows if "loss" in row]
        return Progress(
            tokens=int(rows[-1].get("tokens", 0)) if rows else 0,
            rate=statistics.median(rates[-LATEST:]) if rates else None,
            loss=losses[-1] if losses else None,
            is_validated=any("valid_loss" in row for row in rows),
            is_done=(leg.run / RESULTS).exists(),
        )
    return Progress()


def paper(workdir: Path, stage: str, settings: Mapping[str, object]) -> list[str]:
    """The command of a stage of `experiments.language.paper`."""
    return module("language.paper", workdir=workdir, **(dict(settings) | {"stages": stage}))


def missing(leg: Leg, config: LegConfig) -> list[Part]:
    """Measurements of a leg whose records are not there, are damaged, or have other settings."""
    parts = measurements(leg, config.length, config.rank_length, config.rows)
    return [part for part in parts if not part.is_done()]


def refuse_other_settings(legs: Sequence[Leg], config: LegConfig) -> None:
    """Raises RunDirectoryError if a leg's run has other settings, whether it is finished or not.

    Of a run whose configuration cannot be read its own start will say so; where its text lies, of
    which a folder that was moved has another path, it looks itself.
    """
    for leg in legs:
        try:
            saved = saved_config(leg.run)
        except RunDirectoryError:
            continue
        flags = (flag.removeprefix("--").split("=", 1) for flag in config.training(leg)[3:])
        now = build(load_script(TRAINED_BY), dict(flags) | {"workdir": "."})
        now["task"]["data"] = saved.get("task", {}).get("data")
        refuse_other_config(saved, now, leg.run)


def run_legs(legs: Sequence[Leg], config: LegConfig, place: Place, terms: Terms) -> int:
    """Trains and measures what is not done yet; how many of the processes failed.

    Args:
        legs: in the order of importance.
        config: of all of them, but for "leg" and "seed".
        place: where they run.
        terms: when they begin; the clock is `time.monotonic`.

    Raises:
        Stopped: by a signal, when all have ended or saved.
    """

    def train(leg: Leg, slot: int) -> Parts:
        settings = config.flags(leg=leg.name, seed=leg.seed)
        part = Part("train", paper(place.workdir, "train", settings), leg.run / RESULTS)
        say(f"{place.name(slot)}: {leg.label} begins")
        return Parts(leg, place, slot, [part], place.share(leg, config))

    def measure(leg: Leg, slot: int) -> Parts | None:
        failed = []
        try:
            keep(leg)  # an earlier start may have ended before it did
        except RunDirectoryError as error:
            failed.append(f"{leg.label}: {error}")
        parts = missing(leg, config)
        if parts:
            say(f"{place.name(slot)}: {leg.label} is measured")
        elif not failed:
            return None
        return Parts(leg, place, slot, parts, None, failed)

    fit = lambda *both: sum(place.share(leg, config) for leg in both) <= TOGETHER
    hooks = {"look": progress_of, "train": train, "measure": measure, "say": say, "fit": fit}
    schedule = Schedule(legs, place.slots, terms, clock=time.monotonic, **hooks)
    began = said = time.monotonic()
    with stop_on_signals() as request:
        try:
            while not request.is_set() and schedule.step():
                request.wait(POLL_S)
                if time.monotonic() - said >= SAY_EVERY_S:
                    said = time.monotonic()
                    for line in lines_of(schedule, place):
                        say(f"{clock(said - began)} {line}")
            if request.is_set():
                say("stopping; legs finish their step and save")
        finally:
            schedule.stop()
    if request.is_set():
        text = f"stopped by {request.name}; the same command goes on in {place.workdir}"
        raise Stopped(text, request.signal_number)
    for leg in legs:
        if leg in schedule.not_begun():
            needed = schedule.seconds_left(leg)
            takes = "" if needed is None else f", training takes {clock(needed)}"
            say(f"{leg.label} was not begun, there is no time{takes}; the same command goes on")
        elif not progress_of(leg).is_done or missing(leg, config):
            say(f"{leg.label} is not finished; the same command goes on")
    return schedule.failures


def say(line: str) -> None:
    """Shows a line of progress."""
    print(line, file=sys.stderr, flush=True)


def lines_of(schedule: Schedule, place: Place) -> list[str]:
    """A line for each leg that runs: where, tokens, tokens a second, loss, time left."""
    lines = []
    for slot in schedule.slots:
        for leg, _ in slot.training:
            progress = progress_of(leg)
            left = schedule.seconds_left(leg)
            said = [f"{progress.tokens:,} tokens"]
            said += [] if progress.rate is None else [f"{progress.rate:,.0f} tokens/s"]
            said += [] if progress.loss is None else [f"loss {progress.loss:.3f}"]
            said += [] if left is None else [f"{clock(left)} left"]
            lines.append(f"{place.name(slot.number)}: {leg.label}, {', '.join(said)}")
        if slot.measuring is not None:
            lines.append(f"{place.name(slot.number)}: {slot.measuring[0].label} is measured")
    return lines
