"""The audit of one tensor at two widths: exponents of init, lr, decay, eps and multipliers, found and expected."""

from __future__ import annotations

import math
from dataclasses import dataclass

import mup

from crystal.mup.chains import Ended, Use, applied, uses_in
from crystal.mup.constraints import Asked, Constraints, Found, Pair, close
from crystal.mup.init_trace import Draw
from crystal.mup.measured_init import Size
from crystal.mup.observe import Observed
from crystal.mup.optimizers import Group, halved
from crystal.mup.rules import Role, role_of_map
from crystal.mup.tolerances import AUDIT_EXPONENT, MEASURED_INIT
from crystal.mup.verdict import Row, explain


def found_of(name: str, base: Observed, other: Observed, init_read: bool, measured) -> Found:
    """Of one tensor: how its init and lr change between two models. measured: sizes of inits that cannot be read."""
    groups = [None if o.groups is None else o.groups.get(name) for o in (base, other)]
    lr = None
    if None not in groups and groups[0].lr > 0 and groups[1].lr > 0:
        lr = math.log(groups[1].lr * groups[1].scale / (groups[0].lr * groups[0].scale))
    inits = _inits(base.draws.get(name), other.draws.get(name)) if init_read else None
    if inits is None and name in measured and all(size.rms for size in measured[name]):
        inits = (math.log(measured[name][1].rms / measured[name][0].rms),)
    return Found(inits, lr)


def _inits(a: Draw | None, b: Draw | None) -> tuple[float, ...] | None:
    """Logs of the ratios of what each part is drawn from; parts of zeros say nothing. None: not known."""
    if a is None or b is None:
        return None
    pairs = _paired(a, b)
    if pairs is None or any(d.kind in ("unknown", "none") for pair in pairs for d in pair):
        return None
    found = []
    for x, y in pairs:
        if x.std > 0 and y.std > 0:
            found.append(math.log(y.std / x.std))
        if x.mean and y.mean and (x.std == 0 or abs(x.mean) > x.std):
            found.append(math.log(abs(y.mean / x.mean)))
    return tuple(dict.fromkeys(found))


def _paired(a: Draw, b: Draw) -> list[tuple[Draw, Draw]] | None:
    """Part with part; one draw stands for all parts of the other width."""
    first, second = a.each(), b.each()
    if len(first) != len(second):
        first, second = (first * len(second), second) if len(first) == 1 else (first, second * len(first))
    return list(zip(first, second, strict=True)) if len(first) == len(second) else None


