"""Landlock: from here on a process and its children reach only the files named, no TCP port, no abstract socket and no
process outside. As far as the kernel's ABI goes (https://docs.kernel.org/userspace-api/landlock.html)."""

from __future__ import annotations

import os
import struct
from collections.abc import Iterable

from crystal.evaluation.confine.linux import LINUX, NO_NEW_PRIVS, prctl, syscall

_CREATE, _ADD, _RESTRICT = 444, 445, 446
_EXECUTE, _WRITE, _READ, _LIST, _TRUNCATE = 1 << 0, 1 << 1, 1 << 2, 1 << 3, 1 << 14
_ON_FILES = _EXECUTE | _WRITE | _READ | _TRUNCATE
LEAST_ABI = 3  # before it, truncate() reaches any file


def abi() -> int:
    """The kernel's version of Landlock; 0 where it has none."""
    try:
        return syscall("landlock_create_ruleset", _CREATE, None, 0, 1) if LINUX else 0
    except OSError:
        return 0


def restrict(readable: Iterable[str], writable: Iterable[str]) -> None:
    """Readable trees can be read and executed; in writable ones all is allowed. Everything else is refused."""
    version = abi()
    rights = (1 << (16 if version >= 5 else 15 if version >= 3 else 14 if version >= 2 else 13)) - 1
    attributes = struct.pack("QQQ", rights, 3, 3)[: 24 if version >= 6 else 16 if version >= 4 else 8]
    ruleset = syscall("landlock_create_ruleset", _CREATE, attributes, len(attributes), 0)
    for paths, wanted in ((readable, _EXECUTE | _READ | _LIST), (writable, rights)):
        for path in paths:
            place = os.open(path, os.O_PATH | os.O_CLOEXEC)
            allowed = wanted if os.path.isdir(path) else wanted & rights & _ON_FILES
            syscall("landlock_add_rule", _ADD, ruleset, 1, struct.pack("=Qi", allowed, place), 0)
            os.close(place)
    prctl(NO_NEW_PRIVS, 1)
    syscall("landlock_restrict_self", _RESTRICT, ruleset, 0)
    os.close(ruleset)
