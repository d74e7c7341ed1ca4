"""Programs that try to get out, and the things outside that would notice.
`python -m tests.evaluation.hostile_programs` runs them behind what this machine offers and prints a table.

A sample ends as if all were well only when its attack worked: "passed" is itself a sign that it got out.
"""

from __future__ import annotations

import argparse
import json
import os
import socket
import subprocess
import sys
import tempfile
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from pathlib import Path

from crystal.evaluation.confine.outcome import Layers, Limits, Outcome
from crystal.evaluation.confine.run import confinement, found, run_behind

LIMITS = Limits(seconds=30.0, memory_bytes=192 << 20, processes=8, output_bytes=1 << 16, disk_bytes=4 << 20)
SHORT = Limits(seconds=1.5, memory_bytes=192 << 20, processes=8, output_bytes=1 << 16, disk_bytes=4 << 20)


@dataclass(frozen=True)
class Sample:
    """source: with OUTSIDE, TCP, UDP, UNIX, DATAGRAM, ABSTRACT, STRANGER and MARK defined before it. status, says: its
    outcome behind all layers. alone: behind seccomp and Landlock alone, where it differs. harmless: may run unconfined.
    filtered: only the filter refuses it; behind namespaces alone it works, and reaches nothing."""

    name: str
    status: str
    says: str
    source: str
    harmless: bool = False
    alone: str = ""
    filtered: bool = False
    endless: bool = False


_C = "import ctypes, os\nlibc = ctypes.CDLL(None, use_errno=True)\ndef done(r):\n    if r < 0:\n        e = ctypes.get_errno()\n        raise OSError(e, os.strerror(e))\n"  # noqa: E501
_SEND = "import socket\ns = socket.socket(socket.{0}, socket.{1})\ns.settimeout(5)\ns.connect({2})\ns.send(b'x')"
_DENIED = "Errno 13] Permission denied (network)"

