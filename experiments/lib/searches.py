"""The same small search for every mixer: what is tried, what is chosen, and what came of it.

An arm is a mixer, or any other settings that are to be compared. Every arm tries as many settings,
the same ones as far as its mixer has the fields: learning rates on a grid, and beside them, each
equally often and in an order drawn once, starts of step sizes and gates and the activation of
queries and keys (a Latin hypercube). The best of them by the validation split, which is not
reported, then trains from seeds that nothing was chosen by; what these score on the test split is.
"""

import datetime
import json
import math
import random
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.files import read_lines
from deltaproduct_jax.layers.registry import MIXERS, RegisteredMixer
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.parallel.layout import Layout, make_mesh
from deltaproduct_jax.tasks.task import ACCURACIES
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.evaluation import scored, selection_of
from deltaproduct_jax.training.records import METRICS, MetricsLine, read_results
from deltaproduct_jax.training.source import source_of
from deltaproduct_jax.training.together.numbers import program_of
from experiments.lib.run_records import Record, best_score, label, less_is_better, reaches
from experiments.lib.sweeps.grid import (
    LIST,
    build,
    identity,
    import_plugins_of,
    load_script,
    parse_fixed,
    read_list,
    refuse_unknown,
)
from experiments.lib.sweeps.records import RunFolder, spans

# What is tried of each field, where the mixer has it and nothing else says what it is.
SPACE: dict[str, tuple[str, ...]] = {
    "beta_bias": ("0.0", "2.5", "5.0"),
    "initial_gate": ("none", "0.9", "0.99"),  # none: as published, which may differ by head
    "qk_activation": ("silu", "none"),
}
RATE, END, SEED, MIXER = "learning_rate", "end_learning_rate", "seed", "mixer"
FINAL = 0.01  # of a learning rate, where its schedule ends
FIRST_FRESH = 1000  # seeds from here on choose nothing
# What is reported unless something else, or the task, says so: the first that test scores have.
SCORES = ("strict.scaled_accuracy", "strict.sequence_accuracy", "strict.token_accuracy")
Settings = dict[str, str]  # flags as they are written
Scores = tuple[float, ...]


class Arm(NamedTuple):
    """What is compared: its settings, and those tried for it."""

    settings: Settings
    tried: list[Settings]


class Reported(NamedTuple):
    """The number of the test split that is reported, at a length, and what escaping is."""

    metric: str
    length: int | None
    threshold: float


def arms_of(
    texts: Sequence[str],
    script: str,
    fixed: str,
    count: int,
    rates: tuple[float, float],
    fields: Sequence[str] = tuple(SPACE),
) -> list[Arm]:
    """The arms, each with ``count`` settings to try.

    Args:
        texts: settings of each, as mixer=delta_product;num_householder=3; none: every mixer.
        script: whose runs they are.
        fixed: settings that all share, which are not searched.
        count: settings of each.
        rates: lowest and highest learning rate.
        fields: what is tried beside it, some of `SPACE`.

    Raises:
        ConfigError: an arm or what is fixed cannot be read, or decides what the search is to; two
            arms are the same; no arm tries a field that was chosen among `SPACE`; there are fewer
            rates than settings.
    """
    module, constants = load_script(script), parse_fixed(fixed)
    given = [parse_fixed(text, "--arm") for text in texts] or [{MIXER: name} for name in MIXERS]
    import_plugins_of(constants, [{key: [value] for key, value in arm.items()} for arm in given])
    refuse_unknown(module, script, "--fixed", constants)
    arms: list[Arm] = []
    models: dict[str, str] = {}
    for arm in given:
        refuse_unknown(module, script, "--arm", arm)
        require_apart(arm, constants)
        decided = constants | arm
        config = build(module, decided)
        mixer, constant = MIXERS[config["model"][MIXER]], config["train"]["schedule"] == "constant"
        text, model = text_of(arm), resolved(config, mixer)
        if model in models:
            same = models[model]
            raise ConfigError(f"--arm={text!r} is the same as --arm={same!r}; each is one row")
        models[model] = text
        takes = [name for name in fields if mixer.takes(name) and name not in decided]
        own = (RATE, *takes, *(() if constant or END in decided else (END,)))
        tried = [{name: every[name] for name in own} for every in tried_of(count, rates)]
        arms.append(Arm(arm, tried))
    for name in fields if len(fields) < len(SPACE) else ():
        if not any(name in arm.tried[0] for arm in arms):
            raise ConfigError(f"fields={name!r} is tried by no arm: none has it, or all set it")
    return arms


def require_apart(arm: Settings, fixed: Settings) -> None:
    """Raises ConfigError where an arm sets nothing, what all share, or what a search decides."""
    if not arm:
        raise ConfigError("--arm='' is empty; it may be mixer=delta_product;num_householder=3")
    for key in fixed.keys() & arm.keys():
        text = text_of(arm)
        raise ConfigError(f"{key!r} is in --fixed, and in --arm={text!r} too; give it in one")
    for key, value in (fixed | arm).items():
        if key in (RATE, SEED):
            raise ConfigError(f"{key}={value} is in --arm or --fixed; the search decides it")


