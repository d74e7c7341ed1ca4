"""What the rules expect of a coordinate check's measurements, tensor by tensor and activation by activation.

The forward pass of the first seed's models is recorded (forward_graph.py), so that a tensor's multiplier, its own
fan_in and all its uses are known at every size: a weight used as A*w may be drawn with B/A and trained with C/A (Tensor
Programs V, Tables 3, 8 and 9), and what a module returns before a multiplier is as large as that multiplier makes up
for. Where a model cannot be recorded (compiled, sharded) Table 8 is expected of every tensor.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from crystal.mup.chains import Chain, Use, applied, judgeable, products_in, products_within, uses_in
from crystal.mup.constraints import Constraints, Pair, parametrization_named
from crystal.mup.forward_graph import Graph, record
from crystal.mup.forward_trace import Trace, follow
from crystal.mup.measure import OUTPUT, clean
from crystal.mup.optimizers import Group
from crystal.mup.plan import Layouts, grown, infshapes_of, layouts_beside
from crystal.mup.rules import Parametrization, Role, role_of_map
from crystal.mup.tolerances import FADING, FINITE_WIDTH, OUTPUT_OR_DEPTH


@dataclass(frozen=True)
class Shown:
    """One model as it was before training, without its weights. graph: of its forward pass; None: not recorded."""

    model: nn.Module
    graph: Graph | None


def show(model: nn.Module, call: Callable[[nn.Module], Tensor]) -> Shown:
    """Keep what the expectations are read from. Leaves torch's seed as it was."""
    wrapped = any(type(m).__name__ == "OptimizedModule" for m in model.modules())
    if wrapped or any(hasattr(p, "full_tensor") for p in model.parameters()):
        return Shown(model, None)
    buffers = {name: b.clone() for name, b in model.named_buffers()}
    try:
        with torch.random.fork_rng(devices=[]):
            graph = record(model, call)
    except (RuntimeError, NotImplementedError, TypeError, ValueError, AttributeError):
        graph = None  # the run itself will say what is wrong, if anything is
    with torch.no_grad():
        for name, b in model.named_buffers():  # a batch norm's running statistics
            if name in buffers and b.shape == buffers[name].shape:
                b.copy_(buffers[name])
    return Shown(model, graph)


Sizes = tuple[float, ...]  # logs of ratios to the first size, one for each size


@dataclass(frozen=True)
class Tensors:
    """One tensor: its role, and logs of what init and first update should be, as ratios to the first size.

    asked: Table 8's init and lr at the last size, for an optimizer of Adam's kind. free: does it only appear multiplied
    with other weights, so that init and update may be off by one common factor?
    """

    role: Role | None
    init: Sizes
    update: Sizes
    asked: tuple[float, float] = (0.0, 0.0)
    free: bool = False
    multiplier: float = 0.0  # exponent of its multiplier beyond Table 8's
    used_as: Role | None = None  # the role of the use that has it


@dataclass(frozen=True)
class Part:
    """A product of weights that a module returns. tensors: its weights; applied: exponent of the multipliers that it
    has met by then, beyond Table 8's."""

    tensors: tuple[str, ...]
    applied: float


