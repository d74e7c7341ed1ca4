"""One short training run, watched: how large every activation, weight and update is.

Sizes are those of "Tensor Programs V", appendix D (mean absolute value of each module's output, on one batch that
is repeated), and for each weight tensor three numbers that isolate one rule each: its size at initialisation, the
size of its first update, and what that update does to the tensor's own output. Adam's first update of an element
is lr * g/(|g| + eps), so its size *is* the tensor's learning rate, whatever the gradient: the one statistic that
needs neither seeds nor calibration. Later steps blur it, as signs cancel. (SGD's is lr times the gradient's size, and
muP's rules make it the same power of width; of Muon's, an orthogonal matrix times lr, the spectral norm is taken.)

Nothing is read back inside the run: hooks keep tensors, and all numbers come to the host at its end.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from crystal.mup.forward_graph import members
from crystal.mup.observe import asked, made_by, refuse_late
from crystal.mup.optimizers import Group, optimizers_of, read_groups, refuse_still
from crystal.mup.verdict import CheckError

ROWS = 32  # tokens of a batch that the effect of an update is measured on
# An element whose gradient is under this many eps is not moved by lr: a key's bias has only rounding noise where
# nothing rotates (softmax ignores what is added to all scores of a query), and so have words that nobody predicts.
NOISE = 100
ROUNDING = 1e-5  # of the model's largest gradient: what is smaller all over a tensor is rounding noise
SAMPLE = 1 << 17  # elements of a tensor that its init and first update are read from
OUTPUT = "output"  # name of what the whole model returns


@dataclass(frozen=True)
class Task:
    """How one model of a family is made and trained; size: its width, or its depth in a check over depth.

    model: (size, seed) → initialised module; optimizer: module → its optimizer, or a list of them;
    loss: (module, batch) → scalar, from the module's own forward; batch: seed → one batch, used at every step.
    """

    model: Callable[[int, int], nn.Module]
    optimizer: Callable[[nn.Module], Optimizer | Sequence[Optimizer]]
    loss: Callable[[nn.Module, Any], Tensor]
    batch: Callable[[int], Any]


@dataclass(frozen=True)
class Measured:
    """values: (name, quantity, step) → number; quantity: init, update, push (of tensors), size, change (of outputs).

    groups: tensor → its optimizer group; quiet: tensors whose update cannot be read, with the reason: `no gradient`,
    `noise` (their gradient is rounding noise), `eps` (which is larger than all of it), `near eps`.
    """

    size: int
    seed: int
    values: dict[tuple[str, str, int], float]
    groups: dict[str, Group]
    quiet: dict[str, str]


def measure(
    task: Task,
    size: int,
    seed: int,
    steps: int,
    keep: Callable[[nn.Module, Callable[[nn.Module], Tensor]], None] | None = None,
) -> Measured:
    """Train one model for `steps` forward passes with steps - 1 updates between them.

    keep: is shown the model and a call of its forward pass before anything is trained. Raises CheckError for a
    parameter that is made or replaced in the forward pass, for an lr of 0, and for an optimizer without a rule.
    """
    model = asked(f"model of size {size}", lambda: task.model(size, seed))
    if not isinstance(model, nn.Module):
        raise CheckError(f"model: expected a torch.nn.Module at size {size}, got {type(model).__name__}")
    refuse_late(model, " that makes the model")
    if not any(p.requires_grad for p in model.parameters()):
        raise CheckError(f"model: expected tensors to train at size {size}, there are none")
    batch = asked("batch", lambda: task.batch(seed))
    if keep:
        keep(model, lambda m: task.loss(m, batch))
    optimizers = optimizers_of(made_by(task.optimizer, model))
    every = dict(model.named_parameters())
    named = {clean(n): p for n, p in every.items() if p.requires_grad}
    groups = {clean(n): g for n, g in read_groups(model, optimizers).items()}
    refuse_still(optimizers, f"at size {size}")
    run = _Run(model, named, groups)
    for step in range(1, steps + 1):
        with run.watch(step):
            loss = asked("loss", lambda: task.loss(model, batch))
        if step == 1:
            _refuse_other(every, model)
        if not isinstance(loss, Tensor) or loss.numel() != 1 or (step < steps and not loss.requires_grad):
            what = f"a tensor of shape {tuple(loss.shape)}" if isinstance(loss, Tensor) else type(loss).__name__
            raise CheckError(f"loss: expected one number with a gradient, got {what} at size {size}")
        if step < steps:
            loss.backward()
            run.before_update(step)
            for optimizer in optimizers:
                optimizer.step()
            run.after_update(step)
            if step + 1 < steps:  # the last forward pass has no backward
                for p in named.values():
                    if p.grad is not None:
                        p.grad.zero_()  # and keep: fresh memory costs more than zeros
    return Measured(size, seed, run.values(), groups, run.quiet())


def _refuse_other(before: dict[str, Tensor], model: nn.Module) -> None:
    """Raises CheckError for a parameter that the first forward pass made or replaced: no optimizer has it."""
    sharded = any(hasattr(p, "full_tensor") for p in before.values())  # FSDP swaps shards for whole tensors and back
    for name, p in model.named_parameters():
        if name not in before or (before[name] is not p and not sharded):
            how = "replaced" if name in before else "made"
            raise CheckError(f"{clean(name)}: is {how} in the forward pass, after the optimizer; do so in the factory")


_WRAPPERS = ("_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module")


@cache
def clean(name: str) -> str:
    """A module's or tensor's name without what wrappers (compile, DDP, checkpointing) put into it."""
    kept = [part for part in name.split(".") if part not in _WRAPPERS]
    return ".".join(kept[1:] if kept[:1] == ["module"] else kept)


class _Run:
    """The numbers of one run, kept on the device until `values`."""

    def __init__(self, model: nn.Module, named: dict[str, Tensor], groups: dict[str, Group]):
        self.named, self.groups = named, groups
        self.numbers: list[tuple[tuple[str, str, int], Tensor]] = []
        self.first: dict[str, Tensor] = {}  # outputs of the first step
        self.outputs: dict[str, Tensor] = {}
        self.inputs: dict[str, Tensor] = {}
        self.waiting = dict(named)  # tensors whose first real update has not come yet
        self.gradients: dict[str, float] = dict.fromkeys(named, 0.0)  # the largest that each has had
        self.before: dict[str, _Before] = {}
        self._add("init", 0, _rms([_sample(p) for p in named.values()]), list(named))
        self.hooks = []
        for name, module in model.named_modules():
            name = clean(name) or OUTPUT
            self.hooks.append(module.register_forward_hook(self._output_hook(name)))
            if isinstance(module, nn.Linear | nn.Embedding) and f"{name}.weight" in named:
                self.hooks.append(module.register_forward_pre_hook(self._input_hook(f"{name}.weight")))

    def _output_hook(self, name: str):
        def hook(module, inputs, output):
            if isinstance(output, Tensor):  # nearly always, and quickly
                found = [("", output)] if output.is_floating_point() and output.ndim else []
            else:
                found = members(output)
            for key, tensor in found:
                self.outputs[f"{name}[{key}]" if key else name] = tensor.detach()

        return hook

    def _input_hook(self, name: str):
        def hook(module, inputs):
            self.inputs[name] = inputs[0].detach()

        return hook

    @contextmanager
    def watch(self, step: int) -> Iterator[None]:
        """The forward pass of one step."""
        self.outputs, self.inputs = {}, {}
        yield
        self.after_forward(step)

    @torch.no_grad()
    def after_forward(self, step: int) -> None:
        outputs = self.outputs
        if step == 1:
            self.first = outputs
        self._add("size", step, _mean_abs(list(outputs.values())), list(outputs))
        if step > 1:
            both = [n for n in outputs if n in self.first and outputs[n].shape == self.first[n].shape]
            changes = [outputs[n] - self.first[n] for n in both]
            self._add("change", step, _mean_abs(changes), both)
        self.outputs = {}

    @torch.no_grad()
    def before_update(self, step: int) -> None:
        """Of tensors that have not moved yet, keep what their first update will be read from."""
        live = {n: _sample(p.grad) for n, p in self.waiting.items() if p.grad is not None and p.numel()}
        largest = torch.stack(_norms(list(live.values()), math.inf)).tolist() if live else []
        for name, size in zip(live, largest, strict=True):
            self.gradients[name] = max(self.gradients[name], size)
        rounding = ROUNDING * max(self.gradients.values(), default=0.0)
        for (name, grad), size in zip(live.items(), largest, strict=True):
            group = self.groups.get(name)
            # an Adam step does not show how small its gradient was
            noise = (
                0.0 if group is None else NOISE * group.eps if group.eps else rounding if group.rule != "adam" else 0.0
            )
            if size > noise and (group is None or group.shows_lr):
                p = self.waiting.pop(name)
                old = self._looked_at(name).clone()
                moving = torch.ones_like(old) if self._by_muon(name) else grad.abs() > noise
                self.before[name] = _Before(old, moving, self._output(name, p))

    def quiet(self) -> dict[str, str]:
        """Tensors that are still waiting, and why."""
        rounding = ROUNDING * max(self.gradients.values(), default=0.0)
        found = {name: "late" for name, group in self.groups.items() if not group.shows_lr and name in self.named}
        for name in self.waiting:
            size, group = self.gradients[name], self.groups.get(name)
            if name in found:
                continue
            if size == 0:
                found[name] = "no gradient"
            elif size <= rounding:
                found[name] = "noise"
            else:
                found[name] = "eps" if group is not None and group.eps and size <= group.eps else "near eps"
        return found

    @torch.no_grad()
    def after_update(self, step: int) -> None:
        moved = {n: self._step(n, old) * old.moving for n, old in self.before.items()}
        counts = [old.moving.sum() for old in self.before.values()]
        sizes = [norm / n.sqrt() for norm, n in zip(_norms(list(moved.values()), 2), counts, strict=True)]
        for place, (name, step_taken) in enumerate(moved.items()):
            if self._by_muon(name):
                sizes[place] = torch.linalg.matrix_norm(step_taken.flatten(1), 2)
        self._add("update", step, sizes, list(moved))
        # on the inputs that the gradient came from: the tensor's own effect, without that of the others' updates
        pushed = {n: old.output for n, old in self.before.items() if old.output is not None}
        self._add("push", step, _rms([self._output(n, self.named[n]) - y for n, y in pushed.items()]), list(pushed))
        self.before, self.inputs = {}, {}

    def _step(self, name: str, old: _Before) -> Tensor:
        """What the optimizer added, less AdamW's decay, which is no gradient's doing: a gain of 1 shows it."""
        step, group = self._looked_at(name) - old.sample, self.groups.get(name)
        if group is not None and group.decoupled and group.weight_decay:
            step = step + group.lr * group.weight_decay * old.sample
        return step

    def _looked_at(self, name: str) -> Tensor:
        """The elements that an update is read from: of Muon's, all, for it is their matrix's norm that counts."""
        weight = self.named[name].detach()
        return weight if self._by_muon(name) else _sample(weight)

    def _by_muon(self, name: str) -> bool:
        group = self.groups.get(name)
        return group is not None and group.rule == "muon"

    def _output(self, name: str, weight: Tensor) -> Tensor | None:
        """weight applied to ROWS tokens, spread over the batch, of its module's input; None if no module's."""
        if name not in self.inputs:
            return None
        x = self.inputs[name]
        x = x.to_local() if hasattr(x, "to_local") else x
        x = x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.reshape(-1)
        x = x[:: max(1, len(x) // ROWS)]
        if hasattr(weight, "full_tensor"):  # sharded: a part that fits what this process has as input, or the whole
            part = weight.to_local()
            weight = part if x.is_floating_point() and part.shape[-1] == x.shape[-1] else weight.full_tensor()
        return F.linear(x, weight.to(x.dtype)) if x.is_floating_point() else F.embedding(x, weight)

    def _add(self, quantity: str, step: int, numbers: list[Tensor], names: list[str]) -> None:
        self.numbers += [((n, quantity, step), x) for n, x in zip(names, numbers, strict=True)]

    def values(self) -> dict[tuple[str, str, int], float]:
        for hook in self.hooks:
            hook.remove()
        numbers = torch.stack([x.float() for _, x in self.numbers]).tolist()
        return {key: x for (key, _), x in zip(self.numbers, numbers, strict=True)}


@dataclass(frozen=True)
class _Before:
    """A tensor just before its first update: elements, which of them have a gradient, its output."""

    sample: Tensor
    moving: Tensor
    output: Tensor | None


def _rms(tensors: list[Tensor]) -> list[Tensor]:
    return [_whole(norm) / max(t.numel(), 1) ** 0.5 for norm, t in zip(_norms(tensors, 2), tensors, strict=True)]


def _mean_abs(tensors: list[Tensor]) -> list[Tensor]:
    return [_whole(norm) / t.numel() for norm, t in zip(_norms(tensors, 1), tensors, strict=True)]


def _norms(tensors: list[Tensor], order: int) -> list[Tensor]:
    if any(hasattr(t, "full_tensor") for t in tensors):  # sharded
        return [torch.linalg.vector_norm(t, order) for t in tensors]
    return list(torch._foreach_norm([t.float() for t in tensors], order)) if tensors else []


def _sample(tensor: Tensor) -> Tensor:
    """At most SAMPLE elements, evenly spread, of this process' part: one tensor has one sigma and one lr."""
    flat = (tensor.detach().to_local() if hasattr(tensor, "to_local") else tensor.detach()).reshape(-1)
    return flat[:: max(1, flat.numel() // SAMPLE)]


def _whole(number: Tensor) -> Tensor:
    return number.full_tensor() if hasattr(number, "full_tensor") else number
