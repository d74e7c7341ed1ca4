"""How micro-batches go through the stages: one after another where one stage is all, or as a pipeline.

The pipeline is torch.distributed.pipelining's interleaved 1F1B (Narayanan et al. 2021, arXiv 2104.04473): process r
of P holds stages r, r + P, r + 2P, …, and runs one forward and one backward in turn once the pipeline is full.
With one stage a process it is plain 1F1B. Activations and their gradients are all that goes between processes:
every process reads the same rows, so the last stage has the labels.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.pipelining import PipelineStage
from torch.distributed.pipelining.schedules import Schedule1F1B, ScheduleInterleaved1F1B

from crystal.backends.base import MicroBatch
from crystal.backends.cuda.parallelize import sharded_modules
from crystal.backends.cuda.stage import Stage

# what a pass gives: the step's loss (of this process' rows), and each micro-batch's nll_BT; None before the last stage
Losses = tuple[Tensor, list[Tensor]] | None


class Straight:
    """One stage, which is the whole model."""

    def __init__(self, stage: Stage):
        self.stage, self.sharded = stage, sharded_modules(stage)

    def train(self, batches: Sequence[MicroBatch]) -> Losses:
        """Forward and backward of a step's micro-batches; gradients are reduced over shards after each, over
        replicas after the last."""
        loss, nlls = 0.0, []
        for batch in batches:
            last = len(nlls) == len(batches) - 1
            self.stage.set_is_last_backward(last)
            self.stage.set_requires_all_reduce(last)
            part, nll_N = self.stage(batch.ids_BT, batch.documents_BT, batch.labels_BT, batch.weights_BT)
            part.sum().backward()
            loss, nlls = loss + part.detach().sum(), [*nlls, nll_N.view_as(batch.labels_BT)]
        return loss, nlls

    def evaluate(self, batch: MicroBatch) -> Tensor | None:
        """nll_BT of a micro-batch, forward only."""
        nll_N = self.stage(batch.ids_BT, batch.documents_BT, batch.labels_BT, batch.weights_BT)[1]
        for module in self.sharded:  # or gathered weights would outlive a change of the sharded ones
            module.reshard()
        return nll_N.view_as(batch.labels_BT)


class Pipeline:
    """Some stages of a pipeline of `n_stages`: those of this process, by number.

    token_shards: processes over which sequence parallelism divides what goes from stage to stage.
    """

    def __init__(
        self, stages: dict[int, Stage], n_stages: int, mesh: DeviceMesh, d_model: int, dtype: torch.dtype,
        token_shards: int,
    ):  # fmt: skip
        self.stages, self.n_stages, self.token_shards = stages, n_stages, token_shards
        self.group, self.rank, self.processes = mesh.get_group(), mesh.get_local_rank(), mesh.size()
        self.d_model, self.dtype = d_model, dtype
        self.device = torch.device("cpu")
        if mesh.device_type == "cuda":
            self.device = torch.device("cuda", torch.cuda.current_device())
        # NCCL makes a group's communicator at its first collective, which all must join; without this one it would be
        # the first exchange of 1F1B that goes both ways, which some do not (torch's schedules.py, _warmup_p2p)
        dist.all_reduce(torch.zeros(1, device=self.device), group=self.group)
        self._schedules: dict[tuple, Schedule1F1B | ScheduleInterleaved1F1B] = {}

    def train(self, batches: Sequence[MicroBatch]) -> Losses:
        """Forward and backward of a step's micro-batches; gradients are reduced once, after the last."""
        first, last = 0 in self.stages, self.n_stages - 1 in self.stages
        inputs = [{"documents_BT": b.documents_BT} for b in batches]
        if last:
            for kwargs, b in zip(inputs, batches, strict=True):
                kwargs |= {"labels_BT": b.labels_BT, "weights_BT": b.weights_BT}
        outputs = self._schedule(len(batches), batches[0].ids_BT.shape).step(
            arg_mbs=[(b.ids_BT,) for b in batches] if first else None,
            kwarg_mbs=inputs,
            target_mbs=[b.labels_BT for b in batches] if last else None,
        )
        if not last:
            return None
        losses_M, nll_N = outputs
        return losses_M.detach().sum(), list(nll_N.view(len(batches), *batches[0].ids_BT.shape))

    def _schedule(self, micro_batches: int, shape_BT: Sequence[int]) -> Schedule1F1B | ScheduleInterleaved1F1B:
        """The schedule of so many micro-batches of a shape, made when first asked for."""
        key = (micro_batches, *shape_BT)
        if key not in self._schedules:
            parts = [self._part(number, stage, shape_BT) for number, stage in self.stages.items()]
            options = {"loss_fn": lambda output, _: output[0].sum(), "scale_grads": False}
            if len(parts) == 1:
                self._schedules[key] = Schedule1F1B(parts[0], micro_batches, **options)
            else:
                self._schedules[key] = ScheduleInterleaved1F1B(parts, micro_batches, **options)
        return self._schedules[key]

    def _part(self, number: int, stage: Stage, shape_BT: Sequence[int]) -> PipelineStage:
        """Shapes are given, so that torch need not run the stages once to find them."""
        ids = torch.empty(*shape_BT, dtype=torch.int64, device="meta")
        x_BTD = self._between(shape_BT, device="meta", requires_grad=True)
        results = (torch.empty(1, device="meta", requires_grad=True), torch.empty(math.prod(shape_BT), device="meta"))
        return PipelineStage(
            stage, number, self.n_stages, self.device, group=self.group,
            input_args=(ids if stage.first else x_BTD,), output_args=results if stage.last else (x_BTD,),
        )  # fmt: skip

    def _between(self, shape_BT: Sequence[int], **options) -> Tensor:
        """An empty x_BTD, as one stage gives it to the next."""
        rows, tokens = shape_BT
        return torch.empty(rows, tokens // self.token_shards, self.d_model, dtype=self.dtype, **options)

    def evaluate(self, batch: MicroBatch) -> Tensor | None:
        """nll_BT on the process of the last stage, None on others; the stages run one after another."""
        x = batch.ids_BT
        for number in range(self.n_stages):
            owner, before = number % self.processes, (number - 1) % self.processes
            if number and owner != before:
                if self.rank == before:
                    dist.send(x.contiguous(), group=self.group, group_dst=owner)
                elif self.rank == owner:
                    x = self._between(batch.ids_BT.shape, device=self.device)
                    dist.recv(x, group=self.group, group_src=before)
            if self.rank == owner:
                stage = self.stages[number]
                labels = (batch.labels_BT, batch.weights_BT) if stage.last else ()
                x = stage(x, batch.documents_BT, *labels)
                for module in sharded_modules(stage):
                    module.reshard()
        return x[1].view_as(batch.labels_BT) if self.n_stages - 1 in self.stages else None
