"""A kernel's TTIR as C, so that the kernel itself, not its reference, runs on a CPU at compiled speed.

A program of the grid becomes a C function and a tile a loop nest; tiles that are only arithmetic on others are not
stored but written into the loops that use them, and gcc makes vectors of those. What differs between a GPU and a
CPU is made visible instead of smoothed over: lanes that a mask leaves undefined hold NaN (integers: 0x55555555),
bfloat16 and float16 are rounded to nearest even after every operation, integers wrap. What the lowering to threads
does afterwards (TTGIR, PTX) is not covered: see `resources`.

The same emitter writes a second program, which moves no data and marks the 32-byte sectors of every tensor that
the kernel reads or writes: `traffic` counts with it. Loads then give 0, and of integers (labels, positions, whose
values decide which addresses follow) their own place modulo 2048.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

from crystal.kernels.proof import ttir_arithmetic as arithmetic
from crystal.kernels.proof.ttir import (
    Block,
    Function,
    Op,
    Type,
    Unsupported,
    addressing,
    loop_header,
    parse,
    parse_type,
    split_types,
)
from crystal.kernels.proof.ttir_arithmetic import C_TYPES, Index, Value, flat
from crystal.kernels.proof.ttir_reduce import reduce

STORED = 24  # operations in one expression; beyond, an intermediate tile is stored


class Emitter:
    """Writes the C of one function. `lines` grows as operations are visited; `values` maps SSA names."""

    def __init__(self, function: Function, counting: bool) -> None:
        self.function, self.counting = function, counting
        self.lines: list[str] = []
        self.values: dict[str, Value] = {}
        self.names = 0
        self.uses: Counter[str] = Counter()
        self.needed = addressing(function) if counting else None  # without data, only what addresses come from
        self._count_uses(function.blocks)

    def _count_uses(self, blocks: list[Block]) -> None:
        for block in blocks:
            for op in block.ops:
                self.uses.update(op.operands)
                for region in op.regions:
                    self._count_uses(region)

    def emit(self) -> str:
        """The C text: `program` for one program id, `launch` for a grid in a given order."""
        for number, (name, kind) in enumerate(self.function.parameters):
            argument = "A_" + name[1:]
            self.values[name] = Value(kind, None if kind.pointer else lambda _, a=argument: a, argument, number)
        if len(self.function.blocks) > 1:
            self._declare_block_arguments()
        for block in self.function.blocks:
            if block.label:
                self.write(f"{block.label}:;")
            self.block(block)
        typed = [f"{self.c_type(kind)} A_{name[1:]}" for name, kind in self.function.parameters]
        plain = [f"A_{name[1:]}" for name, _ in self.function.parameters]
        return arithmetic.program(typed, plain, self.lines, self.counting)

    def write(self, line: str) -> None:
        self.lines.append(line)

    def fresh(self, prefix: str) -> str:
        self.names += 1
        return f"{prefix}{self.names}"

    def c_type(self, kind: Type) -> str:
        return C_TYPES[kind.element] + (" *" if kind.pointer else "")

    def declare(self, kind: Type, prefix: str = "t") -> str:
        """A C array for a tile. Large ones are static per thread: a stack is short."""
        name = self.fresh(prefix)
        static = "static _Thread_local " if kind.count > 1024 else ""
        element = "int64_t" if kind.pointer else C_TYPES[kind.element]
        self.write(f"{static}{element} {name}[{kind.count}] __attribute__((aligned(64)));")
        return name

    def loop(self, shape: tuple[int, ...], body: Callable[[Index], str], independent: bool = True) -> None:
        """`body` for every index of a tile; independent: no iteration reads what another one writes."""
        index = [self.fresh("i") if d > 1 else "0" for d in shape]
        looped = [(i, d) for i, d in zip(index, shape, strict=True) if d > 1]
        for number, (i, d) in enumerate(looped):
            if independent and number == len(looped) - 1:
                self.write("#pragma GCC ivdep")
            self.write(f"for (int {i} = 0; {i} < {d}; {i}++) {{")
        self.write(body(index) + " }" * len(looped))

    def stored(self, value: Value) -> Value:
        """The value in a C variable or array of its own, computed here."""
        kind = value.type
        if kind.pointer:
            base = self.fresh("p")
            if kind.shape is None:
                at = "" if value.at is None else f" + {value.at([])}"
                self.write(f"{C_TYPES[kind.element]} *{base} = {value.base}{at};")
                return Value(kind, None, base, value.root)
            self.write(f"{C_TYPES[kind.element]} *{base} = {value.base};")
            name = self.declare(kind)
            at = value.at or (lambda _: "0")
            self.loop(kind.shape, lambda ix: f"{name}[{flat(kind.shape, ix)}] = {at(ix)};")
            return Value(kind, lambda ix: f"{name}[{flat(kind.shape, ix)}]", base, value.root, array=name)
        if kind.shape is None:
            name = self.fresh("s")
            self.write(f"{C_TYPES[kind.element]} {name} = {value.at([])};")
            return Value(kind, lambda _: name)
        if value.array:
            return value
        name = self.declare(kind)
        self.loop(kind.shape, lambda ix: f"{name}[{flat(kind.shape, ix)}] = {value.at(ix)};")
        return Value(kind, lambda ix: f"{name}[{flat(kind.shape, ix)}]", array=name)

    def define(self, name: str, value: Value) -> None:
        """Bind an SSA name; scalars and what would be computed again and again are stored now."""
        again = self.uses[name] > 1 and value.cost > 2
        if value.type.shape is None or (not value.type.pointer and (again or value.cost > STORED)):
            value = self.stored(value)
        self.values[name] = value

    def block(self, block: Block) -> list[str]:
        """Emit a block; returns the operands of its terminator."""
        for op in block.ops:
            ending = op.name in ("scf.yield", "tt.reduce.return", "tt.return", "cf.br", "cf.cond_br")
            if not ending:
                self.operation(op)
                continue
            if op.name == "tt.return":
                self.write("return;")
            elif op.name.startswith("cf."):
                self._branch(op)
            return op.operands
        return []

    def unneeded(self, names: Sequence[str]) -> bool:
        return self.needed is not None and bool(names) and not self.needed.intersection(names)

    def operation(self, op: Op) -> None:
        """Emit one operation that is no terminator."""
        if self.unneeded(op.results) and not op.name.startswith(("tt.load", "scf.")):
            return
        handler = getattr(self, "_" + op.name.replace(".", "_"), None)
        if op.name == "tt.reduce":
            reduce(self, op)
        elif handler is not None:
            handler(op, *(self.values.get(n) for n in op.operands if not op.regions))
        elif not arithmetic.elementwise(self, op):
            raise Unsupported(f"{op.name} {op.text}")

    # Shapes

    def _tt_splat(self, op: Op, a: Value) -> None:
        kind = parse_type(op.types.split(" -> ")[1])
        if kind.pointer:
            self.values[op.results[0]] = Value(kind, None, a.base, a.root)
        else:
            self.values[op.results[0]] = Value(kind, lambda _: a.at([]))

    def _reindexed(self, op: Op, a: Value, where: Callable[[Index, Type], Index]) -> None:
        kind = parse_type(op.types.split(" -> ")[1])
        at = None if a.at is None else lambda ix: a.at(where(ix, kind))
        self.values[op.results[0]] = Value(kind, at, a.base, a.root, a.cost)

    def _tt_expand_dims(self, op: Op, a: Value) -> None:
        axis = op.attribute("axis")
        self._reindexed(op, a, lambda ix, _: ix[:axis] + ix[axis + 1 :])

    def _tt_broadcast(self, op: Op, a: Value) -> None:
        if a.cost > 2:
            a = self.stored(a)
        self._reindexed(op, a, lambda ix, _: ["0" if d == 1 else i for i, d in zip(ix, a.type.shape, strict=True)])

    def _tt_reshape(self, op: Op, a: Value) -> None:
        def where(index: Index, kind: Type) -> Index:
            place, found = flat(kind.shape, index), []
            for d in reversed(a.type.shape):
                found.insert(0, f"(({place})%{d})")
                place = f"(({place})/{d})"
            return found

        self._reindexed(op, self.stored(a), where)

    def _tt_trans(self, op: Op, a: Value) -> None:
        order = [int(k) for k in op.text.split("array<i32: ")[1].split(">")[0].split(",")]
        self._reindexed(op, self.stored(a), lambda ix, _: [ix[order.index(k)] for k in range(len(order))])

    def _tt_split(self, op: Op, a: Value) -> None:
        a = self.stored(a)
        kind = Type(a.type.shape[:-1], a.type.element)
        for which, name in enumerate(op.results):
            self.values[name] = Value(kind, lambda ix, w=which: a.at([*ix, str(w)]))

    def _tt_join(self, op: Op, a: Value, b: Value) -> None:
        kind = parse_type(op.types.split(" -> ")[1])
        pick = lambda ix: f"(({ix[-1]}) ? {b.at(ix[:-1])} : {a.at(ix[:-1])})"  # noqa: E731
        self.values[op.results[0]] = Value(kind, pick, cost=a.cost + b.cost + 1)

    # Memory

    def _tt_addptr(self, op: Op, p: Value, offset: Value) -> None:
        kind = parse_type(split_types(op.types)[0])
        at = offset.at if p.at is None else lambda ix: f"((int64_t){p.at(ix)} + {offset.at(ix)})"
        self.define(op.results[0], Value(kind, at, p.base, p.root, p.cost + offset.cost))

    def _tt_load(self, op: Op, p: Value, mask: Value | None = None, other: Value | None = None) -> None:
        kind = Type(p.type.shape, p.type.element)
        dead = self.unneeded(op.results)
        name = "" if dead else self.declare(Type(kind.shape or (1,), kind.element), "l")
        missing = arithmetic.undefined(kind.element)

        def body(index: Index) -> str:
            place = p.at(index) if p.at else "0"
            target = f"{name}[{flat(kind.shape or (), index)}] = "
            if self.counting:
                address = f"{p.base} + ({place})"
                given = f"PLACE({p.root}, {address})" if kind.element[0] == "i" else arithmetic.zero(kind.element)
                seen = f"READ({p.root}, {address});" + ("" if dead else f" {target}{given};")
                return seen if mask is None else f"if ({mask.at(index)}) {{ {seen} }}"
            loaded = f"({p.base})[{place}]"
            if mask is not None:
                loaded = f"({mask.at(index)}) ? {loaded} : {other.at(index) if other else missing}"
            return target + loaded + ";"

        if self.counting and mask is not None and not dead:
            fill = lambda ix: f"{name}[{flat(kind.shape or (), ix)}] = {other.at(ix) if other else missing};"  # noqa: E731
            self.loop(kind.shape or (), fill)
        self.loop(kind.shape or (), body)
        self.values[op.results[0]] = Value(kind, lambda ix: f"{name}[{flat(kind.shape or (), ix)}]", array=name)

    def _tt_store(self, op: Op, p: Value, value: Value, mask: Value | None = None) -> None:
        def body(index: Index) -> str:
            place = p.at(index) if p.at else "0"
            guard = f"if ({mask.at(index)}) " if mask else ""
            if self.counting:
                return f"{guard}WRITE({p.root}, {p.base} + ({place}));"
            return f"{guard}({p.base})[{place}] = {value.at(index)};"

        if not self.counting and value.cost and value.type.shape is not None:
            value = self.stored(value)
        self.loop(p.type.shape or (), body)

    # Control

    def _carry(self, value: Value) -> Value:
        """A copy that a loop may overwrite."""
        copy = self.stored(Value(value.type, value.at, value.base, value.root))
        if value.type.shape is None and not value.type.pointer:
            copy.array = copy.at([])
        return copy

    def _assign(self, targets: list[Value], names: list[str]) -> None:
        """targets = the named values, as if all at once."""
        fresh = [self.stored(Value(v.type, v.at, v.base, v.root)) for v in (self.values[n] for n in names)]
        for target, value in zip(targets, fresh, strict=True):
            if target.type.pointer:
                self.write(f"{target.base} = {value.base};")
            if target.type.shape is not None:
                self.write(f"memcpy({target.array}, {value.array}, sizeof {target.array});")
            elif not target.type.pointer:
                self.write(f"{target.array} = {value.at([])};")

    def _scf_for(self, op: Op) -> None:
        variable, start, end, step, carried = loop_header(op)
        kept = [k for k, (name, _) in enumerate(carried) if not self.unneeded([name, op.results[k]])]
        carried = [carried[k] for k in kept]
        targets = [self._carry(self.values[initial]) for _, initial in carried]
        for (name, _), target in zip(carried, targets, strict=True):
            self.values[name] = target
        kind, i = self.values[start].type, self.fresh("k")
        first, last, by = (self.values[n].at([]) for n in (start, end, step))
        self.values[variable] = Value(kind, lambda _: i)
        self.write(f"for ({C_TYPES[kind.element]} {i} = {first}; {i} < {last}; {i} += {by}) {{")
        (block,) = op.regions[0]
        yielded = self.block(block)
        self._assign(targets, [yielded[k] for k in kept])
        self.write("}")
        self.values.update(zip((op.results[k] for k in kept), targets, strict=True))

    def _scf_if(self, op: Op) -> None:
        kinds = op.text.split(" -> (")[1].rsplit(")", 1)[0] if " -> (" in op.text else ""
        targets = []
        kept = [k for k, name in enumerate(op.results) if not self.unneeded([name])]
        for kind in [parse_type(kind) for k, kind in enumerate(split_types(kinds)) if k in kept]:
            if kind.pointer:
                raise Unsupported("a pointer out of scf.if")
            if kind.shape is None:
                name = self.fresh("s")
                self.write(f"{C_TYPES[kind.element]} {name};")
                targets.append(Value(kind, lambda _, n=name: n, array=name))
            else:
                name = self.declare(kind)
                targets.append(Value(kind, lambda ix, n=name, s=kind.shape: f"{n}[{flat(s, ix)}]", array=name))
        self.write(f"if ({self.values[op.operands[0]].at([])}) {{")
        for number, region in enumerate(op.regions):
            if number:
                self.write("} else {")
            yielded = self.block(region[0])
            self._assign(targets, [yielded[k] for k in kept])
        self.write("}")
        self.values.update(zip((op.results[k] for k in kept), targets, strict=True))

    def _declare_block_arguments(self) -> None:
        for block in self.function.blocks:
            for name, kind in block.arguments:
                if kind.shape is not None or kind.pointer:
                    raise Unsupported("a tile that crosses a branch")
                variable = self.fresh("b")
                self.write(f"{C_TYPES[kind.element]} {variable};")
                self.values[name] = Value(kind, lambda _, n=variable: n, array=variable)

    def _branch(self, op: Op) -> None:
        labels = [part.split("(")[0].split()[0] for part in op.text.replace(",", " ").split("^")[1:]]
        if "(" in op.text:
            raise Unsupported(f"{op.name} {op.text}")
        if op.name == "cf.br":
            self.write(f"goto {labels[0]};")
        else:
            self.write(f"if ({self.values[op.operands[0]].at([])}) goto {labels[0]}; else goto {labels[1]};")


def to_c(ttir: str, counting: bool = False) -> tuple[list[tuple[str, Type]], str]:
    """(parameters, C source) of a kernel's TTIR. Raises Unsupported for what has no C here."""
    function = parse(ttir)
    return function.parameters, Emitter(function, counting).emit()
