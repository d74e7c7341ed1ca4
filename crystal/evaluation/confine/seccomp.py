"""A seccomp filter, written by hand: the system calls through which a program could leave, or reach another process.

A list of what is refused, not of what is allowed, since Python's own needs differ from machine to machine; what the
list is too old to know (numbers from _NEWEST on) is refused too. Refusals are ordinary errors: EACCES is the network,
EAGAIN a process that may not be started, EPERM the rest. Only another architecture's calls kill.
"""

from __future__ import annotations

import ctypes
import errno
import os
import struct
from collections.abc import Iterable

from crystal.evaluation.confine.linux import LINUX, MACHINE, NO_NEW_PRIVS, SECCOMP, call, prctl

_ARCHITECTURES = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
_NEWEST = 471  # Linux 6.18 has 470

# name x86_64 aarch64; "-": that machine has none. From asm/unistd_64.h and asm-generic/unistd.h.
_TABLE = """
socket 41 198; connect 42 203; bind 49 200; listen 50 201; socketpair 53 199
ptrace 101 117; process_vm_readv 310 270; process_vm_writev 311 271; process_madvise 440 440; process_mrelease 448 448
pidfd_getfd 438 438; pidfd_send_signal 424 424; kcmp 312 272; rt_sigqueueinfo 129 138; rt_tgsigqueueinfo 297 240
tkill 200 130; kill 62 129; tgkill 234 131; prlimit64 302 261; fcntl 72 25; ioctl 16 29; setpriority 141 140
sched_setparam 142 118; sched_setscheduler 144 119; sched_setaffinity 203 122; sched_setattr 314 274; ioprio_set 251 30
clone 56 220; clone3 435 435; fork 57 -; vfork 58 -
mount 165 40; umount2 166 39; chroot 161 51; pivot_root 155 41; open_tree 428 428; move_mount 429 429; fsopen 430 430
fsconfig 431 431; fsmount 432 432; fspick 433 433; mount_setattr 442 442; open_tree_attr 467 467; unshare 272 97
setns 308 268; statmount 457 457; listmount 458 458; listns 470 470
bpf 321 280; perf_event_open 298 241; keyctl 250 219; add_key 248 217; request_key 249 218; userfaultfd 323 282
io_uring_setup 425 425; io_uring_enter 426 426; io_uring_register 427 427; personality 135 92; memfd_create 319 279
memfd_secret 447 447; shmget 29 194; shmat 30 196; shmctl 31 195; semget 64 190; msgget 68 186; mq_open 240 180
fanotify_init 300 262; name_to_handle_at 303 264; open_by_handle_at 304 265; kexec_load 246 104
kexec_file_load 320 294; init_module 175 105; finit_module 313 273; delete_module 176 106; reboot 169 142
swapon 167 224; swapoff 168 225; acct 163 89; settimeofday 164 170; clock_settime 227 112; adjtimex 159 171
clock_adjtime 305 266; sethostname 170 161; setdomainname 171 162; quotactl 179 60; quotactl_fd 443 443; syslog 103 116
vhangup 153 58; iopl 172 -; ioperm 173 -; modify_ldt 154 -; uselib 134 -; move_pages 279 239; migrate_pages 256 238
mbind 237 235; set_mempolicy 238 237; set_mempolicy_home_node 450 450; lookup_dcookie 212 18; mknod 133 -
mknodat 259 33
chmod 90 -; fchmod 91 52; fchmodat 268 53; fchmodat2 452 452; chown 92 -; fchown 93 55; lchown 94 -; fchownat 260 54
utime 132 -; utimes 235 -; utimensat 280 88; futimesat 261 -; setxattr 188 5; lsetxattr 189 6; fsetxattr 190 7
removexattr 197 14; lremovexattr 198 15; fremovexattr 199 16; setxattrat 463 463; removexattrat 466 466
file_setattr 469 469; inotify_init 253 -; inotify_init1 294 26; flock 73 32
"""
_ROWS = [row.split() for row in _TABLE.replace("\n", ";").split(";") if row.strip()]
_NETWORK = "socket connect bind listen".split()
_STARTS = "clone fork vfork".split()
# Landlock does not see these: without a mount namespace they would reach files outside.
_FILES = """chmod fchmod fchmodat fchmodat2 chown fchown lchown fchownat utime utimes utimensat futimesat setxattr
lsetxattr fsetxattr removexattr lremovexattr fremovexattr setxattrat removexattrat file_setattr inotify_init
inotify_init1 flock""".split()
_NEW_NAMESPACES = 0x7E020000  # clone's CLONE_NEW…
_OWNERS = (8, 15, 10)  # fcntl's F_SETOWN, F_SETOWN_EX, F_SETSIG: a signal to anyone, by way of a pipe
_TERMINALS = (0x8901, 0x8902, 0x5412, 0x541C)  # ioctl's FIOSETOWN, SIOCSPGRP; TIOCSTI, TIOCLINUX type for the user

