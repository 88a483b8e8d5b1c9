"""Why does state tracking end where it ends: how much of the margin have the states used up?

    python -m experiments.analysis.margin --workdir=runs/margin \
        --runs=runs/s3,runs/z5 --constructions=permutations_S3,plane_Z5

reads random words with the best checkpoints of state-tracking runs and with constructions. At
positions on the way it multiplies the errors of all states, which are their distances from the mean
early state of their class (the group element reached), until fewer than ``--accuracy`` of the words
are answered rightly after the next token: the margin, of which the errors as they are have used 1
over that factor. ``deltaproduct_jax/analysis/margin.py`` defines it. The law of its growth is
fitted to the positions from the reference up to the length trained, and where it reaches 1 is the
position at which the model is predicted to fail. It does fail at the first position at which fewer
than ``--accuracy`` of the words are right. ``margin.json`` holds of every model

- ``positions``, ``used`` and ``accuracy``, where the law is fitted and at some positions beyond, of
  the states in block ``--layer``; ``used`` is that of the state before the letter there;
- ``growth``: floor, rate and centre of the law, and the residual;
- ``predicted`` and ``failed``: by the law and by the answers; null where that is beyond what was
  read, for the law beyond ``FARTHEST``, or if no margin was left from the start.

``margin.md`` is the table, ``margin.png`` the figure. With ``--rows_from`` nothing is read but such
files: table and figure are made of their models, put together.

Source: this project; the idea is https://arxiv.org/abs/2605.07755's.
Expect: predictions within a factor of 1.3 of failures of small runs, and within one of 3 of wide
    ones; permutations that use nothing; experiments/results/state_tracking/ends/ has them.
Takes: one to four minutes a model on a CPU, after the runs.
"""

import dataclasses
import sys
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict

import jax
import numpy as np

from deltaproduct_jax.analysis import margin
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import any_path, given_by, read_json, user_path
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.models.config import DTYPES
from deltaproduct_jax.settings import check_fields, seed_setting, setting
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.theory import construct
from experiments.lib import flags
from experiments.lib.bench.report import begun, markdown, shown, write_report
from experiments.lib.figures.margin import draw_margin
from experiments.lib.figures.style import SECTION, Look
from experiments.lib.group_runs import load_group_run, require_answers, run_name
from experiments.lib.theory.geometry import ONE_LAYER

FARTHEST = 10**9  # a law that ends later is taken for one that does not
POINTS_WITHIN, POINTS_BEYOND = 32, 48  # positions looked at that the law is fitted to, and behind
ENOUGH = 50  # states of a class that its mean is of; a mean of few strays itself
CONSTRUCTION_FIT = 32  # a construction's length of training, as it has none


@dataclasses.dataclass(frozen=True)
class MarginConfig:
    """What is looked at; raises ConfigError where the fields make no sense."""

    runs: tuple[str, ...] = setting((), "directories of experiments.state_tracking")
    constructions: tuple[str, ...] = setting(
        (), f"some of {', '.join(ONE_LAYER)}", one_of=ONE_LAYER
    )
    dtypes: tuple[str, ...] = setting(
        ("float32",),
        f"constructions are read in each of these; some of {', '.join(DTYPES)}",
        one_of=DTYPES,
    )
    words: int = setting(512, "random words of each group", least=1)
    length: int = setting(1024, "letters of a word, behind BOS", least=1)
    fit_length: int | None = setting(
        None,
        "positions that the law is fitted to; none: the length trained, 32 of constructions",
        least=8,
    )
    accuracy: float = setting(0.9, "fewer words right at a position: the model has failed")
    layer: int = setting(0, "which block, from 0")
    seed: int = seed_setting("draws the words")
    rows_from: tuple[str, ...] = setting(
        (), "margin.json files that are put together; nothing else is read"
    )

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        if self.rows_from and (self.runs or self.constructions):
            raise ConfigError("rows_from reads no runs and no constructions; give one or the other")
        if not (self.runs or self.constructions or self.rows_from):
            raise ConfigError("runs and constructions are both empty; give some of either")
        if self.constructions and not self.dtypes:
            raise ConfigError(f"dtypes is empty; it may be some of {', '.join(DTYPES)}")
        margin.require_accuracy(self.accuracy)


class Law(TypedDict):
    """Fields of `margin.Growth`."""

    floor: float
    rate: float
    centre: float
    residual: float


class Entry(TypedDict):
    """What table and figure look at of a model in margin.json."""

    name: str
    seed: int | None
    group: str
    mixer: str
    num_householder: int | None
    trained: int | None
    fit_length: int
    reference_to: int
    positions: list[int]
    used: list[float]
    growth: Law
    predicted: float | None
    failed: int | None


class Record(TypedDict):
    """What margin.json holds."""

    accuracy: float
    models: list[Entry]


def positions_of(length: int, fit_length: int) -> np.ndarray:
    """From 2: evenly spaced where the law is fitted, a constant factor apart beyond."""
    within = np.linspace(2, fit_length, min(POINTS_WITHIN, fit_length - 1))
    beyond = np.geomspace(fit_length, max(length, fit_length), POINTS_BEYOND + 1)
    return np.unique(np.round([*within, *beyond]).astype(int))


