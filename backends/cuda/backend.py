"""GPUs under torchrun, one process each; `device: cpu` runs the same layouts over gloo, for tests and small machines.

Every process holds its part of the fp32 weights and moments and updates it by itself: which tensor has which
learning rate, decay and eps goes by its name in the plan. What must be known everywhere (loss, gradient norm, sums
by source) is added up in one all-reduce a step. Weights are rounded for bf16 compute by the hardware, to the nearest
even, where the `cpu` backend rounds half up; fp32 compute does the same operations as `cpu` does.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence

import torch
import torch.distributed as dist
from torch import Tensor

from crystal.backends.adamw import make_optimizer
from crystal.backends.base import MicroBatch, Part, Prepared, Setup, StepResult, add_sources
from crystal.backends.config import CudaConfig
from crystal.backends.cuda.gpu import settle
from crystal.backends.cuda.host_memory import HostMemory, host_memory
from crystal.backends.cuda.mesh import join, place_in
from crystal.backends.cuda.parallelize import Held, held_by, parallelise
from crystal.backends.cuda.pipeline import Pipeline, Straight
from crystal.backends.cuda.stage import Stage, layers_of
from crystal.backends.machine import with_dtype
from crystal.errors import CheckpointError
from crystal.zoo.build import build, initial_tensor
from crystal.zoo.decoder import Decoder

MOMENTS = ("exp_avg", "exp_avg_sq")


class CudaBackend(Prepared):
    """See `Backend` for the methods."""

    def __init__(
        self,
        setup: Setup,
        config: CudaConfig,
    ):
        self.keep(setup)
        if config.device == "cuda":
            settle()
        self.mesh = join(config)
        self.config = config = with_dtype(config)
        model = setup.model
        self.place = place_in(self.mesh)
        self.device = torch.device(config.device)
        pipeline = self.mesh["pp"]
        n_stages = pipeline.size() * config.parallel.interleave if pipeline.size() > 1 else 1
        stages = {i: self._stage(i, n_stages) for i in range(pipeline.get_local_rank(), n_stages, pipeline.size())}
        self.held: dict[str, Held] = {}
        for stage in stages.values():
            self.held |= held_by(stage, self.mesh)
        if n_stages == 1:
            self.passes = Straight(stages[0])
        else:
            dtype = torch.bfloat16 if config.dtype == "bf16" else torch.float32
            self.passes = Pipeline(stages, n_stages, pipeline, model.d_model, dtype, config.parallel.token_shards)
        # the processes that hold a tied embedding twice, in the first and in the last stage
        self.tied = self._ends_of_pipelines() if model.tie_embeddings and n_stages > 1 else None
        self.counts = n_stages - 1 in stages and self.mesh["tp"].get_local_rank() == 0  # no loss is added twice
        self._host: HostMemory | None = None  # for what is saved, kept from one save to the next
        self.reset_optimizer()

    def _stage(self, number: int, n_stages: int) -> Stage:
        decoder = build(self.model_config, self.plan)
        layers = layers_of(number, n_stages, self.model_config.n_layers)
        stage = Stage(decoder, layers, first=number == 0, last=number == n_stages - 1)
        parallelise(stage, self.mesh, self.config)
        return stage.to_empty(device=self.device)

    def _ends_of_pipelines(self) -> dist.ProcessGroup | None:
        """The group of this pipeline's first and last process; every process makes all groups, as torch asks."""
        own = None
        for line in self.mesh.mesh.flatten(1).T.tolist():  # pp is the first dimension
            group = dist.new_group([line[0], line[-1]])
            if dist.get_rank() in (line[0], line[-1]):
                own = group
        return own

    @torch.no_grad()
    def initialise(self) -> None:
        """Each process draws whole tensors, one at a time, and keeps its part: the same weights in any layout."""
        for row in self.plan.tensors:
            if held := self.held.get(row.tensor):
                held.weight.copy_(initial_tensor(row, self.seed)[held.part(held.weight).slices])

    def reset_optimizer(self) -> None:
        own = dataclasses.replace(self.plan, tensors=tuple(r for r in self.plan.tensors if r.tensor in self.held))
        weights = {name: held.weight for name, held in self.held.items()}
        self.adamw = make_optimizer(self.optimizer_config, own.parameter_groups(weights, lr=0.0))
        self.optimizer_step = 0

    def train_step(self, step: int, micro_batches: Iterable[MicroBatch]) -> StepResult:
        batches = [self._on_device(batch) for batch in micro_batches]
        losses = self.passes.train(batches)
        grads = {name: held.grad() for name, held in self.held.items()}
        self._sum_over_tokens([grads[name] for name, held in self.held.items() if held.by_tokens])
        if self.tied is not None and "embed.weight" in grads:
            dist.all_reduce(grads["embed.weight"], group=self.tied)
        loss, norm, nll_S, tokens_S = self._reduced(batches, losses, grads)
        applied = torch.isfinite(norm) & torch.isfinite(loss)
        if applied:  # the one wait of a step: every process must go the same way
            clip = self.optimizer_config.grad_clip
            if clip is not None and norm > clip:
                torch._foreach_mul_(list(grads.values()), clip / norm.item())
            lr = self.schedule(step)
            for group in self.adamw.param_groups:
                group["lr"] = lr * group["lr_multiplier"]
            for name, held in self.held.items():
                held.weight.grad = grads[name]
            self.adamw.step()
            self.optimizer_step += 1
        for held in self.held.values():
            held.parameter.grad = held.weight.grad = None
        return StepResult(loss, norm, applied, nll_S, tokens_S)

    def _sum_over_tokens(self, grads: list[Tensor]) -> None:
        """Add up, in place, what the processes of `tp` have of these gradients, in one exchange for all."""
        if grads:
            flat = torch.cat([grad.flatten() for grad in grads])
            dist.all_reduce(flat, group=self.mesh["tp"].get_group())
            torch._foreach_copy_(grads, [part.view_as(grad) for part, grad in zip(
                flat.split([grad.numel() for grad in grads]), grads, strict=True
            )])  # fmt: skip

    def _reduced(self, batches: list[MicroBatch], losses, grads: dict[str, Tensor]) -> tuple[Tensor, ...]:
        """(loss, gradient norm, nll_S, tokens_S) of the whole step: what each process has of them, added up.

        The squared norm of a tensor that several processes hold is counted once, each giving its share.
        """
        norms = torch.stack(torch._foreach_norm(list(grads.values()))).double()
        copies = torch.tensor([self.held[name].copies for name in grads], device=self.device)
        sums = torch.zeros(2 + 2 * self.n_sources, dtype=torch.float64, device=self.device)
        sums[0] = (norms.square() / copies).sum()
        if losses is not None and self.counts:
            sums[1], nlls = losses
            for batch, nll_BT in zip(batches, nlls, strict=True):
                sums[2:] += self._by_source(batch, nll_BT)
        dist.all_reduce(sums)
        return sums[1].float(), sums[0].sqrt().float(), *sums[2:].float().chunk(2)

    @torch.no_grad()
    def eval_step(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        batch = self._on_device(batch)
        nll_BT = self.passes.evaluate(batch)
        sums = torch.zeros(2 * self.n_sources, dtype=torch.float64, device=self.device)
        if nll_BT is not None and self.counts:
            sums += self._by_source(batch, nll_BT)
        dist.all_reduce(sums)
        return sums.float().chunk(2)

    def _by_source(self, batch: MicroBatch, nll_BT: Tensor) -> Tensor:
        """[nats of each source, unmasked tokens of each source]."""
        sums = torch.zeros(2, self.n_sources, dtype=torch.float64, device=self.device)
        add_sources(batch, nll_BT, *sums)
        return sums.flatten()

    def _on_device(self, batch: MicroBatch) -> MicroBatch:
        if self.config.device == "cpu":
            return batch
        tensors = {field.name: getattr(batch, field.name) for field in dataclasses.fields(batch)}
        return MicroBatch(**{k: t.pin_memory().to(self.device, non_blocking=True) for k, t in tensors.items()})

    def state(self) -> Iterator[tuple[str, Part]]:
        """Copies in host memory of the parts that this process saves; those of equal copies that are first."""
        saved = [(name, held) for name, held in self.held.items() if held.first and held.weight.numel()]
        sources = [(f"model.{name}", held, held.weight.detach()) for name, held in saved]
        for moment in MOMENTS:
            for name, held in saved:
                values = self.adamw.state.get(held.weight, {}).get(moment)
                sources.append((f"optimizer.{moment}.{name}", held, values))
        on_gpu = self.config.device == "cuda"
        if self._host is None:
            self._host = host_memory([(key, held.weight.shape) for key, held, _ in sources], pinned=on_gpu)
        copies = []
        for key, held, values in sources:
            copy = self._host.parts[key]
            copies.append((key, held.part(copy.zero_() if values is None else copy.copy_(values, non_blocking=True))))
        if on_gpu:
            torch.cuda.current_stream().synchronize()
        yield from copies

    def scalars(self) -> dict:
        return {"optimizer_step": self.optimizer_step}

    @torch.no_grad()
    def load(self, tensors: Callable[..., Iterable[tuple[str, Tensor]]], scalars: dict | None) -> None:
        wanted = {name: held.part(held.weight).slices for name, held in self.held.items()}
        missing = set(wanted)
        for name, tensor in tensors("model", wanted):
            self.held[name].weight.copy_(tensor)
            missing.remove(name)
        if missing:
            raise CheckpointError(f"checkpoint: expected every tensor of the model, {min(missing)} is not in it")
        self.reset_optimizer()
        if scalars is None or scalars["optimizer_step"] == 0:
            return
        self.optimizer_step = scalars["optimizer_step"]
        fused = self.optimizer_config.name == "adamw"  # torch's fused kernel reads its step on the device
        for held in self.held.values():
            step = torch.tensor(float(self.optimizer_step), device=self.device if fused else "cpu")
            self.adamw.state[held.weight]["step"] = step
        for moment in MOMENTS:
            for name, tensor in tensors(f"optimizer.{moment}", wanted):
                weight = self.held[name].weight
                self.adamw.state[weight][moment] = tensor.to(weight.device, copy=True)

    def agree(self, *numbers: int) -> tuple[int, ...]:
        if self.place.processes == 1:
            return numbers
        largest = torch.tensor(numbers)  # on the host, where signals come from
        dist.all_reduce(largest, dist.ReduceOp.MAX)
        return tuple(largest.tolist())

    @torch.no_grad()
    def decoder(self) -> Decoder:
        """The whole model on the host of every process, which must all ask for it."""
        decoder = build(self.model_config, self.plan)
        stages = self.mesh["pp"]
        whole = {}
        for row in self.plan.tensors:
            held = self.held.get(row.tensor)
            has = torch.tensor([stages.get_local_rank() if held else stages.size()])
            dist.all_reduce(has, dist.ReduceOp.MIN, group=stages.get_group())
            tensor = held.parameter.full_tensor() if held else torch.empty(row.shape, device=self.device)
            dist.broadcast(tensor, group=stages.get_group(), group_src=int(has))
            whole[row.tensor] = tensor.cpu()
        decoder.load_state_dict(whole, assign=True)
        return decoder

    def groups(self) -> Sequence[dict]:
        """Of all stages: each process tells of the tensors that its own optimizer holds."""
        names = {id(held.weight): name for name, held in self.held.items()}
        keys = ("name", "lr_multiplier", "weight_decay", "eps")
        own = [
            {key: group[key] for key in keys} | {"tensors": [names[id(p)] for p in group["params"]]}
            for group in self.adamw.param_groups
        ]
        every = [None] * self.mesh["pp"].size()
        dist.all_gather_object(every, own, group=self.mesh["pp"].get_group())
        return [group for groups in every for group in groups]

    def describe(self) -> dict:
        cuda = self.config.device == "cuda"
        return {
            "name": "cuda",
            "device": torch.cuda.get_device_name() if cuda else "cpu",
            "processes": self.place.processes,
            "parallel": self.config.parallel.model_dump(),
            "compute_dtype": self.config.dtype,
            "weights_dtype": "fp32",
            "recompute": self.config.recompute,
            "compiled": self.config.compile,
            "exact_clipping": True,
            "gradient_accumulation": True,
            "layouts": ["dp", "fsdp", "tp", "pp", "their products"],
        }
