"""What a run takes from the machine it begins on, and keeps: its compute dtype, and the choices made by measuring.

Of several processes the first decides for all, for they add up each other's sums.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import TypeVar

import torch
import torch.distributed as dist

from crystal.backends.base import started_processes
from crystal.backends.config import BackendConfig, CudaConfig
from crystal.backends.cuda.mesh import meet
from crystal.kernels import tuning

Found = TypeVar("Found")


def with_dtype(config: BackendConfig) -> BackendConfig:
    """The section with `dtype: auto` replaced by what the first process' machine does fastest."""
    if config.dtype != "auto":
        return config
    return config.model_copy(update={"dtype": _first_process(lambda: _fastest(config), config)})


def keep_choices(config: BackendConfig, recorded: list[dict]) -> list[dict]:
    """Keep to the choices that the run made on this kind of machine before; else take what is measured here.

    recorded: the run's [{identity, choices}], one for each kind of machine it has been on. Returns it, with this
    machine's. A run that moves to another kind of processor gets that one's choices: its sums differ there anyway.
    """
    if not _on_cpu(config):
        return recorded
    if threads := _threads(config):
        torch.set_num_threads(threads)
    here = _first_process(lambda: _kept(recorded), config)
    tuning.use(here["choices"])
    return recorded if here in recorded else [*recorded, here]


def _kept(recorded: list[dict]) -> dict:
    identity = tuning.identity(torch.get_num_threads())
    for made in recorded:
        if made["identity"] == identity:
            return made
    return {"identity": identity, "choices": tuning.tuning().choices()}


def _on_cpu(config: BackendConfig) -> bool:
    return config.name != "cerebras" and getattr(config, "device", "cpu") == "cpu"


def _threads(config: BackendConfig) -> int | None:
    return getattr(config, "threads", None)


def _fastest(config: BackendConfig) -> str:
    if _on_cpu(config):
        return tuning.tuning(_threads(config)).dtype
    # where there is no GPU, the run is looked at here and made elsewhere
    slow = torch.cuda.is_available() and not torch.cuda.is_bf16_supported(including_emulation=False)
    return "fp32" if slow else "bf16"


def _first_process(find: Callable[[], Found], config: BackendConfig) -> Found:
    """What the first process finds; the others wait for it."""
    if started_processes() == 1:
        return find()
    meet(config.device if isinstance(config, CudaConfig) else "cpu")
    found = [find() if dist.get_rank() == 0 else None]
    dist.broadcast_object_list(found, src=0)
    return found[0]
