"""What a device sends in a step, collective by collective, and how long each takes by itself.

A call takes a latency and its bytes their rate (alpha and beta: Thakur et al. 2005), as NCCL itself
reckons with rings (src/graph/tuning.cc):

    latency    start + (n - 1) steps of a ring of n devices, twice that for an all-reduce; with N nodes N - 1 of the
               n - 1 steps go between them. From device to device one step.
    bytes      (n - 1) / n of a tensor pass through every device for an all-gather or a reduce-scatter, twice that for
               an all-reduce. Between nodes they go at the rate of as many network cards as the group has members in a
               node: groups that lie side by side (fsdp under tp, dp under fsdp) share a node's cards.

Not modelled: trees, which NCCL may choose for an all-reduce and which have fewer steps.
"""

from __future__ import annotations

from dataclasses import dataclass

from crystal.backends.config import Layout
from crystal.planning.cost import COPY, GRADIENT
from crystal.planning.device import Device
from crystal.planning.shards import blocks_of, elements, held
from crystal.zoo.config import ModelConfig
from crystal.zoo.flops import Recompute


@dataclass(frozen=True)
class Traffic:
    """Calls and bytes of a device in a step for one reason; inter: its group leaves the node.

    seconds: of all calls, one after another with nothing beside them; of these, latency_seconds do not come of bytes.
    """

    kind: str  # all_gather, reduce_scatter, all_reduce, p2p
    of: str  # tp, fsdp, dp, pp; tied: the embedding that first and last stage share
    calls: int
    bytes: int
    inter: bool
    latency_seconds: float
    seconds: float


def traffic(
    model: ModelConfig, layout: Layout, device: Device, process: int, tokens: int, micro_batches: int,
    recompute: Recompute,
) -> tuple[Traffic, ...]:  # fmt: skip
    """What a device of a pipeline's process sends in a step; tokens of a micro-batch."""
    n = held(model, layout, process)
    first, last = process == 0, process == layout.pp - 1
    activation = 2 * tokens * model.d_model
    stride = {"tp": 1, "fsdp": layout.tp, "dp": layout.tp * layout.fsdp, "pp": layout.tp * layout.fsdp * layout.dp}
    found = []

    def send(kind: str, of: str, calls: int, sent: float, over: str, size: int) -> None:
        if size > 1 and sent:
            inter, rate = link(device, stride[over], size)
            waited = calls * latency(device, kind, stride[over], size)
            found.append(Traffic(kind, of, calls, int(sent), inter, waited, waited + sent / rate))

    def ring(kind: str, of: str, calls: int, whole: int) -> None:
        size = getattr(layout, of)
        send(kind, of, calls, (2 if kind == "all_reduce" else 1) * whole * (size - 1) / size, of, size)

    # Forward, the outputs of attention and MLP; backward, the gradients of their inputs. A block that is recomputed
    # sums its attention's output again. Beside the blocks, embedding and head once each. With sequence parallelism a
    # sum is half of an all-reduce; the other half gathers what enters (in forward, in backward for the gradients of
    # weights, and where it is recomputed) and the gradient of what leaves.
    blocks, again = blocks_of(model, layout), recompute == "block"
    sums = micro_batches * (blocks * (4 + again) + first + last)
    if layout.sequence:
        entering = 6 + (recompute == "attention") + 2 * again
        gathers = micro_batches * (blocks * entering + first + last)
        ring("reduce_scatter", "tp", sums, sums * activation)
        ring("all_gather", "tp", gathers, gathers * activation)
        ring("all_reduce", "tp", 1, GRADIENT * n.by_tokens)
    else:
        ring("all_reduce", "tp", sums, sums * activation)
    # FSDP's groups are blocks and, together, the ends.
    ends = 1 if n.ends else 0
    if layout.pp == 1:  # blocks once forward and once backward, the ends stay for both
        of_block, of_ends, reduced = 2 * micro_batches, micro_batches, micro_batches
    else:  # given back after each forward, kept after a backward; the ends are kept throughout
        of_block, of_ends, reduced = micro_batches + 1, 1, 1
    gathered = of_block * n.blocks_part + of_ends * n.ends_part
    ring("all_gather", "fsdp", of_block * blocks + of_ends * ends, COPY * layout.fsdp * gathered)
    ring("reduce_scatter", "fsdp", reduced * (blocks + ends), GRADIENT * layout.fsdp * reduced * n.part)
    ring("all_reduce", "dp", blocks + ends, GRADIENT * n.part)
    # on to the next stage and back to the one before, but for the ends of the whole
    handed = (2 * layout.interleave - first - last) * micro_batches
    send("p2p", "pp", handed, handed * (activation // layout.token_shards), "pp", layout.pp)
    if model.tie_embeddings and (first or last):
        embedding = elements("embed.weight", (model.vocab_size, model.d_model), layout.tp, layout.fsdp)
        send("all_reduce", "tied", 1, GRADIENT * embedding, "pp", layout.pp)
    return tuple(found)


def link(device: Device, stride: int, size: int) -> tuple[bool, float]:
    """Whether a group of `size` ranks, `stride` apart, leaves its node; bytes/s that a ring passes by each device."""
    if device.devices_per_node % (stride * size) == 0:
        return False, 1e9 * device.intra_node_gb_per_s
    return True, 1e9 * min(device.intra_node_gb_per_s, _members(device, stride) * device.inter_node_gb_per_s)


def latency(device: Device, kind: str, stride: int, size: int) -> float:
    """Seconds that a collective of a group of `size` ranks, `stride` apart, takes for next to no bytes."""
    inter, _ = link(device, stride, size)
    if kind == "p2p":
        steps, between = 1, int(inter)
    else:
        passes = 2 if kind == "all_reduce" else 1
        nodes = -(-size // _members(device, stride)) if inter else 1
        steps, between = passes * (size - 1), passes * (nodes - 1)
    within = (steps - between) * device.intra_node_latency_us
    return 1e-6 * (device.collective_latency_us + within + between * device.inter_node_latency_us)


def _members(device: Device, stride: int) -> int:
    """Ranks of a group in one node."""
    return max(1, device.devices_per_node // stride)
