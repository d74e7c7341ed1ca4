"""The process inside Cerebras' environment: takes commands as JSON lines, answers as JSON lines.

`python -m crystal.backends.cerebras.worker`, started by `bridge`. A training session is one DataExecutor: it pulls
batches from the spool, each through the traced step, and the step closure sends what came out. On the CPU backend a
session may end at any step; on CSX at the step that was announced, where the checkpoint closure saves.
"""

from __future__ import annotations

import json
import os
import resource
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TextIO

import cerebras.pytorch as cstorch
import torch
from torch import Tensor

from crystal.backends.cerebras import spool
from crystal.backends.cerebras.step import Session
from crystal.memory import peak_rss_bytes

UNBOUNDED = 1 << 30  # steps of a session that ends when it is told


def input_fn(directory: str, first: int, owner: int | None) -> Iterator[dict[str, Tensor]]:
    """Cerebras' input function; on CSX it runs on every worker node, each of which streams its part of the rows."""
    streams = cstorch.distributed.is_streamer()
    rank = cstorch.distributed.get_streaming_rank() if streams else 0
    ranks = cstorch.distributed.num_streamers() if streams else 1
    for arrays in spool.batches(Path(directory), first, owner, rank, ranks):
        yield {key: torch.from_numpy(value) for key, value in arrays.items()}


def blank_input_fn(rows: int, seq_len: int, job: dict) -> Iterator[dict[str, Tensor]]:
    """Batches of the right shapes and types, for a step that is lowered and not run."""
    ids_BT = torch.zeros(rows, seq_len, dtype=torch.int32)
    batch = {"ids_BT": ids_BT, "labels_BT": ids_BT, "weights_BT": ids_BT.float()}
    batch["sources_BS"] = torch.zeros(rows, job["n_sources"])
    if job["model"]["document_mask"]:
        batch["documents_BT"] = ids_BT
    while True:
        yield batch


