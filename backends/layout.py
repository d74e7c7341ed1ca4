"""What a parallel layout asks of a model and of a batch, checked when the run file is read."""

from __future__ import annotations

from collections.abc import Callable

from crystal.backends.config import CudaConfig
from crystal.config import ConfigError
from crystal.zoo.config import ModelConfig


def check_layout(
    model: ModelConfig,
    backend: CudaConfig,
    global_batch_size: int,
    micro_batch_size: int,
    where: Callable[..., str],
) -> None:
    """Raise ConfigError, naming the key, for a layout that this model or batch cannot have.

    where: `RunFile.where`, the file and name of a key.
    """
    layout = backend.parallel
    for key, size in (
        ("n_heads", model.n_heads),
        ("n_kv_heads", model.kv_heads),
        ("d_ff", model.d_ff),
        ("vocab_size", model.vocab_size),
    ):
        if size % layout.tp:
            raise ConfigError(
                f"{where('backend', 'parallel', 'tp')}: expected a divisor of model.{key} {size}, got {layout.tp}"
            )
    stages = layout.pp * layout.interleave
    if layout.pp > 1 and model.n_layers < stages:
        raise ConfigError(
            f"{where('backend', 'parallel', 'pp')}: {layout.pp} processes with interleave {layout.interleave} make "
            f"{stages} stages, expected at most model.n_layers {model.n_layers}"
        )
    parts = layout.dp * layout.fsdp
    if global_batch_size % (parts * micro_batch_size):
        raise ConfigError(
            f"{where('train', 'micro_batch_size')}: expected a divisor of a process's share of a step, "
            f"curriculum.global_batch_size {global_batch_size} / (dp {layout.dp} x fsdp {layout.fsdp}), "
            f"got {micro_batch_size}"
        )
    micro_batches = global_batch_size // (parts * micro_batch_size)
    if micro_batches % layout.pp:
        raise ConfigError(
            f"{where('backend', 'parallel', 'pp')}: expected a divisor of the {micro_batches} micro-batches that a "
            f"process has in a step, got {layout.pp}; a smaller train.micro_batch_size makes more"
        )
