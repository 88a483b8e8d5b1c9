"""Grids of programs as CUDA takes them: every launch of ours goes through `fitted`.

A grid may be long along its first axis only. One that is too long along another is launched with
all programs along the first, in the order in which they would have run, and the kernel finds its
place by division (`program_ids` in triton/ids.py and gluon/parts.py). Other kernels are compiled as
if there were no such thing.
"""

import math
from collections.abc import Collection

MOST = (2**31 - 1, 65535, 65535)
# What a kernel is told whose programs have as many ids as its grid has axes.
AS_IT_IS = {"GX": 0, "GY": 0}


def fitted(
    name: str, grid: tuple[int, ...], arguments: Collection[str]
) -> tuple[tuple[int, ...], dict[str, int]]:
    """The grid to launch, and GX and GY for the kernel: lengths of two axes, or 0 and 0.

    Args:
      name: of the kernel.
      grid: of programs, of up to three axes.
      arguments: names that the kernel has.

    Raises:
      ValueError: there are more programs than a launch can have, or a kernel without GX and GY
        would not find its place in a line.
    """
    if all(size <= most for size, most in zip(grid, MOST, strict=False)):
        return grid, AS_IT_IS
    programs = math.prod(grid)
    if programs > MOST[0]:
        raise ValueError(
            f"kernel {name} would have {programs:,} programs; a GPU takes at most {MOST[0]:,} at "
            "once, so that fewer sequences or tokens must go into one call"
        )
    if len(grid) > 1 and "GX" not in arguments:
        raise ValueError(f"kernel {name} takes no grid of {grid}, since it has no GX and GY")
    return (programs,), {"GX": grid[0], "GY": (*grid, 1)[1]}
