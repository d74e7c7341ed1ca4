"""YAML in, validated values out.

A config is a YAML mapping. `extends:` names one or more files (relative to the file, or packaged under
`configs/`) that are merged under it, mapping by mapping; `a.b=c` overrides are merged on top; then a strict
pydantic model reads the result. Every mistake becomes one line, `FILE: KEY: what was expected`, where FILE is
the file that the key really came from. Classes live beside the code that reads them; this file knows none.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Any, NamedTuple, TypeVar

import pydantic
import yaml

from crystal.config.bounded_yaml import MAX_BYTES, MAX_DEPTH, MAX_KEY, Room, problem, read_yaml, shortened, yaml_value
from crystal.errors import ConfigError
from crystal.files import cache_dir as cache_dir
from crystal.output.config_messages import explain, found, nearest
from crystal.output.printable import printable_line

CONFIGS = Path(__file__).resolve().parent.parent / "configs"
COMMAND_LINE = "command line"  # how the origin of what an override set begins
MAX_FILES = 40  # that a file extends, and those extend, each as often as it is named
MAX_CHANGES = 256  # overrides of one command
MAX_PART = 255  # bytes of a part of a path, on every usual file system
MAX_NAME = 100  # bytes of a name: files and directories are called by it, with something before and behind
RESERVED = ("manifest.json", "tokenizer.json", "tokenizer.model")  # beside which a source's directory lies


class Strict(pydantic.BaseModel):
    """A config section: unknown keys are errors, types are not coerced, values do not change."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @pydantic.field_validator("*")
    @classmethod
    def _paths_that_can_be(cls, value: Any) -> Any:
        for path in value if isinstance(value, tuple) else (value,):
            if isinstance(path, Path) and max(len(os.fsencode(part)) for part in path.parts or ("",)) > MAX_PART:
                raise ValueError(f"expected a path whose parts have at most {MAX_PART} bytes, got {found(str(path))}")
        return value


def within(low: float, high: float, or_zero: bool = False) -> pydantic.AfterValidator:
    """A sanity bound on a number: far outside of what anybody trains with, well inside of what arithmetic bears.

    It is no part of how a key is described, which would only be longer for it, and comes behind pydantic's own bounds
    (`gt=0`), which are. or_zero: 0 is allowed besides.
    """

    def check(value: float) -> float:
        if low <= value <= high or (or_zero and value == 0):
            return value
        side = f"at most {high:,}" if value > high else f"at least {low:,}{', or 0' if or_zero and low > 0 else ''}"
        raise ValueError(f"expected {side}, got {found(value)}")

    return pydantic.AfterValidator(check)


def no_longer(than: int) -> pydantic.AfterValidator:
    """The same for the length of a text, a list or a mapping."""

    def check(value: Any) -> Any:
        if len(value) > than:
            of = "characters" if isinstance(value, str) else "items" if isinstance(value, tuple) else "keys"
            raise ValueError(f"expected at most {than:,} {of}, got {len(value):,}")
        return value

    return pydantic.AfterValidator(check)


def _name(name: str) -> str:
    """A name that files are called by: one that is no path, hides nothing and does not look like an option."""
    if name[:1] in (".", "-") or name.lower() in RESERVED:
        raise ValueError(f"expected a name that does not begin with '.' or '-' and is no file's, got {found(name)}")
    if len(name.encode()) > MAX_NAME:
        raise ValueError(f"expected a name of at most {MAX_NAME} bytes, got {found(name)}")
    return name


called_by = pydantic.AfterValidator(_name)
Name = Annotated[str, pydantic.Field(pattern=r"^[\w.-]+$"), called_by]
Tally = Annotated[int, pydantic.Field(gt=0), within(1, 1 << 48)]  # of steps or bytes: more than any run has
Count = Annotated[int, pydantic.Field(gt=0), within(1, (1 << 31) - 1)]  # of rows or ids: an int32
Seed = Annotated[int, within(-(1 << 63), (1 << 63) - 1)]  # 64 bits, as torch's

