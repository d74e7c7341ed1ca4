"""What a check of muP says: a row for every tensor and quantity, and one verdict over all.

Audit and coordinate check share these, so that a slope that was derived and one that was measured read alike, and
so that both name a broken rule in the same words.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from dataclasses import asdict, dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from crystal.mup.tolerances import SAME_POWER

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Verdict = Literal["PASS", "FAIL", "INCONCLUSIVE"]
SEVERITY: dict[Verdict, int] = {"PASS": 0, "INCONCLUSIVE": 1, "FAIL": 2}


class CheckError(ValueError):
    """A check that cannot be made as asked; the message says why, in one line."""


@dataclass(frozen=True)
class Row:
    """One tensor (or activation) and one quantity of it.

    slope: exponent of width (or depth) found; ci: its 95% confidence interval, equal ends where it is exact;
    expected: the rule's exponent. None where a row is not about an exponent.
    """

    name: str
    quantity: str
    slope: float | None
    ci: tuple[float, float] | None
    expected: float | None
    verdict: Verdict
    rule: str
    message: str = ""


@dataclass
class Report:
    """All rows; `notes` are remarks that decide nothing. accept: names, or patterns of names (*), of rows that may be
    INCONCLUSIVE."""

    rows: list[Row]
    seconds: float
    notes: list[str] = field(default_factory=list)
    accept: tuple[str, ...] = field(default=(), kw_only=True)

    @property
    def verdict(self) -> Verdict:
        """FAIL if any row fails, else INCONCLUSIVE if any is that was not accepted, else PASS."""
        return overall(row.verdict for row in self.rows if not self.accepted(row))

    def accepted(self, row: Row) -> bool:
        """Is this row INCONCLUSIVE, and was that allowed by name?"""
        return row.verdict == "INCONCLUSIVE" and any(fnmatch.fnmatchcase(row.name, name) for name in self.accept)

    @property
    def failures(self) -> list[Row]:
        return [row for row in self.rows if row.verdict == "FAIL"]

    @property
    def unsettled(self) -> list[Row]:
        """Rows that are INCONCLUSIVE and were not accepted."""
        return [row for row in self.rows if row.verdict == "INCONCLUSIVE" and not self.accepted(row)]

    def remarks(self) -> list[str]:
        """The notes, what was accepted though INCONCLUSIVE, and names to be accepted that no such row has."""
        accepted = list(dict.fromkeys(row.name for row in self.rows if self.accepted(row)))
        said = ", ".join(accepted[:8]) + (f" and {len(accepted) - 8} more" if len(accepted) > 8 else "")
        unmet = [name for name in self.accept if not any(fnmatch.fnmatchcase(row, name) for row in accepted)]
        return [
            *self.notes,
            *([f"accepted as INCONCLUSIVE: {said}"] if accepted else []),
            *(f"accept {name}: nothing of that name is INCONCLUSIVE" for name in unmet),
        ]

    def as_dict(self) -> dict:
        """JSON-ready: verdict, seconds, tensors, notes, and names of rows that were accepted."""
        rows, accepted = [asdict(row) for row in self.rows], sorted({r.name for r in self.rows if self.accepted(r)})
        about = {"verdict": self.verdict, "seconds": round(self.seconds, 3)}
        return about | {"tensors": rows, "notes": self.notes, "accepted": accepted}

    def __str__(self) -> str:
        return _presentation(self).text(self)

    def to_html(self) -> str:
        """An HTML document that needs nothing else: verdict, what is wrong, all rows."""
        return _presentation(self).html(self)

    def _repr_html_(self) -> str:
        return _presentation(self).cell(self)

    def plot(self) -> Figure:
        """A figure of matplotlib: the exponents found and expected, and what fails by name."""
        return _presentation(self).figure(self)


@dataclass(frozen=True)
class Presentation:
    """How a kind of report is shown: as text, as an HTML document, in a notebook's cell, as a figure."""

    text: Callable[[Any], str]
    html: Callable[[Any], str]
    cell: Callable[[Any], str]
    figure: Callable[[Any], Figure]


PRESENTATIONS: dict[type[Report], Presentation] = {}  # report.py, which knows page and picture, puts them here


