"""Host memory that a GPU copies its state into, for checkpoints: pinned, and no larger than what it holds.

torch's own pinned tensors are rounded up to powers of two, each by itself (ATen/core/CachingHostAllocator.h), and kept
when they are freed. A 7B's weights and moments are 81 GB on the hosts, and could take twice as much.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from crystal.errors import RunError

ALIGNED = 16  # fp32 numbers, a cache line: where a tensor may begin
PORTABLE = 1  # cudaHostRegisterPortable: pinned for every context


@dataclass(frozen=True)
class HostMemory:
    """parts: fp32 tensors by key, all in `flat`."""

    flat: Tensor
    parts: dict[str, Tensor]


def host_memory(shapes: Iterable[tuple[str, torch.Size]], pinned: bool) -> HostMemory:
    """Memory for an fp32 tensor of each (key, shape). pinned: GPUs write it by themselves, while the host goes on.

    Raises RunError where the system does not let so much be pinned.
    """
    begins, end = {}, 0
    for key, shape in shapes:
        begins[key] = (end, shape)
        end += -(-math.prod(shape) // ALIGNED) * ALIGNED
    flat = torch.empty(end, dtype=torch.float32)
    if pinned and end:
        _pin(flat)
    return HostMemory(flat, {key: flat[at : at + math.prod(shape)].view(shape) for key, (at, shape) in begins.items()})


def _pin(flat: Tensor) -> None:
    """For as long as the tensor, or a view of it, lives."""
    cuda = torch.cuda.cudart()
    if code := int(cuda.cudaHostRegister(flat.data_ptr(), flat.nbytes, PORTABLE)):
        raise RunError(
            f"checkpoint: expected to pin {flat.nbytes / 1e9:.1f} GB of host memory, the system refuses "
            f"(cudaHostRegister: {code}); see `ulimit -l` and the memory limit of this job"
        )
    weakref.finalize(flat, cuda.cudaHostUnregister, flat.data_ptr())
