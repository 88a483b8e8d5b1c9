"""Recall: does a model find the value that came after a key, and with how many pairs (MQAR)?

    python -m experiments.recall --workdir=runs/recall

trains on sequences of 64 tokens with 4 pairs of a key and a value, and reports the fraction of
queries answered there and in longer sequences with more pairs. The same command goes on after a
kill. Presets: ``default`` has a small vocabulary and learns on a CPU; ``64_4``, ``128_8``,
``256_16`` and ``512_64`` are the tokens and pairs of figure 2 of https://arxiv.org/abs/2312.04927,
with its vocabulary of 8192 and two layers; they want an accelerator.

Source: https://arxiv.org/abs/2312.04927, figure 2; not a task of the DeltaProduct paper.
Expect: by the default preset .98 of the queries answered at 64 tokens, .80 at 256.
Takes: 4 minutes on two busy CPU cores.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaproduct_jax.tasks.recall import RecallTask
from deltaproduct_jax.training.config import RunConfig
from experiments.lib.figures.plots import plot_recall
from experiments.lib.figures.style import Look
from experiments.lib.task_experiment import MODEL, Row, TaskExperiment

PASSES = 64  # over the published 100,000 training sequences; here each is drawn only once


def figure_2(length: int, num_pairs: int, batch_size: int) -> dict[str, Any]:
    """One setting of the figure, at its smallest width and one of its four learning rates."""
    steps = PASSES * 100_000 // batch_size
    return MODEL | {
        "train_length": length,
        "num_pairs": num_pairs,
        "vocabulary": 8192,
        "num_layers": 2,
        "hidden_size": 64,
        "num_heads": 2,
        "head_dim": 32,
        "intermediate_size": 256,
        "use_short_conv": True,
        "batch_size": batch_size,
        "steps": steps,
        "learning_rate": 2.15e-3,
        "weight_decay": 0.1,
        "log_every": 100,
        "eval_every": steps // PASSES,
        "checkpoint_every": steps // PASSES,
        "eval_sequences": 3072,
        "eval_batch_size": 128,
    }


PRESETS: dict[str, dict[str, Any]] = {
    "default": MODEL
    | {
        "train_length": 64,
        "num_pairs": 4,
        "eval_lengths": (64, 128, 256),
        "eval_pairs": (4, 8, 16),
        "vocabulary": 64,
        "hidden_size": 64,
        "num_heads": 2,
        "head_dim": 32,
        "num_householder": 1,
        "intermediate_size": 128,
        "qk_activation": "none",
        "use_short_conv": True,
        "batch_size": 64,
        "steps": 400,
        "learning_rate": 3e-3,
        "warmup_steps": 50,
        "clip_norm": 1.0,
        "select_length": 64,
    },
    "64_4": figure_2(64, 4, batch_size=512),
    "128_8": figure_2(128, 8, batch_size=512),
    "256_16": figure_2(256, 16, batch_size=256),
    "512_64": figure_2(512, 64, batch_size=128),
}


def rows(entry: Mapping[str, Any]) -> list[Row]:
    """The fraction of queries answered, and of sequences answered throughout, at one length."""
    score = entry["strict"]
    return [
        {
            "length": entry["length"],
            "pairs": score["num_pairs"],
            "queries": score["token_accuracy"],
            "whole sequences": score["sequence_accuracy"],
        }
    ]


def draw(config: RunConfig, results: Mapping[str, Any], path: Path, look: Look) -> None:
    """Draws the fraction of queries answered at each length and number of pairs."""
    plot_recall(results, path, look)


EXPERIMENT = TaskExperiment("recall", RecallTask, PRESETS, rows, "recall", draw)
SECTIONS, configure, main = EXPERIMENT.sections, EXPERIMENT.configure, EXPERIMENT.main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
