"""The static audit: does a model do, tensor by tensor, what its parametrization says?

The model is built on meta at three widths: base, target, and a second one that tells a width from a number that
happens to be equal; and, where it is small enough, at base and second width on the CPU, since code may do something
else on meta. From the real objects come every tensor's role in each of its uses, what the initialiser draws, which
optimizer group it is in, and what the forward pass multiplies. The exponent of each in the width multiplier is
compared with the rule's. Seconds for a 7B, nothing is trained, and the two faults that activations hide (1/sqrt(d)
attention and a readout / sqrt(m), which look *better* than right ones in the first steps) are as visible as any other.

PASS means that every trainable tensor and every rule has a row with evidence. What could not be judged is a row
INCONCLUSIVE with its reason, and so is the whole, unless the caller accepts it by name.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import mup
from torch import nn

from crystal.mup.audit_rows import calls_agree, rows_of_pair
from crystal.mup.audit_values import against_plan, scores_are
from crystal.mup.chains import uses_in
from crystal.mup.constraints import Pair, parametrization_named
from crystal.mup.forward_trace import Trace, follow
from crystal.mup.measured_init import measured_inits
from crystal.mup.observe import Calls, Evidence, MakesOptimizer, Observed, is_small, observe
from crystal.mup.optimizers import refuse_zero_lr
from crystal.mup.plan import Layouts, Plan, PlanError, grown, infshapes_of, layouts_beside, uses_of
from crystal.mup.rules import Parametrization, role_of_map
from crystal.mup.verdict import SEVERITY, CheckError, Report, Row


def audit(
    factory: Callable[[int], nn.Module],
    *,
    width: int,
    base_width: int,
    second_width: int | None = None,
    parametrization: str = "mup",
    optimizer: MakesOptimizer | None = None,
    calls: Calls | None = None,
    weight_decay: str | None = None,
    layouts: Layouts | None = None,
    plan: Plan | None = None,
    attention_power: float | None = -1.0,
    scores_scale: float | None = None,
    accept: Sequence[str] = (),
) -> Report:
    """Audit a family of models.

    factory: width → module, initialised as in training; it is called under torch.device("meta"), so any size goes.
    optimizer: module → its real optimizer, or a list of them (nothing is stepped). calls: name → one forward pass of
    the module on inputs that it makes itself, on torch's default device, such as {"training": …, "inference": …};
    every call must apply the same multipliers. Without optimizer or calls that half is INCONCLUSIVE.
    second_width: another width, by default twice the base. weight_decay: "coupled" (one lambda), "independent"
    (lambda * m where lr is / m), None: either, but all tensors alike. layouts: name → (fan_in, fan_out) dimensions of a
    matrix that no known module holds, or None for a tensor that is used by element. plan: exact numbers of the target,
    for an optimizer of base lr 1. attention_power: of the scores' scale in d_head, where d_head grows; None: not
    judged. scores_scale: its exact value at the target's width. accept: names (or patterns) of rows that may be
    INCONCLUSIVE. Raises CheckError where the family cannot be built so, or its optimizer has no rule.
    """
    began = time.perf_counter()
    second = _widths_fit(width, base_width, second_width)
    if weight_decay not in (None, "coupled", "independent"):
        raise CheckError(f"weight_decay: expected coupled, independent or None, got {weight_decay!r}")
    rules = parametrization_named(parametrization)
    widths = (base_width, *sorted({second, width} - {base_width}))
    evidence = _evidence(factory, optimizer, calls, widths, second)
    for e in evidence:
        refuse_zero_lr(e.base.groups or {}, f"at width {base_width}")
    _refuse_unknown(evidence, layouts)
    try:
        known = _layouts(evidence, layouts)
    except PlanError as error:
        name, _, message = str(error).partition(":")
        row = Row(name, "role", None, None, None, "FAIL", rules.source, f"{name}: cannot be classified:{message}")
        return Report([row], time.perf_counter() - began)
    rows: list[dict[int, list[Row]]] = []
    for e in evidence:
        init_read = not _reads_other_inits(e, evidence)
        measured = measured_inits(factory, e.widths, e.seen, second) if init_read and not _on_meta(e) else {}
        rows.append(_rows(e, known, rules, weight_decay, attention_power, second, init_read, measured))
    found = _joined(_without_blind(rows, second))
    found += _missing_halves(optimizer, calls)
    target = evidence[0]
    if width in target.seen:
        place = target.widths.index(width)
        found += calls_agree(target.traces, place)
        if plan is not None:
            found += against_plan(target.seen[width], target.traces, place, plan)
        if scores_scale is not None:
            found += scores_are(target.traces, place, scores_scale)
    notes = _notes(evidence, width)
    return Report(found, time.perf_counter() - began, notes, accept=tuple(accept))


def _widths_fit(width: int, base: int, second: int | None) -> int:
    """The second width. Raises CheckError for widths that are none, or cannot tell."""
    for name, value in (("width", width), ("base_width", base), ("second_width", second)):
        if not (value is None and name == "second_width") and (not isinstance(value, int) or value < 1):
            raise CheckError(f"{name}: expected a positive whole number, got {value!r}")
    second = second or 2 * base
    if len({width, base, second}) < 2 or second == base:
        raise CheckError(f"widths: expected a base, a second and a target that differ, got {base}, {second}")
    return second


def _refuse_unknown(evidence: list[Evidence], layouts: Layouts | None) -> None:
    """Raises CheckError for layouts of tensors that are not there, and for models that do not grow."""
    first = dict(evidence[0].base.model.named_parameters())
    for name, layout in (layouts or {}).items():
        if name not in first:
            raise CheckError(f"layouts: expected names of tensors, got {name}")
        if layout is not None and not all(d in range(first[name].ndim) for d in layout):
            raise CheckError(f"layouts: {name}: expected two of its {first[name].ndim} dimensions, got {layout}")
    shapes = [[tuple(p.shape) for p in o.model.parameters()] for o in evidence[0].seen.values()]
    if all(s == shapes[0] for s in shapes):
        widths = ", ".join(map(str, evidence[0].widths))
        raise CheckError(f"the factory's models have the same tensors at widths {widths}: no dimension grows")


def _evidence(factory, optimizer, calls, widths: tuple[int, ...], second: int) -> list[Evidence]:
    """From meta at all widths, and from the CPU at the two small ones; at least one of them."""
    found, error = [], None
    try:
        seen = {w: observe(lambda w=w: factory(w), optimizer, calls) for w in widths}
        found.append(Evidence(widths, seen, _traces(seen, widths)))
    except CheckError as failed:
        error = failed
    small = (widths[0], second)
    if found and not all(is_small(found[0].seen[w].model) for w in small):
        return found
    try:
        seen = {w: observe(lambda w=w: factory(w), optimizer, calls, "cpu") for w in small}
    except CheckError as failed:
        if not found:
            raise failed from failed.__cause__  # not for being on meta
        return found
    if not any(p.is_meta for p in seen[small[0]].model.parameters()):
        found.append(Evidence(small, seen, _traces(seen, small)))
    if not found:
        raise error or CheckError("the factory made no parameters")
    return found


def _traces(seen: dict[int, Observed], widths: tuple[int, ...]) -> dict[str, Trace]:
    names = [name for name in seen[widths[0]].graphs if all(name in seen[w].graphs for w in widths)]
    return {name: follow([seen[w].graphs[name] for w in widths]) for name in names}


def _on_meta(e: Evidence) -> bool:
    return any(p.is_meta for p in e.base.model.parameters())


def _reads_other_inits(e: Evidence, evidence: list[Evidence]) -> bool:
    """On meta, does the factory leave other initial values than on the CPU (as transformers does)?"""
    return _on_meta(e) and len(evidence) > 1 and {k: str(v) for k, v in evidence[1].base.draws.items()} != {
        k: str(v) for k, v in e.base.draws.items()
    }  # fmt: skip


def _layouts(evidence: list[Evidence], layouts: Layouts | None) -> dict[str, tuple[int, int] | None]:
    """Which dimensions of a tensor are fan_in and fan_out, by the module that holds it; tensors that only the forward
    pass can tell are left out. Raises PlanError for the others, and for a square matrix under a bare x @ w."""
    uses = [use for e in evidence for t in e.traces.values() for end in t.ended for use in uses_in(end.chain)]
    first, widest = evidence[0].base.model, evidence[0].seen[evidence[0].widths[-1]].model
    shapes = {name: p.shape for name, p in widest.named_parameters()}
    square = {
        name
        for name, p in first.named_parameters()
        if p.ndim == 2 and p.shape[0] == p.shape[1] and len(grown(p.shape, shapes.get(name, p.shape))) == 2
    }
    bare = {use.tensor for use in uses if not use.oriented}
    return layouts_beside(first, layouts, {use.tensor for use in uses}, square & bare)


def _rows(
    e: Evidence, layouts, rules: Parametrization, decay_mode: str | None, attention_power: float | None,
    second: int, init_read: bool, measured: dict,
) -> dict[int, list[Row]]:  # fmt: skip
    """Rows by the width that is held against the base."""
    rows: dict[int, list[Row]] = {}
    for place in range(1, len(e.widths)):
        other = e.seen[e.widths[place]]
        try:
            shapes = infshapes_of(other.model, e.base.model, e.seen[second].model)
        except PlanError as error:
            raise CheckError(f"the factory's models at other widths: {error}") from None
        pair = Pair(0, place, rules, _model_growth(shapes, layouts), _growth(shapes), _optimizer_rules(e))
        found = rows_of_pair(e, other, pair, shapes, layouts, decay_mode, attention_power, init_read, measured)
        rows[e.widths[place]] = found + _ties_agree(other.model, shapes, rules)
    return rows


def _without_blind(evidence: list[dict[int, list[Row]]], second: int) -> list[list[Row]]:
    """Rows of all widths. What fails on meta only, at widths that the CPU has seen too, was failed for a constant that
    meta does not hold (a table of multipliers): there the CPU's rows count alone."""
    if len(evidence) < 2:
        return [_worst([row for rows in each.values() for row in rows]) for each in evidence]
    meta, cpu = evidence[0].get(second, []), evidence[1].get(second, [])
    failed = {r.name for r in cpu if r.verdict == "FAIL"}
    passed = {(r.name, r.quantity) for r in cpu if r.verdict == "PASS"}
    only_meta = {r.name for r in meta if r.verdict == "FAIL" and (r.name, r.quantity) not in passed}
    blind = {r.name for r in meta if r.verdict == "FAIL"} - failed - only_meta
    kept = [row for rows in evidence[0].values() for row in rows if row.name not in blind]
    return [_worst(kept), _worst(cpu)]


