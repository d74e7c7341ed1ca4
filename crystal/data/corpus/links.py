"""Files below a directory, with symbolic links followed as if what they lead to lay there.

Each directory is gone through once, however many links lead to it, and by its own place where it has one, so links in
circles cost nothing. A link to nothing is refused by name, for data that should be there is not; but hidden ones, which
editors leave for locks.
"""

from __future__ import annotations

import fnmatch
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

from crystal.errors import DataError
from crystal.files import dangling


def files_under(directory: Path, hidden: bool = True) -> list[Path]:
    """Every file below a directory. hidden: those with them whose names begin with a dot.

    Raises DataError for a link that leads nowhere and a directory that cannot be read.
    """
    return there(_walk(directory, hidden))


def matches(directory: Path, pattern: str) -> list[Path]:
    """The files that a glob relative to the directory means; `**` stands for any directories, links among them.

    The library's own takes for ever where two links lead back. Raises DataError as `files_under`.
    """
    parts = Path(pattern).parts
    return there(path for path in _walk(directory, True) if _match(parts, path.relative_to(directory).parts))


def there(paths: Iterable[Path]) -> list[Path]:
    """Those of paths that are files. Raises DataError for a link that leads nowhere."""
    found = []
    for path in paths:
        if path.is_file():
            found.append(path)
        elif (nowhere := dangling(path)) and not path.name.startswith("."):
            raise DataError(f"{path}: expected a file, found {nowhere}", file=path)
    return found


def _walk(directory: Path, hidden: bool) -> Iterator[Path]:
    seen: set[tuple[int, int]] = set()
    waiting = [str(directory)]
    for top in waiting:
        for folder, names, files in os.walk(top, onerror=_refuse):
            if (node := _node(folder)) in seen:
                names.clear()
                continue
            seen.add(node)
            inside = sorted(name for name in names if hidden or not name.startswith("."))
            linked = {name for name in inside if os.path.islink(os.path.join(folder, name))}
            waiting += [os.path.join(folder, name) for name in inside if name in linked]
            names[:] = [name for name in inside if name not in linked]
            yield from (Path(folder) / name for name in sorted(files) if hidden or not name.startswith("."))


def _match(pattern: Sequence[str], names: Sequence[str]) -> bool:
    """Whether a path is meant by a glob. As the library's, `*` and `**` mean no hidden name."""
    if not pattern or not names:
        return not names and all(part == "**" for part in pattern)
    shown = not names[0].startswith(".")
    if pattern[0] == "**":
        return _match(pattern[1:], names) or (shown and _match(pattern, names[1:]))
    named = fnmatch.fnmatchcase(names[0], pattern[0]) and (shown or pattern[0].startswith("."))
    return named and _match(pattern[1:], names[1:])


def _node(path: str) -> tuple[int, int]:
    stat = os.stat(path)
    return stat.st_dev, stat.st_ino


def _refuse(error: OSError) -> None:
    raise DataError(f"{error.filename}: cannot be read: {error.strerror}", file=error.filename)