Section = TypeVar("Section", bound=Strict)


class Config(NamedTuple):
    """A merged mapping, and for each key path (a tuple) what set it: a file's name, or `command line: key=value`."""

    mapping: dict
    origin: dict[tuple, str]

    def where(self, loc: tuple) -> str:
        """The file that set the key at `loc`, or its nearest ancestor; `command line` for an override."""
        return COMMAND_LINE if self.set_by(loc).startswith(COMMAND_LINE) else self.set_by(loc)

    def place(self, loc: tuple, message: str = "") -> str:
        """How a line about the key at `loc` begins: `FILE: KEY`, or `command line: key=value` for an override.

        A packaged file is not at fault for what a user's file makes of it: the user's file is named. An override is
        named too where `message`, about another key, speaks of the one that it set.
        """
        at_fault, key = self.at_fault(loc, message), _dotted(loc)
        named = at_fault.startswith(f"{COMMAND_LINE}: {key}=")
        return at_fault if named or not key else f"{at_fault}: {key}"

    def at_fault(self, loc: tuple, message: str = "") -> str:
        """The file, or the override, that such a line names."""
        origin = self.set_by(loc)
        if not origin.startswith(COMMAND_LINE):
            origin = next((o for at, o in self.origin.items() if self._is_about(at, o, loc, message)), origin)
        if origin.startswith(COMMAND_LINE):
            return origin
        packaged = CONFIGS in Path(origin).parents or not Path(origin).is_file()  # or the name of a rung
        return self.origin.get((), origin) if packaged else origin

    def get(self, loc: tuple) -> Any:
        """The value at `loc`, None where there is none."""
        return _value(self.mapping, loc)

    def filled(self, loc: tuple, value: Any) -> Config:
        """The same with `value` at `loc`; whoever set the key remains the one who set it."""
        return Config(_put(self.mapping, loc, value), self.origin)

    def set_by(self, loc: tuple) -> str:
        """The file or override that set the key at `loc`, or its nearest ancestor."""
        return next((self.origin[loc[:n]] for n in range(len(loc), -1, -1) if loc[:n] in self.origin), "config")

    def _is_about(self, at: tuple, origin: str, loc: tuple, message: str) -> bool:
        """Whether the key at `at` was overridden and `message`, about the key at `loc`, speaks of it."""
        if not (at and origin.startswith(f"{COMMAND_LINE}: {_dotted(at)}=")):
            return False
        name = str(at[-1]) if at[:-1] == loc[: len(at) - 1] and len(loc) > 1 else _dotted(at) if len(at) > 1 else None
        return name is not None and re.search(rf"(?<![\w.]){re.escape(name)}(?!\w)", message) is not None


def find(name: str | Path, *kinds: str) -> Path:
    """The file meant by `name`: a path, or a packaged file of configs/KIND/ (with or without `KIND/` and `.yaml`).

    kinds: folders of configs/ in which to look; none: all. Raises ConfigError when there is no such file, with the
    nearest packaged name of these kinds.
    """
    path = Path(name)
    try:
        if path.is_file():
            return path
        is_directory = path.is_dir()
    except (OSError, ValueError) as error:  # a name that is too long or no name, a folder that is closed to us
        shown = shortened(repr(str(name)))
        raise ConfigError(f"{shown}: {getattr(error, 'strerror', None) or error}", file=name) from None
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    bare = Path(*parts) if parts and not path.is_absolute() else Path(path.name)
    kinds = kinds or tuple(sorted(p.name for p in CONFIGS.iterdir() if p.is_dir()))
    for candidate in (CONFIGS / bare, *(CONFIGS / k / bare for k in kinds)):
        for file in (candidate, candidate.with_name(candidate.name + ".yaml")):
            if file.is_file():
                return file
    if is_directory:
        hint = nearest(".yaml", path.glob("*.yaml"))
        raise ConfigError(f"{name}: expected a file, it is a directory{hint}", file=name)
    names = [p.stem for kind in kinds for p in (CONFIGS / kind).glob("*.yaml")]
    raise ConfigError(f"{name}: no such file{nearest(path.stem, names)}", file=name)


