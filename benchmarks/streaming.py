"""Weight streaming beside DeepSpeed ZeRO-Infinity, both from disk on this processor, in one run.

The same decoder (RMSNorm, SwiGLU, untied head; 24 x 2048/5504, 1.345 B parameters), 512 tokens a step, gradients
clipped to norm 1, AdamW with fp32 weights and moments, bf16 compute. DeepSpeed: ZeRO-3 with parameters and optimizer
state on disk, its CPU accelerator, an environment of its own; parameters are read without prefetch, which fails at the
second step here. The two take turns, a process each, so that a disk need hold but one. Weights and tokens are random:
times and memory count, losses do not. Both have the same work; ours computes each block twice, DeepSpeed's once.

python -m venv DS && DS/bin/pip install torch setuptools wheel ninja; DS/bin/pip install deepspeed --no-build-isolation
(needs libaio-dev and a C++ compiler), then
python benchmarks/streaming.py --deepspeed DS/bin/python [--path DIRECTORY] [--rounds 2] [--steps 5] [--json FILE]
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import resource
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

LAYERS, WIDTH, INNER, HEADS, WORDS, TOKENS = 24, 2048, 5504, 64, 32000, 512
WARM = 2  # steps that do not count: ours has no update in the first, DeepSpeed speeds up


def ours(directory: Path) -> Callable[[], object]:
    """A weight-streaming step."""
    import torch

    from crystal.backends.base import Setup
    from crystal.backends.config import OptimizerConfig, WeightStreamingConfig
    from crystal.backends.weight_streaming.backend import WeightStreamingBackend
    from crystal.bench.streaming import random_batches, random_weights
    from crystal.zoo.config import model_config

    model = model_config(f"amber-w{WIDTH}-l{LAYERS}")
    assert (model.d_ff, model.n_heads, model.vocab_size) == (INNER, HEADS, WORDS)
    torch.set_num_threads(os.cpu_count())
    optimizer = OptimizerConfig(grad_clip=1.0)
    plan = optimizer.plan_for(model)
    config = WeightStreamingConfig(name="weight_streaming", buffers_gb=0.6)
    made = WeightStreamingBackend(Setup(model, plan, optimizer, lambda step: 1e-4, 1, 1), config, directory)
    made.load(lambda kind: random_weights(plan), None)
    batches, steps = random_batches(WORDS, TOKENS, 1), iter(range(1, 1 << 20))
    return lambda: made.train_step(next(steps), batches).loss.item()


def deepspeed(directory: Path) -> Callable[[], object]:
    """A ZeRO-Infinity step."""
    port = str(29600 + os.getpid() % 300)
    os.environ |= {"DS_ACCELERATOR": "cpu", "RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    import deepspeed as ds
    import torch
    import torch.nn.functional as F
    from torch import nn

    torch.set_num_threads(os.cpu_count())

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.RMSNorm(WIDTH), nn.RMSNorm(WIDTH)
            self.q, self.k, self.v, self.o = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(4))
            self.gate, self.up = (nn.Linear(WIDTH, INNER, bias=False) for _ in range(2))
            self.down = nn.Linear(INNER, WIDTH, bias=False)

        def forward(self, x):
            a = self.norm1(x)
            q, k, v = (f(a).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
            x = x + self.o(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
            a = self.norm2(x)
            return x + self.down(F.silu(self.gate(a)) * self.up(a))

    class Decoder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embed, self.norm = nn.Embedding(WORDS, WIDTH), nn.RMSNorm(WIDTH)
            self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))
            self.head = nn.Linear(WIDTH, WORDS, bias=False)

        def forward(self, ids, labels):
            x = self.embed(ids)
            for block in self.blocks:
                x = block(x)
            return F.cross_entropy(self.head(self.norm(x)).float().flatten(0, 1), labels.flatten())

    on_disk = {"device": "nvme", "nvme_path": str(directory), "pin_memory": False}
    config = {
        "train_batch_size": 1,
        "bf16": {"enabled": True},
        "gradient_clipping": 1.0,
        "optimizer": {"type": "AdamW", "params": {"lr": 1e-4, "betas": [0.9, 0.95], "weight_decay": 0.1}},
        "zero_optimization": {
            "stage": 3,
            "sub_group_size": 50_000_000,
            "reduce_bucket_size": 50_000_000,
            "stage3_prefetch_bucket_size": 0,
            "stage3_max_live_parameters": 100_000_000,
            "stage3_max_reuse_distance": 100_000_000,
            "stage3_param_persistence_threshold": 10_000,
            "offload_optimizer": on_disk | {"buffer_count": 4},
            "offload_param": on_disk | {"buffer_count": 12, "buffer_size": 80_000_000, "max_in_cpu": 0},
        },
        "aio": {"block_size": 1 << 20, "queue_depth": 8, "thread_count": 1, "overlap_events": True},
        "zero_allow_untested_optimizer": True,
    }
    ds.init_distributed()
    with ds.zero.Init(config_dict_or_path=config):
        model = Decoder()
    engine, *_ = ds.initialize(model=model, config=config)
    tokens = torch.randint(0, WORDS, (1, TOKENS + 1), generator=torch.Generator().manual_seed(1))

    def step() -> float:
        loss = engine(tokens[:, :-1], tokens[:, 1:])
        engine.backward(loss)
        engine.step()
        return loss.item()

    return step


def measure(make: Callable[[Path], Callable[[], object]], directory: Path, steps: int) -> dict:
    """Seconds of each step, peak memory, and the bytes on disk behind them."""
    since = time.perf_counter()
    step = make(directory)
    seconds = [time.perf_counter() - since]
    for _ in range(WARM + steps):
        since = time.perf_counter()
        step()
        seconds.append(time.perf_counter() - since)
    held = sum(f.stat().st_blocks * 512 for f in directory.rglob("*") if f.is_file())
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {"init_s": seconds[0], "step_s": seconds[1:], "peak_rss_bytes": peak, "disk_bytes": held}


def one(name: str, python: str, base: Path, steps: int) -> dict:
    """Measure in a process of its own; its disk is free again behind it."""
    directory = Path(tempfile.mkdtemp(prefix=f"streaming-{name}-", dir=base))
    command = [python, __file__, "--measure", name, "--path", str(directory), "--steps", str(steps)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise SystemExit(f"{name}: {done.stderr[-3000:]}")
        return json.loads(done.stdout.splitlines()[-1])
    finally:
        shutil.rmtree(directory, ignore_errors=True)


def versions(python: str, *packages: str) -> str:
    code = f"from importlib.metadata import version as v; print(', '.join(n + ' ' + v(n) for n in {packages}))"
    return subprocess.run([python, "-c", code], capture_output=True, text=True, check=True).stdout.strip()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--deepspeed", help="the python of an environment with DeepSpeed")
    parser.add_argument("--path", type=Path, default=Path(tempfile.gettempdir()))
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--measure", choices=["ours", "deepspeed"], help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.measure:
        print(json.dumps(measure({"ours": ours, "deepspeed": deepspeed}[args.measure], args.path, args.steps)))
        return
    pythons = {"ours": sys.executable} | ({"deepspeed": args.deepspeed} if args.deepspeed else {})
    print(f"{os.cpu_count()} cores {platform.machine()}, Python {platform.python_version()}")
    print("ours:", versions(sys.executable, "torch"))
    if args.deepspeed:
        print("deepspeed:", versions(args.deepspeed, "deepspeed", "torch"))
    found: dict[str, list[dict]] = {name: [] for name in pythons}
    for _ in range(args.rounds):
        for name, python in pythons.items():
            result = one(name, python, args.path, args.steps) | {"load": os.getloadavg()[0]}
            found[name].append(result)
            print(name, json.dumps(result), flush=True)
    medians = {}
    for name, results in found.items():
        steps = sorted(s for r in results for s in r["step_s"][WARM:])
        memory, disk = (max(r[key] for r in results) / 1e9 for key in ("peak_rss_bytes", "disk_bytes"))
        medians[name] = (statistics.median(steps), memory)
        spread = f"{steps[0]:.1f} to {steps[-1]:.1f} of {len(steps)}"
        print(f"{name}: {medians[name][0]:.1f} s a step ({spread}), peak {memory:.2f} GB, {disk:.1f} GB on disk")
    if "deepspeed" in medians:
        (a, memory_a), (b, memory_b) = medians["ours"], medians["deepspeed"]
        print(f"{b / a:.2f} x DeepSpeed's speed at 1/{memory_b / memory_a:.1f} of its memory")
    if args.json:
        args.json.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
