"""Operators timed on a GPU beside torch, torch.compile, Liger-Kernel and flash-attention: `crystal bench kernels`.

Every provider's results and gradients are compared with fp64 before it is timed; one that is wrong is not. Times are
set against the bytes that must be moved (`compulsory_bytes`: each input read once, each output written once) and
against the device's own copy of as many bytes, timed the same way, which says more than a datasheet. Nothing is drawn
or allocated for a provider within its time but what it allocates itself.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass

import torch
from torch import Tensor

from crystal.kernels.bench.peers import functions, in_our_form, installed
from crystal.kernels.bench.timing import Timer, spread
from crystal.kernels.catalog import Operator, operators
from crystal.kernels.proof.accuracy import copied, deviation, outputs_and_gradients

PROVIDERS = ("ours", "torch", "torch.compile", "liger", "flash-attn")
SHAPES = ("crystalcoder-7b", "amber-7b", "small")
MARGIN = {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 1e-2}  # added to twice torch's own error


@dataclass(frozen=True)
class Deviation:
    """Relative error (L2) against fp64 of a provider's worst output or gradient, and torch's error there."""

    output: str
    error: float
    torch_error: float

    def too_large(self, dtype: torch.dtype) -> bool:
        """flash-attention's rule: over twice torch's own error and a margin. NaN always is."""
        return not self.error <= 2 * self.torch_error + MARGIN[dtype]


def present() -> tuple[str, ...]:
    """The providers that can run here."""
    return tuple(p for p in PROVIDERS if p not in ("liger", "flash-attn") or installed(p))


def compiled_by_torch(function: Callable) -> Callable:
    """torch.compile for these shapes alone. Backward keeps its buffers: it is called many times over one forward."""
    import torch._functorch.config

    torch._functorch.config.donated_buffer = False
    torch._dynamo.reset()  # each shape is a fresh start, not a recompilation of the last
    return torch.compile(function, dynamic=False)


def candidates(operator: Operator, names: tuple[str, ...]) -> Iterator[tuple[str, Callable]]:
    """(provider, its function) of those that have the operator."""
    for name in names:
        table = functions("torch" if name == "torch.compile" else name)
        if operator.name in table:
            function = table[operator.name]
            yield name, compiled_by_torch(function) if name == "torch.compile" else function


def relative_errors(found: dict[str, Tensor], exact: dict[str, Tensor]) -> dict[str, float]:
    """L2 of the difference over L2 of the exact, by output."""
    return {name: deviation(name, found[name], right)[0] for name, right in exact.items()}


class Case:
    """One operator at one shape and dtype on a device: its inputs, exact results, and torch's errors."""

    def __init__(self, operator: Operator, shape: dict[str, int], dtype: torch.dtype, device: str) -> None:
        self.operator, self.shape, self.dtype, self.device = operator, shape, dtype, device
        self.arguments = operator.make_inputs(shape, dtype, device, self.generator(0))
        self.exact = self.results(operator.reference, torch.float64)
        self.torch_errors = relative_errors(self.results(functions("torch")[operator.name]), self.exact)

    def generator(self, seed: int) -> torch.Generator:
        return torch.Generator(self.device).manual_seed(seed)

    def results(self, function: Callable, dtype: torch.dtype | None = None) -> dict[str, Tensor]:
        """Outputs and gradients on fresh copies of the inputs, which some peers overwrite."""
        arguments = copied(self.arguments, dtype)
        return outputs_and_gradients(function, arguments, self.generator(1), not self.operator.inplace)

    def deviation(self, provider: str, function: Callable) -> Deviation:
        def in_form(*arguments):
            return in_our_form(provider, self.operator.name, function(*arguments), arguments)

        errors = relative_errors(self.results(in_form), self.exact)
        worst = max(errors, key=lambda name: (errors[name] != errors[name], errors[name] - 2 * self.torch_errors[name]))
        return Deviation(worst, errors[worst], self.torch_errors[worst])

    def calls(self, function: Callable) -> dict[str, Callable[[], object]]:
        """What is timed, by direction. Inputs ask for gradients, so forward saves what backward needs."""
        arguments = copied(self.arguments)
        if self.operator.inplace:
            return {"forward": lambda: function(*arguments)}
        leaves = [a for a in arguments if isinstance(a, Tensor) and a.requires_grad]

        def forward() -> list[Tensor]:
            given = function(*arguments)
            return [t for t in (given if isinstance(given, tuple) else (given,)) if t.requires_grad]

        kept = forward()
        grads = [torch.randn(t.shape, generator=self.generator(2), device=self.device).to(t.dtype) for t in kept]
        return {
            "forward": forward,
            "backward": lambda: torch.autograd.grad(kept, leaves, grads, retain_graph=True),
            "both": lambda: torch.autograd.grad(forward(), leaves, grads),
        }

    def minimum_bytes(self, direction: str) -> int:
        parts = ("forward", "backward") if direction == "both" else (direction,)
        return sum(self.operator.compulsory_bytes(self.shape, self.dtype, part) for part in parts)


