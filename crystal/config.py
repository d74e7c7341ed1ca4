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
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import pydantic
import yaml

from crystal.errors import ConfigError
from crystal.files import cache_dir as cache_dir
from crystal.output.config_messages import explain, found, nearest

CONFIGS = Path(__file__).resolve().parent / "configs"
COMMAND_LINE = "command line"  # how the origin of what an override set begins


class Strict(pydantic.BaseModel):
    """A config section: unknown keys are errors, types are not coerced, values do not change."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


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


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-5` as a number (YAML 1.1 wants `1.0e-5`) and dates as text.

    It refuses a key given twice, a key that is no word, and an anchor inside itself.
    """

    def compose_node(self, parent: yaml.Node, index: Any) -> yaml.Node:
        node = super().compose_node(parent, index)
        if parent is not None and isinstance(node, yaml.CollectionNode) and not node.end_mark:
            # the anchored node is still open: it would hold itself
            raise yaml.composer.ComposerError(None, None, "an anchor used inside itself", parent.start_mark)
        return node

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict:
        seen = set()
        for key, _ in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise yaml.constructor.ConstructorError(None, None, "a key that is one word", key.start_mark)
            if key.value in seen:
                raise yaml.constructor.ConstructorError(None, None, f"key {key.value!r} given twice", key.start_mark)
            seen.add(key.value)
        return super().construct_mapping(node, deep)


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(?:[0-9][0-9_]*\.?[0-9_]*|\.[0-9]+)(?:[eE][-+]?[0-9]+)$"),
    list("-+0123456789."),
)
_Loader.add_constructor("tag:yaml.org,2002:timestamp", yaml.SafeLoader.construct_yaml_str)


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
        raise ConfigError(f"{name!r}: {getattr(error, 'strerror', None) or error}", file=name) from None
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
    return _load(find(path), kinds, computed, ())


def _load(path: Path, kinds: Sequence[str], computed: Callable, above: tuple[Path, ...]) -> Config:
    if path.resolve() in above:
        raise ConfigError(f"{path}: extends: expected no circle, but the file extends itself", file=path, key="extends")
    try:
        mapping = _yaml(path.read_text(encoding="utf-8"))
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ConfigError(f"{path}{line}: expected YAML, {problem}", file=path) from None
    except UnicodeDecodeError as error:
        byte = f"0x{error.object[error.start]:02x} at {error.start}"
        raise ConfigError(f"{path}: cannot be read: expected UTF-8 text, found byte {byte}", file=path) from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}", file=path) from None
    if not isinstance(mapping, dict):
        got = "nothing" if mapping is None else found(mapping)
        raise mistake(str(path), (), f"expected a mapping of keys, got {got}")
    parents = mapping.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        message = f"expected the name of a file, or a list of names, got {found(parents)}"
        raise mistake(str(path), ("extends",), message)
    merged = Config({}, {})
    for parent in parents:
        beside = path.parent / parent
        try:
            config = None if beside.is_file() else computed(parent)
            file = None if config else beside if beside.is_file() else find(parent, *kinds)
        except (ConfigError, OSError, ValueError) as error:
            raise mistake(str(path), ("extends",), str(error)) from None
        merged = merge(merged, config or _load(file, kinds, computed, (*above, path.resolve())))
    return merge(merged, layer(mapping, os.path.normpath(path)))


def _yaml(text: str) -> Any:
    """The value that a YAML text says. Raises yaml.YAMLError."""
    try:
        return yaml.load(text, _Loader)  # noqa: S506  a SafeLoader, see above
    except RecursionError:
        raise yaml.YAMLError("nested too deeply") from None
    except (ValueError, KeyError, TypeError, AttributeError) as error:  # `!!int x`, `!!bool x`, 5,000 digits
        raise yaml.YAMLError(f"a value that is not what it says ({error})") from None


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

    def join(a: Any, b: Any) -> Any:
        if isinstance(a, dict) and isinstance(b, dict):
            return a | {key: join(a[key], value) if key in a else value for key, value in b.items()}
        return b

    mapping = join(under.mapping, over.mapping)
    # what a list that was replaced held before has no place any more
    return Config(mapping, {loc: file for loc, file in (under.origin | over.origin).items() if _holds(mapping, loc)})


_NOTHING = object()


def _holds(node: Any, loc: tuple) -> bool:
    return _value(node, loc, _NOTHING) is not _NOTHING


def _value(node: Any, loc: tuple, default: Any = None) -> Any:
    for part in loc:
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and part < len(node)
        if not inside:
            return default
        node = node[part]
    return node


def override(config: Config, assignments: Iterable[str]) -> Config:
    """Apply `dotted.key=value` words; the value is YAML, list items go by position or by their `name`."""
    for word in assignments:
        key, equals, text = word.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{word}: expected dotted.key=value")
        try:
            value = _yaml(text)
        except yaml.YAMLError:
            raise ConfigError(f"{word}: expected a YAML value after '='", key=key) from None
        loc = _locate(config.mapping, key)
        mapping = _put(config.mapping, loc, value)
        said = f"{COMMAND_LINE}: {word}"
        origin = {loc[:end]: said for end in range(1, len(loc))} | config.origin | _origins(value, said, loc)
        config = Config(mapping, {loc: file for loc, file in origin.items() if _holds(mapping, loc)})
    return config


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
    except pydantic.ValidationError as problem:
        loc, message = explain(cls, mapping, problem)
    except (TypeError, ValueError, RecursionError) as problem:  # what JSON has no form for: !!binary, !!set
        loc, message = (), f"expected text, numbers, lists and mappings ({problem})"
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
