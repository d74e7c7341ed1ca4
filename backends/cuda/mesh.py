"""The processes of a run: joined by torchrun, or one alone, over one device mesh.

The mesh has four dimensions in this order: pp, dp, fsdp, tp. The last varies fastest, so that tensor parallelism,
which talks most, stays inside a machine, and pipeline stages, which talk least, lie on different ones.
"""

from __future__ import annotations

import atexit
import os

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.rendezvous import rendezvous

from crystal.backends.base import Place, started_processes
from crystal.backends.config import CudaConfig
from crystal.errors import ConfigError

DIMENSIONS = ("pp", "dp", "fsdp", "tp")


def join(config: CudaConfig) -> DeviceMesh:
    """The mesh of a layout over all processes that torchrun started (RANK, WORLD_SIZE, … in the environment).

    Without torchrun it is a mesh of this process alone.
    Raises ConfigError when the layout is for another number of processes, or there is no CUDA device.
    """
    sizes = {name: getattr(config.parallel, name) for name in DIMENSIONS}
    started = dist.get_world_size() if dist.is_initialized() else started_processes()
    if started != config.parallel.processes:
        product = " x ".join(f"{name} {size}" for name, size in sizes.items())
        raise ConfigError(
            f"backend.parallel: expected a layout of the {started} processes that torchrun started, "
            f"got {product} = {config.parallel.processes}"
        )
    meet(config.device)
    return init_device_mesh(config.device, tuple(sizes.values()), mesh_dim_names=DIMENSIONS)


def meet(device: str) -> None:
    """Join the process group of all processes that torchrun started, unless this one is in a group already.

    device: cuda, whose group has NCCL for its tensors, or cpu. Raises ConfigError when there is no CUDA device.
    """
    if device == "cuda":
        if not torch.cuda.is_available():
            raise ConfigError("backend.device: expected a CUDA device, this machine has none; set backend.device=cpu")
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")))
    if dist.is_initialized():
        return
    store, rank, processes = _meeting_place()
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=processes)
    atexit.register(_leave)


def _meeting_place() -> tuple[dist.Store, int, int]:
    """(store, rank, number of processes).

    torchrun keeps one store over restarts, with the addresses of processes that have died (pytorch issue 135712). On
    one machine the number of the restart tells them apart; over several, whose numbers may differ, torchrun must be
    started with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 (docs/clusters.md).
    """
    if "RANK" not in os.environ:
        return dist.HashStore(), 0, 1
    store, rank, processes = next(rendezvous("env://"))
    if os.environ.get("GROUP_WORLD_SIZE") == "1":
        store = dist.PrefixStore(f"restart-{os.environ['TORCHELASTIC_RESTART_COUNT']}", store)
    return store, rank, processes


def _leave() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def place_in(mesh: DeviceMesh) -> Place:
    """Which rows this process reads: those of its place along dp and fsdp."""
    dp, fsdp = mesh["dp"], mesh["fsdp"]
    return Place(
        process=dist.get_rank(),
        processes=dist.get_world_size(),
        part=dp.get_local_rank() * fsdp.size() + fsdp.get_local_rank(),
        parts=dp.size() * fsdp.size(),
        background=True,
    )
