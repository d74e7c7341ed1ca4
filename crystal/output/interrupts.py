"""Stop signals outside training: what is under way is undone, one line is said, the command exits with 130.

Each raises KeyboardInterrupt in the main thread, which unwinds through every `with` and `finally`. That exception can
get lost on its way: libraries catch everything while they are imported, destructors drop it, C code makes an error of
its own out of it. So this module remembers that a signal came:

- inside an import the exception waits for the import's end; a command that is still importing has nothing to undo
  and exits at once;
- whatever error ends the command after a signal counts as the interrupt;
- another signal a second later exits at once, for something hangs. Of a group of processes only SIGINT does that: its
  launcher forwards what it is sent to processes that may have been sent it as well, at any time;
- one of a group may wait in C for a process that has ended already, where Python hears nothing: a thread that the
  signal wakes all the same ends it.

Training has its own answer to the first signal: it saves (`crystal.training.guards`).
"""

from __future__ import annotations

import atexit
import contextlib
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from types import FrameType

from crystal.output import launcher
from crystal.output.imported import imported
from crystal.output.ranks import has_launcher, in_group, is_first

CODE = 130
PATIENCE = 1.0  # seconds in which a second signal is taken for the same one, sent twice
DEAF = 3.0  # seconds after which a process of a group that has not heard a signal is taken to wait for another
# a terminal's Ctrl-C; what kill, timeout and schedulers send; a terminal that is closed, or a launcher that died;
# what SLURM is often told to send before a time limit. By default each kills
_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2)


class _State:
    def __init__(self) -> None:
        self.number = 0  # the signal that came, or 0
        self.since = 0.0
        self.raised = False
        self.held = 0  # blocks that are finished first


_state = _State()
_before: dict = {}  # what `listen` replaced
_groups: set[int] = set()  # process groups to end with this process


def listen() -> None:
    """From now on they are heard here. In a thread other than the main one this does nothing."""
    if _before or threading.current_thread() is not threading.main_thread():
        return
    for number in (*stop_signals(), signal.SIGALRM):
        _before[number] = signal.signal(number, _hear)
    _before["hooks"] = sys.unraisablehook, threading.excepthook
    sys.unraisablehook, threading.excepthook = _unraisable, _in_thread
    if has_launcher():
        _listen_in_a_thread()


def _listen_in_a_thread() -> None:
    """End this process when a stop signal came that the main thread cannot hear: it waits in C for other processes.

    Training is left alone: a step may be one call that is long, and the loop has its own handlers.
    """
    heard, woken = os.pipe()
    os.set_blocking(woken, False)
    signal.set_wakeup_fd(woken, warn_on_full_buffer=False)
    os.register_at_fork(after_in_child=lambda: signal.set_wakeup_fd(-1))  # a child's signals are not this process'

    def watch() -> None:
        while number := os.read(heard, 1):
            if number[0] in _SIGNALS:
                time.sleep(DEAF)
                if signal.getsignal(number[0]) is _hear and not _state.number:
                    leave(number[0])

    threading.Thread(target=watch, daemon=True).start()


def stop_signals() -> list[int]:
    """Those that stop this process: not what it was started to ignore, as nohup and `&` ask for.

    torchrun hears SIGHUP under nohup too, and ends; its workers are sent SIGHUP then (`launcher.die_with_parent`).
    """
    return [
        number for number in _SIGNALS
        if signal.getsignal(number) is not signal.SIG_IGN or (number == signal.SIGHUP and has_launcher())
    ]  # fmt: skip


def is_repeat(number: int, since: float) -> bool:
    """Whether a further signal tells of the same stop once more. since: `time.monotonic()` of the first."""
    return time.monotonic() - since <= PATIENCE or (has_launcher() and number != signal.SIGINT)


def note_stop(number: int) -> None:
    """Training stopped because of this signal, and has saved: from now on it is the one that was heard."""
    _state.number, _state.since, _state.raised = number, time.monotonic(), True


