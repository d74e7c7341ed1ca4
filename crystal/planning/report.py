"""`crystal plan`: which parallel layout a run should have on a target machine, what it needs and how long it takes."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path

from crystal.backends.config import CudaConfig
from crystal.curriculum.resolve import resolve
from crystal.curriculum.stages import Curriculum
from crystal.errors import ConfigError
from crystal.planning.crossing import crossing
from crystal.planning.device import Device, load_device
from crystal.planning.grace import CHECKPOINT_BYTES, disk_bytes_per_second, grace_seconds
from crystal.planning.layouts import Candidate, Work, candidate, layouts, plan, sizes, smallest
from crystal.planning.shards import host_bytes
from crystal.run import RunFile, load_run
from crystal.zoo.build import parameter_count
from crystal.zoo.config import LADDER, rung
from crystal.zoo.flops import flops_per_token

DAY = 86400


def run_or_rung(name: str, overrides: Sequence[str] = ()) -> RunFile:
    """The run file of that name; of a ladder's rung (crystalcoder-w256-l8), which has none, the family's published run
    with the rung's model and optimizer. Raises ConfigError."""
    config = None if Path(name).exists() else rung(name)
    if config is None:
        return load_run(name, overrides)
    sections = [f"{key}={json.dumps(config.mapping[key])}" for key in ("model", "optimizer") if key in config.mapping]
    return load_run(f"{LADDER.fullmatch(name)['family']}-7b", [f"name={name}", *sections, *overrides])


def plan_run(
    run: RunFile,
    devices: int,
    device_name: str,
    changes: Sequence[str] = (),
    tokens_per_second: float | None = None,
    mfu: float | None = None,
    top: int = 10,
    cross: bool = False,
) -> dict:
    """The best `top` layouts of a run on so many devices, with every number they were reckoned from.

    Where no layout is for exactly so many, for the most of them that one is for (`devices` of `devices_given`).
    tokens_per_second or mfu (of all devices; counted as 6 N): a measured or published rate; MFU and days are then its
    own, while layouts keep their estimates and their order. A run whose backend is cuda with a layout of `devices`
    processes is told about its own as well. cross: also at which bandwidth between nodes tensor or pipeline parallelism
    begins to pay. Raises ConfigError where nothing can be laid out or fits.
    """
    device = load_device(device_name, changes)
    if tokens_per_second is not None and mfu is not None:
        raise ConfigError("--tokens-per-second and --mfu: expected one of them, they say the same")
    for flag, value in (("--tokens-per-second", tokens_per_second), ("--mfu", mfu)):
        if value is not None and not 0 < value < (1 if flag == "--mfu" else math.inf):
            raise ConfigError(
                f"{flag}: expected {'a share of 1' if flag == '--mfu' else 'a rate'} above 0, got {value:g}"
            )
    backend, curriculum = run.config.backend, resolve(run.config.curriculum, run.source)
    if backend.name == "cuda" and backend.dtype == "fp32":
        raise run.error(("backend", "dtype"), f"expected bf16, which plans are made for, got {backend.dtype}")
    work = _work(run, curriculum)
    given, devices = devices, max(n for n in sizes(work, device) if n <= devices)
    found = plan(work, devices, device)
    if not found:
        raise ConfigError(_refusal(work, devices, device))
    rate, peak = tokens_per_second, given * device.peak_tflops * 1e12 / (6 * parameter_count(work.model))
    if mfu is not None:
        rate = mfu * peak
    elif rate is not None and rate >= peak:
        raise ConfigError(
            f"--tokens-per-second: expected less than {peak:,.0f}, the peak of {given:,} devices, got {rate:g}"
        )
    best = work.tokens_per_step / found[0].step_seconds
    result = {
        "run": run.config.name,
        "parameters": parameter_count(work.model),
        "seq_len": work.seq_len,
        "global_batch_size": work.global_batch_size,
        "steps": work.steps,
        "tokens": work.steps * work.tokens_per_step,
        "flops_per_token": flops_per_token(work.model, work.seq_len),
        "flops_per_step": flops_per_token(work.model, work.seq_len) * work.tokens_per_step,
        "devices": devices,
        "devices_given": given,
        "device": device.model_dump(),
        "usable_bytes": device.usable_bytes,
        "layouts_possible": sum(1 for _ in layouts(work, devices, device)),
        "layouts_fitting": len(found),
        "rate": "estimated" if rate is None else "given",
        **(bookkeeping(work, given, device, rate) if rate else bookkeeping(work, devices, device, best)),
        "layouts": [_row(work, devices, device, c) for c in found[:top]],
        "own": None,
        "crossing": _crossing(work, devices, device) if cross else None,
    }
    if isinstance(backend, CudaConfig) and backend.parallel.processes == devices and devices > 1:
        result["own"] = _own(run, backend, work, device)
    step = (result if rate or not result["own"] else result["own"])["step_seconds"]
    result["stopping"] = stopping(run.config.directory, parameter_count(work.model), step)
    return result


