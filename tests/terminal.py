"""Commands in a pseudo-terminal, as a shell starts them: in the foreground, with a window, Ctrl-C and a screen.

They are forked from one process that has imported torch, so a case takes no longer than what it shows.
"""

import contextlib
import fcntl
import importlib
import json
import os
import pty
import re
import select
import signal
import struct
import sys
import tempfile
import termios
import threading
import time
from multiprocessing import get_context, util
from pathlib import Path

CONTEXT = get_context("forkserver")
CONTEXT.set_forkserver_preload(
    "torch torch._dynamo torch.utils.tensorboard matplotlib.figure sentencepiece optuna crystal.cli.main "
    "crystal.planning.describe crystal.training.start crystal.checks.coord_check crystal.sweeps.transfer "
    "crystal.planning.report crystal.inference.generate terminal".split()
)

FRAME = re.compile(r"\x1b\[J(.*?)\r", re.DOTALL)  # one drawing of a bar
ESCAPE = re.compile(r"\x1b\[[0-9;?]*[A-Za-z]")
COUNT = re.compile(r"(\d[\d,]*)/\d[\d,]*")
LEFT = re.compile(r"\d+:\d\d left")


class Terminal:
    """A command and the terminal that it runs in. `output` is all that it wrote; leaving the block kills it.

    slow: {"module.name": seconds} that each call of a function waits before it does its work. None: the first call
    waits until `release`, and `stuck` is true meanwhile. False: the function does nothing. A path takes its place.
    "deaf", "forgetful", "wordy": it waits as well and loses a KeyboardInterrupt, in a loop, in a destructor, or by
    making another error of it.
    into: {1: path, 2: path}, files that stdout or stderr go into.
    """

    def __init__(self, directory, *words, columns=80, slow=None, into=None, **environment):
        self.directory, self.columns, self.output = Path(directory), columns, ""
        self.master, self.slave = pty.openpty()
        self.resize(columns, quietly=True)
        self.modes = termios.tcgetattr(self.slave)
        own = Path(tempfile.mkdtemp(prefix="terminal-", dir=directory))
        self.report, self.mark, started = own / "report.json", own / "stuck", own / "started"
        environment = {"TERM": "xterm-256color", "NO_COLOR": "", "COLUMNS": "", "OMP_NUM_THREADS": "1"} | environment
        how = {"directory": directory, "environment": environment, "slow": slow or {}, "into": into or {}}
        how |= {"words": words, "mark": self.mark, "started": started}
        self.shell = CONTEXT.Process(target=_shell, args=(os.ttyname(self.slave), self.report), kwargs=how)
        self.shell.start()
        self.until(lambda _: started.exists())

    def __enter__(self):
        return self

    def __exit__(self, *exc):
        if self.shell.is_alive():
            for process in _session(self.shell.pid):
                with contextlib.suppress(OSError):
                    os.kill(process, signal.SIGKILL)
        self.shell.join()
        os.close(self.master)
        os.close(self.slave)

    def resize(self, columns, quietly=False):
        self.columns = columns
        fcntl.ioctl(self.master, termios.TIOCSWINSZ, struct.pack("HHHH", 24, columns, 0, 0))

    def type(self, keys):
        os.write(self.master, keys)

    def read(self, seconds=0.05):
        """Take what was written in the next moment."""
        ready, _, _ = select.select([self.master], [], [], seconds)
        if ready:
            self.output += os.read(self.master, 1 << 16).decode("utf-8", "replace")
        return bool(ready)

    def until(self, true, seconds=600):
        """Read until true(self)."""
        end = time.monotonic() + seconds
        while not true(self):
            assert time.monotonic() < end, self.output
            if not self.shell.is_alive():
                while self.read(0):
                    pass
                assert true(self), self.output
            self.read()
        return self

    def ended(self, seconds=600):
        """Wait for the command's end; its exit code. Nothing that it started is left, and the terminal is sane."""
        self.until(lambda _: not self.shell.is_alive(), seconds)
        while self.read(0):
            pass
        found = json.loads(self.report.read_text())
        assert found["left"] == [], "processes were left behind"
        assert termios.tcgetattr(self.slave) == self.modes
        assert self.output.rfind("\x1b[?25h") >= self.output.rfind("\x1b[?25l"), "the cursor is hidden"
        assert "Traceback" not in self.output, self.output
        return found["code"]

    @property
    def stuck(self):
        return self.mark.exists()

    def release(self):
        self.mark.unlink()

    @property
    def frames(self):
        """Every drawing of a bar, without colors."""
        return [ESCAPE.sub("", frame) for frame in FRAME.findall(self.output)]

    @property
    def counts(self):
        """The counts that bars showed, in order."""
        seen = [match[1] for frame in self.frames if (match := COUNT.search(frame))]
        return list(dict.fromkeys(seen))

    @property
    def lines(self):
        """What the screen shows: lines as the escape sequences left them, without empty ones."""
        return [line.rstrip() for line in _screen(self.output) if line.strip()]


