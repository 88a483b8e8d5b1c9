"""The main job: one layer of DeltaProduct learns to track S3, and DeltaNet does not.

    python3 experiments/quickstart.py

needs nothing but Python 3.11 or newer. It sets up ``.venv``, trains the permutation group S3 with
one Householder factor per token (n_h = 1, DeltaNet) and with two, and compares them up to eight
times the length they were trained at. Flags are those of ``experiments.state_tracking``, for
example ``--seed=1``; ``--workdir`` is runs/quickstart unless given. A killed run goes on with the
same command.

Source: https://arxiv.org/abs/2502.10297, the word problem of S3 in one layer by n_h; the setup is a
    small one of this project (`experiments.state_tracking`, preset "default").
Expect: n_h = 2 has sequence accuracy 1.0 at 32 and 128 tokens, n_h = 1 has 0 at 32.
Takes: two to five minutes on two CPU cores, once the packages are installed.
"""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
    from experiments.lib import environment

    if not environment.inside():
        environment.go_on_inside("experiments.quickstart")

from deltaproduct_jax.parallel.config import DeviceConfig
from deltaproduct_jax.training.loop import train
from experiments import state_tracking
from experiments.lib import flags
from experiments.lib.bench.report import write_json
from experiments.lib.figures.plots import cumulative_record, plot_cumulative
from experiments.lib.figures.style import SECTION, Look

NUM_HOUSEHOLDERS = (1, 2)
WORKDIR = "runs/quickstart"
ONE = DeviceConfig(mesh="data:1")  # which any batch fits


def command(argv: Sequence[str]) -> None:
    """Trains both models, prints the table and draws the figure."""
    parsed = flags.parse(
        argv,
        {**state_tracking.SECTIONS, **SECTION},
        state_tracking.PRESETS,
        exclude=["vocab_size", "num_householder"],
        default_workdir=WORKDIR,
    )
    look, results_by_n_h = Look(**parsed.sections.pop("figures")), {}
    for n_h in NUM_HOUSEHOLDERS:
        parsed.sections["model"]["num_householder"] = n_h
        config = state_tracking.configure(parsed.sections)
        name = f"{config.task.group}_seed{config.train.seed}_nh{n_h}"
        print(f"{config.task.group}, n_h = {n_h}, seed {config.train.seed}:", file=sys.stderr)
        directory = parsed.workdir / name
        argv_of_run = ["experiments.quickstart", *argv]
        results_by_n_h[n_h] = train(config, directory, argv_of_run, devices=ONE)
    path = parsed.workdir / f"{config.task.group}_seed{config.train.seed}"
    curves = {f"n_h = {n_h}": results for n_h, results in results_by_n_h.items()}
    record = cumulative_record(curves, config.task.group, config.task.train_length)
    write_json(path.with_name(f"{path.name}.json"), record, indent=None)
    print(table(config.task.group, config.task.train_length, results_by_n_h))
    for figure in plot_cumulative(record, path, look):
        print(f"figure: {figure}")


def table(group: str, train_length: int, results_by_n_h: dict[int, dict[str, Any]]) -> str:
    """Sequence accuracy of every model at every length."""
    lines = [
        f"{group} trained at length {train_length}: fraction of test sequences right at every "
        "position (BOS not counted)",
        "length  " + "  ".join(f"n_h = {n_h}" for n_h in results_by_n_h),
    ]
    columns = [
        {entry["length"]: entry["strict"]["sequence_accuracy"] for entry in results["test"]}
        for results in results_by_n_h.values()
    ]
    for length in columns[0]:
        lines.append(f"{length:>6}  " + "  ".join(f"{column[length]:7.4f}" for column in columns))
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
