"""Namespaces: a process with its own mounts, process numbers, network (none), IPC and host name.

Its root is an empty file system in memory, into which the interpreter and the libraries it needs are bound read-only,
with a scratch folder of bounded size. Nothing else has a name in there: no /proc, no home, no socket's path.
"""

from __future__ import annotations

import os
import stat
import sys
from collections.abc import Callable
from contextlib import suppress
from functools import cache

from crystal.evaluation.confine.linux import MACHINE, call, syscall

SCRATCH = "/tmp"  # noqa: S108 - inside; where tempfile looks for it
_USER, _ALL = 0x10000000, 0x20000 | 0x20000000 | 0x40000000 | 0x08000000 | 0x04000000  # NEWNS, PID, NET, IPC, UTS
_OPEN_TREE, _MOVE_MOUNT, _MOUNT_SETATTR = 428, 429, 442
_PIVOT_ROOT = 155 if MACHINE == "x86_64" else 41
_HERE, _EMPTY_PATH, _RECURSIVE, _CLOEXEC = -100, 0x1000, 0x8000, 0o2000000  # AT_FDCWD, AT_EMPTY_PATH, AT_RECURSIVE
_READ_ONLY, _NO_SUID, _NO_DEVICES = 1, 2, 4  # MOUNT_ATTR_…, and MS_… too
_PRIVATE, _DETACH = 0x4000 | (1 << 18), 2


@cache
def executable() -> str:
    """The interpreter itself, whatever virtual environment this process runs in."""
    return os.path.realpath(sys.executable)


@cache
def readable() -> list[str]:
    """What a bare interpreter needs to read: itself, its standard library, the shared libraries. Real paths.

    To be asked before anything is confined: inside, the virtual environment that leads there is out of reach.
    """
    home = os.path.realpath(sys.base_prefix)
    paths = [executable(), f"{home}/lib", f"{home}/lib64", *_LIBRARIES, "/etc/ld.so.cache"]
    paths = sorted({os.path.realpath(path) for path in paths if os.path.exists(path)})
    inside = [path for path in paths if any(path.startswith(f"{other}/") for other in paths)]
    return [path for path in paths if path not in inside]


_LIBRARIES = ("/lib", "/lib64", "/usr/lib", "/usr/lib64", "/nix/store")


def enter(as_user: bool) -> None:
    """Leave this process's namespaces; its children are the first processes of the new one. as_user: through a user
    namespace, in which the user keeps the own number and only there may do the rest."""
    uid, gid = os.geteuid(), os.getegid()
    call("unshare", _ALL | (_USER if as_user else 0))
    if as_user:
        for name, content in (("setgroups", "deny"), ("uid_map", f"{uid} {uid} 1"), ("gid_map", f"{gid} {gid} 1")):
            with open(f"/proc/self/{name}", "w") as file:
                file.write(content)


def new_root(owner: tuple[int, int], disk_bytes: int) -> None:
    """Turn the root into one that holds readable(), /dev/null and SCRATCH. owner: its uid and gid."""
    call("mount", None, b"/", None, _PRIVATE, None)
    trees = [(path, _tree(path, _READ_ONLY | _NO_SUID | _NO_DEVICES)) for path in readable()]
    trees.append(("/dev/null", _tree("/dev/null", _NO_SUID)))
    links = [(path, os.readlink(path)) for path in _LIBRARIES if os.path.islink(path)]
    base = next(path for path in ("/tmp", "/var/tmp", "/mnt", "/dev") if os.path.isdir(path))  # noqa: S108
    _memory(base, "size=1m,mode=755")
    for path, tree in trees:
        _place(base + path, stat.S_ISDIR(os.fstat(tree).st_mode))
        syscall("move_mount", _MOVE_MOUNT, tree, b"", _HERE, (base + path).encode(), 4)
        os.close(tree)
    for path, target in links:
        _missing(lambda path=path, target=target: os.symlink(target, base + path))
    _missing(lambda: os.mkdir(base + SCRATCH))
    _memory(base + SCRATCH, f"size={disk_bytes},nr_inodes=4096,mode=700,uid={owner[0]},gid={owner[1]}")
    os.chdir(base)
    syscall("pivot_root", _PIVOT_ROOT, b".", b".")
    call("umount2", b".", _DETACH)
    os.chdir("/")
    _mark(_HERE, b"/", 0, _READ_ONLY)


def _tree(path: str, flags: int) -> int:
    """A copy of what is mounted there, as a file descriptor, to be placed later."""
    tree = syscall("open_tree", _OPEN_TREE, _HERE, path.encode(), 1 | _RECURSIVE | _CLOEXEC)
    _mark(tree, b"", _EMPTY_PATH | _RECURSIVE, flags)
    return tree


def _mark(place: int, path: bytes, how: int, flags: int) -> None:
    attributes = flags.to_bytes(8, sys.byteorder) + bytes(24)
    syscall("mount_setattr", _MOUNT_SETATTR, place, path, how, attributes, len(attributes))


def _memory(path: str, options: str) -> None:
    call("mount", b"scratch", path.encode(), b"tmpfs", _NO_SUID | _NO_DEVICES, options.encode())


def _place(path: str, directory: bool) -> None:
    """Something to mount over."""
    os.makedirs(path if directory else os.path.dirname(path), 0o755, exist_ok=True)
    if not directory:
        os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))


def _missing(make: Callable[[], None]) -> None:
    with suppress(FileExistsError):
        make()
