"""Run a Python script as an ordinary user, started by root: `as_user(USER, script, *words)`.

Where the interpreter lies in a folder that others cannot enter (/root), the script sees that folder emptied, but for
the interpreter and this project: in a mount namespace of its own, nothing outside changes.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from crystal.evaluation.confine.linux import call, syscall

USER = 61234
ROOT = Path(__file__).parents[2]


def as_user(user: int, script: str, *words: str) -> str:
    """Its stdout; an assertion with its stderr where it fails. user: 0 stays root, in the same surroundings."""
    command = [sys.executable, __file__, str(user), str(ROOT / script), *words]
    done = subprocess.run(command, cwd="/", capture_output=True, text=True, check=False, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout


def _open_the_way(paths: list[Path]) -> None:
    """Make these readable: every folder on the way that others may not enter is replaced by an empty one."""
    call("unshare", 0x20000)  # a mount namespace
    call("mount", None, b"/", None, 0x4000 | (1 << 18), None)  # what is mounted from here on stays in here
    closed = {}
    for path in paths:
        way = next((p for p in [*reversed(path.parents), path] if not p.stat().st_mode & 0o001), None)
        if way is not None:
            tree = syscall("open_tree", 428, -100, str(path).encode(), 0o2000000 | 1 | 0x8000)
            closed.setdefault(way, []).append((path, tree))
    for way, behind in closed.items():
        call("mount", b"open", str(way).encode(), b"tmpfs", 0, b"mode=755")
        for path, tree in behind:
            path.mkdir(parents=True, exist_ok=True)
            syscall("move_mount", 429, tree, b"", -100, str(path).encode(), 4)


def main() -> None:
    user = int(sys.argv[1])
    _open_the_way([ROOT, Path(sys.base_prefix).resolve()])
    if user:
        os.setgroups([])
        os.setresgid(user, user, user)
        os.setresuid(user, user, user)
    environment = {"PATH": os.environ.get("PATH", ""), "PYTHONPATH": str(ROOT), "PYTHONDONTWRITEBYTECODE": "1"}
    os.execve(sys.executable, [sys.executable, *sys.argv[2:]], environment)  # noqa: S606


if __name__ == "__main__":
    main()
