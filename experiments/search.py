"""How good is each mixer where all are tuned alike? A small search for each, then fresh seeds.

    python -m experiments.search --workdir=runs/search --script=state_tracking --launcher=vmap \\
        --fixed="group=S3;steps=2000" --arm="mixer=delta_product;num_householder=2" \\
        --arm="mixer=kimi_delta_attention" --arm="mixer=mamba2"

tries ``--settings`` settings for each ``--arm`` (none: every mixer) with ``--seeds`` seeds each:
the learning rate and, as far as the mixer has them, the start of step sizes (``beta_bias``) and of
gates (``initial_gate``) and the activation of q and k; what an arm or ``--fixed`` sets is left as
it is. The setting whose median over seeds is best on the validation split trains again from
``--fresh`` seeds that nothing was chosen by, and these are scored on the test split: median, best
and the fraction of seeds that escape. ``search.json`` keeps every number, ``experiments.redraw``
makes table and picture of it. Runs are those of two sweeps, in ``tried`` and ``chosen``; the same
command goes on after a kill. Ctrl-C or SIGTERM, as of ``timeout``, leave a table of what has ended,
which says so. A run that fails counts as the worst.

Source: this project; learning rates and seeds as in https://arxiv.org/abs/2502.10297, appendix.
Expect: in a table of every mixer on one task no row that had more tries than another.
Takes: as long as (settings * seeds + fresh) runs of each arm; a program compiles for each mixer and
    activation where they are launched together.
"""

import dataclasses
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from deltaproduct_jax.errors import ConfigError, require_at_least
from deltaproduct_jax.layers.registry import MIXERS
from deltaproduct_jax.settings import check_fields, setting
from deltaproduct_jax.training.stopping import Stopped
from experiments.lib import flags
from experiments.lib.bench.report import command_line, write_json
from experiments.lib.figures.records import show
from experiments.lib.figures.style import SECTION, Look
from experiments.lib.folders import CHOSEN, SEARCH, TRIED, refuse_other
from experiments.lib.searches import (
    FIRST_FRESH,
    SEED,
    SPACE,
    Arm,
    Folders,
    Reported,
    Settings,
    arms_of,
    best_of,
    counted,
    finished,
    grid_of,
    grids_there,
    hours_of,
    median_of,
    reported_of,
    row_of,
    text_of,
    validation,
)
from experiments.lib.sweeps.grid import MOST_RUNS
from experiments.lib.sweeps.records import CSV, RunFolder, commits_of, hardware_of
from experiments.lib.sweeps.running import LaunchConfig, Sweep, run_sweep


@dataclasses.dataclass(frozen=True)
class SearchConfig:
    """What is compared and how much is tried; ConfigError where the fields make no sense."""

    script: str = setting("state_tracking", "script of experiments whose runs these are")
    arm: tuple[str, ...] = setting(
        (),
        "settings of what is compared, as mixer=delta_product;num_householder=3; given several "
        "times, one each; none: every mixer",
        repeated=True,
    )
    fixed: str = setting("", "settings that all runs share, as group=S3;steps=2000")
    settings: int = setting(12, "settings tried for each arm", least=1)
    seeds: int = setting(2, f"seeds of each, from 0; fewer than {FIRST_FRESH}", least=1)
    fresh: int = setting(5, f"seeds of what is chosen, from {FIRST_FRESH}", least=1)
    lowest_rate: float = setting(1e-4, "lowest learning rate that is tried", above=0)
    highest_rate: float = setting(1e-2, "highest learning rate that is tried", above=0)
    fields: tuple[str, ...] = setting(
        tuple(SPACE),
        f"what is tried beside it, of {', '.join(SPACE)}, where a mixer has it; a number adds no "
        "program, qk_activation one for each mixer that has it",
        one_of=SPACE,
    )
    metric: str | None = setting(
        None,
        "path of the number in an entry of results.json's test; none: what is published of the "
        "task, strict.scaled_accuracy, .sequence_accuracy or, of recall, .token_accuracy",
    )
    length: int | None = setting(None, "test length looked at; none: the longest of each run")
    threshold: float = setting(
        0.9, "score that a run which has escaped reaches, of losses from above"
    )
    max_runs: int = setting(
        MOST_RUNS, "runs that each of the two sweeps may have; more is taken for a slip", least=1
    )

    def __post_init__(self):
        check_fields(self)
        require_at_least("highest_rate", self.highest_rate, self.lowest_rate)
        for place, name in enumerate(self.fields):
            if name in self.fields[:place]:
                raise ConfigError(f"fields={','.join(self.fields)!r} has {name!r} twice")
        if self.seeds > FIRST_FRESH:
            raise ConfigError(f"seeds={self.seeds} is too large; it may be {FIRST_FRESH} at most")
        arms = len(self.arm) or len(MIXERS)
        for names in (("settings", "seeds"), ("fresh",)):
            runs = arms * math.prod(getattr(self, name) for name in names)
            if runs > self.max_runs:
                given = " and ".join(f"{name}={getattr(self, name)}" for name in names)
                raise ConfigError(
                    f"{given} make {runs} runs of {arms} arms, more than max_runs={self.max_runs}"
                )


