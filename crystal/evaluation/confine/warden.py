"""The process that runs programs, one after the other: small, without threads, so that it can fork in no time.

It reads a JSON object a line and answers with one, until its stdin ends; then whatever runs is killed with it.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import select
import signal
import sys
import tempfile
import time
from dataclasses import dataclass, field

from crystal.evaluation.confine import watch
from crystal.evaluation.confine.inside import REPORT, become, other_uid
from crystal.evaluation.confine.linux import LINUX, SUBREAPER, prctl
from crystal.evaluation.confine.namespaces import readable
from crystal.evaluation.confine.outcome import Layers, Limits, Status
from crystal.evaluation.confine.probe import probe
from crystal.evaluation.confine.verdict import one_line, verdict

_WATCH = 0.05  # seconds between two looks at what the kernel does not limit
_KEPT = 8192  # bytes of stderr, from its end
_TOKEN = 32  # characters
_DEATH = 10.0  # seconds until a killed program must be gone


def main() -> None:
    woken, wake = os.pipe()
    for end in (woken, wake):
        os.set_blocking(end, False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    signal.set_wakeup_fd(wake, warn_on_full_buffer=False)
    readable()
    if LINUX:
        prctl(SUBREAPER, 1)  # what a program leaves behind becomes a child of this process
    for line in sys.stdin.buffer:
        asked = json.loads(line)
        try:
            if "probe" in asked:
                answer = probe()
            else:
                layers, limits = Layers(**asked["layers"]), Limits(**asked["limits"])
                answer = _run(asked["program"], layers, limits, asked.get("show", False), woken)
        except OSError as error:
            answer = {"error": f"{error}"}
        if answer is None:
            break
        sys.stdout.write(json.dumps(answer) + "\n")
        sys.stdout.flush()


@dataclass
class _Running:
    """A program on its way. process: the one forked; ended: why it was stopped, if it was."""

    process: int
    limits: Limits
    scratch: str | None
    deadline: float
    pipes: dict[int, str] = field(default_factory=dict)
    taken: dict[str, bytes] = field(default_factory=dict)
    written: int = 0
    stopped: tuple[Status, str] | None = None
    how: int | None = None


def _run(program: str, layers: Layers, limits: Limits, show: bool, woken: int) -> dict | None:
    """One program to its end. show: answer what it wrote to stdout, too. None: nobody waits for the answer."""
    token = os.urandom(_TOKEN // 2).hex()
    source = f"{program}\n__import__('os').write({REPORT}, b'{token}')\n".encode(errors="replace")
    uid = other_uid(os.getpid()) if layers.other_uid else 0
    scratch = None if layers.namespaces else tempfile.mkdtemp(prefix="crystal-confined-")
    if scratch and uid:
        os.chown(scratch, uid, uid)
    begun = time.monotonic()
    pairs = [os.pipe() for _ in range(5)]
    mine = (pairs[0][1], *(pair[0] for pair in pairs[1:]))
    theirs = (pairs[0][0], *(pair[1] for pair in pairs[1:]))
    process = os.fork()
    if not process:
        become(layers, limits, scratch or "/", uid, theirs)
    for file in theirs:
        os.close(file)
    for file in mine:
        os.set_blocking(file, False)
    names = dict(zip(mine, ("source", "stdout", "stderr", "report", "status"), strict=True))
    running = _Running(process, limits, scratch, begun + limits.seconds, names)
    wanted = True
    try:
        wanted = _follow(running, source, woken)
    finally:
        _end(running)
        for file in (*running.pipes, woken):
            _drain(running, file)
        for file in mine:
            with contextlib.suppress(OSError):
                os.close(file)
        if scratch:
            watch.clear(scratch)
    return _answer(running, token, time.monotonic() - begun, show) if wanted else None


def _follow(running: _Running, source: bytes, woken: int) -> bool:
    """Feed the program and read what it says until it ends or must be stopped. False: whoever asked is gone."""
    ready = select.poll()
    feed = next(file for file, name in running.pipes.items() if name == "source")
    ready.register(feed, select.POLLOUT)
    for file in (0, woken, *(f for f in running.pipes if f != feed)):
        ready.register(file, select.POLLIN)
    look = time.monotonic() + _WATCH
    while running.stopped is None:
        now = time.monotonic()
        if now >= running.deadline:
            crowd = len(watch.descendants(running.process)) >= running.limits.processes
            stopped = f"stopped after {running.limits.seconds:g} s"
            running.stopped = ("timeout", stopped)
            if crowd:
                running.stopped = ("processes", f"{stopped} with all processes it may have")
            break
        if now >= look:
            running.stopped = _excess(running)
            look = now + _WATCH
        for file, _ in ready.poll(max(0.0, min(look, running.deadline) - now) * 1000 + 1):
            if file == 0:
                return False
            if file == feed:
                source = source[_feed(file, source) :]
                if not source:
                    ready.unregister(file)
                    os.close(file)
                    del running.pipes[file]
            elif not _drain(running, file):
                ready.unregister(file)
        if running.written > running.limits.output_bytes:
            running.stopped = "output", f"wrote more than {running.limits.output_bytes:,} bytes"
        ended, how = os.waitpid(running.process, os.WNOHANG)
        if ended:
            running.how = how
            break
    return True


def _feed(file: int, source: bytes) -> int:
    """How much was taken; all of it where nobody reads it any more."""
    try:
        return os.write(file, source)
    except BlockingIOError:
        return 0
    except BrokenPipeError:
        return len(source)


def _drain(running: _Running, file: int) -> bool:
    """Read what is there. False: there will be no more."""
    name = running.pipes.get(file, "")
    try:
        while data := os.read(file, 1 << 16):
            running.written += len(data) * (name in ("stdout", "stderr"))
            running.taken[name] = (running.taken.get(name, b"") + data)[-_KEPT:]
            if running.written > running.limits.output_bytes:
                return True
            if name == "report" and len(running.taken[name]) > _TOKEN:  # not a token; whoever goes on will wait
                return False
    except BlockingIOError:
        return True
    except OSError:  # the source's end is for writing
        return False
    return False


def _excess(running: _Running) -> tuple[Status, str] | None:
    limits = running.limits
    if LINUX and watch.memory(watch.descendants(running.process), limits.memory_bytes) > limits.memory_bytes:
        return "memory", f"its processes together took more than {limits.memory_bytes:,} bytes"
    if running.scratch and watch.disk(running.scratch) > limits.disk_bytes:
        return "disk", f"its files together took more than {limits.disk_bytes:,} bytes, or were hidden"
    return None


def _end(running: _Running) -> None:
    """Kill what is left of it, down to the last process: all are children of this one, sooner or later."""
    give_up = time.monotonic() + _DEATH
    if running.how is None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(running.process, signal.SIGKILL)
        with contextlib.suppress(ProcessLookupError):
            os.kill(running.process, signal.SIGKILL)
    while time.monotonic() < give_up:
        try:
            ended, how = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if ended == running.process:
            running.how = how
        if not ended:
            for pid in watch.descendants(os.getpid()) if LINUX else ():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
            time.sleep(0.001)
    raise OSError(errno.ETIMEDOUT, "a process of the program cannot be killed")


def _answer(running: _Running, token: str, seconds: float, show: bool) -> dict:
    status = running.taken.get("status", b"")
    if status.startswith(b"setup: "):
        return {"error": one_line(status.removeprefix(b"setup: ").partition(b"\n")[0].decode(errors="replace"))}
    how = int.from_bytes(status, "little") if status else running.how
    through = running.taken.get("report", b"") == token.encode()
    named = running.stopped
    if named is None and running.written > running.limits.output_bytes:
        named = "output", f"wrote more than {running.limits.output_bytes:,} bytes"
    named = named or verdict(how, through, running.taken.get("stderr", b"").decode(errors="replace"))
    answer = {"status": named[0], "detail": named[1], "seconds": seconds}
    return answer | ({"stdout": running.taken.get("stdout", b"").decode(errors="replace")} if show else {})
