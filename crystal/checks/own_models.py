"""The audit and the coordinate check of a user's own models (`factory.py`)."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from crystal.checks.coord_check import Asked
from crystal.checks.factory import Factory
from crystal.checks.user_code import running
from crystal.mup.audit import audit
from crystal.mup.coord_check import CoordCheck, coord_check
from crystal.mup.measure import Task
from crystal.mup.observe import Calls
from crystal.mup.verdict import Report

BASE, TARGET = 64, 8  # the base width, and how many times as wide the target is


def audit_own(
    factory: Factory,
    width: int | None = None,
    base: int | None = None,
    parametrization: str | None = None,
    accept: Sequence[str] = (),
) -> Report:
    """The static audit. Raises ConfigError for what is missing, and for what the user's code raises."""
    factory.require("optimizer", *(("loss", "batch") if factory.calls is None else ()))
    base = base or BASE
    calls = factory.calls or {"training": _loss_of_a_batch(factory)}
    _can_be_built(factory, base, calls)
    with running(factory.name):
        return audit(
            factory.model, width=width or TARGET * base, base_width=base, calls=calls, optimizer=factory.optimizer_of,
            parametrization=parametrization or factory.parametrization, layouts=factory.layouts, accept=tuple(accept),
        )  # fmt: skip


def check_own(factory: Factory, asked: Asked, parametrization: str | None = None, progress=None) -> CoordCheck:
    """The coordinate check. Raises ConfigError for what is missing, and for what the user's code raises."""
    factory.require("optimizer", "loss", "batch")
    rules = parametrization or factory.parametrization
    with running(factory.name):
        return coord_check(
            own_task(factory), asked.widths, seeds=asked.seeds, first_seed=asked.first_seed, steps=asked.steps,
            parametrization=rules, layouts=factory.layouts, label=f"{factory.name}, {rules}", progress=progress,
            accept=asked.accept,
        )  # fmt: skip


def own_task(factory: Factory) -> Task:
    """How its models are made and trained: torch's global seed is set before each is made."""

    def model(width: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return factory.model(width)

    return Task(model, factory.optimizer_of, factory.loss_of, factory.batch)


def _loss_of_a_batch(factory: Factory) -> Callable[[nn.Module], Tensor]:
    with running(factory.name, "batch"):
        batch = factory.batch(0)  # once and on the CPU, whatever the device of the model
    return lambda model: factory.loss_of(model, batch)


def _can_be_built(factory: Factory, width: int, calls: Calls) -> None:
    """The audit takes what cannot be built or called on meta or on the CPU for something that it could not read; what
    can be neither, a mistake, is told as such. Raises ConfigError."""
    error = None
    for device in ("meta", "cpu"):  # most are done after the first
        try:
            with torch.device(device), torch.random.fork_rng(devices=[]):
                with running(factory.name, f"{factory.name.rpartition(':')[2]}({width})"):
                    model = factory.model(width)
                for name, call in calls.items():
                    with running(factory.name, f"the call {name}" if factory.calls else "loss"):
                        call(model)
            return
        except Exception as failed:
            error = failed
    raise error
