"""`crystal doctor`: what this machine is, what was measured on it and chosen from that, and what is slow and why."""

from __future__ import annotations

import contextlib
import os
import platform
import shutil
import statistics
import tempfile
import time
from dataclasses import asdict
from pathlib import Path

import torch

from crystal.evaluation.confine import confinement
from crystal.kernels import native, tuning
from crystal.kernels import thread_waiting as waiting
from crystal.kernels.gcc import compiler
from crystal.memory import machine_bytes

DISK_BYTES, PIECE = 256 << 20, 8 << 20
SLOW_DISK = 500e6  # bytes a second: below, streamed weights wait for the disk (docs/streaming.md)
BF16 = {"avx512_bf16", "amx_bf16", "bf16"}
THP = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def examine(again: bool, directory: Path) -> dict:
    """Everything `crystal doctor` says. again: measure anew; directory: whose disk is timed."""
    threads = torch.get_num_threads()
    found = tuning.remeasured(threads) if again else tuning.tuning(threads)
    result = {
        "processor": tuning.processor(),
        "cores": os.cpu_count(),
        "threads": threads,
        "instructions": list(tuning.instructions()),
        "limits": tuning.identity(threads)["limits"],
        "memory": _memory(),
        "load": round(os.getloadavg()[0], 1),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "gcc": _gcc(),
        "kernels": "native.c" if native.available() else "torch",
        "dtype": found.dtype,
        "tuning": {
            "seconds": found.seconds, "measured": found.measured, "settled": found.settled,
            "from": os.environ.get("CRYSTAL_TUNING") or "measured here",
        },
        "choices": {key: asdict(case) for key, case in found.cases.items()},
        "waiting": _waiting(),
        "huge_pages": THP.read_text().split("[")[-1].split("]")[0] if THP.exists() else None,
        "disk": _disk(directory),
        "confinement": _confinement(),
        "gpus": _gpus(),
    }  # fmt: skip
    return result | {"slow": _slow(result)}


def _memory() -> dict:
    values = machine_bytes()
    return {"total_bytes": values.get("MemTotal"), "available_bytes": values.get("MemAvailable")}


def _gcc() -> str | None:
    try:
        return compiler()[1].splitlines()[0].partition("flags")[0].strip()
    except RuntimeError:
        return None


def _waiting() -> dict | None:
    """How long OpenMP's threads look for work before they sleep; None where it cannot be measured, without gcc."""
    try:
        found = waiting.measure()
    except (RuntimeError, OSError):
        return None
    with contextlib.suppress(OSError):
        waiting.remember(found)
    in_force = os.environ.get("GOMP_SPINCOUNT") or os.environ.get("OMP_WAIT_POLICY")
    return {key: round(value, 1) for key, value in asdict(found).items()} | {"in_force": in_force}


def _disk(directory: Path) -> dict:
    """Bytes a second to and from the disk under a directory, past the page cache where it lets us."""
    try:
        with tempfile.NamedTemporaryFile(dir=directory) as file:
            memory = memoryview(torch.ones(PIECE, dtype=torch.uint8).numpy())
            begun = time.perf_counter()
            for _ in range(DISK_BYTES // PIECE):
                file.write(memory)
            file.flush()
            os.fsync(file.fileno())
            written = time.perf_counter() - begun
            if hasattr(os, "posix_fadvise"):  # read from the disk, and not from memory
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            file.seek(0)
            begun = time.perf_counter()
            while file.readinto(memory):
                pass
            read = time.perf_counter() - begun
        free = shutil.disk_usage(directory).free
    except OSError as error:
        return {"directory": str(directory), "error": error.strerror}
    return {
        "directory": str(directory), "write_bytes_per_second": DISK_BYTES / written,
        "read_bytes_per_second": DISK_BYTES / read, "free_bytes": free,
    }  # fmt: skip


def _confinement() -> dict:
    """What confines programs that a model wrote, and what they could do all the same."""
    found = confinement()
    return {"layers": found.layers, "sufficient": found.sufficient, "missing": list(found.missing)}


def _gpus() -> list[dict]:
    if not torch.cuda.is_available():
        return []
    found = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
    return [{"name": p.name, "memory_bytes": p.total_memory, "capability": f"sm_{p.major}{p.minor}"} for p in found]


def rates(choices: dict, dtype: str) -> dict[str, float]:
    """Median FLOP/s of each library's products in a dtype."""
    of: dict[str, list[float]] = {}
    for key, case in choices.items():
        if key.startswith(dtype) and "attention" not in key:
            for name, rate in case["rates"].items():
                of.setdefault(name, []).append(rate)
    return {name: statistics.median(values) for name, values in of.items()}


def _slow(result: dict) -> list[str]:
    """What costs speed here, each with its reason and, where there is one, the remedy."""
    said = []
    if result["kernels"] == "torch":
        reason = "CRYSTAL_KERNELS says so" if result["gcc"] else "there is no gcc (apt install gcc)"
        said.append(f"norms, SwiGLU, attention and AdamW are torch's, which make several passes each: {reason}")
    for name, value in result["limits"].items():
        said.append(f"{name}={value} keeps libraries from what the processor can do")
    if result["dtype"] == "fp32":
        lacking = not BF16 & set(result["instructions"])
        why = "the processor has no bf16 products" if lacking else "its libraries do not use the processor's"
        said.append(f"bf16 is not faster than fp32: {why}, so dtype auto is fp32")
    if result["load"] > max(1, result["cores"] // 2):
        said.append(f"other work runs: load {result['load']} on {result['cores']} cores")
    if result["threads"] < (result["cores"] or 1) and "OMP_NUM_THREADS" in os.environ:
        said.append(f"OMP_NUM_THREADS={os.environ['OMP_NUM_THREADS']} leaves cores idle: {result['cores']} are there")
    if not result["tuning"]["settled"]:
        said.append("the choices did not settle, for timings differed by more than 10%: --measure when it is idle")
    if result["huge_pages"] == "never":
        said.append("huge pages are switched off, which costs weight streaming part of the disk's rate")
    disk = result["disk"]
    if "error" in disk:
        said.append(f"{disk['directory']} cannot be written: {disk['error']}")
    elif disk["read_bytes_per_second"] < SLOW_DISK:
        said.append(f"the disk under {disk['directory']} reads {disk['read_bytes_per_second'] / 1e6:,.0f} MB/s")
    if not result["gpus"]:
        built = "this torch is built without CUDA" if torch.version.cuda is None else "no GPU, or no driver for it"
        said.append(f"no CUDA device: {built}")
    return said
