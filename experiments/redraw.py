"""Every figure and table of a folder anew, from the records that it keeps.

    python -m experiments.redraw --workdir=experiments/results
    python -m experiments.redraw --workdir=experiments/results/op/cpu --format=pdf --width=column

looks through the folder and those below it for records that a figure or a table is made of, as
NAME.json, and writes NAME.png or NAME.md beside it: of runs, and of every measurement that names
its script. Nothing is trained or measured.

Source: this project; a figure's own command says where its idea is from.
Expect: for the folder of results the very files that are there.
Takes: half a minute for all results.
"""

import sys
from collections.abc import Sequence

from deltaproduct_jax.errors import ConfigError, RunDirectoryError
from experiments.lib import flags
from experiments.lib.figures.records import drawn
from experiments.lib.figures.style import SECTION, Look


def command(argv: Sequence[str]) -> None:
    """Draws what the flags say, and prints the files written."""
    parsed = flags.parse(argv, SECTION, {"default": {}})
    look, found, damaged = Look(**parsed.sections["figures"]), 0, []
    for path in drawn(parsed.workdir, look, damaged.append):
        print(f"written: {path}")
        found += 1
    for why in damaged[:-1]:
        print(f"error: {why}", file=sys.stderr)
    if damaged:
        raise RunDirectoryError(damaged[-1])
    if not found:
        raise ConfigError(f"workdir={str(parsed.workdir)!r} holds no record that can be drawn")


if __name__ == "__main__":
    sys.exit(flags.run(command, sys.argv[1:]))
