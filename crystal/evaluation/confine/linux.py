"""Calls of the Linux kernel that Python does not offer, through ctypes. Failures are OSErrors that name the call."""

from __future__ import annotations

import ctypes
import os
import platform

LINUX = platform.system() == "Linux"
MACHINE = platform.machine()

PDEATHSIG, DUMPABLE, SECCOMP, SUBREAPER, NO_NEW_PRIVS = 1, 4, 22, 36, 38  # prctl's PR_SET_…

_libc = ctypes.CDLL(None, use_errno=True)


def call(name: str, *args: int | bytes | ctypes._Pointer | None) -> int:
    """A function of libc by its name."""
    return _checked(name, getattr(_libc, name)(*map(_c, args)))


def syscall(name: str, number: int, *args: int | bytes | None) -> int:
    """A system call that libc may have no function for. name: what an error says."""
    return _checked(name, _libc.syscall(ctypes.c_long(number), *map(_c, args)))


def prctl(option: int, value: int) -> None:
    call("prctl", option, value, 0, 0, 0)


def _c(value: int | bytes | ctypes._Pointer | None):
    """Integers go as long: variadic C functions read 64 bits."""
    return ctypes.c_long(value) if isinstance(value, int) else value


def _checked(name: str, result: int) -> int:
    if result < 0:
        code = ctypes.get_errno()
        raise OSError(code, f"{name}: {os.strerror(code)}")
    return result
