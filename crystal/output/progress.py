"""What a long job shows: on a terminal one line that is redrawn, elsewhere a line now and then.

`Bar` is the one way to draw. Its line never wraps, whatever the window's width and however long a name; it says what
goes on, how far it is and the time left. In a file, a pipe or a terminal that cannot redraw (TERM=dumb) the same is
printed as lines, ever more seldom. `note` prints a line of text just as it is.
"""

from __future__ import annotations

import contextlib
import os
import threading
import time
from collections import deque
from collections.abc import Iterator
from typing import TYPE_CHECKING

from rich.cells import cell_len, set_cell_size
from rich.console import Console, ConsoleOptions
from rich.control import Control
from rich.live import Live
from rich.segment import ControlType, Segment
from rich.text import Text

from crystal.output.printable import printable, printable_line

if TYPE_CHECKING:
    from rich.console import RenderResult

WIDE = 72  # columns from which there is room for numbers and elapsed time
_SPACING = 0.25  # seconds between two samples of the speed
_SAMPLES = 120
_DELAY, _PERIOD = 0.15, 0.1  # seconds before the first drawing, and between two
_LONGEST = 60.0  # seconds between two lines where nothing is redrawn
_open: set[Bar] = set()  # those that have begun and not ended


def note(console: Console, text: str) -> None:
    """Print text as it stands: no markup, no emoji codes, control characters escaped; a line is never broken."""
    console.print(printable(text), markup=False, emoji=False, highlight=False, soft_wrap=True)


def restore() -> None:
    """End every bar that is still there, and give the terminal its cursor back; for when a command is over.

    An interrupt may come before a bar's `with` block has begun, and then nothing else ends it. It waits for no lock
    for long, since it may be called in a signal handler.
    """
    for bar in list(_open):
        bar._ended.set()
        held = bar._lock.acquire(timeout=0.2)  # it may be about to draw for the first time
        if bar.draws and bar._live.is_started:
            with contextlib.suppress(Exception):
                os.write(bar.console.file.fileno(), b"\n\x1b[?25h")
        if held:
            bar._lock.release()
    _open.clear()


