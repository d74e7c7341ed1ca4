"""Errors of an operator against fp64, beside the errors of torch itself in the same dtype.

Inputs are rounded to the dtype first and fp64 starts from the rounded ones, so an error is the operator's own. A
bound in units in the last place says little about a sum over 4,096 rows; torch's error on the same input says what
is usual. The rule for ours: no worse than torch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from crystal.kernels.catalog import Operator


@dataclass
class Error:
    """Of one output or gradient: relative (L2, over all elements) and worst absolute, ours and torch's."""

    output: str
    ours: float
    torch: float
    ours_worst: float
    torch_worst: float

    @property
    def ratio(self) -> float:
        """Ours over torch's; 1 where both are exact, infinite where ours is nan."""
        if self.ours != self.ours:
            return float("inf")
        return self.ours / self.torch if self.torch > 0 else 1.0 if self.ours == 0 else float("inf")

    def record(self) -> dict:
        return asdict(self) | {"ratio": self.ratio}


def outputs_and_gradients(
    function: Callable, arguments: tuple, generator: torch.Generator | None, backward: bool = True
) -> dict[str, Tensor]:
    """Results of a call by name, and the gradients of its tensors for normal gradients of the results.

    `generator` fixes those; without one they are uninitialised, as for meta tensors.
    """
    given = function(*arguments)
    results = {f"out{k}": t for k, t in enumerate(given if isinstance(given, tuple) else (given,))}
    leaves = {f"grad{k}": a for k, a in enumerate(arguments) if isinstance(a, Tensor) and a.requires_grad}
    differentiable = [t for t in results.values() if t.requires_grad]
    if not (backward and differentiable and leaves):
        return results
    grads = []
    for t in differentiable:
        if generator is None:
            grads.append(torch.empty_like(t))
        else:
            drawn = torch.randn(t.shape, generator=generator, dtype=torch.float32, device=generator.device)
            grads.append(drawn.to(t.device).bfloat16().to(t.dtype))  # exact in every dtype
    found = torch.autograd.grad(differentiable, list(leaves.values()), grads)
    return results | dict(zip(leaves, found, strict=True))


def copied(arguments: tuple, dtype: torch.dtype | None = None) -> tuple:
    """The arguments with fresh floating tensors (same strides), in `dtype`; integers are shared."""
    fresh = []
    for a in arguments:
        if isinstance(a, Tensor) and a.is_floating_point():
            base = torch.empty_strided(a.shape, a.stride(), dtype=dtype or a.dtype, device=a.device)
            a = base.copy_(a.detach()).requires_grad_(a.requires_grad)
        fresh.append(a)
    return tuple(fresh)


@contextlib.contextmanager
def poisoned() -> Iterator[None]:
    """Inside, torch.empty gives NaN, so that an element nobody writes is seen."""
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    filled = torch.utils.deterministic.fill_uninitialized_memory
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.utils.deterministic.fill_uninitialized_memory = filled
        torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def deviation(name: str, value: Tensor, exact: Tensor) -> tuple[float, float]:
    """(L2 of the difference over L2 of the exact, largest difference). Raises ValueError, with `name`, for a shape."""
    if value.shape != exact.shape:
        raise ValueError(f"{name}: shape {list(value.shape)}, expected {list(exact.shape)}")
    difference = (value.to(exact.device, torch.float64) - exact).detach()
    size = float(exact.detach().norm()) or 1.0
    return float(difference.norm()) / size, float(difference.abs().max()) if difference.numel() else 0.0


def errors(
    operator: Operator,
    shape: dict[str, int],
    dtype: torch.dtype,
    baseline: Callable,
    context: Callable[[], contextlib.AbstractContextManager] = contextlib.nullcontext,
    device: str = "cpu",
    seed: int = 0,
) -> list[Error]:
    """Of every output and gradient. `baseline`: torch's own version, same arguments; ours runs inside `context()`."""
    make = torch.Generator().manual_seed(seed)
    arguments = operator.make_inputs(shape, dtype, device, make)

    def run(function: Callable, wanted: torch.dtype) -> dict[str, Tensor]:
        gradients = torch.Generator().manual_seed(seed + 1)
        return outputs_and_gradients(function, copied(arguments, wanted), gradients, not operator.inplace)

    exact = run(operator.reference, torch.float64)
    with poisoned(), context():
        ours = run(operator.run, dtype)
    theirs = run(baseline, dtype)
    found = []
    for name, right in exact.items():
        (relative, worst), (torch_relative, torch_worst) = (
            deviation(f"{operator.name} {name}", results[name], right) for results in (ours, theirs)
        )
        found.append(Error(name, relative, torch_relative, worst, torch_worst))
    return found
