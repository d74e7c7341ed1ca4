"""Reads a model's forward multipliers off recordings of its forward pass, at several widths side by side.

muP's multipliers are constants that the code applies somewhere between a weight and whatever consumes its output:
embedding x alpha, logits / m, scores x 1/d, residual branch x m_L^-alpha. Every weight's output is followed through
views, casts, rotations, sums, products with constants and further weights up to the first operation that is not
homogeneous (a nonlinearity, a softmax, the loss) or does not care for scale (a norm). What it has met by then is a
*chain*: the weights whose product it is, and the scalars applied on the way. A chain of one weight gives that
weight's multiplier; where several weights multiply (q with k, low-rank factors, a gain and the matrix after it) only
the product of their scales means anything, and that is what is kept.

Widths are followed in lockstep, so that every use of a tensor is compared with the same use at another width.
An operation that is not in aten_ops.py ends a chain as "unknown": nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from crystal.mup.chains import Chain, Ended, Loose, Product, Vector, applied, is_scores
from crystal.mup.forward_graph import Graph, record
from crystal.mup.forward_reading import Reading


@dataclass(frozen=True)
class Trace:
    """What a call does with every weight. ended: all chains; modules: name, key → chain → total factors where that
    module returns; unlike: why widths could not be followed side by side; loose: activations whose scale counts."""

    ended: tuple[Ended, ...]
    modules: dict[tuple[str, str], dict[Chain, Vector]] = field(default_factory=dict)
    unlike: str = ""
    loose: tuple[Loose, ...] = ()


def follow(graphs: Sequence[Graph]) -> Trace:
    """Interpret the recordings of one call at several widths, which must run the same operations."""
    if unlike := _difference(graphs):
        return Trace((), {}, unlike)
    ended, loose, modules = Reading(graphs).read()
    return Trace(ended, modules, loose=loose)


def _difference(graphs: Sequence[Graph]) -> str:
    first = graphs[0].nodes
    for graph in graphs[1:]:
        for a, b in zip(first, graph.nodes, strict=False):
            if a.op != b.op or [r.number for r in a.refs] != [r.number for r in b.refs]:
                return f"one width runs {a.op} where another runs {b.op}"
        if len(first) != len(graph.nodes):
            return f"one width runs {len(first)} operations, another {len(graph.nodes)}"
    return ""


def trace_multipliers(model: nn.Module, call: Callable[[nn.Module], Any]) -> Multipliers:
    """What one forward pass of one model applies. call: runs it, and makes its own inputs, on the model's device."""
    device = next((p.device for p in model.parameters()), torch.device("cpu"))
    with device:
        return multipliers(follow([record(model, call)]))


@dataclass(frozen=True)
class Multipliers:
    """outputs: (tensor, use) → factors of its output, use being `lookup` (an embedding) or `matmul`; scores: (query's
    tensor, key's tensor) → (factors, length of the dot products). More than one factor: applied differently in places.
    """

    outputs: dict[tuple[str, str], frozenset[float]]
    scores: dict[tuple[str, str], tuple[frozenset[float], int]]


def multipliers(trace: Trace, width: int = 0) -> Multipliers:
    """At one of the widths that were traced."""
    outputs: dict[tuple[str, str], set[float]] = {}
    scores: dict[tuple[str, str], tuple[set[float], int]] = {}
    for end in trace.ended:
        for use, factor in applied(end):
            if use.kind in ("lookup", "matmul"):
                outputs.setdefault((use.tensor, use.kind), set()).add(factor[width])
        for part in end.chain:
            if isinstance(part, Product) and is_scores(part):
                found = scores.setdefault(part.names, (set(), part.length[width]))
                found[0].add(end.total()[width])
    return Multipliers(
        {key: frozenset(found) for key, found in outputs.items()},
        {key: (frozenset(found), length) for key, (found, length) in scores.items()},
    )
