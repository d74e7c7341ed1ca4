"""Which init and update a coordinate check accepts besides Table 8's, and which multiplier is wrong where it does not.

Weights that only appear multiplied with others (q with k, a low-rank pair, a norm's gain with the matrix after it) may
have one common factor in init and update, if the product of all comes out right.
"""

from __future__ import annotations

from collections.abc import Mapping

from crystal.mup.chains import applied, products_in, uses_in
from crystal.mup.constraints import Found
from crystal.mup.expected import Expected
from crystal.mup.measure import clean


def free_tensors(expected: Expected, off: Mapping[str, tuple[float | None, float | None]]) -> dict[str, float]:
    """Of tensors that only appear multiplied with other weights: by which power of width init and update are off
    together, where every product that they are in comes out right.

    off: tensor → (exponent by which its init is off, exponent by which its update is); None: not measured.
    """
    constraints = expected.constraints
    if constraints is None:
        return {}
    span = constraints.pair.log_m
    found = {}
    for name, (b, c) in off.items():
        tensor = expected.tensors.get(name)
        if tensor is None or tensor.role is None:
            continue
        beyond = [None if x is None else (_snapped(x) - tensor.multiplier) * span for x in (b, c)]
        inits = () if b is None else (tensor.asked[0] + beyond[0],)
        found[name] = Found(inits, None if c is None else tensor.asked[1] + beyond[1])
    constraints.found = found
    shifts = {}
    for name, (b, c) in off.items():
        tensor = expected.tensors.get(name)
        if tensor is None or not tensor.free or c is None or not _snapped(c):
            continue
        if (b is None or _snapped(b) == _snapped(c)) and all(
            constraints.holds(end) is not False or constraints.meant(end) for end in constraints.ends.get(name, ())
        ):
            shifts[name] = _snapped(c)
    return shifts


def wrong_multipliers(expected: Expected) -> dict[str, tuple[str, float, float]]:
    """Of products of weights that come out wrong though init and update of each follow Table 8: tensor → (role as
    `explain` takes it, exponent of its multiplier, the rule's). Call after `free_tensors`, which sets what was
    measured.
    """
    constraints = expected.constraints
    wrong: dict[str, tuple[str, float, float]] = {}
    if constraints is None:
        return wrong
    span = constraints.pair.log_m
    for ends in constraints.ends.values():
        for end in ends:
            uses = uses_in(end.chain)
            scores = any(constraints.pair.ratio(product.length) for product in products_in(end))  # the audit's affair
            if len(uses) < 2 - bool(products_in(end)) or scores or constraints.holds(end) is not False:
                continue
            if not all(map(constraints.consistent, uses)):
                continue
            if any(map(constraints.shift, uses)) and not constraints.meant(end):
                continue
            one_by_one = applied(end) if not products_in(end) else [(uses[-1], end.total())]
            for use, factor in one_by_one:
                asked = constraints.pair.asked(use)
                found = constraints.pair.ratio(factor)
                if asked is None:
                    continue
                wanted = asked.forward - constraints.shift(use)
                if abs(found - wanted) > 0.1 * span:
                    role = constraints.explained_as(use.tensor, asked.role)
                    wrong[clean(use.tensor)] = (role, found / span, wanted / span)
    return wrong


def _snapped(power: float) -> float:
    """A measured exponent as one that code could have meant."""
    return round(power * 4) / 4
