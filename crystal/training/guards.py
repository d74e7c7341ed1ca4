"""What keeps a run from ending badly: signals, plan drift, numbers that are not finite."""

from __future__ import annotations

import contextlib
import fcntl
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType

from crystal.config import ConfigError
from crystal.mup.plan import Plan


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Hold a run directory for this process; the lock goes with the process, however it ends. Raises ConfigError."""
    with (directory / ".lock").open("w") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError:
            raise ConfigError(f"{directory}: another process is training in it") from None
        yield


class Interrupts:
    """Turns SIGINT and SIGTERM into a number that the loop reads between steps; a second one acts at once."""

    def __init__(self) -> None:
        self.received = 0  # the signal's number

    def __enter__(self) -> Interrupts:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._before[number])


def plan_differences(plan: Plan, groups: Sequence[dict]) -> list[str]:
    """Where an optimizer's own groups differ from the plan, one sentence a tensor; empty when muP is alive.

    groups: as `Backend.groups` reports them, read off the optimizer itself.
    """
    found = []
    seen = {tensor: group for group in groups for tensor in group["tensors"]}
    for row in plan.tensors:
        group = seen.pop(row.tensor, None)
        if group is None:
            found.append(f"{row.tensor}: in no optimizer group")
            continue
        for key in ("lr_multiplier", "weight_decay", "eps"):
            if group[key] != getattr(row, key):
                found.append(
                    f"{row.tensor}: optimizer group {group['name']} has {key} {group[key]:g}, "
                    f"the plan says {getattr(row, key):g}"
                )
    return found + [f"{tensor}: in the optimizer, not in the plan" for tensor in seen]


class BadSteps:
    """Counts steps in a row whose loss or gradient was not finite."""

    def __init__(self, limit: int):
        self.limit, self.in_a_row = limit, 0

    def exceeded(self, applied: bool) -> bool:
        """Note one step; True when more than `limit` in a row were left out."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        return self.in_a_row > self.limit
