"""What is raised for a user's mistake. Imports next to nothing, so that commands start at once."""

from __future__ import annotations

from pathlib import Path


class ConfigError(Exception):
    """A mistake of the user's; `str()` is the one line to show. The command exits with 2.

    file, key: where the mistake is, for `--json`: a config file's name, and the dotted key in it. None: not known.
    """

    def __init__(self, message: str = "", *, file: str | Path | None = None, key: str | None = None):
        super().__init__(message)
        self.file = None if file is None else str(file)
        self.key = key
