"""YAML text into values, within bounds, and nothing in it that reads as something else than it looks like.

A config is small. So what a text may hold is bounded (bytes, values, levels, with what aliases stand for counted as
often as it stands there), and a text of any kind is a value or a refusal within a second. A key is text as it is
written: `no:` is the key "no". A number is one only where all readers agree: not `010`, which YAML 1.1 takes for 8,
not `1:30`, which it takes for 90, and not one that a double turns into 0 or infinity.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from crystal.errors import ConfigError

MAX_BYTES = 1 << 19  # of all files of one config together: a second of reading; the largest of ours has 15,202
MAX_VALUES = 20_000  # keys and values, likewise; the largest of ours has 1,300
MAX_DEPTH = 32  # levels; a piece of a stage's learning rate is at the sixth
MAX_KEY = 256  # characters of a key
MAX_DIGITS = 100  # of a whole number
_STR, _MERGE = "tag:yaml.org,2002:str", "tag:yaml.org,2002:merge"
_PLAIN = {f"tag:yaml.org,2002:{kind}" for kind in ("str", "int", "float", "bool", "null", "timestamp", "value")}
_INT = re.compile(r"[-+]?(?:0|[1-9](?:_?[0-9])*|0x[0-9a-fA-F](?:_?[0-9a-fA-F])*|0b[01](?:_?[01])*)")
_FLOAT = re.compile(r"[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9][0-9_]*)(?:[eE][-+]?[0-9]{1,100})?")
_NOT_FINITE = re.compile(r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)")
_UNREADABLE = (ValueError, KeyError, TypeError, AttributeError, IndexError, ArithmeticError)
_NO_TEXT = re.compile("[\0\ud800-\udfff]")
_NO_KEY = re.compile("[\0-\x1f\x7f\ud800-\udfff]")


@dataclass
class Room:
    """What may still be read: bytes, and keys and values. One for all files of a config."""

    bytes: int = MAX_BYTES
    values: int = MAX_VALUES


def read_yaml(path: Path, room: Room) -> Any:
    """The value that a file holds. Raises ConfigError, `FILE:LINE: what was expected`."""
    try:
        with path.open("rb") as file:
            content = file.read(room.bytes + 1)
        text = content.decode("utf-8")
    except UnicodeDecodeError as error:
        byte = f"0x{error.object[error.start]:02x} at {error.start}"
        raise ConfigError(f"{path}: cannot be read: expected UTF-8 text, found byte {byte}", file=path) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", file=path) from None
    room.bytes -= len(content)
    if room.bytes < 0:
        message = f"expected at most {MAX_BYTES:,} bytes of YAML, with what it extends"
        raise ConfigError(f"{path}: {message}", file=path)
    try:
        return yaml_value(text, room)
    except yaml.YAMLError as error:
        line = f":{number}" if (number := _line(error, text)) else ""
        raise ConfigError(f"{path}{line}: expected YAML, {problem(error)}", file=path) from None


def yaml_value(text: str, room: Room | None = None) -> Any:
    """The value that a text says. Raises yaml.YAMLError."""
    loader = None
    try:
        loader = _Loader(text, room or Room())
        return loader.get_single_data()
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except _UNREADABLE as error:  # the scanner's: "\U00110000"
        mark = loader and loader.get_mark()
        raise yaml.MarkedYAMLError(None, None, f"a value that is not what it says ({error})", mark) from None
    finally:
        if loader is not None:
            loader.dispose()


def quick_value(text: str) -> Any:
    """The value that a text of our own writing says, in a sixth of the time where libyaml is there. It keeps the same
    bounds, and judges no keys and numbers. Raises yaml.YAMLError."""
    if len(text) > MAX_BYTES or not _is_small(text):
        return yaml_value(text)
    loader = _Quick(text)
    try:
        return loader.get_single_data()
    finally:
        loader.dispose()


def _is_small(text: str) -> bool:
    """Whether a text is within bounds without further looks: libyaml's parser reads it, which builds nothing."""
    values = depth = 0
    for event in yaml.parse(text, Loader=_Quick):
        values += isinstance(event, yaml.NodeEvent)
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        if isinstance(event, yaml.AliasEvent) or values > MAX_VALUES or depth > MAX_DEPTH:
            return False
    return True


def problem(error: yaml.YAMLError) -> str:
    """What is wrong, in a line."""
    said = getattr(error, "problem", None) or getattr(error, "reason", None) or error
    return shortened(" ".join(str(said).split()), 200)


def shortened(text: str, most: int = 100) -> str:
    """A text that may be long, as a message shows it."""
    return text if len(text) <= most else f"{text[: most - 1]}…"


def _line(error: yaml.YAMLError, text: str) -> int | None:
    if mark := getattr(error, "problem_mark", None):
        return mark.line + 1
    at = getattr(error, "position", None)  # of a character that YAML does not allow
    return None if at is None else text.count("\n", 0, at) + 1


