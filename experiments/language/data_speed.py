"""Does a device wait for its text? Training steps with rows from disk, and with one batch kept.

    python -m experiments.language.data_speed --workdir=runs/data_speed --preset=213m_2 \\
        --data=tokens --batch_size=16 --accumulation_steps=1

runs the step that ``experiments.language_modeling`` jits, on rows that the stream reads, shuffles
and packs while the device works, and again on the first of these batches, which stays there. Both
in turn, several rounds each.

Source: this project.
Expect: on a GPU within 2 per cent of each other.
Takes: a minute on a GPU, with compiling; half a minute of ``--preset=small`` on a CPU.
"""

import dataclasses
import functools
import statistics
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import jax

from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.loop import initial_model
from deltaproduct_jax.training.measuring.memory import (
    require_memory_of_config,
    require_memory_of_state,
)
from deltaproduct_jax.training.source import source_of
from deltaproduct_jax.training.start import first_state, layout_of, shapes_of
from deltaproduct_jax.training.step import step_of_run
from deltaproduct_jax.training.text import TextTask
from experiments.lib import flags
from experiments.lib.bench.report import begun, markdown, write_report
from experiments.lib.bench.timing import machine
from experiments.lib.language_presets import PRESETS as MODELS

_SMALL = {"num_layers": 1, "hidden_size": 64, "num_heads": 2, "intermediate_size": 128}
PRESETS = MODELS | {"small": MODELS["tiny"] | _SMALL | {"steps_a_round": 3, "rounds": 3}}
WITH, WITHOUT = "rows from disk", "one batch, kept"


@dataclasses.dataclass(frozen=True)
class RoundConfig:
    """How long is measured."""

    steps_a_round: int = setting(10, "steps that are timed together", least=1)
    rounds: int = setting(5, "of each kind, in turn", least=1)

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)


SECTIONS = {"rounds": RoundConfig, "task": TextTask, "model": ModelConfig, "train": TrainConfig}
SECTIONS |= {"devices": DeviceConfig}


def measure(config: RunConfig, rounds: RoundConfig, devices: DeviceConfig) -> dict[str, Any]:
    """Tokens per second of every round of both kinds.

    Raises:
        ConfigError: the run cannot be made on these devices, or needs more memory than there is.
    """
    require_memory_of_config(config)
    make_model = functools.partial(initial_model, config)
    layout = layout_of(config, make_model, devices)
    definition, shapes = shapes_of(config, make_model)
    require_memory_of_state(shapes)
    source = source_of(config, layout)
    state = first_state(config, make_model, layout)
    kept, length = source.training(0), config.length_at(1)
    step = jax.jit(
        functools.partial(step_of_run(config, definition, layout, source.train_batch), length),
        donate_argnums=0,
    )
    compiled = step.lower(state, kept).compile()
    tokens = rounds.steps_a_round * config.train.batch_size * length
    at, found = 0, {WITH: [], WITHOUT: []}

    def timed(batch_of: Callable[[int], Any]) -> float:
        nonlocal state, at
        began = time.perf_counter()
        for _ in range(rounds.steps_a_round):
            state, metrics = compiled(state, batch_of(at))
            at += 1
        jax.block_until_ready((state, metrics))
        return tokens / (time.perf_counter() - began)

    timed(source.training)  # warms up
    for _ in range(rounds.rounds):
        found[WITH].append(timed(source.training))
        found[WITHOUT].append(timed(lambda _: kept))
    return found


def table(found: dict[str, list[float]]) -> str:
    """Medians, spread, and what the first is of the second."""
    medians = {name: statistics.median(speeds) for name, speeds in found.items()}
    lines = [
        [
            name,
            *(f"{speed:,.0f}" for speed in (medians[name], min(speeds), max(speeds))),
            f"{medians[name] / medians[WITHOUT]:.3f}",
        ]
        for name, speeds in found.items()
    ]
    return markdown(("batches", "tokens/s, median", "least", "most", "of one batch, kept"), lines)


def command(argv: Sequence[str]) -> None:
    """Measures, prints the table, writes data_speed.json and .md."""
    parsed = flags.parse(argv, SECTIONS, PRESETS, exclude=("vocab_size",))
    sections = parsed.sections
    task, model = TextTask(**sections["task"]), sections["model"]
    config = RunConfig(
        task,
        ModelConfig.variant(model)(vocab_size=task.vocab_size, **model),
        TrainConfig(**sections["train"]),
    )
    rounds, devices = (
        RoundConfig(**sections["rounds"]),
        DeviceConfig(**sections["devices"]),
    )
    found = measure(config, rounds, devices)
    record = begun("language.data_speed", argv, config=config.to_dict(), machine=machine())
    record["tokens_per_s"] = found
    print(write_report(parsed.workdir, "data_speed", record, page))


def page(record: Mapping[str, Any]) -> list[str]:
    """What data_speed.md holds."""
    return [record["machine"], table(record["tokens_per_s"])]


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
