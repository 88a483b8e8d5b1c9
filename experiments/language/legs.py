"""How are all legs of the paper's comparison made on a machine's GPUs, with no time lost?

    python -m experiments.language.legs --workdir=runs/paper --archive=runs/text/text.tar.xz \\
        --legs=213m_3:0,213m_1:0,36m_2:1 --deadline_s=1700

makes the text tokens once, then trains and measures legs, ``LEG:SEED`` in the order of importance,
as ``experiments.language.paper`` does one: each by processes of its own, a leg to the GPU that is
free first. ``--overlap_s`` before a leg ends, by its rate, the next starts beside it, and compiles
while the other trains; programs are kept in the folder, for the next leg and the next start. A
trained leg is measured beside the next one's training, all its parts at once. At the end the table
and figures of all legs in the folder are drawn.

With ``--deadline_s`` no leg begins that would not end in time; a shorter one that is later in the
list does instead. At the deadline, and upon Ctrl-C and SIGTERM, legs save, and the same command
goes on; what it says of training must be the same. A leg that fails is told in a line and ends no
other; the exit code is 1 then. What the processes print is in ``logs/``.

On a machine without GPUs legs go one after another. While text becomes tokens, the first legs of
GPUs compile, by training on a made-up text until validated (``--warm``). To have no GPU
wait, make tokens beforehand, anywhere: ``experiments.language.paper --stages=prepare``.

Source: https://arxiv.org/abs/2502.10297, its language models side by side.
Expect: the records and the table of ``experiments.language.paper``, of all legs.
Takes: what the legs take, divided by the GPUs, and a start and a measuring more.
"""

import contextlib
import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from typing import Any

import jax

from deltaproduct_jax.errors import ConfigError, require_one_of
from deltaproduct_jax.files import require_directory, user_path
from deltaproduct_jax.settings import LARGEST_SEED, check_fields, setting
from deltaproduct_jax.training.locks import Lock, held
from experiments.lib import children, flags, folders
from experiments.lib.figures.style import SECTION, Look
from experiments.lib.legs.config import PRESETS as OF_A_LEG
from experiments.lib.legs.config import LegConfig
from experiments.lib.legs.jobs import Place, paper, refuse_other_settings, run_legs
from experiments.lib.legs.leg import LEGS, LOCK, TRAINING, Leg
from experiments.lib.legs.schedule import Terms
from experiments.lib.legs.warming import warmed
from experiments.lib.sweeps.gpus import visible_gpus

PROGRAMS = "programs"
STILL_S = 300.0  # a start that compiles takes half of it
# What this command says of a leg itself.
DECIDED = ("leg", "seed", "stages", "train_s")
PRESETS: dict[str, dict[str, Any]] = OF_A_LEG | {
    "tiny": OF_A_LEG["tiny"] | {"legs": ("tiny:0", "tiny:1"), "overlap_s": 1.0}
}


@dataclasses.dataclass(frozen=True)
class LegsConfig:
    """Which legs, and how they share GPUs; raises ConfigError where the fields make no sense."""

    legs: tuple[str, ...] = setting(
        (), f"LEG:SEED, the most important first; a leg is one of {', '.join(LEGS)}", filled=True
    )
    deadline_s: float | None = setting(
        None, "seconds that this start may take, but for saving; none: all that is needed", above=0
    )
    overlap_s: float = setting(
        90.0, "seconds that a leg takes to start; so long before another ends it begins", least=0
    )
    measure_s: float = setting(
        120.0, "seconds kept for measuring a leg, where there is a deadline", least=0
    )
    still_s: float | None = setting(
        None,
        f"seconds without a token more after which a leg's training is ended; none: {STILL_S:.0f} "
        "on a GPU",
        above=0,
    )
    memory_fraction: float | None = setting(
        None,
        "of a GPU's memory for each leg that trains; none: what it needs of an H200's",
        above=0,
        most=1,
    )
    warm: bool = setting(
        True, "compiles the first legs while their text becomes tokens, on a made-up one; on GPUs"
    )
    compilation_cache: str | None = setting(
        None, f"directory of compiled programs; none: {PROGRAMS} in the workdir"
    )

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)
        if len(set(self.named)) < len(self.legs):
            raise ConfigError(f"legs={','.join(self.legs)!r} has a leg twice")

    @property
    def named(self) -> list[tuple[str, int]]:
        """Names and seeds."""
        found = []
        for text in self.legs:
            name, _, seed = text.partition(":")
            require_one_of("legs", name, LEGS)
            if not (seed.isascii() and seed.isdigit()) or int(seed) > LARGEST_SEED:
                raise ConfigError(f"legs={text!r} must be LEG:SEED, as 213m_2:0")
            found.append((name, int(seed)))
        return found


def command(argv: Sequence[str]) -> None:
    """Prepares, trains, measures, draws; SystemExit with 1 if a leg failed."""
    sections = {"legs": LegsConfig, "paper": LegConfig, **SECTION}
    parsed = flags.parse(argv, sections, PRESETS, exclude=DECIDED)
    folders.refuse_other(parsed.workdir, folders.LEGS)
    look = Look(**parsed.sections["figures"])
    config, workdir = LegsConfig(**parsed.sections["legs"]), parsed.workdir.resolve()
    of_each = [
        LegConfig(**parsed.sections["paper"] | {"leg": name, "seed": seed})
        for name, seed in config.named
    ]
    jax.config.update("jax_platforms", "cpu")  # an accelerator is for the legs
    end = math.inf if config.deadline_s is None else time.monotonic() + config.deadline_s
    cache = config.compilation_cache
    programs = (
        workdir / PROGRAMS if cache is None else user_path(cache, "compilation_cache").resolve()
    )
    require_directory(programs, "compilation_cache")
    with held(Lock(workdir / LOCK)) as lock:
        place = Place(workdir, visible_gpus(), programs, config.memory_fraction, lock)
        legs = [Leg(name, seed, workdir) for name, seed in config.named]
        with contextlib.ExitStack() as ending:
            beside = {}
            if config.warm and place.gpus and not legs[0].tokens("code").exists():
                beside["beside"] = ending.enter_context(warmed(legs, of_each[0], place)).step
            children.run(
                paper(workdir, "prepare", of_each[0].flags()),
                variables=children.ON_CPU,
                limit_s=config.deadline_s,
                log=place.log("prepare"),
                lock=lock,
                **beside,
            )
        refuse_other_settings(legs, of_each[0])
        still_s = config.still_s or (STILL_S if place.gpus else math.inf)
        waits = config.overlap_s, config.measure_s, end, still_s
        terms = Terms(of_each[0].tokens_trained, *waits)
        failures = run_legs(legs, of_each[0], place, terms)
        if any(workdir.glob(f"records/*/{TRAINING}")):
            drawn = {"format": ",".join(look.format)}
            drawn |= {} if look.width is None else {"width": look.width}
            command = paper(workdir, "draw", drawn)
            children.run(command, variables=children.ON_CPU, lock=lock)
    if failures:
        raise SystemExit(1)


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:], goes_on=True))
