"""Token sequences that begin alike, arranged so that what they share goes through the model once.

Sequences are put into a tree of segments, sorted, each distinct prefix once. The tree is then cut into *rows*, which
the model reads side by side in batches. A row is a small tree laid out flat: every token sees its ancestors alone, so
four answers follow one question, each at the question's end. A segment that many rows begin with (the examples of a
few-shot prompt) becomes a *trunk*: it is read once, and its keys and values are kept for all the rows above it.

Where to cut is decided by cost. A row of T tokens on a trunk of P costs T (a + b (P + T)): a operations a token for
the weights' products, b for each pair of a query and a key, masked or not. One row for several sequences saves what
they share, and pays for the pairs between them that the mask throws away.
"""

from __future__ import annotations

import math
from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np

_DEEPEST = 100  # branchings below one another; what sequences share further down is not looked for


@dataclass
class Node:
    """A segment of tokens, what follows it, and the number of the sequence that ends with it (-1: none does)."""

    tokens: np.ndarray
    children: list[Node] = field(default_factory=list)
    ends: int = -1


@dataclass
class Row:
    """A tree laid out flat: its root, and its number of tokens."""

    root: Node
    size: int


@dataclass
class Trunk:
    """Tokens [P] that rows, and further trunks, come after."""

    tokens: np.ndarray
    rows: list[Row]
    trunks: list[Trunk]


@dataclass(frozen=True)
class Cost:
    """a, b: see above, in any unit. trunk: of having one at all, for its rows form batches of their own."""

    a: float
    b: float
    trunk: float

    def row(self, size: int, prefix: int) -> float:
        """Of a row of so many tokens on a trunk of so many."""
        return size * (self.a + self.b * (prefix + size))

    def growth(self, size: int, prefix: int) -> float:
        """Of reading a trunk: from the first token on it is plain causal, half the pairs at twice the speed."""
        return self.row(size, prefix) if prefix else size * (self.a + self.b * size / 4)


def arrange(sequences: Sequence[np.ndarray], cost: Cost) -> Trunk:
    """Rows and trunks for int sequences, none of them empty, no two equal: a trunk of no tokens that holds all.

    Every sequence is a path from the first tokens of its trunks to a node whose `ends` is its number.
    """
    order = sorted(range(len(sequences)), key=lambda i: sequences[i].astype(">u4").tobytes())
    ordered = [sequences[i] for i in order]
    shared = [0, *(_shared(a, b) for a, b in pairwise(ordered))]
    roots = _nodes(ordered, order, shared, 0, len(ordered), 0, 0)
    return _joined([_cut(root, 0, cost) for root in roots], np.empty(0, np.int64))


def _shared(a: np.ndarray, b: np.ndarray) -> int:
    """How many first tokens two sequences have in common."""
    length = min(len(a), len(b))
    different = np.flatnonzero(a[:length] != b[:length])
    return int(different[0]) if len(different) else length


def _nodes(ordered, order, shared, low: int, high: int, depth: int, level: int) -> list[Node]:
    """The nodes of sequences low … high-1, which have `depth` tokens in common, from there on."""
    starts = [low, *(i for i in range(low + 1, high) if shared[i] == depth or level == _DEEPEST), high]
    nodes = []
    for first, stop in pairwise(starts):
        end = min([len(ordered[first]), *shared[first + 1 : stop]])
        node = Node(ordered[first][depth:end])
        if len(ordered[first]) == end:  # the shortest stands first
            node.ends = order[first]
            first += 1
        if first < stop:
            node.children = _nodes(ordered, order, shared, first, stop, end, level + 1)
        nodes.append(node)
    return nodes


def _cut(node: Node, prefix: int, cost: Cost) -> Trunk:
    """The cheapest rows for a tree, on a trunk of no tokens."""
    length = len(node.tokens)
    parts = [_cut(child, prefix + length, cost) for child in node.children]
    inner = _joined(parts, node.tokens)
    if node.ends >= 0:  # a sequence that others go on from
        inner.rows.append(Row(Node(node.tokens[length:], ends=node.ends), 0))
    rows, trunks = [row.size for row in inner.rows], [len(trunk.tokens) for trunk in inner.trunks]
    size = length + sum(rows)

    def cost_of(more: int, prefix: int) -> float:
        """Of all that is above, each with so many tokens in front."""
        return sum(cost.row(more + n, prefix) for n in rows) + sum(cost.growth(more + n, prefix) for n in trunks)

    whole = math.inf if trunks else cost.row(size, prefix)
    apart = cost_of(length, prefix)
    trunk = cost.trunk + cost.growth(length, prefix) + cost_of(0, prefix + length)
    if whole <= min(apart, trunk):
        return Trunk(node.tokens[:0], [Row(node, size)], [])
    return _before(node.tokens, inner) if apart <= trunk else Trunk(node.tokens[:0], [], [inner])


def _joined(parts: list[Trunk], tokens: np.ndarray) -> Trunk:
    return Trunk(tokens, [row for p in parts for row in p.rows], [trunk for p in parts for trunk in p.trunks])


def _before(tokens: np.ndarray, inner: Trunk) -> Trunk:
    """The rows and trunks of `inner`, each with these tokens in front."""
    rows = [Row(_after(tokens, row.root), len(tokens) + row.size) for row in inner.rows]
    trunks = [Trunk(np.concatenate([tokens, t.tokens]), t.rows, t.trunks) for t in inner.trunks]
    return Trunk(tokens[:0], rows, trunks)


def _after(tokens: np.ndarray, node: Node) -> Node:
    return Node(np.concatenate([tokens, node.tokens]), node.children, node.ends)


def packed(rows: Sequence[Row], most: int) -> tuple[list[Row], list[Row]]:
    """A batch of at most so many rows, of those on one trunk, sorted, the longest first; and the rows that are left.

    All rows of a batch are filled up to the longest, so shorter ones are laid side by side there, best fit first.
    """
    longest = rows[0].size
    together: list[list[Row]] = []
    room: list[tuple[int, int]] = []  # (tokens, number of the row), sorted
    left = []
    for row in rows:
        at = bisect_left(room, (row.size, 0))
        if at < len(room):
            free, number = room.pop(at)
        elif len(together) < most:
            free, number = longest, len(together)
            together.append([])
        else:
            left.append(row)
            continue
        together[number].append(row)
        insort(room, (free - row.size, number))
    return [_beside(some) for some in together], left


def _beside(rows: list[Row]) -> Row:
    """Rows as one, none of which sees another."""
    if len(rows) == 1:
        return rows[0]
    return Row(Node(np.empty(0, np.int64), [row.root for row in rows]), sum(row.size for row in rows))
