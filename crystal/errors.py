"""What is raised for what a user can mend. Imports next to nothing, so that commands start at once."""

from __future__ import annotations

from pathlib import Path
from typing import ClassVar


class CrystalError(Exception):
    """Something that a user can mend; `str()` is the one line to show. The command exits with 2.

    kind: for `--json`. file, key: where it is, likewise: a file's name, and the dotted key in it. None: not known.
    lasting: whether the same command would fail again, so that torchrun's next attempts need not try.
    """

    kind: ClassVar[str]
    lasting = True

    def __init__(self, message: str = "", *, file: str | Path | None = None, key: str | None = None):
        super().__init__(message)
        self.file = None if file is None else str(file)
        self.key = key


class ConfigError(CrystalError):
    """A mistake in a config, a flag or a name."""

    kind = "config"


class DataError(CrystalError):
    """Text, tokens or a tokenizer that are not there, damaged, or not what they say."""

    kind = "data"


class CheckpointError(CrystalError):
    """Weights or a run's state that are not there, damaged, unfinished, or of another model."""

    kind = "checkpoint"


class RunError(CrystalError):
    """What went wrong on the way: a disk that is full, a process that died, a loss that is not finite."""

    kind = "run"


class InUse(RunError):
    """What another process holds, and may have left when the command is run again."""

    lasting = False


class WrongValue(ValueError):
    """A validator's complaint about a key inside the section that it validates: the key's path there, and what was
    expected of it. It becomes a ConfigError that names file and key."""

    def __init__(self, message: str, *loc: str | int):
        super().__init__(message)
        self.loc = loc
