"""YAML in, validated values out.

A config is a YAML mapping. `extends:` names one or more files (relative to the file, or packaged under
`configs/`) that are merged under it, mapping by mapping; `a.b=c` overrides are merged on top; then a strict
pydantic model reads the result. Every mistake becomes one line, `FILE: KEY: what was expected`, where FILE is
the file that the key really came from. Classes live beside the code that reads them; this file knows none.
"""

from __future__ import annotations

import difflib
import json
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, get_args

import pydantic
import yaml

CONFIGS = Path(__file__).resolve().parent / "configs"


COMMAND_LINE = "command line"  # the origin of what an override set


class ConfigError(Exception):
    """A mistake of the user's; `str()` is the one line to show. The command exits with 2.

    file, key: where the mistake is, for `--json`: a config file's name, and the dotted key in it. None: not known.
    """

    def __init__(self, message: str = "", *, file: str | Path | None = None, key: str | None = None):
        super().__init__(message)
        self.file = None if file in (None, COMMAND_LINE) else str(file)
        self.key = key


class Strict(pydantic.BaseModel):
    """A config section: unknown keys are errors, types are not coerced, values do not change."""

    model_config = pydantic.ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)


Section = TypeVar("Section", bound=Strict)


class Config(NamedTuple):
    """A merged mapping, and for each key path (a tuple) the file that set it."""

    mapping: dict
    origin: dict[tuple, str]

    def where(self, loc: tuple) -> str:
        """The file that set the key at `loc`, or its nearest ancestor."""
        for end in range(len(loc), -1, -1):
            if loc[:end] in self.origin:
                return self.origin[loc[:end]]
        return "config"


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


def cache_dir() -> Path:
    """Where fetched packages, corpora, tokenizers and stores live: $CRYSTAL_CACHE or ~/.cache/crystal."""
    return Path(os.environ.get("CRYSTAL_CACHE") or Path.home() / ".cache" / "crystal")


def find(name: str | Path, kind: str = "") -> Path:
    """The file meant by `name`: a path, or a packaged file under configs/ (with or without `kind/` and `.yaml`).

    Raises ConfigError when there is none, with the nearest packaged name.
    """
    path = Path(name)
    try:
        if path.is_file():
            return path
    except OSError as error:  # a name that is too long, a folder that is closed to us
        raise ConfigError(f"{name}: {error.strerror}", file=name) from None
    parts = path.parts[1:] if path.parts[:1] == ("configs",) else path.parts
    bare = Path(*parts) if parts and not path.is_absolute() else Path(path.name)
    kinds = [kind] if kind else sorted(p.name for p in CONFIGS.iterdir() if p.is_dir())
    for candidate in (CONFIGS / bare, *(CONFIGS / k / bare for k in kinds)):
        for file in (candidate, candidate.with_name(candidate.name + ".yaml")):
            if file.is_file():
                return file
    names = [p.stem for p in (CONFIGS / kind).glob("*.yaml" if kind else "*/*.yaml")]
    raise ConfigError(f"{name}: no such file{nearest(path.stem, names)}", file=name)


def nearest(word: str, known: Iterable[str]) -> str:
    """`; did you mean 'x'?` for the closest of `known`, or nothing."""
    close = difflib.get_close_matches(str(word), [str(k) for k in known], n=1, cutoff=0.5)
    return f"; did you mean '{close[0]}'?" if close else ""


def load_yaml(path: str | Path) -> Config:
    """Read a YAML mapping and what it `extends`. Raises ConfigError with file and line for bad YAML."""
    return _load(find(path), ())


def _load(path: Path, above: tuple[Path, ...]) -> Config:
    if path.resolve() in above:
        raise ConfigError(f"{path}: extends: expected no circle, but the file extends itself", file=path, key="extends")
    try:
        mapping = yaml.load(path.read_text(encoding="utf-8"), _Loader)  # noqa: S506  a SafeLoader, see above
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        line = f":{mark.line + 1}" if mark else ""
        problem = getattr(error, "problem", None) or getattr(error, "reason", None) or error
        raise ConfigError(f"{path}{line}: expected YAML, {problem}", file=path) from None
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read: {error}", file=path) from None
    if not isinstance(mapping, dict):
        raise ConfigError(f"{path}: expected a mapping of keys, got {type(mapping).__name__}", file=path)
    parents = mapping.pop("extends", [])
    parents = [parents] if isinstance(parents, str) else parents
    if not isinstance(parents, list) or not all(isinstance(parent, str) for parent in parents):
        message = f"{path}: extends: expected the name of a file, or a list of names, got {parents}"
        raise ConfigError(message, file=path, key="extends")
    merged = Config({}, {})
    for parent in parents:
        beside = path.parent / parent
        try:
            file = beside if beside.is_file() else find(parent)
        except ConfigError as error:
            raise ConfigError(f"{path}: extends: {error}", file=path, key="extends") from None
        merged = merge(merged, _load(file, (*above, path.resolve())))
    return merge(merged, Config(mapping, _origins(mapping, os.path.normpath(path))))


def _origins(value: Any, file: str, loc: tuple = ()) -> dict[tuple, str]:
    found = {loc: file}
    items = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, item in items:
        found |= _origins(item, file, (*loc, key))
    return found


