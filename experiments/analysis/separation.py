"""Why does state tracking end where it ends: how far do states stray, and where is it too far?

    python -m experiments.analysis.separation --workdir=runs/separation \
        --runs=runs/s3,runs/z5 --constructions=permutations_S3,plane_Z5

reads random words with the best checkpoints of state-tracking runs and with constructions, and
takes at every position the ratio of the spread of states within a class (the group element
reached) to their distance between classes; ``deltaproduct_jax/analysis/separation.py`` defines it
and derives the limit. A law of growth is fitted to the positions from the reference up to the
length trained, and where it crosses the limit is the position at which the model is predicted to
fail. It does fail at the first position at which fewer than ``--accuracy`` of the words are right.
``separation.json`` holds of every model

- ``positions``, ``ratio``, ``shift`` and ``accuracy``, at all positions that a law is fitted to and
  some beyond; the ratio is that of the words' states in block ``--layer``;
- ``growth``: the law, its floor, rate and residual, and ``laws``, what each would predict;
- ``predicted``, ``crossed`` and ``failed``: by the law, by the ratio itself, and by the answers;
  null where that is beyond what was read, for the law beyond ``FARTHEST``;
- ``ratio_at_failure``.

``separation.md`` is the table, ``separation.png`` the figure. With ``--rows_from`` nothing is read
but such files: table and figure are made of their models, put together.

Source: this project; the idea is https://arxiv.org/abs/2605.07755's.
Expect: predictions within a factor of 1.5 of failures that lie at 3 to 15 times the length trained;
    permutations with the ratio that one rounding gives, wherever one looks;
    experiments/results/state_tracking/ends/ has them.
Takes: a minute a model on a CPU, after the runs.
"""

import dataclasses
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import jax
import numpy as np

from deltaproduct_jax.analysis import separation
from deltaproduct_jax.errors import ConfigError, require_at_least, require_one_of
from deltaproduct_jax.files import any_path, read_json, user_path
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.models.config import DTYPES
from deltaproduct_jax.settings import check_fields, seed_setting, setting
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.theory import construct
from experiments.lib import flags
from experiments.lib.bench.report import begun, markdown, shown, write_report
from experiments.lib.figures.separation import draw_separation
from experiments.lib.figures.style import SECTION, Look
from experiments.lib.group_runs import load_group_run
from experiments.lib.theory.geometry import ONE_LAYER

FARTHEST = 10**9  # a law that crosses later is taken for one that does not
POINTS_BEYOND = 48  # positions looked at behind those that a law is fitted to
ENOUGH = 20  # words a class; the largest of noisy ratios is taken
CONSTRUCTION_FIT = 32  # a construction's length of training, as it has none


@dataclasses.dataclass(frozen=True)
class SeparationConfig:
    """What is looked at; raises ConfigError where the fields make no sense."""

    runs: tuple[str, ...] = setting((), "directories of experiments.state_tracking")
    constructions: tuple[str, ...] = setting((), f"some of {', '.join(ONE_LAYER)}")
    dtypes: tuple[str, ...] = setting(
        ("float32",), f"constructions are read in each of these; some of {', '.join(DTYPES)}"
    )
    words: int = setting(1024, "random words of each group; 20 times its order or more", least=1)
    length: int = setting(1024, "letters of a word, behind BOS", least=1)
    fit_length: int | None = setting(
        None, "positions that a law is fitted to; none: the length trained, 32 of constructions"
    )
    accuracy: float = setting(0.9, "fewer words right at a position: the model has failed")
    layer: int = setting(0, "which block, from 0")
    seed: int = seed_setting("draws the words")
    rows_from: tuple[str, ...] = setting(
        (), "separation.json files that are put together; nothing else is read"
    )

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        for name, allowed in (("constructions", ONE_LAYER), ("dtypes", DTYPES)):
            for entry in getattr(self, name):
                require_one_of(name, entry, allowed)
        if self.rows_from and (self.runs or self.constructions):
            raise ConfigError("rows_from reads no runs and no constructions; give one or the other")
        if not (self.runs or self.constructions or self.rows_from):
            raise ConfigError("runs and constructions are both empty; give some of either")
        if self.constructions and not self.dtypes:
            raise ConfigError(f"dtypes is empty; it may be some of {', '.join(DTYPES)}")
        if self.fit_length is not None:
            require_at_least("fit_length", self.fit_length, 8)
        separation.limit_of_ratio(self.accuracy)


