"""The training step as Cerebras wants it: one static trace from the batch to the updated weights.

Runs in Cerebras' environment. Forward, backward, exact clipping, AdamW and the learning rate are one graph that is
traced once; what the host may know of a step comes out through closures. The same lines run on its CPU backend,
eagerly, and on CSX, where they are lowered.

Shapes in names: B rows, T tokens, S sources.
"""

from __future__ import annotations

import json
from contextlib import nullcontext

import cerebras.pytorch as cstorch
import torch
import torch.nn.functional as F
from cerebras.pytorch.amp.conditional_update import ConditionalUpdateManager
from torch import Tensor

from crystal.backends.cerebras.learning_rate import Piece, lr_of
from crystal.config import parse
from crystal.zoo.config import ModelConfig
from crystal.zoo.decoder import Decoder, Multipliers


class CurriculumLR(cstorch.optim.lr_scheduler.LRScheduler):
    """Every group's learning rate: the curriculum's, a function of the step, times the group's multiplier.

    last_epoch counts finished steps, so the step being made is last_epoch + 1.
    """

    def __init__(self, optimizer: cstorch.optim.Optimizer, pieces: list[Piece], multipliers: list[float]):
        self.pieces, self.multipliers = pieces, multipliers
        super().__init__(optimizer, total_iters=None)

    def _get_closed_form(self) -> Tensor:
        return lr_of(self.pieces, self.last_epoch + 1)

    def get(self) -> list[Tensor]:
        lr = self._get_closed_form()
        return [lr * multiplier for multiplier in self.multipliers]

    def state_dict(self) -> dict:
        return {"last_epoch": self.last_epoch}


class TorchAdamW(cstorch.optim.AdamW):
    """torch's AdamW (Loshchilov & Hutter 2019) on Cerebras' state: eps is added behind the bias correction.

    p -= lr (m / (1 - b1^t) / (sqrt(v / (1 - b2^t)) + eps) + wd p)
    """

    @torch.no_grad()
    def step(self, closure=None) -> None:
        for group in self.param_groups:
            beta1, beta2 = group["betas"]
            for p in group["params"]:
                state = self.state[p]
                m, v = state["exp_avg"], state["exp_avg_sq"]
                m.mul_(beta1).add_(p.grad, alpha=1.0 - beta1)
                v.mul_(beta2).addcmul_(p.grad, p.grad, value=1.0 - beta2)
                one = torch.ones_like(state["beta1_power"])
                correction = torch.sqrt(one - state["beta2_power"])
                update = m / (one - state["beta1_power"]) / (v.sqrt() / correction + group["eps"])
                update.add_(p * group["weight_decay"])
                update *= group["lr"]
                p.sub_(update)
                state["beta1_power"] *= beta1
                state["beta2_power"] *= beta2


