"""The parts of `gpu_check.sh`, each a JSON object on stdout: what the machine is, what must be noticed on a GPU, packed
documents beside a mask, host memory pinned for checkpoints, a layout beside the cpu backend, and what a training step
reaches of the peak. Exit 1 where a check fails.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import statistics
import subprocess
import sys
import time
from importlib.metadata import PackageNotFoundError, version

import torch
import torch.nn.functional as F
from torch import Tensor

from crystal.backends.base import MicroBatch, Setup
from crystal.backends.config import CpuConfig, CudaConfig, Layout, load_preset
from crystal.backends.cpu import CpuBackend
from crystal.backends.cuda.backend import CudaBackend
from crystal.backends.cuda.host_memory import host_memory
from crystal.kernels import add_norm, cross_entropy, layer_norm, rms_norm, rope, rope_table
from crystal.kernels.attention_documents import attention_documents, document_bounds, has_varlen
from crystal.planning.device import load_device
from crystal.zoo.build import parameter_count
from crystal.zoo.flops import flops_per_token

# a model that one GPU of 40 GB holds with its moments, at the 7B's width of a head; and what shows the script alone
STEP_MODEL = {"cuda": ("crystalcoder-w2048-l16", 2048, 4), "cpu": ("crystalcoder-w64-l2", 64, 2)}
PEAKS = {"A100": "a100-80gb", "H100": "h100-80gb", "H200": "h200-141gb"}  # part of a GPU's name → configs/devices/
WARM, TIMED = 3, 8  # steps
TOLERANCE = 1e-4  # relative, of losses in fp32: sums in other orders


def machine(device: str) -> dict:
    """Versions, GPU, driver, clocks, and settings that the backend must have made."""
    query = "name,driver_version,memory.total,clocks.sm,clocks.mem,power.limit"
    smi = ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"]
    found = {
        "python": platform.python_version(),
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "triton": _version("triton"),
        "processor": platform.processor() or platform.machine(),
        "cores": os.cpu_count(),
    }
    if device == "cuda":
        found["nvidia_smi"] = subprocess.run(smi, capture_output=True, text=True, check=False).stdout.strip()
        found["gpus"] = [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())]
        found["bf16_reduced_precision"] = torch.backends.cuda.matmul.allow_bf16_reduced_precision_reduction
        found["allocator"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF") or os.environ.get("PYTORCH_ALLOC_CONF")
    return found


def noticed(device: str) -> dict:
    """Sums that overflow, positions outside a table and labels outside the vocabulary are nan on the device."""
    x = torch.randn(3, 4096, device=device)
    x[1] *= 1e20
    weight, bias = torch.ones(4096, device=device), torch.zeros(4096, device=device)
    zeros = torch.zeros_like(x)
    norms = {
        "layer_norm": layer_norm(x, weight, bias, 1e-5),
        "rms_norm": rms_norm(x, weight, 1e-5),
        "add_norm": add_norm(x, zeros, weight, bias, 1e-5)[0],
        "add_norm without a bias": add_norm(x, zeros, weight, None, 1e-5)[0],
    }
    checks = {name: y.isnan().all(1).tolist() == [False, True, False] for name, y in norms.items()}
    if device == "cuda":  # on a CPU both are an IndexError
        cos, sin = rope_table(torch.arange(6, device=device), 16, 1e4)
        q, positions = torch.randn(1, 2, 4, 64, device=device), torch.tensor([5, 0, -1, 6], device=device)
        turned = rope(q, cos, sin, "half", positions=positions)
        checks["rope"] = turned[0, 0, :, :16].isnan().all(-1).tolist() == [False, False, True, True]
        labels = torch.tensor([1, -100, 4096, -1], device=device)
        losses = cross_entropy(torch.randn(4, 4096, device=device), labels, reduction="none")
        checks["cross_entropy"] = losses.isnan().tolist() == [False, False, True, True]
    return {"device": device, "checks": checks, "passed": all(checks.values())}


def documents(device: str) -> dict:
    """Attention of packed documents, forward and backward in bf16, beside a mask in fp32: errors, seconds, memory."""
    rows, heads, length, width = (2, 16, 2048, 128) if device == "cuda" else (2, 2, 64, 16)
    generator = torch.Generator().manual_seed(1)
    ends = (torch.rand(rows, length, generator=generator) < 8 / length).long()
    documents_BT = (ends.cumsum(1) - ends).to(device)
    bounds, scale = document_bounds(documents_BT), width**-0.5
    given = [torch.randn(rows, heads, length, width, generator=generator).bfloat16().to(device) for _ in range(3)]
    mask = (documents_BT[:, None, :, None] == documents_BT[:, None, None, :]).tril()

    def masked(q, k, v):
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)

    ours, peak = _attended(lambda q, k, v: attention_documents(q, k, v, bounds, scale), given, device)
    half, peak_of_mask = _attended(masked, given, device)
    right, _ = _attended(masked, [t.float() for t in given], device)
    errors = {name: [float((a.float() - b).norm() / b.norm()) for a, b in zip(found, right, strict=True)]
              for name, found in (("ours", ours), ("masked", half))}  # fmt: skip
    passed = all(a <= 2 * b + 1e-6 for a, b in zip(errors["ours"], errors["masked"], strict=True))
    return {
        "device": device, "varlen": has_varlen(), "relative_errors of y, dq, dk, dv": errors, "passed": passed,
        "peak_bytes": {"ours": peak, "masked": peak_of_mask},
    }  # fmt: skip


def _attended(function, given: list[Tensor], device: str) -> tuple[list[Tensor], int | None]:
    """(y and the gradients of q, k, v; bytes at the peak)."""
    leaves = [t.clone().requires_grad_() for t in given]
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
    y = function(*leaves)
    found = [y.detach(), *torch.autograd.grad(y.float().square().sum(), leaves)]
    return found, torch.cuda.max_memory_allocated() if device == "cuda" else None


def pinned(device: str) -> dict:
    """Host memory for a checkpoint's copies: pinned to the byte, and how fast the GPU writes to it."""
    size = (1 << 28) + 12_345 if device == "cuda" else 12_345  # numbers; no power of two
    memory = host_memory([("weights", torch.Size([size]))], pinned=device == "cuda")
    source, into = torch.randn(size, device=device), memory.parts["weights"]
    seconds = []
    for _ in range(3):
        _wait(device)
        began = time.perf_counter()
        into.copy_(source, non_blocking=True)
        _wait(device)
        seconds.append(time.perf_counter() - began)
    return {
        "device": device, "bytes": into.nbytes, "held_bytes": memory.flat.nbytes, "seconds": seconds,
        "gb_per_s": into.nbytes / min(seconds) / 1e9, "passed": torch.equal(into, source.cpu()),
    }  # fmt: skip