SAMPLES = [
    Sample("fork bomb", "processes", "BlockingIOError", "import os\nwhile True: os.fork()"),
    Sample("fork bomb that hides its errors", "processes", "all processes it may have", """
import os
while True:
    try: os.fork()
    except OSError: pass""", endless=True, alone="timeout"),
    Sample("thread bomb", "processes", "can't start new thread", """
import threading, time
while True: threading.Thread(target=time.sleep, args=(60,), daemon=True).start()"""),
    Sample("daemon left behind", "failed", "RuntimeError: left", """
import os, sys, time
if not os.fork():
    os.setsid()
    if not os.fork():
        os.execv(sys.executable, [sys.executable, "-I", "-S", "-c", "import time; time.sleep(300)", MARK])
    os._exit(0)
time.sleep(0.3)
raise RuntimeError('left')""", harmless=True, alone="processes"),
    Sample("shell", "failed", "/bin/sh", """
import subprocess
subprocess.run(["/bin/sh", "-c", f"echo x > {OUTSIDE}.new"], check=True)""", harmless=True, alone="processes"),
    Sample("read a file outside", "failed", "No such file", "open(OUTSIDE).read()", harmless=True),
    Sample("read it by way of /..", "failed", "No such file", "open('/..' + OUTSIDE).read()", harmless=True),
    Sample("read the parent's environment in /proc", "failed", "/proc/", "open(f'/proc/{PARENT}/environ').read()",
           harmless=True),
    Sample("read /proc/self", "failed", "/proc/self", "open('/proc/self/maps').read()", harmless=True),
    Sample("list a folder outside", "failed", "No such file", "import os\nos.listdir(os.path.dirname(OUTSIDE))",
           harmless=True),
    Sample("write a file outside", "failed", "No such file", "open(OUTSIDE, 'a').write('x')", harmless=True),
    Sample("write beside its scratch", "failed", "../", "open(f'../{MARK}', 'w').write('x')", harmless=True),
    Sample("write into the standard library", "failed", "os.py", "import os\nopen(os.__file__, 'r+')"),
    Sample("symbolic link to the outside", "failed", "link", """
import os
os.symlink(OUTSIDE, 'link')
open('link').read()""", harmless=True),
    Sample("hard link to the outside", "failed", "file", """
import os
os.link(OUTSIDE, 'mine')
open('mine', 'a').write('x')"""),
    Sample("truncate a file outside", "failed", "file", "import os\nos.truncate(OUTSIDE, 0)", harmless=True),
    Sample("chmod a file outside", "failed", "file", "import os\nos.chmod(OUTSIDE, 0)", harmless=True),
    Sample("TCP", "failed", _DENIED, _SEND.format("AF_INET", "SOCK_STREAM", "('127.0.0.1', TCP)"), harmless=True),
    Sample("TCP over IPv6", "failed", _DENIED, _SEND.format("AF_INET6", "SOCK_STREAM", "('::1', TCP)")),
    Sample("UDP", "failed", _DENIED, _SEND.format("AF_INET", "SOCK_DGRAM", "('127.0.0.1', UDP)"), harmless=True),
    Sample("Unix socket by path", "failed", _DENIED, _SEND.format("AF_UNIX", "SOCK_STREAM", "UNIX"), harmless=True),
    Sample("abstract Unix socket", "failed", _DENIED, _SEND.format("AF_UNIX", "SOCK_STREAM", "ABSTRACT"),
           harmless=True),
    Sample("datagram pair pointed outside", "failed", _DENIED, """
import socket
socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)[0].sendto(b'x', DATAGRAM)""", harmless=True),
    Sample("listen on a port", "failed", _DENIED, """
import socket
socket.create_server(('0.0.0.0', 0))""", harmless=True, filtered=True),
    Sample("netlink", "failed", _DENIED, "import socket\nsocket.socket(socket.AF_NETLINK, socket.SOCK_RAW, 0)",
           harmless=True, filtered=True),
    Sample("kill the parent", "failed", "PermissionError", "import os\nos.kill(os.getppid(), 9)", filtered=True),
    Sample("kill a process outside", "failed", "ProcessLookupError", "import os\nos.kill(STRANGER, 9)", harmless=True),
    Sample("kill everything", "failed", "ProcessLookupError", "import os\nos.kill(-1, 9)"),
    Sample("kill by a file's owner (F_SETOWN)", "failed", "PermissionError", """
import fcntl, os, time
end, start = os.pipe()
fcntl.fcntl(end, 8, STRANGER)
fcntl.fcntl(end, 10, 9)
fcntl.fcntl(end, fcntl.F_SETFL, os.O_ASYNC | os.O_NONBLOCK)
os.write(start, b'x')
time.sleep(0.2)""", harmless=True),
    Sample("limits of a process outside (prlimit)", "failed", "PermissionError",
           "import resource\nresource.prlimit(STRANGER, resource.RLIMIT_NOFILE, (3, 3))", harmless=True),
    Sample("ptrace a process outside", "failed", "PermissionError", _C + "done(libc.ptrace(16, STRANGER, 0, 0))",
           harmless=True),
    Sample("ptrace its parent", "failed", "PermissionError", _C + "done(libc.ptrace(16, os.getppid(), 0, 0))"),
    Sample("become root", "failed", "PermissionError", "import os\nos.setuid(0)\nassert os.getuid() == 0"),
    Sample("new namespaces", "failed", "PermissionError", _C + "done(libc.unshare(0x10000000))", harmless=True,
           filtered=True),
    Sample("mount", "failed", "PermissionError", _C + "done(libc.mount(b'x', b'/', b'tmpfs', 0, None))"),
    Sample("io_uring", "failed", "PermissionError",
           _C + "done(libc.syscall(425, 4, ctypes.create_string_buffer(128)))", filtered=True),
    Sample("bpf", "failed", "PermissionError", _C + """
import platform
done(libc.syscall({'x86_64': 321, 'aarch64': 280}[platform.machine()], 0, ctypes.create_string_buffer(64), 64))"""),
    Sample("a system call nobody knows", "failed", "OSError: [Errno 38]",
           _C + "done(libc.syscall(0x40000000))"),
    Sample("memory that no process owns (memfd)", "failed", "PermissionError", "import os\nos.memfd_create('x')",
           harmless=True, filtered=True),
    Sample("shared memory (System V)", "failed", "PermissionError", _C + "done(libc.shmget(0, 4096, 0o1600))",
           filtered=True),
    Sample("fill the disk with one file", "disk", "Errno 27", """
with open('big', 'wb', 0) as file:
    while True: file.write(bytes(1 << 20))"""),
    Sample("fill the disk with many files", "disk", "Errno 28", """
n = 0
while True:
    with open(f'f{n}', 'wb', 0) as file: file.write(bytes(1 << 16))
    n += 1"""),
    Sample("fill the disk with empty files", "disk", "Errno 28", """
n = 0
while True:
    open(f'f{n}', 'w').close()
    n += 1"""),
    Sample("fill the disk in a hidden folder", "disk", "", """
import os
os.mkdir('hidden', 0o300)
n = 0
while True:
    with open(f'hidden/f{n}', 'wb', 0) as file: file.write(bytes(1 << 16))
    n += 1"""),
    Sample("take all memory", "memory", "", "x = []\nwhile True: x.append(bytearray(1 << 24))"),
    Sample("take all memory with many processes", "memory", "together", """
import os, time
for _ in range(4):
    if not os.fork():
        x = bytearray(100 << 20)
        time.sleep(60)
time.sleep(60)""", alone="processes"),
    Sample("take all memory with processes that a thread started", "memory", "together", """
import os, threading, time
def start():
    for _ in range(4):
        if not os.fork():
            x = bytearray(100 << 20)
            time.sleep(60)
    time.sleep(60)
threading.Thread(target=start).start()""", alone="processes"),
    Sample("endless output", "output", "wrote more than", "while True: print('x' * 1000)"),
    Sample("endless errors", "output", "wrote more than", "import os\nwhile True: os.write(2, b'x' * 1000)"),
    Sample("endless tokens", "timeout", "stopped after", "import os\nwhile True: os.write(3, b'x' * 65536)",
           endless=True),
    Sample("endless loop", "timeout", "stopped after", "while True: pass", endless=True),
    Sample("endless loop that ignores signals", "timeout", "stopped after", """
import signal
for s in set(signal.Signals) - {signal.SIGKILL, signal.SIGSTOP}: signal.signal(s, signal.SIG_IGN)
while True: pass""", endless=True),
    Sample("sleep without end", "timeout", "stopped after", "import time\ntime.sleep(1e6)", endless=True),
    Sample("stop itself", "timeout", "stopped after", "import os\nos.kill(os.getpid(), 19)", endless=True),
    Sample("exit(0) before the tests", "failed", "before its end", "import sys\nsys.exit(0)"),
    Sample("os._exit(0) before the tests", "failed", "before its end", "import os\nos._exit(0)"),
    Sample("os._exit(0) when a test fails", "failed", "before its end",
           "import atexit, os\natexit.register(os._exit, 0)\nassert False"),
    Sample("a module in __main__'s place", "failed", "before its end", """
import os, sys
class Exit(type(sys)):
    def __getattr__(self, name): os._exit(0)
sys.modules['__main__'] = Exit('__main__')
import __main__
__main__.check"""),
    Sample("a token made up", "failed", "before its end", "import os\nos.write(3, b'0' * 32)\nos._exit(0)"),
    Sample("crash", "killed", "SIGSEGV", "import ctypes\nctypes.string_at(0)"),
    Sample("kill itself", "killed", "SIGKILL", "import os\nos.kill(os.getpid(), 9)"),
    Sample("terminal codes in a message", "failed", "Exception: [2J [31mx",
           "raise Exception('\\x1b[2J\\x1b[31mx\\n\\ny')"),
]  # fmt: skip


