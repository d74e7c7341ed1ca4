"""documents.jsonl of a token store: read once and compared with the manifest, then looked up."""

from __future__ import annotations

import hashlib
from bisect import bisect_left, bisect_right
from pathlib import Path

from crystal.data.store_manifest import SPLITS, SourceEntry
from crystal.errors import DataError
from crystal.files import from_json

MAX_LINE = 1 << 22  # bytes of a document's line: an id, a path, a licence and numbers
_KINDS = {"id": str, "tokens": int, "start": int}
_TOLD = {"path": str, "license": str, "bytes": int}  # which every line has that `crystal prepare` wrote


class Documents:
    """The documents of one source and split: starts and ids in memory, the rest read when asked for."""

    def __init__(self, file: Path) -> None:
        self.file = file
        self.starts: list[int] = []
        self.lines: list[int] = []
        self.position: dict[str, int] = {}
        self.again: dict[str, list[int]] = {}  # of an id that several documents have, all but the first
        self.tokens = self.text_bytes = 0
        self.licenses: set[str] = set()
        self.told = True  # where each document is from

    def add(self, document: dict, offset: int) -> None:
        """Take in the next document, whose line begins at byte `offset`."""
        if self.position.setdefault(document["id"], len(self.starts)) != len(self.starts):
            self.again.setdefault(document["id"], []).append(len(self.starts))
        self.starts.append(document["start"])
        self.lines.append(offset)
        self.tokens += document["tokens"]
        self.text_bytes += document.get("bytes", 0)
        self.licenses.add(document.get("license", ""))
        self.told = self.told and _TOLD.keys() <= document.keys()

    def get(self, document_id: str) -> list[dict]:
        """All documents with this id, in token order."""
        first = [self.position[document_id]] if document_id in self.position else []
        return [self._read(i, i + 1)[0] for i in first + self.again.get(document_id, [])]

    def between(self, start: int, stop: int | None) -> list[dict]:
        """Documents with a token at one of the stream positions start ... stop-1."""
        first = max(0, bisect_right(self.starts, start) - 1)
        return self._read(first, len(self.starts) if stop is None else bisect_left(self.starts, stop))

    def _read(self, first: int, last: int) -> list[dict]:
        if last <= first:
            return []
        with open(self.file, "rb") as file:
            file.seek(self.lines[first])
            return [from_json(file.readline()) for _ in range(first, last)]


def read_documents(file: Path, entry: SourceEntry, checksum: bool = True) -> dict[str, Documents]:
    """split → its documents. checksum: whether the whole file's sha256 is compared.

    Raises DataError naming the line where one is damaged or not where the last one ended, and the file where it does
    not hold what the manifest says.
    """
    found = {split: Documents(file) for split in SPLITS}
    digest, offset, began = hashlib.sha256(), 0, SPLITS[0]
    with open(file, "rb") as lines:
        for number, line in enumerate(iter(lambda: lines.readline(MAX_LINE + 1), b""), 1):
            document = _document(line)
            split = document["split"] if document else None
            if (
                document is None
                or SPLITS.index(split) < SPLITS.index(began)
                or document["start"] != found[split].tokens
            ):
                raise DataError(f"{file}:{number}: damaged at byte {offset}; see `crystal data verify RUN`", file=file)
            found[split].add(document, offset)
            digest.update(line)
            began, offset = split, offset + len(line)
    for split, said in (("train", (entry.documents, entry.tokens)), ("val", (entry.val_documents, entry.val_tokens))):
        got = len(found[split].starts), found[split].tokens
        if got != said:
            wanted = f"expected {said[0]:,} {split} documents with {said[1]:,} tokens"
            raise DataError(f"{file}: {wanted}, got {got[0]:,} with {got[1]:,}", file=file)
    if checksum and digest.hexdigest() != entry.documents_sha256:
        raise DataError(f"{file}: expected sha256 {entry.documents_sha256}, got {digest.hexdigest()}", file=file)
    return found


def _document(line: bytes) -> dict | None:
    """The document that a line says, None where it says none."""
    try:
        document = from_json(line) if len(line) <= MAX_LINE else None
    except ValueError:
        return None
    if not isinstance(document, dict) or document.get("split") not in SPLITS:
        return None
    if any(type(document.get(key)) is not kind for key, kind in _KINDS.items()):
        return None
    if any(type(document[key]) is not kind for key, kind in _TOLD.items() if key in document):
        return None
    return document if document["tokens"] >= 1 and document.get("bytes", 0) >= 0 else None
