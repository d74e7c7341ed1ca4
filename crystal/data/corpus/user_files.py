"""Files of the user's own as documents: rows of JSON lines, CSV and Parquet, and plain files of text or code.

This is how the real SlimPajama (jsonl.zst, `text`, `meta.redpajama_set_name`) and StarCoder (Parquet, `content`,
`max_stars_repo_path`) come in, and how a folder of one's own notes and programs does. Everything is streamed: no file
is ever held whole.
"""

from __future__ import annotations

import codecs
import csv
import errno
import glob
import json
import os
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from crystal.data.corpus import links
from crystal.data.corpus.lines import MAX_EXPANSION, MAX_LINE, PACKED, Reading, lines, too_large
from crystal.data.corpus.recipe import Entry
from crystal.errors import ConfigError, CrystalError, DataError
from crystal.files import from_json

ROW_FORMATS = (".jsonl", ".ndjson", ".json", ".csv", ".tsv", ".parquet")
_BATCH_BYTES = 1 << 30  # of a table's rows that are unpacked at a time, at most
_PIECE = 32_000  # characters of a plain file that make a document; it is cut at the next empty line
_KINDS = {".gz": "gzip", ".zst": "zstandard", ".parquet": "Parquet"}


def row_format(file: Path) -> str | None:
    """The suffix in ROW_FORMATS of a file that holds rows; None for a plain file, which is text itself."""
    name = file.name.lower()
    for packed in PACKED:  # before which any other suffix but .parquet's may stand
        name = name.removesuffix(packed)
    return next((suffix for suffix in ROW_FORMATS if name.endswith(suffix)), None)


def files(entry: Entry) -> list[tuple[str, Path]]:
    """(name, file) of each file meant by `entry.files`, sorted by name. Of a directory those are its files of rows.

    Names are relative to the directory, or to the part of a glob before its first wildcard, so that they do
    not tell where the data lies. Symbolic links are followed (`crystal.data.corpus.links`). Raises ConfigError when
    there is none, DataError for a link that leads nowhere.
    """
    try:
        return _files(entry)
    except OSError as error:
        raise DataError(f"{entry.files}: cannot be read: {error.strerror}", file=entry.files) from None


def _files(entry: Entry) -> list[tuple[str, Path]]:
    place = Path(entry.files)
    if place.is_dir():
        base, found = place, [p for p in links.files_under(place) if row_format(p)]
        if not found:
            raise ConfigError(f"{place}: expected {', '.join(ROW_FORMATS)} files, {_held_by(place)}")
    elif place.is_file():
        base, found = place.parent, [place]
    else:
        base = next((parent for parent in place.parents if not glob.has_magic(str(parent))), Path())
        if "**" in place.parts and base.is_dir():
            found = links.matches(base, os.path.relpath(place, base))
        else:
            found = links.there(map(Path, glob.glob(entry.files)))
        if not found:
            raise ConfigError(f"{place}: {'matches no file' if glob.has_magic(entry.files) else 'does not exist'}")
    return sorted((file.relative_to(base).as_posix(), file) for file in found)


def _held_by(directory: Path) -> str:
    """What a directory without rows has instead, and how to name it."""
    suffixes = Counter(p.suffix for p in links.files_under(directory))
    if not suffixes:
        return "it has no file"
    (suffix, count), *others = suffixes.most_common()
    kinds = f"{count} files of the kind '{suffix}'" + (f" and {sum(n for _, n in others)} others" if others else "")
    return f"it has {kinds}; name plain files by a glob, such as {directory}/**/*{suffix}"


def rows(entry: Entry, reading: Reading | None = None) -> Iterator[tuple[str, str, str]]:
    """(path, text, licence) of each row that `entry.where` lets through, and of each piece of a plain file.

    The path is "file.jsonl:line" ("file.parquet:row"; both from 1), or "file.jsonl:ID" with `id_key`; of a plain file
    "file.txt", or "file.txt:line" where a piece begins. Raises DataError naming file and line for what gives no
    text, or with `skip_bad` passes over it; and naming the file for one that cannot be read. reading: is told how far
    it is.
    """
    reading = reading or Reading()
    for name, file in files(entry):
        if row_format(file) is None:
            for line, text in plain(file, entry, reading):
                yield f"{name}:{line}" if line else name, text, entry.license
            continue
        for number, row in read(file, entry, reading):
            if any(str(_get(row, key)) != value for key, value in entry.where.items()):
                continue
            text = _get(row, entry.text_key)
            if not isinstance(text, str):
                _refuse(f"{file}:{number}: {_textless(row, entry.text_key)}", entry, reading)
                continue
            ident = _get(row, entry.id_key) if entry.id_key else None
            yield f"{name}:{number if ident is None else ident}", text, _license(entry, row)


def _refuse(message: str, entry: Entry, reading: Reading) -> None:
    if not entry.skip_bad:
        raise DataError(message)
    reading.skip(message)