def layout(device: str) -> dict:
    """Four steps in fp32, sharded over all processes, beside the same steps of the cpu backend in one."""
    processes = int(os.environ.get("WORLD_SIZE", "1"))
    shape, optimizer = load_preset("crystalcoder-w128-l2")
    setup = Setup(shape, optimizer.plan_for(shape), optimizer, lambda step: 1e-3, 1, 1)
    config = CudaConfig(
        name="cuda", device=device, dtype="fp32", compile=False, parallel=Layout(fsdp=processes, interleave=1)
    )
    made = CudaBackend(setup, config)
    made.initialise()
    whole = CpuBackend(setup, CpuConfig(dtype="fp32"))
    whole.initialise()
    rank, losses = int(os.environ.get("RANK", "0")), []
    for step in range(1, 5):
        rows = batches(shape.vocab_size, 128, 2 * processes, step)
        ours = made.train_step(step, [rows[i] for i in range(2 * rank, 2 * rank + 2)])
        losses.append({"layout": float(ours.loss), "cpu": float(whole.train_step(step, rows).loss)})
    apart = max(abs(each["layout"] / each["cpu"] - 1) for each in losses)
    return {
        "device": device, "processes": processes, "losses": losses, "relative_difference": apart,
        "passed": math.isfinite(apart) and apart <= TOLERANCE, "rank": rank,
    }  # fmt: skip


def step(device: str) -> dict:
    """Tokens a second, MFU and memory of training steps of one process in bf16, blocks compiled."""
    name, seq_len, rows = STEP_MODEL[device]
    shape, optimizer = load_preset(name)
    setup = Setup(shape, optimizer.plan_for(shape), optimizer, lambda step: 1e-4, 1, 1)
    made = CudaBackend(setup, CudaConfig(name="cuda", device=device, dtype="bf16", compile=device == "cuda"))
    made.initialise()
    given = batches(shape.vocab_size, seq_len, 1, 1, rows)
    seconds, losses = [], []
    for number in range(1, WARM + TIMED + 1):
        _wait(device)
        began = time.perf_counter()
        result = made.train_step(number, given)
        losses.append(float(result.loss))
        _wait(device)
        seconds.append(time.perf_counter() - began)
    timed, tokens = sorted(seconds[WARM:]), seq_len * rows
    rate = tokens / statistics.median(timed)
    found = {
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu, which shows nothing but the script",
        "model": name, "parameters": parameter_count(shape), "seq_len": seq_len, "rows": rows, "losses": losses,
        "first_step_seconds": seconds[0], "step_seconds": {"min": timed[0], "median": statistics.median(timed),
        "max": timed[-1]}, "tokens_per_second": rate, "passed": all(map(math.isfinite, losses)),
    }  # fmt: skip
    if device == "cuda":
        found["peak_memory_bytes"] = torch.cuda.max_memory_allocated()
        found["reserved_bytes"] = torch.cuda.max_memory_reserved()
        key = next((value for part, value in PEAKS.items() if part in torch.cuda.get_device_name()), None)
        if key is not None:
            peak = load_device(key).peak_tflops * 1e12
            found |= {
                "peak_flops": peak,
                "mfu_6n": 6 * parameter_count(shape) * rate / peak,
                "mfu": flops_per_token(shape, seq_len) * rate / peak,
            }
    return found


def batches(vocab_size: int, seq_len: int, count: int, seed: int, rows: int = 1) -> list[MicroBatch]:
    """`count` micro-batches of one step, random tokens of a narrow range, so that there is something to learn."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(0, min(64, vocab_size), (count, rows, seq_len + 1), generator=generator)
    weights = torch.full((rows, seq_len), 1 / (seq_len * count * rows))
    sources, documents = torch.zeros(rows, dtype=torch.int64), torch.zeros(rows, seq_len, dtype=torch.int64)
    return [MicroBatch(row[:, :-1], row[:, 1:], weights, sources, documents) for row in ids]


def _wait(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


PARTS = {each.__name__: each for each in (machine, noticed, documents, pinned, layout, step)}


def main() -> int:
    arguments = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    arguments.add_argument("part", choices=PARTS)
    arguments.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    asked = arguments.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        print("gpu_check: this machine has no CUDA device", file=sys.stderr)
        return 2
    found = PARTS[asked.part](asked.device)
    if found.get("rank", 0) == 0:
        print(json.dumps(found, indent=1))
    return 0 if found.get("passed", True) else 1


if __name__ == "__main__":
    sys.exit(main())
