"""Any registered mixer on any registered task, those of plug-ins included, by flags.

    python -m experiments.train --workdir=runs/mine --plugins=my_mixer.py,my_task.py \\
        --task=my_task --mixer=my_mixer

trains, and reports the accuracies on the test split at every length of the task. The same command
goes on after a kill. There are no presets: what no flag says is as the dataclasses have it.

Source: ``deltaproduct_jax/models/README.md``, which shows how a mixer and a task are registered.
Expect: a row for each length and way of counting; the page's own example has .46 of the
letters right at 8 tokens, .35 at 16: an average forgets.
Takes: what the settings ask for; the page's own example 15 seconds.
"""

import sys
from collections.abc import Mapping
from typing import Any

from deltaproduct_jax.tasks.registry import NamedTask
from experiments.lib.task_experiment import Row, TaskExperiment

PRESETS: dict[str, dict[str, Any]] = {"default": {}}


def rows(entry: Mapping[str, Any]) -> list[Row]:
    """Token and sequence accuracy at one length, by each of the task's ways of counting.

    Of text, which counts in no such way, the numbers that there are.
    """
    scores = [
        {
            "length": entry["length"],
            "counted": name,
            "token": score["token_accuracy"],
            "sequence": score["sequence_accuracy"],
        }
        for name, score in entry.items()
        if isinstance(score, dict)
    ]
    return scores or [dict(entry)]


EXPERIMENT = TaskExperiment("train", NamedTask, PRESETS, rows)
SECTIONS, configure, main = EXPERIMENT.sections, EXPERIMENT.configure, EXPERIMENT.main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