@dataclass
class TensorRows:
    """One tensor at two widths: exponents found and expected."""

    name: str
    pair: Pair
    constraints: Constraints
    found: Found
    base: Observed
    other: Observed
    shape: mup.InfShape
    layout: tuple[int, int] | None
    widths: tuple[int, int]

    def rows(self, called: bool, decay_mode: str, measured, init_read: bool) -> list[Row]:
        role, fan_in, fan_out = self.main_use()
        asked = self.pair.asked_of(self.name, role, fan_in, fan_out)
        self.role, self.m = role, {"hidden": fan_in, "output": fan_in}.get(role, self.pair.own[self.name])
        if role in ("hidden", "output") and not self.pair.rules.own_fan_in:
            self.m = self.pair.log_m
        if role is not None and not self.m:
            return []  # the pair does not show this tensor at two sizes
        if ".parametrizations." in self.name and self.shape.ninf() > 1:
            why = f"{self.name}: a parametrization computes the weight from it, with a scale of its own"
            return [self.row("role", None, None, "INCONCLUSIVE", why)]
        if self.untold():
            why = f"{self.name}: which of its dimensions is fan_in is not told by how it is used: layouts= can say it"
            return [self.row("role", None, None, "INCONCLUSIVE", why)]
        rows = [self.row("role", None, None, "PASS", rule=role or "fixed")]
        groups = [None if o.groups is None else o.groups.get(self.name) for o in (self.base, self.other)]
        if asked is None:
            return rows + self._fixed(groups, init_read, measured)
        same = self.constraints.right(self.name)
        if same is None and self.shifted(asked):
            return [*rows, self._cannot_tell(called)]
        rows += self._init(asked, same, init_read, measured)
        if self.other.groups is not None:
            rows += self._optimized(asked, same, groups, decay_mode)
        if called:
            rows += self._forward(same)
        return rows

    def shifted(self, asked: Asked) -> bool:
        """Are init and lr off by the same power, so that a multiplier that is not known decides?"""
        b, c = self.found.inits, self.found.lr
        if not b or c is None:
            return False
        kind = self.pair.optimizer_rules.get(self.name, "adam")
        shift = (c - asked.lr) * halved(kind)
        return not close(shift, self.m) and all(close(x - asked.init - shift, self.m, 2) for x in b)

    def _cannot_tell(self, called: bool) -> Row:
        what = "is not known" if called else "was not looked for (no calls)"
        message = f"{self.name}: init and LR are off by one power of m, which a multiplier could make up for; it {what}"
        return self.row("forward", None, None, "INCONCLUSIVE", message)

    def untold(self) -> bool:
        """A matrix whose fan_in neither a module nor a use of it tells."""
        uses = {use.kind for use in self.constraints.uses(self.name)} & {"lookup", "matmul"}
        return self.layout is None and not uses and sum(d.isinf() for d in self.shape) > 1

    def main_use(self) -> tuple[Role | None, float, float]:
        """(role, logs of the growth of fan_in and fan_out): by the module that holds it, else by its first use."""
        dims = [math.log(d.width_mult()) if d.isinf() else 0.0 for d in self.shape]
        uses = [
            u for end in self.constraints.ends.get(self.name, ()) for u in uses_in(end.chain) if u.tensor == self.name
        ]
        strong = next((u for u in uses if u.kind in ("lookup", "matmul")), None)
        grows = [d.isinf() for d in self.shape]
        if self.layout is not None:
            fan_in, fan_out = self.layout
            used_as = {self.pair.role(u) for u in uses if u.kind in ("lookup", "matmul")}
            role = role_of_map(grows[fan_in], grows[fan_out])
            if not used_as or role in used_as:
                return role, dims[fan_in], dims[fan_out]
        if strong is not None:
            fan_in, fan_out = self.pair.ratio(strong.fan_in), self.pair.ratio(strong.fan_out)
            return role_of_map(fan_in != 0, fan_out != 0), fan_in, fan_out
        return ("vector" if any(grows) else None), 0.0, self.pair.own[self.name]

    def _init(self, asked: Asked, same: bool, init_read: bool, measured) -> list[Row]:
        source = self.pair.rules.source
        draws = [o.draws.get(self.name) for o in (self.base, self.other)]
        if not init_read or None in draws:
            return [
                self.row("init", None, None, "INCONCLUSIVE", f"{self.name}: on meta it is not drawn as in training")
            ]
        if self.found.inits is None:
            pairs = _paired(*draws)
            if pairs is None:
                return [self._drawn_otherwise(draws)]
            drawn = draws[1].kind if not draws[1].parts else "parts"
            return [
                self.row("init", None, None, "INCONCLUSIVE",
                         f"{self.name}: its initialiser could not be read (drawn as: {drawn}); coord-check measures it")
            ]  # fmt: skip
        if measured is not None:
            return [self._measured(asked, measured)]
        if self._kinds_differ(draws):
            return [self._drawn_otherwise(draws)]
        if not self.found.inits:  # zeros, at every width
            return [Row(self.name, "init", None, None, None, "PASS", source, f"{self.name}: starts at 0")]
        return [self._exponent("init", b, asked.init, same, None) for b in self.found.inits]

    def _measured(self, asked: Asked, measured: tuple[Size, Size]) -> Row:
        slope = self.found.inits[0] / self.m
        error = 3 * math.hypot(*(size.error for size in measured)) / abs(self.m)
        interval = (slope - error, slope + error)
        expected = asked.init / self.m
        if error > MEASURED_INIT:
            message = f"{self.name}: its initialiser could not be read, and it is too small to measure its sigma"
            return Row(self.name, "init", slope, interval, expected, "INCONCLUSIVE", self.pair.rules.source, message)
        allowed = max(error, AUDIT_EXPONENT)
        shifts = [self.constraints.shift(u) / self.m for u in self.constraints.uses(self.name)] or [0.0]
        if any(abs(slope - expected - s) < allowed + AUDIT_EXPONENT for s in (0.0, *shifts)):
            message = f"{self.name}: its initialiser could not be read; drawn several times at widths {self._both()}"
            return Row(self.name, "init", slope, interval, expected, "PASS", self.pair.rules.source, message)
        message = (
            f"{self.name}: init ∝ m^{slope:z.2f} from width {self.widths[0]} to {self.widths[1]} (measured), expected "
            f"m^{expected:g} ({self.role}): {explain('init', self.role, slope, expected)}"
        )
        return Row(self.name, "init", slope, interval, expected, "FAIL", self.pair.rules.source, message)

    def _both(self) -> str:
        return f"{self.widths[0]} and {self.widths[1]}"

    @staticmethod
    def _kinds_differ(draws: list[Draw]) -> bool:
        for a, b in _paired(*draws) or ():
            if a.kind != b.kind or (a.kind == "constant" and bool(a.mean) != bool(b.mean)):
                return True
        return False

    def _drawn_otherwise(self, draws: list[Draw]) -> Row:
        said = [str(draw) for draw in draws]
        message = f"{self.name}: drawn as {said[0]} at width {self.widths[0]} and {said[1]} at {self.widths[1]}"
        return self.row("init", None, None, "FAIL", message)

    def _optimized(self, asked: Asked, same: bool, groups: list[Group | None], decay_mode: str) -> list[Row]:
        if None in groups:
            return [
                self.row("lr", None, None, "FAIL", f"{self.name}: is in no optimizer group, so it is never updated")
            ]
        if groups[1].also is not None:
            why = (
                f"{self.name}: is in two optimizer groups ({groups[1].also} and {groups[1].number}), and moved by both"
            )
            return [self.row("lr", None, None, "FAIL", why)]
        if 0.0 in (groups[0].lr, groups[1].lr):
            return [self.row("lr", None, None, "FAIL", f"{self.name}: its LR is 0, so it is never updated")]
        rows = [self._exponent("lr", self.found.lr, asked.lr, same, groups[1])]
        rows += self._decay(groups, asked, same, decay_mode)
        if groups[0].eps and groups[1].eps:
            rows.append(self._eps(groups))
        return rows

    def _decay(self, groups: list[Group], asked: Asked, same: bool, mode: str) -> list[Row]:
        base, other = groups
        if base.weight_decay == other.weight_decay == 0:
            return []
        lr = self.found.lr - math.log(other.scale / base.scale) if same else asked.lr
        # where decay is a part of the gradient and steps go with gradients, only lr * lambda means anything
        expected = -lr if mode == "independent" or base.rule == "sgd" else 0.0
        found = (
            math.log(other.weight_decay / base.weight_decay) if base.weight_decay and other.weight_decay else math.inf
        )
        return [self._exponent("weight decay", found, expected, False, other)]

    def _eps(self, groups: list[Group]) -> Row:
        """Adam's eps stays, or falls with the gradients, which are as 1/m."""
        change = math.log(groups[1].eps / groups[0].eps)
        found = change / self.m
        least, most = sorted((0.0, -max(self.m, self.pair.log_m, key=abs)))  # some divide by the model's own m
        if least - AUDIT_EXPONENT < change < most + AUDIT_EXPONENT:
            return self.row("eps", found, 0.0, "PASS")
        message = (
            f"{self.name}: eps ∝ m^{found:z.2f} from width {self.widths[0]} to {self.widths[1]}, expected a constant "
            f"or m^-1, as gradients fall (optimizer group {groups[1].number})"
        )
        return self.row("eps", found, 0.0, "FAIL", message)

    def _forward(self, same: bool) -> list[Row]:
        """One row for every use with a multiplier of its own, and one if there is no use at all."""
        rows, seen = [], False
        for end in self.constraints.ends.get(self.name, ()):
            seen = True
            if end.how == "unknown":
                why = f"{self.name}: what it gives goes into {end.why}, an operation that the trace does not know"
                rows.append(self.row("forward", None, None, "INCONCLUSIVE", why))
                continue
            for use, factor in applied(end):
                asked = self.pair.asked(use)
                if use.tensor != self.name or asked is None:
                    continue
                if any(map(math.isnan, end.total())):
                    why = f"{self.name}: is multiplied by a tensor whose value is not known on meta"
                    rows.append(self.row("forward", None, None, "INCONCLUSIVE", why))
                    continue
                rows.append(self._multiplier(end, use, asked, self.pair.ratio(factor), same))
        if not seen:
            rows.append(self.row("forward", None, None, "INCONCLUSIVE", f"{self.name}: is used in none of the calls"))
        return list(dict.fromkeys(rows))

    def _multiplier(self, end: Ended, use: Use, asked: Asked, found: float, same: bool) -> Row:
        role = asked.role
        m = self.pair.ratio(use.fan_in) if role in ("hidden", "output") else self.pair.own[use.tensor]
        m = self.pair.log_m if not self.pair.rules.own_fan_in and role in ("hidden", "output") else m
        alone = len(uses_in(end.chain)) == 1
        free = end.how == "norm" and alone
        fine = same or free or (not alone and self.constraints.holds(end) is True)
        what = self.constraints.explained_as(use.tensor, role)
        return self._exponent("forward", found, asked.forward, fine, None, what, m)

    def _fixed(self, groups: list[Group | None], init_read: bool, measured) -> list[Row]:
        """A tensor none of whose dimensions grows is the same at every width."""
        rows = []
        draws = [o.draws.get(self.name) for o in (self.base, self.other)]
        said = [str(draw) for draw in draws]
        if not init_read or None in draws:
            rows.append(
                self.row("init", None, None, "INCONCLUSIVE", f"{self.name}: is not drawn on meta as in training")
            )
        elif self.found.inits is None and _paired(*draws) is not None:
            rows.append(self.row("init", None, None, "INCONCLUSIVE", f"{self.name}: its initialiser could not be read"))
        elif measured is not None:
            error = max(4 * math.hypot(*(size.error for size in measured)), 0.02)
            verdict = "PASS" if abs(self.found.inits[0]) < error else "FAIL"
            rows.append(self.row("init", None, None, verdict, "" if verdict == "PASS" else self._unequal("init", said)))
        else:
            equal = not self._kinds_differ(draws) and all(abs(b) < 1e-6 for b in self.found.inits or ())
            rows.append(self._equal("init", said, equal))
        if self.other.groups is None:
            return rows
        if None in groups:
            return [*rows, *self._optimized(Asked("vector", 0, 0, 0), True, groups, "")]
        if growth := self._grows():
            rows.append(growth)
        for quantity, values in (
            ("lr", [g.lr * g.scale for g in groups]), ("weight decay", [g.weight_decay for g in groups])
        ):  # fmt: skip
            rows.append(self._equal(quantity, [f"{v:.4g}" for v in values], math.isclose(*values, rel_tol=1e-6)))
        return rows

    def _grows(self) -> Row | None:
        """A multiplier of a tensor that does not grow, which grows. (One that falls only takes from it.)"""
        for end in self.constraints.ends.get(self.name, ()):
            for use, factor in applied(end):
                found = self.pair.ratio(factor) / (self.pair.log_m or 1.0)
                if use.tensor == self.name and found > AUDIT_EXPONENT and len(uses_in(end.chain)) == 1:
                    message = f"{self.name}: is multiplied by m^{found:z.2f}, but none of its dimensions grows"
                    return self.row("forward", found, 0.0, "FAIL", message)
        return None

    def _equal(self, quantity: str, said: list[str], equal: bool) -> Row:
        return self.row(
            quantity, None, None, "PASS" if equal else "FAIL", "" if equal else self._unequal(quantity, said)
        )

    def _unequal(self, quantity: str, said: list[str]) -> str:
        return (
            f"{self.name}: {quantity} is {said[0]} at width {self.widths[0]} and {said[1]} at {self.widths[1]}, but "
            "none of its dimensions grows: expected the same at every width"
        )

    def _exponent(
        self,
        quantity: str,
        found: float,
        expected: float,
        same: bool,
        group: Group | None,
        role: str = "",
        m: float = 0.0,
    ) -> Row:
        m = m or self.m
        found, expected = found / m + 0.0, expected / m + 0.0
        if abs(found - expected) < AUDIT_EXPONENT:
            return self.row(quantity, found, expected, "PASS")
        source = self.pair.rules.source
        if same:
            note = f"{self.name}: {quantity} ∝ m^{found:z.2f}, equal to {source} by abc-symmetry"
            return self.row(quantity, found, expected, "PASS", note)
        role = role or self.role
        why = explain(quantity, role, found, expected, None if group is None else group.number, group and group.rule)
        role = "output" if role == "inner output" else role
        message = (
            f"{self.name}: {quantity} ∝ m^{found:z.2f} from width {self.widths[0]} to {self.widths[1]}, "
            f"expected m^{expected:g} ({role}): {why}"
        )
        return self.row(quantity, found, expected, "FAIL", message)

    def row(self, quantity, found, expected, verdict, message: str = "", rule: str = "") -> Row:
        interval = None if found is None else (found, found)
        return Row(self.name, quantity, found, interval, expected, verdict, rule or self.pair.rules.source, message)
