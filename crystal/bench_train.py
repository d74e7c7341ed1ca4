"""`crystal bench train`: training steps of the cpu backend beside those of peers, in turns on one machine.

Each trainer runs in its own process (and, where one is named, its own Python) and waits while others take their
turns, round after round in rotating order, so that whatever else the machine does hits all alike. Tokens per second
of CPU time are what to read on a machine that is shared, per second of the clock on one that is idle.
"""

from __future__ import annotations

import itertools
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from rich.console import Console

from crystal.config import ConfigError
from crystal.output.progress import Bar

OURS = "crystal"
PEERS = ("litgpt", "transformers", "trainer", "nanogpt")
PRODUCTS = 16  # timed at once: a thread's CPU time is not exact to a millisecond on a virtual machine
SHAPES = {  # by d_model
    64: {"n_layers": 2, "n_heads": 4, "d_ff": 176, "vocab_size": 256, "seq_len": 32, "batch": 2},
    256: {"n_layers": 6, "n_heads": 8, "d_ff": 688, "vocab_size": 8192, "seq_len": 256, "batch": 8},
    512: {"n_layers": 6, "n_heads": 8, "d_ff": 1376, "vocab_size": 8192, "seq_len": 256, "batch": 8},
    1024: {"n_layers": 6, "n_heads": 16, "d_ff": 2752, "vocab_size": 8192, "seq_len": 256, "batch": 8},
}


def matmul_flops(shape: dict) -> int:
    """Products of a step's forward and backward: 6 a weight and token, and the causal half of attention's scores."""
    d, tokens = shape["d_model"], shape["batch"] * shape["seq_len"]
    weights = shape["n_layers"] * (4 * d * d + 3 * d * shape["d_ff"]) + d * shape["vocab_size"]
    return tokens * (6 * weights + 6 * shape["n_layers"] * shape["seq_len"] * d)


def matmul_peak(dtype: str, threads: int) -> float:
    """FLOP per CPU second of the best product measured here: 1,024 x 1,024 and 2,752 weights, 2,048 tokens."""
    from crystal.kernels.linear import product

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    best = 0.0
    with torch.no_grad():
        for width in (1024, 2752):
            x, weight = (
                torch.randn(n, 1024, dtype=torch.float32 if dtype == "fp32" else torch.bfloat16) for n in (2048, width)
            )
            for _ in range(5):
                begun = time.process_time()
                for _ in range(PRODUCTS):
                    product(x, weight)
                best = max(best, PRODUCTS * 2 * 2048 * 1024 * width / (time.process_time() - begun))
    torch.set_num_threads(before)
    return best


@dataclass
class Worker:
    """A trainer's process and what it has reported: seconds of each step, by turn."""

    name: str
    process: subprocess.Popen
    wall: list[list[float]] = field(default_factory=list)
    cpu: list[list[float]] = field(default_factory=list)
    loss: float = 0.0
    peak_rss_bytes: int = 0

    def turn(self, steps: int) -> None:
        answer = self._ask(f"run {steps}")
        self.wall.append(answer["wall"])
        self.cpu.append(answer["cpu"])
        self.loss, self.peak_rss_bytes = answer["loss"], answer["peak_rss_bytes"]

    def _ask(self, line: str) -> dict:
        self.process.stdin.write(line + "\n")
        self.process.stdin.flush()
        answer = self.process.stdout.readline()
        if not answer:
            raise ConfigError(f"bench train: {self.name} ended in the middle of a step")
        return json.loads(answer)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def start(name: str, python: str, shape: dict, dtype: str, threads: int, compile: bool) -> Worker | str:
    """A worker that has taken its first steps, or the last line that it said instead."""
    script = str(Path(__file__).with_name("bench_train_peer.py"))
    command = [python, script, name, json.dumps(shape), "--dtype", dtype, "--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"}
    if name != OURS:  # what the command sets for itself (crystal/cli.py), a peer does not
        environment.pop("GOMP_SPINCOUNT", None)
    with tempfile.TemporaryFile("w+") as said:  # not a pipe, which would fill up
        try:
            process = subprocess.Popen(
                command + ["--compile"] * compile, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=said,
                text=True, env=environment,
            )  # fmt: skip
        except OSError as error:
            raise ConfigError(f"--python {name}={python}: {error.strerror}") from error
        worker = Worker(name, process)
        try:
            ready = process.stdout.readline()
        except BaseException:
            worker.close()
            raise
        if ready:
            return worker
        worker.close()
        said.seek(0)
        return (said.read().strip().splitlines() or ["ended without a word"])[-1]


