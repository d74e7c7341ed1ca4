"""Every parallel layout of a run on a number of devices, with memory, traffic and time of a step, by formulas.

They follow what the `cuda` backend does (parallelize.py, pipeline.py). Memory is the fullest device's: `cost` has the
bytes, ZeRO (Rajbhandari et al. 2020) the division by fsdp, Korthikanti et al. 2022, section 4.2.3, the micro-batches
in flight in a pipeline. `shards` says what a device holds, `traffic` what it sends, `step_time` what a step takes.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import gcd

from crystal.backends.config import Layout
from crystal.planning.cost import COPY, GRADIENT, MOMENTS, WEIGHT, block_activation_bytes, head_bytes
from crystal.planning.device import Device
from crystal.planning.shards import blocks_of, held
from crystal.planning.step_time import step_seconds
from crystal.planning.traffic import Traffic, traffic
from crystal.zoo.config import ModelConfig
from crystal.zoo.flops import Recompute

INTERLEAVE = (1, 2, 4)


@dataclass(frozen=True)
class Work:
    """A training run on paper: steps of global_batch_size rows of seq_len tokens."""

    model: ModelConfig
    seq_len: int
    global_batch_size: int
    steps: int

    @property
    def tokens_per_step(self) -> int:
        return self.global_batch_size * self.seq_len


@dataclass(frozen=True)
class Candidate:
    """A layout with micro-batch and recomputation; bytes of its fullest device and seconds of a step, by part."""

    layout: Layout
    micro_batch_size: int  # rows
    micro_batches: int  # of a device in a step
    recompute: Recompute
    memory: dict[str, int]
    traffic: tuple[Traffic, ...]
    seconds: dict[str, float]

    @property
    def memory_bytes(self) -> int:
        return sum(self.memory.values())

    @property
    def step_seconds(self) -> float:
        return sum(self.seconds.values())


def divisors(n: int) -> list[int]:
    return [i for i in range(1, n + 1) if n % i == 0]


def sizes(work: Work, device: Device) -> list[int]:
    """All numbers of devices that there is a layout for, ascending."""
    m = work.model
    tps = divisors(gcd(m.n_heads, m.kv_heads, m.d_ff, m.vocab_size, device.devices_per_node))
    pps = divisors(gcd(m.n_layers, work.global_batch_size))
    return sorted({r * pp * tp for tp in tps for pp in pps for r in divisors(work.global_batch_size // pp)})


def layouts(work: Work, devices: int, device: Device) -> Iterator[Layout]:
    """Every layout whose product is `devices`: tp inside a node and dividing heads, d_ff and words, pp dividing the
    layers, dp x fsdp the global batch, pp a replica's rows of it."""
    m = work.model
    for tp in divisors(gcd(m.n_heads, m.kv_heads, m.d_ff, m.vocab_size, device.devices_per_node, devices)):
        for pp in divisors(gcd(m.n_layers, devices // tp)):
            replicas = devices // (tp * pp)
            if work.global_batch_size % (replicas * pp) == 0:
                for fsdp in divisors(replicas):
                    sequence = work.seq_len % tp == 0
                    yield Layout(dp=replicas // fsdp, fsdp=fsdp, tp=tp, pp=pp, interleave=1, sequence=sequence)


def candidates(
    work: Work,
    layout: Layout,
    device: Device,
    micro_batch_sizes: Sequence[int] | None = None,
    recompute: Sequence[Recompute] = ("none", "attention", "block"),
) -> Iterator[Candidate]:
    """A layout with every micro-batch that divides a replica's rows, every recomputation policy and, in a pipeline,
    one, two or four stages a process; it takes its micro-batches by as many as it has processes."""
    rows = work.global_batch_size // (layout.dp * layout.fsdp)
    blocks = work.model.n_layers // layout.pp
    for interleave in [i for i in INTERLEAVE if blocks % i == 0] if layout.pp > 1 else [1]:
        staged = layout.model_copy(update={"interleave": interleave})
        for micro_batch_size in micro_batch_sizes or divisors(rows):
            if rows // micro_batch_size % layout.pp == 0:
                for policy in recompute:
                    yield candidate(work, staged, device, micro_batch_size, policy)


def plan(work: Work, devices: int, device: Device) -> list[Candidate]:
    """The fastest candidate of each layout that fits a device's memory, best first; of equals to four digits the
    one that sends for a shorter time. Empty where nothing fits."""
    best = []
    for layout in layouts(work, devices, device):
        fitting = [c for c in candidates(work, layout, device) if c.memory_bytes <= device.usable_bytes]
        if fitting:
            best.append(min(fitting, key=_rank))
    return sorted(best, key=_rank)


def _rank(c: Candidate) -> tuple[float, float, int]:
    return float(f"{c.step_seconds:.4g}"), sum(t.seconds for t in c.traffic), c.memory_bytes


def smallest(work: Work, devices: int, device: Device) -> Candidate | None:
    """The candidate that needs least memory: one row at a time, blocks computed again. None: no layout."""
    every = (c for layout in layouts(work, devices, device) for c in candidates(work, layout, device, (1,), ("block",)))
    return min(every, key=lambda c: c.memory_bytes, default=None)


def candidate(work: Work, layout: Layout, device: Device, micro_batch_size: int, recompute: Recompute) -> Candidate:
    """Memory, traffic and time of one choice."""
    micro_batches = work.global_batch_size // (layout.dp * layout.fsdp * micro_batch_size)
    tokens = micro_batch_size * work.seq_len
    ends = sorted({0, layout.pp - 1})  # no process between them holds or does more than both
    memories = [memory(work.model, layout, process, tokens, micro_batches, recompute) for process in ends]
    sent = [traffic(work.model, layout, device, process, tokens, micro_batches, recompute) for process in ends]
    busiest = max(sent, key=lambda each: sum(t.seconds for t in each))
    return Candidate(
        layout,
        micro_batch_size,
        micro_batches,
        recompute,
        max(memories, key=lambda parts: sum(parts.values())),
        busiest,
        step_seconds(work.model, work.seq_len, layout, device, tokens, micro_batches, recompute, busiest),
    )


def memory(
    model: ModelConfig, layout: Layout, process: int, tokens: int, micro_batches: int, recompute: Recompute
) -> dict[str, int]:
    """Bytes by part on a device of a pipeline's process, when the backward pass begins; tokens of a micro-batch.

    FSDP gathers bf16 weights a block ahead, keeps those of the ends, and reduces a block's gradient from bf16 by way of
    fp32. In a pipeline, weights stay gathered after a backward and gradients add up whole, in fp32, to the step's end.
    """
    n = held(model, layout, process)
    copy, buffers = n.whole, (COPY + GRADIENT) * n.block
    if layout.fsdp > 1:
        if layout.pp > 1:
            buffers += GRADIENT * n.whole
        else:
            copy = n.ends + 2 * n.block
    kept = block_activation_bytes(model, tokens, recompute, layout.tp, layout.sequence)
    chunk = blocks_of(model, layout) * kept  # of one stage and micro-batch
    if layout.pp > 1:  # with its output, until that one's gradient comes
        chunk = chunk // layout.interleave + 2 * tokens * model.d_model // layout.token_shards
    activations = in_flight(layout, process, micro_batches) * chunk
    if recompute != "none":  # one block at a time is whole again in its backward pass
        activations += block_activation_bytes(model, tokens, "none", layout.tp, layout.sequence) - kept
    if process == layout.pp - 1:
        activations += head_bytes(model, tokens, layout.tp, layout.sequence)
    return {
        "weights": WEIGHT * n.part,
        "gradients": GRADIENT * n.part,
        "moments": MOMENTS * n.part,
        "compute_copy": COPY * copy,
        "gradient_buffers": buffers,
        "activations": activations,
    }


def in_flight(layout: Layout, process: int, micro_batches: int) -> int:
    """Forward passes of single stages that a process is ahead of its backward passes, at most: 1F1B, or interleaved
    1F1B as Narayanan et al. 2021 and torch.distributed.pipelining schedule it."""
    behind = layout.pp - 1 - process
    ahead = behind if layout.interleave == 1 else 2 * behind + (layout.interleave - 1) * layout.pp
    return min(ahead + 1, micro_batches * layout.interleave) if layout.pp > 1 else 1