class Outside:
    """What a program could reach if nothing confined it: a file, sockets that listen, a process of the same user."""

    def __init__(self, stack: ExitStack, number: int):
        self.mark = f"crystal-escaped-{os.getpid()}-{number}"
        self.folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="crystal-outside-")))
        self.folder.chmod(0o777)
        self.file = self.folder / "file"
        self.file.write_text("secret")
        self.file.chmod(0o666)
        self.before = self._files()
        abstract = f"\0{self.mark}"
        self.sockets = {
            "TCP": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            "UDP": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            "UNIX": (socket.AF_UNIX, socket.SOCK_STREAM, str(self.folder / "stream")),
            "DATAGRAM": (socket.AF_UNIX, socket.SOCK_DGRAM, str(self.folder / "datagram")),
            "ABSTRACT": (socket.AF_UNIX, socket.SOCK_STREAM, abstract),
        }
        self.names = {"OUTSIDE": str(self.file), "MARK": self.mark, "PARENT": os.getpid()}
        for name, (family, kind, address) in list(self.sockets.items()):
            server = self.sockets[name] = stack.enter_context(socket.socket(family, kind))
            server.bind(address)
            server.setblocking(False)
            if kind == socket.SOCK_STREAM:
                server.listen()
            self.names[name] = server.getsockname()[1] if family == socket.AF_INET else address
        for name in ("stream", "datagram"):
            (self.folder / name).chmod(0o777)
        self.stranger = subprocess.Popen(["sleep", "600"])
        self.limits = self._limits()
        stack.callback(self._end_stranger)
        self.names["STRANGER"] = self.stranger.pid

    def program(self, source: str) -> str:
        return "\n".join(f"{name} = {value!r}" for name, value in self.names.items()) + f"\n{source}"

    def noticed(self) -> list[str]:
        """What a program did out here."""
        found = [] if self._files() == self.before else ["files outside changed"]
        for name, server in self.sockets.items():
            try:
                if server.type == socket.SOCK_STREAM:
                    server.accept()[0].close()
                else:
                    server.recv(16)
                found.append(f"{name}: something arrived")
            except BlockingIOError:
                continue
        if self.stranger.poll() is not None:
            found.append("a process outside was killed")
        elif self._limits() != self.limits:
            found.append("a process outside was limited")
        beside = Path(tempfile.gettempdir()) / self.mark
        if beside.exists():
            beside.unlink()
            found.append("a file beside its scratch")
        if left := left_over(self.mark):
            found.append("a process is left")
            for pid in left:
                os.kill(pid, 9)
        return found

    def _files(self) -> list:
        kept = [p for p in sorted(self.folder.iterdir()) if p.name not in ("stream", "datagram")]
        return [(p.name, p.stat().st_mode, p.stat().st_size, p.stat().st_nlink) for p in kept]

    def _limits(self) -> str:
        return Path(f"/proc/{self.stranger.pid}/limits").read_text()

    def _end_stranger(self) -> None:
        self.stranger.kill()
        self.stranger.wait()