class _Quick(getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
    """libyaml's, where it is there; dates are text."""


_Quick.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


class _Loader(yaml.SafeLoader):
    """SafeLoader within a Room. It reads `1e-5` as a number (YAML 1.1 wants `1.0e-5`) and dates as text, and keys as
    they are written. It refuses a key given twice, a key that is no word, and an anchor inside itself."""

    def __init__(self, text: str, room: Room):
        super().__init__(text)
        self._room = room
        self._open: list[list[int]] = []  # of each node that is being read: values in it, levels below it
        self._measured: dict[int, tuple[int, int]] = {}  # the same of those that were read

    def compose_node(self, parent: yaml.Node, index: Any) -> yaml.Node:
        mark, is_alias = self.peek_event().start_mark, self.check_event(yaml.AliasEvent)
        self._check_depth(len(self._open) + 1, mark)
        self._open.append([1, 0])
        node = super().compose_node(parent, index)
        values, levels = self._open.pop()
        if is_alias:
            if isinstance(node, yaml.CollectionNode) and not node.end_mark:  # it is still open: it would hold itself
                raise yaml.composer.ComposerError(None, None, "an anchor used inside itself", mark)
            values, levels = self._measured[id(node)]
            self._check_depth(len(self._open) + 1 + levels, mark)
        self._measured[id(node)] = values, levels
        self._room.values -= values if is_alias else 1
        if self._room.values < 0:
            message = f"at most {MAX_VALUES:,} keys and values, with what it extends and what aliases stand for"
            raise yaml.composer.ComposerError(None, None, message, mark)
        if self._open:
            above = self._open[-1]
            above[:] = above[0] + values, max(above[1], levels + 1)
        return node

    def _check_depth(self, depth: int, mark: yaml.Mark) -> None:
        if depth > MAX_DEPTH:
            raise yaml.composer.ComposerError(None, None, f"nested too deeply, at most {MAX_DEPTH} levels", mark)

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node = super().compose_mapping_node(anchor)
        seen: set[str] = set()
        for i, (key, value) in enumerate(node.value):
            wrong = _wrong_key(key, seen)
            if wrong is not None:
                raise yaml.constructor.ConstructorError(None, None, wrong, key.start_mark)
            seen.add(key.value)
            if key.tag != _MERGE:
                node.value[i] = yaml.ScalarNode(_STR, key.value, key.start_mark, key.end_mark), value
        return node

    def flatten_mapping(self, node: yaml.MappingNode) -> None:
        """Put in what `<<` names: own keys win, then what is named first. PyYAML 6.0.4's own goes by which strings are
        the same object, and gives a key that was merged twice the wrong value."""
        merged: dict[str, tuple[yaml.Node, yaml.Node]] = {}
        for key, value in node.value:
            if key.tag != _MERGE:
                continue
            for source in value.value if isinstance(value, yaml.SequenceNode) else [value]:
                if not isinstance(source, yaml.MappingNode):
                    message = "a mapping, or a list of mappings, to merge"
                    raise yaml.constructor.ConstructorError(None, None, message, value.start_mark)
                self.flatten_mapping(source)
                for pair in source.value:
                    merged.setdefault(pair[0].value, pair)
        own = {pair[0].value: pair for pair in node.value if pair[0].tag != _MERGE}
        node.value = [*(merged | own).values()]

    def construct_object(self, node: yaml.Node, deep: bool = False) -> Any:
        try:
            return super().construct_object(node, deep)
        except _UNREADABLE as error:  # `!!bool x`
            message = f"a value that is not what it says ({error})"
            raise yaml.constructor.ConstructorError(None, None, message, node.start_mark) from None

    def refuse(self, node: yaml.Node, expected: str) -> yaml.YAMLError:
        """The mistake that a scalar is; to be raised."""
        message = f"{expected}, found {shortened(node.value, 40)}"
        return yaml.constructor.ConstructorError(None, None, message, node.start_mark)


def _wrong_key(key: yaml.Node, seen: set[str]) -> str | None:
    """What is wrong with a key, None for nothing."""
    if not isinstance(key, yaml.ScalarNode) or key.tag not in _PLAIN | {_MERGE}:
        return "a key that is one word"
    if not key.value or _NO_KEY.search(key.value):
        return "a key that is one word"
    if len(key.value) > MAX_KEY:
        return f"a key of at most {MAX_KEY} characters, found {shortened(key.value, 40)}"
    return f"key {key.value!r} given twice" if key.value in seen else None


def _int(loader: _Loader, node: yaml.Node) -> int:
    text = loader.construct_scalar(node)
    if not _INT.fullmatch(text):
        meant = " without leading zeros and colons (in quotes it is text)" if text.strip("-+0123456789_:") == "" else ""
        raise loader.refuse(node, f"a whole number{meant}")
    if len(text) > MAX_DIGITS:
        raise loader.refuse(node, f"a whole number of at most {MAX_DIGITS} digits")
    return int(text.replace("_", ""), 0)


def _float(loader: _Loader, node: yaml.Node) -> float:
    text = loader.construct_scalar(node)
    if _NOT_FINITE.fullmatch(text):
        return float(text.replace(".", "").lower())
    if not _FLOAT.fullmatch(text):
        raise loader.refuse(node, "a number")
    value = float(text.replace("_", ""))
    if math.isinf(value) or (value == 0 and re.search("[1-9]", re.split("[eE]", text)[0])):
        raise loader.refuse(node, "a number that a double can hold")
    return value


def _null(loader: _Loader, node: yaml.Node) -> None:
    if loader.construct_scalar(node) not in ("", "~", "null", "Null", "NULL"):
        raise loader.refuse(node, "null")


def _str(loader: _Loader, node: yaml.Node) -> str:
    text = loader.construct_scalar(node)
    if _NO_TEXT.search(text):
        message = "text without NUL and halves of surrogate pairs"
        raise yaml.constructor.ConstructorError(None, None, message, node.start_mark)
    return text


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)
for _kind, _construct in {"int": _int, "float": _float, "null": _null, "str": _str, "timestamp": _str}.items():
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", _construct)
for _kind in ("binary", "set", "omap", "pairs"):  # which a config has no use for
    _Loader.add_constructor(f"tag:yaml.org,2002:{_kind}", yaml.SafeLoader.construct_undefined)