class Law(TypedDict):
    """Fields of `separation.Growth`."""

    law: str
    floor: float
    rate: float
    residual: float


class Entry(TypedDict):
    """What table and figure look at of a model in separation.json."""

    name: str
    group: str
    mixer: str
    num_householder: int | None
    trained: int | None
    fit_length: int
    reference_to: int
    positions: list[int]
    ratio: list[float]
    growth: Law
    predicted: float | None
    crossed: float | None
    failed: int | None
    ratio_at_failure: float | None


class Record(TypedDict):
    """What separation.json holds."""

    accuracy: float
    limit: float
    models: list[Entry]


def positions_of(length: int, fit_length: int) -> np.ndarray:
    """From 1: all that a law is fitted to, and some beyond, a constant factor apart."""
    beyond = np.geomspace(fit_length, max(length, fit_length), POINTS_BEYOND + 1)
    return np.unique([*range(1, fit_length + 1), *np.round(beyond).astype(int)])


def look_at(
    name: str, model: SequenceModel, task: GroupTask, fit_length: int, options: SeparationConfig
) -> dict[str, Any]:
    """What ``separation.json`` has of a model, but for where it comes from."""
    if options.length < fit_length or fit_length < 8:
        raise ConfigError(
            f"fit_length={fit_length} of {name} must be at least 8 and at most "
            f"length={options.length}"
        )
    if not task.answers_every_token:
        raise ConfigError(f"{name} answers late (repeat_elements, merge_elements); both must be 1")
    if options.words < ENOUGH * task.num_elements:
        print(
            f"note: words={options.words} are fewer than {ENOUGH} for each of the "
            f"{task.num_elements} elements of {task.group}; the ratio comes out too large",
            file=sys.stderr,
        )
    draw = jax.jit(task.batch, static_argnums=(1, 2))  # op by op it takes ten times as long
    key, reference_to = jax.random.key(options.seed), fit_length // 4
    batch = draw(key, options.words, options.length)
    words, classes = np.asarray(batch.inputs), np.asarray(batch.targets)[:, 1:]
    references = []
    for number in (1, 2):
        early = draw(jax.random.fold_in(key, number), options.words, reference_to)
        states = separation.read_words(model, np.asarray(early.inputs), options.layer).states[:, 1:]
        targets = np.asarray(early.targets)[:, 1:]
        references.append(separation.reference_means(states, targets, task.num_elements))
    along = separation.discriminating_directions(np.concatenate(references)).astype(np.float32)
    positions = positions_of(options.length, fit_length)
    answers, states = separation.read_words(model, words, options.layer, along, positions)
    correct = answers[:, 1:] == classes
    found = separation.separation(
        states,
        classes[:, positions - 1],
        *(means @ along.astype(np.float64) for means in references),
    )
    # Tokens since the middle of the positions whose states are the reference.
    since = positions - (reference_to + 1) / 2
    fitted = (positions > reference_to) & (positions <= fit_length)
    limit = separation.limit_of_ratio(options.accuracy)
    fits = [
        separation.fit_growth(since[fitted], found.ratio[fitted], [law]) for law in separation.LAWS
    ]
    growth = min(fits, key=lambda fit: fit.residual)
    ends = {fit.law: fit.reaches(limit) + (reference_to + 1) / 2 for fit in fits}
    failed = separation.failing_position(correct, options.accuracy)
    return {
        "name": name,
        "group": task.group,
        "mixer": model.config.mixer,
        "num_householder": model.config.num_householder,
        "dtype": model.config.dtype,
        "fit_length": fit_length,
        "reference_to": reference_to,
        "positions": positions.tolist(),
        "ratio": found.ratio.tolist(),
        "shift": found.shift.tolist(),
        "accuracy": correct.mean(0)[positions - 1].tolist(),
        "growth": dataclasses.asdict(growth),
        "laws": {law: _within_reach(end) for law, end in ends.items()},
        "predicted": _within_reach(ends[growth.law]),
        "crossed": separation.first_above(positions, found.ratio, limit),
        "failed": failed,
        "ratio_at_failure": None
        if failed is None
        else float(np.interp(failed, positions, found.ratio)),
    }


