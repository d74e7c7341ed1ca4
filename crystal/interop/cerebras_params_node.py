"""A section of a Model Zoo parameter file, read strictly: right types, finite numbers, and no key passed over.

Model Zoo goes by defaults where a key is silent, and warns of keys that it does not know. Here every key is read, may
only say what crystal does, or is on a list of keys with no bearing on what is trained; any other is refused by name.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

from crystal.config import nearest
from crystal.config.bounded_yaml import shortened
from crystal.errors import ConfigError

NUMBER = (int, float)
_EXACT = 1 << 53  # up to where a double holds every whole number
_NAMES = {dict: "a mapping", list: "a list"}


@dataclass(frozen=True)
class Keys:
    """What a section may hold. null is as good as silence, as it is to Model Zoo.

    read: looked up by whoever reads the section. only: keys with the values that they may have, the first of which is
    named to the user. passed: reason → keys without bearing on what is trained. loud: keys of `only` that must be
    said, because Model Zoo's default is another value.
    """

    read: str
    only: dict[str, tuple] = field(default_factory=dict)
    passed: dict[str, str] = field(default_factory=dict)
    loud: str = ""
    because: str = "which is all that crystal trains with"

    def names(self) -> set[str]:
        return {*self.read.split(), *self.only, *" ".join(self.passed.values()).split()}


class Node(NamedTuple):
    """A mapping in a file, and where it lies there."""

    file: Path
    path: str
    mapping: dict

    def error(self, key: str, what: str) -> ConfigError:
        """The mistake that a key is; to be raised."""
        place = ".".join(part for part in (self.path, key) if part)
        return ConfigError(f"{self.file}: {f'{place}: ' if place else ''}{what}", file=self.file, key=place or None)

    def get(self, key: str, kind: type | tuple[type, ...], *default: Any) -> Any:
        """The value under `key`, of the right kind and finite; null counts as silence. Without a default it must be
        there."""
        value = self.mapping.get(key)
        if value is None and default:
            return default[0]
        kinds = kind if isinstance(kind, tuple) else (kind,)
        names = " or ".join(_NAMES.get(k, k.__name__) for k in kinds)
        if key not in self.mapping:
            raise self.error(key, f"expected {names}, none given")
        if not isinstance(value, kind) or (isinstance(value, bool) and bool not in kinds):
            raise self.error(key, f"expected {names}, got {_got(value)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise self.error(key, f"expected a finite number, got {value}")
        if isinstance(value, int) and abs(value) > _EXACT:
            raise self.error(key, f"expected a number of at most 2^53, got {shortened(str(value), 40)}")
        return value

    def above_zero(self, key: str, kind: type | tuple[type, ...], *default: Any) -> Any:
        """A number above 0 that its square and its inverse are too, in a double."""
        value = self.get(key, kind, *default)
        if value is not None and not 1e-30 <= value <= 1e30:
            raise self.error(key, f"expected a number above 0, got {value}")
        return value

    def inside(self, key: str) -> Node:
        return Node(self.file, f"{self.path}.{key}" if self.path else key, self.get(key, dict))

    def expect(self, keys: Keys) -> Node:
        """Itself. Raises ConfigError for the first key that is none of `keys`, or says what crystal does not do."""
        loud = keys.loud.split()
        for key, value in self.mapping.items():
            if value is None and key not in loud:
                continue
            if key in keys.only and not any(_same(value, good) for good in keys.only[key]):
                expected = f"expected {plain(keys.only[key][0])}, {keys.because}"
                raise self.error(key, f"{expected}, got {plain(value)}")
            if key not in keys.names():
                raise self.error(key, f"not a key that crystal has a word for{nearest(key, keys.names())}")
        for key in loud:
            if key not in self.mapping:
                expected = f"expected {plain(keys.only[key][0])}, {keys.because}"
                raise self.error(key, f"{expected}; none given, and Model Zoo's default is another")
        return self

    def entries(self, key: str) -> list[Node]:
        """The mappings of a list."""
        found = self.get(key, list)
        for i, entry in enumerate(found):
            if not isinstance(entry, dict):
                raise self.error(f"{key}.{i}", f"expected a mapping, got {_got(entry)}")
        return [Node(self.file, ".".join(filter(None, (self.path, key, str(i)))), e) for i, e in enumerate(found)]


def _same(value: Any, good: Any) -> bool:
    """Equal and of one kind: false is no 0."""
    return isinstance(value, bool) == isinstance(good, bool) and value == good


def plain(value: Any) -> str:
    """A value for a message: short, and as a YAML file has it where it is a word."""
    if isinstance(value, str):
        return shortened(value, 60)
    return json.dumps(value) if value is None or isinstance(value, bool) else _got(value)


def _got(value: Any) -> str:
    return shortened(repr(value), 60)
