"""Every parallel layout of a run on a number of devices: memory, traffic and time of a step, by formulas.

They follow what the `cuda` backend does (parallel.py, pipeline.py). Memory is the fullest device's: `cost` has the
bytes, ZeRO (Rajbhandari et al. 2020) the division by fsdp, Korthikanti et al. 2022, section 4.2.3, the micro-batches
in flight in a pipeline. Time of a step, every input shown with the result:

    compute      FLOPs of the busiest process, recomputation included / (peak x matmul_fraction)
    tensor       all-reduces of tensor parallelism: nothing to hide them behind
    bubble       (pp - 1) / (interleave x micro-batches) of both (Narayanan et al. 2021)
    exposed      other traffic beyond what hides behind compute: what comes with each micro-batch behind all of it,
                 what comes once a step behind the last micro-batch's backward pass, two thirds of its compute
    optimizer    28 bytes of state read and written a parameter, through the device's memory

A ring moves (n - 1) / n of a tensor through every device for an all-gather or a reduce-scatter, twice that for an
all-reduce. Between nodes it goes at the rate of as many network cards as the group has members in a node.
Not modelled: matmuls that shrink with tensor parallelism and small micro-batches, launches, stragglers, restarts.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import gcd, prod

from crystal.backends.config import Layout
from crystal.planning.cost import COPY, GRADIENT, MOMENTS, WEIGHT, block_activation_bytes, head_bytes
from crystal.planning.device import Device
from crystal.zoo.build import meta_decoder
from crystal.zoo.config import ModelConfig
from crystal.zoo.flops import Recompute, recomputed_flops_per_token

INTERLEAVE = (1, 2, 4)
SPLIT = {  # dimension over which tensor parallelism divides a tensor (Shoeybi et al. 2019); all others are whole
    **{f"attn.{name}.{kind}": 0 for name in "qkv" for kind in ("weight", "bias")},
    **{f"mlp.{name}.{kind}": 0 for name in ("gate", "up") for kind in ("weight", "bias")},
    **{"attn.out.weight": 1, "mlp.down.weight": 1, "embed.weight": 0, "head.weight": 0},
}


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
class Traffic:
    """Bytes that a device sends in a step for one reason, and what that takes; inter: its group leaves the node."""

    kind: str  # all_gather, reduce_scatter, all_reduce, p2p
    of: str  # tp, fsdp, dp, pp; tied: the embedding that first and last stage share
    bytes: int
    inter: bool
    seconds: float


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
                    yield Layout(dp=replicas // fsdp, fsdp=fsdp, tp=tp, pp=pp, interleave=1)


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
        _seconds(work, layout, device, tokens, micro_batches, recompute, busiest),
    )


@dataclass(frozen=True)
class Elements:
    """Numbers of weights on a device: of its blocks, of one of them, and of the ends (embedding, final norm, head), as
    tensor parallelism leaves them; and what FSDP leaves of blocks and ends on its fullest device."""

    blocks: int
    block: int
    ends: int
    blocks_part: int
    ends_part: int

    @property
    def whole(self) -> int:
        return self.blocks + self.ends

    @property
    def part(self) -> int:
        return self.blocks_part + self.ends_part


@lru_cache(maxsize=4096)
def held(model: ModelConfig, layout: Layout, process: int = 0) -> Elements:
    """What one of the pp processes of a pipeline holds. With tied embeddings the first and the last hold the matrix.

    FSDP2 divides the first dimension; where that does not go evenly the first devices hold a row more, and as much is
    sent for every device.
    """
    first, last = process == 0, process == layout.pp - 1
    here = {"embed": first or (last and model.tie_embeddings), "norm": last, "head": last}
    block, ends = {}, {}
    for name, shape in _shapes(model):
        if name.startswith("blocks."):
            block[name.split(".", 2)[2]] = shape
        elif here[name.split(".")[0]]:
            ends[name] = shape
    count = blocks_of(model, layout)
    (one, one_part), (rest, rest_part) = (
        tuple(sum(elements(name, shape, layout.tp, fsdp) for name, shape in of.items()) for fsdp in (1, layout.fsdp))
        for of in (block, ends)
    )
    return Elements(count * one, one, rest, count * one_part, rest_part)


def blocks_of(model: ModelConfig, layout: Layout) -> int:
    """Blocks of a process of a pipeline; where its stages do not divide them evenly, of the fullest."""
    if layout.pp == 1:
        return model.n_layers
    return -(-model.n_layers // (layout.pp * layout.interleave)) * layout.interleave


@lru_cache(maxsize=16)
def _shapes(model: ModelConfig) -> tuple[tuple[str, tuple[int, ...]], ...]:
    """(name, shape) of a decoder with one block."""
    decoder = meta_decoder(model.model_copy(update={"n_layers": 1}))
    return tuple((name, tuple(p.shape)) for name, p in decoder.named_parameters())


def elements(name: str, shape: tuple[int, ...], tp: int, fsdp: int) -> int:
    """Of a tensor on the fullest device; name within its block."""
    local = list(shape)
    if name in SPLIT:
        local[SPLIT[name]] //= tp
    return -(-local[0] // fsdp) * prod(local[1:])


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
    kept = block_activation_bytes(model, tokens, recompute, layout.tp)
    chunk = blocks_of(model, layout) * kept  # of one stage and micro-batch
    if layout.pp > 1:  # with its output, until that one's gradient comes
        chunk = chunk // layout.interleave + 2 * tokens * model.d_model
    activations = in_flight(layout, process, micro_batches) * chunk
    if recompute != "none":  # one block at a time is whole again in its backward pass
        activations += block_activation_bytes(model, tokens, "none", layout.tp) - kept
    if process == layout.pp - 1:
        activations += head_bytes(model, tokens, layout.tp)
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


def traffic(
    model: ModelConfig, layout: Layout, device: Device, process: int, tokens: int, micro_batches: int,
    recompute: Recompute,
) -> tuple[Traffic, ...]:  # fmt: skip
    """What a device of a pipeline's process sends in a step."""
    n = held(model, layout, process)
    first, last = process == 0, process == layout.pp - 1
    activation = 2 * tokens * model.d_model
    stride = {"tp": 1, "fsdp": layout.tp, "dp": layout.tp * layout.fsdp, "pp": layout.tp * layout.fsdp * layout.dp}
    found = []

    def send(kind: str, of: str, sent: float, over: str, size: int) -> None:
        if size > 1 and sent:
            inter, rate = link(device, stride[over], size)
            found.append(Traffic(kind, of, int(sent), inter, sent / rate))

    def ring(kind: str, of: str, whole: int) -> None:
        size = getattr(layout, of)
        send(kind, of, (2 if kind == "all_reduce" else 1) * whole * (size - 1) / size, of, size)

    # Forward, the outputs of attention and MLP; backward, the inputs of q, k, v, gate and up, each by itself.
    # A block that is recomputed reduces its attention's output again. Beside the blocks, embedding and head once each.
    blocks = blocks_of(model, layout)
    ring("all_reduce", "tp", micro_batches * activation * (blocks * (7 + (recompute == "block")) + first + last))
    if layout.pp == 1:  # blocks once forward and once backward, the ends stay for both
        gathers, scatters = 2 * micro_batches * n.blocks_part + micro_batches * n.ends_part, micro_batches * n.part
    else:  # given back after each forward, kept after a backward; the ends are kept throughout
        gathers, scatters = (micro_batches + 1) * n.blocks_part + n.ends_part, n.part
    ring("all_gather", "fsdp", COPY * layout.fsdp * gathers)
    ring("reduce_scatter", "fsdp", GRADIENT * layout.fsdp * scatters)
    ring("all_reduce", "dp", GRADIENT * n.part)
    # on to the next stage and back to the one before, but for the ends of the whole
    send("p2p", "pp", (2 * layout.interleave - first - last) * micro_batches * activation, "pp", layout.pp)
    if model.tie_embeddings and (first or last):
        embedding = elements("embed.weight", (model.vocab_size, model.d_model), layout.tp, layout.fsdp)
        send("all_reduce", "tied", GRADIENT * embedding, "pp", layout.pp)
    return tuple(found)


