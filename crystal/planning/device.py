"""A device and the machine it sits in, from configs/devices/ or a file of one's own: the inputs of `crystal plan`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

from pydantic import Field

from crystal.backends.config import Count, Gigabytes
from crystal.config import CONFIGS, Strict, find, load_yaml, nearest, override, parse, within
from crystal.errors import ConfigError

Rate = Annotated[float, Field(gt=0), within(1e-6, 1e9)]
Share = Annotated[float, Field(gt=0, le=1), within(1e-6, 1)]
Microseconds = Annotated[float, Field(ge=0), within(0, 1e9)]


class Device(Strict):
    """Units are decimal: GB 1e9 bytes, TFLOP 1e12. Bandwidths of links are one way, a device."""

    name: str
    memory_gb: Gigabytes
    usable_fraction: Share = Field(0.9, description="rest: CUDA context, NCCL buffers, fragmentation")
    peak_tflops: Rate = Field(description="bf16, dense")
    matmul_fraction: Share = Field(description="of peak, while compute has the device alone")
    hbm_gb_per_s: Rate
    devices_per_node: Count
    intra_node_gb_per_s: Rate
    inter_node_gb_per_s: Rate
    # a file that does not say them has none
    collective_latency_us: Microseconds = Field(0.0, description="to start a collective")
    intra_node_latency_us: Microseconds = Field(0.0, description="a step of a ring in a node")
    inter_node_latency_us: Microseconds = Field(0.0, description="a step of a ring from node to node")
    contention: Annotated[float, Field(ge=0, lt=1), within(0, 0.999)] = Field(
        0.0, description="of compute's pace, lost while collectives run beside it"
    )

    @property
    def usable_bytes(self) -> int:
        return int(self.memory_gb * self.usable_fraction * 1e9)


def load_device(name: str, changes: Sequence[str] = ()) -> Device:
    """A device by name or file; changes: `key=value`. Raises ConfigError, with the nearest name for an unknown one."""
    try:
        file = find(name, "devices")
    except ConfigError:
        known = sorted(path.stem for path in (CONFIGS / "devices").glob("*.yaml"))
        raise ConfigError(
            f"--device {name}: expected a YAML file or one of {', '.join(known)}{nearest(name, known)}"
        ) from None
    source = override(load_yaml(file), changes)
    return parse(Device, source.mapping, source)