def end_undisturbed() -> None:
    """A worker ends by an error of its own: from now on no signal cuts its last words short or is taken for its end.

    torchrun sends one as soon as another worker has ended. Of a process alone nothing changes.
    """
    for number in _SIGNALS:
        if has_launcher() and number in _before:
            signal.signal(number, signal.SIG_IGN)


def quiet_lost_terminal() -> None:
    """After SIGHUP: what is written to a terminal that is gone goes nowhere, instead of being an error."""
    for fd in (1, 2):
        try:
            os.write(fd, b"")
        except OSError:
            os.dup2(os.open(os.devnull, os.O_WRONLY), fd)


def _unlisten() -> None:
    if _before:
        signal.setitimer(signal.ITIMER_REAL, 0)
        sys.unraisablehook, threading.excepthook = _before.pop("hooks")
        for number, handler in _before.items():
            signal.signal(number, handler)
        _before.clear()


def obeyed(command: Callable[[], int | None]) -> int | None:
    """command(), or 130 when a signal ended it, whatever error became of that on its way."""
    lasting = bool(_before)
    listen()
    _state.__init__()
    try:
        return command()
    except (KeyboardInterrupt, Exception) as error:
        if not is_end(error):
            raise
        return CODE
    finally:
        _restore_terminal()
        if not lasting:
            _unlisten()


def is_end(error: BaseException) -> bool:
    """Whether a signal ends what raised this: any error after one may be what became of it."""
    return isinstance(error, KeyboardInterrupt) or bool(_state.number)


def line() -> str:
    """What to say on stderr of the signal that came."""
    over_echo = "\r" if os.isatty(2) and os.environ.get("TERM", "dumb") != "dumb" else ""  # the terminal's ^C
    return over_echo + said_of(_state.number)


def said_of(number: int) -> str:
    """number: of a stop signal, or 0 where something else stood for one."""
    what = {0: "interrupted", signal.SIGINT: "interrupted", signal.SIGTERM: "terminated"}
    return f"crystal: {what.get(number) or f'stopped by {signal.Signals(number).name}'}"


def tell() -> None:
    """Say that a signal ended the command: the first process of a group to people, each to its torchrun."""
    _tell_torchrun()
    if is_first():
        print(line(), file=sys.stderr)


def _tell_torchrun() -> None:
    """Not for good: before training, the signal may be torchrun's own, of which another worker's death is the cause."""
    launcher.leave_last_words(said_of(_state.number), CODE, lasting=False)


def over(code: int) -> None:
    """The command has ended and said all it had to: from now on a signal only ends the process sooner.

    After a signal the process ends here: a thread that is at work is not waited for. So does one of a process group,
    for gloo's threads are now and then still there when the process takes them apart, which aborts it. After a failure
    nothing of the group is taken apart: that may wait for processes that wait for this one (docs/clusters.md).
    """
    for number in _SIGNALS:
        if number in _before:
            signal.signal(number, lambda *_: os._exit(code))
    if _state.number:
        _kill_workers()
    if _state.number or in_group():
        if code in (0, CODE) or not in_group():
            atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)


def leave(number: int = 0) -> None:
    """End this process now, and those it started. number: the signal that asks for it, where none was heard here."""
    _state.number = _state.number or number
    try:
        end_children()
        _kill_workers()
        _restore_terminal()
        _tell_torchrun()
        if is_first():
            os.write(2, f"{line()}\n".encode())  # print may stand half-way in the words of the main thread
    finally:  # an error raised here, under C++ that imports Python, would be an abort
        os._exit(CODE)


def _restore_terminal() -> None:
    progress = imported("crystal.output.progress")
    if progress is not None:
        progress.restore()


def _kill_workers() -> None:
    multiprocessing = imported("multiprocessing")
    for worker in multiprocessing.active_children() if multiprocessing else ():
        worker.kill()


