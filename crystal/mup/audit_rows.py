"""The audit's rows for one pair of widths: exponents of every tensor, scores of every attention, agreement of calls."""

from __future__ import annotations

import math
from collections.abc import Mapping

import mup

from crystal.mup.audit_tensor import TensorRows, found_of
from crystal.mup.chains import Ended, Product, Use, products_in, uses_in
from crystal.mup.constraints import Constraints, Pair, close
from crystal.mup.forward_trace import Trace, multipliers
from crystal.mup.measured_init import Size
from crystal.mup.observe import Evidence, Observed
from crystal.mup.verdict import Row, explain


def rows_of_pair(
    e: Evidence,
    other: Observed,
    pair: Pair,
    shapes: Mapping[str, mup.InfShape],
    layouts: Mapping[str, tuple[int, int] | None],
    decay_mode: str | None,
    attention_power: float | None,
    init_read: bool,
    measured: Mapping[str, tuple[Size, Size]],
) -> list[Row]:
    """All rows of base and one other width."""
    second = pair.other == 1 or len(e.widths) == 2
    found = {n: found_of(n, e.base, other, init_read, measured if second else {}) for n in shapes}
    joint = Trace(tuple(dict.fromkeys(end for trace in e.traces.values() for end in trace.ended)))
    constraints = Constraints(joint, pair, found, attention_power)
    called = bool(e.traces) and not any(trace.unlike for trace in e.traces.values())
    mode = decay_mode or _decay_mode(e.base, other)
    widths = (e.widths[pair.base], e.widths[pair.other])
    rows: list[Row] = []
    for name in other.trainable():
        tensor = TensorRows(
            name, pair, constraints, found[name], e.base, other, shapes[name], layouts.get(name), widths
        )
        rows += tensor.rows(called, mode, measured.get(name) if second else None, init_read)
    rows += _scores(constraints, pair, widths)
    rows += _activations(e, pair, widths)
    rows += _not_traced(e)
    return rows


def _decay_mode(base: Observed, other: Observed) -> str:
    """coupled (one lambda) or independent (lr * lambda stays), by most of the tensors whose lr is scaled."""
    seen = {"coupled": 0, "independent": 0}
    for name, before in (base.groups or {}).items():
        after = (other.groups or {}).get(name)
        if after and before.weight_decay and after.weight_decay and not math.isclose(before.lr, after.lr):
            seen["coupled" if math.isclose(before.weight_decay, after.weight_decay) else "independent"] += 1
    return "independent" if seen["independent"] > seen["coupled"] else "coupled"


def _scores(constraints: Constraints, pair: Pair, widths: tuple[int, int]) -> list[Row]:
    """Every product of two functions of weights: attention scores above all."""
    rows = []
    for end in constraints.products:
        product = products_in(end)[0]
        sides = [part[-1].kind if part and isinstance(part[-1], Use) else "" for part in (product.left, product.right)]
        if "add" in sides:
            continue  # a bias beside a projection that has a row
        name = product.names[0] if product.names[0] == product.names[1] else " · ".join(product.names)
        source = pair.rules.source
        if end.how == "unknown":
            message = f"{name}: the scores go through {end.why}, an operation that the trace does not know"
            rows.append(Row(name, "attention", None, None, None, "INCONCLUSIVE", source, message))
            continue
        held = constraints.holds(end)
        if held is None and any(math.isnan(f) for f in end.total()):
            message = f"{name}: the scores are multiplied by a tensor whose value is not known on meta"
            rows.append(Row(name, "attention", None, None, None, "INCONCLUSIVE", source, message))
        if held is not None:
            rows.append(_score_row(constraints, pair, widths, end, product, name, held))
    return rows


