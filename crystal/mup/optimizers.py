"""What an optimizer's learning rate means for the size of an update, and so which muP rule holds for it.

| rule | optimizers | lr of hidden, embedding, output (Table 8's multipliers) | source |
|---|---|---|---|
| adam | Adam's kind: an element's step is lr, whatever its gradient (also Lion, RMSprop, Adagrad, SignSGD) | 1/fan_in, 1, 1 | Tensor Programs V, Table 8 and appendix B.3 |
| sgd  | SGD: a step is lr times the gradient | fan_out/fan_in, fan_out, fan_in | Tensor Programs V, Table 8 |
| muon | Muon: a step is an orthogonal matrix times lr and a factor of its shape | sqrt(fan_out/fan_in), that factor counted | Yang, Simon & Bernstein 2023, "A spectral condition for feature learning", (A) |

A weight used as A*w, drawn with B and trained with C is the same as A*t, B/t, C/t under adam and muon, and as A*t, B/t,
C/t^2 under sgd. Optimizers whose step also depends on the weight's own size (Adafactor with parameter scaling, LARS,
LAMB) or that mix their gradients otherwise (Shampoo, SOAP, LBFGS) have no rule of their own here and are refused.
"""  # noqa: E501

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from torch import Tensor, nn
from torch.optim import Optimizer

from crystal.mup.verdict import CheckError

OptimizerRule = Literal["adam", "sgd", "muon"]

_ADAM_LIKE = (
    "adam",
    "lion",
    "rmsprop",
    "adagrad",
    "adadelta",
    "signsgd",
    "signum",
    "adan",
    "ademamix",
    "sophia",
    "tiger",
)
_LATE = ("RAdam",)  # begins as SGD with momentum, until it has seen enough gradients
_SGD_LIKE = ("sgd", "nag")
_REFUSED = {
    "adafactor": "scales each update by its weight's own size (parameter scaling)",
    "lamb": "scales each update by its weight's own size",
    "lars": "scales each update by its weight's own size",
    "shampoo": "preconditions gradients by their own factors",
    "soap": "preconditions gradients by their own factors",
    "lbfgs": "takes steps of a line search",
    "rprop": "has a step of its own for every element",
}


@dataclass(frozen=True)
class Group:
    """What one optimizer group does to a tensor; number: its place in param_groups.

    rule: which table its lr belongs to; scale: by how much the optimizer multiplies lr for this tensor's shape;
    shows_lr: is the first step already one of lr (RAdam's are not); also: another group that holds the tensor too.
    """

    number: int
    lr: float
    weight_decay: float
    eps: float | None
    rule: OptimizerRule = "adam"
    scale: float = 1.0
    decoupled: bool = False
    shows_lr: bool = True
    also: int | None = None


def optimizers_of(made: Optimizer | Sequence[Optimizer]) -> list[Optimizer]:
    """One optimizer, or several that share a model (Muon for its matrices, AdamW for the rest)."""
    return list(made) if isinstance(made, list | tuple) else [made]


def rule_of(optimizer: Optimizer, group: dict) -> OptimizerRule:
    """The rule of a param group. Raises CheckError, naming the optimizer, where there is none."""
    name = type(optimizer).__name__
    low = name.lower()
    if "use_muon" in group:
        return "muon" if group["use_muon"] else "adam"
    if "muon" in low and "adam" not in low:
        return "muon"
    for known, why in _REFUSED.items():
        if known in low and not (known == "adafactor" and _plain_adafactor(optimizer, group)):
            raise CheckError(
                f"optimizer {name}: it {why}; expected Adam's kind, SGD or Muon, whose muP rules are known"
            )
    if low == "adafactor":
        return "adam"
    parents = [c for c in type(optimizer).__mro__ if c is not Optimizer and issubclass(c, Optimizer)]
    for known in (low, *(c.__name__.lower() for c in parents[1:2])):  # its own name, or what it is derived from
        if any(part in known for part in _ADAM_LIKE):
            return "adam"
        if any(part in known for part in _SGD_LIKE):
            return "sgd"
    raise CheckError(f"optimizer {name}: its muP rule is not known; expected Adam's kind, SGD or Muon")


