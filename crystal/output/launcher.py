"""What a process has with the torchrun that started it: it ends with it, knows its patience, and leaves it last words.

torchrun starts all workers again whenever one ends with another code than 0, up to --max-restarts times (torch 2.14,
distributed/elastic/agent/server/api.py, `_invoke_run`), and reads no more than the code. So a worker that ends for
good, by a stop or a user's mistake, leaves a note beside torchrun's error file; those that are started after it find
the note and end alike, before they import anything. torchrun shows the error file's words in its own summary.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import threading
import time
from functools import cache
from pathlib import Path

from crystal.files import from_json
from crystal.output.ranks import has_launcher

PR_SET_PDEATHSIG = 1  # linux/prctl.h
TORCHRUN_GRACE = 30  # seconds, where neither flag nor variable says more
_NOTE = "crystal.json"  # of an end for good
_BEGAN = "crystal-began.json"  # that a worker could hear signals; later, of an end that a restart does not follow


def die_with_parent(number: int = signal.SIGKILL) -> None:
    """Have the kernel send this process `number` when the one that started it dies. Linux only; nothing elsewhere."""
    parent = os.getppid()
    signal_at_parents_death(number)
    if os.getppid() != parent:  # it died in between
        os.kill(os.getpid(), number)


def signal_at_parents_death(number: int = signal.SIGKILL) -> None:
    """The kernel's call alone. After `prepare` it does nothing that a process just forked from threads must not do."""
    if sys.platform == "linux":
        prepare().prctl(PR_SET_PDEATHSIG, number, 0, 0, 0)


@cache
def prepare() -> ctypes.CDLL:
    """Load what the call is made through."""
    return ctypes.CDLL(None)


def die_with_torchrun() -> None:
    """A worker whose torchrun dies is sent SIGHUP: it stops after its step, and saves. So is one whose torchrun died
    before it could ask for that; such a one has been handed to process 1. One that hangs is killed after torchrun's
    grace, as torchrun would have done."""
    if not has_launcher():
        return
    threading.Thread(target=_kill_orphan, args=(os.getppid(), grace() or TORCHRUN_GRACE), daemon=True).start()
    die_with_parent(signal.SIGHUP)
    if os.getppid() == 1 and "torch" not in _words_of(1):  # in a container torchrun may be process 1 itself
        os.kill(os.getpid(), signal.SIGHUP)


def _kill_orphan(parent: int, seconds: float) -> None:
    while os.getppid() == parent:
        time.sleep(1.0)
    time.sleep(seconds)
    os.kill(os.getpid(), signal.SIGKILL)


def grace() -> float | None:
    """Seconds from torchrun's stop signal to its SIGKILL, or None without torchrun.

    As torch 2.14 has it: --shutdown-timeout (distributed/run.py), PET_SHUTDOWN_TIMEOUT in its place,
    TORCH_ELASTIC_SHUTDOWN_TIMEOUT, 30. A worker is not told the flag: it is read off the parent's command line.
    """
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return None
    words = _words_of(os.getppid()).split("\0")
    for i, word in enumerate(words):
        flag, _, value = word.replace("_", "-").partition("=")
        if flag == "--shutdown-timeout":
            value = value or "".join(words[i + 1 : i + 2])
            return float(value) if value.isdigit() else TORCHRUN_GRACE
    for name in ("PET_SHUTDOWN_TIMEOUT", "TORCH_ELASTIC_SHUTDOWN_TIMEOUT"):
        if os.environ.get(name, "").isdigit():
            return float(os.environ[name])
    return TORCHRUN_GRACE


def _words_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_text(errors="replace")
    except OSError:
        return ""


def leave_last_words(line: str, code: int | None = None, trace: str | None = None, lasting: bool = True) -> None:
    """Tell torchrun's summary why this process ends.

    code: its exit code, when it was no failure. lasting: those started after it are to end alike. trace: an
    exception's, which torchrun shows.
    """
    file = _error_file()
    if file is None:
        return
    message = line if trace is None else {
        "message": line, "extraInfo": {"py_callstack": trace, "timestamp": str(int(time.time()))}
    }  # fmt: skip
    _write(file, {"message": message, "timestamp": int(time.time())})
    if code is not None:
        _write(file.with_name(_NOTE if lasting else _BEGAN), {"line": line, "code": code})


def note_that_it_began() -> None:
    """Leave an empty note: a process that a signal ended before it could hear one lacks it."""
    if (file := _error_file()) is not None:
        _write(file.with_name(_BEGAN), {})


def ended_for_good() -> tuple[int, str] | None:
    """(exit code, its line) when this machine's processes ended for good before torchrun started these."""
    file, attempt = _error_file(), int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"))
    if file is None or not attempt:
        return None
    notes = map(_read, sorted(file.parents[2].glob(f"attempt_{attempt - 1}/*/{_NOTE}")))
    return next((note for note in notes if note is not None), None)


def how_workers_ended(logs: str, stopped: tuple[int, str] | None = None) -> tuple[int, str] | None:
    """(exit code, the line of the first) when all workers of a torchrun's last attempt ended for good, and alike.

    logs: its --log-dir, which has one run's directory or several, by torchrun's way to name them; os.devnull tells
    nothing. A worker that was ended before it began does not count. stopped: where none began, what stands for them;
    the signal that torchrun was sent, which may be one after which others go on.
    """
    if logs == os.devnull:
        return None
    attempts = sorted(Path(logs).glob("*/attempt_*"), key=lambda path: (path.stat().st_mtime_ns, path.name))
    workers = sorted(attempts[-1].iterdir(), key=lambda path: (len(path.name), path.name)) if attempts else []
    began = [worker for worker in workers if (worker / _NOTE).exists() or (worker / _BEGAN).exists()]
    notes = [_read(worker / _NOTE) or (_read(worker / _BEGAN) if stopped else None) for worker in began] or [stopped]
    if None in notes or len({note[0] for note in notes}) != 1:
        return None
    return notes[0]


def _read(note: Path) -> tuple[int, str] | None:
    try:
        found = from_json(note.read_text(encoding="utf-8"))
        return int(found["code"]), str(found["line"])
    except (OSError, ValueError, KeyError, TypeError):  # none was left, or a full disk cut it short
        return None


def is_last_attempt() -> bool:
    """Whether torchrun will not start this process again."""
    attempt, most = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in ("RESTART_COUNT", "MAX_RESTARTS"))
    return int(attempt) >= int(most)


def _error_file() -> Path | None:
    """.../attempt_N/LOCAL_RANK/error.json; None without torchrun, or where it keeps none."""
    name = os.environ.get("TORCHELASTIC_ERROR_FILE", "")
    return Path(name) if name and name != os.devnull else None


def _write(file: Path, found: dict) -> None:
    try:
        file.write_text(json.dumps(found), encoding="utf-8")
    except OSError:  # these are words for people: that they cannot be written keeps nothing from ending
        return