@dataclass
class Expected:
    """Which exponents the rules give every tensor and activation.

    outputs: activation → the products of weights whose sum it is; None: a raw readout, which has no rule.
    """

    sizes: tuple[int, ...]
    rules: Parametrization
    depth: bool
    alpha: float
    blocks: str
    tensors: dict[str, Tensors] = field(default_factory=dict)
    outputs: dict[str, list[Part] | None] = field(default_factory=dict)
    elements: dict[str, int] = field(default_factory=dict)
    fading: bool = False
    unlike: str = ""
    constraints: Constraints | None = None

    @property
    def source(self) -> str:
        return self.rules.source

    def power(self, logs: Sizes) -> float:
        """The exponent that logs of ratios come to."""
        span = math.log(self.sizes[-1] / self.sizes[0])
        return round(logs[-1] / span, 3) + 0.0

    def tensor(self, name: str, quantity: str) -> Sizes:
        """Of a tensor's init or first update (or over depth, of its lr)."""
        if self.depth:
            inner = name.replace(f"{self.blocks}last", f"{self.blocks}0")
            power = self.alpha - 1 if quantity == "update" and inner.startswith(self.blocks) else 0.0
            return tuple(power * math.log(size / self.sizes[0]) for size in self.sizes)
        return getattr(self.tensors[name], quantity)

    def activation(self, name: str, quantity: str, step: int) -> tuple[float, float]:
        """Range of right exponents of an activation (or of a push), apart from `outputs`."""
        inner = "[" in name and not name.startswith(OUTPUT)
        if quantity == "size" and step == 1 and not self.depth:
            if inner or self.fading:
                return (FADING, 0.0)
            # Table 8's output is a sum of fan_in independent terms divided by fan_in, until updates correlate them
            return (-0.5, 0.0) if name.partition("[")[0] == OUTPUT else (0.0, 0.0)
        if self.depth or name.partition("[")[0] == OUTPUT:
            return (OUTPUT_OR_DEPTH if not self.fading else FADING, 0.0)
        return (FADING if inner or self.fading else FINITE_WIDTH, 0.0)

    def judges(self, name: str, quantity: str) -> bool:
        """Not a readout's raw output, whose forward multiplier comes after it; over depth, of activations only the
        end of the residual stream: one block of L adds L^-alpha, and what it says before its multiplier has no rule."""
        if quantity in ("init", "update"):
            # a 1/sqrt(2L) in the init is a depth rule of its own, where branches have no multiplier
            return name in self.tensors or (self.depth and (quantity == "update" or self.rules.depth))
        if self.depth:
            return quantity != "push" and name in (OUTPUT, f"{self.blocks}last")
        if quantity == "push":
            return self.tensors[name].role not in ("output", None)
        parts = self.outputs.get(name, ())
        if parts and quantity == "size" and all(self._fixed(t) for part in parts for t in part.tensors):
            return False  # as large as a tensor that is the same at every width, and few elements show that badly
        return parts is not None

    def in_scores(self, tensor: str) -> bool:
        """Is this tensor one of those whose products grow with d_head?"""
        constraints = self.constraints
        ends = () if constraints is None else constraints.ends.get(tensor, ())
        return any(constraints.pair.ratio(product.length) for end in ends for product in products_in(end))

    def _fixed(self, tensor: str) -> bool:
        return tensor in self.tensors and self.tensors[tensor].role is None

    def output(self, name: str, shifts: Mapping[str, float]) -> float | None:
        """Exponent of what a module returns, given by which power init and update of each tensor are off from Table 8;
        None where its parts go with different powers."""
        found = [part.applied + sum(shifts.get(t, 0.0) for t in part.tensors) for part in self.outputs.get(name) or ()]
        return None if found and max(found) - min(found) > 0.1 else found[0] if found else 0.0


def expectations(
    shown: Mapping[int, Shown],
    sizes: tuple[int, ...],
    parametrization: str,
    along: str,
    alpha: float,
    blocks: str,
    layouts: Layouts | None,
    groups: Mapping[str, Group],
) -> Expected:
    """From the first seed's models. Raises PlanError for a matrix whose fan_in cannot be told."""
    rules = parametrization_named("mup" if parametrization == "sp" else parametrization)
    found = Expected(sizes, rules, along == "depth", alpha, blocks)
    models = [shown[s].model for s in sizes]
    found.elements = {clean(n): p.numel() for n, p in models[0].named_parameters()}
    if found.depth:
        return found
    graphs = [shown[s].graph for s in sizes]
    trace = follow(graphs) if None not in graphs else Trace((), {}, "not recorded")
    found.unlike = trace.unlike
    dims = layouts_beside(models[0], layouts, {use.tensor for end in trace.ended for use in uses_in(end.chain)})
    shapes = infshapes_of(models[-1], models[0], models[1])
    muon = {name for name, group in groups.items() if group.rule == "muon"}
    pairs = [_pair(place, shapes, rules, sizes) for place in range(len(sizes))]
    dimensions = [{name: tuple(p.shape) for name, p in model.named_parameters()} for model in models]
    constraints = Constraints(trace, pairs[-1], {}, -1.0)
    found.constraints = constraints
    for name, p in models[0].named_parameters():
        if p.requires_grad:
            found.tensors[clean(name)] = _tensor(
                name, dims.get(name), [d[name] for d in dimensions], constraints, pairs, clean(name) in muon
            )
    found.outputs = _outputs(models[0], trace, constraints, found.tensors)
    found.fading = _fades(trace, constraints)
    return found


def _pair(place: int, shapes, rules, sizes) -> Pair:
    own = {name: float(any(d.isinf() for d in shape)) for name, shape in shapes.items()}
    return Pair(0, place, rules, math.log(sizes[place] / sizes[0]), own, {})