def _textless(row: Any, key: str) -> str:
    if not isinstance(row, dict):
        return f"expected an object with '{key}', found {_kind(row)}"
    value = _get(row, key)
    if value is None and key not in row:
        return f"expected text under '{key}', found the keys {', '.join(map(str, row)) or '(none)'}"
    return f"expected text under '{key}', found {_kind(value)}"


def _kind(value: Any) -> str:
    if value is None or isinstance(value, bool | int | float):
        return json.dumps(value)
    names = {str: "text", list: "a list", dict: "an object", bytes: "bytes"}
    return names.get(type(value), f"a {type(value).__name__}")


def _license(entry: Entry, row: Any) -> str:
    found = _get(row, entry.license_key) if entry.license_key else None
    if isinstance(found, list):
        found = " OR ".join(map(str, found))
    return str(found) if found else entry.license


def _get(row: Any, key: str) -> Any:
    """row[key], or row[a][b] for the key "a.b"; None where there is none."""
    if isinstance(row, dict) and key in row:
        return row[key]
    for part in key.split("."):
        row = row.get(part) if isinstance(row, dict) else None
    return row


# ------------------------------------------------------------------------------------------------- reading


def read(file: Path, entry: Entry, reading: Reading | None = None, whole: bool = False) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row) of a file of rows. Raises DataError naming the file when it cannot be read.

    whole: with all columns of a table, whether those of the entry are among them or not.
    """
    reading = reading or Reading()
    kind = row_format(file)
    if kind == ".parquet":
        return _told(file, _parquet_rows(file, entry, reading, whole))
    if kind in (".csv", ".tsv"):
        return _told(file, _csv_rows(file, entry, reading, "\t" if kind == ".tsv" else ",", whole))
    return _told(file, _json_rows(file, entry, reading))


def raw_rows(file: Path) -> Iterator[Any]:
    """The rows of a file with all that they hold, bad ones passed over. Raises DataError when it cannot be read."""
    entry = Entry(license="-", files=str(file), skip_bad=True)
    return (row for _, row in read(file, entry, whole=True))


def plain(file: Path, entry: Entry, reading: Reading | None = None) -> Iterator[tuple[int, str]]:
    """(line of its beginning, text) of each piece of a plain file; 0 for a file that is one piece.

    Raises DataError, or with `skip_bad` ends the file there, at the first line that is not UTF-8 text.
    """
    reading = reading or Reading()
    pieces = _told(file, _pieces(file, reading))
    held: list[tuple[int, str]] = []
    try:
        for line, text in pieces:
            yield from held
            held = [(line, text)]
    except NotTextError as error:
        _refuse(str(error), entry, reading)
    yield from ((0 if line == 1 else line, text) for line, text in held)


class NotTextError(ConfigError):
    """A line is not UTF-8 text: of another encoding, or the file is no text at all."""


def _told(file: Path, read: Iterator[tuple[int, Any]]) -> Iterator[tuple[int, Any]]:
    """What `read` gives; every exception that a codec or parser has of its own becomes one line."""
    number = 0
    while True:
        try:
            number, row = next(read)
        except StopIteration:
            return
        except (CrystalError, MemoryError):
            raise
        except Exception as error:  # every codec has exceptions of its own
            raise DataError(f"{file}: {_reason(file, number, error)}") from None
        yield number, row


def _reason(file: Path, number: int, error: Exception) -> str:
    if isinstance(error, OSError) and error.errno is not None:
        return "does not exist" if error.errno == errno.ENOENT else f"cannot be read: {error.strerror}"
    kind, after = _KINDS.get(file.suffix.lower(), "readable"), f" after row {number}" if number else ""
    if isinstance(error, EOFError):
        return f"the file ends too early{after}: is it cut short?"
    with file.open("rb") as stream:
        head = stream.read(8)
    found = f"damage{after}" if number else f"a file that begins with {head!r}" if head else "an empty file"
    return f"expected {kind} data, found {found} ({' '.join(str(error).split())[:200]})"


def _json_rows(file: Path, entry: Entry, reading: Reading) -> Iterator[tuple[int, Any]]:
    blank = 0  # the first of the blank lines just read; at the end of a file they do no harm
    for number, line in enumerate(lines(file, reading), 1):
        if not line.strip():
            blank = blank or number
            continue
        if blank:
            _refuse(f"{file}:{blank}: expected an object with '{entry.text_key}', found a blank line", entry, reading)
            blank = 0
        try:
            row = from_json(line.rstrip())
        except json.JSONDecodeError as error:
            _refuse(f"{file}:{number}: {_no_json(line, number, error)}", entry, reading)
        except UnicodeDecodeError as error:
            _refuse(f"{file}:{number}: {_not_text(error.object[error.start])}", entry, reading)
        except ValueError as error:
            _refuse(f"{file}:{number}: expected a line of JSON ({error})", entry, reading)
        else:
            yield number, row


def _no_json(line: bytes, number: int, error: json.JSONDecodeError) -> str:
    if (number == 1 and line.strip() in (b"[", b"{")) or line.lstrip().startswith(b"[{"):
        return "expected an object a line, found JSON over several lines; `jq -c` puts each on one"
    return f"expected a line of JSON ({error.msg} at column {error.colno})"


def _csv_rows(file: Path, entry: Entry, reading: Reading, delimiter: str, whole: bool) -> Iterator[tuple[int, Any]]:
    csv.field_size_limit(MAX_LINE)  # a document is a field
    number = size = 0

    def row_lines() -> Iterator[str]:
        """Lines of the file, counted since the last row: quoted fields may hold ends of lines, and go on."""
        nonlocal size
        for _, line in _text_lines(file, reading, None):
            size += len(line)
            if size > MAX_LINE:
                raise DataError(f"{file}:{number + 1}: expected a row of at most {MAX_LINE:,} characters, found more")
            yield line

    table = csv.DictReader(row_lines(), delimiter=delimiter, restkey="")
    if not whole:
        _check_columns(file, entry, table.fieldnames or [])
    for row in table:
        number, size = number + 1, 0
        yield number, row


def _check_columns(file: Path, entry: Entry, names: list[str]) -> None:
    if not {entry.text_key, entry.text_key.partition(".")[0]} & set(names):
        listed = ", ".join(names[:20]) + (" …" if len(names) > 20 else "")
        raise DataError(f"{file}: expected a column '{entry.text_key}', found {listed or 'none'}")


def _parquet_rows(file: Path, entry: Entry, reading: Reading, whole: bool) -> Iterator[tuple[int, dict]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        if not whole:
            _check_columns(file, entry, names)
        keys = [entry.text_key, entry.id_key, entry.license_key, *entry.where]
        wanted = {key for key in keys if key} | {key.partition(".")[0] for key in keys if key}
        columns = [name for name in names if whole or name in wanted]
        number, each = 0, file.stat().st_size / max(table.metadata.num_rows, 1)
        most = _rows_at_a_time(file, table.metadata, columns)
        with reading.of(file, lambda: number * each):
            for batch in table.iter_batches(batch_size=most, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    if any(isinstance(value, str | bytes) and len(value) > MAX_LINE for value in row.values()):
                        raise DataError(f"{file}:{number}: expected values of at most {MAX_LINE:,} bytes, found more")
                    yield number, row


def _rows_at_a_time(file: Path, metadata: Any, columns: list[str]) -> int:
    """How many rows of a table may be unpacked together: where a value is stored once for many rows, each of them may
    be as large as all that is stored. Raises DataError where more is stored than the file's size allows for."""
    groups = [metadata.row_group(i) for i in range(metadata.num_row_groups)]
    chunks = [group.column(i) for group in groups for i in range(group.num_columns)]
    chunks = [chunk for chunk in chunks if chunk.path_in_schema.partition(".")[0] in columns]
    size, most = file.stat().st_size, max(MAX_LINE, MAX_EXPANSION * file.stat().st_size)
    if sum(max(chunk.total_uncompressed_size, 0) for chunk in chunks) > most or metadata.num_rows > max(size, MAX_LINE):
        raise too_large(file, 1)
    largest = max((chunk.total_uncompressed_size for chunk in chunks), default=0)
    return min(max(_BATCH_BYTES // max(largest, 1), 1), 256)


def _pieces(file: Path, reading: Reading) -> Iterator[tuple[int, str]]:
    held: list[str] = []
    size, start = 0, 1
    for number, line in _text_lines(file, reading):
        if size >= _PIECE and (not held[-1].strip() or size >= 2 * _PIECE):
            yield start, "".join(held)
            held, size, start = [], 0, number
        held.append(line)
        size += len(line)
    if held:
        yield start, "".join(held)


def _text_lines(file: Path, reading: Reading, most: int | None = 1 << 16) -> Iterator[tuple[int, str]]:
    """(number, line) of a text file, line ends as \\n, without a byte order mark; lines longer than `most` in parts."""
    decoder, number = codecs.getincrementaldecoder("utf-8-sig")(), 1
    for line in lines(file, reading, most):
        try:
            text = decoder.decode(line)
        except UnicodeDecodeError as error:
            raise NotTextError(f"{file}:{number}: {_not_text(error.object[error.start])}") from None
        if "\0" in text:
            raise NotTextError(f"{file}:{number}: {_not_text(0)}")
        if text:
            yield number, text.replace("\r\n", "\n")
        number += line.endswith(b"\n")
    if decoder.getstate()[0]:
        raise NotTextError(f"{file}:{number}: expected UTF-8 text, found half a character at the end")


def _not_text(byte: int) -> str:
    return f"expected UTF-8 text, found the byte 0x{byte:02x}" + (": is it a binary file?" if byte == 0 else "")