class CopySpeed:
    """Bytes a second of a device-to-device copy that moves so many bytes, read and written together."""

    def __init__(self, timer: Timer, device: str) -> None:
        self.timer, self.device, self.known = timer, device, {}

    def __call__(self, moved: int) -> float:
        half = max(moved // 2, 1)
        if half not in self.known:
            source, target = (torch.empty(half, dtype=torch.int8, device=self.device) for _ in range(2))
            seconds = spread(self.timer.samples(lambda: target.copy_(source))).median
            self.known[half] = 2 * half / seconds
        return self.known[half]


def measure(case: Case, function: Callable, timer: Timer, copy_speed: CopySpeed) -> Iterator[dict]:
    """A record for each direction. Speeds count compulsory bytes over the median of plain calls."""
    for direction, call in case.calls(function).items():
        plain = spread(timer.samples(call))
        graph = timer.graph_samples(call)
        least = case.minimum_bytes(direction)
        speed, copied_speed = least / plain.median, copy_speed(least)
        yield {
            "direction": direction,
            "seconds": plain.median, "p20": plain.p20, "p80": plain.p80, "samples": plain.count,
            "graph_seconds": None if graph is None else spread(graph).median,
            "host_seconds": timer.host_seconds(call),
            "minimum_bytes": least, "gb_s": speed / 1e9,
            "copy_gb_s": copied_speed / 1e9, "copy_percent": 100 * speed / copied_speed,
            "peak_bytes": timer.peak_bytes(call),
        }  # fmt: skip


def rows(
    timer: Timer,
    device: str,
    copy_speed: CopySpeed,
    names: tuple[str, ...] | None = None,
    shapes: tuple[str, ...] = SHAPES,
    providers: tuple[str, ...] | None = None,
    dtype: torch.dtype = torch.bfloat16,
) -> Iterator[dict]:
    """The table, a record at a time. A provider that refuses a shape or is wrong has one record with `failed`."""
    for operator in operators(names):
        for shape in (s for s in shapes if s in operator.shapes):
            case = Case(operator, operator.shapes[shape], dtype, device)
            for provider, function in candidates(operator, providers or present()):
                key = {"op": operator.name, "provider": provider, "shape": shape, "sizes": case.shape}
                key |= {"dtype": str(dtype).split(".")[1]}
                try:
                    deviation = case.deviation(provider, function)
                    key |= asdict(deviation)
                    if deviation.too_large(dtype):
                        raise ArithmeticError(f"{deviation.output}: error {deviation.error:.2e}, not timed")
                    for record in measure(case, function, timer, copy_speed):
                        yield key | record
                except Exception as refused:  # a peer's own limits; ours is an error of ours, and said as loudly
                    text = f"{type(refused).__name__}: {refused}".splitlines()[0][:160]
                    yield key | {"direction": "forward", "failed": text}
