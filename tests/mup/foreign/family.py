"""What one architecture of the zoo states about itself: a right family of models, and what breaks it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer


@dataclass(frozen=True)
class Broken:
    """A fault planted in a right family. What is None is the family's own."""

    name: str  # what is broken, in words
    tensor: str  # substring of the name (of a tensor, or of the scores' pair) that the verdict must give; "" for any
    by: tuple[str, ...]  # who must catch it: "audit", "coord-check"
    factory: Callable[[int], nn.Module] | None = None
    optimizer: Callable[[nn.Module], Optimizer] | None = None
    loss: Callable[[nn.Module, Any], Tensor] | None = None


@dataclass(frozen=True)
class Family:
    """A family of models that is right in one form of muP, and the ways in which it's broken."""

    name: str
    form: str
    factory: Callable[[int], nn.Module]  # width -> initialised module
    optimizer: Callable[[nn.Module], Optimizer]
    loss: Callable[[nn.Module, Any], Tensor]  # a training loss through the module's own forward
    batch: Callable[[int], Any]  # seed -> batch (CPU tensors)
    broken: tuple[Broken, ...]
    widths: tuple[int, ...] = (64, 128, 256)
    base: int = 64
    target: int = 512
    layouts: dict | None = None
    accept: tuple[str, ...] = ()
