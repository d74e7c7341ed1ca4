"""What a parallel layout asks of a model and of a batch, checked when the run file is read."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from crystal.backends.config import CudaConfig
from crystal.errors import ConfigError
from crystal.zoo.config import ModelConfig


def check_layout(
    model: ModelConfig,
    backend: CudaConfig,
    seq_len: int,
    global_batch_size: int,
    micro_batch_size: int,
    error: Callable[[Sequence[str], str], ConfigError],
) -> None:
    """Raise ConfigError, naming the key, for a layout that this model or batch cannot have.

    error: `RunFile.error`, which names the file that set a key.
    """
    layout = backend.parallel
    for key, size in (
        ("n_heads", model.n_heads),
        ("n_kv_heads", model.kv_heads),
        ("d_ff", model.d_ff),
        ("vocab_size", model.vocab_size),
    ):
        if size % layout.tp:
            message = f"expected a divisor of model.{key} {size}, got {layout.tp}"
            raise error(("backend", "parallel", "tp"), message)
    if layout.tp > 1 and layout.sequence and seq_len % layout.tp:
        message = f"expected false where tp {layout.tp} does not divide curriculum.seq_len {seq_len}, got true"
        raise error(("backend", "parallel", "sequence"), message)
    stages = layout.pp * layout.interleave
    if layout.pp > 1 and model.n_layers < stages:
        message = (
            f"{layout.pp} processes with interleave {layout.interleave} make {stages} stages, "
            f"expected at most model.n_layers {model.n_layers}"
        )
        raise error(("backend", "parallel", "pp"), message)
    parts = layout.dp * layout.fsdp
    if global_batch_size % parts:
        message = (
            f"expected dp x fsdp to divide curriculum.global_batch_size {global_batch_size}, "
            f"got {layout.dp} x {layout.fsdp} = {parts}"
        )
        raise error(("backend", "parallel"), message)
    if global_batch_size % (parts * micro_batch_size):
        message = (
            f"expected a divisor of a process's share of a step, curriculum.global_batch_size {global_batch_size} / "
            f"(dp {layout.dp} x fsdp {layout.fsdp}), got {micro_batch_size}"
        )
        raise error(("train", "micro_batch_size"), message)
    micro_batches = global_batch_size // (parts * micro_batch_size)
    if micro_batches % layout.pp:
        message = (
            f"expected a divisor of the {micro_batches} micro-batches that a process has in a step, got {layout.pp}; "
            "a smaller train.micro_batch_size makes more"
        )
        raise error(("backend", "parallel", "pp"), message)
