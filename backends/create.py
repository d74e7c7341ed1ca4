"""The backend that a run names; each one's packages are imported only when it is asked for."""

from __future__ import annotations

from pathlib import Path

from crystal.backends.base import Backend, started_processes
from crystal.backends.config import BackendConfig, OptimizerConfig
from crystal.curriculum.stages import Curriculum
from crystal.errors import ConfigError
from crystal.mup.plan import Plan
from crystal.zoo.config import ModelConfig


def create(
    model: ModelConfig,
    plan: Plan,
    optimizer: OptimizerConfig,
    curriculum: Curriculum,
    seed: int,
    n_sources: int,
    config: BackendConfig,
    directory: Path,
    micro_batch_size: int = 1,
) -> Backend:
    """Build a backend. curriculum: for its learning rates; directory: the run's, for what a backend keeps on disk;
    micro_batch_size: rows.
    Raises ConfigError, before training starts, for what the backend cannot do."""
    _check_processes(config.name, curriculum.global_batch_size)
    schedule = curriculum.base_lr
    if config.name == "cpu":
        from crystal.backends.cpu import CpuBackend

        return CpuBackend(model, plan, optimizer, schedule, seed, n_sources, config)
    if config.name == "cuda":
        from crystal.backends.cuda.backend import CudaBackend

        return CudaBackend(model, plan, optimizer, schedule, seed, n_sources, config)
    if config.name == "cerebras":
        from crystal.backends.cerebras.bridge import CerebrasBackend

        return CerebrasBackend(model, plan, optimizer, curriculum, seed, n_sources, config, directory)
    from crystal.backends.weight_streaming.backend import WeightStreamingBackend

    micro_batches = -(-curriculum.global_batch_size // micro_batch_size)
    return WeightStreamingBackend(model, plan, optimizer, schedule, seed, n_sources, config, directory, micro_batches)


def _check_processes(name: str, global_batch_size: int) -> None:
    """What each backend can do with the processes that torchrun started; `cuda` has its layout checked instead."""
    started = started_processes()
    if name in ("cpu", "cerebras") and started > 1:
        raise ConfigError(
            f"backend.name: {name} trains in one process, torchrun started {started}; expected cuda (with device: cpu "
            f"where there is no GPU) or weight_streaming"
        )
    if name == "weight_streaming" and global_batch_size % started:
        raise ConfigError(
            f"curriculum.global_batch_size: expected a multiple of the {started} processes that torchrun started, "
            f"got {global_batch_size}"
        )
