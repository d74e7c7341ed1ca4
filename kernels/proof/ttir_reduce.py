"""Reductions of TTIR in C: along the last axis with the lanes of a block of threads, along another by whole rows."""

from __future__ import annotations

from collections.abc import Callable

from crystal.kernels.proof.ttir import Block, Op, Type, Unsupported, parse_type
from crystal.kernels.proof.ttir_arithmetic import C_TYPES, Index, Value, flat

LANES = 128  # of a sum over a row: a block of threads
KNOWN = {  # operation: (neutral element, formula)
    "arith.addf": ("0", "{0} + {1}"), "arith.addi": ("0", "{0} + {1}"),
    "arith.maxnumf": ("-INFINITY", "{0} > {1} ? {0} : {1}"), "arith.minnumf": ("INFINITY", "{0} < {1} ? {0} : {1}"),
}  # fmt: skip


def _known(block: Block, element: str) -> tuple[str, Callable[[str, str], str]] | None:
    """(neutral element, formula) if the block is one known operation on float or int."""
    if len(block.ops) != 2 or block.ops[0].name not in KNOWN or element in ("bf16", "f16"):
        return None
    neutral, formula = KNOWN[block.ops[0].name]
    return neutral, formula.format


def reduce(emitter, op: Op) -> None:
    """Emit a tt.reduce of one tile."""
    if len(op.operands) != 1:
        raise Unsupported("a reduction of several tiles at once")
    a, axis, kind = emitter.values[op.operands[0]], op.attribute("axis"), parse_type(op.types.split(" -> ")[1])
    shape, size, last = kind.shape or (), a.type.shape[axis], len(a.type.shape) - 1
    (block,) = op.regions[0]
    known = _known(block, kind.element)
    if axis < last and a.cost > 2:
        a = emitter.stored(a)
    name, step = emitter.declare(Type(shape or (1,), kind.element), "r"), emitter.fresh("k")

    def combine(index: Index, target: str) -> None:
        """target = target combined with element `step` of the reduced axis."""
        element = a.at([*index[:axis], step, *index[axis:]])
        if known is not None:
            emitter.write(f"{target} = {known[1](target, element)};")
            return
        scalar = Type(None, kind.element)
        for (argument, _), text in zip(block.arguments, (target, element), strict=True):
            emitter.values[argument] = Value(scalar, lambda _, t=text: t)
        (result,) = emitter.block(block)
        emitter.write(f"{target} = {emitter.values[result].at([])};")

    def first(index: Index) -> str:
        return known[0] if known else a.at([*index[:axis], "0", *index[axis:]])

    begin = 0 if known else 1
    if axis == last:
        index = [emitter.fresh("i") if d > 1 else "0" for d in shape]
        loops = [(i, d) for i, d in zip(index, shape, strict=True) if d > 1]
        for i, d in loops:
            emitter.write(f"for (int {i} = 0; {i} < {d}; {i}++) {{")
        if known and size > LANES:
            total = _by_lanes(emitter, known, C_TYPES[kind.element], size, step, lambda target: combine(index, target))
        else:
            total = emitter.fresh("acc")
            emitter.write(f"{C_TYPES[kind.element]} {total} = {first(index)};")
            emitter.write(f"for (int {step} = {begin}; {step} < {size}; {step}++) {{")
            combine(index, total)
            emitter.write("}")
        emitter.write(f"{name}[{flat(shape, index)}] = {total};" + " }" * len(loops))
    else:
        emitter.loop(shape, lambda ix: f"{name}[{flat(shape, ix)}] = {first(ix)};")
        emitter.write(f"for (int {step} = {begin}; {step} < {size}; {step}++) {{")
        index = [emitter.fresh("i") for _ in shape]
        for i, d in zip(index, shape, strict=True):
            if i == index[-1]:
                emitter.write("#pragma GCC ivdep")
            emitter.write(f"for (int {i} = 0; {i} < {d}; {i}++) {{")
        combine(index, f"{name}[{flat(shape, index)}]")
        emitter.write(" }" * (len(shape) + 1))
    emitter.values[op.results[0]] = Value(kind, lambda ix: f"{name}[{flat(shape, ix) if ix else 0}]", array=name)


def _by_lanes(emitter, known, c_type: str, size: int, step: str, combine: Callable[[str], None]) -> str:
    """Reduce as a block of threads does: each lane a part, then the lanes by halves. Returns the C result."""
    lanes, i, k = emitter.fresh("lanes"), emitter.fresh("i"), emitter.fresh("k")
    emitter.write(f"{c_type} {lanes}[{LANES}];")
    emitter.write(f"for (int {i} = 0; {i} < {LANES}; {i}++) {lanes}[{i}] = {known[0]};")
    emitter.write(f"for (int {k} = 0; {k} < {size}; {k} += {LANES})")
    emitter.write("#pragma GCC ivdep")
    emitter.write(f"for (int {i} = 0; {i} < {LANES}; {i}++) {{ int {step} = {k} + {i};")
    combine(f"{lanes}[{i}]")
    emitter.write(f"}} for (int {k} = {LANES // 2}; {k}; {k} /= 2) for (int {i} = 0; {i} < {k}; {i}++)")
    emitter.write(f"{lanes}[{i}] = {known[1](f'{lanes}[{i}]', f'{lanes}[{i} + {k}]')};")
    return f"{lanes}[0]"