def _tensor(name: str, layout, shapes, constraints: Constraints, pairs: Sequence[Pair], muon: bool) -> Tensors:
    """Table 8 by the tensor's own fan_in, shifted by the multiplier that it really has. shapes: at every size."""
    own = [[math.log(b / a) for a, b in zip(shapes[0], shape, strict=True)] for shape in shapes]
    uses = constraints.uses(name)
    strong = [u for u in uses if u.kind in ("lookup", "matmul")]
    if layout is not None:
        fan_in, fan_out = (tuple(o[d] for o in own) for d in layout)
        role = role_of_map(fan_in[-1] != 0, fan_out[-1] != 0)
        if strong and role not in {constraints.pair.role(u) for u in strong}:
            layout = None
    if layout is None and strong:
        fan_in, fan_out = (tuple(p.ratio(x) for p in pairs) for x in (strong[0].fan_in, strong[0].fan_out))
        role = role_of_map(fan_in[-1] != 0, fan_out[-1] != 0)
    elif layout is None:
        grows = grown(shapes[0], shapes[-1])
        fan_in, fan_out = (0.0,) * len(pairs), tuple(o[grows[0]] if grows else 0.0 for o in own)
        role = "vector" if grows else None
    powers = None if role is None else constraints.pair.rules.powers[role]
    if powers is None:
        return Tensors(None, (0.0,) * len(pairs), (0.0,) * len(pairs))
    own_fan_in = constraints.pair.rules.own_fan_in
    m = fan_in if own_fan_in or role not in ("hidden", "output") else tuple(p.log_m for p in pairs)
    init, update = (tuple(power * x for x in m) for power in (powers.init, powers.lr))
    table_8 = (init[-1], update[-1])
    if muon:
        # measured is the spectral norm, which should be sqrt(fan_out/fan_in)
        update = tuple((o - i) / 2 - powers.forward * i for o, i in zip(fan_out, fan_in, strict=True))
    alone = _alone(name, constraints)
    if alone is None:
        return Tensors(role, init, update, table_8, free=bool(uses))
    shift, used_as = _shift(alone, pairs)
    power = shift[-1] / pairs[-1].log_m if pairs[-1].log_m else 0.0
    return Tensors(role, _minus(init, shift), _minus(update, shift), table_8, multiplier=power, used_as=used_as)


def _alone(name: str, constraints: Constraints) -> list[tuple[Use, Sizes]] | None:
    """(use, factor at each size) of every use in which no other weight shares; None: there is none."""
    found = []
    for end in constraints.ends.get(name, ()):
        if len(uses_in(end.chain)) == 1 and not products_in(end) and judgeable(end) and end.how != "norm":
            found += applied(end)
    return found or None


def _shift(alone: list[tuple[Use, Sizes]], pairs: Sequence[Pair]) -> tuple[Sizes, Role | None]:
    """(logs of a multiplier beyond Table 8's at each size, the role it is used in): of several uses, the one that is
    furthest from Table 8."""
    worst, role = (0.0,) * len(pairs), None
    for use, factor in alone:
        asked = [pair.asked(use) for pair in pairs]
        if asked[-1] is None:
            continue
        shift = tuple(p.ratio(factor) - (a.forward if a else 0.0) for p, a in zip(pairs, asked, strict=True))
        if abs(shift[-1]) > abs(worst[-1]) + 1e-9:
            worst, role = shift, asked[-1].role
    return worst, role


def _minus(a: Sizes, b: Sizes) -> Sizes:
    return tuple(x - y for x, y in zip(a, b, strict=True))


def _outputs(model: nn.Module, trace: Trace, constraints: Constraints, tensors: dict[str, Tensors]) -> dict:
    """What each module returns, as products of weights."""
    found: dict[str, list[Part] | None] = {}
    by_id = {id(p): name for name, p in model.named_parameters()}
    for name, module in model.named_modules():
        weight = module._parameters.get("weight")
        tensor = None if weight is None else tensors.get(clean(by_id.get(id(weight), "")))
        shared = tensor is not None and f"{name}.weight" != by_id[id(weight)]
        if not isinstance(module, nn.Linear) or tensor is None:
            continue
        # a map to a fixed size, be it by an embedding's own weight
        if tensor.role == "output" or (tensor.role == "embedding" and shared and trace.unlike):
            found[clean(name)] = None
    for (name, key), chains in trace.modules.items():
        label = (clean(name) or OUTPUT) + (f"[{key}]" if key else "")
        if label.partition("[")[0] == OUTPUT:
            continue
        found.setdefault(label, _raw(chains, constraints))
    return found


def _raw(chains: dict[Chain, Sizes], constraints: Constraints) -> list[Part] | None:
    """Of a module that returns these chains; None: a readout, whose multiplier may come later."""
    pair = constraints.pair
    found: list[Part] = []
    for chain, here in chains.items():
        last = chain[-1] if chain else None
        if isinstance(last, Use) and last.kind in ("matmul", "scale") and pair.role(last) == "output":
            return None
        if isinstance(last, Use) and last.kind != "add":
            uses = uses_in(chain)
            asked = sum(a.forward for a in map(pair.asked, uses) if a is not None)
            lengths = sum(pair.ratio(product.length) for product in products_within(chain))
            names = tuple(clean(use.tensor) for use in uses)
            found.append(Part(names, (pair.ratio(here) - asked + lengths) / (pair.log_m or 1.0)))
    return found


def _fades(trace: Trace, constraints: Constraints) -> bool:
    """Does something inside the model start as width^-1/2, as an output may: a map to a fixed size, or scores that go
    on without a softmax?"""
    pair = constraints.pair
    for end in trace.ended:
        uses = uses_in(end.chain)
        if any((pair.role(u) == "output" and u.kind == "matmul") for u in uses) and not end.logits:
            return True
        if any(pair.ratio(p.length) for p in products_in(end)) and len(uses_in(end.chain[-1:])) < len(uses):
            return True
    return False
