"""The backend that a run names; each one's packages are imported only when it is asked for."""

from __future__ import annotations

from pathlib import Path

from crystal.backends.base import Backend, Setup, started_processes
from crystal.backends.config import BackendConfig
from crystal.errors import ConfigError


def create(
    setup: Setup, config: BackendConfig, directory: Path, global_batch_size: int, micro_batch_size: int = 1
) -> Backend:
    """Build a backend. directory: the run's, for what a backend keeps on disk; batch sizes: in rows.

    Raises ConfigError, before training starts, for what the backend cannot do.
    """
    _check_processes(config.name, global_batch_size)
    if config.name == "cpu":
        from crystal.backends.cpu import CpuBackend

        return CpuBackend(setup, config)
    if config.name == "cuda":
        from crystal.backends.cuda.backend import CudaBackend

        return CudaBackend(setup, config)
    if config.name == "cerebras":
        from crystal.backends.cerebras.bridge import CerebrasBackend

        return CerebrasBackend(setup, config, directory)
    from crystal.backends.weight_streaming.backend import WeightStreamingBackend

    return WeightStreamingBackend(setup, config, directory, -(-global_batch_size // micro_batch_size))


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