def _score_row(constraints, pair: Pair, widths, end: Ended, product: Product, name: str, held: bool) -> Row:
    length = pair.ratio(product.length)
    shifts = sum(constraints.shift(use) for use in uses_in(end.chain))
    change = constraints.total(end) + shifts
    expected = (constraints.attention_power or 0.0) if length else 0.0
    found = change / length if length else change / (pair.log_m or 1.0)
    if held:
        return Row(name, "attention", found, (found, found), expected, "PASS", pair.rules.source)
    finite = [u.tensor for u in uses_in(end.chain) if (a := pair.asked(u)) is not None and a.role == "output"]
    d_head = [product.length[i] for i in (pair.base, pair.other)]
    if finite and not length:
        message = (
            f"{name}: scores ∝ m^{found:z.2f} from width {widths[0]} to {widths[1]}: {finite[0]} maps the width to a "
            "fixed size, and wants 1/fan_in, by a multiplier or by init and LR"
        )
    elif length:
        why = explain("attention", None, found, expected)
        message = f"{name}: scores ∝ d_head^{found:z.2f} as d_head goes {d_head[0]} → {d_head[1]}: {why}"
    else:
        scale = [f"{end.total()[i]:.4g}" for i in (pair.base, pair.other)]
        message = f"{name}: the scores' scale goes {scale[0]} → {scale[1]} with d_head unchanged"
    return Row(name, "attention", found, (found, found), expected, "FAIL", pair.rules.source, message)


def _activations(e: Evidence, pair: Pair, widths: tuple[int, int]) -> list[Row]:
    """What multiplies an activation whose scale counts is the same at every width."""
    rows = []
    for loose in dict.fromkeys(loose for trace in e.traces.values() for loose in trace.loose):
        name = ", ".join(loose.names) or "input"
        what = "what comes from it" if loose.names else "data"
        if loose.how == "unknown":
            message = f"{name}: {what} goes into {loose.why}, an operation that the trace does not know"
            rows.append(Row(name, "activation", None, None, None, "INCONCLUSIVE", pair.rules.source, message))
        elif not any(map(math.isnan, loose.factor)) and not close(pair.ratio(loose.factor), pair.log_m):
            found = pair.ratio(loose.factor) / (pair.log_m or 1.0)
            message = (
                f"{name}: {what}, past what is not linear, is multiplied by m^{found:z.2f} from width {widths[0]} to "
                f"{widths[1]}: activations keep their size"
            )
            rows.append(Row(name, "activation", found, (found, found), 0.0, "FAIL", pair.rules.source, message))
    return rows


def _not_traced(e: Evidence) -> list[Row]:
    """Calls that could not be run, or not followed side by side."""
    rows = []
    for observed in e.seen.values():
        for call, why in observed.impossible.items():
            message = f"{call}: could not be run: {why}"
            rows.append(Row(call, "call", None, None, None, "INCONCLUSIVE", "", message))
    for call, trace in e.traces.items():
        if trace.unlike:
            message = f"{call}: the forward pass differs between widths: {trace.unlike}"
            rows.append(Row(call, "call", None, None, None, "INCONCLUSIVE", "", message))
        elif not any(call in observed.impossible for observed in e.seen.values()):
            rows.append(Row(call, "call", None, None, None, "PASS", "", ""))
    return list(dict.fromkeys(rows))


def calls_agree(traces: Mapping[str, Trace], width: int) -> list[Row]:
    """Training, inference and whatever else was called apply the same multipliers."""
    followed = {call: multipliers(trace, width) for call, trace in traces.items() if not trace.unlike}
    if len(followed) < 2:
        return []
    (first, reference), *others = followed.items()
    rows = []
    for call, found in others:
        for key in reference.outputs.keys() & found.outputs.keys():
            a, b = reference.outputs[key], found.outputs[key]
            if a != b and not any(map(math.isnan, a | b)):
                message = f"{key[0]}: {first} multiplies by {_list(a)}, {call} by {_list(b)}: one skips a multiplier"
                rows.append(Row(key[0], "forward", None, None, None, "FAIL", "one model", message))
        for key in reference.scores.keys() & found.scores.keys():
            a, b = reference.scores[key][0], found.scores[key][0]
            if a != b and not any(map(math.isnan, a | b)):
                message = f"{key[0]}: {first} scales scores by {_list(a)}, {call} by {_list(b)}"
                rows.append(Row(key[0], "attention", None, None, None, "FAIL", "one model", message))
    return rows


def _list(factors: frozenset[float]) -> str:
    return ", ".join(f"{f:.6g}" for f in sorted(factors))