_LOAD, _AND, _EQUAL, _AT_LEAST, _BITS, _RETURN = 0x20, 0x54, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERRNO, _KILL = 0x7FFF0000, 0x00050000, 0x80000000

Instruction = tuple[int, int, int, int]  # code, jump if true, jump if false, constant


def available() -> bool:
    """Whether this machine has a table here and its kernel takes filters."""
    if not LINUX or MACHINE not in _ARCHITECTURES:
        return False
    try:
        call("prctl", SECCOMP, 2, None, 0, 0)  # no filter given: EFAULT where filters are known, EINVAL where not
    except OSError as error:
        return error.errno == errno.EFAULT
    return False


def restrict(namespaces: bool) -> None:
    """Install the filter in this process, for ever. namespaces: whether it lives in mount and pid namespaces of its
    own; without them it also may not start processes or threads, signal others, or change what files are marked with.
    """
    program = _program(MACHINE, namespaces, os.getpid())
    code = b"".join(struct.pack("HBBI", *instruction) for instruction in program)
    buffer = ctypes.create_string_buffer(code)
    header = struct.pack("HP", len(program), ctypes.addressof(buffer))
    prctl(NO_NEW_PRIVS, 1)
    call("prctl", SECCOMP, 2, header, 0, 0)


def _program(machine: str, namespaces: bool, own: int) -> list[Instruction]:
    column = 1 if machine == "x86_64" else 2
    numbers = {row[0]: int(row[column]) for row in _ROWS if row[column] != "-"}
    refused = {name: _error(errno.EPERM) for name in numbers}
    refused |= {name: _error(errno.EACCES) for name in _NETWORK}
    refused["clone3"] = _error(errno.ENOSYS)  # its flags lie in memory; libc goes on with clone
    for name in ("fcntl", "ioctl"):
        refused[name] = _refuse_if(1, _OWNERS if name == "fcntl" else _TERMINALS)
    refused["prlimit64"] = _allow_if(0, [0])
    # connected pairs: a pair of datagram sockets could be pointed elsewhere
    refused["socketpair"] = [
        (_LOAD, 0, 0, 16), (_EQUAL, 0, 4, 1), (_LOAD, 0, 0, 24), (_AND, 0, 0, 0xF), (_EQUAL, 0, 1, 1),
        (_RETURN, 0, 0, _ALLOW), *_error(errno.EACCES),
    ]  # fmt: skip
    if namespaces:
        refused["kill"] = _refuse_if(0, [1])
        refused["clone"] = [(_LOAD, 0, 0, 16), (_BITS, 0, 1, _NEW_NAMESPACES), *_error(errno.EPERM), *_allow()]
        for name in ("tgkill", "fork", "vfork", *_FILES):
            refused.pop(name, None)
    else:
        refused |= {name: _allow_if(0, [own]) for name in ("kill", "tgkill")}
        refused |= {name: _error(errno.EAGAIN) for name in _STARTS}
    program = [
        (_LOAD, 0, 0, 4), (_EQUAL, 1, 0, _ARCHITECTURES[machine]), (_RETURN, 0, 0, _KILL), (_LOAD, 0, 0, 0),
        # on x86_64, numbers with bit 30 are x32's; so they, too, are beyond the newest
        (_AT_LEAST, 0, 1, _NEWEST), *_error(errno.ENOSYS),
    ]  # fmt: skip
    for name, steps in refused.items():
        if name in numbers:
            program += [(_EQUAL, 0, len(steps), numbers[name]), *steps]
    return [*program, *_allow()]


def _allow() -> list[Instruction]:
    return [(_RETURN, 0, 0, _ALLOW)]


def _error(code: int) -> list[Instruction]:
    return [(_RETURN, 0, 0, _ERRNO | code)]


def _refuse_if(argument: int, values: Iterable[int]) -> list[Instruction]:
    """By the argument's low half, which is all that the kernel reads of an int."""
    tests = [step for value in values for step in ((_EQUAL, 0, 1, value), *_error(errno.EPERM))]
    return [(_LOAD, 0, 0, 16 + 8 * argument), *tests, *_allow()]


def _allow_if(argument: int, values: Iterable[int]) -> list[Instruction]:
    tests = [step for value in values for step in ((_EQUAL, 0, 1, value), *_allow())]
    return [(_LOAD, 0, 0, 16 + 8 * argument), *tests, *_error(errno.EPERM)]
