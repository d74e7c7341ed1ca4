"""Architectures as other people write them, right in two forms of muP each, with faults planted in each.

Nothing here knows the code under test: what is right was derived from Tensor Programs V (see forms.py).
"""

from importlib import import_module
from pkgutil import iter_modules

from .family import Broken, Family

__all__ = ["Broken", "Family", "families"]


def families() -> list[Family]:
    """Return the families of every architecture, in the order of the files."""
    found = []
    for module in sorted(entry.name for entry in iter_modules(__path__)):
        found += getattr(import_module(f"{__name__}.{module}"), "FAMILIES", [])
    return found
