"""Seconds of a step, by part, from a device's rates and from what it sends:

    compute      FLOPs of the busiest process, recomputation included / (peak x matmul_fraction)
    contention   what compute loses while collectives run beside it: they have `contention` of the device
    tensor       collectives of tensor parallelism: nothing is taken to hide them
    bubble       (pp - 1) / (interleave x micro-batches) of the three (Narayanan et al. 2021)
    exposed      other traffic that does not fit beside compute
    optimizer    28 bytes of state read and written a parameter, through the device's memory

Traffic that comes with each micro-batch (gathers and reduce-scatters of FSDP, what a pipeline hands on) runs beside all
compute; what comes once a step (gradients of replicas and of tied embeddings, a pipeline's reduce-scatters) beside the
last micro-batch's backward pass, two thirds of its compute, together with that micro-batch's own. All of it goes one
after another, for collectives that share links take as much longer; none of it while tensor parallelism has them.
Not modelled: matmuls that shrink with tensor parallelism and small micro-batches, launches, stragglers, restarts.
"""

from __future__ import annotations

from collections.abc import Sequence

from crystal.backends.config import Layout
from crystal.planning.device import Device
from crystal.planning.shards import blocks_of, held
from crystal.planning.traffic import Traffic
from crystal.zoo.config import ModelConfig
from crystal.zoo.flops import Recompute, recomputed_flops_per_token

BACKWARD = 2 / 3  # of a micro-batch's compute


def process_flops_per_token(model: ModelConfig, seq_len: int, layout: Layout, process: int) -> int:
    """FLOPs a token of one process of a pipeline, all tp devices together, counted as `zoo.flops` does."""
    n = held(model, layout.model_copy(update={"tp": 1}), process)
    multiplied = n.whole
    if process == 0 and not (layout.pp == 1 and model.tie_embeddings):
        multiplied -= model.vocab_size * model.d_model  # only looked up
    return 6 * multiplied + 6 * blocks_of(model, layout) * model.d_model * seq_len


def step_seconds(
    model: ModelConfig, seq_len: int, layout: Layout, device: Device, tokens: int, micro_batches: int,
    recompute: Recompute, sent: Sequence[Traffic],
) -> dict[str, float]:  # fmt: skip
    """Seconds of a step by part; tokens of a micro-batch, sent: what the busiest process sends."""
    again = recomputed_flops_per_token(model, seq_len, recompute) * blocks_of(model, layout)
    ends = {0, layout.pp - 1}
    busiest = max(process_flops_per_token(model, seq_len, layout, process) for process in ends) + again
    compute = micro_batches * tokens * busiest / (layout.tp * device.peak_tflops * 1e12 * device.matmul_fraction)
    tensor = sum(t.seconds for t in sent if t.of == "tp")
    groups = ("dp", "tied") if layout.pp == 1 else ("dp", "tied", "fsdp")
    once = sum(t.seconds for t in sent if t.of in groups and t.kind != "all_gather")
    often = sum(t.seconds for t in sent) - tensor - once
    end = BACKWARD / micro_batches
    before, at_end = (
        overlapped(share * compute, share * often + more, device.contention)
        for share, more in ((1 - end, 0.0), (end, once))
    )
    contention = before[0] + at_end[0]
    part = max(held(model, layout, process).part for process in ends)
    return {
        "compute": compute,
        "contention": contention,
        "tensor": tensor,
        "bubble": (compute + contention + tensor) * (layout.pp - 1) / (layout.interleave * micro_batches),
        "exposed": before[1] + at_end[1],
        "optimizer": 28 * part / (device.hbm_gb_per_s * 1e9),
    }


def overlapped(compute: float, sent: float, contention: float) -> tuple[float, float]:
    """Seconds that compute and traffic beside it take longer than compute alone: (by contention, as exposed traffic).

    While something is sent, compute goes at 1 - contention of its pace; the rest of it, or of the traffic, goes alone.
    """
    slowed = compute / (1 - contention)
    return contention * min(sent, slowed), max(0.0, sent - slowed)
