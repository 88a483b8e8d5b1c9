"""What the devices of a compiled program send each other."""

import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from deltaproduct_jax.compilers.hlo_traffic import array_bytes

COLLECTIVES = (
    "all-gather",
    "all-reduce",
    "all-to-all",
    "collective-broadcast",
    "collective-permute",
    "ragged-all-to-all",
    "reduce-scatter",
)
_SENT = re.compile(
    rf" = (?P<shapes>\S.*?) (?P<kind>{'|'.join((*COLLECTIVES, 'send', 'recv'))})(?:-start)?\("
)
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(?P<groups>\{[\d,{}]*\})\}")
# Groups as the rows of a range of devices that is reshaped, transposed and cut.
_COUNTED = re.compile(
    r"replica_groups=\[(?P<cut>[\d,]+)\]<=\[(?P<shape>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?"
)


class Sent(NamedTuple):
    """An array that devices send each other.

    Attributes:
      kind: one of `COLLECTIVES`, "send" or "recv".
      size: bytes of the array on one device, the larger of what goes in and comes out.
      axes: of the mesh, those along which the devices that take part differ; all where a program
        does not say who they are, which then are all.
    """

    kind: str
    size: int
    axes: tuple[str, ...]


def collectives(text: str) -> list[tuple[str, int]]:
    """Kind and bytes of every array that a compiled program sends, sorted.

    Args:
      text: what ``compiled.as_text()`` of JAX gives. Loops are not unrolled: what stands in one
        counts once.
    """
    return sorted((sent.kind, sent.size) for sent in _all_sent(text, {}))


def collectives_by_axis(text: str, mesh: Mapping[str, int]) -> list[Sent]:
    """The same with the axes of the mesh, whose sizes by name are ``mesh``, the first slowest."""
    return sorted(_all_sent(text, mesh))


def _all_sent(text: str, mesh: Mapping[str, int]) -> list[Sent]:
    found = []
    for line in text.splitlines():
        match = _SENT.search(line)
        if match is None:
            continue
        sizes, kind = array_bytes(match["shapes"]), match["kind"]
        axes = _axes(line, mesh) if mesh else ()
        # The compiler joins sums; a permute started ahead names its operand, result and handles.
        found += [Sent(kind, size, axes) for size in (sizes if "reduce" in kind else [max(sizes)])]
    return found


def _axes(line: str, mesh: Mapping[str, int]) -> tuple[str, ...]:
    differing = set()
    for group in _groups(line) or [range(math.prod(mesh.values()))]:
        places = np.unravel_index(group, tuple(mesh.values()))
        differing |= {
            name for name, along in zip(mesh, places, strict=True) if len(set(along.tolist())) > 1
        }
    return tuple(name for name in mesh if name in differing)


def _groups(line: str) -> Sequence[Sequence[int]]:
    """Numbers of the devices of each group; of each pair, for a permute."""
    if listed := _LISTED.search(line):
        return [_numbers(group) for group in re.findall(r"\{([\d,]+)\}", listed["groups"])]
    if counted := _COUNTED.search(line):
        shape = _numbers(counted["shape"])
        order = _numbers(counted["order"]) if counted["order"] else range(len(shape))
        devices = np.arange(np.prod(shape)).reshape(shape).transpose(order)
        return devices.reshape(_numbers(counted["cut"])).tolist()
    return []


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
