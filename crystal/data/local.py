"""Files of the user's own as documents: JSON lines, plain or compressed by gzip or zstandard, and Parquet.

This is how the real SlimPajama (jsonl.zst, `text`, `meta.redpajama_set_name`) and StarCoder (Parquet,
`content`, `max_stars_repo_path`) come in. Rows are streamed: no file is ever held whole.
"""

from __future__ import annotations

import contextlib
import glob
import gzip
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from crystal.config import ConfigError
from crystal.data.recipe import Entry

_SUFFIXES = (".jsonl", ".json", ".jsonl.gz", ".json.gz", ".jsonl.zst", ".json.zst", ".parquet")


class Reading:
    """How much of some files has been read, for a progress bar: `share` goes from 0 to 1 with their bytes."""

    def __init__(self) -> None:
        self.total = 0
        self._done = 0
        self._at: Callable[[], float] = lambda: 0

    @contextlib.contextmanager
    def of(self, file: Path, at: Callable[[], float]) -> Iterator[None]:
        """While `file` is read; at() is how many of its bytes have been."""
        self._at = at
        yield
        self._done, self._at = self._done + file.stat().st_size, lambda: 0

    @property
    def share(self) -> float:
        return min((self._done + self._at()) / max(self.total, 1), 1.0)


def files(entry: Entry) -> list[tuple[str, Path]]:
    """(name, file) of each data file meant by `entry.files`, sorted by name; a directory is walked.

    Names are relative to the directory, or to the part of a glob before its first wildcard, so that they do
    not tell where the data lies. Raises ConfigError when there is none, or one of a kind that cannot be read.
    """
    place = Path(entry.files)
    if place.is_dir():
        base, found = place, [p for p in place.rglob("*") if p.name.endswith(_SUFFIXES)]
    elif place.is_file():
        base, found = place.parent, [place]
    else:
        base = next((parent for parent in place.parents if not glob.has_magic(str(parent))), Path())
        found = [Path(p) for p in glob.glob(entry.files, recursive=True)]
    found = [file for file in found if file.is_file()]
    if not found:
        raise ConfigError(f"{entry.files}: expected a file, a directory or a glob with data, found none")
    for file in found:
        if not file.name.endswith(_SUFFIXES):
            raise ConfigError(f"{file}: expected one of {', '.join(_SUFFIXES)}")
    return sorted((file.relative_to(base).as_posix(), file) for file in found)


def rows(entry: Entry, reading: Reading | None = None) -> Iterator[tuple[str, str, str]]:
    """(path, text, licence) of each row that `entry.where` lets through. reading: is told how far it is.

    The path is "file.jsonl:line" ("file.parquet:row"; both from 1), or "file.jsonl:ID" with `id_key`.
    Raises ConfigError naming file and line for a row without its text, and for a file that cannot be read.
    """
    for name, file in files(entry):
        for number, row in read(file, entry, reading):
            if any(str(_get(row, key)) != value for key, value in entry.where.items()):
                continue
            text = _get(row, entry.text_key)
            if not isinstance(text, str):
                found = ", ".join(row) if isinstance(row, dict) else type(row).__name__
                raise ConfigError(f"{file}:{number}: expected text under '{entry.text_key}', found {found}")
            ident = _get(row, entry.id_key) if entry.id_key else None
            yield f"{name}:{number if ident is None else ident}", text, _license(entry, row)


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


def read(file: Path, entry: Entry, reading: Reading | None = None) -> Iterator[tuple[int, Any]]:
    """(row number from 1, row) of a data file. Raises ConfigError naming the file when it cannot be read."""
    reading = reading or Reading()
    read = _parquet_rows(file, entry, reading) if file.suffix == ".parquet" else _json_rows(file, reading)
    number = 0
    while True:
        try:
            number, row = next(read)
        except StopIteration:
            return
        except ConfigError:
            raise
        except json.JSONDecodeError as error:
            raise ConfigError(f"{file}:{number + 1}: expected a line of JSON ({error.msg})") from None
        except Exception as error:  # every codec has exceptions of its own, and all mean the same
            raise ConfigError(f"{file}: cannot be read after row {number}: {error}") from None
        yield number, row


def _json_rows(file: Path, reading: Reading) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(_lines(file, reading), 1):
        yield number, json.loads(line) if line.strip() else {}


def _lines(file: Path, reading: Reading) -> Iterator[bytes]:
    if file.suffix != ".zst":
        with file.open("rb") as raw, reading.of(file, raw.tell):
            yield from gzip.GzipFile(fileobj=raw) if file.suffix == ".gz" else raw
        return
    rest = b""
    for chunk in _zstandard_chunks(file, reading):
        *lines, rest = (rest + chunk).split(b"\n")
        yield from lines
    if rest:
        yield rest


def _zstandard_chunks(file: Path, reading: Reading) -> Iterator[bytes]:
    """The content of all frames. The library's own reader takes a file cut short for a whole one."""
    import zstandard

    frame = zstandard.ZstdDecompressor().decompressobj()
    inside = False
    with file.open("rb") as stream, reading.of(file, stream.tell):
        while block := stream.read(1 << 18):
            while block:
                yield frame.decompress(block)
                inside, block = not frame.eof, frame.unused_data if frame.eof else b""
                if frame.eof:
                    frame = zstandard.ZstdDecompressor().decompressobj()
    if inside:
        raise EOFError("the file ends inside a frame")


def _parquet_rows(file: Path, entry: Entry, reading: Reading) -> Iterator[tuple[int, dict]]:
    import pyarrow.parquet

    with pyarrow.parquet.ParquetFile(file) as table:
        names = table.schema_arrow.names
        if not {entry.text_key, entry.text_key.partition(".")[0]} & set(names):
            raise ConfigError(f"{file}: expected a column '{entry.text_key}', found {', '.join(names)}")
        keys = [entry.text_key, entry.id_key, entry.license_key, *entry.where]
        wanted = {key for key in keys if key} | {key.partition(".")[0] for key in keys if key}
        columns = [name for name in names if name in wanted]
        number, each = 0, file.stat().st_size / max(table.metadata.num_rows, 1)
        with reading.of(file, lambda: number * each):
            for batch in table.iter_batches(batch_size=256, columns=columns):
                for row in batch.to_pylist():
                    number += 1
                    yield number, row
