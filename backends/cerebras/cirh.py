"""Cerebras IR, read as text: what a lowered training step takes in, gives back, and what depends on what.

A graph is one MLIR function of operations `%x = cirh.Op %a, %b …`. Each argument that is state carries the name of
its tensor and the number of the output that replaces it (`tf.aliasing_output`): on a Cerebras system that is the
weight streamed in and the updated weight streamed back.
"""

from __future__ import annotations

import re
from collections import Counter, deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

STEP = "state.schedulers.0.last_epoch"
_ARGUMENT = re.compile(r"%(arg\d+): tensor<([^>]*)>(?: \{([^}]*)\})?")
_OPERATION = re.compile(r"^\s*%(\w+)(?::\d+)? = ([\w.]+)(.*)$")
_VALUE = re.compile(r"%(\w+)")


@dataclass(frozen=True)
class Argument:
    """One input of the graph: tensor is the state's name, or the input's for a batch; output replaces it, if any."""

    value: str
    tensor: str
    shape: tuple[int, ...]
    dtype: str
    output: int | None


@dataclass(frozen=True)
class Graph:
    """A lowered step. operands: value → the values it is computed from; outputs: what is returned, in order."""

    arguments: tuple[Argument, ...]
    operands: dict[str, tuple[str, ...]]
    operations: Counter  # name → how often
    outputs: tuple[str, ...]
    matmuls: Counter  # element type of the result → how often
    empty: int  # operations on tensors without elements, which no compiler expects

    @cached_property
    def state(self) -> dict[str, list[Argument]]:
        """Arguments by the name of their tensor; a list, for a name should stand there once and may not."""
        found: dict[str, list[Argument]] = {}
        for argument in self.arguments:
            found.setdefault(argument.tensor, []).append(argument)
        return found

    def depends(self, value: str, on: str) -> bool:
        """Whether `value` is computed from `on`. Nearest first: an update lies a few operations behind its weight."""
        seen, ahead = {value}, deque([value])
        while ahead:
            here = ahead.popleft()
            if here == on:
                return True
            new = [v for v in self.operands.get(here, ()) if v not in seen]
            seen.update(new)
            ahead.extend(new)
        return False

    def computed_from(self, value: str) -> set[str]:
        """All values that depend on `value`, itself included; operations stand in order."""
        found = {value}
        for here, values in self.operands.items():
            if not found.isdisjoint(values):
                found.add(here)
        return found


def read(file: Path) -> Graph:
    """The graph in a cirh.mlir. Raises ValueError when it holds none."""
    arguments, operands, outputs, empty = (), {}, None, 0
    operations, matmuls = Counter(), Counter()
    with Path(file).open(encoding="utf-8") as lines:
        for line in lines:
            if line.lstrip().startswith("func "):
                arguments = tuple(_arguments(line.partition(") -> ")[0]))
            elif line.lstrip().startswith("return "):
                outputs = tuple(_VALUE.findall(line.partition(" : ")[0]))
            elif match := _OPERATION.match(line):
                value, operation, rest = match.groups()
                # attributes and types hold no values
                operands[value] = tuple(_VALUE.findall(rest.partition(" : ")[0]))
                operations[operation] += 1
                if operation in ("cirh.MatMul", "cirh.DotGeneral"):
                    matmuls[re.findall(r"(b?f\d+)>", rest)[-1]] += 1
                empty += bool(re.search(r"tensor<(\d+x)*0x", rest.rpartition(" : ")[2]))
    if outputs is None or not arguments:
        raise ValueError(f"{file}: expected a function of Cerebras IR, none found")
    return Graph(arguments, operands, operations, outputs, matmuls, empty)


def _arguments(signature: str) -> list[Argument]:
    found = []
    for value, kind, attributes in _ARGUMENT.findall(signature):
        name = re.search(r'(?:resource_name|input_name) = "([^"]*)"', attributes or "")
        output = re.search(r"aliasing_output = (\d+)", attributes or "")
        *shape, dtype = kind.split("x")
        found.append(
            Argument(
                value, name[1] if name else value, tuple(map(int, shape)), dtype, int(output[1]) if output else None
            )
        )
    return found


def problems(graph: Graph, parameters: dict[str, tuple[int, ...]], order: Sequence[str]) -> list[str]:
    """What is wrong with a lowered training step, a line each; an empty list is a step that keeps the contract.

    parameters: name → shape of every tensor of the model; order: their names in the optimizer's order. Every
    parameter, both moments and both bias corrections are named once, in fp32, read, and written back as something
    that was computed from them; every weight's update, and the step's own count, depend on the step.
    """
    wanted = {f"state.model.{name}": shape for name, shape in parameters.items()}
    for i, name in enumerate(order):
        state = f"state.optimizer.state.{i}"
        wanted |= {f"{state}.exp_avg": parameters[name], f"{state}.exp_avg_sq": parameters[name]}
        wanted |= {f"{state}.beta1_power": (), f"{state}.beta2_power": ()}
    found = [f"{name}: expected the step, a scalar" for name in (STEP,) if len(graph.state.get(name, ())) != 1]
    step = graph.state[STEP][0].value if not found else None
    follows_step = graph.computed_from(step)
    used = {value for values in graph.operands.values() for value in values}
    replaced = Counter(argument.output for argument in graph.arguments if argument.output is not None)
    for name, shape in wanted.items():
        here = graph.state.get(name, [])
        if len(here) != 1:
            found.append(f"{name}: expected once, named {len(here)} times")
            continue
        (argument,) = here
        if argument.dtype != "f32" or argument.shape != tuple(shape):
            found.append(f"{name}: expected f32 {list(shape)}, got {argument.dtype} {list(argument.shape)}")
        if argument.value not in used:
            found.append(f"{name}: is not read")
        if argument.output is None or argument.output >= len(graph.outputs):
            found.append(f"{name}: is not written back")
            continue
        if replaced[argument.output] > 1:
            found.append(f"{name}: output {argument.output} replaces {replaced[argument.output]} tensors")
        written = graph.outputs[argument.output]
        if written == argument.value or not graph.depends(written, argument.value):
            found.append(f"{name}: is written back as it was, or as something else")
        if name.startswith("state.model.") and written not in follows_step:
            found.append(f"{name}: its update does not depend on the step's learning rate")
    extra = {n for n in graph.state if n.startswith(("state.model.", "state.optimizer."))} - set(wanted)
    found += [f"{name}: is not a tensor of the plan" for name in sorted(extra)]
    if graph.empty:
        found.append(f"{graph.empty} operations on tensors without elements")
    return found