def _hear(number: int, frame: FrameType | None) -> None:
    reminder = number == signal.SIGALRM
    if not _state.number:
        if reminder:
            return
        _state.number, _state.since = number, time.monotonic()
        if number == signal.SIGHUP:
            quiet_lost_terminal()
    elif not reminder and not is_repeat(number, _state.since):
        leave()
    if _state.raised or _state.held:
        return
    importer = _outermost_import(frame)
    if importer is not None:
        if _has_not_begun(importer):
            leave()
        _remind()
        return
    _state.raised = True
    raise KeyboardInterrupt


def _remind() -> None:
    signal.setitimer(signal.ITIMER_REAL, 0.02)


def _outermost_import(frame: FrameType | None) -> FrameType | None:
    found = None
    while frame is not None:
        if frame.f_code.co_filename == "<frozen importlib._bootstrap>":
            found = frame
        frame = frame.f_back
    return found


def _has_not_begun(importer: FrameType) -> bool:
    """Whether the import stands in a command's own file: what it needs is imported before it does anything."""
    caller = importer.f_back
    file = caller.f_code.co_filename if caller else ""
    while caller is not None and caller.f_code.co_filename == file and not _starts(caller):
        caller = caller.f_back
    return caller is None or _starts(caller)


def _starts(frame: FrameType) -> bool:
    folder = os.path.basename(os.path.dirname(frame.f_code.co_filename))
    return frame.f_code.co_name == "<module>" or folder in ("typer", "click", "_click")


def _unraisable(unraisable) -> None:
    """A destructor cannot raise: an interrupt that fell into one is raised again."""
    if not _state.number:
        _before["hooks"][0](unraisable)
    elif unraisable.exc_type is KeyboardInterrupt:
        _state.raised = False
        _remind()


def _in_thread(failed) -> None:
    """What a thread says while the command is being undone is no news; nor is a full disk to TensorBoard's writer,
    for whoever hands it the next number hears of it."""
    full = issubclass(failed.exc_type, OSError) and type(failed.thread).__module__.startswith("tensorboard")
    if not _state.number and not full:
        _before["hooks"][1](failed)


@contextlib.contextmanager
def finishing() -> Iterator[None]:
    """A short block that a signal does not cut in two: it is raised at the block's end."""
    if threading.current_thread() is not threading.main_thread():  # signals are the main thread's
        yield
        return
    _state.held += 1
    try:
        yield
    finally:
        _state.held -= 1
    if _state.number and not _state.held and not _state.raised:
        _state.raised = True
        raise KeyboardInterrupt


@contextlib.contextmanager
def shielded() -> Iterator[None]:
    """Processes started inside do not hear Ctrl-C, which a terminal sends to all: who starts them ends them."""
    from multiprocessing import resource_tracker

    resource_tracker.ensure_running()  # starting it later would lift the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


@contextlib.contextmanager
def child(command: list[str], **options) -> Iterator[subprocess.Popen]:
    """A program in a process group of its own, which is ended with this block, it and all that it started.

    It does not hear a terminal's Ctrl-C and has no input from it, and the kernel ends it when this process is killed.
    options: those of subprocess.Popen.
    """
    process = None
    launcher.prepare()
    try:
        with finishing():
            own = {"stdin": subprocess.DEVNULL, "preexec_fn": launcher.signal_at_parents_death}
            process = subprocess.Popen(command, process_group=0, **(own | options))
            _groups.add(process.pid)
        yield process
    finally:
        if process is not None:
            if process.poll() is None:
                _end(process.pid)
                with contextlib.suppress(subprocess.TimeoutExpired):
                    process.wait(1)
                _end(process.pid, signal.SIGKILL)
                process.wait()
            _groups.discard(process.pid)
            for pipe in (process.stdin, process.stdout, process.stderr):
                if pipe is not None:
                    with contextlib.suppress(OSError):
                        pipe.close()


def end_children() -> None:
    """End every `child` that runs, in whichever thread it was started."""
    for group in list(_groups):
        _end(group)


def _end(group: int, number: int = signal.SIGTERM) -> None:
    with contextlib.suppress(OSError):
        os.killpg(group, number)
