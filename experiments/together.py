"""Runs of a sweep that differ only in numbers, trained together in one program.

    python -m experiments.together --workdir=runs/groups --run=seed=0 --run=seed=1

trains the named runs of a sweep's ``runs.json`` on all devices of this machine, each in its folder
under ``runs/`` as if it were run alone. ``--launcher=vmap`` of the sweep starts this for all runs
of a grid that may be in one program: seed, learning rate and its end, weight decay, AdamW's
epsilon, largest norm of the gradient, beta's bias, deviation of the first draws and the accuracy
that suffices may differ, and nothing else.

The exit code is 0 if all runs came to their ends, 1 if one has failed, which its log says.

Source: this project.
Expect: the records of each run as alone, the losses to rounding.
Takes: 8 seeds of a narrow S3 a third of what they take one after another on two CPU cores;
    experiments/SWEEPS.md has the command.
"""

import contextlib
import dataclasses
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.training.config import RunConfig
from deltaproduct_jax.training.together.group import train_together
from experiments.lib import flags
from experiments.lib.sweeps.grid import LIST, Run, load_script, read_list
from experiments.lib.sweeps.records import LOG, RunFolder


@dataclasses.dataclass(frozen=True)
class TogetherConfig:
    """Which runs; raises ConfigError without any."""

    run: tuple[str, ...] = setting(
        (), "name of a run of the sweep in --workdir; given once for each", repeated=True
    )

    def __post_init__(self):
        check_fields(self)
        if not self.run:
            raise ConfigError("run is missing; give the name of a run, once for each")


def command(argv: Sequence[str]) -> None:
    """Trains the runs; SystemExit with 1 if one of them failed."""
    parsed = flags.parse(argv, {"together": TogetherConfig}, {"default": {}})
    config, workdir = TogetherConfig(**parsed.sections["together"]), parsed.workdir.absolute()
    script, saved = read_list(workdir)
    module, by_name = load_script(script), {run.name: run for run in saved}
    for name in config.run:
        if name not in by_name:
            raise ConfigError(f"run={name!r} is no run of the sweep in {workdir}")
    runs = [by_name[name] for name in dict.fromkeys(config.run)]
    outcomes = train_together(
        [_config_of(run, workdir) for run in runs],
        [RunFolder(workdir, run).path for run in runs],
        ["experiments.together", *argv],
    )
    for run, outcome in zip(runs, outcomes, strict=True):
        log_end(run, RunFolder(workdir, run).path, outcome, module.main)
    failed = [run for run, outcome in zip(runs, outcomes, strict=True) if is_failure(outcome)]
    for run in failed:
        log = RunFolder(workdir, run).path / LOG
        print(f"error: run={run.name!r} has failed; {log} says why", file=sys.stderr)
    if failed:
        raise SystemExit(1)


def _config_of(run: Run, workdir: Path) -> RunConfig:
    try:
        return RunConfig.from_dict(run.config)
    except (ConfigError, KeyError, TypeError) as error:
        raise RunDirectoryError(f"{workdir / LIST}: config of {run.name!r}: {error}") from error


def is_failure(outcome: object) -> bool:
    """Whether a run did not come to its end."""
    return isinstance(outcome, Exception)


def log_end(run: Run, folder: Path, outcome: object, main: Callable[[Sequence[str]], int]) -> None:
    """Writes into a run's log how it ended; its own script adds the table and the figure."""
    with open(folder / LOG, "a") as log, contextlib.redirect_stdout(log):
        if is_failure(outcome):
            print(f"error: {' '.join(str(outcome).split())}")
        else:
            main([f"--workdir={folder}", *run.argv()])


def main(argv: Sequence[str]) -> int:
    """Exit code of the command; ``argv`` without the program's name."""
    return flags.run(command, argv, goes_on=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