def text_of(settings: Settings) -> str:
    """Settings as the flags have them."""
    return ";".join(f"{key}={value}" for key, value in settings.items())


def resolved(config: Mapping[str, Any], mixer: RegisteredMixer) -> str:
    """The same for the same configuration, what a mixer decides by itself included."""
    own = {
        name: mixer.default(name) if value is None and mixer.takes(name) else value
        for name, value in config["model"].items()
    }
    return json.dumps({**config, "model": own}, sort_keys=True, default=repr)


def tried_of(count: int, rates: tuple[float, float]) -> list[Settings]:
    """So many settings, those of mixers that have every field; the same for the same arguments.

    Raises:
        ConfigError: as many rates do not differ.
    """
    low, high = rates
    steps = [low * (high / low) ** (index / max(1, count - 1)) for index in range(count)]
    columns = {RATE: [f"{rate:.3g}" for rate in steps]}
    if len(set(columns[RATE])) < count:  # arms of more fields would have more tries
        raise ConfigError(
            f"settings={count} learning rates of three digits do not fit between "
            f"lowest_rate={low:g} and highest_rate={high:g}; give fewer, or rates further apart"
        )
    columns[END] = [f"{FINAL * rate:.3g}" for rate in steps]
    for name, values in SPACE.items():
        column = [values[index % len(values)] for index in range(count)]
        random.Random(name).shuffle(column)
        columns[name] = column
    return [{name: columns[name][index] for name in columns} for index in range(count)]


def grid_of(settings: Settings) -> str:
    """The grid of one run."""
    return ";".join(f"{key}=({value})" for key, value in settings.items())


def grids_there(workdir: Path) -> list[str]:
    """Grids of the runs that a sweep has, so that others may be added; of none where there is none.

    What is chosen changes where a run that failed has come to its end since, or what was looked at
    before all had ended. What is no choice any more is kept, and not run to its end.
    """
    runs = read_list(workdir)[1] if (workdir / LIST).exists() else []
    return [grid_of({key: run.settings[key] for key in run.keys}) for run in runs]


def counted(script: str, fixed: str, each: Sequence[Settings], *, together: bool) -> str:
    """How many runs these are, and where they are run together how many programs compile."""
    module, constants = load_script(script), parse_fixed(fixed)
    text = f"{len(each)} runs"
    if not together:
        return text
    programs = {program_of(build(module, constants | settings)) for settings in each}
    return f"{text} in {len(programs)} programs"


class Folders:
    """The runs of a sweep by their settings.

    Args:
        workdir: of the sweep.
        fixed: settings that all runs share.
    """

    def __init__(self, workdir: Path, fixed: str):
        script, runs = read_list(workdir)
        self._workdir, self._module = workdir, load_script(script)
        self._fixed = parse_fixed(fixed)
        # An older version's list may not have every field.
        self._runs = {identity(build(self._module, run.settings)): run for run in runs}

    def of(self, settings: Sequence[Settings]) -> list[RunFolder]:
        """The folder of each; several may be one, where settings come to the same.

        Raises:
            RunDirectoryError: what one holds is damaged, or another run.
        """
        configs = [build(self._module, self._fixed | each) for each in settings]
        found = [RunFolder(self._workdir, self._runs[identity(config)]) for config in configs]
        for folder in found:  # else a damaged one would count as one that failed
            folder.require_own()
            read_results(folder.path)
        return found


def validation(folder: RunFolder) -> Scores | None:
    """What selected a run's checkpoint, larger for what is better; None of a run that failed.

    Behind it stands the loss, below zero: on an easy task many settings are right throughout.

    Raises:
        RunDirectoryError: the metrics are damaged.
    """
    results = folder.results()
    if results is None:
        return None
    task = RunConfig.from_dict(folder.run.config).task
    rows = read_lines(folder.path / METRICS, MetricsLine)
    found = (row for row in rows if row["step"] == results["best_step"])
    row = dict(next(found, {}))
    scores = selection_of(row, getattr(task, "selected_by", ACCURACIES))
    if scores is None:
        raise RunDirectoryError(
            f"{folder.path / METRICS} has no scores of step {results['best_step']}, the best by "
            "results.json"
        )
    return *scores, -row.get("valid_loss", math.inf)


def median_of(scores: Sequence[Scores | None]) -> Scores | None:
    """The median of each metric over seeds, a failed run below all; None where that is one."""
    worst = (float("-inf"),)
    width = max((len(score) for score in scores if score is not None), default=1)
    whole = [worst * width if score is None else score for score in scores]
    found = tuple(statistics.median_low(column) for column in zip(*whole, strict=True))
    return None if found[0] == worst[0] else found


