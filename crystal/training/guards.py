"""What keeps a run from ending badly: signals, plan drift, numbers that are not finite."""

from __future__ import annotations

import contextlib
import signal
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from crystal.errors import RunError
from crystal.files import RUN_LOCK, locked
from crystal.mup.plan import Plan


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Hold a directory for this process, made if it is not there; the lock goes with the process, however it ends.

    If nothing came to be in a directory that was made here, it is taken away again. Raises RunError when another
    process holds it, or when it cannot be made.
    """
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    with contextlib.ExitStack() as held:
        try:
            while True:
                directory.mkdir(parents=True, exist_ok=True)
                with contextlib.suppress(FileNotFoundError):  # taken away in between, see below
                    held.enter_context(locked(directory / RUN_LOCK, wait=False))
                    break
        except BlockingIOError:
            raise RunError(f"{directory}: another process is training in it") from None
        except OSError as error:
            raise RunError(f"{directory}: cannot be written: {error.strerror}") from None
        try:
            yield
        finally:
            if [path.name for path in directory.iterdir()] == [RUN_LOCK]:
                (directory / RUN_LOCK).unlink()
                with contextlib.suppress(OSError):  # of a folder above there may be other users by now
                    for path in made:
                        path.rmdir()


class Interrupts:
    """Turns SIGINT and SIGTERM into a number that the loop reads between steps; a second one acts at once.

    first: called when the first one comes.
    """

    def __init__(self, first: Callable[[], None]) -> None:
        self.received = 0  # the signal's number
        self.first = first

    def __enter__(self) -> Interrupts:
        self._before = {s: signal.signal(s, self._note) for s in (signal.SIGINT, signal.SIGTERM)}
        return self

    def __exit__(self, *exc: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _note(self, number: int, frame: FrameType | None) -> None:
        self.received = number
        signal.signal(number, self._before[number])
        self.first()


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

    def go_on(self, applied: bool) -> bool:
        """Note one step; False when more than `limit` in a row were left out."""
        self.in_a_row = 0 if applied else self.in_a_row + 1
        return self.in_a_row <= self.limit
