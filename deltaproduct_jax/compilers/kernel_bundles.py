"""Bundles that a Pallas kernel for TPU issues, counted in the final code that the compiler writes.

A core issues one bundle a cycle and stalls now and then, so their number is a little below the
cycles of the compiler's profiler, by the same share for every kernel seen. Unlike the profiler it
also reads kernels whose copies the profiler does not know. Both sides of a branch count.
"""

import re
from pathlib import Path

# What a child that compiles needs so that the compiler writes that code.
DUMP = "--xla_jf_dump_to={} --xla_jf_dump_llo_text=true --xla_jf_dump_llo_pass_label_regex=bundles"
_FILE = "-final_bundles.txt"
_BUNDLE = re.compile(r"\s*(?:0x[0-9a-f]+|0)\s+(?P<label>[A-Z]{2})?\s*:\s(?P<depth>>*)")
_EXIT = re.compile(r"scmp\.ge\.s32\.totalorder[^;]*?, (?P<bound>\d+) /\* loop exit test \*/")
# The loop of a grid passes twice more: the first pass only copies in, the last only waits.
_OF_GRID = "iteration index, stage"
_EXTRA_PASSES = 2


def kernel_bundles(folder: Path, label: str) -> int:
    """Bundles of one call of a kernel, each times the passes of the loops around it.

    Args:
      folder: what `DUMP` named.
      label: of the custom call in the compiled program.

    Raises:
      ValueError: the folder has no code of that label, or a loop whose end is not a constant.
    """
    found = [
        path
        for path in folder.glob(f"*{_FILE}")
        if re.fullmatch(rf"\d+-{re.escape(label)}-\d+{_FILE}", path.name)
    ]
    if not found:
        raise ValueError(f"the compiler wrote no code of {label}")
    return bundles(max(found, key=lambda path: path.stat().st_mtime).read_text())


def bundles(text: str) -> int:
    """Of one call of the code that ``text`` shows; raises as `kernel_bundles`."""
    loops: list[_Loop] = []
    total = 0
    for line in text.splitlines():
        if not (match := _BUNDLE.match(line)):
            continue
        # An empty bundle shows no depth.
        depth = len(loops) if " {}" in line else len(match["depth"])
        while len(loops) > depth:
            total += _close(loops)
        if match["label"] == "LB":
            if len(loops) == depth:  # one loop right after another
                total += _close(loops)
            loops.append(_Loop(_OF_GRID in line))
        if len(loops) != depth:
            raise ValueError(f"a loop without a beginning: {line[:80]}")
        if loops:
            loops[-1].bundles += 1
            if test := _EXIT.search(line):
                loops[-1].bound = int(test["bound"])
        else:
            total += 1
    while loops:
        total += _close(loops)
    return total


class _Loop:
    """A loop that is being read."""

    def __init__(self, is_of_grid: bool) -> None:
        self.is_of_grid = is_of_grid
        self.bundles = 0
        self.bound: int | None = None


def _close(loops: list[_Loop]) -> int:
    """Takes the innermost loop off; its bundles go to the loop around it, or are returned."""
    loop = loops.pop()
    if loop.bound is None:
        raise ValueError("the trip count of a loop of a kernel is not to be seen")
    passes = loop.bound - _EXTRA_PASSES * loop.is_of_grid
    if not loops:
        return passes * loop.bundles
    loops[-1].bundles += passes * loop.bundles
    return 0