def _growth(shapes: dict[str, mup.InfShape]) -> dict[str, float]:
    """log of the ratio of the dimension that grows, or of the first that does; 0 where none does."""
    return {
        name: next((math.log(d.dim / d.base_dim) for d in shape if d.isinf() and d.dim != d.base_dim), 0.0)
        for name, shape in shapes.items()
    }  # fmt: skip


def _model_growth(shapes: dict[str, mup.InfShape], layouts: dict) -> float:
    """log of the width multiplier: of the first embedding, or of the first tensor that grows."""
    for name, shape in shapes.items():
        layout = layouts.get(name)
        if layout is not None and not shape[layout[0]].isinf() and shape[layout[1]].isinf():
            return math.log(shape[layout[1]].width_mult())
    return next((growth for growth in _growth(shapes).values() if growth), 0.0)


def _optimizer_rules(e: Evidence) -> dict:
    return {name: group.rule for name, group in (e.base.groups or {}).items()}


def _ties_agree(model: nn.Module, shapes: dict[str, mup.InfShape], rules: Parametrization) -> list[Row]:
    """A tensor that is tied between roles has one init and one lr, so the rules of both must ask for the same."""
    rows = []
    for name, layouts in uses_of(model).items():
        roles = {role_of_map(*(shapes[name][d].isinf() for d in layout)) for layout in layouts} - {None}
        asked = {(rules.powers[r].init, rules.powers[r].lr) for r in roles}
        if len(asked) > 1:
            each = ", ".join(
                f"{r}: init m^{rules.powers[r].init:g}, lr m^{rules.powers[r].lr:g}" for r in sorted(roles)
            )
            message = f"{name}: tied between roles that {rules.source} treats differently ({each})"
            rows.append(Row(name, "role", None, None, None, "FAIL", rules.source, message))
    return rows