def bench_train(
    shape: dict, peers: list[str], pythons: dict[str, str], dtype: str, threads: int, compile: bool, rounds: int,
    steps: int, console: Console,
) -> tuple[dict, str]:  # fmt: skip
    """(result, table). peers that cannot start are listed with the reason; pythons: by name, ours where none is."""
    if unknown := (set(peers) | set(pythons)) - {*PEERS, OURS}:
        raise ConfigError(f"bench train: expected peers of {', '.join(PEERS)}, got {min(unknown)}")
    peak = matmul_peak(dtype, threads)
    workers, missing = [], {}
    try:
        for name in [OURS, *peers]:
            with Bar(console, f"starting {name}"):
                started = start(name, pythons.get(name, sys.executable), shape, dtype, threads, compile)
            if isinstance(started, Worker):
                workers.append(started)
            elif name == OURS:
                raise ConfigError(f"bench train: {OURS} did not start: {started}")
            else:
                missing[name] = started
        load = os.getloadavg()[0]
        with Bar(console, "turns", rounds * len(workers)) as bar:
            for turn in range(rounds):
                for i in range(len(workers)):
                    worker = workers[(turn + i) % len(workers)]
                    bar.what = f"{worker.name}: {steps} steps"
                    worker.turn(steps)
                    bar.advance()
    finally:
        for worker in workers:
            worker.close()
    result = _result(workers, missing, shape, dtype, threads, compile, peak)
    result["load"] = [round(load, 1), round(os.getloadavg()[0], 1)]
    return result, _table(result)


def _result(workers: list[Worker], missing: dict, shape: dict, dtype: str, threads: int, compile: bool, peak: float):
    tokens = shape["batch"] * shape["seq_len"]
    providers = {
        w.name: {
            "tokens_per_second": tokens / statistics.median(itertools.chain(*w.wall)),
            "tokens_per_cpu_second": tokens / statistics.median(itertools.chain(*w.cpu)),
            "spread": [tokens / max(map(statistics.median, w.cpu)), tokens / min(map(statistics.median, w.cpu))],
            "peak_rss_bytes": w.peak_rss_bytes,
            "dtype": dtype,
            "compiled": compile,
            "loss": w.loss,
        }
        for w in workers
    }
    ours = providers[OURS]
    others = [p for name, p in providers.items() if name != OURS]
    ratio = {
        key: ours[key] / max(p[key] for p in others) if others else None
        for key in ("tokens_per_second", "tokens_per_cpu_second")
    }
    return {
        "shape": shape,
        "threads": threads,
        "torch": torch.__version__,
        "providers": providers,
        "not_measured": missing,
        "ratio_to_best_peer": ratio["tokens_per_second"],
        "ratio_to_best_peer_cpu": ratio["tokens_per_cpu_second"],
        "matmul_peak_flops": peak,
        "matmul_peak_fraction": ours["tokens_per_cpu_second"] / tokens * matmul_flops(shape) / peak,
    }


def _table(result: dict) -> str:
    shape = result["shape"]
    lines = [
        f"d_model {shape['d_model']}, {shape['n_layers']} layers, {shape['batch']} x {shape['seq_len']} tokens, "
        f"{result['threads']} threads",
        f"{'':14}{'tokens/s':>10}{'tokens/CPU s':>14}{'(turns)':>16}{'peak MiB':>10}{'loss':>8}",
    ]
    for name, p in result["providers"].items():
        turns = f"{p['spread'][0]:,.0f}-{p['spread'][1]:,.0f}"
        lines.append(
            f"{name:14}{p['tokens_per_second']:>10,.0f}{p['tokens_per_cpu_second']:>14,.0f}{turns:>16}"
            f"{p['peak_rss_bytes'] / 2**20:>10,.0f}{p['loss']:>8.3f}"
        )
    lines += [f"{name:14}not measured: {reason}" for name, reason in result["not_measured"].items()]
    if result["ratio_to_best_peer"] is not None:
        lines.append(
            f"to the best peer: {result['ratio_to_best_peer']:.2f} by the clock, "
            f"{result['ratio_to_best_peer_cpu']:.2f} by CPU time"
        )
    lines.append(f"of the best matrix product measured here: {result['matmul_peak_fraction']:.0%}")
    return "\n".join(lines)