def left_over(mark: str) -> list[int]:
    """Processes with the mark among their words."""
    found = []
    for pid in filter(str.isdigit, os.listdir("/proc")):
        try:
            if mark.encode() in Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0"):
                found.append(int(pid))
        except OSError:
            continue
    return found


def run_all(layers: Layers, samples: list[Sample]) -> list[tuple[Sample, Outcome, list[str]]]:
    """Each sample's outcome, and what noticed it outside."""
    with ExitStack() as stack:
        outsides = [Outside(stack, number) for number in range(len(samples))]
        results: dict[int, Outcome] = {}
        for limits, endless in ((LIMITS, False), (SHORT, True)):
            chosen = [number for number, sample in enumerate(samples) if sample.endless == endless]
            programs = [outsides[number].program(samples[number].source) for number in chosen]
            # as many at a time as let the suite be quick
            results |= dict(zip(chosen, run_behind(layers, programs, limits, workers=6 if endless else 3), strict=True))
        return [(sample, results[i], outsides[i].noticed()) for i, sample in enumerate(samples)]


def layers_of(mode: str) -> Layers:
    """`all` that there is, `filters` (Landlock and seccomp alone), `namespaces` alone, `none`."""
    there = found()[0]
    return {
        "all": there,
        "filters": Layers("", there.landlock, there.seccomp, there.other_uid),
        "namespaces": Layers(there.namespaces, False, False, there.other_uid),
        "none": Layers(),
    }[mode]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mode", default="all", choices=["all", "filters", "namespaces", "none"])
    parser.add_argument("--brief", action="store_true", help="without those that take all the time they have")
    parser.add_argument("--json", action="store_true")
    arguments = parser.parse_args()
    samples = [s for s in SAMPLES if (s.harmless or arguments.mode != "none") and not (arguments.brief and s.endless)]
    rows = run_all(layers_of(arguments.mode), samples)
    if arguments.json:
        found = [{"name": s.name, "outcome": asdict(o), "noticed": noticed} for s, o, noticed in rows]
        print(json.dumps({"confinement": asdict(confinement()), "uid": os.getuid(), "rows": found}))
        return
    print("| program | outcome | detail | noticed outside |\n|---|---|---|---|")
    for sample, outcome, noticed in rows:
        print("|", " | ".join([sample.name, outcome.status, outcome.detail, ", ".join(noticed)]), "|")


if __name__ == "__main__":
    sys.exit(main())
