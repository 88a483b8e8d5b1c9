"""What integers of a GPU kernel can reach, read from its first intermediate form, without a GPU.

An offset of 32 bits wraps around where an array has 2^31 numbers and more, and then a kernel reads
and writes at wrong places without a word. `overflows` follows what is made of ids of programs, of
ranges and of constants through Triton's first form of a kernel, or Gluon's, as intervals.
"""

import math
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

# Lowest and highest; None: it depends on data.
Interval = tuple[int, int] | None
INT32 = -(2**31), 2**31 - 1
_SAME = (
    "tt.splat", "tt.expand_dims", "tt.broadcast", "tt.reshape", "tt.trans", "tt.unsplat",
    "ttg.convert_layout", "arith.extsi",
)  # fmt: skip


def overflows(text: str, grid: Sequence[int]) -> list[str]:
    """Lines in which a number of 32 bits can leave its range, or an offset is not followed.

    Args:
      text: of a module, `str_nodebug` of it: one function, with all others inlined.
      grid: of programs.
    """
    reader = _Reader(grid)
    [(_, functions)] = [x for x in _tree(text.splitlines()) if x[0].startswith("module")]
    for line, regions in functions[0]:
        if line.startswith("tt.func public"):  # others were inlined, and stand there still
            reader.read(regions[0], {})
    return reader.found


def first_form(source: Any, options: Mapping[str, Any], capability: int) -> str:
    """The text that `overflows` reads, of a source as `triton.compile` takes it."""
    from triton._C.libtriton import ir
    from triton.backends.compiler import GPUTarget
    from triton.compiler.compiler import make_backend

    target = GPUTarget("cuda", capability, 32)
    backend = make_backend(target)
    parsed = backend.parse_options({**options, **source.parse_options()})
    stages: dict[str, Callable[[Any, dict], Any]] = {}
    backend.add_stages(stages, parsed, source.language)
    context = ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    functions, modules = backend.get_codegen_implementation(parsed), backend.get_module_map()
    module = source.make_ir(target, parsed, functions, modules, context)
    return stages[source.ext](module, {}).str_nodebug()


def _tree(lines: Sequence[str]) -> list:
    """Lines, each behind the lines of its regions: (line, [region, ...])."""
    stack: list[list] = [[]]
    for line in map(str.strip, lines):
        if line.startswith("}"):
            region = stack.pop()
            stack[-1][-1][1].append(region)
            if line.endswith("{"):  # as in "} else {"
                stack.append([])
        elif line.endswith("{"):
            stack[-1].append((line, []))
            stack.append([])
        elif line:
            stack[-1].append((line, []))
    return stack[0]


