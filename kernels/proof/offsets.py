"""Do a kernel's addresses fit 32 bits where they are computed in 32 bits?

A product such as `program_id * row_stride` in int32 wraps at 2^31 elements, and then reads and writes elsewhere
without a sign. Here every integer of a launch's TTIR gets an interval: program ids from the launch's own grid,
scalars their own values, loop variables their bounds. An int32 whose interval leaves int32 and that goes into a
pointer is reported. Masks are not considered, so an answer may be too strict, never too lenient; integers read from
memory (labels, positions) are taken to lie below 2^24.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, NamedTuple

from crystal.kernels.proof.ttir import Block, Op, Type, loop_header, parse, parse_type

LOADED = 1 << 24


class Range(NamedTuple):
    """Least and greatest value of an integer or of all integers of a tile; wrapped: it may have left its type."""

    low: int
    high: int
    wrapped: bool = False

    def join(self, other: Range) -> Range:
        return Range(min(self.low, other.low), max(self.high, other.high), self.wrapped or other.wrapped)


def _limits(element: str) -> tuple[int, int]:
    bits = 64 if element == "index" else int(element[1:])
    return (0, 1) if bits == 1 else (-(1 << bits - 1), (1 << bits - 1) - 1)


def _corners(f: Callable[[int, int], int]) -> Callable[[Range, Range], tuple[int, int]]:
    def over(a: Range, b: Range) -> tuple[int, int]:
        values = [f(x, y) for x in a[:2] for y in b[:2]]
        return min(values), max(values)

    return over


_RULES = {
    "addi": _corners(lambda x, y: x + y), "subi": _corners(lambda x, y: x - y), "muli": _corners(lambda x, y: x * y),
    "maxsi": _corners(max), "minsi": _corners(min),
    "divsi": _corners(lambda x, y: math.trunc(x / y) if abs(x) < 1 << 50 and y else x),
    "remsi": lambda a, b: (min(0, a.low), max(abs(b.low), abs(b.high)) - 1),
    "shli": _corners(lambda x, y: x << max(0, min(y, 64))), "shrsi": _corners(lambda x, y: x >> max(0, min(y, 64))),
}  # fmt: skip


class _Audit:
    def __init__(self, grid: tuple[int, int, int]) -> None:
        self.grid, self.ranges, self.found = dict(zip("xyz", grid, strict=True)), {}, set()

    def blocks(self, blocks: list[Block]) -> list[str]:
        last: list[str] = []
        for block in blocks:
            for name, kind in block.arguments:
                if not kind.pointer and kind.element[0] == "i":
                    self.ranges.setdefault(name, Range(*_limits(kind.element)))
            for op in block.ops:
                self.step(op)
                last = op.operands if op.name == "scf.yield" else []
        return last

    def integers(self, op: Op) -> list[Range | None]:
        return [self.ranges.get(n) for n in op.operands]

    def put(self, name: str, kind: Type, low: int, high: int, *sources: Range) -> None:
        least, most = _limits(kind.element)
        wrapped = any(s.wrapped for s in sources) or (kind.element == "i32" and (low < least or high > most))
        self.ranges[name] = Range(max(low, least), min(high, most), wrapped)

    def step(self, op: Op) -> None:
        short = op.name.split(".")[-1]
        if op.name == "scf.for":
            self.loop(op)
        elif op.name == "scf.if":
            for region in op.regions:
                for result, given in zip(op.results, self.blocks(region), strict=False):
                    if given in self.ranges:
                        known = self.ranges.get(result)
                        self.ranges[result] = self.ranges[given] if known is None else known.join(self.ranges[given])
        elif op.name == "tt.addptr":
            offset = self.ranges.get(op.operands[1])
            if offset is None or offset.wrapped:
                self.found.add(f"{op.operands[0]} + {op.operands[1]}")
        elif op.name == "arith.constant":
            self.constant(op)
        elif op.name in ("tt.get_program_id", "tt.get_num_programs"):
            count = self.grid[op.text.split()[0]]
            self.ranges[op.results[0]] = Range(0, count - 1) if short == "get_program_id" else Range(count, count)
        elif op.name == "tt.make_range":
            self.ranges[op.results[0]] = Range(op.attribute("start"), op.attribute("end") - 1)
        elif op.name == "tt.load" and op.results:
            kind = parse_type(op.types)
            if kind.element[0] == "i":
                self.ranges[op.results[0]] = Range(0, min(LOADED, _limits(kind.element)[1]))
        elif op.results:
            self.arithmetic(op, short)

    def arithmetic(self, op: Op, short: str) -> None:
        ranges = [r for r in self.integers(op) if r is not None]
        if short in ("cmpi", "cmpf"):
            self.ranges[op.results[0]] = Range(0, 1)
        elif short in _RULES and len(ranges) == 2:
            self.put(op.results[0], parse_type(op.types), *_RULES[short](*ranges), *ranges)
        elif short in ("extsi", "extui", "trunci", "index_cast") and ranges:
            self.put(op.results[0], parse_type(op.types.split(" to ")[1]), *ranges[0][:2], *ranges)
        elif short == "select" and len(ranges) == 3:
            self.ranges[op.results[0]] = ranges[1].join(ranges[2])
        elif short in ("splat", "broadcast", "expand_dims", "reshape", "trans", "split", "join") and ranges:
            joined = ranges[0] if len(ranges) == 1 else ranges[0].join(ranges[1])
            self.ranges.update(dict.fromkeys(op.results, joined))
        elif short == "reduce" and ranges:
            self.ranges[op.results[0]] = Range(*_limits("i32"), True)
        elif " to " in op.types or short in ("andi", "ori", "xori"):
            kind = parse_type(op.types.split(" to ")[-1])
            if kind.element[0] == "i" and not kind.pointer:
                self.ranges[op.results[0]] = Range(*_limits(kind.element), any(r.wrapped for r in ranges))

    def constant(self, op: Op) -> None:
        text = op.text.split(" : ")[0].strip().removeprefix("dense<").removesuffix(">")
        if text in ("true", "false"):
            self.ranges[op.results[0]] = Range(0, 1)
        elif text.lstrip("-").isdigit():
            self.ranges[op.results[0]] = Range(int(text), int(text))

    def loop(self, op: Op) -> None:
        variable, start, end, _, carried = loop_header(op)
        self.ranges[variable] = Range(self.ranges[start].low, max(self.ranges[start].low, self.ranges[end].high - 1))
        for name, initial in carried:
            if initial in self.ranges:
                self.ranges[name] = self.ranges[initial]
        before = {name: self.ranges.get(name) for name, _ in carried}
        found = set(self.found)
        yielded = self.blocks(op.regions[0])
        grown = [
            name
            for (name, _), given in zip(carried, yielded, strict=True)
            if before[name] is not None and before[name].join(self.ranges[given]) != before[name]
        ]
        if grown:  # no bound is known for what a loop adds up, except that 64 bits are enough
            self.found = found
            for name in grown:
                self.ranges[name] = Range(-(1 << 62), 1 << 62)
            yielded = self.blocks(op.regions[0])
        for result, (name, _), given in zip(op.results, carried, yielded, strict=True):
            if before[name] is not None:
                self.ranges[result] = self.ranges[name].join(self.ranges[given])


def unsafe_offsets(ttir: str, grid: tuple[int, int, int], arguments: dict[str, Any]) -> list[str]:
    """Pointer additions of a launch whose offset may have wrapped in 32 bits, as "pointer + offset" of the TTIR."""
    function, audit = parse(ttir), _Audit(grid)
    for name, kind in function.parameters:
        if not kind.pointer and kind.element[0] == "i":
            value = int(arguments[name[1:]])
            audit.ranges[name] = Range(value, value)
    audit.blocks(function.blocks)
    return sorted(audit.found)
