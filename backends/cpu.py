"""The reference backend: one process, fp32 weights and AdamW, compute in bf16 or fp32.

With bf16 the decoder holds a second, rounded set of weights that the update writes beside the fp32 ones; gradients of
several micro-batches are added up in fp32, those of one are taken as they are. With fp32 there is one set.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

import crystal.kernels.native as native
from crystal.backends.adamw import adamw_, gradient_norm
from crystal.backends.base import MicroBatch, OneProcess, Setup, StepResult, add_sources
from crystal.backends.cast import round_to_bf16
from crystal.backends.config import CpuConfig
from crystal.backends.machine import with_dtype
from crystal.errors import CheckpointError
from crystal.kernels import tuning
from crystal.memory import keep_heap
from crystal.zoo.build import build, initial_weights
from crystal.zoo.decoder import Decoder


class CpuBackend(OneProcess):
    """See `Backend` for the methods."""

    def __init__(
        self,
        setup: Setup,
        config: CpuConfig,
    ):
        if config.threads:
            torch.set_num_threads(config.threads)
        config = with_dtype(config)
        keep_heap()
        self.keep(setup)
        self.config = config
        self.compute = build(setup.model, setup.plan).to_empty(device="cpu")
        self.rounded = config.dtype == "bf16"
        if self.rounded:
            self.compute.to(torch.bfloat16)
        if config.compile:
            for block in self.compute.blocks:
                block.forward = torch.compile(block.forward, dynamic=False)
        parameters = dict(self.compute.named_parameters())
        self.weights = {
            name: nn.Parameter(torch.empty(p.shape)) if self.rounded else p for name, p in parameters.items()
        }
        self.gradients: dict[str, Tensor] = {}  # of the step under way
        for name, p in parameters.items():
            p.register_post_accumulate_grad_hook(self._collect(name))
        self.stale = True  # the rounded weights are older than the fp32 ones
        self.reset_optimizer()

    def _collect(self, name: str) -> Callable[[Tensor], None]:
        """Take a micro-batch's gradient away as soon as it is whole: the first as it is, a sum of several in fp32."""

        def hook(p: Tensor) -> None:
            grad, p.grad = p.grad, None
            if name in self.gradients:
                grad = self.gradients[name].float().add_(grad)
            self.gradients[name] = grad

        return hook

    def initialise(self) -> None:
        with torch.no_grad():
            for name, tensor in initial_weights(self.plan, self.seed):
                self.weights[name].copy_(tensor)
        self.stale = True

    def reset_optimizer(self) -> None:
        self.parameter_groups = self.plan.parameter_groups(self.weights, lr=0.0)
        self.moments = {
            moment: {name: torch.zeros_like(p, requires_grad=False) for name, p in self.weights.items()}
            for moment in ("exp_avg", "exp_avg_sq")
        }
        self.optimizer_step = 0

    def train_step(self, step: int, micro_batches: Iterable[MicroBatch]) -> StepResult:
        self._cast()
        self.gradients.clear()  # of a step that was left out, or interrupted
        loss = torch.zeros(())
        nll_S, tokens_S = torch.zeros(self.n_sources), torch.zeros(self.n_sources)
        for batch in micro_batches:
            part, nll_BT = self._forward(batch)
            part.backward()
            loss += part.detach()
            add_sources(batch, nll_BT, nll_S, tokens_S)
        norms = [gradient_norm(self.gradients[name]) for name in self.weights]
        norm = torch.linalg.vector_norm(torch.stack(norms))
        applied = torch.isfinite(norm) & torch.isfinite(loss)
        if applied:
            clip = self.optimizer_config.grad_clip
            self._update(self.schedule(step), clip / norm.item() if clip is not None and norm > clip else None)
        return StepResult(loss, norm, applied, nll_S, tokens_S)

    def _update(self, lr: float, scale: float | None) -> None:
        """AdamW by the plan's groups, from gradients times scale; a rounded set of weights is written on the way."""
        self.optimizer_step += 1
        names, parameters = self._names(), dict(self.compute.named_parameters())
        for group in self.parameter_groups:
            numbers = {key: group[key] for key in ("eps", "weight_decay")} | {"lr": lr * group["lr_multiplier"]}
            for p in group["params"]:
                name = names[id(p)]
                m, v = (held[name] for held in self.moments.values())
                rounded = parameters[name] if self.rounded else None
                grad, step = self.gradients.pop(name), self.optimizer_step
                adamw_(p, grad, m, v, config=self.optimizer_config, step=step, scale=scale, rounded=rounded, **numbers)

    @torch.no_grad()
    def eval_step(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        self._cast()
        nll_S, tokens_S = torch.zeros(self.n_sources), torch.zeros(self.n_sources)
        add_sources(batch, self._forward(batch)[1], nll_S, tokens_S)
        return nll_S, tokens_S

    def _forward(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        return self.compute.loss(batch.ids_BT, batch.labels_BT, batch.weights_BT, batch.documents_BT)

    @torch.no_grad()
    def _cast(self) -> None:
        """Round the weights for compute, where it was not the update that changed them."""
        if self.rounded and self.stale:
            for name, p in self.compute.named_parameters():
                round_to_bf16(self.weights[name], p)
        self.stale = False

    def state(self) -> Iterator[tuple[str, Tensor]]:
        for name, p in self.weights.items():
            yield f"model.{name}", p.detach()
        for moment, held in self.moments.items():
            for name, tensor in held.items():
                yield f"optimizer.{moment}.{name}", tensor

    def scalars(self) -> dict:
        return {"optimizer_step": self.optimizer_step}

    @torch.no_grad()
    def load(self, tensors: Callable[[str], Iterable[tuple[str, Tensor]]], scalars: dict | None) -> None:
        missing = set(self.weights)
        for name, tensor in tensors("model"):
            self.weights[name].copy_(tensor)
            missing.remove(name)
        if missing:
            raise CheckpointError(f"checkpoint: expected every tensor of the model, {min(missing)} is not in it")
        self.stale = True
        self.reset_optimizer()
        if scalars is None or scalars["optimizer_step"] == 0:
            return
        self.optimizer_step = scalars["optimizer_step"]
        for moment, held in self.moments.items():
            for name, tensor in tensors(f"optimizer.{moment}"):
                held[name].copy_(tensor)

    def decoder(self) -> Decoder:
        if not self.rounded and not self.config.compile:
            return self.compute
        decoder = build(self.model_config, self.plan)
        decoder.load_state_dict(self.weights, assign=True)
        return decoder

    def groups(self) -> Sequence[dict]:
        names = self._names()
        keys = ("name", "lr_multiplier", "weight_decay", "eps")
        return [
            {key: group[key] for key in keys} | {"tensors": [names[id(p)] for p in group["params"]]}
            for group in self.parameter_groups
        ]

    def _names(self) -> dict[int, str]:
        return {id(p): name for name, p in self.weights.items()}

    def describe(self) -> dict:
        return {
            "name": "cpu",
            "device": platform.processor() or platform.machine(),
            "threads": torch.get_num_threads(),
            "compute_dtype": self.config.dtype,
            "kernels": "native.c" if native.available() else "torch",
            "choices": tuning.choices(),
            "weights_dtype": "fp32",
            "exact_clipping": True,
            "gradient_accumulation": True,
            "layouts": ["single process"],
        }
