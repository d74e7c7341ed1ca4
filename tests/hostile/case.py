"""What a hostile input is and what became of it: the common shape of the generators here.

A generator is a function `cases(seed, count)` of Cases, the same for the same seed; a Case makes its input under a
directory of its own and says what became of it. `judged` runs a command, or any callable, and says that.
"""

import contextlib
import io
import resource
import signal
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal
from unittest.mock import patch

from crystal.cli.main import main
from crystal.errors import CrystalError

Word = Literal["fine", "refused", "verdict", "silent", "traceback", "hang"]
CPU_SECONDS, SECONDS = 5, 60  # of this process, and of the clock: for a machine that does much else besides


@dataclass(frozen=True)
class Outcome:
    """fine: the same as from the undamaged input, or nothing to compare with. refused: one line, exit 2. verdict: exit
    1. silent: another result, and no word of it. traceback: anything else. hang: no end in time."""

    word: Word
    message: str = ""
    cpu_seconds: float = 0.0


@dataclass(frozen=True)
class Case:
    """run: makes the input under a directory and judges. expected: the words that are right."""

    kind: str
    name: str
    run: Callable[[Path], Outcome]
    expected: tuple[Word, ...] = ("refused",)


def expect_right(cases: Iterable[Case], directory: Path) -> Counter:
    """How many of each (kind, word) there were. Raises AssertionError naming the cases that ended otherwise than they
    expected."""
    words, wrong = Counter(), []
    for number, case in enumerate(cases):
        outcome = case.run(directory / str(number))
        words[case.kind, outcome.word] += 1
        if outcome.word not in case.expected:
            wrong.append(f"{case.name}: {outcome.word}: {outcome.message}")
    assert not wrong, "\n".join(wrong)
    return words


class _TooLong(BaseException):
    """Nothing of the program's own catches this."""


class NotACommand(Exception):
    """This case calls a function; there is no process that could do the same."""


@dataclass(frozen=True)
class Command:
    """The `crystal` command with these words, in this process, or by `as_processes` in one of its own.

    instead: what does the same in this process, and sooner.
    """

    words: tuple[str, ...]
    instead: Callable[[], object] | None = None

    def __call__(self) -> object:
        if self.instead is not None:
            return self.instead()
        with patch.object(sys, "argv", ["crystal", *self.words]):
            return main()


def command(*words: object, instead: Callable[[], object] | None = None) -> Command:
    """A Command, for `judged`."""
    return Command(tuple(map(str, words)), instead)


_in_processes = False


@contextlib.contextmanager
def as_processes():
    """Inside, `judged` starts a process for every Command, and raises NotACommand for anything else."""
    global _in_processes
    _in_processes = True
    try:
        yield
    finally:
        _in_processes = False


def judged(call: Callable[[], object], expected_same: Callable[[str, object], bool] | None = None) -> Outcome:
    """Run, and say what became of it.

    expected_same: given what was printed on stdout and what the call returned, whether that is what the undamaged
    input gives; None: nothing is compared.
    """
    if _in_processes:
        return _by_process(call, expected_same)
    out, err, result, code = (io.StringIO(), io.StringIO(), None, 0)
    began = time.process_time()
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), _alarm():
            result = call()
    except _TooLong:
        return Outcome("hang", f"no end after {CPU_SECONDS} s of work, or {SECONDS} s", time.process_time() - began)
    except SystemExit as stop:
        code = stop.code or 0
    except CrystalError as error:  # of a callable that is no command: `main` would print it
        code, line = 2, f"crystal: {error}\n"
        err.write(line)
    except KeyboardInterrupt:
        raise
    except BaseException as error:
        return Outcome("traceback", f"{type(error).__name__}: {error}"[:2000], time.process_time() - began)
    return _outcome(code, out.getvalue(), err.getvalue(), result, expected_same, time.process_time() - began)


def _by_process(call: Callable[[], object], expected_same) -> Outcome:
    if not isinstance(call, Command):
        raise NotACommand
    words, before = [sys.executable, "-m", "crystal", *call.words], resource.getrusage(resource.RUSAGE_CHILDREN)
    try:
        ended = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, timeout=SECONDS, check=False)
    except subprocess.TimeoutExpired:
        return Outcome("hang", f"no end after {SECONDS} s")
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    out, err = (text.decode(errors="surrogateescape") for text in (ended.stdout, ended.stderr))
    # what a command prints can be compared here, what `instead` returns cannot
    return _outcome(ended.returncode, out, err, None, None if call.instead else expected_same, cpu)


def _outcome(code, out, err, result, expected_same, cpu: float) -> Outcome:
    lines = err.splitlines()
    if code == 2:
        one = len(lines) == 1 and lines[0].startswith("crystal: ")
        return Outcome("refused" if one else "traceback", err[:2000].removeprefix("crystal: ").rstrip("\n"), cpu)
    if code == 1:
        return Outcome("verdict", out[:2000], cpu)
    if code != 0:
        return Outcome("traceback", f"exit {code}: {err[:2000]}", cpu)
    same = expected_same is None or expected_same(out, result)
    return Outcome("fine" if same else "silent", out[:2000], cpu)


@contextlib.contextmanager
def _alarm():
    """Raise _TooLong when it takes too long. What never comes back from C, nothing here can end."""

    def too_long(*_) -> None:
        raise _TooLong

    before = signal.signal(signal.SIGPROF, too_long)  # SIGALRM is the command's own
    by_the_clock = threading.Timer(SECONDS, signal.pthread_kill, (threading.get_ident(), signal.SIGPROF))
    by_the_clock.daemon = True
    by_the_clock.start()
    signal.setitimer(signal.ITIMER_PROF, CPU_SECONDS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        by_the_clock.cancel()
        signal.signal(signal.SIGPROF, before)
