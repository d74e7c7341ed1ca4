"""What the kernel grants this user, found by trying each in a process of its own."""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import asdict

from crystal.evaluation.confine import landlock, namespaces, seccomp
from crystal.evaluation.confine.inside import other_uid
from crystal.evaluation.confine.linux import LINUX, MACHINE
from crystal.evaluation.confine.outcome import Layers


def probe() -> dict:
    """{"layers": the fields of Layers, "words": layer → what was found}."""
    root = os.geteuid() == 0
    kind = "root" if root else "user"
    refused = _refusal(lambda: _namespaces(not root)) if LINUX else "not Linux"
    version, filters = landlock.abi(), seccomp.available()
    words = {
        "namespaces": refused or f"yes ({'as root' if root else 'through a user namespace'})",
        "landlock": f"ABI {version}" + (", too old" if version < landlock.LEAST_ABI else "") if version else "no",
        "seccomp": "yes" if filters else f"no ({MACHINE})",
    }
    other = False
    if root:
        unreachable = _refusal(lambda: _leave_root(bool(refused)))
        other = not unreachable
        words["uid"] = unreachable or "dropped"
    layers = Layers("" if refused else kind, version >= landlock.LEAST_ABI, filters, other)
    return {"layers": asdict(layers), "words": words}


def _namespaces(as_user: bool) -> None:
    namespaces.enter(as_user)
    if child := os.fork():
        if os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]):
            raise OSError("no: mounting in a namespace is refused")
        return
    try:
        namespaces.new_root((os.geteuid(), os.getegid()), 1 << 20)
        os._exit(0)
    finally:
        os._exit(1)


def _leave_root(reading: bool) -> None:
    """Root becomes another user. reading: who then must still find the interpreter where it is."""
    uid = other_uid(os.getpid())
    if not uid:
        raise OSError("not dropped: there is no other user in this namespace")
    os.setgroups([])
    os.setresgid(uid, uid, uid)
    os.setresuid(uid, uid, uid)
    for path in namespaces.readable() if reading else ():
        if not os.access(path, os.R_OK | os.X_OK if path == namespaces.executable() else os.R_OK):
            raise OSError(f"not dropped: {path} cannot be read by other users")


def _refusal(attempt: Callable[[], None]) -> str:
    """Why it failed, in a process of its own; empty: it did not."""
    end, start = os.pipe()
    if not (child := os.fork()):
        try:
            attempt()
        except OSError as error:
            os.write(start, (f"no ({error.strerror})" if error.strerror else str(error)).encode()[:400])
        finally:
            os._exit(0)
    os.close(start)
    with open(end, "rb") as answer:
        text = answer.read().decode()
    os.waitpid(child, 0)
    return text
