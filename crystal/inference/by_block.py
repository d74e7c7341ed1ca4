"""A decoder's forward pass with one block's weights in memory at a time: a 7B model in fp32 where 26 GB are not free.

The same operations on the same numbers as the whole decoder's, so the same logits. Hidden states of a group of rows
wait in memory while the checkpoint is read once for the group.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor, nn

from crystal.checkpoint import Checkpoint
from crystal.errors import CheckpointError
from crystal.inference.load import model_config_of
from crystal.kernels import linear
from crystal.zoo.build import build, plan_for
from crystal.zoo.decoder import Decoder

HIDDEN_BYTES = 1 << 30  # of the rows that wait; the checkpoint is read again for each such group


def logits_by_block(checkpoint: Checkpoint, ids_BT: np.ndarray) -> Iterator[Tensor]:
    """fp32 logits [T, V] on the CPU of each row of int64 ids [B, T].

    Raises CheckpointError for a tensor that is missing or of another shape, or a checkpoint that has changed.
    """
    config = model_config_of(checkpoint)
    model = build(config, plan_for(config)).eval()
    group = max(HIDDEN_BYTES // (ids_BT.shape[1] * config.d_model * 4), 1)
    for first in range(0, len(ids_BT), group):
        yield from _group(checkpoint, model, torch.from_numpy(ids_BT[first : first + group]))


@torch.inference_mode()
def _hidden(checkpoint: Checkpoint, model: Decoder, ids_BT: Tensor) -> list[Tensor]:
    """States [1, T, D] of each row after the last block, before the norm."""
    with _present(checkpoint, model, "embed"):
        rows = [model.embedded(ids_T[None]) for ids_T in ids_BT]
    table = model.table(0, ids_BT.shape[1], ids_BT.device)
    for i, block in enumerate(model.blocks):
        with _present(checkpoint, model, f"blocks.{i}"):
            for b, x_1TD in enumerate(rows):
                rows[b] = block(x_1TD, table)
    return rows


def _group(checkpoint: Checkpoint, model: Decoder, ids_BT: Tensor) -> Iterator[Tensor]:
    rows = _hidden(checkpoint, model, ids_BT)
    with _present(checkpoint, model, "norm"), _present(checkpoint, model, "embed" if model.head is None else "head"):
        for x_1TD in rows:
            with torch.inference_mode():
                logits_TV = linear(model.norm(x_1TD), model.head_weight)[0] * model.multipliers.logits
            yield logits_TV


@contextmanager
def _present(checkpoint: Checkpoint, model: Decoder, part: str) -> Iterator[None]:
    """The weights of a part of the model, as long as it lasts; on the meta device before and after."""
    module = model.get_submodule(part)
    shapes = {name: p.shape for name, p in module.named_parameters(prefix=part)}
    wanted = {name: tuple(slice(0, size) for size in shape) for name, shape in shapes.items()}
    try:
        for name, tensor in checkpoint.tensors("model", wanted):
            if shapes.pop(name) != tensor.shape:
                raise CheckpointError(f"{checkpoint.directory}: {name}: expected the shape of the model's")
            _set(model, name, tensor)
        if shapes:
            raise CheckpointError(f"{checkpoint.directory}: {next(iter(shapes))}: expected, but no such tensor in it")
        yield
    finally:
        for name, p in list(module.named_parameters(prefix=part)):
            _set(model, name, torch.empty(p.shape, device="meta"))


def _set(model: Decoder, name: str, tensor: Tensor) -> None:
    owner, _, leaf = name.rpartition(".")
    setattr(model.get_submodule(owner), leaf, nn.Parameter(tensor, requires_grad=False))
