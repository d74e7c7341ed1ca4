"""What a benchmark ran on: versions of the packages that decide its figures, the GPU and its clocks."""

from __future__ import annotations

import platform
import shutil
import subprocess
from importlib import metadata

import torch

from crystal.kernels.bench.peers import PEERS, installed

CLOCKS = "clocks.sm,clocks.mem,clocks.max.sm,clocks.max.mem,temperature.gpu,power.limit,ecc.mode.current,driver_version"


def versions() -> dict[str, str]:
    """Of Python, torch, triton and the peers that are installed."""
    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": metadata.version("triton")}
    return found | {peer: version for peer in PEERS if (version := installed(peer))}


def device() -> dict:
    """The current CUDA device; memory and L2 in bytes."""
    index = torch.cuda.current_device()
    properties = torch.cuda.get_device_properties(index)
    return {
        "name": properties.name,
        "capability": f"{properties.major}.{properties.minor}",
        "multiprocessors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "l2_bytes": properties.L2_cache_size,
        "cuda": torch.version.cuda,
    }


def clocks() -> dict[str, str] | None:
    """What nvidia-smi says of the current device at this moment; None without nvidia-smi."""
    if shutil.which("nvidia-smi") is None:
        return None
    uuid = f"GPU-{torch.cuda.get_device_properties(torch.cuda.current_device()).uuid}"
    command = ["nvidia-smi", f"--id={uuid}", f"--query-gpu={CLOCKS}", "--format=csv,noheader"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        return None
    return dict(zip(CLOCKS.split(","), (value.strip() for value in done.stdout.split(",")), strict=True))
