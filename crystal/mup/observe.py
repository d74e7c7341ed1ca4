"""What a real model at one width is: shapes, roles, initialiser, optimizer groups, forward multipliers.

Read off the objects themselves, on the meta device: nothing here believes a config or a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from crystal.mup.forward_trace import Multipliers, trace_multipliers
from crystal.mup.init_trace import Draw, build_on_meta
from crystal.mup.verdict import CheckError


@dataclass(frozen=True)
class Group:
    """What one optimizer group does to a tensor; number: its place in param_groups."""

    number: int
    lr: float
    weight_decay: float
    eps: float | None


@dataclass(frozen=True)
class Observed:
    """One model at one width. groups: None when no optimizer was given; multipliers: by call."""

    model: nn.Module
    draws: dict[str, Draw]
    groups: dict[str, Group] | None
    multipliers: dict[str, Multipliers]


def observe(
    factory: Callable[[], nn.Module],
    optimizer: Callable[[nn.Module], Optimizer] | None = None,
    calls: Mapping[str, Callable[[nn.Module], Any]] | None = None,
) -> Observed:
    """Build the model on meta and read everything off it. Raises CheckError where it cannot be built so."""
    try:
        model, draws = build_on_meta(factory)
    except (RuntimeError, NotImplementedError) as error:
        line = str(error).splitlines()[0]
        raise CheckError(f"the factory must build its model under torch.device('meta'): {line}") from error
    groups = None if optimizer is None else read_groups(model, optimizer(model))
    multipliers = {name: trace_multipliers(model, call) for name, call in (calls or {}).items()}
    return Observed(model, draws, groups, multipliers)


def read_groups(model: nn.Module, optimizer: Optimizer) -> dict[str, Group]:
    """name → group, from the optimizer's own param_groups; a tensor in none of them is left out."""
    names = {id(p): name for name, p in model.named_parameters()}
    found = {}
    for number, group in enumerate(optimizer.param_groups):
        lr = group.get("initial_lr", group["lr"])
        lr = lr.item() if isinstance(lr, torch.Tensor) else lr
        for p in group["params"]:
            if id(p) in names:
                found[names[id(p)]] = Group(number, lr, group.get("weight_decay", 0.0), group.get("eps"))
    return found
