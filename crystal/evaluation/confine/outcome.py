"""What is asked for and what comes back: limits, outcomes, and what this kernel offers to confine with."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Status = Literal["passed", "failed", "timeout", "memory", "output", "processes", "disk", "killed"]


@dataclass(frozen=True)
class Limits:
    """What a program may use. seconds: by the clock; memory_bytes: address space of a process, and resident memory of
    all; output_bytes: stdout and stderr together; disk_bytes: of its scratch folder."""

    seconds: float = 10.0
    memory_bytes: int = 1 << 30
    processes: int = 16
    output_bytes: int = 1 << 16
    disk_bytes: int = 16 << 20


@dataclass(frozen=True)
class Outcome:
    """How a program ended. detail: one line: the exception, the signal, or what was refused; empty when it passed
    confined. seconds: from its start to its last process's end."""

    status: Status
    detail: str
    seconds: float


@dataclass(frozen=True)
class Layers:
    """What programs run behind. namespaces: "root" (made by root), "user" (through a user namespace) or "" (none).
    landlock: whether. other_uid: root's programs run as a user whom nobody is."""

    namespaces: str = ""
    landlock: bool = False
    seccomp: bool = False
    other_uid: bool = False


@dataclass(frozen=True)
class Confinement:
    """What this kernel grants this user, and whether it is enough. layers: name → what was found, in words;
    missing: what a program could do that it must not, each with what would prevent it."""

    layers: dict[str, str]
    sufficient: bool
    missing: tuple[str, ...]
