"""How long OpenMP's threads look for work before they sleep, measured.

A thread that sleeps at once has to be woken for every operator, which costs an idle machine half of its speed where
operators are short; one that never sleeps takes the processor from whatever else runs. Looking for as long as a sleep
and a wake would take costs at most twice what the best choice in hindsight would have (Karlin et al. 1991, "Empirical
studies of competitive spinning"). One look is 10 times as long on some processors as on others, so it is measured.

GNU's OpenMP reads GOMP_SPINCOUNT when torch is first imported: `crystal.cli` sets it from the file that this writes.
"""

from __future__ import annotations

import ctypes
import json
import os
from dataclasses import asdict, dataclass
from pathlib import Path

from crystal.kernels.gcc import build, cache, put

LOOKS, ROUNDS, TRIES = 20_000, 200, 5
LEAST, MOST = 100, 100_000  # looks


@dataclass(frozen=True)
class Waiting:
    """look_ns, wake_ns: nanoseconds of one look, and of a wake; spin_count: looks before a thread sleeps."""

    look_ns: float
    wake_ns: float
    spin_count: int


def file() -> Path:
    """Where the count is kept for the command's next start on this machine; `crystal.cli` reads it."""
    return cache("tuning") / f"waiting-{os.uname().nodename}.json"


def measure() -> Waiting:
    """Measure, in some milliseconds. Raises RuntimeError where there is no gcc."""
    library = build(Path(__file__).with_name("thread_waiting.c").read_text(encoding="utf-8"), "native", "-pthread")
    library.look_ns.restype = library.wake_ns.restype = ctypes.c_double
    look = min(library.look_ns(LOOKS) for _ in range(TRIES))
    wake = min(library.wake_ns(ROUNDS) for _ in range(TRIES))
    return Waiting(look, wake, max(LEAST, min(MOST, round(wake / max(look, 0.1)))))


def remember(found: Waiting) -> None:
    """Write it for the command's next start. Raises OSError."""
    put(file(), json.dumps(asdict(found)))
