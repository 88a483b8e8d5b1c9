"""Runs small enough for tests: a model that compiles at once, a task and settings to match."""

import contextlib
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.experimental.compilation_cache import compilation_cache

from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.training.config import RunConfig, TrainConfig

FIELDS: dict[str, Any] = {
    "group": "Z3",
    "train_length": 4,
    "eval_lengths": (4, 6),
    "hidden_size": 8,
    "steps": 12,
    "batch_size": 8,
    "learning_rate": 0.03,
    "log_every": 2,
    "eval_every": 4,
    "checkpoint_every": 6,
    "eval_sequences": 32,
    "eval_batch_size": 16,
}


class TinyModel(nnx.Module):
    """Stands in for SequenceModel: every answer reads the sum of the embeddings so far."""

    def __init__(self, config: ModelConfig, *, rngs: nnx.Rngs):
        self.embeddings = nnx.Embed(config.vocab_size, config.hidden_size, rngs=rngs)
        self.head = nnx.Linear(config.hidden_size, config.vocab_size, rngs=rngs)

    def __call__(self, tokens):
        return self.head(self.features(tokens))

    def features(self, tokens):
        return jnp.tanh(jnp.cumsum(self.embeddings(tokens), axis=1))


def nudged(model: nnx.Module, size: float = 0.3) -> nnx.Module:
    """The model, none of whose parameters rests at 0, as some do before training."""
    rng = np.random.default_rng(1)
    nudge = lambda a: jnp.asarray(np.asarray(a) + size * rng.normal(size=a.shape), a.dtype)
    nnx.update(model, jax.tree.map(nudge, nnx.state(model, nnx.Param)))
    return model


@contextlib.contextmanager
def compiled_once(directory: Path) -> Iterator[None]:
    """Inside, a program that some run has compiled is not compiled again by the next."""
    settings = {
        "jax_compilation_cache_dir": str(directory),
        "jax_persistent_cache_min_compile_time_secs": 0.0,
        "jax_persistent_cache_min_entry_size_bytes": -1,
    }
    before = {name: getattr(jax.config, name) for name in settings}
    # Compiling takes longer than running here. This flag cannot be read back; False is its default.
    settings["jax_disable_most_optimizations"] = True
    before["jax_disable_most_optimizations"] = False
    for values in (settings, before):
        for name, value in values.items():
            jax.config.update(name, value)
        compilation_cache.reset_cache()
        if values is settings:
            yield


def run_config(**fields: Any) -> RunConfig:
    """The tiny run with other values for some fields."""
    values = FIELDS | fields
    parts = {}
    for config in (GroupTask, ModelConfig, TrainConfig):
        names = {field.name for field in dataclasses.fields(config)} & values.keys()
        parts[config] = {name: values.pop(name) for name in names}
    assert not values, values
    task = GroupTask(**parts[GroupTask])
    model = ModelConfig(vocab_size=task.vocab_size, **parts[ModelConfig])
    return RunConfig(task, model, TrainConfig(**parts[TrainConfig]))


def flags_for(workdir: Path, **fields: Any) -> list[str]:
    """The tiny run's command line; every field is spelt out, whatever a preset says."""
    sections = run_config(**fields).to_dict().values()
    values = {name: value for section in sections for name, value in section.items()}
    del values["vocab_size"]
    return [
        f"--workdir={workdir}",
        *(f"--{name}={_spell(value)}" for name, value in values.items()),
    ]


def _spell(value: Any) -> str:
    return ",".join(map(str, value)) if isinstance(value, list) else str(value)


def rows_in(directory: Path) -> list[dict[str, Any]]:
    """Rows of the metrics of a run."""
    return [json.loads(line) for line in (directory / "metrics.jsonl").read_text().splitlines()]


def curve(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Rows of metrics without what the clock says."""
    clock = ("time", "tokens_per_second", "tokens_per_second_per_device", "mfu", "goodput")
    return [{name: row[name] for name in row if name not in clock} for row in rows]


def outcome(directory: Path) -> dict[str, Any]:
    """The results of a run without what the clock says."""
    return lasting(json.loads((directory / "results.json").read_text()))


def lasting(results: dict[str, Any]) -> dict[str, Any]:
    """The same of results that were read already."""
    return {name: value for name, value in results.items() if name != "throughput"}


def snapshot(directory: Path) -> dict[str, bytes]:
    """Every file under a directory, with its content."""
    return {
        str(path.relative_to(directory)): path.read_bytes()
        for path in sorted(directory.rglob("*"))
        if path.is_file()
    }


def leaves_equal(a: Any, b: Any) -> bool:
    """Whether two trees hold the same numbers, bit for bit."""
    return all(jax.tree.leaves(jax.tree.map(lambda x, y: bool((x == y).all()), a, b)))
