"""RUN/post-mortem.txt: which process a run died of, where, how, and what it had said last, on one page.

It is made by what is left: by a process whose exchange failed, from the records of all (`rank_log`) and from what the
system still knows of processes on the same machine, or else by the next start.
"""

from __future__ import annotations

import contextlib
import datetime
import re
import signal
import socket
import time
from pathlib import Path

from crystal import checkpoint
from crystal.files import from_json, write_whole
from crystal.output.printable import printable
from crystal.training.metrics import read_metrics

PAGE = "post-mortem.txt"
START = "=== start"
PATIENCE = 2.0  # seconds that a process may need to be gone after its connections are
_SAID = 30  # lines of a log that are shown
_SHOWN = 4  # processes that are shown in full
_KINDS = {
    "process": int, "processes": int, "host": str, "pid": int, "restart": int, "step": int, "began": str,
    "end": str | None, "error": str,
}  # fmt: skip
_CRASHES = {
    "Segmentation fault": "SIGSEGV", "Aborted": "SIGABRT", "Bus error": "SIGBUS", "Illegal instruction": "SIGILL",
    "Floating-point exception": "SIGFPE",
}  # fmt: skip


def records(directory: Path) -> Path:
    """Where a run keeps its processes' logs and records."""
    return directory / "logs"


def write(directory: Path, over: bool = False) -> dict | None:
    """Write the page if somebody died, and return who was first: a record with `how`; None where nobody did.

    over: that start of the run is over, so that whoever noted no end is dead, wherever it ran.
    """
    found = _read(directory)
    dead = _dead(found, over)
    if not dead:
        return None
    with contextlib.suppress(OSError):  # the page is for people; the run's end is told anyway
        write_whole(directory / PAGE, _page(directory, found, dead))
    return dead[0]


def of_the_last_start(directory: Path) -> dict | None:
    """The same at the next start, by process 0, before any notes that it began; None where it was told already, too."""
    found = _read(directory)
    if not found:
        return None
    page, began = directory / PAGE, datetime.datetime.fromisoformat(max(record["began"] for record in found))
    if page.exists() and page.stat().st_mtime >= began.timestamp():
        return None
    return write(directory, over=True)


def _read(directory: Path) -> list[dict]:
    """Records of the last start, by process."""
    found = []
    for file in sorted(records(directory).glob("rank-*.json")):
        with contextlib.suppress(OSError, ValueError, TypeError, KeyError):  # damaged: as if not there
            record = from_json(file.read_text(encoding="utf-8"))
            datetime.datetime.fromisoformat(record["began"])
            record = {"end": None, "error": ""} | record
            if all(isinstance(record[key], kind) for key, kind in _KINDS.items()):
                found.append(record)
    processes = max(found, key=lambda record: record["began"])["processes"] if found else 0
    return [record for record in found if record["process"] < processes]  # the run may have had more before


def _dead(found: list[dict], over: bool) -> list[dict]:
    """Who ended by an error, a mistake or without a word, each with `how`."""
    dead = []
    for record in found:
        if record["end"] in ("error", "mistake"):
            dead.append(record | {"how": record["error"]})
    silent = [record for record in found if record["end"] is None]
    here = [record for record in silent if record["host"] == socket.gethostname()]
    until = time.monotonic() + (PATIENCE if here and not dead and not over else 0.0)
    while True:
        gone = {record["process"]: _death_of(record["pid"]) for record in here}
        if any(gone.values()) or time.monotonic() >= until:
            break
        time.sleep(0.005)
    for record in silent:
        how = gone.get(record["process"])
        if how or over:
            dead.append(record | {"how": how or "without a word"})
    return dead


def _death_of(pid: int) -> str | None:
    """How a process of this machine ended, as far as the system tells; None while it lives."""
    try:
        fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except OSError:
        return "without a word"
    if fields[0] not in "ZX":
        return None
    number = int(fields[49]) & 0x7F  # of its wait status, where a zombie's is shown
    with contextlib.suppress(ValueError):
        return signal.Signals(number).name if number else "without a word"
    return "without a word"


def _page(directory: Path, found: list[dict], dead: list[dict]) -> str:
    last = max((record["step"] for record in read_metrics(directory)), default=0)
    saved = checkpoint.steps(directory / "checkpoints")
    now = datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds")
    lines = [
        f"Post-mortem of {directory}, {now}",
        f"last step recorded: {last}; last checkpoint: {f'step {saved[-1]}' if saved else 'none'}; "
        f"restart {dead[0]['restart']}; {len(dead)} of {dead[0]['processes']} processes died",
    ]
    for record in dead[:_SHOWN]:
        said = _said_last(directory, record["process"])
        lines += [
            "",
            f"process {record['process']}: host {record['host']}, pid {record['pid']}, ended: {_how(record, said)}",
            *([f"  said last (logs/rank-{record['process']:05d}.log):"] if said else []),
            *(f"    {line}" for line in said),
        ]
    if more := dead[_SHOWN:]:
        lines += ["", f"and processes {', '.join(str(record['process']) for record in more)}"]
    others = [record for record in found if record["process"] not in {r["process"] for r in dead}]
    words = {"lost": "lost the others", "done": "ended as it should", "stopped": "was stopped", None: "noted no end"}
    lines.append("")
    lines += [f"process {r['process']}: host {r['host']}, {words.get(r['end'], r['end'])}" for r in others[:_SAID]]
    return printable("\n".join(lines)).rstrip() + "\n"


def _how(record: dict, said: list[str]) -> str:
    if record["how"] != "without a word":
        return record["how"]
    for line in said:
        if crash := re.match(r"Fatal Python error: ([\w -]+)", line):
            return _CRASHES.get(crash[1], crash[1])
    return "without a word (SIGKILL, as when memory runs out, or a machine that is lost; torchrun names the signal)"


def _said_last(directory: Path, process: int) -> list[str]:
    """The end of its log, of its last start."""
    try:
        text = (records(directory) / f"rank-{process:05d}.log").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return []
    lines = text.rpartition(START)[2].splitlines()[1:]
    crash = next((i for i, line in enumerate(lines) if line.startswith("Fatal Python error")), None)
    if crash is None:
        return lines[-_SAID:]
    thread = next((i for i in range(crash, len(lines)) if lines[i].startswith("Current thread")), crash)
    return [lines[crash], *lines[max(thread, crash + 1) : thread + _SAID]]  # other threads' stacks stay in the log