def planned_layout(run: RunFile, curriculum: Curriculum, device_name: str) -> dict | None:
    """A cuda run's own layout as a row of `plan_run`, with the `device` it was reckoned for, which nothing says to be
    here. curriculum: the run's. None for fp32 compute, which plans are not made for."""
    backend, device = run.config.backend, load_device(device_name)
    if backend.dtype == "fp32":
        return None
    own = _own(run, backend, _work(run, curriculum), device)
    return own | {"device": device.name, "devices": backend.parallel.processes}


def _work(run: RunFile, curriculum: Curriculum) -> Work:
    return Work(run.config.model, curriculum.seq_len, curriculum.global_batch_size, curriculum.steps)


def _crossing(work: Work, devices: int, device: Device) -> dict:
    points, equal = crossing(work, devices, device)
    return {
        "points": [
            {
                "inter_node_gb_per_s": p.inter_node_gb_per_s,
                "sharded": _row(work, devices, device, p.sharded),
                "split": _row(work, devices, device, p.split),
                "gain": p.gain,
            }
            for p in points
        ],
        "equal_gb_per_s": equal,
    }


def _own(run: RunFile, backend: CudaConfig, work: Work, device: Device) -> dict:
    own = candidate(work, backend.parallel, device, run.config.train.micro_batch_size, backend.recompute)
    return _row(work, backend.parallel.processes, device, own)


def stopping(directory: Path, parameters: int, step_seconds: float) -> dict[str, float | None]:
    """What torchrun's --shutdown-timeout should be, from this machine's disk; None where it cannot be written."""
    checkpoint_bytes, rate = CHECKPOINT_BYTES * parameters, disk_bytes_per_second(directory)
    return {
        "checkpoint_bytes": checkpoint_bytes,
        "disk_bytes_per_second": rate,
        "shutdown_timeout": None if rate is None else grace_seconds(checkpoint_bytes, rate, step_seconds),
    }


def bookkeeping(work: Work, devices: int, device: Device, tokens_per_second: float) -> dict[str, float]:
    """What a rate comes to. MFU (Chowdhery et al. 2022, appendix B) twice: of 6 N FLOPs a token, N all parameters, and
    of `cost.flops_per_token`, which leaves out an embedding that is only looked up and adds causal attention."""
    peak = devices * device.peak_tflops * 1e12
    return {
        "tokens_per_second": tokens_per_second,
        "step_seconds": work.tokens_per_step / tokens_per_second,
        "mfu_6n": 6 * parameter_count(work.model) * tokens_per_second / peak,
        "mfu": flops_per_token(work.model, work.seq_len) * tokens_per_second / peak,
        "days": work.steps * work.tokens_per_step / tokens_per_second / DAY,
    }


def _row(work: Work, devices: int, device: Device, c: Candidate) -> dict:
    sent = {"intra_node": 0, "inter_node": 0}
    for t in c.traffic:
        sent["inter_node" if t.inter else "intra_node"] += t.bytes
    return {
        **c.layout.model_dump(),
        "micro_batch_size": c.micro_batch_size,
        "micro_batches": c.micro_batches,
        "recompute": c.recompute,
        "memory_bytes": c.memory_bytes,
        "memory": c.memory,
        "host_bytes_a_node": host_bytes(work.model, c.layout, device.devices_per_node),
        "fits": c.memory_bytes <= device.usable_bytes,
        "traffic_bytes": sent,
        "traffic": [vars(t) for t in c.traffic],
        "seconds": c.seconds,
        "bubble_fraction": c.seconds["bubble"] / c.step_seconds,
        **bookkeeping(work, devices, device, work.tokens_per_step / c.step_seconds),
    }


def _refusal(work: Work, devices: int, device: Device) -> str:
    """One line: what the leanest layout lacks, and how many devices would do."""
    least = smallest(work, devices, device)
    more = (
        n for n in sizes(work, device) if n > devices and smallest(work, n, device).memory_bytes <= device.usable_bytes
    )
    enough = next((f"; {n} of them would do" for n in more), "")
    return (
        f"--devices {devices} --device {device.name}: nothing fits, {layout_text(least.layout.model_dump())} with "
        f"micro-batch {least.micro_batch_size} and recompute {least.recompute} needs least, "
        f"{least.memory_bytes / 1e9:.1f} GB of {device.usable_bytes / 1e9:.1f} usable{enough}"
    )


def layout_text(row: dict) -> str:
    """`fsdp 56 x tp 4`: the dimensions that are not 1."""
    words = [f"{name} {row[name]}" for name in ("pp", "dp", "fsdp", "tp") if row[name] > 1]
    return " x ".join(words) or "one process"