class Session:
    """A model, its optimizer and its traced steps on one Cerebras backend, made from a job (see `bridge`)."""

    def __init__(self, job: dict, backend: cstorch.backend):
        self.job, self.backend = job, backend
        self.micro_batch_size: int | None = None  # rows; None: all at once
        config = parse(ModelConfig, job["model"], "job", ("model",))
        with backend.device:
            self.decoder = Decoder(config, Multipliers(*job["multipliers"]))
        self.compiled = cstorch.compile(self.decoder, backend)
        parameters = dict(self.decoder.named_parameters())
        groups = [
            {
                "params": [parameters[name] for name in group["tensors"]],
                "weight_decay": group["weight_decay"],
                "eps": group["eps"],
            }
            for group in job["groups"]
        ]
        adamw = cstorch.optim.AdamW if job["optimizer"] == "adamw_cerebras" else TorchAdamW
        self.adamw = adamw(groups, lr=0.0, betas=tuple(job["betas"]), correct_bias=True)
        pieces = [Piece(*piece) for piece in job["pieces"]]
        self.schedule = CurriculumLR(self.adamw, pieces, [group["lr_multiplier"] for group in job["groups"]])
        # tensors in the optimizer's order, which numbers its state
        self.names = [name for group in job["groups"] for name in group["tensors"]]
        self.train = cstorch.trace(self._train)
        self.eval = cstorch.trace(self._eval)

    def _score(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor, Tensor]:
        """(the batch's share of the step's loss, summed nats by source, unmasked tokens by source)."""
        # on CSX: mixed precision in the job's half type; the CPU backend computes in fp32
        with cstorch.amp.autocast() if self.backend.is_csx else nullcontext():
            logits = self.compiled(batch["ids_BT"], batch.get("documents_BT"))
        nll = F.cross_entropy(logits.float().flatten(0, 1), batch["labels_BT"].flatten().long(), reduction="none")
        nll_BT = nll.view(batch["labels_BT"].shape)
        weights_BT = batch["weights_BT"]
        counted_BT = (weights_BT > 0).float()
        # sums, not a product of matrices: that one autocast would do in bf16, which cannot count beyond 256
        nll_S = ((nll_BT * counted_BT).sum(1, keepdim=True) * batch["sources_BS"]).sum(0)
        tokens_S = (counted_BT.sum(1, keepdim=True) * batch["sources_BS"]).sum(0)
        return (nll_BT * weights_BT).sum(), nll_S.detach(), tokens_S

    def _micro_batches(self, batch: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """On the CPU, the rows as the run accumulates them; on CSX whole, the system cuts it up itself."""
        rows = batch["ids_BT"].shape[0]
        size = rows if self.backend.is_csx or not self.micro_batch_size else self.micro_batch_size
        return [{key: value[i : i + size] for key, value in batch.items()} for i in range(0, rows, size)]

    def _train(self, batch: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """(loss, gradient norm before clipping, 1 if the update was made, nats and tokens by source)."""
        parts = []
        for micro_batch in self._micro_batches(batch):
            loss, *by_source = self._score(micro_batch)
            loss.backward()
            parts.append((loss.detach(), *by_source))
        loss, nll_S, tokens_S = (sum(part[1:], part[0]) for part in zip(*parts, strict=True))
        grads = [p.grad for group in self.adamw.param_groups for p in group["params"]]
        norm = torch.linalg.vector_norm(torch.stack([torch.linalg.vector_norm(g) for g in grads]))
        # isfinite does not lower; nan compares false
        finite = (norm < float("inf")) & (torch.abs(loss) < float("inf"))
        if self.job["grad_clip"] is not None:
            clip = torch.where(norm > self.job["grad_clip"], self.job["grad_clip"] / norm, torch.ones_like(norm))
            for g in grads:
                g.mul_(clip)
        self._update(finite)
        self.adamw.zero_grad()
        return loss, norm, finite.float(), nll_S, tokens_S

    def _update(self, finite: Tensor) -> None:
        """AdamW at the step's learning rate; where loss or gradient is not finite, weights and moments stay."""
        self.schedule.update_last_value()
        guard = ConditionalUpdateManager()
        guard.set_condition(finite)
        with guard:
            for p in self.decoder.parameters():
                guard.mark_tensor(p)
                for value in self.adamw.state[p].values():
                    guard.mark_tensor(value)
            self.adamw.step()
        self.schedule.step()

    @torch.no_grad()
    def _eval(self, batch: dict[str, Tensor]) -> tuple[Tensor, Tensor]:
        return self._score(batch)[1:]

    def set_step(self, step: int) -> None:
        """So many steps of the run are done: the next one has the learning rate of step + 1."""
        with torch.no_grad():
            self.schedule.last_epoch.fill_(step)

    @torch.no_grad()
    def reset_optimizer(self) -> None:
        """Moments zero, bias correction from the beginning; the learning rate goes on."""
        beta1, beta2 = self.job["betas"]
        for state in self.adamw.state.values():
            state["exp_avg"].zero_()
            state["exp_avg_sq"].zero_()
            state["beta1_power"].fill_(beta1)
            state["beta2_power"].fill_(beta2)

    def state_dict(self, step: int, updates: int) -> dict:
        """What cstorch.save writes: the usual keys, and under `crystal` what our reader wants to know (JSON)."""
        return {
            "model": self.decoder.state_dict(),
            "optimizer": self.adamw.state_dict(),
            "lr_scheduler": {"last_epoch": self.schedule.last_epoch},
            "global_step": step,
            "crystal": json.dumps(
                {"optimizer_order": self.names, "optimizer_step": updates, "state": {"model": self.job["model"]}}
            ),
        }

    @torch.no_grad()
    def load(self, state: dict, with_optimizer: bool) -> None:
        """Take the weights of a state as `state_dict` gives it, and the moments or else fresh ones."""
        self.decoder.load_state_dict(state["model"])
        if not with_optimizer:
            self.reset_optimizer()
            return
        parameters = dict(self.decoder.named_parameters())
        for i, name in enumerate(self.names):
            held = state["optimizer"]["state"][i]
            for key, value in self.adamw.state[parameters[name]].items():
                value.copy_(held[key])
