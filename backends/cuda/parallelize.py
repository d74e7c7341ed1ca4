"""Layouts, applied from outside to a stage on the meta device, always in this order:

tensor parallel, recomputation, compilation, shards and replicas (FSDP2). Even one process goes through the last:
it is where fp32 weights become bf16 ones for compute, and where gradients are added up in fp32.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from torch.utils.checkpoint import checkpoint

from crystal.backends.base import Part
from crystal.backends.config import CudaConfig
from crystal.backends.cuda.stage import Stage
from crystal.backends.cuda.tensor_parallel import SplitEmbedding, divide, split_block, split_over


def parallelise(stage: Stage, mesh: DeviceMesh, config: CudaConfig) -> None:
    """Apply a layout to a stage, in place. It stays on the meta device: `Stage.to_empty` gives it memory."""
    blocks = list(stage.blocks.values())
    if mesh["tp"].size() > 1:
        _split(stage, mesh["tp"], config.parallel.sequence)
    for block in blocks:
        if config.recompute != "none":
            _recompute(block if config.recompute == "block" else block.attn)
        if config.compile:
            block.forward = torch.compile(block.forward)
    # sharded weights are gathered again for backward; whole ones stay
    gathered = mesh["fsdp"].size() > 1
    low = MixedPrecisionPolicy(torch.bfloat16, torch.float32, cast_forward_inputs=False)
    policy = low if config.dtype == "bf16" else MixedPrecisionPolicy(cast_forward_inputs=False)
    shard(stage, blocks, mesh["dp", "fsdp"] if mesh["dp"].size() > 1 else mesh["fsdp"], policy, gathered)


def split_blocks(blocks: Iterable[nn.Module], mesh: DeviceMesh) -> None:
    """Tensor parallelism inside blocks: heads and d_ff over the processes; the residual stream and norms whole."""
    for block in blocks:
        split_block(block, mesh, split_over(mesh, sequence=False))


def _split(stage: Stage, mesh: DeviceMesh, sequence: bool) -> None:
    """Tensor parallelism of a stage: blocks by heads and d_ff, embedding and head by words."""
    stage.split = split_over(mesh, sequence)
    for block in stage.blocks.values():
        split_block(block, mesh, stage.split)
    if hasattr(stage, "embed"):
        stage.embed.__class__, stage.embed.split = SplitEmbedding, stage.split
        divide(stage.embed, "weight", mesh, 0)
    if stage.last and not stage.tied:
        divide(stage.head, "weight", mesh, 0)


def _recompute(module: nn.Module) -> None:
    """Keep only the module's input, and compute the rest again in backward. Nothing in it is random.

    It gets another class, not a forward of its own: blocks stay alike, and torch.compile makes one graph for all.
    """
    module.__class__ = _recomputed(type(module))


@functools.cache
def _recomputed(kind: type[nn.Module]) -> type[nn.Module]:
    def forward(self, *inputs):
        whole = functools.partial(kind.forward, self)
        return checkpoint(whole, *inputs, use_reentrant=False, preserve_rng_state=False)

    return type(f"Recomputed{kind.__name__}", (kind,), {"forward": forward})


def shard(
    model: nn.Module,
    blocks: Iterable[nn.Module],
    mesh: DeviceMesh,
    policy: MixedPrecisionPolicy,
    gathered: bool = True,
) -> None:
    """FSDP2 over each block and over what is left of the model; over a mesh of two dimensions, replicas of shards.

    gathered: whether a block's weights are given back after forward and gathered again for backward. Gradients are
    summed, not averaged: a token's weight in the loss is already that of the whole step.
    """
    for block in blocks:
        fully_shard(block, mesh=mesh, mp_policy=policy, reshard_after_forward=gathered)
    fully_shard(model, mesh=mesh, mp_policy=policy)
    for module in sharded_modules(model):
        module.set_gradient_divide_factor(1.0)
        module.set_force_sum_reduction_for_comms(True)


def sharded_modules(model: nn.Module) -> list[FSDPModule]:
    """The modules that FSDP2 was applied to, the model first."""
    return [module for module in model.modules() if isinstance(module, FSDPModule)]


@dataclass(frozen=True)
class Held:
    """What a process holds of one tensor.

    weight: fp32, memory shared with the model's own parameter. copies: how many processes hold these same numbers;
    first: whether this is the one of them that saves them. by_tokens: whether sequence parallelism leaves each process
    of `tp` with the gradient of its own tokens alone.
    """

    parameter: DTensor
    weight: nn.Parameter
    offset: tuple[int, ...]
    copies: int
    first: bool
    by_tokens: bool

    def part(self, values: Tensor) -> Part:
        """Values of the weight's shape (itself, a moment) as part of the whole tensor."""
        return Part(values, self.offset, tuple(self.parameter.shape))

    def grad(self) -> Tensor:
        """This process' part of the gradient, after backward has reduced it."""
        return self.parameter.grad.to_local()


def held_by(stage: Stage, mesh: DeviceMesh) -> dict[str, Held]:
    """What this process holds of each tensor of a stage, by name."""
    return {name: _held(stage, name, p, mesh) for name, p in stage.named_parameters()}


def _held(stage: Stage, name: str, p: DTensor, mesh: DeviceMesh) -> Held:
    offset = compute_local_shape_and_global_offset(p.shape, p.device_mesh, p.placements)[1]
    whole_over = [
        (p.device_mesh.size(i), p.device_mesh.get_local_rank(i))
        for i, placement in enumerate(p.placements)
        if placement.is_replicate()
    ]
    in_every_shard = "tp" not in p.device_mesh.mesh_dim_names
    if in_every_shard:
        whole_over.append((mesh["tp"].size(), mesh["tp"].get_local_rank()))
    if stage.tied and name == "embed.weight" and mesh["pp"].size() > 1:
        whole_over.append((2, 0 if stage.first else 1))
    copies = 1
    for size, _ in whole_over:
        copies *= size
    weight = nn.Parameter(p.to_local().detach())
    by_tokens = in_every_shard and stage.split is not None and stage.split.sequence
    return Held(p, weight, tuple(offset), copies, all(rank == 0 for _, rank in whole_over), by_tokens)
