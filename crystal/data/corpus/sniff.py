"""What a user's files are: sources of text found by looking at them, each with its files, keys and size."""

from __future__ import annotations

import itertools
import re
from collections import Counter, defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from crystal.config import MAX_NAME, RESERVED
from crystal.data.corpus import links, user_files
from crystal.errors import ConfigError, DataError

LANGUAGES = {  # plain files by suffix; code is what FIM and StarCoder's rules are for
    "text": "txt text md markdown rst tex org",
    "python": "py pyi",
    "javascript": "js mjs cjs jsx",
    "typescript": "ts tsx",
    "html": "html htm xhtml",
    "css": "css scss less",
    "c": "c h",
    "cpp": "cc cpp cxx hh hpp",
    "java": "java",
    "rust": "rs",
    "go": "go",
    "ruby": "rb",
    "php": "php",
    "shell": "sh bash zsh",
    "sql": "sql",
    "perl": "pl pm",
    "lua": "lua",
    "julia": "jl",
    "r": "r",
    "kotlin": "kt",
    "swift": "swift",
    "scala": "scala",
}
_LANGUAGE_OF = {f".{suffix}": name for name, suffixes in LANGUAGES.items() for suffix in suffixes.split()}
_TEXT_KEYS = "text content body code raw_content markdown document article story".split()
_ID_KEYS = "id _id doc_id uuid url path max_stars_repo_path file_path".split()
_LICENSE_KEYS = "license licence spdx".split()
_SAMPLED_FILES, _SAMPLED_ROWS = 3, 50
# bytes of text for a byte of file, roughly: what a curriculum's length is chosen by
_UNPACKED = {".gz": 3.0, ".zst": 3.5, ".parquet": 2.5}


@dataclass
class Found:
    """Files of one kind under one directory: an entry of a recipe. keys: text_key, id_key, license_key, where found."""

    files: str
    count: int
    size: int  # bytes of text, an estimate where files are packed
    format: str
    keys: dict[str, str] = field(default_factory=dict)


def sources_of(paths: Iterable[Path]) -> tuple[dict[str, list[Found]], Counter]:
    """({source: entries}, suffixes of files passed over with their numbers).

    Files of rows make a source for each directory below a path, plain files one for each language. Raises ConfigError
    for a path that does not exist, files that cannot be read, rows without text, and where there is no text at all.
    """
    sources: dict[str, list[Found]] = defaultdict(list)
    passed_over: Counter = Counter()
    for path in paths:
        if not path.exists():
            raise ConfigError(f"--data: {path} does not exist", file=path)
        for (source, glob), files in sorted(_groups(path, passed_over).items()):
            filled = [file for file in files if file.stat().st_size]
            if not filled:
                passed_over["empty"] += len(files)
                continue
            kind = user_files.row_format(filled[0])
            keys = _keys(filled) if kind else {}
            size = round(sum(f.stat().st_size * _UNPACKED.get(f.suffix.lower(), 1.0) for f in filled))
            sources[source].append(Found(glob, len(filled), size, kind or filled[0].suffix, keys))
    if not sources:
        found = ", ".join(f"{count} {name}" for name, count in passed_over.most_common(5)) or "none"
        shown, kinds = ", ".join(map(str, paths)), " ".join(user_files.ROW_FORMATS)
        raise ConfigError(f"--data: {shown}: expected files of rows ({kinds}) or text, found {found}")
    return dict(sorted(sources.items())), passed_over


def is_code(source: str) -> bool:
    """Whether a source is named for a programming language."""
    return source in LANGUAGES and source != "text"


def _groups(path: Path, passed_over: Counter) -> dict[tuple[str, str], list[Path]]:
    """(source, what a recipe calls its files) → files."""
    groups: dict[tuple[str, str], list[Path]] = defaultdict(list)
    base = path.resolve()
    for file in [base] if base.is_file() else links.files_under(base, hidden=False):
        suffix = _whole_suffix(file)
        rows = user_files.row_format(file) is not None
        language = None if rows else _LANGUAGE_OF.get(f".{suffix.split('.')[1]}" if suffix else "")  # .txt of .txt.gz
        if not rows and language is None:
            passed_over[suffix or "without suffix"] += 1
            continue
        if base.is_file():
            groups[language or _name(file.name.removesuffix(suffix)), str(base)].append(file)
            continue
        inside = file.relative_to(base).parts
        top = base / inside[0] if len(inside) > 1 and not language else base
        depth = "**/" if language or len(inside) > 1 else ""
        groups[language or _name(top.name), f"{top}/{depth}*{suffix}"].append(file)
    return groups


def _whole_suffix(file: Path) -> str:
    """The suffix with what it is packed in: .jsonl.zst, .txt.gz."""
    packed = file.suffix.lower() in (".gz", ".zst")
    return "".join(file.suffixes[-2:]) if packed else file.suffix


def _name(text: str) -> str:
    """A source's name: letters, digits, dots, underscores and dashes, without a shard's number."""
    plain = re.sub(r"[^A-Za-z0-9._-]+", "-", text)
    name = re.sub(r"[-_.]*\d+([-_.]*of[-_.]*\d+)?$", "", plain).strip("-_.").lower() or plain.strip("-_.") or "data"
    name = name[:MAX_NAME]
    return name.replace(".", "-") if name.lower() in RESERVED else name


def _keys(files: list[Path]) -> dict[str, str]:
    """text_key, id_key and license_key of files of rows, from the first rows. Raises ConfigError where none is text."""
    rows = [
        row for file in files[:_SAMPLED_FILES] for row in itertools.islice(user_files.raw_rows(file), _SAMPLED_ROWS)
    ]
    flat = [_flat(row) for row in rows if isinstance(row, dict)]
    if not flat:
        raise DataError(f"{files[0]}: expected rows with named values, found {'none' if not rows else 'others'}")
    names = list(dict.fromkeys(name for row in flat for name in row))
    lengths = {
        name: sum(len(row[name]) for row in flat if isinstance(row.get(name), str))
        for name in names
        if sum(_is_text(row.get(name)) for row in flat) * 2 >= len(flat)
    }
    if not lengths:
        raise DataError(f"{files[0]}: expected a column of text, found {', '.join(names) or 'no columns'}")
    text = next((key for key in _TEXT_KEYS if key in lengths), max(lengths, key=lengths.get))
    found = {"text_key": text}
    ids = [key for key in _ID_KEYS if key != text and all(isinstance(row.get(key), str | int) for row in flat)]
    unique = [key for key in ids if len({row[key] for row in flat}) == len(flat)]
    licensed = [key for key in _LICENSE_KEYS if key != text and any(row.get(key) for row in flat)]
    return found | ({"id_key": unique[0]} if unique else {}) | ({"license_key": licensed[0]} if licensed else {})


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and any(map(str.isalpha, value))


def _flat(row: dict[str, Any]) -> dict[str, Any]:
    """Values of a row, those of a mapping in it under dotted names."""
    flat = dict(row)
    for name, value in row.items():
        if isinstance(value, dict):
            flat |= {f"{name}.{inner}": v for inner, v in value.items()}
    return flat