def command(argv: Sequence[str]) -> None:
    """Runs both sweeps, prints the table, writes search.json and what is drawn of it.

    Raises:
        Stopped: by a signal; the same of what has ended by then is written first.
    """
    sections = {"search": SearchConfig, "launch": LaunchConfig, **SECTION}
    parsed = flags.parse(argv, sections, {"default": {}})
    config, look = (
        kind(**parsed.sections[name])
        for name, kind in (("search", SearchConfig), ("figures", Look))
    )
    launch, workdir = LaunchConfig(**parsed.sections["launch"]), parsed.workdir.absolute()
    refuse_other(workdir, SEARCH)
    # The search itself computes nothing; an accelerator is for its runs.
    jax.config.update("jax_platforms", "cpu")
    rates = (config.lowest_rate, config.highest_rate)
    arms = arms_of(config.arm, config.script, config.fixed, config.settings, rates, config.fields)
    metric = reported_of(arms, config.script, config.fixed, config.metric, config.length)
    reported = Reported(metric, config.length, config.threshold)

    trials = [[seeded(arm, tried, range(config.seeds)) for tried in arm.tried] for arm in arms]
    folders, stopped = run(workdir / TRIED, config, launch, trials)
    scores = [[[validation(f) for f in group] for group in groups] for groups in folders]
    medians = [[median_of(group) for group in groups] for groups in scores]
    chosen = [best_of(of_arm) for of_arm in medians]

    fresh = range(FIRST_FRESH, FIRST_FRESH + config.fresh)
    finals = [
        [] if place is None else [seeded(arm, arm.tried[place], fresh)]
        for arm, place in zip(arms, chosen, strict=True)
    ]
    ended: list[list[list[RunFolder]]] = [[] for _ in arms]
    if any(finals) and stopped is None:
        ended, stopped = run(workdir / CHOSEN, config, launch, finals)
    record = {
        "figure": "search",
        "command": command_line("search", argv),
        **what_came_of_it(reported, arms, (folders, scores, chosen), ended),
        "stopped": stopped is not None,
    }
    write_json(workdir / "search.json", record, indent=None)
    print(f"written: {workdir / 'search.json'}")
    for written in show(record, workdir / "search", look):
        print(f"written: {written}")
    print((workdir / "search.md").read_text().rstrip())
    if stopped is not None:
        raise stopped
    failed = [arm.settings for arm, place in zip(arms, chosen, strict=True) if place is None]
    if failed and launch.launcher != "none":
        raise ConfigError(
            f"--arm={text_of(failed[0])!r}: of every setting half of the runs or more have failed; "
            f"{workdir / TRIED / CSV} says why"
        )


def seeded(arm: Arm, tried: Settings, seeds: Sequence[int]) -> list[Settings]:
    """The runs of one setting of an arm."""
    return [arm.settings | tried | {SEED: str(seed)} for seed in seeds]


def run(
    workdir: Path,
    config: SearchConfig,
    launch: LaunchConfig,
    groups: Sequence[Sequence[Sequence[Settings]]],
) -> tuple[list[list[list[RunFolder]]], Stopped | None]:
    """Runs all that is in the groups as one sweep.

    Returns:
        Their folders, in the same order, and by what the sweep was stopped, if it was.
    """
    each = [settings for of_arm in groups for group in of_arm for settings in group]
    grids, stopped = [grid_of(settings) for settings in each], None
    there = grids_there(workdir) if workdir.name == CHOSEN else []
    kept = [grid for grid in there if grid not in grids]
    most = config.max_runs + len(kept)
    said = counted(config.script, config.fixed, each, together=launch.launcher == "vmap")
    print(f"{workdir.name}: {said}", file=sys.stderr, flush=True)
    try:
        run_sweep(workdir, Sweep(config.script, grids, config.fixed, most, kept), launch)
    except Stopped as error:
        stopped = error
    found = Folders(workdir, config.fixed)
    return [[found.of(group) for group in of_arm] for of_arm in groups], stopped


def what_came_of_it(
    reported: Reported,
    arms: Sequence[Arm],
    tried: tuple[Sequence[Any], Sequence[Any], Sequence[int | None]],
    ended: Sequence[Sequence[Sequence[RunFolder]]],
) -> dict[str, Any]:
    """What search.json holds.

    Args:
        reported: what is looked at.
        arms: all of them.
        tried: for each arm the folders of what was tried, their scores, and the place of the best.
        ended: for each arm the folders of its fresh seeds.
    """
    folders, scores, chosen = tried
    everything = [f for of_arm in (*folders, *ended) for group in of_arm for f in group]
    starts = [start for folder in everything for start in folder.starts()]
    rows = [
        row_of(
            arm,
            None if place is None else arm.tried[place],
            [f for group in groups for f in group],
            reported,
        )
        for arm, place, groups in zip(arms, chosen, ended, strict=True)
    ]
    return {
        "hardware": hardware_of(starts),
        "commits": commits_of(starts),
        "hours": hours_of(everything),
        "missing": len(everything) - len(finished(everything)),
        **reported._asdict(),
        "tried": [tried_of_arm(*each) for each in zip(arms, scores, chosen, strict=True)],
        "rows": rows,
    }


def tried_of_arm(arm: Arm, scores: Sequence[Any], place: int | None) -> dict[str, Any]:
    """What was tried for an arm and how it scored on the validation split, seed by seed."""
    return {
        "arm": arm.settings,
        "chosen": place,
        "settings": [
            tried | {"validation": score} for tried, score in zip(arm.tried, scores, strict=True)
        ],
    }


def main(argv: Sequence[str]) -> int:
    """Exit code of the command; ``argv`` without the program's name."""
    return flags.run(command, argv, goes_on=True)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
