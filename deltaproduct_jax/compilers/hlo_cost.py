"""Reads what a TPU compiler says about a program from the text of the program that it made.

Two figures stand beside the operations of compiled HLO, in cycles of the core, for one pass:

* ``bundle_analysis_data.estimated_cycles``, where the compiler was started with
  ``--xla_jf_dump_static_llo_profile_to``: its static profile of the final schedule. It knows the
  units of the core and their latencies, not the bandwidth of the memory.
* ``window_config.estimated_cycles``: the cost model by which it chose the tiles. It counts traffic
  with the memory and an overhead an operation; custom calls have none.

Each is summed over the program, times the trip counts of the loops around it. Nothing here needs
JAX. The sum is serial: copies that overlap with work are not taken off.
"""

import dataclasses
import json
import re
import types
from collections.abc import Mapping, Sequence

from deltaproduct_jax.compilers.collectives import COLLECTIVES
from deltaproduct_jax.compilers.hlo_traffic import COMPUTATION, hbm_bytes
from deltaproduct_jax.ops.kernels.containment import SCOPE

_INSTRUCTION = re.compile(
    r"^\s+(?P<root>ROOT )?%?(?P<name>\S+) = (?P<type>.*?) (?P<opcode>[a-z][\w-]*)"
    r"\((?P<operands>[^)]*)\)(?P<rest>.*)$"
)
# Computations that an operation runs once: a fusion's, a call's, a branch's.
_CALLED = re.compile(
    r"\b(?:calls|called_computations|branch_computations|true_computation|false_computation)="
    r"(\{[^}]*\}|%?[^\s,]+)"
)
_TRIPS = re.compile(r'"known_trip_count":\{"n":"(\d+)"')
# Target of a Pallas kernel for TPU.
KERNEL = "tpu_custom_call"
_PASSED_ON = ("bitcast", "convert", "copy", "copy-done", "copy-start", "reshape")


@dataclasses.dataclass(frozen=True)
class Instruction:
    """One line of a computation."""

    opcode: str
    operands: list[str]
    rest: str
    is_root: bool
    type: str

    def attribute(self, name: str) -> str | None:
        """The value of ``name=%value`` or ``name="value"``."""
        match = re.search(rf'\b{name}=[%"]?([^\s,"}}]+)', self.rest)
        return match and match[1]

    def cycles(self, source: str) -> int | None:
        """What ``source`` of the compiler says of this operation; None where it says nothing."""
        _, found, config = self.rest.partition("backend_config={")
        if not found:
            return None
        config, _ = json.JSONDecoder().raw_decode("{" + config)
        cycles = config.get(source, {}).get("estimated_cycles")
        return None if cycles is None else int(cycles)


@dataclasses.dataclass
class Cost:
    """Sums over a program.

    Cycles (``schedule_cycles`` is None where no profile was asked for), bytes read from HBM and
    written to it (`hlo_traffic`), how often each target of a custom call is called, each Pallas
    kernel by its label and each kind of collective runs, and the trip count of every loop. Those
    that run kernels again, on rows that are not finite, count as loops without a turn, whose
    condition is asked once.
    """

    schedule_cycles: int | None = None
    model_cycles: int = 0
    hbm_bytes: int = 0
    custom_calls: dict[str, int] = dataclasses.field(default_factory=dict)
    kernels: dict[str, int] = dataclasses.field(default_factory=dict)
    collectives: dict[str, int] = dataclasses.field(default_factory=dict)
    loops: dict[str, int] = dataclasses.field(default_factory=dict)


Computation = dict[str, Instruction]


def cost(text: str, kernels: Mapping[str, Sequence[int]] = types.MappingProxyType({})) -> Cost:
    """Walks a compiled program.

    Args:
      text: what ``compiled.as_text()`` of JAX gives.
      kernels: bytes that Pallas kernels move, as `kernel_traffic.kernel_bytes` gives them.

    Raises:
      ValueError: a loop whose trip count the text does not show.
    """
    computations, entry = _parse(text)
    total = Cost()

    def walk(name: str, times: int) -> None:
        for label, line in computations[name].items():
            schedule, model = map(line.cycles, ("bundle_analysis_data", "window_config"))
            if schedule is not None:
                total.schedule_cycles = (total.schedule_cycles or 0) + times * schedule
            total.model_cycles += times * (model or 0)
            total.hbm_bytes += times * hbm_bytes(computations, computations[name], line, kernels)
            kind = line.opcode.removesuffix("-start")
            if kind in COLLECTIVES:
                total.collectives[kind] = total.collectives.get(kind, 0) + times
            elif kind == "custom-call":
                target = line.attribute("custom_call_target")
                total.custom_calls[target] = total.custom_calls.get(target, 0) + times
                if target == KERNEL:
                    total.kernels[label] = total.kernels.get(label, 0) + times
            elif kind == "while":
                total.loops[label], asked = _turns(computations, computations[name], line)
                walk(line.attribute("body"), times * total.loops[label])
                walk(line.attribute("condition"), times * asked)
            elif kind in ("call", "async"):
                walk(line.attribute("to_apply") or line.attribute("calls"), times)
            elif kind == "conditional":
                raise ValueError(f"{label} is a conditional, whose branches are not costed")

    walk(entry, 1)
    return total


