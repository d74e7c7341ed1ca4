"""The arithmetic of TTIR in C: constants, elementwise operations, and the frame around a program."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass

from crystal.kernels.proof.ttir import Op, Type, Unsupported, parse_type

PRELUDE = r"""
#include <stdint.h>
#include <math.h>
#include <string.h>
typedef struct { uint16_t v; } bf16;
static inline float from_bf16(bf16 h) { uint32_t u = (uint32_t)h.v << 16; float f; memcpy(&f, &u, 4); return f; }
static inline bf16 to_bf16(float f) {
  uint32_t u; memcpy(&u, &f, 4);
  bf16 r; r.v = f != f ? 0x7FFF : (uint16_t)((u + 0x7FFF + ((u >> 16) & 1)) >> 16); return r;
}
#if defined(__x86_64__) && defined(__GLIBC__)  /* let gcc take the vector versions of glibc, good to 4 ulp */
float exp2f(float) __attribute__((simd("notinbranch")));
float log2f(float) __attribute__((simd("notinbranch")));
#endif
/* As the NVIDIA backend has them: ex2.approx and lg2.approx of a rounded product. */
static inline float exp_by_exp2(float x) { return exp2f(x * 1.44269504f); }
static inline float log_by_log2(float x) { return log2f(x) * 0.69314718f; }
"""

RUN = r"""
void launch(%(typed)s, int nx, int ny, int nz, const int64_t *order) {
  int64_t count = (int64_t)nx * ny * nz;
  #pragma omp parallel for schedule(static)
  for (int64_t k = 0; k < count; k++) {
    int64_t id = order ? order[k] : k;
    program(%(plain)s, id %% nx, id / nx %% ny, id / nx / ny, nx, ny, nz);
  }
}
"""

# Sectors are marked with plain stores of 1: two threads that mark the same one agree.
COUNTING = r"""
typedef struct { uint8_t *read, *written; uint64_t start, bytes; } extent;
static extent *tensors; static int64_t outside, misaligned;
static _Thread_local int64_t asked_read, asked_written;
#define MARK(t, p, which, asked) do { uint64_t a = (uint64_t)(p), o = a - tensors[t].start, n = sizeof *(p); \
  asked += n; if (a % n) misaligned = 1; \
  if (o >= tensors[t].bytes || o + n > tensors[t].bytes) outside = 1; else tensors[t].which[o >> 5] = 1; } while (0)
