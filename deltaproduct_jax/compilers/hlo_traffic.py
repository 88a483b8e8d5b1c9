"""Bytes that an operation of a compiled TPU program reads from HBM and writes to it.

Counted once for every operand and result that lies there: what the compiler put into vector memory
has another memory space in its layout. A slice, or an update in place, counts by its own size, also
inside a fusion. Padding that a layout adds is not counted. A Pallas kernel counts by the blocks
that it moves, where these are known (`kernel_traffic`); any other custom call is taken to read and
to write each of its arrays once.
"""

import math
import re
import types
from collections.abc import Mapping, Sequence
from typing import Any

# The first line of a computation, in the text of a compiled program.
COMPUTATION = re.compile(r"^(?P<entry>ENTRY )?%?(?P<name>[^\s=]+) \(.*\{$")
# Element types and their bits.
BITS = {"pred": 8, "bf16": 16, "f16": 16, "f32": 32, "f64": 64, "c64": 64}
_ARRAY = re.compile(r"(?P<dtype>[a-z]+\d*\w*)\[(?P<shape>[\d,]*)\](?:\{(?P<layout>[^}]*)\})?")
_NOTHING = {
    "after-all",
    "bitcast",
    "call",
    "constant",
    "get-tuple-element",
    "parameter",
    "tuple",
    "while",
}
_BUFFERS = ("AllocateBuffer", "ConcatBitcast")


def hbm_bytes(
    computations: dict[str, dict[str, Any]],
    computation: dict[str, Any],
    line,
    kernels: Mapping[str, Sequence[int]] = types.MappingProxyType({}),
) -> int:
    """Bytes of one pass of an operation.

    Args:
      computations: of the program, by name; lines as `hlo_cost` reads them.
      computation: the one around the operation.
      line: the operation.
      kernels: what a Pallas kernel of a name moves of each operand and result.
    """
    if line.opcode in _NOTHING or line.opcode.endswith("-done"):
        return 0
    if line.attribute("custom_call_target") in _BUFFERS:
        return 0
    operands = [computation[name] for name in line.operands if name in computation]
    if line.opcode == "custom-call" and (moved := kernels.get(_kernel_name(line))):
        types_of_arrays = [*(x.type for x in operands), *(x[0] for x in _ARRAY.finditer(line.type))]
        pairs = zip(types_of_arrays, moved, strict=True)
        return sum(n for text, n in pairs if _size(text))
    if line.opcode.endswith("-start"):
        # Of (destination, source, context), or ((source), a part of it elsewhere, context).
        arrays = list(_ARRAY.finditer(line.type))
        destination = arrays[len(operands) if line.type.startswith("((") else 0]
        sides = int(_is_in_hbm(destination)) + sum(_size(x.type) > 0 for x in operands)
        return sides * _bytes(destination)
    if line.opcode == "dynamic-slice":
        return _size(line.type) + _moved(line.type) * (_size(operands[0].type) > 0)
    if line.opcode == "dynamic-update-slice":
        return _update(operands)
    if line.opcode == "fusion":
        return _of_fusion(computations[line.attribute("calls")])
    return _size(line.type) + sum(_size(x.type) for x in operands)


def array_bytes(text: str) -> list[int]:
    """Bytes of each array of a type, or of a tuple of types, wherever it lies."""
    return [_bytes(array) for array in _ARRAY.finditer(text)]


def _kernel_name(line) -> str:
    """Of a Pallas kernel, whose operation is named "a/path/NAME/pallas_call"."""
    *_, name, last = ("", "", *(line.attribute("op_name") or "").split("/"))
    return name if last == "pallas_call" else ""


def _of_fusion(fused: dict[str, Any]) -> int:
    root = next(line for line in fused.values() if line.is_root)
    results = [fused[n] for n in root.operands] if root.opcode == "tuple" else [root]
    total, in_place = 0, set()
    for result in map(lambda line: _behind_bitcasts(fused, line), results):
        if result.opcode == "dynamic-update-slice":
            total += _moved(fused[result.operands[1]].type) * (_size(result.type) > 0)
            in_place.add(id(_behind_bitcasts(fused, fused[result.operands[0]])))
        else:
            total += _size(result.type)
    for name, line in fused.items():
        if line.opcode != "parameter" or id(line) in in_place or not _size(line.type):
            continue
        users = [x for x in fused.values() if name in x.operands]
        if users and all(x.opcode == "dynamic-slice" and x.operands[0] == name for x in users):
            total += sum(_moved(x.type) for x in users)
        else:
            total += _size(line.type)
    return total


def _behind_bitcasts(fused: dict[str, Any], line):
    while line.opcode == "bitcast" and line.operands[0] in fused:
        line = fused[line.operands[0]]
    return line


def _update(operands) -> int:
    """Written in place, and read where the update itself lies in HBM."""
    moved = _moved(operands[1].type)
    return moved * ((_size(operands[0].type) > 0) + (_size(operands[1].type) > 0))


def _is_in_hbm(array: re.Match) -> bool:
    return "S(" not in (array["layout"] or "")


def _bytes(array: re.Match) -> int:
    digits = re.search(r"\d+", array["dtype"])
    bits = BITS.get(array["dtype"]) or int(digits[0] if digits else 0)
    return math.prod(int(n) for n in array["shape"].split(",") if n) * bits // 8


def _size(text: str) -> int:
    """Bytes of the arrays of a type that lie in HBM."""
    return sum(_bytes(x) for x in _ARRAY.finditer(text) if _is_in_hbm(x))


def _moved(text: str) -> int:
    """Bytes of the arrays of a type, wherever they lie."""
    return sum(array_bytes(text))