def load_yaml(
    path: str | Path, kinds: Sequence[str] = (), computed: Callable[[str], Config | None] = lambda name: None
) -> Config:
    """Read a YAML mapping and what it `extends`. Raises ConfigError with file and line for bad YAML.

    kinds: the folders of configs/ that `extends` looks in beside the file's own; none: all. computed: gives the
    mapping of a name that stands for no file, else None.
    """
    return _load(find(path), _Reading(kinds, computed), ())


@dataclass
class _Reading:
    """One `load_yaml`. Each file is read once, however many ways lead to it: diamonds cost no more than chains."""

    kinds: Sequence[str]
    computed: Callable[[str], Config | None]
    room: Room = field(default_factory=Room)
    files: int = 0
    known: dict[Path, Config] = field(default_factory=dict)


def _load(path: Path, reading: _Reading, above: tuple[Path, ...]) -> Config:
    place = path.resolve()
    if place in above:
        raise ConfigError(f"{path}: extends: expected no circle, but the file extends itself", file=path, key="extends")
    if place not in reading.known:
        reading.known[place] = _merged(path, reading, (*above, place))
    return reading.known[place]


def _merged(path: Path, reading: _Reading, above: tuple[Path, ...]) -> Config:
    mapping = read_yaml(path, reading.room)
    if not isinstance(mapping, dict):
        got = "nothing" if mapping is None else found(mapping)
        raise mistake(str(path), (), f"expected a mapping of keys, got {got}")
    parents = mapping.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        message = f"expected the name of a file, or a list of names, got {found(parents)}"
        raise mistake(str(path), ("extends",), message)
    reading.files += len(parents)
    if reading.files > MAX_FILES:
        raise mistake(str(path), ("extends",), f"expected at most {MAX_FILES} files in all, with what they extend")
    merged = Config({}, {})
    for parent in parents:
        beside = path.parent / parent
        try:
            config = None if beside.is_file() else reading.computed(parent)
            file = None if config else beside if beside.is_file() else find(parent, *reading.kinds)
        except (ConfigError, OSError, ValueError) as error:
            raise mistake(str(path), ("extends",), str(error)) from None
        merged = merge(merged, config or _load(file, reading, above))
    return merge(merged, layer(mapping, os.path.normpath(path)))


def layer(mapping: dict, file: str) -> Config:
    """A mapping as a Config, all of whose keys were set by `file`."""
    return Config(mapping, _origins(mapping, file))


def _origins(value: Any, file: str, loc: tuple = ()) -> dict[tuple, str]:
    origins = {loc: file}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        origins |= _origins(item, file, (*loc, key))
    return origins


def merge(under: Config, over: Config) -> Config:
    """`over` on top of `under`: mappings merge key by key, everything else is replaced."""
    replaced: set[tuple] = set()

    def join(a: Any, b: Any, loc: tuple = ()) -> Any:
        if isinstance(a, dict) and isinstance(b, dict):
            return a | {key: join(a[key], value, (*loc, key)) if key in a else value for key, value in b.items()}
        if isinstance(a, dict | list):
            replaced.add(loc)
        return b

    mapping, origin = join(under.mapping, over.mapping), under.origin
    if replaced:  # what was in there has no place any more
        origin = {loc: file for loc, file in origin.items() if not any(loc[:n] in replaced for n in range(len(loc)))}
    return Config(mapping, origin | over.origin)


def _value(node: Any, loc: tuple) -> Any:
    for part in loc:
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and _is_place(part, node)
        if not inside:
            return None
        node = node[part]
    return node


def _is_place(part: Any, items: list) -> bool:
    return isinstance(part, int) and 0 <= part < len(items)


