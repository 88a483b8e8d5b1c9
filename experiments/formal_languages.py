"""Formal languages: does a model learn parity or modular arithmetic, beyond the lengths trained?

    python -m experiments.formal_languages --workdir=runs/parity

trains on sequences of 3 to 40 tokens and reports the scaled accuracy at 40 to 256, over all and by
ranges of the length. The same command goes on after a kill. Presets: ``default`` learns parity on a
CPU; ``paper_parity``, ``paper_modular_arithmetic`` and ``paper_modular_arithmetic_brackets`` are
the setups of https://arxiv.org/abs/2411.12537, whose protocol the DeltaProduct paper,
https://arxiv.org/abs/2502.10297, repeats; they want an accelerator.

Source: https://arxiv.org/abs/2411.12537, table 3, and https://arxiv.org/abs/2502.10297.
Expect: parity by the default preset .998 and more over 40 to 256 tokens, seeds 0 to 2.
Takes: 2 minutes on two CPU cores.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaproduct_jax.tasks.formal_languages import FormalLanguageTask
from deltaproduct_jax.training.config import RunConfig
from experiments.lib.figures.plots import plot_ranges
from experiments.lib.figures.style import Look
from experiments.lib.task_experiment import MODEL, Row, TaskExperiment

# One of the learning rates that the paper tries (1e-2, 1e-3, 5e-4, 1e-4); it reports the best.
PAPER: dict[str, Any] = MODEL | {
    "train_length": 40,
    "min_train_length": 3,
    "eval_lengths": (40, 256),
    "min_eval_length": 40,
    "num_layers": 3,
    "hidden_size": 128,
    "num_heads": 4,
    "head_dim": 32,
    "intermediate_size": 512,
    "use_short_conv": True,
    "conv_size": 4,
    "dtype": "bfloat16",
    "batch_size": 1024,
    "steps": 100_000,
    "learning_rate": 1e-3,
    "end_learning_rate": 1e-6,
    "warmup_steps": 10_000,
    "weight_decay": 0.1,
    "clip_norm": 1.0,
    "log_every": 100,
    "eval_every": 1000,
    "checkpoint_every": 1000,
    "eval_sequences": 8192,
    "eval_batch_size": 1024,
}

PRESETS: dict[str, dict[str, Any]] = {
    # As in experiments.state_tracking: beta starts near 2, q and k are linear, short ones first.
    "default": MODEL
    | {
        "language": "parity",
        "hidden_size": 64,
        "num_heads": 2,
        "head_dim": 32,
        "num_householder": 2,
        "intermediate_size": 128,
        "qk_activation": "none",
        "beta_bias": 8.0,
        "batch_size": 64,
        "steps": 600,
        "curriculum": (8, 16),
        "curriculum_fraction": 0.25,
        "learning_rate": 1e-3,
        "end_learning_rate": 2e-4,
        "warmup_steps": 50,
        "clip_norm": 1.0,
        "eval_sequences": 1024,
    },
    "paper_parity": PAPER | {"language": "parity", "num_layers": 2},
    "paper_modular_arithmetic": PAPER | {"language": "modular_arithmetic"},
    "paper_modular_arithmetic_brackets": PAPER | {"language": "modular_arithmetic_brackets"},
}


def rows(entry: Mapping[str, Any]) -> list[Row]:
    """Accuracy over all lengths of an evaluation, then over the ranges it is cut into."""
    return [
        {
            "lengths": f"{score['shortest']} to {score['longest']}",
            "sequences": score["sequences"],
            "accuracy": score["token_accuracy"],
            "scaled accuracy": score["scaled_accuracy"],
        }
        for score in entry.values()
        if isinstance(score, dict)
    ]


def draw(config: RunConfig, results: Mapping[str, Any], path: Path, look: Look) -> None:
    """Draws the scaled accuracy by length."""
    plot_ranges(results, path, config.task.train_length, look)


EXPERIMENT = TaskExperiment(
    "formal_languages", FormalLanguageTask, PRESETS, rows, "scaled_accuracy", draw
)
SECTIONS, configure, main = EXPERIMENT.sections, EXPERIMENT.configure, EXPERIMENT.main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
