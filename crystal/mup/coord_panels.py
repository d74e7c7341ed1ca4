"""What a picture of a coordinate check shows: a panel for each quantity, a line for each tensor or activation.

The figure for a paper (coord_plots.py) and the page (coord_page.py) draw the same panels.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from crystal.mup.coord_check import CoordCheck
from crystal.mup.coord_rows import by_depth
from crystal.mup.measure import OUTPUT
from crystal.mup.verdict import SEVERITY, Row, Verdict

# Okabe and Ito's colors, which color-blind readers tell apart, by the part of the model that a line belongs to.
COLORS = {
    "embedding": "#0072B2",  # blue
    "attention": "#009E73",  # green
    "mlp": "#E69F00",  # orange
    "norms and residual stream": "#CC79A7",  # pink
    "output": "#000000",
    "other": "#56B4E9",  # sky blue
    "mixed": "#595959",  # of a label for lines of several kinds
}
FAILS, OPEN = "#D55E00", "#8C6D1F"  # vermilion; brown, for INCONCLUSIVE


@dataclass(frozen=True)
class Line:
    """values: of one tensor or activation at each size, the mean over seeds; row: its slope and verdict."""

    name: str
    kind: str  # a key of COLORS
    values: tuple[float, ...]
    row: Row


@dataclass(frozen=True)
class Panel:
    """One quantity of one check. lines: those that have a place on a logarithmic axis, worst last so that they lie on
    top; left_out: names of those that are zero or not finite at some size."""

    quantity: str  # as in the rows: `size t=4`
    statistic: str  # what its y axis shows
    lines: tuple[Line, ...]
    left_out: tuple[str, ...]

    @property
    def expected(self) -> tuple[float, ...]:
        """The distinct exponents that the rules give its lines."""
        return tuple(sorted({line.row.expected for line in self.lines if line.row.expected is not None}))

    def guide(self, expected: float) -> float:
        """Where the dashed line of an expected exponent begins: where the worst of the lines that should have it does,
        or, if all pass, the one in the middle. (An output that passes may fall, so no guide begins there.)"""
        lines = [line for line in self.lines if line.row.expected == expected]
        failing = [line for line in lines if line.row.verdict == "FAIL"]
        steady = [line for line in lines if line.name != OUTPUT] or lines
        middle = sorted(steady, key=lambda line: line.values[0])[len(steady) // 2]
        return (failing[-1] if failing else middle).values[0]

    def count(self) -> str:
        """`14 of 21 fail`, as a heading says it."""
        return tally([line.row.verdict for line in self.lines] + ["FAIL"] * len(self.left_out))


def tally(verdicts: Sequence[Verdict]) -> str:
    """`2 of 7 fail, 1 inconclusive`, or `all 7 pass`."""
    bad, unclear = verdicts.count("FAIL"), verdicts.count("INCONCLUSIVE")
    said = [f"{bad} of {len(verdicts)} fail"] * bool(bad) + [f"{unclear} inconclusive"] * bool(unclear)
    return ", ".join(said) or f"all {len(verdicts)} pass"


def panels(check: CoordCheck, shown: Iterable[str]) -> list[Panel]:
    """A panel for each of the quantities `shown`, empty where the check has no such rows."""
    rows = {(row.name, row.quantity): row for row in check.rows}
    found = []
    for quantity in shown:
        kind, _, step = quantity.partition(" t=")
        means = _means(check, kind, int(step or 0))
        lines, left_out = [], []
        for name, values in means.items():
            row = rows.get((name, quantity))
            if row is None:
                continue
            if all(0 < v < math.inf for v in values):
                lines.append(Line(name, kind_of(name), values, row))
            else:
                left_out.append(name)
        lines.sort(key=lambda line: (SEVERITY[line.row.verdict], off(line.row)))
        found.append(Panel(quantity, statistic(quantity), tuple(lines), tuple(left_out)))
    return found


def limits(row: Sequence[Panel], ratio: float) -> tuple[float, float]:
    """Of the y axis of panels side by side: lines and guides with some air, and at least two octaves, or noise would
    fill the panel. ratio: of the greatest size to the smallest."""
    values = [v for panel in row for line in panel.lines for v in line.values]
    values += [panel.guide(power) * ratio**power for panel in row for power in panel.expected]
    low, high = min(values, default=0.5), max(values, default=2.0)
    air = max((high / low) ** 0.08, 2 / (high / low) ** 0.5, 1.1)
    return low / air, high * air


def quantities(check: CoordCheck) -> list[str]:
    """What the rows of a check are about, in the order in which it is drawn; what a tensor itself does comes first."""
    judged = {row.quantity for row in check.rows}
    last = check.steps
    return [q for q in ("init", "update", "push", "size t=1", f"size t={last}", f"change t={last}") if q in judged]


def statistic(quantity: str) -> str:
    """What is measured, for an axis: `mean |output|, step 4`."""
    kind, _, step = quantity.partition(" t=")
    return {
        "init": "rms of weights, at init",
        "update": "rms of first update",
        "push": "rms change of output\nby first update alone",
        "size": f"mean |output|, step {step}",
        "change": f"mean |change of output|,\nstep 1 to {step}",
    }[kind]


def off(row: Row) -> float:
    """By how much a slope misses what the rule gives; infinite where there is no slope."""
    return math.inf if row.slope is None or row.expected is None else abs(row.slope - row.expected)


def worst_first(rows: Sequence[Row]) -> list[Row]:
    """FAIL, INCONCLUSIVE, PASS; within a verdict, what misses its exponent by most comes first."""
    return sorted(rows, key=lambda row: (-SEVERITY[row.verdict], -off(row)))


def exponent(x: float) -> str:
    """-1/2 or 0, as rules are printed."""
    return {-0.5: "-1/2", 0.5: "1/2"}.get(x, f"{x:g}")


def heading(check: CoordCheck, first: CoordCheck) -> str:
    """`amber, mup: PASS (for comparison)`, with what it does not share with the first check, its seeds."""
    seeds = seeds_of(check)
    beside = "" if check is first else "for comparison" + (f", {seeds}" if seeds != seeds_of(first) else "")
    return f"{check.label or 'model'}: {check.verdict}" + (f" ({beside})" if beside else "")


def seeds_of(check: CoordCheck) -> str:
    """`2 seeds`."""
    seeds = len({m.seed for m in check.measured})
    return f"{seeds} seeds" if seeds != 1 else "1 seed"


def caption(check: CoordCheck) -> str:
    """How it was measured, in one sentence: sizes, seeds, steps, and what the caller of the check said."""
    told = check.settings
    facts = [
        f"{check.along}s {', '.join(map(str, check.sizes))}",
        f"mean over {seeds_of(check)}",
        f"{check.steps} steps",
        *(f"{key} {value:g}" if isinstance(value, float) else f"{key} {value}" for key, value in told.items()),
    ]
    falls = check.along == "width" and any(row.name == OUTPUT for row in check.rows)
    return "; ".join(facts + ["the output may fall as width^-1/2"] * falls)


def kind_of(name: str) -> str:
    """The part of the model that a tensor or activation belongs to, by its name."""
    inner = re.sub(r"^.*?\.(\d+|last)(\.|$)", "", name.lower())  # inside its block; "" is the block's own output
    if inner == "" or "norm" in inner or re.search(r"\bln", inner):
        return "norms and residual stream"
    if "attn" in inner or "attention" in inner:
        return "attention"
    if any(word in inner for word in ("mlp", "feed_forward", "ffn")):
        return "mlp"
    if "emb" in inner or re.search(r"\bwte\b", inner):
        return "embedding"
    return "output" if inner.startswith(("output", "head", "lm_head", "unembed")) else "other"


@dataclass(frozen=True)
class Bundle:
    """Lines that run together, and the name that they share. kind: theirs, or `mixed`."""

    end: float  # log2 of the value at the greatest size
    label: str
    kind: str
    verdict: Verdict


def bundles(panel: Panel, octaves: float, most: int, room: int) -> list[Bundle]:
    """Names for all lines, from the top down. octaves: the height of the panel; most: labels that have a place in it;
    room: letters of a label. Lines of one verdict that begin and end close together share a label."""
    apart = octaves / most
    while len(groups := _together(panel.lines, apart)) > most:
        apart *= 1.25
    blocks: dict[str, set[str]] = {}  # a name inside its block → the blocks that have it
    for line in panel.lines:
        block, bare = _split(line.name)
        blocks.setdefault(bare, set()).add(block)
    found = []
    for lines in groups:
        kinds = {line.kind for line in lines}
        end = sum(math.log2(line.values[-1]) for line in lines) / len(lines)
        label = _folded([line.name for line in lines], blocks, room)
        found.append(Bundle(end, label, kinds.pop() if len(kinds) == 1 else "mixed", lines[0].row.verdict))
    return sorted(found, key=lambda bundle: -bundle.end)


def spread(ends: Sequence[float], apart: float, lowest: float) -> list[float]:
    """Places for labels at `ends`, which go down: `apart` from one another and none below `lowest`."""
    places: list[float] = []
    for end in ends:
        places.append(min(end, places[-1] - apart) if places else end)
    for i in reversed(range(len(places))):  # and up again, where the last ones fell out
        places[i] = max(places[i], places[i + 1] + apart if i + 1 < len(places) else lowest)
    return places


def _together(lines: Sequence[Line], apart: float) -> list[list[Line]]:
    groups: list[list[Line]] = []
    for line in sorted(lines, key=lambda line: -line.values[-1]):
        for group in groups:
            ends = zip((line.values[0], line.values[-1]), (group[0].values[0], group[0].values[-1]), strict=True)
            if line.row.verdict == group[0].row.verdict and all(abs(math.log2(a / b)) < apart for a, b in ends):
                group.append(line)
                break
        else:
            groups.append([line])
    return groups


def _split(name: str) -> tuple[str, str]:
    """(block, what is in it): `blocks.1.attn.q.weight` → ("1", "attn.q"); ("", name) outside blocks."""
    name = name.removesuffix(".weight")
    found = re.match(r"[^.]+(?:\.[A-Za-z_]\w*)*?\.(\d+|last)\.(.+)$", name)
    return (found[1], found[2]) if found else ("", name)


def _folded(names: Sequence[str], blocks: dict[str, set[str]], room: int) -> str:
    """`attn.{k,q,v}, mlp.up +2`: names of one module together, the block's number where only some blocks are meant."""
    here: dict[str, set[str]] = {}
    for block, bare in map(_split, names):
        here.setdefault(bare, set()).add(block)
    modules: dict[str, list[str]] = {}
    for bare in sorted(here):
        some = "" if here[bare] == blocks[bare] else ",".join(sorted(here[bare])) + "."
        module, dot, leaf = bare.rpartition(".")
        modules.setdefault(some + (module + dot or leaf), []).append(leaf if dot else "")
    label, left = "", len(here)
    for module, leaves in modules.items():
        for count in range(len(leaves), 0, -1):  # as many of the module's as there is room for
            word = module + (leaves[0] if count == 1 else "{" + ",".join(leaves[:count]) + "}")
            longer = f"{label}, {word}" if label else word
            if len(longer) + 4 * (left > count) <= room or not (label or count > 1):
                label, left = longer, left - count
                break
    more = f" +{left}" if left else ""
    return (label if len(label + more) <= room else label[: room - 1 - len(more)] + "…") + more


def _means(check: CoordCheck, quantity: str, step: int) -> dict[str, tuple[float, ...]]:
    """name → mean over seeds at each size, for names that every size has. step 0: whenever it was measured."""
    values: dict[str, dict[int, list[float]]] = {}
    for m in check.measured:
        for (name, q, t), value in m.values.items():
            if check.along == "depth":
                name = by_depth(name, m.size, check.blocks)
            if q == quantity and step in (0, t):
                values.setdefault(name, {}).setdefault(m.size, []).append(value)
    return {
        name: tuple(sum(by_size[s]) / len(by_size[s]) for s in check.sizes)
        for name, by_size in values.items()
        if len(by_size) == len(check.sizes)
    }
