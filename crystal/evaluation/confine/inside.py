"""From a forked process to a confined interpreter: what happens between the warden's fork and the program's start.

Without namespaces the process itself becomes the interpreter. With them there are three: the one forked stays outside
and waits for the first process inside, which waits for the interpreter; when the first ends, the kernel kills the rest.
"""

from __future__ import annotations

import contextlib
import os
import resource
import signal
from pathlib import Path
from typing import NoReturn

from crystal.evaluation.confine import landlock, namespaces, seccomp
from crystal.evaluation.confine.linux import DUMPABLE, LINUX, NO_NEW_PRIVS, PDEATHSIG, prctl
from crystal.evaluation.confine.outcome import Layers, Limits

REPORT = 3  # the file descriptor to which a program writes its token when it is through
_STATUS = 4
_NOBODY, _UNUSED = 65534, 0x70000000  # from here on up to 2^31 no distribution gives uids out


def other_uid(warden: int) -> int:
    """A user whom nobody else is, not even the programs of another warden: so limits and signals concern it alone.

    `nobody` where this process's user namespace has no such number, 0 where it has root alone.
    """
    lines = Path("/proc/self/uid_map").read_text().splitlines() if LINUX else ["0 0 4294967295"]
    spans = [range(first, first + count) for first, _, count in (map(int, line.split()) for line in lines)]
    return next((uid for uid in (_UNUSED + warden, _NOBODY) if any(uid in span for span in spans)), 0)


def become(layers: Layers, limits: Limits, scratch: str, uid: int, files: tuple[int, int, int, int, int]) -> NoReturn:
    """Turn this forked process into the confined program. files: its stdin, stdout, stderr and report, and the pipe to
    the warden that takes `setup: …` when something fails, or the program's exit status as waitpid() gives it."""
    status = files[4]
    try:
        signal.set_wakeup_fd(-1)
        status = _only(files)
        os.setsid()
        _die_with_parent()
        if layers.namespaces:
            _inside(layers, limits, uid, status)
        else:
            _drop(uid)
            _die_with_parent()
        _start(layers, limits, namespaces.SCRATCH if layers.namespaces else scratch)
    except BaseException as error:
        os.write(status, f"setup: {type(error).__name__}: {error}\n".encode())
    finally:
        os._exit(70)


def _only(files: tuple[int, ...]) -> int:
    """Exactly these files, as 0 to 4; the last is closed when the program starts."""
    for target, file in enumerate([os.dup(file) if file <= _STATUS else file for file in files]):
        os.dup2(file, target, inheritable=target != _STATUS)
    os.closerange(_STATUS + 1, os.sysconf("SC_OPEN_MAX") if not LINUX else 1 << 16)
    return _STATUS


def _inside(layers: Layers, limits: Limits, uid: int, status: int) -> None:
    """Returns in the process that is to be the program; the other two wait in here, and end here."""
    namespaces.enter(as_user=layers.namespaces == "user")
    if child := os.fork():
        os.closerange(0, _STATUS + 1)
        os.waitpid(child, 0)
        os._exit(0)
    owner = (uid, uid) if layers.other_uid else (os.geteuid(), os.getegid())
    namespaces.new_root(owner, limits.disk_bytes)
    _drop(uid)
    _die_with_parent()
    prctl(DUMPABLE, 0)  # what runs in here as the same user cannot look into it
    if child := os.fork():
        os.closerange(0, _STATUS)
        while True:  # every orphan in here is its child
            ended, how = os.wait()
            if ended == child:
                os.write(status, how.to_bytes(4, "little"))
                os._exit(0)
    prctl(DUMPABLE, 1)


def _drop(uid: int) -> None:
    """Root becomes `uid` (0: stays what it is). Its groups go too."""
    if uid:
        os.setgroups([])
        os.setresgid(uid, uid, uid)
        os.setresuid(uid, uid, uid)


def _die_with_parent() -> None:
    """When the warden is killed; a change of user clears it."""
    if LINUX:
        prctl(PDEATHSIG, signal.SIGKILL)


def _start(layers: Layers, limits: Limits, scratch: str) -> None:
    os.chdir(scratch)
    os.umask(0o077)
    _limit(layers, limits)
    if LINUX:
        prctl(NO_NEW_PRIVS, 1)
    program = namespaces.executable()
    if layers.landlock:
        landlock.restrict(namespaces.readable(), [scratch, "/dev/null"])
    if layers.seccomp:
        seccomp.restrict(bool(layers.namespaces))
    # -I without its -E: the environment is ours, and a set's order is to be the same each time
    environment = {"HOME": scratch, "TMPDIR": scratch, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"}
    os.execve(program, [program, "-P", "-s", "-S", "-B", "-X", "utf8", "-"], environment)  # noqa: S606


def _limit(layers: Layers, limits: Limits) -> None:
    """Hard limits. Without namespaces processes are refused by the filter: the kernel's count would be of all that the
    user runs elsewhere."""
    seconds = int(limits.seconds) + 2
    wanted = {"AS": limits.memory_bytes, "CPU": seconds, "FSIZE": limits.disk_bytes, "NOFILE": 64, "CORE": 0}
    if layers.namespaces:
        wanted["NPROC"] = limits.processes + 1  # the first one
        wanted["NPROC"] += layers.namespaces == "user"  # and the one that waits outside
    for name, value in wanted.items():
        kind = getattr(resource, f"RLIMIT_{name}")
        highest = resource.getrlimit(kind)[1]
        value = value if highest == resource.RLIM_INFINITY else min(value, highest)
        with contextlib.suppress(ValueError if not LINUX else ()):  # macOS refuses some
            resource.setrlimit(kind, (value, value))