def look_at(
    name: str, model: SequenceModel, task: GroupTask, fit_length: int, options: MarginConfig
) -> dict[str, Any]:
    """What ``margin.json`` has of a model, but for where it comes from."""
    if options.length < fit_length or fit_length < 8:
        raise ConfigError(
            f"fit_length={fit_length} of {name} must be at least 8 and at most "
            f"length={options.length}"
        )
    require_answers(name, task)
    reference_to = fit_length // 4
    if options.words * reference_to < ENOUGH * task.num_elements:
        print(
            f"note: words={options.words} give each of the {task.num_elements} elements of "
            f"{task.group} fewer than {ENOUGH} states up to position {reference_to}; their mean "
            "strays, which uses margin",
            file=sys.stderr,
        )
    draw = jax.jit(task.batch, static_argnums=(1, 2))  # op by op it takes ten times as long
    key = jax.random.key(options.seed)
    early = draw(jax.random.fold_in(key, 1), options.words, reference_to)
    means = margin.reference_means(
        model,
        np.asarray(early.inputs),
        np.asarray(early.targets),
        task.num_elements,
        options.layer,
    )
    batch, positions = (
        draw(key, options.words, options.length),
        positions_of(options.length, fit_length),
    )
    found = margin.read_words(
        model,
        np.asarray(batch.inputs),
        np.asarray(batch.targets),
        means,
        positions,
        accuracy=options.accuracy,
        layer=options.layer,
    )
    correct = found.correct[:, 1:]
    used, centre = shortened(found.used.tolist()), shortened(found.centre)
    return {
        "name": name,
        "group": task.group,
        "mixer": model.config.mixer,
        "num_householder": model.config.num_householder,
        "dtype": model.config.dtype,
        "fit_length": fit_length,
        "reference_to": reference_to,
        "positions": positions.tolist(),
        "used": used,
        "accuracy": correct.mean(0)[positions - 1].tolist(),
        **predicted(positions, np.array(used), centre, reference_to, fit_length),
        "failed": margin.failing_position(correct, options.accuracy),
    }


def predicted(
    positions: np.ndarray, used: np.ndarray, centre: float, reference_to: int, fit_length: int
) -> dict[str, Any]:
    """The law of what was used, and the position at which it ends."""
    # Tokens from the middle of the positions whose states are the reference to the state looked at.
    middle = (reference_to + 1) / 2 + 1
    fitted = (positions > reference_to) & (positions <= fit_length)
    growth = margin.fit_growth(positions[fitted] - middle, used[fitted], centre)
    return {
        "growth": dataclasses.asdict(growth),
        "predicted": _position(growth.reaches(), middle),
    }


def _position(reaches: float, middle: float) -> float | None:
    """Where the law ends; None if that is too far, or if the references are beyond it already."""
    return reaches + middle if 0 < reaches <= FARTHEST else None


def read_all(options: MarginConfig) -> list[dict[str, Any]]:
    """Every model of the options, constructions last."""
    models = []
    for run in options.runs:
        directory = any_path(run, "runs")
        model, config, _ = load_group_run("runs", directory)
        fit_length = options.fit_length or config.task.train_length
        found = look_at(run_name(directory), model, config.task, fit_length, options)
        of_run = {"trained": config.task.train_length, "seed": config.train.seed}
        models.append(of_run | found)
    for name in options.constructions:
        made = construct(name)
        for dtype in options.dtypes:
            model, task = made.model(dtype), GroupTask(group=made.group)
            fit_length = options.fit_length or CONSTRUCTION_FIT
            found = look_at(f"{name}, {dtype}", model, task, fit_length, options)
            models.append({"trained": None, "seed": None, **found})
    return models


def put_together(options: MarginConfig) -> list[dict[str, Any]]:
    """The models of other files; ConfigError if one is of another accuracy."""
    models = []
    for given in options.rows_from:
        path = user_path(given, "rows_from")
        with given_by("rows_from", path):
            record = read_json(path, Record)
        if record["accuracy"] != options.accuracy:
            raise ConfigError(
                f"rows_from={path} is for accuracy={record['accuracy']}, not {options.accuracy}"
            )
        models += record["models"]
    return models


def table(models: Sequence[Mapping[str, Any]]) -> str:
    """A line for every model, as Markdown."""
    names = ("name", "seed", "group", "mixer", "num_householder", "trained")
    names += ("used at fit_length", "used at the end", "centre", "predicted", "failed")
    rows = []
    for model in models:
        at_fit = np.interp(model["fit_length"], model["positions"], model["used"])
        rows.append(
            [
                *(model[name] for name in names[:6]),
                shown(at_fit, ".2g"),
                shown(model["used"][-1], ".2g"),
                shown(model["growth"]["centre"], ".2f"),
                shown(model["predicted"], ",.0f"),
                shown(model["failed"], ",d"),
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
    """Reads the models or their records, writes margin.json and .md, draws margin."""
    parsed = flags.parse(argv, {"margin": MarginConfig, **SECTION}, {"default": {}})
    look = Look(**parsed.sections["figures"])
    options = MarginConfig(**parsed.sections["margin"])
    models = put_together(options) if options.rows_from else shortened(read_all(options))
    record = begun("analysis.margin", argv, accuracy=options.accuracy)
    record["models"] = models
    text = write_report(parsed.workdir, "margin", record, page, indent=None)
    draw_margin(models, parsed.workdir / "margin", look)
    print(text)


def page(record: Mapping[str, Any]) -> list[str]:
    """What margin.md holds."""
    return [table(record["models"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