def _within_reach(position: float) -> float | None:
    return position if math.isfinite(position) and position <= FARTHEST else None


def read_all(options: SeparationConfig) -> list[dict[str, Any]]:
    """Every model of the options, constructions last."""
    models = []
    for run in options.runs:
        directory = any_path(run)
        model, config, _ = load_group_run("runs", directory)
        fit_length = options.fit_length or config.task.train_length
        found = look_at(directory.name, model, config.task, fit_length, options)
        models.append({"trained": config.task.train_length, **found})
    for name in options.constructions:
        made = construct(name)
        for dtype in options.dtypes:
            model, task = made.model(dtype), GroupTask(group=made.group)
            fit_length = options.fit_length or CONSTRUCTION_FIT
            found = look_at(f"{name}, {dtype}", model, task, fit_length, options)
            models.append({"trained": None, **found})
    return models


def put_together(options: SeparationConfig) -> list[dict[str, Any]]:
    """The models of other files; ConfigError if one is of another accuracy."""
    models = []
    for path in map(user_path, options.rows_from):
        record = read_json(path, Record)
        if record["accuracy"] != options.accuracy:
            raise ConfigError(
                f"rows_from={path} is for accuracy={record['accuracy']}, not {options.accuracy}"
            )
        models += record["models"]
    return models


def table(models: Sequence[Mapping[str, Any]]) -> str:
    """A line for every model, as Markdown."""
    names = ("name", "group", "mixer", "num_householder", "trained", "law")
    names += ("ratio at fit_length", "ratio at the end", "predicted", "crossed", "failed")
    names += ("ratio at failure",)
    rows = []
    for model in models:
        at_fit = np.interp(model["fit_length"], model["positions"], model["ratio"])
        rows.append(
            [
                *(model[name] for name in names[:5]),
                model["growth"]["law"],
                shown(at_fit, ".2g"),
                shown(model["ratio"][-1], ".2g"),
                shown(model["predicted"], ",.0f"),
                shown(model["crossed"], ",.0f"),
                shown(model["failed"], ",d"),
                shown(model["ratio_at_failure"], ".2f"),
            ]
        )
    return markdown(names, rows)


def shortened(value: Any) -> Any:
    """Floats to five digits, so that records stay small."""
    if isinstance(value, float):
        return float(f"{value:.5g}")
    if isinstance(value, Mapping):
        return {name: shortened(entry) for name, entry in value.items()}
    return [shortened(entry) for entry in value] if isinstance(value, list) else value


def command(argv: Sequence[str]) -> None:
    """Reads the models or their records, writes separation.json and .md, draws separation."""
    parsed = flags.parse(argv, {"separation": SeparationConfig, **SECTION}, {"default": {}})
    look = Look(**parsed.sections["figures"])
    options = SeparationConfig(**parsed.sections["separation"])
    models = put_together(options) if options.rows_from else shortened(read_all(options))
    limit = separation.limit_of_ratio(options.accuracy)
    record = begun("analysis.separation", argv, accuracy=options.accuracy, limit=shortened(limit))
    record["models"] = models
    text = write_report(parsed.workdir, "separation", record, page, indent=None)
    draw_separation(models, limit, parsed.workdir / "separation", look)
    print(text)


def page(record: Mapping[str, Any]) -> list[str]:
    """What separation.md holds."""
    return [table(record["models"]), f"Limit of the ratio: {record['limit']:.3f}."]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
