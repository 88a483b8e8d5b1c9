"""What the devices of a compiled program send each other."""

import collections
import math
import re
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np

from deltaproduct_jax.compilers.hlo_traffic import COMPUTATION, array_bytes

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
    rf" = (?P<shapes>\S.*?) (?P<kind>{'|'.join((*COLLECTIVES, 'send', 'recv'))})"
    r"(?P<start>-start)?\("
)
# On a TPU one collective can go on behind several fusions, in each of which it stands.
_CHAIN = re.compile(r'chain_id="(?P<number>\d+)"')
_LISTED = re.compile(r"(?:replica_groups|source_target_pairs)=\{(?P<groups>\{[\d,{}]*\})\}")
# Groups as the rows of a range of devices that is reshaped, transposed and cut.
_RANGE = r"\[(?P<shape>[\d,]+)\](?:T\((?P<order>[\d,]+)\))?"
_COUNTED = re.compile(rf"replica_groups=\[(?P<cut>[\d,]+)\]<={_RANGE}")
# Groups along axes, or parts of axes, of a mesh of the compiler's own.
_NAMED = re.compile(
    rf"replica_groups=mesh\[(?P<mesh>[^\]]*)\](?:, device_ids=\({_RANGE}\))? "
    r"\{(?P<along>[^}]*)\}"
)
_AXIS = re.compile(r"'(?P<name>\w+)'(?:=(?P<size>\d+))?(?::\((?P<before>\d+)\)(?P<part>\d+))?")


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


def collectives_in_a_run(
    text: str, mesh: Mapping[str, int], passes: Mapping[str, int]
) -> collections.Counter[Sent]:
    """How often each array is sent in one run of a program, loops counted.

    Args:
      text: as for `collectives`.
      mesh: as for `collectives_by_axis`.
      passes: how often each computation runs, as `hlo_cost.passes` gives them.
    """
    found: collections.Counter[Sent] = collections.Counter()
    times = 0
    chains: set[str] = set()
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            times = passes.get(head["name"], 0)
        for sent in _sent_by(line, mesh, chains) if times else ():
            found[sent] += times
    return found


def collectives_by_axis(text: str, mesh: Mapping[str, int]) -> list[Sent]:
    """The same with the axes of the mesh, whose sizes by name are ``mesh``, the first slowest."""
    return sorted(_all_sent(text, mesh))


def _all_sent(text: str, mesh: Mapping[str, int]) -> list[Sent]:
    chains: set[str] = set()
    return [sent for line in text.splitlines() for sent in _sent_by(line, mesh, chains)]


def _sent_by(line: str, mesh: Mapping[str, int], chains: set[str]) -> list[Sent]:
    """What a line of a program sends, if it sends anything; ``chains`` are those seen before."""
    match = _SENT.search(line)
    if match is None:
        return []
    if chain := _CHAIN.search(line):
        if chain["number"] in chains:
            return []
        chains.add(chain["number"])
    sizes, kind = array_bytes(match["shapes"]), match["kind"]
    axes = _axes(line, mesh) if mesh else ()
    if "all-to-all" in kind:  # what goes to each device may be an array of its own
        return [Sent(kind, sum(sizes) // (2 if match["start"] else 1), axes)]
    # The compiler joins sums; a permute started ahead names its operand, result and handles.
    return [Sent(kind, size, axes) for size in (sizes if "reduce" in kind else [max(sizes)])]


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
        return _range(counted).reshape(_numbers(counted["cut"])).tolist()
    if named := _NAMED.search(line):
        return _groups_along(named)
    if "replica_groups=" in line and "replica_groups={}" not in line:
        raise ValueError(f"groups of devices are not understood: {line.strip()[:300]}")
    return []


def _groups_along(named: re.Match) -> list[list[int]]:
    """Groups that differ along the named axes alone."""
    sizes = {axis["name"]: int(axis["size"]) for axis in _AXIS.finditer(named["mesh"])}
    devices = _range(named) if named["shape"] else np.arange(math.prod(sizes.values()))
    rest = np.indices(tuple(sizes.values())).reshape(len(sizes), -1)
    for axis in _AXIS.finditer(named["along"]):
        place, size = list(sizes).index(axis["name"]), sizes[axis["name"]]
        part = int(axis["part"] or size)
        behind = size // (int(axis["before"] or 1) * part)
        rest[place] -= rest[place] // behind % part * behind
    groups: dict[tuple[int, ...], list[int]] = {}
    for device, where in zip(devices.ravel().tolist(), rest.T.tolist(), strict=True):
        groups.setdefault(tuple(where), []).append(device)
    return list(groups.values())


def _range(match: re.Match) -> np.ndarray:
    """Numbers of devices, reshaped and transposed."""
    shape = _numbers(match["shape"])
    order = _numbers(match["order"]) if match["order"] else range(len(shape))
    return np.arange(math.prod(shape)).reshape(shape).transpose(order)


def _numbers(text: str) -> list[int]:
    return [int(number) for number in text.split(",")]
