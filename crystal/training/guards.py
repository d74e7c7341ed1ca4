"""What keeps a run from ending badly: signals, plan drift, numbers that are not finite."""

from __future__ import annotations

import contextlib
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import FrameType

from crystal.errors import InUse
from crystal.files import RUN_LOCK, cannot_write, locked
from crystal.mup.plan import Plan
from crystal.output import interrupts
from crystal.output.ranks import has_launcher

HOLDING = 60.0  # seconds


@contextlib.contextmanager
def alone_in(directory: Path) -> Iterator[None]:
    """Hold a directory for this process, made if it is not there; the lock goes with the process, however it ends.

    If nothing came to be in a directory that was made here, it is taken away again. Raises RunError when another
    process holds it, or when it cannot be made. Under torchrun it may be held by a process of the start before, on
    another machine, that has not noticed yet: it is waited for.
    """
    until = time.monotonic() + (HOLDING if has_launcher() else 0.0)
    made = [path for path in (directory, *directory.parents) if not path.exists()]
    with contextlib.ExitStack() as held:
        try:
            while True:
                directory.mkdir(parents=True, exist_ok=True)
                try:
                    held.enter_context(locked(directory / RUN_LOCK, wait=False))
                    break
                except FileNotFoundError:  # taken away in between, see below
                    continue
                except BlockingIOError:
                    if time.monotonic() >= until:
                        raise
                    time.sleep(0.5)
        except BlockingIOError:
            raise InUse(f"{directory}: another process is training in it") from None
        except OSError as error:
            raise cannot_write(directory, error) from None
        try:
            yield
        finally:
            if [path.name for path in directory.iterdir()] == [RUN_LOCK]:
                (directory / RUN_LOCK).unlink()
                with contextlib.suppress(OSError):  # of a folder above there may be other users by now
                    for path in made:
                        path.rmdir()


class Interrupts:
    """Turns a stop signal into a number that the loop reads between steps.

    A second one acts at once. Under a launcher that is a second SIGINT alone, and one that comes a second later: all
    else is the same stop told again, by the scheduler, by the launcher that forwards it, or by the launcher's death.

    first: called when the first one comes.
    """

    def __init__(self, first: Callable[[], None]) -> None:
        self.received = 0  # the signal's number, be it another process' that this one has agreed with
        self.first = first
        self._since = 0.0

    def __enter__(self) -> Interrupts:
        self._before = {s: signal.signal(s, self._note) for s in interrupts.stop_signals()}
        return self

    def __exit__(self, kind: type | None, *rest: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        if self.received and kind is None:
            interrupts.note_stop(self.received)

    def agreed(self, number: int) -> int:
        """The signal that all processes have agreed on, or 0: then one that came meanwhile waits for the next step."""
        if number:
            self.received = number
        return number

    def _note(self, number: int, frame: FrameType | None) -> None:
        if not self._since:
            self.received, self._since = number, time.monotonic()
            if number == signal.SIGHUP:
                interrupts.quiet_lost_terminal()
            self.first()
        elif not has_launcher():
            signal.signal(number, self._before[number])
            signal.raise_signal(number)
        elif not interrupts.is_repeat(number, self._since):
            interrupts.leave(number)


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
