"""Tensor parallelism inside a stage: which weights are divided, and the collectives that this takes.

As in Megatron-LM (Shoeybi et al. 2019, arXiv 1909.08053) q, k, v, gate and up are divided by columns, so that each
process has some heads and some of d_ff, and out and down by rows, whose products are added up. One sum leaves attention
and one MLP in forward; one gradient enters each in backward, for the products that share an input share its gradient.

With sequence parallelism (Korthikanti et al. 2022, arXiv 2205.05198) norms and residual stream are divided by tokens:
a sum becomes a reduce-scatter, and an all-gather comes before the columns. That is the same traffic, but the columns
keep their share of the input and gather it once more in backward, while the gradient's first product runs. A process'
tokens are a run of the micro-batch's B * T, in the shape [B, T / processes, D]: no copy is made to cut or to join them,
and what is done to each token by itself does not ask which ones they are. The weights that stay whole, norms and the
biases of rows, then have gradients of a process' own tokens, to be added up at the end of a step.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard, distribute_tensor

from crystal.kernels.dispatch import differentiable
from crystal.kernels.linear import input_gradient, linear, product, weight_gradient
from crystal.zoo.decoder import MLP, Attention, Block, Linear

# torch's traceable collectives: they start one, and `wait_tensor` is where its result may be read
_c10d = torch.ops._c10d_functional


class Split(NamedTuple):
    """The processes over which a stage is divided; group is their process group's name, which a graph can hold."""

    group: str
    rank: int
    size: int
    sequence: bool  # whether the residual stream is divided by tokens

    @property
    def token_shards(self) -> int:
        """Processes over which the tokens of the residual stream are divided."""
        return self.size if self.sequence else 1


def split_over(mesh: DeviceMesh, sequence: bool) -> Split:
    """mesh: of one dimension."""
    return Split(mesh.get_group().group_name, mesh.get_local_rank(), mesh.size(), sequence)


def all_reduced(x: Tensor, operation: str, split: Split) -> Tensor:
    """Of every process' x, of any shape. operation: sum or max."""
    return _c10d.wait_tensor(_c10d.all_reduce(x, operation, split.group))


def gathered(x: Tensor, split: Split) -> Tensor:
    """All tokens [B, T, D] of the residual stream, of which x is this process' [B, T / size, D]."""
    return _in_rows(_c10d.wait_tensor(_gather(x, split)), x.shape[0])


def reduced(x: Tensor, split: Split) -> Tensor:
    """The sum of every process' x [B, T, D]: whole, or with sequence parallelism this process' [B, T / size, D]."""
    return _in_rows(_c10d.wait_tensor(_reduce(x, split)), x.shape[0])


def _gather(x: Tensor, split: Split) -> Tensor:
    return _c10d.all_gather_into_tensor(x.flatten(0, -2).contiguous(), split.size, split.group)


def _reduce(x: Tensor, split: Split) -> Tensor:
    x_ND = x.flatten(0, -2).contiguous()
    if split.sequence:
        return _c10d.reduce_scatter_tensor(x_ND, "sum", split.size, split.group)
    return _c10d.all_reduce(x_ND, "sum", split.group)


