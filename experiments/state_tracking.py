"""State tracking: can a model follow the product of group elements, and how far beyond training?

    python -m experiments.state_tracking --workdir=runs/s3

trains on the word problem of a group and reports the accuracy at 1, 2, 4 and 8 times the length
trained. The same command goes on after a kill. Presets: ``default`` learns S3 on a CPU; ``paper``
is the setup of https://arxiv.org/abs/2502.10297 as far as it is published, and wants an
accelerator.
"""

import sys
from collections.abc import Sequence
from typing import Any

from deltaproduct_jax.models import ModelConfig
from deltaproduct_jax.tasks.groups import GroupTask
from deltaproduct_jax.training.config import RunConfig, TrainConfig
from deltaproduct_jax.training.loop import train
from experiments import flags
from experiments.figures import plot_cumulative

SECTIONS = {"task": GroupTask, "model": ModelConfig, "train": TrainConfig}

PRESETS: dict[str, dict[str, Any]] = {
    # Beta starts near 2 and q, k are linear, so that reflections are at hand from the first step;
    # short sequences come first. experiments/README.md says how the numbers were chosen.
    "default": {
        "group": "S3",
        "train_length": 32,
        "hidden_size": 64,
        "num_heads": 2,
        "head_dim": 32,
        "num_householder": 2,
        "intermediate_size": 128,
        "qk_activation": "none",
        "beta_bias": 5.0,
        "batch_size": 64,
        "steps": 600,
        "curriculum": (4, 8, 16),
        "curriculum_fraction": 0.25,
        "learning_rate": 1e-3,
        "end_learning_rate": 2e-4,
        "warmup_steps": 50,
        "clip_norm": 1.0,
    },
    "paper": {
        "group": "S5",
        "train_length": 128,
        "eval_lengths": (128, 256, 512),
        "num_householder": 4,
        "hidden_size": 128,
        "num_heads": 8,
        "head_dim": 32,
        "expand_v": 1.0,
        "intermediate_size": 512,
        "qk_activation": "silu",
        "beta_bias": None,
        "initializer": "paper",
        "dtype": "bfloat16",
        "batch_size": 4096,
        "steps": 48_828,  # 100 epochs of 2,000,000 sequences
        "learning_rate": 1e-3,
        "weight_decay": 1e-6,
        "schedule": "cosine",
        "log_every": 100,
        "eval_every": 488,  # once an epoch
        "checkpoint_every": 488,
        "eval_sequences": 16_384,
        "eval_batch_size": 2048,
    },
}


def configure(sections: dict[str, dict[str, Any]]) -> RunConfig:
    """The run that flags describe."""
    task = GroupTask(**sections["task"])
    return RunConfig(
        task=task,
        model=ModelConfig(vocab_size=task.vocab_size, **sections["model"]),
        train=TrainConfig(**sections["train"]),
    )


def command(argv: Sequence[str]) -> None:
    """Trains as the flags say, prints a table and draws the curves."""
    parsed = flags.parse(argv, SECTIONS, PRESETS, exclude=["vocab_size"])
    config, workdir = configure(parsed.sections), parsed.workdir
    results = train(config, workdir, ["experiments.state_tracking", *argv])
    print(table(results))
    figure = workdir / "cumulative.png"
    if not figure.exists():
        label = f"{config.task.group}, {config.model.label}"
        plot_cumulative({label: results}, figure, config.task.train_length)


def table(results: dict[str, Any]) -> str:
    """Accuracies of the best checkpoint on the test split, a line a length."""
    head = ("length", "token", "sequence", "token with BOS", "sequence with BOS")
    lines = [
        f"best checkpoint: step {results['best_step']} of {results['steps']}; test split:",
        "  ".join(head),
    ]
    for entry in results["test"]:
        numbers = [
            entry[protocol][f"{what}_accuracy"]
            for protocol in ("strict", "paper")
            for what in ("token", "sequence")
        ]
        cells = [f"{entry['length']:>{len(head[0])}}"]
        cells += [f"{x:>{len(name)}.4f}" for x, name in zip(numbers, head[1:], strict=True)]
        lines.append("  ".join(cells))
    return "\n".join(lines)


def main(argv: Sequence[str]) -> int:
    """Exit code of the command; ``argv`` without the program's name."""
    return flags.run(command, argv)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