def _screen(output):
    """The screen after `output`, a window without an end; just the sequences that the command uses."""
    rows, row, column = [[]], 0, 0
    for text in re.findall(r"\x1b\[[0-9;?]*[A-Za-z]|.", output, re.DOTALL):
        line = rows[row]
        if text == "\r":
            column = 0
        elif text == "\n":
            row += 1
            rows += [[]] * (row == len(rows))
        elif text == "\x1b[J":
            del line[column:], rows[row + 1 :]
        elif text == "\x1b[2K":
            line.clear()
        elif match := re.fullmatch(r"\x1b\[(\d*)A", text):
            row = max(row - int(match[1] or 1), 0)
        elif not text.startswith("\x1b"):
            line += " " * (column - len(line))
            line[column : column + 1] = [text]
            column += 1
    return ["".join(line) for line in rows]


def _shell(terminal, report, **how):
    """A shell with one job: starts it in the foreground of its terminal, waits, and reports what it left behind."""
    os.setsid()
    handle = os.open(terminal, os.O_RDWR)  # now this session's terminal
    for number in (0, 1, 2):
        os.dup2(handle, number)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    job = os.fork()
    if job == 0:
        _job(**how)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    with contextlib.suppress(OSError):
        os.setpgid(job, job)
    os.tcsetpgrp(handle, job)
    code = os.waitstatus_to_exitcode(os.waitpid(job, 0)[1])
    end = time.monotonic() + 20  # a large process takes its time to be gone, on a busy machine
    while (left := [p for p in _session(os.getpid()) if p != os.getpid()]) and time.monotonic() < end:
        time.sleep(0.02)
    names = [Path(f"/proc/{p}/cmdline").read_text().replace("\0", " ") for p in left if Path(f"/proc/{p}").exists()]
    report.write_text(json.dumps({"code": code, "left": names}))
    os._exit(0)


def _job(words, directory, environment, slow, into, mark, started):
    """The command, from its first line to its process' end."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGTTOU, signal.SIG_IGN)
    os.tcsetpgrp(0, os.getpid())
    signal.signal(signal.SIGTTOU, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    for number, path in into.items():
        os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
    sys.stdin, sys.stdout, sys.stderr = open(0, closefd=False), open(1, "w", closefd=False), open(2, "w", closefd=False)  # noqa: SIM115
    os.chdir(directory)
    os.environ.update(environment)
    for name in [key for key, value in os.environ.items() if not value]:
        del os.environ[name]
    for name, seconds in slow.items():
        _slow_down(name, seconds, mark)
    import torch

    from crystal.__main__ import main
    from crystal.output import interrupts

    torch.set_num_threads(1)
    sys.argv = ["crystal", *map(str, words)]
    code = 1
    interrupts.listen()
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    started.touch()
    try:
        main()
    except SystemExit as stop:
        code = stop.code or 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    threading._shutdown()
    util._exit_function()
    sys.stdout.flush()
    os._exit(code)


def _slow_down(name, seconds, mark):
    module, _, name = name.rpartition(".")
    try:
        owner = importlib.import_module(module)
    except ImportError:  # a method
        module, _, inner = module.rpartition(".")
        owner = getattr(importlib.import_module(module), inner)
    original = getattr(owner, name)
    if isinstance(seconds, Path):
        setattr(owner, name, seconds)
        return

    if isinstance(seconds, str):
        setattr(owner, name, lambda *_, **__: globals()[f"_{seconds}"](mark))
        return
    released = []

    def slow(*arguments, **named):
        if seconds is False:
            return None
        if seconds is None and not released:
            released.append(True)
            mark.touch()
            while mark.exists():
                time.sleep(0.01)
        time.sleep(seconds or 0)
        return original(*arguments, **named)

    setattr(owner, name, slow)


def _deaf(mark):
    mark.touch()
    while True:
        with contextlib.suppress(KeyboardInterrupt):
            time.sleep(60)


class _Forgetful:
    def __init__(self, mark):
        self.mark = mark

    def __del__(self):
        self.mark.touch()
        time.sleep(60)


def _forgetful(mark):
    _Forgetful(mark)
    time.sleep(60)


def _wordy(mark):
    try:
        mark.touch()
        time.sleep(60)
    except KeyboardInterrupt:
        raise RuntimeError("innards") from None


def _session(leader):
    """The processes of a session that run."""
    found = []
    for process in Path("/proc").glob("[0-9]*"):
        with contextlib.suppress(OSError):
            state, _, _, session = (process / "stat").read_text().rpartition(")")[2].split()[:4]
            if int(session) == leader and state != "Z":
                found.append(int(process.name))
    return found
