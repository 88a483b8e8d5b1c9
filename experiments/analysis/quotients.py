"""What does a model know of a group that it has not learnt: which of the group's quotients?

    python -m experiments.analysis.quotients --workdir=runs/quotients --runs=runs/s4,runs/a5 \
        --checkpoint=best,newest

reads random words with state-tracking runs and judges every answer modulo each normal subgroup N of
the group: it is right if it lies in the coset of N that the product is in. With ``|N|`` = 1 that is
the answer itself. A model that follows G/N and nothing finer is right modulo N at every position,
and its loss is ``ln |N|``; ``deltaproduct_jax/analysis/quotients.py`` has more of it.
``quotients.json`` holds of every model, that is of every checkpoint of a run,

- ``loss``: nats an answer at the position of the length trained;
- of every N but the group: its elements, their number ``|N|``, how many cosets it has, and the part
  of the words that are right modulo N ``at_trained`` and ``at_end``; ``failed`` is the first
  position at which that is less than .9, null if there is none.

``quotients.md`` is the table of that. ``quotients.png`` shows the part right by position, a panel
for the runs that differ in the seed alone, median and single runs.

Source: this project, on the task of https://arxiv.org/abs/2502.10297.
Expect: with n_h = 1 signs and nothing finer, but for short words; with n_h = 2 all from that to the
    group; experiments/results/state_tracking/quotients/ has both.
Takes: seconds a model on a CPU, half a minute for those of the preset paper, after the runs.
"""

import dataclasses
import functools
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax
from flax import nnx

from deltaproduct_jax.analysis.margin import failing_position
from deltaproduct_jax.analysis.quotients import Quotient, quotients
from deltaproduct_jax.errors import ConfigError
from deltaproduct_jax.files import any_path
from deltaproduct_jax.models import SequenceModel
from deltaproduct_jax.models.sequence_model import with_room
from deltaproduct_jax.settings import check_fields, seed_setting, setting
from deltaproduct_jax.tasks.finite_groups import finite_group
from experiments.lib import flags
from experiments.lib.bench.report import begun, markdown, shown, write_report
from experiments.lib.figures.curves import draw_panels, numbers_of
from experiments.lib.figures.records import FIGURE
from experiments.lib.figures.style import SECTION, Look, beside_records, save
from experiments.lib.group_runs import load_group_run, require_answers, run_name
from experiments.lib.run_records import label

HOLDS = 0.9  # fewer words right at a position: the model has failed there
TIMES_TRAINED = 4  # the length of words over that trained, where no flag says it
AT_ONCE = 64  # words read by one call
# What tells panels apart, but for "group" where runs differ in it alone.
APART = ("mixer", "num_householder", "num_layers", "train_length", "checkpoint")
Curves = Mapping[str, np.ndarray]


@dataclasses.dataclass(frozen=True)
class QuotientsConfig:
    """What is looked at; raises ConfigError where the fields make no sense."""

    runs: tuple[str, ...] = setting((), "directories of experiments.state_tracking", filled=True)
    checkpoint: tuple[str, ...] = setting(
        ("best",), "of every run: some of best, newest and steps", filled=True
    )
    words: int = setting(256, "random words of each group", least=1)
    length: int | None = setting(
        None, f"letters of a word, behind BOS; none: {TIMES_TRAINED} times the length trained",
        least=1,
    )  # fmt: skip
    seed: int = seed_setting("draws the words")

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)


def read(model: SequenceModel, words: np.ndarray, targets: np.ndarray) -> tuple[np.ndarray, ...]:
    """Answers, int32, and losses in nats, float32, both ``[N, T]``, of ids ``[N, T]``."""
    graph, params = nnx.split(with_room(model, words.shape[1]))
    parts = [
        jax.device_get(_read(params, words[at : at + AT_ONCE], targets[at : at + AT_ONCE], graph))
        for at in range(0, len(words), AT_ONCE)
    ]
    answers, losses = (np.concatenate(each) for each in zip(*parts, strict=True))
    return answers, losses


@functools.partial(jax.jit, static_argnames="graph")  # which the runs of a sweep share
def _read(params: nnx.State, words: jax.Array, targets: jax.Array, graph: nnx.GraphDef) -> Any:
    logits = nnx.merge(graph, params)(words).astype(jnp.float32)
    losses = optax.softmax_cross_entropy_with_integer_labels(logits, targets)
    return jnp.argmax(logits, axis=-1).astype(jnp.int32), losses