def _worst(rows: list[Row]) -> list[Row]:
    """One row of each tensor and quantity: that of the pair of widths that says the worst."""
    kept: dict[tuple, Row] = {}
    for row in rows:
        key = (row.name, row.quantity, row.expected)
        if key not in kept or SEVERITY[row.verdict] >= SEVERITY[kept[key].verdict]:
            kept[key] = row
    return list(kept.values())


def _joined(evidence: list[list[Row]]) -> list[Row]:
    """Rows of meta and CPU together: what one of them could not judge, the other may have."""
    judged = [{(r.name, r.quantity) for r in rows if r.verdict != "INCONCLUSIVE"} for rows in evidence]
    open_ = [{(r.name, r.quantity) for r in rows if r.verdict == "INCONCLUSIVE"} for rows in evidence]
    kept = []
    for i, rows in reversed(list(enumerate(evidence))):  # where both say the same, the widest pair's words stay
        for row in rows:
            key = (row.name, row.quantity)
            elsewhere = any(key in judged[j] and key not in open_[j] for j in range(len(evidence)) if j != i)
            if row.verdict != "INCONCLUSIVE" or not elsewhere:
                kept.append(row)
    return _worst(kept)


def _missing_halves(optimizer, calls) -> list[Row]:
    rows = []
    if optimizer is None:
        message = "no optimizer was given: learning rates, weight decay and eps are not judged"
        rows.append(Row("optimizer", "lr", None, None, None, "INCONCLUSIVE", "", message))
    if not calls:
        message = "no calls were given: forward multipliers and attention scores are not judged"
        rows.append(Row("calls", "forward", None, None, None, "INCONCLUSIVE", "", message))
    return rows


def _notes(evidence: list[Evidence], width: int) -> list[str]:
    notes = []
    if width not in evidence[0].widths:
        small = " and ".join(map(str, evidence[0].widths))
        notes.append(f"the factory cannot build its model on meta: widths {small} were judged, {width} was not")
    for call, why in evidence[0].seen[evidence[0].widths[-1]].impossible.items():
        if len(evidence) > 1 and call in evidence[1].traces:
            small = " and ".join(map(str, evidence[1].widths))
            notes.append(f"{call}: cannot be run on meta ({why}): its multipliers were judged at widths {small} only")
    frozen = sorted(name for name, p in evidence[0].base.model.named_parameters() if not p.requires_grad)
    notes += [f"{name}: frozen, so no rule holds for it" for name in frozen[:5]]
    if len(frozen) > 5:
        notes.append(f"{len(frozen) - 5} more tensors are frozen")
    return notes