#define READ(t, p) MARK(t, p, read, asked_read)
#define WRITE(t, p) MARK(t, p, written, asked_written)
#define PLACE(t, p) (int)(((uint64_t)(p) - tensors[t].start) / sizeof *(p) & 2047)
"""

COUNT = r"""
void launch(%(typed)s, int nx, int ny, int nz, extent *where, int64_t *result) {
  int64_t count = (int64_t)nx * ny * nz, r = 0, w = 0;
  tensors = where; outside = misaligned = 0;
  #pragma omp parallel for schedule(static) reduction(+:r, w)
  for (int64_t k = 0; k < count; k++) {
    asked_read = asked_written = 0;
    program(%(plain)s, k %% nx, k / nx %% ny, k / nx / ny, nx, ny, nz);
    r += asked_read; w += asked_written;
  }
  result[0] = r; result[1] = w; result[2] = outside; result[3] = misaligned;
}
"""

C_TYPES = {
    "i1": "uint8_t", "i8": "int8_t", "i16": "int16_t", "i32": "int32_t", "i64": "int64_t", "index": "int64_t",
    "f32": "float", "f64": "double", "bf16": "bf16", "f16": "_Float16",
}  # fmt: skip
Index = list[str]

BINARY = {
    "addf": "+", "subf": "-", "mulf": "*", "divf": "/", "addi": "+", "subi": "-", "muli": "*", "andi": "&",
    "ori": "|", "xori": "^", "divsi": "/", "remsi": "%", "shli": "<<", "shrsi": ">>",
}  # fmt: skip
UNSIGNED = {"divui": "/", "remui": "%", "shrui": ">>"}
COMPARE = {
    "slt": "<", "sle": "<=", "sgt": ">", "sge": ">=", "eq": "==", "ne": "!=", "ult": "<", "ule": "<=", "ugt": ">",
    "uge": ">=", "olt": "<", "ole": "<=", "ogt": ">", "oge": ">=", "oeq": "==", "une": "!=",
}  # fmt: skip
CHOICE = {  # the first as IEEE maxNum, which passes a NaN by; the second hands it on
    "maxnumf": "({0} > {1} || {1} != {1} ? {0} : {1})", "minnumf": "({0} < {1} || {1} != {1} ? {0} : {1})",
    "maximumf": "({0} > {1} || {0} != {0} ? {0} : {1})", "minimumf": "({0} < {1} || {0} != {0} ? {0} : {1})",
    "maxsi": "({0} > {1} ? {0} : {1})", "minsi": "({0} < {1} ? {0} : {1})",
}  # fmt: skip
UNARY = {
    "math.exp": "exp_by_exp2", "math.exp2": "exp2f", "math.log": "log_by_log2", "math.log2": "log2f",
    "math.sqrt": "sqrtf", "math.rsqrt": "1.0f/sqrtf", "math.tanh": "tanhf", "math.absf": "fabsf",
    "tt.precise_sqrt": "sqrtf",
    "math.cos": "cosf", "math.sin": "sinf", "math.floor": "floorf", "math.erf": "erff", "arith.negf": "-",
}  # fmt: skip
LIBRARY = {"__nv_rsqrtf": "1.0f/sqrtf", "__nv_tanhf": "tanhf", "__nv_expf": "expf", "__nv_logf": "logf"}
CASTS = {
    "extsi", "extui", "extf", "truncf", "trunci", "sitofp", "uitofp", "fptosi", "fptoui", "bitcast", "index_cast",
}  # fmt: skip


@dataclass
class Value:
    """A scalar or tile: `at(index)` is the C expression of an element; for a pointer, of its offset from `base`."""

    type: Type
    at: Callable[[Index], str] | None
    base: str = ""
    root: int = 0  # which parameter a pointer points into
    cost: int = 0  # operations behind `at`
    array: str = ""  # the C array that holds it, if one does


def flat(shape: tuple[int, ...], index: Index) -> str:
    """Row-major position of an element."""
    text = "0"
    for size, i in zip(shape, index, strict=True):
        text = i if text == "0" else f"({text}*{size}+{i})"
    return text


def program(typed: list[str], plain: list[str], lines: list[str], counting: bool) -> str:
    """The whole C file around the lines of one program."""
    names = {"typed": ", ".join(typed), "plain": ", ".join(plain)}
    body = "\n".join(lines)
    ids = "int pid_x, int pid_y, int pid_z, int programs_x, int programs_y, int programs_z"
    text = PRELUDE + (COUNTING if counting else "") + f"static void program({names['typed']}, {ids}) {{\n{body}\n}}\n"
    return text + (COUNT if counting else RUN) % names


def undefined(element: str) -> str:
    """What a lane outside the mask of a load without `other` holds."""
    if element == "bf16":
        return "((bf16){0x7FC1})"
    return "NAN" if element[0] == "f" else "((uint8_t)1)" if element == "i1" else "0x55555555"


def zero(element: str) -> str:
    return "((bf16){0})" if element == "bf16" else "0"


def _constant(text: str, element: str) -> str:
    literal = re.match(r"\s*(?:dense<(.*?)>|([^ ]+))", text)
    literal = (literal[1] or literal[2]).strip()
    literal = {"true": "1", "false": "0"}.get(literal, literal)
    if element[0] == "i":
        return f"{literal}LL" if element in ("i64", "index") else literal
    if literal.startswith("0x"):
        bits = int(literal, 16)
        if element == "bf16":
            return f"((bf16){{{bits}}})"
        carrier = {"f32": "uint32_t", "f64": "uint64_t", "f16": "uint16_t"}[element]
        kind = {"f32": "float", "f64": "double", "f16": "_Float16"}[element]
        return f"((union {{ {carrier} u; {kind} f; }}){{{bits}u}}).f"
    number = repr(float(literal))
    return {"bf16": f"to_bf16({number}f)", "f64": number, "f16": f"((_Float16){number}f)"}.get(element, f"{number}f")


def in_float(element: str, formula: Callable[..., str]) -> Callable[..., str]:
    """A formula on float carried out for `element`, with one rounding at its end."""
    if element == "bf16":
        return lambda *x: f"to_bf16({formula(*(f'from_bf16({v})' for v in x))})"
    if element == "f16":
        return lambda *x: f"((_Float16)({formula(*(f'(float)({v})' for v in x))}))"
    return formula


def _compared(element: str, predicate: str) -> Callable[[str, str], str]:
    if predicate not in COMPARE:
        raise Unsupported(f"comparison {predicate}")
    sign, wide = COMPARE[predicate], "from_bf16({})" if element == "bf16" else "{}"
    if predicate[0] == "u" and element[0] == "i":
        wide = f"(u{ {'i1': 'int8', 'index': 'int64'}.get(element, 'int' + element[1:]) }_t)({{}})"
    return lambda a, b: f"({wide.format(a)} {sign} {wide.format(b)})"


def _cast(name: str, source: str, target: str, c_type: str) -> Callable[[str], str]:
    if name == "bitcast":
        raise Unsupported("bitcast of a tile")
    if source == "i1" and name == "extsi":
        return lambda x: f"(({c_type})-(int)({x}))"
    if name in ("uitofp", "extui") and source not in ("i1", "index"):
        return lambda x: f"(({c_type})(uint{source[1:]}_t)({x}))"
    wide = (lambda x: f"from_bf16({x})") if source == "bf16" else (lambda x: x)
    if target == "bf16":
        return lambda x: f"to_bf16((float)({wide(x)}))"
    return lambda x: f"(({c_type})({wide(x)}))"


def elementwise(emitter, op: Op) -> bool:
    """Emit `op` if it is a constant, an id, a range or arithmetic lane by lane; say whether it was."""
    short = op.name.split(".")[1]
    values = [emitter.values[n] for n in op.operands]
    if op.name == "arith.constant":
        kind = parse_type(op.types) if op.types else Type(None, "i1")
        text = _constant(op.text, kind.element)
        emitter.values[op.results[0]] = Value(kind, lambda _: text)
        return True
    if op.name in ("tt.get_program_id", "tt.get_num_programs"):
        text = ("pid_" if op.name == "tt.get_program_id" else "programs_") + op.text.split()[0]
        emitter.values[op.results[0]] = Value(Type(None, "i32"), lambda _: text)
        return True
    if op.name == "tt.make_range":
        start, kind = op.attribute("start"), parse_type(op.types)
        emitter.values[op.results[0]] = Value(kind, lambda ix: f"({ix[0]} + {start})" if start else f"({ix[0]})")
        return True
    if op.name in ("tt.assert", "tt.print"):
        return True
    if short in CASTS:
        source, target = (parse_type(t) for t in op.types.split(" to "))
        formula, kind = _cast(short, source.element, target.element, C_TYPES[target.element]), target
    elif short in ("cmpi", "cmpf"):
        source = parse_type(op.types)
        kind, formula = Type(source.shape, "i1"), _compared(source.element, op.text.split(",")[0].strip())
    elif op.name == "arith.select":
        chosen, a, b = values
        if a.type.pointer:
            raise Unsupported("select between pointers")
        kind, shaped = a.type, chosen.type.shape is not None
        pick = lambda ix: f"({chosen.at(ix if shaped else [])} ? {a.at(ix)} : {b.at(ix)})"  # noqa: E731
        emitter.define(op.results[0], Value(kind, pick, cost=sum(v.cost for v in values) + 1))
        return True
    elif op.name == "tt.extern_elementwise":
        symbol = re.search(r'symbol = "(\w+)"', op.text)
        kind = parse_type(op.types.split(" -> ")[1])
        if symbol is None or symbol[1] not in LIBRARY:
            raise Unsupported(f"{op.name} {op.text}")
        formula = in_float(kind.element, lambda x: f"({LIBRARY[symbol[1]]}({x}))")
    elif op.types and op.name.startswith(("arith.", "math.", "tt.precise_")):
        kind = parse_type(op.types)
        formula = _arithmetic(op.name, kind.element)
    else:
        return False
    if formula is None:
        return False
    cost = sum(0 if v.array else v.cost for v in values) + (1 if short not in ("extsi", "extui") else 0)
    if op.name.startswith("math.") or op.name == "tt.extern_elementwise":
        cost += 8  # stored if used twice
    emitter.define(op.results[0], Value(kind, lambda ix: formula(*(v.at(ix) for v in values)), cost=cost))
    return True


def _arithmetic(name: str, element: str) -> Callable[..., str] | None:
    short = name.split(".")[1]
    if short in BINARY:
        return in_float(element, lambda a, b: f"({a} {BINARY[short]} {b})")
    if short in UNSIGNED:
        return lambda a, b: f"((uint{element[1:]}_t)({a}) {UNSIGNED[short]} (uint{element[1:]}_t)({b}))"
    if short in CHOICE:
        return in_float(element, CHOICE[short].format)
    if name == "tt.precise_divf":
        return lambda a, b: f"({a} / {b})"
    if name == "math.fma":
        return in_float(element, lambda a, b, c: f"fmaf({a}, {b}, {c})")
    if name in UNARY and element != "f64":
        return in_float(element, lambda a: f"({UNARY[name]}({a}))")
    return None