def _presentation(report: Report) -> Presentation:
    return next(PRESENTATIONS[kind] for kind in type(report).__mro__ if kind in PRESENTATIONS)


def overall(verdicts: Iterable[Verdict]) -> Verdict:
    """The worst of them; INCONCLUSIVE when there is nothing to judge."""
    seen = set(verdicts)
    return "FAIL" if "FAIL" in seen else "PASS" if seen == {"PASS"} else "INCONCLUSIVE"


def faults(rows: Sequence[Row]) -> list[list[Row]]:
    """Rows that say the same, together: each distinct fault with all tensors that have it, causes only.

    An activation that grows because a tensor's rule is broken says nothing new, so activations are listed only
    when no tensor is at fault.
    """
    causes = [row for row in rows if row.quantity.split()[0] not in EFFECTS] or list(rows)
    alike: dict[tuple, dict[str, Row]] = {}  # (quantity, what is wrong) → tensor → row
    for row in causes:
        alike.setdefault((row.quantity, row.message.rpartition(": ")[2]), {})[row.name] = row
    return [list(named.values()) for named in alike.values()]


def summary(rows: Sequence[Row], limit: int = 8) -> list[str]:
    """The lines a reader needs: each of `faults` once, with how many more tensors have it."""
    lines = [same[0].message + (f", and so {len(same) - 1} more" if len(same) > 1 else "") for same in faults(rows)]
    more = len(lines) - limit
    return lines[:limit] + ([f"… and {more} more faults"] if more > 0 else [])


EFFECTS = ("size", "change", "push", "multiplier")  # what shows when tensors are right by themselves


def explain(
    quantity: str, role: str | None, slope: float, expected: float, group: int | None = None, rule: str | None = None
) -> str:
    """What most likely is wrong, given which exponent was found where another was expected.

    role: a Role, or "inner output" for a map to a fixed size inside the model. rule: of the optimizer, if not adam.
    """
    off = slope - expected
    where = "" if group is None else f" (optimizer group {group})"
    if quantity in ("lr", "update"):
        if rule not in (None, "adam"):
            return f"its LR scales with the wrong power of width for {rule.upper() if rule == 'sgd' else 'Muon'}{where}"
        if role == "hidden" and _near(off, 1):
            return f"its LR is not divided by the width multiplier{where}"
        if role == "hidden" and _near(off, 0.5):
            return f"its LR is divided by the square root of the width multiplier only{where}"
        if role == "hidden" and _near(off, -1):
            return f"its LR is divided by the width multiplier twice{where}"
        if role != "hidden" and _near(off, -1):
            return f"its LR is divided by the width multiplier, which is for hidden matrices only{where}"
        return f"its LR scales with the wrong power of width{where}"
    if quantity == "init":
        if role == "hidden" and _near(off, 0.5):
            return "its init sigma is not divided by the square root of the width multiplier"
        if role == "hidden" and _near(off, -0.5):
            return "its init sigma is divided by the width multiplier, its square root is wanted"
        if role != "hidden" and _near(off, -0.5):
            return "its init sigma is divided by sqrt(width multiplier), which is for hidden matrices only"
        if _near(off, 0.5):
            return "its init sigma grows as sqrt(width multiplier), as mup.set_base_shapes makes a tied readout's"
        return "its init sigma scales with the wrong power of width"
    if quantity == "forward":
        if role in ("output", "inner output"):
            what = "logits are" if role == "output" else "it maps the width to a fixed size, and its output is"
            if _near(off, 1):
                return f"{what} not divided by the width multiplier"
            if _near(off, 0.5):
                return f"{what} divided by the square root of the width multiplier, the multiplier itself is wanted"
            if _near(off, -1):
                return f"{what} divided by the width multiplier twice"
        return "a forward multiplier scales with the wrong power of width"
    if quantity == "attention":
        return "scores are scaled by 1/sqrt(d_head), muP wants 1/d_head" if _near(off, 0.5) else "scores' scale is off"
    if quantity == "weight decay":
        return f"weight decay scales with the wrong power of width{where}"
    return "it grows" if off > 0 else "it dies out"


def _near(x: float, y: float) -> bool:
    return abs(x - y) < SAME_POWER
