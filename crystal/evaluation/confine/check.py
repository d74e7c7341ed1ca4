"""Whether programs are confined, by running one that tries to get out: what it managed is what is missing."""

from __future__ import annotations

import json
import os
import socket
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager

from crystal.evaluation.confine.outcome import Limits

LIMITS = Limits(seconds=20.0, processes=4)

# Tries one thing after the other and prints the names of those that worked.
_PROGRAM = r"""
import json, os, socket, time
got = []
def attempt(name, action):
    try:
        action()
        got.append(name)
    except OSError:
        pass
def send(family, kind, address):
    with socket.socket(family, kind) as out:
        out.settimeout(2)
        out.connect(address)
        out.send(b"x")
attempt("read", lambda: open(OUTSIDE).read())
attempt("write", lambda: open(OUTSIDE, "r+").close())
attempt("chmod", lambda: os.chmod(OUTSIDE, 0o666))
attempt("create", lambda: open(OUTSIDE + ".new", "w").close())
attempt("proc", lambda: open("/proc/1/status").read())
attempt("tcp", lambda: send(socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", TCP)))
attempt("udp", lambda: send(socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", UDP)))
attempt("unix", lambda: send(socket.AF_UNIX, socket.SOCK_STREAM, UNIX))
attempt("abstract", lambda: send(socket.AF_UNIX, socket.SOCK_STREAM, ABSTRACT))
attempt("signal", lambda: os.kill(STRANGER, 0))
if os.getuid() == 0:
    got.append("root")
try:
    for _ in range(PROCESSES):
        if not os.fork():
            time.sleep(60)
    got.append("processes")
except OSError:
    pass
print(json.dumps(got), flush=True)
os._exit(0)  # what still sleeps is to be killed
"""

_NEEDS = {
    ("read", "write", "chmod", "create", "proc"): (
        "files outside the scratch folder can be reached", "mount namespaces, or Landlock (ABI 3) with seccomp",
    ),
    ("tcp", "udp", "unix", "abstract"): ("the network can be reached", "network and mount namespaces, or seccomp"),
    ("processes",): ("the number of processes is not bounded", "a pid namespace, or seccomp"),
    ("signal",): ("other processes can be signalled", "a pid namespace, or seccomp"),
    ("root",): ("they run as root", "namespaces, or an interpreter that other users can read"),
}  # fmt: skip


def escapes(run: Callable[[str], dict]) -> tuple[str, ...]:
    """What a program can do that it must not; empty: it is confined. run: a program's text → the warden's answer."""
    with _outside() as names:
        given = "\n".join(f"{name} = {value!r}" for name, value in names.items())
        answer = run(f"{given}\n{_PROGRAM}")
    if "error" in answer:
        return (f"a confined program does not start ({answer['error']})",)
    try:
        got = set(json.loads(answer["stdout"]))
    except ValueError:
        return (f"a confined program does not start ({answer['status']}: {answer['detail']})",)
    found = []
    for kinds, (what, needs) in _NEEDS.items():
        if ways := [kind for kind in kinds if kind in got]:
            found.append(f"{what} ({', '.join(ways)}; needs {needs})" if len(kinds) > 1 else f"{what} (needs {needs})")
    return tuple(found)


@contextmanager
def _outside() -> Iterator[dict[str, object]]:
    """Things within reach of any user who is not confined: a file, sockets that listen, a process (this one)."""
    with ExitStack() as stack:
        folder = stack.enter_context(tempfile.TemporaryDirectory(prefix="crystal-outside-"))
        os.chmod(folder, 0o777)  # noqa: S103 - confinement alone is to refuse it
        path = os.path.join(folder, "file")
        with open(path, "w") as file:
            file.write("secret")
        os.chmod(path, 0o666)  # noqa: S103
        names: dict[str, object] = {"OUTSIDE": path, "STRANGER": os.getpid(), "PROCESSES": LIMITS.processes}
        kinds = {
            "TCP": (socket.AF_INET, socket.SOCK_STREAM, ("127.0.0.1", 0)),
            "UDP": (socket.AF_INET, socket.SOCK_DGRAM, ("127.0.0.1", 0)),
            "UNIX": (socket.AF_UNIX, socket.SOCK_STREAM, os.path.join(folder, "socket")),
            "ABSTRACT": (socket.AF_UNIX, socket.SOCK_STREAM, f"\0crystal-outside-{os.getpid()}"),
        }
        for name, (family, kind, address) in kinds.items():
            try:
                server = stack.enter_context(socket.socket(family, kind))
                server.bind(address)
                if kind == socket.SOCK_STREAM:
                    server.listen()
            except OSError:  # no loopback, no abstract names: nothing to reach that way
                names[name] = address[1] if family == socket.AF_INET else address
                continue
            names[name] = server.getsockname()[1] if family == socket.AF_INET else address
            if name == "UNIX":
                os.chmod(address, 0o777)  # noqa: S103
        yield names
