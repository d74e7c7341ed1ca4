"""Lower a run's whole training step to Cerebras IR, with no system attached, and check what came out."""

from __future__ import annotations

import math
import shutil
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from crystal.backends.cerebras import cirh
from crystal.backends.cerebras.bridge import Process, make_job
from crystal.backends.config import CerebrasConfig, OptimizerConfig
from crystal.curriculum.stages import Curriculum
from crystal.errors import RunError
from crystal.files import replacing
from crystal.mup.plan import Plan
from crystal.zoo.config import ModelConfig


@dataclass(frozen=True)
class Lowered:
    """A step that was lowered: where its IR is, what it holds, what broke its contract, and what it took."""

    ir: str
    parameters: int
    tensors: int
    state_tensors: int
    rows: int
    seq_len: int
    operations: int
    matmuls_by_dtype: dict[str, int]
    stopped: str | None
    problems: list[str]
    seconds: float  # all of it, with the start of Cerebras' process
    trace_seconds: float
    peak_rss_bytes: int  # of Cerebras' process

    def as_dict(self) -> dict:
        """JSON-ready, with the verdict on the contract."""
        return {"verdict": "FAIL" if self.problems else "PASS"} | asdict(self)


def lower(
    model: ModelConfig,
    plan: Plan,
    optimizer: OptimizerConfig,
    curriculum: Curriculum,
    config: CerebrasConfig,
    rows: int,
    out: Path,
) -> Lowered:
    """Trace and lower forward, backward, clipping, AdamW and schedule of one step of `rows` sequences.

    Writes out/cirh.mlir. Raises ConfigError when the environment is not there, the step does not lower or `out`
    cannot be written.
    """
    began = time.perf_counter()
    sources = {entry for stage in curriculum.stages for entry in stage.bound}
    job = make_job(model, plan, optimizer, curriculum, len(sources), config)
    process = Process(config.environment)
    try:
        process.ask("start", job=job | process.places | {"compile_only": True})
        done = process.ask("lower", rows=rows, seq_len=curriculum.seq_len)
        graph = cirh.read(Path(done["ir"]))
        out.mkdir(parents=True, exist_ok=True)
        with replacing(out / "cirh.mlir", durable=False) as aside:
            shutil.move(done["ir"], aside)
    except OSError as error:
        raise RunError(f"{out}: cannot be written: {error}") from None
    finally:
        process.close()
    shapes = {row.tensor: row.shape for row in plan.tensors}
    order = [name for group in job["groups"] for name in group["tensors"]]
    return Lowered(
        ir=str(out / "cirh.mlir"),
        parameters=sum(math.prod(shape) for shape in shapes.values()),
        tensors=len(shapes),
        state_tensors=sum(name.startswith("state.") for name in graph.state),
        rows=rows,
        seq_len=curriculum.seq_len,
        operations=sum(graph.operations.values()),
        matmuls_by_dtype=dict(graph.matmuls),
        stopped=done["stopped"],
        problems=cirh.problems(graph, shapes, order),
        seconds=round(time.perf_counter() - began, 1),
        trace_seconds=round(done["seconds"], 1),
        peak_rss_bytes=done["peak_rss_bytes"],
    )
