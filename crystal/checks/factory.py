"""A user's own models for `crystal audit` and `crystal coord-check`: MODULE:NAME, a function from a width to a module.

What a check needs beside the models are functions of these names, attributes of NAME or names in its module:

| name | is |
|---|---|
| optimizer(model) | the model's optimizer, or a list of them |
| loss(model, batch) | the training loss, from the model's own forward pass |
| batch(seed) | a batch, of any kind |
| calls | for the audit, name → function of the model; without it the loss of batch(0) is the one call |
| layouts | as in crystal.mup.audit.audit |
| parametrization | the name of the rules that hold, `mup` if not given |
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from crystal.checks.user_code import running
from crystal.config import nearest
from crystal.errors import ConfigError
from crystal.mup.rules import PARAMETRIZATIONS

_SIGNATURES = {"optimizer": "optimizer(model)", "loss": "loss(model, batch)", "batch": "batch(seed)"}


@dataclass(frozen=True)
class Factory:
    """A family of models and what trains them. name: as the user gave it; what is None was not there."""

    name: str
    make: Callable[[int], nn.Module]
    optimizer: Callable[[nn.Module], Any] | None = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None
    batch: Callable[[int], Any] | None = None
    calls: Mapping[str, Callable[[nn.Module], Any]] | None = None
    layouts: Mapping[str, tuple[int, int] | None] | None = None
    parametrization: str = "mup"

    def model(self, width: int) -> nn.Module:
        """A model. Raises ConfigError where the function makes something else, and what it raises itself."""
        model = self.make(width)
        if not isinstance(model, nn.Module):
            raise ConfigError(f"{self.name}: expected a torch.nn.Module at width {width}, got {_kind(model)}")
        return model

    def optimizer_of(self, model: nn.Module) -> Any:
        """Its optimizer, or several. Raises ConfigError for anything else."""
        made = self.optimizer(model)
        for each in made if isinstance(made, list | tuple) and made else [made]:
            if not hasattr(each, "param_groups"):
                expected = "expected a torch.optim.Optimizer, or a list of them"
                raise ConfigError(f"{self.name}: optimizer: {expected}, got {_kind(each)}")
        return made

    def require(self, *names: str) -> None:
        """Raises ConfigError for the first of optimizer, loss and batch that is missing."""
        for name in names:
            if getattr(self, name) is None:
                place = f"expected a function {_SIGNATURES[name]} in its module, or as its attribute"
                raise ConfigError(f"{self.name}: {place}; there is none")

    def loss_of(self, model: nn.Module, batch: Any) -> Tensor:
        """The loss, of a batch whose tensors are moved to where the model is. Raises ConfigError for what is none."""
        place = next((p.device for p in model.parameters()), torch.device("cpu"))
        loss = self.loss(model, tree_map(lambda x: x.to(place) if isinstance(x, Tensor) else x, batch))
        if not isinstance(loss, Tensor) or loss.numel() != 1:
            found = f"one of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else _kind(loss)
            raise ConfigError(f"{self.name}: loss: expected a tensor of one number, got {found}")
        if torch.is_grad_enabled() and not loss.requires_grad:
            raise ConfigError(f"{self.name}: loss: expected a tensor with a gradient, got one without")
        return loss


def load_factory(name: str) -> Factory:
    """MODULE:NAME or path/to/file.py:NAME, imported as from here, and what is beside it.

    Raises ConfigError, in one line, for a module that cannot be imported and for names that are not there or are
    something else.
    """
    place, _, attribute = name.rpartition(":")
    if not place or not attribute:
        raise ConfigError(f"{name}: expected MODULE:NAME or FILE.py:NAME, NAME a function from a width to a module")
    module = _file(name, place) if place.endswith(".py") or os.sep in place else _module(name, place)
    made: Any = module
    for part in attribute.split("."):
        if not hasattr(made, part):
            near = nearest(part, [key for key in vars(made) if not key.startswith("_")])
            raise ConfigError(f"{name}: expected a function {attribute} in {place}; there is none{near}")
        made = getattr(made, part)
    if not callable(made) or isinstance(made, nn.Module):
        raise ConfigError(f"{name}: expected a function from a width to a torch.nn.Module, got {_kind(made)}")
    found = {}
    for key in ("optimizer", "loss", "batch", "calls", "layouts", "parametrization"):
        value = getattr(made, key, None)
        value = getattr(module, key, None) if value is None else value
        if value is not None:
            found[key] = _checked(name, key, value)
    return Factory(name, made, **found)


def _checked(name: str, key: str, value: Any) -> Any:
    if key in _SIGNATURES and not callable(value):
        raise ConfigError(f"{name}: {key}: expected a function {_SIGNATURES[key]}, got {_kind(value)}")
    if key in ("calls", "layouts") and not isinstance(value, Mapping):
        raise ConfigError(f"{name}: {key}: expected a dict, got {_kind(value)}")
    if key == "calls" and not (value and all(map(callable, value.values()))):
        raise ConfigError(f"{name}: calls: expected a dict of functions of the model, each one forward pass")
    if key == "parametrization" and value not in PARAMETRIZATIONS:
        known = ", ".join(PARAMETRIZATIONS)
        raise ConfigError(
            f"{name}: parametrization: expected one of {known}, got {value!r}{nearest(str(value), known)}"
        )
    return value


def _module(name: str, module: str) -> ModuleType:
    here = os.getcwd()
    if here not in sys.path:
        sys.path.insert(0, here)
    importlib.invalidate_caches()
    try:
        with running(name, f"importing {module}"):
            return importlib.import_module(module)
    except ConfigError as error:
        missing = error.__cause__
        if isinstance(missing, ModuleNotFoundError) and f"{module}.".startswith(f"{missing.name}."):
            raise ConfigError(f"{name}: expected a module {module} that can be imported from {here}") from None
        raise


def _file(name: str, path: str) -> ModuleType:
    """A file as a module of its own name, with its directory and this one on the path, as `python file.py` has it."""
    file = Path(path).resolve()
    if not file.is_file():
        raise ConfigError(f"{name}: {path}: expected a Python file; there is none")
    for folder in (os.getcwd(), str(file.parent)):
        if folder not in sys.path:
            sys.path.insert(0, folder)
    stem = file.stem if file.stem.isidentifier() and file.stem not in sys.modules else f"_crystal_{abs(hash(file))}"
    spec = importlib.util.spec_from_file_location(stem, file)
    if spec is None:
        raise ConfigError(f"{name}: {path}: expected a Python file, whose name ends in .py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[stem] = module
    try:
        with running(name, f"importing {path}"):
            spec.loader.exec_module(module)
    except ConfigError:
        del sys.modules[stem]
        raise
    return module


def _kind(value: Any) -> str:
    return "None" if value is None else type(value).__name__