def look_at(run: str, checkpoint: str, options: QuotientsConfig) -> tuple[dict, Curves]:
    """A checkpoint's entry of quotients.json, and by the name of N the part right by position."""
    directory = any_path(run, "runs")
    model, config, step = load_group_run("runs", directory, checkpoint)
    task, name, trained = config.task, run_name(directory), config.task.train_length
    require_answers(name, task)
    length = options.length or TIMES_TRAINED * trained
    if length < trained:
        raise ConfigError(f"length={length} is less than train_length={trained} of {name}")
    # Modulo all of the group everything is right.
    found = quotients(finite_group(task.group).table)[:-1]
    draw = jax.jit(task.batch, static_argnums=(1, 2))  # op by op it takes ten times as long
    batch = draw(jax.random.key(options.seed), options.words, length)
    targets = np.asarray(batch.targets)
    answers, losses = read(model, np.asarray(batch.inputs), targets)
    rights = [quotient.right(answers, targets) for quotient in found]
    named = named_by_size(found)
    entry = {
        "name": name,
        "group": task.group,
        "mixer": config.model.mixer,
        "num_householder": config.model.value_of("num_householder"),
        "num_layers": config.model.num_layers,
        "train_length": trained,
        "checkpoint": checkpoint,
        "step": step,
        "seed": config.train.seed,
        "loss": round(float(losses[:, trained].mean()), 4),
        "quotients": [
            {
                "name": of,
                "normal": quotient.normal.tolist(),
                "cosets": quotient.cosets,
                "at_trained": round(float(right[:, trained].mean()), 4),
                "at_end": round(float(right[:, -1].mean()), 4),
                "failed": failing_position(right[:, 1:], HOLDS),
            }
            for of, quotient, right in zip(named, found, rights, strict=True)
        ],
    }
    return entry, {of: right.mean(0) for of, right in zip(named, rights, strict=True)}


def named_by_size(found: Sequence[Quotient]) -> list[str]:
    """The normal subgroups by their size, those of one size by a letter too."""
    sizes = [len(quotient.normal) for quotient in found]
    letter = lambda at: f" ({chr(ord('a') + sizes[:at].count(sizes[at]))})"
    return [f"{n}{letter(at) if sizes.count(n) > 1 else ''}" for at, n in enumerate(sizes)]


def panels(found: Sequence[tuple[dict, Curves]]) -> dict[str, Any]:
    """What `draw_panels` draws: runs that differ in the seed alone are in one panel."""
    entries = [entry for entry, _ in found]
    keys = ["group", *(key for key in APART if len({entry[key] for entry in entries}) > 1)]
    trained: dict[str, int] = {}
    curves: dict[str, dict[str, list[np.ndarray]]] = {}
    for entry, of_entry in found:
        title = label(keys, tuple(str(entry[key]) for key in keys))
        trained[title] = entry["train_length"]
        for name, curve in of_entry.items():
            curves.setdefault(title, {}).setdefault(f"|N| = {name}", []).append(curve)
    stacked = {title: {n: np.array(c) for n, c in of.items()} for title, of in curves.items()}
    return {"band": False, "trained": trained, "panels": numbers_of(stacked)}


def table(models: Sequence[Mapping[str, Any]]) -> str:
    """A line for every model and normal subgroup, as Markdown."""
    keys = ("name", "group", "num_householder", "seed", "step")
    head = (*keys, "loss", "order of N", "ln order", "cosets")
    rows = [
        [
            *(model[key] for key in keys),
            f"{model['loss']:.3f}",
            of["name"],
            f"{np.log(len(of['normal'])):.3f}",
            of["cosets"],
            f"{of['at_trained']:.3f}",
            f"{of['at_end']:.3f}",
            shown(of["failed"], ",d"),
        ]
        for model in models
        for of in model["quotients"]
    ]
    return markdown((*head, "right at train_length", "at the end", "failed"), rows)


def command(argv: Sequence[str]) -> None:
    """Reads the models, writes quotients.json and .md, draws quotients."""
    parsed = flags.parse(argv, {"quotients": QuotientsConfig, **SECTION}, {"default": {}})
    look = Look(**parsed.sections["figures"])
    options = QuotientsConfig(**parsed.sections["quotients"])
    found = [look_at(run, each, options) for run in options.runs for each in options.checkpoint]
    how = {FIGURE: "cumulative", "metric": "answers right modulo N"}
    record = begun("analysis.quotients", argv, words=options.words, **how)
    record |= {"models": [entry for entry, _ in found], **panels(found)}
    print(write_report(parsed.workdir, "quotients", record, page, indent=None))
    draw_quotients(record, parsed.workdir / "quotients", look)


@beside_records
def draw_quotients(record: Mapping[str, Any], path: Path, look: Look) -> list[Path]:
    """Draws the part of the words that are right modulo each normal subgroup, by position."""
    return save(draw_panels(record, look), path, look)


def page(record: Mapping[str, Any]) -> list[str]:
    """What quotients.md holds."""
    return [table(record["models"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
