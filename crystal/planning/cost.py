"""What a decoder costs on paper: bytes of weights and optimizer state by backend, bytes of activations.

State, in bytes a parameter: fp32 weights 4, fp32 gradients 4, AdamW's two fp32 moments 8, and with bf16 compute a
rounded copy of the weights 2. (On `cpu` in bf16 the gradients of a single micro-batch take 2, of several 4.) What the
weight-streaming store and its buffers take, its own layout says.

Activations, by the method of Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer Models",
section 4: what autograd keeps of a block from forward to backward, an element of the compute dtype each, a token:

    inputs of both norms 2 d, inputs of q/k/v and of gate/up 2 d, q, k, v and the attention's output 4 d,
    gate, up and their product 3 f                                          (their 34 d bytes: 32 d at f = 8 d / 3)

and 4 bytes a head for the softmax. Scores are never kept: flash attention computes them again by itself, which is
their selective recomputation. k and v count d each with grouped heads too, for they are repeated before attention.
"""

from __future__ import annotations

import torch

from crystal.backends.config import BackendConfig, WeightStreamingConfig
from crystal.planning.shards import held_together
from crystal.zoo.build import parameter_count, plan_for
from crystal.zoo.config import ModelConfig
from crystal.zoo.flops import Recompute

WEIGHT, GRADIENT, MOMENTS, COPY = 4, 4, 8, 2  # bytes a parameter
HEAD_CHUNK = 4096  # tokens whose logits the loss head holds at a time on CUDA


def state_bytes(config: ModelConfig, dtype: str) -> dict[str, int]:
    """Bytes of weights, gradients, moments and compute copy of one whole model. dtype: of compute, fp32 or 16 bits."""
    n = parameter_count(config)
    return {
        "weights": WEIGHT * n,
        "gradients": GRADIENT * n,
        "moments": MOMENTS * n,
        "compute_copy": 0 if dtype == "fp32" else COPY * n,
    }


def memory_bytes(config: ModelConfig) -> dict[str, int]:
    """What a process holds by backend, activations apart; of weight streaming its buffers, and what its store takes."""
    whole = {dtype: sum(state_bytes(config, dtype).values()) for dtype in ("fp32", "bf16")}
    found = {f"{backend} {dtype}": n for backend in ("cpu", "cuda", "cerebras") for dtype, n in whole.items()}
    for moments in ("fp32", "bf16", "int8"):
        streaming = WeightStreamingConfig(name="weight_streaming", moments=moments)
        for part, n in streaming_bytes(config, streaming).items():
            found[f"weight_streaming, {moments} moments, {part}"] = n
    return found


def streaming_bytes(config: ModelConfig, backend: WeightStreamingConfig, micro_batches: int = 1) -> dict[str, int]:
    """`buffers`, which are always in memory, and `store`, which is on disk or in memory as the backend says.

    The store has fp32 weights in two 16-bit planes, moments and gradients; micro_batches: of a step, for the sums of
    several are kept in fp32.
    """
    from crystal.backends.weight_streaming.store import Store
    from crystal.backends.weight_streaming.stream import Stream

    dtype = torch.float32 if backend.dtype == "fp32" else torch.bfloat16
    gradients = dtype if micro_batches == 1 else torch.float32
    store = Store(plan_for(config), None, backend.moments, gradients, spilled=backend.gradients == "spilled")
    ring = None if backend.buffers_gb is None else int(backend.buffers_gb * 1e9)
    return {
        "buffers": Stream(store, None, dtype, ring).bytes,
        "store": store.layout.store_bytes + store.layout.gradient_bytes,
    }


def run_bytes(config: ModelConfig, backend: BackendConfig, micro_batches: int = 1) -> dict[str, int]:
    """`memory` and `disk` of a run, of all its processes together; activations and checkpoints apart."""
    if backend.name == "weight_streaming":
        n = streaming_bytes(config, backend, micro_batches)
        on_disk = n["store"] if backend.store == "disk" else 0
        return {"memory": n["buffers"] + n["store"] - on_disk, "disk": on_disk}
    dtype = backend.compute_dtype if backend.name == "cerebras" else backend.dtype
    memory = sum(state_bytes(config, dtype).values())
    if backend.name == "cuda":
        memory = memory // parameter_count(config) * held_together(config, backend.parallel)
    return {"memory": memory, "disk": 0}


def block_activation_bytes(
    config: ModelConfig, tokens: int, recompute: Recompute = "none", tp: int = 1, sequence: bool = False
) -> int:
    """Bytes that one block keeps for its backward pass, bf16, on each of tp devices.

    recompute: attention keeps the input of q/k/v but not q, k, v and what follows to the output projection; block
    keeps the block's input alone. Under tensor parallelism norms and their inputs are whole on every device, unless
    sequence parallelism divides them too (Korthikanti et al., equations 2 and 4).
    """
    d, f, token_shards = config.d_model, config.d_ff, tp if sequence else 1
    if recompute == "block":
        return -(-2 * tokens * d // token_shards)
    attention = 0 if recompute == "attention" else 2 * 4 * d + 4 * config.n_heads
    return tokens * (-(-2 * 4 * d // token_shards) + -(-(attention + 2 * 3 * f) // tp))


def head_bytes(config: ModelConfig, tokens: int, tp: int = 1, sequence: bool = False) -> int:
    """Bytes that final norm and loss head hold at the end of the forward pass, bf16, on each of tp devices.

    The norm's input and its output's gradient; the head's gradient, which kernels/linear_cross_entropy.py makes in the
    forward pass, in fp32; and beside it, rounded, its last summand (in backward, itself), with one chunk of logits.
    """
    words = -(-config.vocab_size // tp)
    chunk = min(tokens, HEAD_CHUNK) * words * (2 if tp == 1 else 4 + 2)  # split over devices it is scored in fp32
    return -(-2 * 2 * tokens * config.d_model // (tp if sequence else 1)) + (4 + 2) * words * config.d_model + chunk
