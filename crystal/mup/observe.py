"""What a real model at one width is: initialiser, optimizer groups, the operations of its forward pass.

Read off the objects themselves, on the meta device at any size, and on the CPU where it is small: code may do
something else on meta (transformers skips its initialiser there) or be impossible (routing by value). Nothing here
believes a config or a plan.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from crystal.mup.forward_graph import Graph, record
from crystal.mup.forward_trace import Trace
from crystal.mup.init_trace import Draw, build
from crystal.mup.optimizers import Group, read_groups
from crystal.mup.verdict import CheckError

SMALL = 30_000_000  # elements of a model that is also built and run on the CPU

Calls = Mapping[str, Callable[[nn.Module], Any]]
MakesOptimizer = Callable[[nn.Module], Optimizer | Sequence[Optimizer]]


@dataclass(frozen=True)
class Observed:
    """One model at one width. groups: None when no optimizer was given; graphs: by call; impossible: why a call could
    not be run."""

    model: nn.Module
    draws: dict[str, Draw]
    groups: dict[str, Group] | None
    graphs: dict[str, Graph]
    impossible: dict[str, str] = field(default_factory=dict)

    def trainable(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}


@dataclass(frozen=True)
class Evidence:
    """What was read off the family on one kind of device. widths: base first; traces: by call."""

    widths: tuple[int, ...]
    seen: dict[int, Observed]
    traces: dict[str, Trace]

    @property
    def base(self) -> Observed:
        return self.seen[self.widths[0]]


def observe(
    factory: Callable[[], nn.Module],
    optimizer: MakesOptimizer | None = None,
    calls: Calls | None = None,
    device: str = "meta",
) -> Observed:
    """Build the model on a device and read everything off it. Raises CheckError where it cannot be built so."""
    on = torch.device(device)

    def made() -> nn.Module:
        model = factory()
        if not isinstance(model, nn.Module):
            raise CheckError(f"the factory must return a torch.nn.Module, got {type(model).__name__}")
        return model

    try:
        model, draws = build(made, on)
    except CheckError:
        raise
    except Exception as error:
        where = f"under torch.device('{device}')"
        raise CheckError(f"the factory must build its model {where}: {said(error)}") from error
    refuse_late(model, "")
    graphs, impossible = {}, {}
    before = dict(model.named_parameters())
    for name, call in (calls or {}).items():
        try:
            with on, torch.random.fork_rng(devices=[]):
                graphs[name] = record(model, call)
        except Exception as error:
            impossible[name] = said(error)
    late = sorted(set(dict(model.named_parameters())) - set(before))
    if late:
        raise CheckError(f"{late[0]}: is made in the forward pass, after the optimizer; make it in the factory")
    groups = None if optimizer is None else read_groups(model, made_by(optimizer, model))
    return Observed(model, draws, groups, graphs, impossible)


def said(error: BaseException) -> str:
    """The first line of what was raised, and its kind."""
    line = next((line.strip() for line in str(error).splitlines() if line.strip()), "")
    return f"{type(error).__name__}: {line}" if line else type(error).__name__


def asked(what: str, call: Callable[[], Any]) -> Any:
    """What the caller's function gives; what it raises becomes a CheckError that says which it was."""
    try:
        return call()
    except CheckError:
        raise
    except Exception as error:
        raise CheckError(f"{what}: raised {said(error)}") from error


def made_by(optimizer: MakesOptimizer, model: nn.Module) -> Optimizer | Sequence[Optimizer]:
    """The caller's optimizer of a model. Raises CheckError for what raises, and for what is no optimizer."""
    made = asked("optimizer", lambda: optimizer(model))
    each = made if isinstance(made, list | tuple) else [made]
    if not each or not all(hasattr(one, "param_groups") for one in each):
        raise CheckError(f"optimizer: expected a torch.optim.Optimizer or a list of them, got {type(made).__name__}")
    return made


def refuse_late(model: nn.Module, where: str) -> None:
    """Raises CheckError for a parameter that has no shape yet (nn.LazyLinear)."""
    for name, p in model.named_parameters():
        if nn.parameter.is_lazy(p):
            raise CheckError(f"{name}: has no shape before the first forward pass; run one in the factory{where}")


def is_small(model: nn.Module) -> bool:
    return sum(p.numel() for p in model.parameters()) <= SMALL