class Worker:
    """State between commands: the session and the number of the last step made."""

    def __init__(self, answer: Callable[[dict], None]):
        self.answer = answer
        self.session: Session | None = None
        self.step = 0  # global steps done; the learning rate is a function of it
        self.updates = 0  # since the optimizer's reset
        self.saved: tuple[int | None, str] = (None, "")  # step, file

    def start(self, job: dict) -> dict:
        began = time.perf_counter()
        if job["threads"]:
            torch.set_num_threads(job["threads"])
        cpu = job["device"] == "cpu"
        options = {} if cpu else {"compile_only": job["compile_only"], "cluster_config": _cluster(job)}
        backend = cstorch.backend("CPU" if cpu else "CSX", artifact_dir=job["artifact_dir"], **options)
        if not cpu:
            cstorch.amp.set_half_dtype(job["half"])
            if job["cluster"] and job["cluster"].get("micro_batch_size"):
                cstorch.backends.csx.performance.micro_batch_size = job["cluster"]["micro_batch_size"]
        self.session = Session(job, backend)
        return {"version": cstorch.__version__, "torch": torch.__version__, "seconds": time.perf_counter() - began}

    def train(self, first: int, steps: int | None, micro_batch_size: int) -> dict:
        """A session from global step `first`: of `steps` steps, or until the spool ends it (CPU only)."""
        session, cpu = self.session, self.session.backend.is_cpu
        session.micro_batch_size = micro_batch_size
        if first != self.step + 1:
            session.set_step(first - 1)
        self.step = first - 1
        owner = os.getppid() if cpu else None
        loader = cstorch.utils.data.DataLoader(input_fn, session.job["spool"], first, owner)
        executor = cstorch.utils.data.DataExecutor(
            loader, num_steps=steps or UNBOUNDED, checkpoint_steps=0 if cpu else steps, activation_steps=1
        )

        @cstorch.step_closure
        def report(step: int, loss, norm, applied, nll_S, tokens_S) -> None:
            self.step, self.updates = step, self.updates + int(applied.item())
            host = [loss.item(), norm.item(), applied.item(), nll_S.tolist(), tokens_S.tolist()]
            self.answer({"step": step, "values": host})

        @cstorch.checkpoint_closure
        def checkpoint(step: int) -> None:
            self.step = step
            self._write(str(Path(session.job["spool"]) / f"step-{step:07d}.mdl"))

        try:
            for step, batch in enumerate(executor, first):
                report(step, *session.train(batch))
                checkpoint(step)
        except spool.Ended:
            pass
        return {"step": self.step}

    def lower(self, rows: int, seq_len: int) -> dict:
        """Trace one step of a batch of this shape and lower it; on to the system's compiler if there is a system.

        Returns {ir: file, stopped: why it went no further, or None, seconds, peak_rss_bytes}. A step that does not
        lower is an error.
        """
        began = time.perf_counter()
        loader = cstorch.utils.data.DataLoader(blank_input_fn, rows, seq_len, self.session.job)
        executor = cstorch.utils.data.DataExecutor(loader, num_steps=1)
        stopped = None
        try:
            for batch in executor:
                self.session.train(batch)
        except Exception as error:
            # with the IR on disk all of our side is done, and what failed is the way to a system
            if not (executor.artifact_dir / "cirh.mlir").exists():
                raise
            stopped = " ".join(str(error).split()) or type(error).__name__
        of_children = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss * 1024
        return {
            "ir": str(executor.artifact_dir / "cirh.mlir"),
            "stopped": stopped,
            "seconds": time.perf_counter() - began,
            "peak_rss_bytes": max(peak_rss_bytes(), of_children),
        }

    def eval(self, step: int) -> dict:
        """Summed nats and tokens by source of the one batch in the spool under `step`."""
        loader = cstorch.utils.data.DataLoader(input_fn, self.session.job["spool"], step, None)
        result = {}

        @cstorch.step_closure
        def report(nll_S, tokens_S) -> None:
            result.update(nll=nll_S.tolist(), tokens=tokens_S.tolist())

        for batch in cstorch.utils.data.DataExecutor(loader, num_steps=1):
            report(*self.session.eval(batch))
        return result

    def save(self, file: str) -> dict:
        """Write the state; on CSX only where a session ended, which wrote it then. Returns the file that has it."""
        if self.session.backend.is_cpu:
            self._write(file)
        elif self.saved[0] != self.step:
            raise RuntimeError(f"on csx the weights of step {self.step} cannot be had, those of {self.saved[0]} can")
        return {"file": self.saved[1]}

    def _write(self, file: str) -> None:
        cstorch.save(self.session.state_dict(self.step, self.updates), file)
        self.saved = (self.step, file)

    def load(self, file: str, updates: int | None) -> dict:
        """Weights, and unless updates is None the moments after so many updates."""
        self.session.load(cstorch.load(file), with_optimizer=updates is not None)
        self.updates = updates or 0
        return {}

    def reset(self) -> dict:
        self.session.reset_optimizer()
        self.updates = 0
        return {}


def _cluster(job: dict) -> cstorch.distributed.ClusterConfig:
    """One streaming worker a system, so that rows keep their order; it must see the spool and this code."""
    given = {key: value for key, value in (job["cluster"] or {}).items() if key != "micro_batch_size"}
    paths = [job["spool"], job["package"]]
    return cstorch.distributed.ClusterConfig(
        **{"mount_dirs": paths, "python_paths": paths[1:], "num_workers_per_csx": 1} | given
    )


def main(commands: TextIO, answers: TextIO) -> None:
    """Obey until the pipe closes. A failure is answered with its kind and its first line; the log has the rest."""

    def answer(message: dict) -> None:
        answers.write(json.dumps(message) + "\n")
        answers.flush()

    worker = Worker(answer)
    for line in commands:
        command = json.loads(line)
        try:
            done = getattr(worker, command.pop("do"))(**command)
        except Exception as error:
            import traceback

            traceback.print_exc()
            text = str(error).strip() or type(error).__name__
            answer({"error": text.splitlines()[0]})
        else:
            answer({"done": done})


if __name__ == "__main__":
    # what cstorch prints goes to the log, not between the answers
    pipe = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    main(sys.stdin, pipe)
