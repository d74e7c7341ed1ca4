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

from crystal.bench.matmul import matmul_rate
from crystal.errors import ConfigError, RunError
from crystal.output.progress import Bar
from crystal.zoo.config import ModelConfig
from crystal.zoo.flops import flops_per_token

OURS = "crystal"
PEERS = ("litgpt", "transformers", "trainer", "nanogpt")
SHAPES = {  # by d_model
    64: {"n_layers": 2, "n_heads": 4, "d_ff": 176, "vocab_size": 256, "seq_len": 32, "batch": 2},
    256: {"n_layers": 6, "n_heads": 8, "d_ff": 688, "vocab_size": 8192, "seq_len": 256, "batch": 8},
    512: {"n_layers": 6, "n_heads": 8, "d_ff": 1376, "vocab_size": 8192, "seq_len": 256, "batch": 8},
    1024: {"n_layers": 6, "n_heads": 16, "d_ff": 2752, "vocab_size": 8192, "seq_len": 256, "batch": 8},
}


def model_of(shape: dict) -> ModelConfig:
    """Our model of one of SHAPES."""
    sizes = {key: shape[key] for key in ("d_model", "n_layers", "n_heads", "d_ff", "vocab_size")}
    return ModelConfig(**sizes, max_seq_len=shape["seq_len"], norm_eps=1e-5)


def matmul_peak(dtype: str, threads: int) -> float:
    """FLOP per CPU second of the best product measured here: 1,024 x 1,024 and 2,752 weights, 2,048 tokens."""
    from crystal.kernels.linear import product

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        return matmul_rate(dtype, rows=2048, widths=(1024, 2752), product=product, clock=time.process_time, tries=5)
    finally:
        torch.set_num_threads(before)


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
            raise RunError(f"bench train: {self.name} ended in the middle of a step")
        return json.loads(answer)

    def close(self) -> None:
        self.process.terminate()
        self.process.wait()
        self.process.stdin.close()
        self.process.stdout.close()


def start(name: str, python: str, shape: dict, dtype: str, threads: int, compile: bool) -> Worker | str:
    """A worker that has taken its first steps, or the last line that it said instead."""
    script = str(Path(__file__).with_name("training_peer.py"))
    command = [python, script, name, json.dumps(shape), "--dtype", dtype, "--threads", str(threads)]
    environment = os.environ | {"OMP_NUM_THREADS": str(threads), "PYTHONSAFEPATH": "1"}
    if name != OURS:  # what the command sets for itself (crystal/cli/main.py), a peer does not
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
) -> dict:  # fmt: skip
    """Steps of all that can start, in turns; peers that cannot are listed with the reason.

    pythons: by name, ours where none is.
    """
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
                raise RunError(f"bench train: {OURS} did not start: {started}")
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
    return result


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
    flops = flops_per_token(model_of(shape), shape["seq_len"])
    return {
        "shape": shape,
        "threads": threads,
        "torch": torch.__version__,
        "providers": providers,
        "not_measured": missing,
        "ratio_to_best_peer": ratio["tokens_per_second"],
        "ratio_to_best_peer_cpu": ratio["tokens_per_cpu_second"],
        "matmul_peak_flops": peak,
        "matmul_peak_fraction": ours["tokens_per_cpu_second"] * flops / peak,
    }