def _plain_adafactor(optimizer: Optimizer, group: dict) -> bool:
    """transformers' and fairseq's, without the scaling by the weight's size that torch's always does."""
    return group.get("scale_parameter") is False and group.get("relative_step") is False


def read_groups(model: nn.Module, made: Optimizer | Sequence[Optimizer]) -> dict[str, Group]:
    """name → group, from the optimizers' own param_groups; a tensor in none of them is left out.

    Raises CheckError for an optimizer without a rule, and for an lr of 0.
    """
    names = {id(p): name for name, p in model.named_parameters()}
    found: dict[str, Group] = {}
    number = 0
    for optimizer in optimizers_of(made):
        for group in optimizer.param_groups:
            params = [p for p in group["params"] if id(p) in names]
            if any(p.requires_grad for p in params):
                rule, lr = rule_of(optimizer, group), _lr(group)
                for p in params:
                    scale = _shape_scale(group, p) if rule == "muon" else 1.0
                    decay, eps = float(group.get("weight_decay", 0.0)), group.get("eps")
                    eps = eps if isinstance(eps, float | int) and rule == "adam" else None
                    name, before = names[id(p)], found.get(names[id(p)])
                    found[name] = Group(
                        number, lr, decay, eps, rule, scale, _decoupled(optimizer, group, rule),
                        type(optimizer).__name__ not in _LATE, None if before is None else before.number,
                    )  # fmt: skip
            number += 1
    return found


def _lr(group: dict) -> float:
    """As it is now: a schedule may have a factor for each group; the base's only where a warm-up is at 0."""
    lr = float(group["lr"])
    return lr if lr else float(group.get("initial_lr", 0.0))


def refuse_still(made: Optimizer | Sequence[Optimizer], where: str) -> None:
    """Raises CheckError where no step that is taken now would move anything."""
    _refuse_zeros([float(g["lr"]) for optimizer in optimizers_of(made) for g in optimizer.param_groups], where)


def _decoupled(optimizer: Optimizer, group: dict, rule: OptimizerRule) -> bool:
    """Is weight decay lr * lambda * w, as in AdamW, rather than a part of the gradient?"""
    known = group.get("decoupled_weight_decay")
    return bool(known) if known is not None else rule == "muon" or "AdamW" in type(optimizer).__name__


def _shape_scale(group: dict, p: Tensor) -> float:
    """What Muon multiplies lr by (torch.optim.Muon's adjust_lr_fn; Keller Jordan's default)."""
    rows, columns = (p.shape[0], math.prod(p.shape[1:])) if p.ndim > 1 else (p.numel(), 1)
    how = group.get("adjust_lr_fn")
    if how == "match_rms_adamw":
        return 0.2 * math.sqrt(max(rows, columns))
    if how in (None, "original"):
        return math.sqrt(max(1.0, rows / columns))
    raise CheckError(f"optimizer Muon: expected adjust_lr_fn original or match_rms_adamw, got {how}")


def lr_power(rule: OptimizerRule, role: str, fan_in: float, fan_out: float) -> float:
    """log of the lr that Table 8 asks for under another optimizer than Adam's kind.

    fan_in, fan_out: logs of the ratios of a use's fan_in and fan_out to the base's (0 where it does not grow).
    """
    if rule == "sgd":
        return {"hidden": fan_out - fan_in, "embedding": fan_out, "output": fan_in, "vector": fan_out}.get(role, 0.0)
    return {"hidden": (fan_out - fan_in) / 2, "embedding": fan_out / 2, "output": fan_in / 2}.get(role, 0.0)


def halved(rule: OptimizerRule) -> float:
    """By how much an lr's deviation counts beside an init's: under sgd a multiplier acts on it twice."""
    return 0.5 if rule == "sgd" else 1.0


def refuse_zero_lr(groups: Mapping[str, Group], where: str) -> None:
    """Raises CheckError if every group's lr is 0, as at the first step of a warm-up."""
    _refuse_zeros([group.lr for group in groups.values()], where)


def _refuse_zeros(rates: list[float], where: str) -> None:
    if rates and not any(rates):
        raise CheckError(f"the optimizer's lr is 0 {where} (a warm-up that starts at 0?): expected its base lr")
