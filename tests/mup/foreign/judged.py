"""Both verdicts on a family or one of its faults; `python -m tests.mup.foreign.judged` prints docs/mup.md's table."""

from __future__ import annotations

import re
import sys
from collections import Counter

import torch
from torch.utils._pytree import tree_map

from crystal.mup.audit import audit
from crystal.mup.coord_check import coord_check
from crystal.mup.measure import Task
from crystal.mup.verdict import Report, summary

from . import families
from .family import Broken, Family


def audited(family: Family, broken: Broken | None = None) -> Report:
    """The static audit, with the training loss as its one call."""
    loss = _of(family, broken, "loss")

    def training(model: torch.nn.Module) -> torch.Tensor:
        device = next(model.parameters()).device
        return loss(model, tree_map(lambda x: x.to(device) if isinstance(x, torch.Tensor) else x, family.batch(0)))

    return audit(
        _of(family, broken, "factory"),
        width=family.target,
        base_width=family.base,
        optimizer=_of(family, broken, "optimizer"),
        calls={"training": training},
        layouts=family.layouts,
        accept=family.accept,
    )


def checked(family: Family, broken: Broken | None = None) -> Report:
    """The coordinate check."""
    factory = _of(family, broken, "factory")

    def model(width: int, seed: int) -> torch.nn.Module:
        torch.manual_seed(seed)
        return factory(width)

    task = Task(model, _of(family, broken, "optimizer"), _of(family, broken, "loss"), family.batch)
    return coord_check(task, family.widths, layouts=family.layouts, accept=family.accept)


def _of(family: Family, broken: Broken | None, part: str):
    return getattr(broken, part, None) or getattr(family, part)


def named(report: Report, broken: Broken) -> bool:
    """Does a failing row name the tensor that the fault is in?"""
    return any(broken.tensor in row.message for row in report.failures)


def said(report: Report) -> str:
    """Verdict and reasons, for a test that fails."""
    bad = report.failures or [row for row in report.rows if row.verdict != "PASS"]
    return f"{report.verdict}: {summary(bad)}"


def main() -> None:
    """Print one line an architecture: right forms and faults, by verdict."""
    torch.set_num_threads(1)
    lines: dict[str, list[Counter]] = {}
    everything = families()
    for number, family in enumerate(everything):
        print(f"{number + 1}/{len(everything)} {family.name}, {family.form}", file=sys.stderr)
        counts = lines.setdefault(family.name, [Counter(), Counter()])
        for place, tool, judge in ((0, "audit", audited), (1, "coord-check", checked)):
            count = counts[place]
            report = judge(family)
            count["right"] += 1
            count[f"right {report.verdict}"] += 1
            for broken in family.broken:
                if tool in broken.by:
                    report = judge(family, broken)
                    count["faults"] += 1
                    count[f"fault {report.verdict}"] += 1
                    count["named"] += named(report, broken)
    print("| architecture | right forms | PASS: audit, check | faults: audit, check | caught and named: audit, check |")
    print("|---|---|---|---|---|")
    for name, (a, c) in lines.items():
        passed = f"{a['right PASS']}, {c['right PASS']}"
        print(f"| {name} | {a['right']} | {passed} | {a['faults']}, {c['faults']} | {a['named']}, {c['named']} |")
    total = [sum((counts[place] for counts in lines.values()), Counter()) for place in (0, 1)]
    for tool, count in zip(("audit", "coord-check"), total, strict=True):
        print(f"{tool}: {re.sub(r'Counter|[(){}]', '', str(dict(sorted(count.items()))))}", file=sys.stderr)
    a, c = total
    passed = f"{a['right PASS']}, {c['right PASS']}"
    print(f"| all | {a['right']} | {passed} | {a['faults']}, {c['faults']} | {a['named']}, {c['named']} |")


if __name__ == "__main__":
    main()