def merge(under: Config, over: Config) -> Config:
    """`over` on top of `under`: mappings merge key by key, everything else is replaced."""

    def join(a: Any, b: Any) -> Any:
        if isinstance(a, dict) and isinstance(b, dict):
            return a | {key: join(a[key], value) if key in a else value for key, value in b.items()}
        return b

    mapping = join(under.mapping, over.mapping)
    # what a list that was replaced held before has no place any more
    return Config(mapping, {loc: file for loc, file in (under.origin | over.origin).items() if _holds(mapping, loc)})


def _holds(node: Any, loc: tuple) -> bool:
    for part in loc:
        inside = part in node if isinstance(node, dict) else isinstance(node, list) and part < len(node)
        if not inside:
            return False
        node = node[part]
    return True


def override(config: Config, assignments: Iterable[str]) -> Config:
    """Apply `dotted.key=value` words; the value is YAML, list items go by position or by their `name`."""
    for word in assignments:
        key, equals, text = word.partition("=")
        if not equals or not all(key.split(".")):
            raise ConfigError(f"{word}: expected dotted.key=value")
        try:
            value = yaml.load(text, _Loader)  # noqa: S506  a SafeLoader
        except yaml.YAMLError:
            raise ConfigError(f"{word}: expected a YAML value after '='", key=key) from None
        loc = _locate(config.mapping, key)
        mapping = _put(config.mapping, loc, value)
        origin = {loc[:end]: COMMAND_LINE for end in range(1, len(loc))} | config.origin
        origin |= _origins(value, COMMAND_LINE, loc)
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
                raise ConfigError(f"command line: {dotted}: expected one of {expected} at '{word}'", key=dotted)
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
    Raises ConfigError for the first mistake: `FILE: KEY: what was expected`.
    """
    try:
        # JSON mode: strict about types, but a list may become a tuple and a string a path, as YAML needs.
        return cls.model_validate_json(json.dumps(mapping))
    except pydantic.ValidationError as problem:
        # an unknown key first: a typo also makes the right key "missing", which is not the useful half
        errors = sorted(problem.errors(), key=lambda e: e["type"] != "extra_forbidden")
        error = errors[0]
        loc = (*prefix, *(part for part in error["loc"] if not _is_tag(part, mapping, error["loc"])))
        line = _sentence(cls, error)
        # a section's own check names the key it is about: `n_heads: expected a divisor …`
        key, colon, rest = line.partition(": ")
        known = _fields(cls, error["loc"])
        words = tuple(int(word) if word.isdecimal() else word for word in key.split("."))
        if (
            error["type"] in ("value_error", "union_tag_invalid")
            and colon
            and (isinstance(words[0], int) or words[0] in known)
        ):
            loc, line = (*loc, *words), rest
        file = where if isinstance(where, str) else where.where(loc)
        place = ".".join(map(str, loc))
        raise ConfigError(f"{file}: {place + ': ' if loc else ''}{line}", file=file, key=place or None) from None
    except (TypeError, ValueError) as problem:
        file = where if isinstance(where, str) else where.where(prefix)
        raise ConfigError(f"{file}: {problem}", file=file, key=".".join(map(str, prefix)) or None) from None


def _is_tag(part: Any, mapping: Any, loc: tuple) -> bool:
    """pydantic puts the branch of a union into the location; it is not a key that the user wrote."""
    node: Any = mapping
    for step in loc[: loc.index(part)]:
        try:
            node = node[step]
        except (KeyError, IndexError, TypeError):
            return False
    return isinstance(part, str) and not (isinstance(node, dict) and part in node) and part != loc[-1]


def _sentence(cls: type[pydantic.BaseModel], error: dict) -> str:
    kind, value = error["type"], error.get("input")
    if kind == "extra_forbidden":
        known = _fields(cls, error["loc"][:-1])
        return f"unknown key{nearest(error['loc'][-1], known)}" + (f" (known: {', '.join(known)})" if known else "")
    if kind == "missing":
        return "expected a value, none given"
    if kind in ("value_error", "assertion_error"):
        return str(error["ctx"]["error"])
    if kind == "union_tag_invalid":  # of a section that is one of several kinds, chosen by its `name`
        return f"name: expected one of {error['ctx']['expected_tags']}, got {error['ctx']['tag']!r}"
    message = re.sub(r"^\w+ should (be |have )?", "", error["msg"]).replace("match pattern", "a text that matches")
    shown = json.dumps(value, default=str)
    return f"expected {message}, got {shown if len(shown) < 60 else shown[:57] + '...'}"


def _fields(cls: Any, loc: tuple) -> list[str]:
    """Names of the fields of the section at `loc`, walking through lists, mappings and unions."""
    for part in loc:
        models = [cls] if isinstance(cls, type) else _models(cls)
        holders = [m.model_fields for m in models if hasattr(m, "model_fields")]
        fields = {field.alias or name: field for holder in holders for name, field in holder.items()}
        if part in fields:
            cls = fields[part].annotation
    models = _models(cls)
    return [field.alias or name for m in models for name, field in m.model_fields.items()]


def _models(annotation: Any) -> list:
    if isinstance(annotation, type) and issubclass(annotation, pydantic.BaseModel):
        return [annotation]
    return [m for a in get_args(annotation) for m in _models(a)]