def passes(text: str) -> dict[str, int]:
    """How often each computation of a compiled program runs in one run of the program.

    Loops are counted by their passes, as in `cost`, and both sides of a branch as if it were taken.

    Raises:
      ValueError: a loop whose trip count the text does not show.
    """
    computations, entry = _parse(text)
    total: dict[str, int] = {}

    def walk(name: str, times: int) -> None:
        total[name] = total.get(name, 0) + times
        for line in computations[name].values():
            if line.opcode == "while":
                trips, asked = _turns(computations, computations[name], line)
                walk(line.attribute("body"), times * trips)
                walk(line.attribute("condition"), times * asked)
            else:
                if line.opcode == "call" and line.attribute("to_apply"):
                    walk(line.attribute("to_apply"), times)
                for inner in _CALLED.findall(line.rest):
                    for called in re.findall(r"[^\s,%{}]+", inner):
                        walk(called, times)

    walk(entry, 1)
    return total


def _parse(text: str) -> tuple[dict[str, Computation], str]:
    computations: dict[str, Computation] = {}
    entry = current = None
    for line in text.splitlines():
        if head := COMPUTATION.match(line):
            current = computations.setdefault(head["name"], {})
            entry = head["name"] if head["entry"] else entry
        elif current is not None and (match := _INSTRUCTION.match(line)):
            listed = re.sub(r"/\*.*?\*/", "", match["operands"])
            operands = [part.strip().lstrip("%") for part in listed.split(",")]
            current[match["name"]] = Instruction(
                match["opcode"], operands, match["rest"], match["root"] is not None, match["type"]
            )
    if entry is None:
        raise ValueError("this text holds no compiled program: it has no ENTRY computation")
    return computations, entry


@dataclasses.dataclass(frozen=True)
class Entry:
    """An entry of what a loop carries, or a parameter of a fusion."""

    index: int


def _turns(
    computations: dict[str, Computation], around: Computation, loop: Instruction
) -> tuple[int, int]:
    """Passes of a loop, and how often its condition counts: once where it has none."""
    if SCOPE in (loop.attribute("op_name") or ""):
        return 0, 1
    trips = _trips(computations, around, loop)
    return trips, trips


def _trips(computations: dict[str, Computation], around: Computation, loop: Instruction) -> int:
    """Passes of a loop that counts up: from its start, by steps, to what it is compared with.

    That bound may be a constant of the condition or an entry of what the loop carries. Compilers
    for CPUs and GPUs say how many passes they found.
    """
    if known := _TRIPS.search(loop.rest):
        return int(known[1])
    condition = computations[loop.attribute("condition")]
    body = computations[loop.attribute("body")]
    start = around[loop.operands[0]]
    compare, operands = _operation(computations, condition, _root(condition))
    passes = None
    if compare.attribute("direction") == "LT" and start.opcode == "tuple":
        first, bound = (
            _value(around, start.operands[value.index]) if isinstance(value, Entry) else value
            for value in operands
        )
        step = _step(computations, body, operands[0])
        if all(isinstance(n, int) for n in (first, bound, step)):
            passes = max(0, -(-(bound - first) // step))
    if passes is None:
        raise ValueError(f"the trip count of a loop is not to be seen: {loop}")
    return passes


def _step(
    computations: dict[str, Computation], body: Computation, counter: int | Entry | None
) -> int | None:
    """By how much a pass moves the counter; None where that is not a constant."""
    if not isinstance(counter, Entry):
        return None
    add, operands = _operation(computations, body, body[_root(body).operands[counter.index]])
    steps = [value for value in operands if isinstance(value, int)]
    return steps[0] if add.opcode == "add" and counter in operands and steps else None


def _operation(
    computations: dict[str, Computation], computation: Computation, line: Instruction
) -> tuple[Instruction, list[int | Entry | None]]:
    """A line, or the last operation of the fusion that it is, and what its operands stand for."""
    if line.opcode != "fusion":
        return line, [_value(computation, name) for name in line.operands]
    fused = computations[line.attribute("calls")]
    values = [_value(fused, name) for name in _root(fused).operands]
    outside = [
        _value(computation, line.operands[value.index]) if isinstance(value, Entry) else value
        for value in values
    ]
    return _root(fused), outside


def _root(computation: Computation) -> Instruction:
    return next(line for line in computation.values() if line.is_root)


def _value(computation: Computation, name: str) -> int | Entry | None:
    """What a name stands for, seen through copies: a constant, an entry, or neither."""
    line = computation.get(name)
    while line is not None and line.opcode in _PASSED_ON:
        line = computation.get(line.operands[0])
    if line is None:
        return None
    if line.opcode == "constant":
        return int(line.operands[0]) if re.fullmatch(r"-?\d+", line.operands[0]) else None
    if line.opcode == "get-tuple-element":
        return Entry(int(line.attribute("index")))
    if line.opcode == "parameter":
        return Entry(int(line.operands[0]))
    return None
