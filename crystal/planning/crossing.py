"""Where tensor and pipeline parallelism overtake shards and replicas alone, as the network between nodes slows down."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise

from crystal.errors import ConfigError
from crystal.planning.device import Device
from crystal.planning.layouts import Candidate, Work, plan

SLOWER = (1, 2, 4, 8, 16)  # than the device's own rate
WITHIN = 1.02  # the factor to which the bandwidth of equal speed is found


@dataclass(frozen=True)
class Point:
    """The fastest layouts of both kinds at one bandwidth between nodes: by dp and fsdp alone (FSDP, HSDP), and split by
    tp or pp as well (3D)."""

    inter_node_gb_per_s: float
    sharded: Candidate
    split: Candidate

    @property
    def gain(self) -> float:
        """Tokens/s of split to those of sharded, less 1."""
        return self.sharded.step_seconds / self.split.step_seconds - 1


def crossing(work: Work, devices: int, device: Device) -> tuple[list[Point], float | None]:
    """Both kinds at the device's bandwidth between nodes and at 1/2 to 1/16 of it; the bandwidth in GB/s at which they
    are equally fast, the highest in that range. None: one kind is ahead throughout.

    Raises ConfigError where a kind has no layout that fits.
    """
    points = [_at(work, devices, device, device.inter_node_gb_per_s / slower) for slower in SLOWER]
    for above, below in pairwise(points):
        if (above.gain > 0) != (below.gain > 0):
            return points, _equal(work, devices, device, above, below)
    return points, None


def _at(work: Work, devices: int, device: Device, gb_per_s: float) -> Point:
    found = plan(work, devices, device.model_copy(update={"inter_node_gb_per_s": gb_per_s}))
    best = {}
    for c in found:
        best.setdefault(c.layout.tp * c.layout.pp > 1, c)
    if len(best) < 2:
        raise ConfigError(
            f"--crossing: expected fitting layouts of {devices} devices with tp or pp and without, "
            f"{'all have' if True in best else 'none has'} them"
        )
    return Point(gb_per_s, best[False], best[True])


def _equal(work: Work, devices: int, device: Device, above: Point, below: Point) -> float:
    while above.inter_node_gb_per_s > WITHIN * below.inter_node_gb_per_s:
        middle = _at(work, devices, device, math.sqrt(above.inter_node_gb_per_s * below.inter_node_gb_per_s))
        if (middle.gain > 0) == (above.gain > 0):
            above = middle
        else:
            below = middle
    return math.sqrt(above.inter_node_gb_per_s * below.inter_node_gb_per_s)