def best_of(medians: Sequence[Scores | None]) -> int | None:
    """The place of the best, the first of equals; None where all failed."""
    there = [(score, -place) for place, score in enumerate(medians) if score is not None]
    return -max(there)[1] if there else None


def median_of_runs(scores: Sequence[float], runs: int, metric: str) -> float | None:
    """That of so many runs, of which those without a score failed; None where one is the median."""
    if not runs:
        return None
    worst = math.inf if less_is_better(metric) else -math.inf
    median = statistics.median([*scores, *[worst] * (runs - len(scores))])
    return median if math.isfinite(median) else None


def finished(folders: Sequence[RunFolder]) -> list[Record]:
    """Those of the runs that have results."""
    found = ((folder.run.name, folder.results()) for folder in folders)
    return [Record(name, {}, dict(results)) for name, results in found if results is not None]


def reported_of(
    arms: Sequence[Arm], script: str, fixed: str, metric: str | None, length: int | None
) -> str:
    """The metric that is reported: as given, or the arms' task's, or the first of `SCORES` there.

    Args:
        arms: all of them.
        script: whose runs they are.
        fixed: settings that all share.
        metric: path of a number in an entry of results.json's test, or None.
        length: at which it is looked at; None for the longest of each run.

    Raises:
        ConfigError: the results of an arm's runs will not have it, at that length.
    """
    module, constants = load_script(script), parse_fixed(fixed)
    found: dict[str, Record] = {}
    for arm in arms:
        config = RunConfig.from_dict(build(module, constants | arm.settings))
        saved = config.to_dict()
        same = ("eval_sequences", "eval_batch_size", "seed")
        asked = identity({"task": saved["task"], **{name: saved["train"][name] for name in same}})
        name = label(list(arm.settings), tuple(arm.settings.values()))
        record = found.setdefault(asked, Record(name, {}, {"test": entries_of(config, length)}))
        first = getattr(config.task, "reported", None)
        metric = metric_of(record, length, first) if metric is None else metric
        record.score(metric, length)
    return metric


def entries_of(config: RunConfig, length: int | None) -> list[dict[str, Any]]:
    """What results.json's test would hold of a run that answers right, in full at one length.

    Args:
        config: of the run.
        length: at which, None for the longest; of others there are the lengths alone.
    """
    lengths = config.task.test_lengths
    length = max(lengths) if length is None else length
    if length not in lengths:
        return [{"length": other} for other in lengths]
    source = source_of(config, Layout(make_mesh(DeviceConfig(mesh="data:1")), {}))
    draw = jax.jit(source.eval_batch, static_argnums=1)
    masks = [np.asarray(draw(given, length).mask) for given in source.evaluation("test", length)]
    answers = [(mask.sum(), mask, mask) for mask in masks]
    entry = scored(source, "test", answers).to_dict(length)
    return [entry if other == length else {"length": other} for other in lengths]


def metric_of(record: Record, length: int | None, first: str | None = None) -> str:
    """The ``first`` score that a run has, or else of `SCORES`; without any, their first."""
    strict = record.entry(length).get("strict", {})
    wanted = SCORES if first is None else (f"strict.{first}", *SCORES)
    there = (path for path in wanted if path.removeprefix("strict.") in strict)
    return next(there, SCORES[0])


def row_of(
    arm: Arm, chosen: Settings | None, folders: Sequence[RunFolder], reported: Reported
) -> dict[str, Any]:
    """What an arm's fresh runs came to, beside the settings that were chosen for it."""
    records = finished(folders)
    scores = [record.score(*reported[:2]) for record in records]
    rates = [each[RATE] for each in arm.tried]
    none = dict.fromkeys([RATE, *SPACE])
    own = {name: value for name, value in (chosen or {}).items() if name in none}
    return {
        "arm": label(list(arm.settings), tuple(arm.settings.values())),
        "parameters": records[0].results["parameters"]["total"] if records else None,
        **none,
        **own,
        "rate_at_an_end": chosen is not None and chosen[RATE] in (rates[0], rates[-1]),
        "median": median_of_runs(scores, len(folders), reported.metric),
        "best": best_score(scores, reported.metric),
        "escaped": sum(reaches(score, reported.metric, reported.threshold) for score in scores),
        "runs": len(folders),
        "scores": scores,
    }


def hours_of(folders: Sequence[RunFolder]) -> float:
    """Hours of training, without compiling and evaluating; of runs trained together their share.

    A run may have gone on with others, or alone: the start before a line says how many they were.
    """
    seconds = 0.0
    for folder in folders:
        starts = [
            (time_of(start["time"]) if "time" in start else -math.inf, start)
            for start in folder.starts()
        ]
        for written, spent in spans(folder.path / METRICS):
            before = [start for began, start in starts if began <= written]
            seconds += spent / (before[-1] if before else {}).get("runs_together", 1)
    return seconds / 3600


def time_of(text: str) -> float:
    """Seconds since 1970 of a time as run.json has it."""
    return datetime.datetime.fromisoformat(text).timestamp()