class Bar:
    """A line of progress, from `with` to its end. Attributes may be set at any time; the screen follows.

    what: what goes on. completed, total: how far it is; total None where nobody knows. numbers: more, where there is
    room. shown: instead of the count, where `completed` is not what one counts in. keep: leave the last line there.
    unit: what is counted. lines: how many are printed between 0 and total where nothing is redrawn, besides those at
    intervals.
    """

    def __init__(
        self,
        console: Console | None,
        what: str = "",
        total: float | None = None,
        *,
        keep: bool = False,
        lines: int = 0,
        unit: str = "",
    ):
        self.console = console or Console(quiet=True)
        self.keep, self.lines, self.unit = keep, lines, unit
        self.draws = _can_redraw(self.console)
        self._live = Live(self, console=self.console, auto_refresh=False, redirect_stdout=False)
        self._lock, self._ended = threading.Lock(), threading.Event()
        self.begin(what, total)

    def begin(self, what: str, total: float | None = None, completed: float = 0) -> None:
        """Another job on the same line: count and clock start again."""
        self.what, self.total, self.completed = what, total, completed
        self.numbers, self.shown = "", None
        self.began = self._said = time.monotonic()
        self._marks = completed
        self._samples = deque([(self.began, completed)], maxlen=_SAMPLES)

    def advance(self, by: float = 1, what: str | None = None) -> None:
        """Note that `by` more are done; what: what goes on now."""
        self.reach(self.completed + by, what)

    def reach(self, completed: float, what: str | None = None) -> None:
        """Note that `completed` are done."""
        now = time.monotonic()
        self.completed = completed
        if what is not None:
            self.what = what
        if len(self._samples) > 1 and now - self._samples[-2][0] < _SPACING:
            self._samples[-1] = (now, completed)
        else:
            self._samples.append((now, completed))
        if self.lines and self.total:
            every = max(self.total // self.lines, 1)
            if completed // every > self._marks // every:
                self._say()

    @contextlib.contextmanager
    def doing(self, what: str) -> Iterator[None]:
        """Show `what` for the time of a block."""
        before, self.what = self.what, what
        try:
            yield
        finally:
            self.what = before

    def note(self, text: str) -> None:
        """Print a line above."""
        note(self.console, text)

    def seconds_left(self) -> float | None:
        """An estimate from the speed of the last half minute or more; None as long as there is none."""
        (since, first), (until, last), now = self._samples[0], self._samples[-1], time.monotonic()
        if self.total is None or last <= first or until <= since:
            return 0.0 if self.total is not None and self.completed >= self.total else None
        each = (until - since) / (last - first)
        late = max(now - until - each, 0.0)  # the next one takes longer than those before
        each = (until - since + late) / (last - first)
        return max((self.total - last) * each - min(now - until, each), 0.0)

    def __enter__(self) -> Bar:
        if not self.console.quiet:
            _open.add(self)
            threading.Thread(target=self._draw if self.draws else self._tell, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self._ended.set()
        with self._lock:
            if self._live.is_started:
                self._live.transient = not self.keep
                self._live.stop()
            _open.discard(self)

    def _draw(self) -> None:
        """Draw ten times a second; what is over at once is not drawn."""
        if self._ended.wait(_DELAY):
            return
        with self._lock:
            if self._ended.is_set():
                return
            self._live.start(refresh=True)
        while not self._ended.wait(_PERIOD):
            self._live.refresh()

    def _tell(self) -> None:
        """Say how far it is after 1, 2, 4 … seconds, and from then on every minute."""
        while not self._ended.wait(_DELAY):
            now = time.monotonic()
            if now - self._said >= min(max(self._said - self.began, 1.0), _LONGEST):
                self._say()

    def _say(self) -> None:
        with self._lock:
            if self.draws or self.console.quiet or self._ended.is_set():
                return
            self._said, self._marks = time.monotonic(), self.completed
            count = self._count()
            if count and self.unit not in ("", "bytes") and self.shown is None:
                count = f"{self.unit} {count}"
            parts = [f"{self.what}: {count}" if count else self.what, self.numbers, self._time()]
            note(self.console, "  ".join(printable_line(part) for part in parts if part))

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        # the cursor stays at the line's start: a window that is made narrower breaks the line behind it, and
        # erasing from there takes the broken part away too
        yield Segment("\x1b[J", None, [(ControlType.ERASE_IN_LINE, 0)])
        yield self.line(options.max_width - 1, options.ascii_only)
        yield Control(ControlType.CARRIAGE_RETURN)

    def line(self, room: int, ascii_only: bool = False) -> Text:
        """The line in at most `room` cells: count and time are always whole, then come name, bar and numbers."""
        count, left, what = self._count(), self._time(), printable_line(self.what)
        wide = room >= WIDE - 1
        free = room - sum(cell_len(part) + 1 for part in (count, left) if part) - wide
        more = []
        elapsed = _clock(time.monotonic() - self.began)
        for part in (printable_line(self.numbers), "" if left == elapsed else elapsed) if wide else ():
            if part and free - cell_len(part) - 2 > 30:
                more.append(part)
                free -= cell_len(part) + 2
        bar = 0
        if self.total is not None and free - min(cell_len(what), 12) - 1 >= 6:
            bar = min(20, max(6, free - 1 - cell_len(what)))
        text = Text(_cut(what, free - (bar + 1 if bar else 0), ascii_only), no_wrap=True, overflow="crop", end="")
        if bar:
            text.append(" ").append_text(self._bar(bar, ascii_only))
        if count:
            text.append(" ").append(count, "progress.download")
        for part in more:
            text.append("  ").append(part)
        text.append("  " if wide else " ").append(left, "progress.remaining")
        text.truncate(max(room, 1), overflow="crop")
        return text

    def _bar(self, width: int, ascii_only: bool) -> Text:
        mark = "=" if ascii_only else "━"
        done = width * min(self.completed / self.total, 1) if self.total else width
        text = Text(mark * int(done), "bar.finished" if done == width else "bar.complete")
        colored = self.console.color_system is not None and not self.console.no_color  # else both parts look alike
        return text.append((mark if colored else " ") * (width - int(done)), "bar.back")

    def _count(self) -> str:
        if self.shown is not None:
            return self.shown
        if self.unit == "bytes" and self.total is not None:
            name, size = ("GB", 1e9) if self.total >= 1e9 else ("MB", 1e6)
            return f"{self.completed / size:.1f}/{self.total / size:.1f} {name}"
        if self.total is None:
            return f"{self.completed:,.0f}" if self.completed else ""
        return f"{self.completed:,.0f}/{self.total:,.0f}"

    def _time(self) -> str:
        if self.total is None or self.completed >= self.total:
            return _clock(time.monotonic() - self.began)
        left = self.seconds_left()
        return "-:-- left" if left is None else f"{_clock(left)} left"


def _can_redraw(console: Console) -> bool:
    isatty = getattr(console.file, "isatty", None)
    return not console.quiet and console.is_terminal and not console.is_dumb_terminal and bool(isatty and isatty())


def _cut(text: str, cells: int, ascii_only: bool) -> str:
    """`text` in at most `cells` cells of a terminal, wide characters counting two."""
    if cell_len(text) <= cells:
        return text
    sign = "." if ascii_only else "…"
    return set_cell_size(text, max(cells - 1, 0)).rstrip() + sign if cells > 0 else ""


def _clock(seconds: float) -> str:
    """1:05, 2:03:04, or 3 d 4 h."""
    minutes, seconds = divmod(int(seconds + 0.5), 60)
    hours, minutes = divmod(minutes, 60)
    if hours >= 48:
        return f"{hours // 24} d {hours % 24} h"
    return f"{hours}:{minutes:02}:{seconds:02}" if hours else f"{minutes}:{seconds:02}"
