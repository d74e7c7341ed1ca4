"""The coordinate check of sharded models: FSDP2 or tensor parallel on two gloo processes of this machine.

The layout is applied from outside, after the weights were drawn, as a training run does; optimizer groups are made
from the plan by name, and the statistics are read from the shards.
"""

from __future__ import annotations

import dataclasses
import os
import socket
from collections.abc import Callable

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from crystal.backends.cuda.parallelize import split_blocks
from crystal.checks.coord_check import Asked, check_model
from crystal.errors import ConfigError
from crystal.mup.coord_check import CoordCheck
from crystal.output.interrupts import shielded
from crystal.output.launcher import die_with_parent

PROCESSES = 2


def check_sharded(name: str, asked: Asked, parametrization: str | None, layout: str) -> list[CoordCheck]:
    """As `check_model`, with every model sharded over two processes. layout: fsdp or tp."""
    context = mp.get_context("spawn")
    results = context.SimpleQueue()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = [
        context.Process(target=_worker, args=(rank, port, results, name, asked, parametrization, layout))
        for rank in range(PROCESSES)
    ]
    try:
        with shielded():
            for process in processes:
                process.start()
        outcome = results.get()  # from rank 0, or from the first that fails
        for process in processes:
            process.join(timeout=60)
    finally:
        for process in processes:
            if process.pid is not None:
                process.kill()
    if isinstance(outcome, str):
        raise ConfigError(outcome)
    return outcome


def _worker(rank: int, port: int, results, name: str, asked: Asked, parametrization: str | None, layout: str) -> None:
    die_with_parent()
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    dist.init_process_group("gloo", rank=rank, world_size=PROCESSES)
    mesh = init_device_mesh("cpu", (PROCESSES,))
    wrap = {"fsdp": _fsdp, "tp": _tensor_parallel}[layout]
    try:
        parts = PROCESSES if layout == "tp" else 1
        checks = check_model(name, dataclasses.replace(asked, wrap=wrap(mesh), parts=parts), parametrization)
        if rank == 0:
            results.put(checks)
    except Exception as error:
        results.put(f"{name} under {layout}: {type(error).__name__}: {str(error).splitlines()[0]}")
    dist.destroy_process_group()


def _fsdp(mesh) -> Callable[[nn.Module], nn.Module]:
    def wrap(model: nn.Module) -> nn.Module:
        for block in model.blocks:
            fully_shard(block, mesh=mesh)
        return fully_shard(model, mesh=mesh)

    return wrap


def _tensor_parallel(mesh) -> Callable[[nn.Module], nn.Module]:
    """Heads and d_ff are split; embedding, norms and head are whole in each process."""

    def wrap(model: nn.Module) -> nn.Module:
        split_blocks(model.blocks, mesh)
        return model

    return wrap
