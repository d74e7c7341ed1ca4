"""A small run in several processes, as torchrun's would take it, and every number that it reports.

One step's loss is not finite, by a weight that the last process' rows alone have.
"""

import json
import os
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console

from crystal.evaluation.in_training import evaluator_of
from crystal.run import load_run
from crystal.training.batches import Batches
from crystal.training.loop import Trainer
from crystal.training.start import start

STEPS, BAD = 4, 2  # steps; the one that is left out, counted from 1
COMMON = [
    "train.micro_batch_size=2", "train.eval_every=2", "train.eval_rows=3", "train.checkpoint_every=4",
    "train.evaluate={suite: bpb, limit: 4}",
]  # fmt: skip
ONE = ["backend.name=cpu", "backend.dtype=fp32", "backend.threads=1"]
CUDA = ["backend.name=cuda", "backend.device=cpu", "backend.dtype=fp32", "backend.compile=false"]
STREAMING = ["backend.name=weight_streaming", "backend.dtype=fp32", "backend.threads=1"]
CASES = {
    1: {"cuda": CUDA, "streaming": STREAMING},
    2: {
        "streaming": STREAMING,
        "fsdp": [*CUDA, "backend.parallel.fsdp=2"],
        "tp": [*CUDA, "backend.parallel.tp=2", "model.d_ff=86"],
        "pp": [*CUDA, "backend.parallel.pp=2", "backend.parallel.interleave=1"],
    },
    4: {
        "streaming": STREAMING,
        "dp": [*CUDA, "backend.parallel.dp=4"],
        "dp-fsdp": [*CUDA, "backend.parallel.dp=2", "backend.parallel.fsdp=2"],
        "pp-fsdp": [*CUDA, "backend.parallel.pp=2", "backend.parallel.interleave=1", "backend.parallel.fsdp=2"],
        "fsdp-tp": [*CUDA, "backend.parallel.fsdp=2", "backend.parallel.tp=2", "model.d_ff=86"],
    },
}


def numbers(path: Path, run_dir: Path, overrides: list[str]) -> dict:
    """{steps: metrics.jsonl, sums: nats and tokens by source, events, outcome} of the run, trained here."""
    sums, step, by_source = [], Batches.step, Trainer._by_source

    def poisoned(self, number):
        batches = step(self, number)
        if number == BAD - 1 and self.part == self.parts - 1:
            batches[-1].weights_BT[-1] = torch.inf
        return batches

    def noted(self, nll, tokens):
        sums.append([nll, tokens])
        return by_source(self, nll, tokens)

    Batches.step, Trainer._by_source = poisoned, noted
    try:
        run = load_run(path, [*COMMON, *overrides, f"run_dir={run_dir}"])
        console = Console(quiet=True, stderr=True)
        outcome = start(run, None, STEPS, console, evaluator_of(run, console))
    finally:
        Batches.step, Trainer._by_source = step, by_source
    events = [json.loads(line) for line in (run_dir / "events.jsonl").read_text().splitlines()]
    return {
        "steps": [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()],
        "sums": sums,
        "scores": [event["scores"] for event in events if event["event"] == "evaluation"],
        "left_out": [event["step"] for event in events if event["event"] == "update_left_out"],
        "peak": outcome.peak_rss_bytes,
    }


def worker(rank: int, processes: int, path: Path, root: Path) -> None:
    """One of so many processes: one case after another; each writes all that it was told."""
    os.environ |= {"WORLD_SIZE": str(processes)}
    torch.set_num_threads(1)
    try:
        for name, overrides in CASES[processes].items():
            store = dist.FileStore(str(root / f"store-{processes}-{name}"), processes)
            dist.init_process_group("gloo", store=store, rank=rank, world_size=processes)
            found = numbers(path, root / f"{processes}-{name}", overrides)
            (root / f"{processes}-{name}-{rank}.json").write_text(json.dumps(found))
            dist.destroy_process_group()
    except BaseException:
        traceback.print_exc()
        os._exit(1)  # the others wait for this one: whoever started us ends them
