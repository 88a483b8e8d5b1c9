"""Many runs of one script: a grid written as flags, run here or on a cluster, and resumed.

    python -m experiments.sweep --workdir=runs/groups --script=state_tracking --workers=2 \\
        --grid="group=S3,S4;num_householder=1,2;seed=0:3" --fixed="steps=2000"

The runs are expanded, checked and saved in ``runs.json`` before the first is started; each is a
child process with its folder under ``runs/`` (``lib/sweeps/grid.py`` has the syntax of grids). What
is done is skipped, what died is tried again from its last checkpoint, and no run is ever run twice
at once: the same command, or only ``--workdir``, goes on after a kill, and several may share a
folder.
``results.csv`` and ``results.parquet`` hold every run with its settings and outcome; with
``--launcher=none`` they are made from the records without starting anything.

Ctrl-C and SIGTERM tell the runs to finish their step and save; a second one ends the sweep at once.

The exit code is 0 if all runs are done, 1 if one has failed for good, 130 after Ctrl-C, 143 after
SIGTERM.

Source: this project; grids and seeds as the papers behind ``--script`` have them.
Expect: a line of results.csv for every run; experiments/results/state_tracking/ has several sweeps.
Takes: what its runs take, by the number of ``--workers``.
"""

import dataclasses
import sys
from collections.abc import Sequence

import jax

from deltaproduct_jax.settings import check_fields, setting
from experiments.lib import flags
from experiments.lib.folders import SWEEP, refuse_other
from experiments.lib.sweeps.grid import MOST_RUNS
from experiments.lib.sweeps.running import LaunchConfig, Sweep, run_sweep


@dataclasses.dataclass(frozen=True)
class SweepConfig:
    """What is swept; raises ConfigError where the fields make no sense."""

    script: str | None = setting(
        None, "script of experiments whose runs these are; none: that of the folder's sweep"
    )
    grid: tuple[str, ...] = setting(
        (),
        "settings and their values, as group=S3,S4;seed=0:5; given several times, the runs of all "
        "grids are run; without any, the folder's sweep goes on",
        repeated=True,
    )
    fixed: str = setting("", "settings that all runs share, as steps=2000;batch_size=64")
    max_runs: int = setting(
        MOST_RUNS, "runs that the grids may make; more is taken for a slip", least=1
    )

    def __post_init__(self):
        check_fields(self)


def command(argv: Sequence[str]) -> None:
    """Runs the sweep; SystemExit with 1, or Stopped by a signal, unless all runs are done."""
    sections = {"sweep": SweepConfig, "launch": LaunchConfig}
    parsed = flags.parse(argv, sections, {"default": {}})
    config = SweepConfig(**parsed.sections["sweep"])
    launch = LaunchConfig(**parsed.sections["launch"])
    refuse_other(parsed.workdir, SWEEP)
    # The sweep itself computes nothing; an accelerator is for its runs.
    jax.config.update("jax_platforms", "cpu")
    wanted = Sweep(config.script, config.grid, config.fixed, config.max_runs)
    if not run_sweep(parsed.workdir.absolute(), wanted, launch):
        raise SystemExit(1)


def main(argv: Sequence[str]) -> int:
    """Exit code of the command; ``argv`` without the program's name."""
    return flags.run(command, argv, goes_on=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