def override(config: Config, assignments: Iterable[str]) -> Config:
    """Apply `dotted.key=value` words; the value is YAML, list items go by position or by their `name`."""
    assignments = [*assignments]
    if len(assignments) > MAX_CHANGES or sum(map(len, assignments)) > MAX_BYTES:
        raise ConfigError(f"{COMMAND_LINE}: expected at most {MAX_CHANGES} changes and {MAX_BYTES:,} bytes in all")
    mapping, origin, room = config.mapping, dict(config.origin), Room()
    for word in assignments:
        key, equals, text = word.partition("=")
        if not equals or not all(key.split(".")) or not key.isprintable():
            raise ConfigError(f"{printable_line(shortened(word))}: expected dotted.key=value")
        parts = key.split(".")
        if len(parts) > MAX_DEPTH or max(map(len, parts)) > MAX_KEY:
            most = f"at most {MAX_DEPTH} parts, each of at most {MAX_KEY} characters"
            raise ConfigError(f"{shortened(word)}: expected dotted.key=value with {most}")
        said = f"{key}={printable_line(shortened(text))}"
        try:
            value = yaml_value(text, room)
        except yaml.YAMLError as error:
            raise ConfigError(f"{said}: expected a YAML value after '=', {problem(error)}", key=key) from None
        loc = _locate(mapping, key)
        said = f"{COMMAND_LINE}: {said}"
        for gone in _origins(_value(mapping, loc), said, loc):
            origin.pop(gone, None)
        for end in range(1, len(loc)):
            origin.setdefault(loc[:end], said)
        origin |= _origins(value, said, loc)
        mapping = _put(mapping, loc, value)
    return Config(mapping, origin)


def _locate(node: Any, dotted: str) -> tuple:
    """The key path that dotted words mean: items of a list by position or by their `name`."""
    loc: list[str | int] = []
    for word in dotted.split("."):
        if isinstance(node, list):
            names = [item.get("name") if isinstance(item, dict) else None for item in node]
            index = int(word) if word.isdecimal() else names.index(word) if word in names else -1
            if not 0 <= index < len(node):
                expected = ", ".join(str(n) for n in names if n) or f"0 to {len(node) - 1}"
                raise ConfigError(f"{COMMAND_LINE}: {dotted}: expected one of {expected} at '{word}'", key=dotted)
            loc.append(index)
            node = node[index]
        else:
            loc.append(word)
            node = node.get(word) if isinstance(node, dict) else None
    return tuple(loc)


def _put(node: Any, loc: tuple, value: Any) -> Any:
    if not loc:
        return value
    head, rest = loc[0], loc[1:]
    if isinstance(node, list):
        return [*node[:head], _put(node[head], rest, value), *node[head + 1 :]]
    node = node if isinstance(node, dict) else {}
    return node | {head: _put(node.get(head), rest, value)}


def parse(cls: type[Section], mapping: Any, where: str | Config, prefix: tuple = ()) -> Section:
    """Validate `mapping` as `cls`.

    where: the file's name, or the Config that knows each key's file; prefix: the section's place in it.
    Raises ConfigError for the first mistake: `FILE: KEY: what was expected, got what was found`.
    """
    try:
        # JSON mode: strict about types, but a list may become a tuple and a string a path, as YAML needs.
        return cls.model_validate_json(json.dumps(mapping))
    except pydantic.ValidationError as wrong:
        loc, message = explain(cls, mapping, wrong)
    except (TypeError, ValueError, ArithmeticError, RecursionError) as wrong:  # what JSON has no form for: a set
        loc, message = (), f"expected text, numbers, lists and mappings ({wrong})"
    raise mistake(where, (*prefix, *loc), message)


def mistake(where: str | Config, loc: tuple, message: str) -> ConfigError:
    """The one line about the key at `loc`: `FILE: KEY: message`. where: as in `parse`."""
    key = _dotted(loc) or None
    if isinstance(where, Config):
        at_fault = where.at_fault(loc, message)
        file = None if at_fault.startswith(COMMAND_LINE) else at_fault
        return ConfigError(f"{where.place(loc, message)}: {message}", file=file, key=key)
    return ConfigError(": ".join([where, *([key] if key else []), message]), file=where, key=key)


def _dotted(loc: tuple) -> str:
    return ".".join(map(str, loc))
