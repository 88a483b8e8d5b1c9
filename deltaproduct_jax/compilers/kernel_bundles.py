"""Bundles that a Pallas kernel for TPU issues, counted in the final code that the compiler writes.

A core issues one bundle a cycle and stalls now and then, so their number is a little below the
cycles of the compiler's profiler, by the same share for every kernel seen. Unlike the profiler it
also reads kernels whose copies the profiler does not know. Both sides of a branch count.
"""

import dataclasses
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
    # The latest loop of every depth: the end of a loop may stand behind a bundle that follows it.
    loops = [_Loop(is_of_grid=False, bound=1)]
    depth = 0
    for line in text.splitlines():
        if not (match := _BUNDLE.match(line)):
            continue
        if " {}" not in line:  # an empty bundle shows no depth
            depth = len(match["depth"])
        if match["label"] == "LB":
            del loops[depth:]
            loops.append(_Loop(_OF_GRID in line))
            loops[-2].inner.append(loops[-1])
        if depth >= len(loops):
            raise ValueError(f"a loop without a beginning: {line[:80]}")
        loops[depth].bundles += 1
        if depth and (test := _EXIT.search(line)):
            loops[depth].bound = int(test["bound"])
    return loops[0].total()


@dataclasses.dataclass
class _Loop:
    """A loop: its own bundles, the loops in it, and the number that ends it."""

    is_of_grid: bool
    bound: int | None = None
    bundles: int = 0
    inner: list["_Loop"] = dataclasses.field(default_factory=list)

    def total(self) -> int:
        """Bundles of all passes."""
        if self.bound is None:
            raise ValueError("the trip count of a loop of a kernel is not to be seen")
        passes = self.bound - _EXTRA_PASSES * self.is_of_grid
        return passes * (self.bundles + sum(loop.total() for loop in self.inner))
