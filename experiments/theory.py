"""How long do the paper's constructions hold, as weights of the real model in real floats?

    python -m experiments.theory --workdir=runs/theory

runs each construction of ``deltaproduct_jax.theory`` over random words, in pieces that pass the
state on, until ``--length`` tokens are read, the time is up, or half of a piece's answers are
wrong. ``results.json`` is a list with an entry a construction, dtype and implementation:

- ``length``: tokens up to which not one answer of any word was wrong, BOS's not counted;
- ``errors``: wrong answers of all ``words`` over ``length_read`` tokens;
- ``min_margin``: smallest difference between the right logit and the largest other, over the
  largest in size, while all answers were right;
- ``deviation``: largest distance of the direction of the logits from that in exact arithmetic;
- ``curve``: deviation and errors so far, over length;
- ``made_by``: the command and the machine.

``theory.md`` is the table and ``theory.png`` draws the curves. What ``results.json`` of the
directory holds already, of the same device, length, words, piece and seed, is not run again. With
``--rows_from`` nothing is run: the rows of other directories are put together with this one's, and
of rows that differ in nothing but in how far they read, the one that read furthest is kept.

Source: https://arxiv.org/abs/2502.10297, theorems 1 and 4 and appendix; Z_m in two layers:
    https://arxiv.org/abs/2411.12537, theorem 6.
Expect: not one error in 1M tokens in float32; experiments/results/theory/theory.md has all.
Takes: minutes with ``--preset=quick``; all of it 1.5 to 8 minutes per row on an H100.
"""

import dataclasses
import itertools
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import jax

from deltaproduct_jax.files import given_by, user_path, write_file
from deltaproduct_jax.models.config import DTYPES
from deltaproduct_jax.ops.selection import AVAILABLE
from deltaproduct_jax.settings import check_fields, seed_setting, setting
from deltaproduct_jax.theory import CATALOGUE, construct
from experiments.lib import flags
from experiments.lib.bench.report import command_line, listed, markdown, report_of, write_json
from experiments.lib.bench.timing import machine
from experiments.lib.figures.style import SECTION, Look
from experiments.lib.figures.theory import draw_deviations
from experiments.lib.folders import refuse_other
from experiments.lib.theory import reading

PRESETS = {
    "default": {},
    "quick": {"constructions": ("permutations_S3", "plane_Z5"), "length": 2000, "words": 2},
}


@dataclasses.dataclass(frozen=True)
class TheoryConfig:
    """What is run; raises ConfigError where the fields make no sense."""

    constructions: tuple[str, ...] = setting(
        tuple(CATALOGUE), f"some of {', '.join(CATALOGUE)}", filled=True, one_of=CATALOGUE
    )
    dtypes: tuple[str, ...] = setting(
        DTYPES, f"some of {', '.join(DTYPES)}", filled=True, one_of=DTYPES
    )
    implementations: tuple[str, ...] = setting(
        ("chunked",), f"some of {', '.join(AVAILABLE)}", filled=True, one_of=AVAILABLE
    )
    length: int = setting(1_000_000, "tokens of a word after BOS", least=1)
    words: int = setting(8, "words read side by side", least=1)
    piece: int = setting(1000, "tokens read at once; the state is passed on", least=1)
    budget_s: float = setting(
        300.0, "seconds after which no further piece of a run begins", above=0
    )
    seed: int = seed_setting("draws the words")
    rows_from: tuple[str, ...] = setting(
        (), "results.json files whose rows are put beside those of this directory; nothing is run"
    )

    def __post_init__(self) -> None:
        """Checks every field."""
        check_fields(self)

    @property
    def as_reading(self) -> reading.Reading:
        """How each construction is run."""
        names = [field.name for field in dataclasses.fields(reading.Reading)]
        return reading.Reading(**{name: getattr(self, name) for name in names})


def page(rows: Sequence[dict[str, Any]]) -> list[str]:
    """The rows as Markdown, and below them the commands that made them."""
    names = (
        "construction", "group", "letters", "num_layers", "num_householder", "dtype",
        "implementation", "length", "length_read", "errors", "min_margin", "deviation", "device",
    )  # fmt: skip
    made_by = list(dict.fromkeys(row["made_by"] for row in rows))
    lines = []
    for row in rows:
        margin = "-" if row["min_margin"] is None else f"{row['min_margin']:.4f}"
        shown = {**row, "min_margin": margin, "deviation": f"{row['deviation']:.1e}"}
        cells = [f"{shown[n]:,}" if isinstance(shown[n], int) else shown[n] for n in names]
        lines.append([*cells, made_by.index(row["made_by"]) + 1])
    items = "\n".join(listed(f"{n}. {made}") for n, made in enumerate(made_by, 1))
    return [markdown([*names, "made by"], lines), items]


def command(argv: Sequence[str]) -> None:
    """Runs, prints the table, writes results.json and theory.md, draws theory."""
    parsed = flags.parse(argv, {"theory": TheoryConfig, **SECTION}, PRESETS)
    config = TheoryConfig(**parsed.sections["theory"])
    look = Look(**parsed.sections["figures"])
    refuse_other(parsed.workdir, "constructions")
    path = parsed.workdir / "results.json"
    own = reading.rows_of(path) if path.exists() else []
    for given in config.rows_from:
        other = user_path(given, "rows_from")
        with given_by("rows_from", other):
            own += reading.rows_of(other)
    done = reading.put_together(own)
    if not config.rows_from:
        done = run_missing(config, done, path, argv)
    order = {name: index for index, name in enumerate(CATALOGUE)}
    rows = sorted(done.values(), key=lambda row: order[row["construction"]])
    write_json(path, rows)
    text = report_of(rows, page)
    write_file(parsed.workdir / "theory.md", f"{text}\n".encode())
    draw_deviations(rows, parsed.workdir / "theory", look)
    print(text)


def run_missing(
    config: TheoryConfig,
    done: dict[tuple[str, ...], dict[str, Any]],
    path: Path,
    argv: Sequence[str],
) -> dict[tuple[str, ...], dict[str, Any]]:
    """Runs what ``config`` wants and ``done`` has not, writing every row at once."""
    same = {name: getattr(config, name) for name in ("words", "piece", "seed")}
    same["length_wanted"] = config.length
    said = [word for word in argv if not word.startswith("--workdir")]
    made_by = f"`{command_line('theory', said)}` on {machine()}"
    wanted = itertools.product(config.constructions, config.dtypes, config.implementations)
    for name, dtype, implementation in wanted:
        case, made = (name, dtype, implementation, reading.device()), construct(name)
        same["units"] = made.config.mlp_width  # so that rows of other tables are made anew
        if case in done and same.items() <= done[case].items():
            continue
        row = reading.run(made, dtype, implementation, config.as_reading)
        done[case] = {**row, "made_by": made_by}
        print(json.dumps(done[case]), file=sys.stderr, flush=True)
        write_json(path, list(done.values()))
        jax.clear_caches()
    return done


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