def _in_rows(x_ND: Tensor, rows: int) -> Tensor:
    """[rows, tokens, D]; not a view to autograd, FSDP2 or compiled graphs, for nobody else holds x_ND."""
    return torch.ops.aten._unsafe_view(x_ND, (rows, x_ND.shape[0] // rows, x_ND.shape[1]))


class _Leave(torch.autograd.Function):
    """`reduced`; each process' summand has the gradient of the whole sum."""

    @staticmethod
    def forward(ctx, x, split):
        ctx.split = split
        return reduced(x, split)

    @staticmethod
    def backward(ctx, dy):
        return gathered(dy, ctx.split) if ctx.split.sequence else dy, None


def _forward(
    x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor | None, b0: Tensor | None, b1: Tensor | None, b2: Tensor | None,
    group: str, rank: int, size: int, sequence: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """x W^T + b of each weight that there is, [0] for the third if there is none."""
    whole = gathered(x, Split(group, rank, size, sequence)) if sequence else x
    third = x.new_empty(0) if w2 is None else product(whole, w2, b2)
    return product(whole, w0, b0), product(whole, w1, b1), third


def _backward(
    dy0: Tensor, dy1: Tensor, dy2: Tensor | None, x: Tensor, w0: Tensor, w1: Tensor, w2: Tensor | None, biased: bool,
    group: str, rank: int, size: int, sequence: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dw0, dw1, dw2, db0, db1, db2), [0] for what is not there. What is sent goes on beside a product."""
    split = Split(group, rank, size, sequence)
    coming = _gather(x, split) if sequence else None
    pairs = [(dy0, w0), (dy1, w1)] + ([] if w2 is None else [(dy2, w2)])
    dx = input_gradient(dy0, w0)
    for dy, weight in pairs[1:]:
        dx += input_gradient(dy, weight)
    x_ND = x.flatten(0, -2) if coming is None else _c10d.wait_tensor(coming)
    summing = _reduce(dx, split)
    rows = [dy.flatten(0, -2) for dy, _ in pairs]
    dw = [weight_gradient(dy_NO, x_ND) for dy_NO in rows]
    db = [dy_NO.sum(0) for dy_NO in rows] if biased else []
    fill = [[x.new_empty(0) for _ in range(3 - len(found))] for found in (dw, db)]
    return _in_rows(_c10d.wait_tensor(summing), x.shape[0]), *dw, *fill[0], *db, *fill[1]


def _forward_shapes(x, w0, w1, w2, b0, b1, b2, group, rank, size, sequence):
    tokens = x.shape[1] * (size if sequence else 1)
    return tuple(x.new_empty(0 if w is None else (x.shape[0], tokens, w.shape[0])) for w in (w0, w1, w2))


def _backward_shapes(dy0, dy1, dy2, x, w0, w1, w2, biased, group, rank, size, sequence):
    weights = [x.new_empty(0 if w is None else w.shape) for w in (w0, w1, w2)]
    biases = [x.new_empty(w.shape[0] if biased and w is not None else 0) for w in (w0, w1, w2)]
    return x.new_empty(x.shape), *weights, *biases


def _save(ctx, inputs, output):
    x, *weights = inputs[:4]
    ctx.biased, ctx.split = inputs[4] is not None, inputs[7:]
    ctx.three = weights[2] is not None
    ctx.save_for_backward(x, *weights)


def _gradients(ctx, backward, dy0, dy1, dy2):
    dys = (dy0.contiguous(), dy1.contiguous(), dy2.contiguous() if ctx.three else None)
    dx, *found = backward(*dys, *ctx.saved_tensors, ctx.biased, *ctx.split)
    dw, db = found[:3], found[3:] if ctx.biased else [None] * 3
    if not ctx.three:
        dw[2] = db[2] = None
    return dx, *dw, *db, *[None] * 4


_columns = differentiable("columns", _forward, _backward, _save, _gradients, _forward_shapes, _backward_shapes)


def columns(x: Tensor, linears: Sequence[Linear], split: Split) -> tuple[Tensor, ...]:
    """This process' columns of two or three products of one input, all with a bias or none.

    x: the residual stream after a norm, [B, T, D] or, with sequence parallelism, this process' [B, T / size, D].
    Returns [B, T, O / size] of each.
    """
    weights = [local(one.weight) for one in linears]
    biases = [None if one.bias is None else local(one.bias) for one in linears]
    none = [None] * (3 - len(linears))
    return _columns(x, *weights, *none, *biases, *none, *split)[: len(linears)]


def local(parameter: Tensor) -> Tensor:
    """This process' part of a parameter."""
    return parameter.to_local() if isinstance(parameter, DTensor) else parameter


class SplitAttention(Attention):
    """Some of the heads."""

    def projected(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        return columns(x_BTD, (self.q, self.k, self.v), self.split)


class SplitMLP(MLP):
    """Some of d_ff."""

    def projected(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        return columns(x_BTD, (self.gate, self.up), self.split)


class Rows(Linear):
    """A product divided by rows, added up over the processes; its bias is whole and added once."""

    def forward(self, x_BTF: Tensor) -> Tensor:
        y_BTD = _Leave.apply(linear(x_BTF, local(self.weight)), self.split)
        return y_BTD if self.bias is None else y_BTD + self.bias


class SplitEmbedding(nn.Embedding):
    """Some of the words; the others' embeddings are zeros here, and come with the sum."""

    def forward(self, ids_BT: Tensor) -> Tensor:
        weight_WD = local(self.weight)
        own_BT = ids_BT - self.split.rank * weight_WD.shape[0]
        lacks_BT = (own_BT < 0) | (own_BT >= weight_WD.shape[0])
        x_BTD = F.embedding(own_BT.masked_fill(lacks_BT, 0), weight_WD)
        return _Leave.apply(x_BTD.masked_fill(lacks_BT[..., None], 0), self.split)


def split_block(block: Block, mesh: DeviceMesh, split: Split) -> None:
    """Divide a block's weights, which become DTensors, in place. Norms and the biases of rows stay as they are.

    Modules get other classes, not forwards of their own: blocks stay alike, and torch.compile makes one graph for all.
    """
    for module, kind in ((block.attn, SplitAttention), (block.mlp, SplitMLP)):
        module.__class__, module.split = kind, split
    for by_columns in (block.attn.q, block.attn.k, block.attn.v, block.mlp.gate, block.mlp.up):
        divide(by_columns, "weight", mesh, 0)
        divide(by_columns, "bias", mesh, 0)
    for by_rows in (block.attn.out, block.mlp.down):
        by_rows.__class__, by_rows.split = Rows, split
        divide(by_rows, "weight", mesh, 1)


def divide(module: nn.Module, name: str, mesh: DeviceMesh, dimension: int) -> None:
    """Make a parameter, if there is one of this name, a DTensor that is divided along a dimension."""
    if (whole := getattr(module, name)) is not None:
        part = distribute_tensor(whole, mesh, [Shard(dimension)])
        setattr(module, name, nn.Parameter(part, requires_grad=whole.requires_grad))
