"""A module that others may have imported: used where importing it would cost seconds, or must not happen."""

from __future__ import annotations

import sys
from types import ModuleType


def imported(name: str) -> ModuleType | None:
    """The module, where its import has come to its end.

    `sys.modules` holds one from its import's first line on, without most of its names: a signal may come just then.
    """
    module = sys.modules.get(name)
    return None if getattr(getattr(module, "__spec__", None), "_initializing", False) else module