class _Reader:
    """Follows intervals through a function."""

    def __init__(self, grid: Sequence[int]) -> None:
        self.grid = (*grid, 1, 1)[:3]
        self.found: list[str] = []
        self.captured: list[Interval] = []

    def read(self, block: list, known: dict[str, Interval]) -> list[Interval]:
        """What a block yields."""
        yielded: list[Interval] = []
        for line, regions in block:
            names = re.match(r"(%[\w#-]+)(?::(\d+))? = (.*)", line)
            body = names[3] if names else line
            results: list[Interval] = []
            if body.startswith(("scf.yield", "tt.reduce.return", "tt.scan.return")):
                yielded = [known.get(x) for x in re.findall(r"%[\w#-]+", body.split(" : ")[0])]
            elif body.startswith("scf.for"):
                results = self.loop(body, regions[0], known)
            elif body.startswith("scf.if"):
                ways = [self.read(region, dict(known)) for region in regions]
                results = [_join(*pair) for pair in zip(*ways, strict=True)] if names else []
            elif body.startswith("ttg.warp_specialize"):
                inside = body[body.index("(") : body.index(")")]
                self.captured = [known.get(x) for x in re.findall(r"%[\w#-]+", inside)]
            elif re.match(r"partition\d+\(", body):
                arguments = re.findall(r"(%\w+):", body)
                self.read(regions[0], dict(zip(arguments, self.captured, strict=True)))
            elif regions and not body.startswith(('"tt.reduce"', '"tt.scan"')):
                for region in regions:
                    self.read(region, known)
            elif names:
                results = [self.value(body, known, line)]
            if names:
                count = int(names[2] or 1)
                results = (results or [None] * count)[:count]
                known[names[1]] = results[0]
                known |= {f"{names[1]}#{i}": x for i, x in enumerate(results)}
            if body.startswith("tt.addptr"):
                self.check_offset(body, known, line)
        return yielded

    def loop(self, body: str, region: list, known: dict[str, Interval]) -> list[Interval]:
        """What a loop ends with: its first round, drawn out in a line over all rounds."""
        variable, *bounds = re.match(
            r"scf.for (%\w+) = (%\S+) to (%\S+) step (%\S+)", body
        ).groups()
        first, end, step = (known.get(x) for x in bounds)
        carried = re.search(r"iter_args\((.*?)\) ->", body)
        pairs = re.findall(r"(%\w+) = (%[\w#-]+)", carried[1]) if carried else []
        index = first and end and (min(first[0], end[1]), max(first[0], end[1] - 1))
        inside = known | {variable: index} | {name: known.get(x) for name, x in pairs}
        rounds = math.ceil((end[1] - first[0]) / step[0]) if first and end and step else None
        before = len(self.found)
        ends = self.read(region, dict(inside))
        for (name, _), last in zip(pairs, ends, strict=True):
            start = inside[name]
            if start is None or last is None or rounds is None:
                inside[name] = None if last != start else start
                continue
            more = [(b - a) * max(rounds - 1, 0) for a, b in zip(start, last, strict=True)]
            inside[name] = start[0] + min(more[0], 0), start[1] + max(more[1], 0)
        del self.found[before:]
        ends = self.read(region, dict(inside))
        return [_join(x, known.get(start)) for x, (_, start) in zip(ends, pairs, strict=True)]

    def value(self, body: str, known: dict[str, Interval], line: str) -> Interval:
        """What an operation makes."""
        operation = body.split(" ")[0]
        operands = [known.get(x) for x in re.findall(r"%[\w#-]+", body.split(" : ")[0])]
        if operation == "arith.constant":
            number = re.match(r"arith.constant (?:dense<)?(-?\d+|true|false)>? : \S*?i\d+", body)
            number = number or re.match(r"arith.constant (true|false)$", body)
            if number is None:
                return None
            value = int({"true": 1, "false": 0}.get(number[1], number[1]))
            return value, value
        if axis := re.search(r"get_program_id ([xyz])|%ctaid\.([xyz])", body):
            return 0, self.grid["xyz".index(axis[1] or axis[2])] - 1
        if axis := re.search(r"get_num_programs ([xyz])", body):
            return 2 * (self.grid["xyz".index(axis[1])],)
        if ends := re.match(r"tt.make_range {end = (\d+) : i32, start = (\d+) : i32}", body):
            return int(ends[2]), int(ends[1]) - 1
        if operation in _SAME:
            return operands[0]
        if operation == "arith.extui" and " : i1 to " in body:
            return 0, 1
        result = _result(operation, operands)
        has_32_bits = re.search(r"\bi32\b|xi32\b", body.split(" : ")[-1])
        if has_32_bits and result and (result[0] < INT32[0] or result[1] > INT32[1]):
            self.found.append(f"{result[0]} to {result[1]}: {line}")
            return None
        return result

    def check_offset(self, body: str, known: dict[str, Interval], line: str) -> None:
        """Tells of an offset of 32 bits that is made of data, or was found to leave its range."""
        operands, types = body.split(" : ", 1)
        offset = re.findall(r"%[\w#-]+", operands)[1]
        has_32_bits = types.endswith(", i32") or re.search(r"xi32(, #[^>]*(<.*>)?)?>$", types)
        if has_32_bits and known.get(offset) is None:
            self.found.append(f"not followed: {line}")


def _join(one: Interval, other: Interval) -> Interval:
    if one is None or other is None:
        return None
    return min(one[0], other[0]), max(one[1], other[1])


def _result(operation: str, operands: Sequence[Interval]) -> Interval:
    """Of an operation on integers; None of all others."""
    if operation == "arith.select":
        return _join(*operands[-2:])
    if operation in ("arith.minsi", "arith.maxsi"):
        # Of data it is taken that they are what they are meant to be, the bound aside.
        sure = [x for x in operands if x is not None]
        keep = min if operation == "arith.minsi" else max
        return (keep(x[0] for x in sure), keep(x[1] for x in sure)) if sure else None
    if len(operands) != 2 or None in operands:
        return None
    one, other = operands
    if operation == "arith.addi":
        return one[0] + other[0], one[1] + other[1]
    if operation == "arith.subi":
        return one[0] - other[1], one[1] - other[0]
    if operation == "arith.muli":
        corners = [x * y for x in one for y in other]
        return min(corners), max(corners)
    if operation == "arith.divsi" and other[0] > 0:
        corners = [int(x / y) if abs(x) < 2**52 else x // y for x in one for y in other]
        return min(corners), max(corners)
    if operation == "arith.remsi" and other[0] > 0:
        most = other[1] - 1
        return (-min(most, -one[0]) if one[0] < 0 else 0), max(0, min(most, one[1]))
    if operation == "arith.shrsi" and other[0] == other[1]:
        return one[0] >> other[0], one[1] >> other[0]
    if operation == "arith.andi" and one[0] >= 0 and other[0] >= 0:
        return 0, min(one[1], other[1])
    return None
