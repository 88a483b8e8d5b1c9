"""Runs of state tracking, read back by those who look at what was trained."""

from pathlib import Path

from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.records import CONFIG
from experiments.lib import flags
from experiments.lib.sweeps.grid import NO_FLAGS

SECTIONS = {"task": GroupTask, "model": ModelConfig, "train": TrainConfig}


def read_group_run(run: Path) -> RunConfig:
    """The configuration of a state-tracking run; ConfigError if it is another's or none."""
    argv = [f"--config={run / CONFIG}", "--workdir=."]
    sections = flags.parse(argv, SECTIONS, {"default": {}}, exclude=NO_FLAGS).sections
    task = GroupTask(**sections["task"])
    return RunConfig(
        task=task,
        model=ModelConfig(vocab_size=task.vocab_size, **sections["model"]),
        train=TrainConfig(**sections["train"]),
    )
