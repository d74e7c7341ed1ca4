"""Triton's TTIR as a tree of operations, read from its text.

TTIR is what Triton's frontend makes of a kernel before anything is decided about threads or registers. Its Python
bindings hide most attributes, but its printed form holds everything, an operation a line and a region between
braces, so it is read from there. The C emitter and the audit of offsets walk the result. What the grammar here does
not know raises Unsupported with the line, never a guess.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field


class Unsupported(NotImplementedError):
    """A TTIR operation or form that this reader or the C emitter does not know."""


@dataclass(frozen=True)
class Type:
    """A scalar (shape None) or a tile; `element` is "f32", "i64", ..., and of a pointer what it points to."""

    shape: tuple[int, ...] | None
    element: str
    pointer: bool = False

    @property
    def count(self) -> int:
        """Number of elements of a tile, 1 of a scalar."""
        n = 1
        for d in self.shape or ():
            n *= d
        return n


@dataclass
class Block:
    """A straight run of operations; a function with early returns has several, named by label."""

    label: str
    arguments: list[tuple[str, Type]]
    ops: list[Op] = field(default_factory=list)


@dataclass
class Op:
    """`results = name(operands)`: types and attributes are those printed; regions are lists of blocks."""

    name: str
    results: list[str]
    operands: list[str]
    text: str  # what follows the name, without the regions
    regions: list[list[Block]] = field(default_factory=list)

    @property
    def types(self) -> str:
        """What is printed after the last ` : `."""
        return self.text.rsplit(" : ", 1)[1] if " : " in self.text else ""

    def attribute(self, key: str) -> int:
        """An integer attribute, as in {axis = 1 : i32}."""
        found = re.search(rf"\b{key} = (-?\d+)", self.text)
        if not found:
            raise Unsupported(f"{self.name}: no attribute {key}: {self.text}")
        return int(found[1])


@dataclass
class Function:
    """A kernel: its parameters in order, constants left out as Triton does, and its blocks."""

    name: str
    parameters: list[tuple[str, Type]]
    blocks: list[Block]


def parse_type(text: str) -> Type:
    """`tensor<8x128x!tt.ptr<bf16>>`, `!tt.ptr<f32>`, `i64`, ..."""
    text = text.strip()
    shape = None
    tile = re.fullmatch(r"tensor<((?:\d+x)*)(.+)>", text)
    if tile:
        shape, text = tuple(int(d) for d in tile[1].split("x") if d), tile[2]
    pointer = re.fullmatch(r"!tt\.ptr<(\w+)(?:, \d+)?>", text)
    element = pointer[1] if pointer else text
    if not re.fullmatch(r"i(1|8|16|32|64)|f(16|32|64)|bf16|index", element):
        raise Unsupported(f"type {text}")
    return Type(shape, element, pointer is not None)


def split_types(text: str) -> list[str]:
    """A comma-separated list of types, whose own commas lie between < and >."""
    parts, depth, start = [], 0, 0
    for i, c in enumerate(text):
        depth += (c == "<") - (c == ">" and text[i - 1] != "-")
        if c == "," and depth == 0:
            parts.append(text[start:i])
            start = i + 1
    return [p.strip() for p in (*parts, text[start:]) if p.strip()]


def parse(text: str) -> Function:
    """The public function of a TTIR module."""
    lines = [line for line in (_without_locations(raw).strip() for raw in text.splitlines()) if line]
    start = next((i for i, line in enumerate(lines) if line.startswith("tt.func public @")), None)
    if start is None or sum(line.startswith("tt.func") for line in lines) != 1:
        raise Unsupported("a module of other than one function")
    head = re.match(r"tt\.func public @(\w+)\((.*)\)(?: attributes \{.*\})? \{$", lines[start])
    parameters = [
        (name, parse_type(kind))
        for name, kind in re.findall(r"(%\w+): (!tt\.ptr<[^>]+>|\w+)(?: \{[^}]*\})?(?:, |$)", head[2])
    ]
    if len(parameters) != head[2].count("%"):
        raise Unsupported(head[2])
    blocks, _ = _region(lines, start + 1)
    return Function(head[1], parameters, blocks)


def _without_locations(line: str) -> str:
    """The line without `loc(...)`, whose parentheses nest and whose file names may hold anything."""
    if line.startswith("#"):
        return ""
    while (start := re.search(r"\s*\bloc\(", line)) is not None:
        depth, i, quoted = 1, start.end(), False
        while depth:
            c = line[i]
            quoted ^= c == '"'
            depth += 0 if quoted else (c == "(") - (c == ")")
            i += 1
        line = line[: start.start()] + line[i:]
    return line


def _region(lines: list[str], i: int) -> tuple[list[Block], int]:
    """Blocks from line i to the `}` that closes their region, and the number of that line."""
    blocks = [Block("", [])]
    while not lines[i].startswith("}"):
        line = lines[i]
        label = re.match(r"\^(\w+)(?:\((.*)\))?:", line)
        if label:
            arguments = [a.split(": ", 1) for a in split_types(label[2] or "")]
            blocks.append(Block(label[1], [(name, parse_type(kind)) for name, kind in arguments]))
            i += 1
            continue
        op, i = _operation(lines, i)
        blocks[-1].ops.append(op)
    return ([b for b in blocks if b.ops or b.label] or blocks), i


def _operation(lines: list[str], i: int) -> tuple[Op, int]:
    """The operation that starts in line i, and the number of the line after it."""
    found = re.match(r'(?:(%[\w, %:]+?) = )?"?([a-z_]+\.[\w.]+)"?(.*)$', lines[i])
    if not found:
        raise Unsupported(lines[i])
    results = []
    for name in (found[1] or "").split(", ") if found[1] else []:
        base, _, count = name.partition(":")
        results += [f"{base}#{k}" for k in range(int(count))] if count else [base]
    text, regions, i = found[3], [], i + 1
    if text.endswith("{"):
        text = text[:-1].rstrip().removesuffix("(").rstrip()
        while True:
            region, i = _region(lines, i)
            regions.append(region)
            closing = lines[i]
            i += 1
            if re.fullmatch(r"\} (else|do) \{|\}, \{", closing):
                continue
            text += " " + closing.lstrip("})").strip()
            break
    before = text.split(" : ")[0] if not regions or found[2].startswith("tt.") else text
    operands = re.findall(r"%\w+(?:#\d+)?", before)
    return Op(found[2], results, operands, text.strip(), regions), i


def loop_header(op: Op) -> tuple[str, str, str, str, list[tuple[str, str]]]:
    """Of an scf.for: (variable, from, to, step, [(carried name, its initial value)])."""
    found = re.match(r"(%\w+) = (\S+) to (\S+) step (\S+)(?: iter_args\((.*?)\) -> \(.*\))?", op.text)
    if not found:
        raise Unsupported(f"scf.for {op.text}")
    carried = re.findall(r"(%\w+) = (%\w+(?:#\d+)?)", found[5] or "")
    return found[1], found[2], found[3], found[4], carried


def addressing(function: Function) -> set[str]:
    """The values that decide which addresses a kernel touches: pointers, masks, bounds and conditions, and all
    that these are computed from."""
    wanted: set[str] = set()

    def visit(blocks: list[Block]) -> list[str]:
        for block in reversed(blocks):
            for op in reversed(block.ops):
                step(op)
        return blocks[0].ops[-1].operands if blocks and blocks[0].ops else []

    def step(op: Op) -> None:
        if op.name == "tt.load":
            wanted.update(op.operands[:2])
            wanted.update(op.operands[2:] if op.results[0] in wanted else ())
        elif op.name == "tt.store":
            wanted.update(op.operands[:1] + op.operands[2:])
        elif op.name == "cf.cond_br":
            wanted.add(op.operands[0])
        elif op.name == "scf.for":
            _, *bounds, carried = loop_header(op)
            wanted.update(bounds)
            for (name, initial), result, given in zip(carried, op.results, visit(op.regions[0]), strict=False):
                if wanted.intersection((name, result)):
                    wanted.update((name, result, initial, given))
            visit(op.regions[0])
        elif op.name == "scf.if":
            wanted.add(op.operands[0])
            for region in op.regions:
                wanted.update(
                    given for result, given in zip(op.results, visit(region), strict=False) if result in wanted
                )
                visit(region)
        elif wanted.intersection(op.results):
            wanted.update(op.operands)
            for region in op.regions:
                inside = [inner for block in region for inner in block.ops]
                wanted.update(name for inner in inside for name in inner.operands + inner.results)

    before = -1
    while before != len(wanted):  # a carried value needed late in a loop is needed at its start
        before = len(wanted)
        visit(function.blocks)
    return wanted
