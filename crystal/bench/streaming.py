"""`crystal bench stream`: a weight-streaming step beside its own two floors, pure compute and pure I/O, in one run."""

from __future__ import annotations

import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import torch
from rich.console import Console

from crystal.backends.base import MicroBatch, Setup
from crystal.backends.config import WeightStreamingConfig, load_preset
from crystal.backends.weight_streaming.backend import WeightStreamingBackend
from crystal.backends.weight_streaming.store import Update
from crystal.errors import ConfigError
from crystal.memory import peak_rss_bytes
from crystal.mup.plan import Plan
from crystal.output.progress import note
from crystal.zoo.build import parameter_count

ROUND = ("step_s", "compute_s", "io_s")


def bench_stream(
    model: str, tokens: int, micro_batches: int, steps: int, config: WeightStreamingConfig, console: Console
) -> dict:
    """Measure steady steps of a model of random weights on random tokens, in a scratch store that is taken away.

    Each of `steps` rounds has a step, the same step with files that do nothing, and the same transfers without
    arithmetic. A step that took less than one of its floors was not measured, the machine did something else meanwhile:
    such a round is made again, at most twice as often as there are rounds. Where too few are left, step_over_floor and
    overlap_efficiency are None. tokens: of a micro-batch, one row. Raises ConfigError.
    """
    shape, optimizer = load_preset(model)
    if tokens > shape.max_seq_len:
        raise ConfigError(f"--tokens: expected at most the model's {shape.max_seq_len}, got {tokens}")
    plan = optimizer.plan_for(shape)
    base = config.path or Path(tempfile.gettempdir())
    base.mkdir(parents=True, exist_ok=True)
    scratch = Path(tempfile.mkdtemp(prefix="crystal-bench-stream-", dir=base))
    try:
        inside = config.model_copy(update={"path": None})
        made = WeightStreamingBackend(
            Setup(shape, plan, optimizer, lambda step: 1e-4, 1, 1), inside, scratch, micro_batches
        )
        note(console, f"{model}: {made.store.layout.store_bytes / 1e9:.1f} GB of weights and moments in {scratch}")
        made.load(lambda kind: random_weights(plan), None)
        batches = random_batches(shape.vocab_size, tokens, micro_batches)
        loss = made.train_step(1, batches).loss.item()  # the first has no update to make
        rounds, impossible = measured_rounds(lambda number: _round(made, number + 1, batches), steps, console)
    finally:
        shutil.rmtree(scratch, ignore_errors=True)
    times = {key: [each[key] for each in rounds] for key in ROUND}
    step_s, compute_s, io_s = (statistics.median(times[key]) for key in ROUND)
    floor = max(compute_s, io_s)
    measured = impossible == 0
    return {
        "model": model,
        "parameters": parameter_count(shape),
        "tokens": tokens * micro_batches,
        "micro_batches": micro_batches,
        "dtype": made.config.dtype,
        "moments": config.moments,
        "store_bytes": made.store.layout.store_bytes,
        "gradient_bytes": made.store.layout.gradient_bytes,
        "buffer_bytes": made.stream.bytes,
        "first_loss": loss,
        "rounds": times,
        "impossible_rounds": impossible,
        "step_s": step_s,
        "compute_s": compute_s,
        "io_s": io_s,
        "step_over_floor": step_s / floor if measured else None,
        "overlap_efficiency": floor / step_s if measured else None,
        "tokens_per_second": tokens * micro_batches / step_s,
        "peak_rss_bytes": peak_rss_bytes(),
    }


def measured_rounds(
    make: Callable[[int], dict[str, float]], wanted: int, console: Console
) -> tuple[list[dict[str, float]], int]:
    """`wanted` rounds in which no step was faster than its floors, and 0; or, where three times as many do not hold so
    many, all that were made, and how many of them are impossible.

    make: of the round's number from 1, its seconds by the names in ROUND.
    """
    possible, every = [], []
    while len(possible) < wanted and len(every) < 3 * wanted:
        seconds = make(len(every) + 1)
        every.append(seconds)
        said = "  ".join(f"{key} {value:.2f}" for key, value in seconds.items())
        if seconds["step_s"] >= max(seconds["compute_s"], seconds["io_s"]):
            possible.append(seconds)
        else:
            said += "  impossible: a step cannot take less than its parts; something else ran meanwhile"
        note(console, said)
    return (possible, 0) if len(possible) == wanted else (every, len(every) - len(possible))


def _round(made: WeightStreamingBackend, number: int, batches: Sequence[MicroBatch]) -> dict[str, float]:
    """A step, the step without files, the transfers without arithmetic: seconds of each."""
    step_s = _timed(lambda: made.train_step(number, batches))
    with _WithoutFiles(made):
        compute_s = _timed(lambda: made.train_step(made.step + 1, batches))
    return {"step_s": step_s, "compute_s": compute_s, "io_s": _timed(lambda: _transfers(made))}


def random_weights(plan: Plan) -> Iterator[tuple[str, torch.Tensor]]:
    """Of the plan's size, though not cut off, which would take longer than all else."""
    generator = torch.Generator().manual_seed(1)
    for row in plan.tensors:
        tensor = torch.empty(row.shape)
        if row.init == "normal":
            yield row.tensor, tensor.normal_(0, row.init_std, generator=generator)
        else:
            yield row.tensor, tensor.fill_(float(row.init == "ones"))


def random_batches(vocab_size: int, tokens: int, count: int) -> Sequence[MicroBatch]:
    """`count` micro-batches of one step, each one row."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, vocab_size, (count, tokens + 1), generator=generator)
    weights_BT = torch.full((1, tokens), 1 / (tokens * count))
    rows = [(row[None, :-1], row[None, 1:]) for row in ids]
    return [MicroBatch(x, y, weights_BT, torch.zeros(1, dtype=torch.int64), torch.zeros_like(x)) for x, y in rows]


def _timed(work: Callable[[], object]) -> float:
    since = time.perf_counter()
    work()
    return time.perf_counter() - since


class _Nothing:
    """A file that takes no time: what it reads is what the buffer held."""

    def pread(self, offset: int, into: memoryview) -> None: ...

    def pwrite(self, offset: int, source: memoryview) -> None: ...

    def sync(self) -> None: ...


class _WithoutFiles:
    """Inside, a store's transfers do nothing and its record is not written; all weights are 0, which costs as much."""

    def __init__(self, made: WeightStreamingBackend):
        self.store, self.stream = made.store, made.stream

    def __enter__(self) -> None:
        self.stream.buffer.tensor(torch.uint8, 0, self.stream.bytes).zero_()
        self.files, self.directory = self.store.files, self.store.directory
        self.store.files, self.store.directory = dict.fromkeys(self.files, _Nothing()), None

    def __exit__(self, *exc: object) -> None:
        self.store.files, self.store.directory = self.files, self.directory


def _transfers(made: WeightStreamingBackend) -> None:
    """Everything a step reads and writes, without arithmetic."""
    executor, gradients = made.executor, made.executor.gradients
    made._seal()
    number = max(made.store.record.updates.values()) + 1
    for _ in made.stream.updated(Update(number, number, 0.0, None), compute=False):
        pass
    for piece, _ in made.stream.weights([executor.head, *reversed(executor.blocks)]):
        gradients.end(piece, gradients.begin(piece, add=False), whole=False)
    gradients.end(executor.embedding, gradients.begin(executor.embedding, add=executor.tied), whole=False)
    gradients.flush()
    made.update, made.sealed = Update(number + 1, number + 1, 0.0, None), False
