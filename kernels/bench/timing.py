"""How a call is timed on a GPU: events around it, with nothing of an earlier call left in L2.

The protocol is triton.testing.do_bench's: before every call a buffer larger than L2 is zeroed, so that inputs come
from memory, and because the GPU is busy with that meanwhile, most of a call's launch overhead is hidden. What the
host needs to enqueue a call is measured apart, and so is the call replayed from a CUDA graph, where launches cost
the GPU next to nothing. A call that waits for the host cannot be captured and has no graph time.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch

Call = Callable[[], object]


class Timer(Protocol):
    """What `measured` needs of a device; all times in seconds."""

    def samples(self, call: Call) -> list[float]:
        """One time for each of many calls."""

    def graph_samples(self, call: Call) -> list[float] | None:
        """The same from a CUDA graph; None where the call cannot be captured."""

    def host_seconds(self, call: Call) -> float:
        """What the host needs to enqueue a call."""

    def peak_bytes(self, call: Call) -> int:
        """Memory allocated at the peak of a call, beyond what was before it."""


@dataclass(frozen=True)
class Spread:
    """Median and the 20th and 80th percentile of some samples, in seconds."""

    median: float
    p20: float
    p80: float
    count: int


def spread(samples: list[float]) -> Spread:
    """Percentiles by linear interpolation; one sample is its own spread."""
    if len(samples) == 1:
        return Spread(samples[0], samples[0], samples[0], 1)
    fifths = statistics.quantiles(samples, n=5, method="inclusive")
    return Spread(statistics.median(samples), fifths[0], fifths[-1], len(samples))


class CudaTimer:
    """Timer on the current CUDA device. What is timed is made and called with `stream` as the current stream, where
    graphs are captured too: autograd runs a backward on the stream of its forward."""

    def __init__(self, least_seconds: float = 0.1, most_calls: int = 1000) -> None:
        l2 = torch.cuda.get_device_properties(torch.cuda.current_device()).L2_cache_size
        self.flushed = torch.empty(max(4 * l2, 1 << 28), dtype=torch.int8, device="cuda")
        self.least_seconds, self.most_calls = least_seconds, most_calls
        self.stream = torch.cuda.Stream()

    def samples(self, call: Call) -> list[float]:
        for _ in range(3):
            call()
        first = statistics.median(self._timed(call, 5))
        return self._timed(call, min(self.most_calls, max(10, int(self.least_seconds / max(first, 1e-6)))))

    def _timed(self, call: Call, count: int) -> list[float]:
        events = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(count)]
        for start, end in events:
            self.flushed.zero_()
            start.record()
            call()
            end.record()
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in events]

    def graph_samples(self, call: Call) -> list[float] | None:
        if self._waits_for_host(call):
            return None
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph, stream=self.stream):
                call()
        except RuntimeError:  # an operation that no graph can hold
            torch.cuda.synchronize()
            return None
        found = self.samples(graph.replay)
        graph.reset()
        return found

    def _waits_for_host(self, call: Call) -> bool:
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("error")
        try:
            call()
        except RuntimeError:
            return True
        finally:
            torch.cuda.set_sync_debug_mode(before)
            torch.cuda.synchronize()
        return False

    def host_seconds(self, call: Call) -> float:
        """Median over 20 calls, each into an empty queue."""
        found = []
        for _ in range(20):
            torch.cuda.synchronize()
            start = time.perf_counter()
            call()
            found.append(time.perf_counter() - start)
        torch.cuda.synchronize()
        return statistics.median(found)

    def peak_bytes(self, call: Call) -> int:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        call()
        torch.cuda.synchronize()
        return torch.cuda.max_memory_allocated() - before
