"""Language models: how well is the next token of a text predicted, by DeltaProduct and others?

    python -m experiments.language_modeling --preset=tiny

learns bytes of the Python standard library's sources on a CPU, in ``runs/language_modeling``, and
reports bits per byte of files that were held out. Other text is tokenized first:

    python -m experiments.prepare_text --workdir=tokens --sources=FOLDER --tokenizer=mistral
    python -m experiments.language_modeling --workdir=runs/213m --preset=213m_2 --data=tokens

The other presets are the paper's models by size and n_h (1300m is ours), 24 layers of heads of 128,
at its batch of 524,288 tokens; they want a GPU of 80 GB, or several and ``--accumulation_steps=1``.
The same command goes on after a kill, in the middle of an epoch. The vocabulary is the text's.

Source: https://arxiv.org/abs/2502.10297, language modelling (sizes, optimiser, schedule, batch).
Expect: of the preset tiny, 1.92 bits per byte on the validation files and 1.96 on the test's:
    experiments/results/language/tiny/README.md.
Takes: of the preset tiny, 332 s of process time, about 3 minutes on two CPU cores; of the others
    GPU weeks.
"""

import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.text import TextTask
from experiments.lib.figures.plots import plot_bits
from experiments.lib.figures.style import Look
from experiments.lib.language_presets import PRESETS
from experiments.lib.task_experiment import Row, TaskExperiment

WORKDIR = "runs/language_modeling"


def rows(entry: Mapping[str, Any]) -> list[Row]:
    """Loss, bits per byte and the fraction of likeliest tokens that were right, at one length."""
    return [
        {
            "length": entry["length"],
            "tokens": entry["tokens"],
            "loss": entry["loss"],
            "bits per byte": entry["bits_per_byte"],
            "accuracy": entry["token_accuracy"],
        }
    ]


def draw(config: RunConfig, results: Mapping[str, Any], path: Path, look: Look) -> None:
    """Draws bits per byte over the tokens trained on."""
    plot_bits(path.parent, path, look)


EXPERIMENT = TaskExperiment(
    "language_modeling", TextTask, PRESETS, rows, "bits_per_byte", draw, WORKDIR
)
SECTIONS, configure, main = EXPERIMENT.sections, EXPERIMENT.configure, EXPERIMENT.main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