def link(device: Device, stride: int, size: int) -> tuple[bool, float]:
    """Whether a group of `size` ranks, `stride` apart, leaves its node; bytes/s that a ring passes by each device."""
    if device.devices_per_node % (stride * size) == 0:
        return False, 1e9 * device.intra_node_gb_per_s
    members = max(1, device.devices_per_node // stride)
    return True, 1e9 * min(device.intra_node_gb_per_s, members * device.inter_node_gb_per_s)


def process_flops_per_token(work: Work, layout: Layout, process: int) -> int:
    """FLOPs a token of one process of a pipeline, all tp devices together, counted as `cost.flops_per_token` does."""
    model, n = work.model, held(work.model, layout.model_copy(update={"tp": 1}), process)
    multiplied = n.whole
    if process == 0 and not (layout.pp == 1 and model.tie_embeddings):
        multiplied -= model.vocab_size * model.d_model  # only looked up
    return 6 * multiplied + 6 * blocks_of(model, layout) * model.d_model * work.seq_len


def _seconds(
    work: Work, layout: Layout, device: Device, tokens: int, micro_batches: int, recompute: Recompute,
    sent: tuple[Traffic, ...],
) -> dict[str, float]:  # fmt: skip
    again = recomputed_flops_per_token(work.model, work.seq_len, recompute) * blocks_of(work.model, layout)
    ends = {0, layout.pp - 1}
    busiest = max(process_flops_per_token(work, layout, process) for process in ends) + again
    compute = micro_batches * tokens * busiest / (layout.tp * device.peak_tflops * 1e12 * device.matmul_fraction)
    tensor = sum(t.seconds for t in sent if t.of == "tp")
    once = sum(t.seconds for t in sent if t.of in ("dp", "tied") or (t.kind == "reduce_scatter" and layout.pp > 1))
    often = sum(t.seconds for t in sent) - tensor - once
    part = max(held(work.model, layout, process).part for process in ends)
    return {
        "compute": compute,
        "tensor": tensor,
        "bubble": (compute + tensor) * (layout.pp - 1) / (layout.interleave * micro_batches),
        "exposed": max(0.0, often - compute) + max(0.0, once - 2 / 3 * compute / micro_batches),
        "optimizer": 28 * part / (device.hbm_gb_per_s * 1e9),
    }
