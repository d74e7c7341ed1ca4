"""Readers for formats in which a document is not a file: dictionaries, bibles, novels and fact books.

Each takes the (path, content) members of a package and gives (path, text) documents of a useful length: runs
of dictionary entries, one chapter, one book.
"""

from __future__ import annotations

import gzip
import html
import itertools
import json
import re
import string
import struct
import zlib
from collections.abc import Iterable, Iterator

Members = list[tuple[str, bytes]]
Documents = Iterator[tuple[str, str]]

_DOCUMENT_CHARS = 8000  # dictionary entries are gathered up to about this length
_BASE64 = string.ascii_uppercase + string.ascii_lowercase + string.digits + "+/"
_TAG = re.compile(r"<[^>]+>")


def verses(members: Members) -> Documents:
    """JSON lines of {book, chapter, verse, text} → one document a chapter, a line a verse."""
    for path, content in members:
        rows = map(json.loads, content.decode("utf-8").splitlines())
        for (book, chapter), group in itertools.groupby(rows, lambda row: (row["book"], row["chapter"])):
            lines = [f"{book} {chapter}", "", *(row["text"] for row in group)]
            yield f"{path}#{book}-{chapter}", "\n".join(lines)


def dictd(members: Members) -> Documents:
    """dictd databases: NAME.dict.dz holds entries, NAME.index their (word, offset, length) in base 64."""
    files = dict(members)
    for path in (path for path in files if path.endswith(".index")):
        data = gzip.decompress(files[path.removesuffix(".index") + ".dict.dz"])
        lines = (line.split("\t") for line in files[path].decode("utf-8", "replace").split("\n"))
        spans = sorted(
            {
                (_dictd_number(f[1]), _dictd_number(f[2]))
                for f in lines
                if len(f) >= 3 and not f[0].startswith(("00-database", "00database"))
            }
        )
        yield from _gathered(path, _dictd_entries(data, spans))


def _dictd_number(digits: str) -> int:
    number = 0
    for digit in digits:
        number = number * 64 + _BASE64.index(digit)
    return number


def _dictd_entries(data: bytes, spans: list[tuple[int, int]]) -> Iterator[str]:
    end = 0
    for offset, length in spans:
        if offset >= end:  # several words may share an entry
            end = offset + length
            entry = data[offset:end].decode("utf-8", "replace").strip("\n")
            yield re.sub(r"[{}]", "", re.sub(r"\n\s*\[(1913 Webster|PJC|WordNet 1\.5)[^\]]*\]", "", entry))


def wordnet(members: Members) -> Documents:
    """WordNet's data.{noun,verb,adj,adv}: a synset becomes `words (noun): gloss`."""
    for path, content in members:
        part = {"adj": "adjective", "adv": "adverb"}.get(kind := path.rpartition(".")[2], kind)
        yield from _gathered(path, _synsets(content.decode("utf-8", "replace"), part), "\n")


def _synsets(text: str, part: str) -> Iterator[str]:
    for line in text.split("\n"):
        head, bar, gloss = line.partition("|")
        if bar and not line.startswith("  "):
            fields = head.split()
            words = fields[4 : 4 + 2 * int(fields[3], 16) : 2]
            shown = ", ".join(word.replace("_", " ").partition("(")[0] for word in words)
            yield f"{shown} ({part}): {gloss.strip()}"


def _gathered(path: str, entries: Iterable[str], between: str = "\n\n") -> Documents:
    held, size, number = [], 0, 0
    for entry in entries:
        held.append(entry)
        size += len(entry)
        if size >= _DOCUMENT_CHARS:
            yield f"{path}#{number}", between.join(held)
            held, size, number = [], 0, number + 1
    if held:
        yield f"{path}#{number}", between.join(held)


def sword(members: Members) -> Documents:
    """SWORD zText and zCom modules: X.bzz is zlib blocks of OSIS XML, X.bzs their (offset, length, size)."""
    files = dict(members)
    for path in (path for path in files if path.endswith("zs")):
        blocks = files[path.removesuffix("s") + "z"]
        for number, (offset, length, _) in enumerate(struct.iter_unpack("<III", files[path])):
            if length:
                osis = zlib.decompress(blocks[offset : offset + length]).decode("utf-8", "replace")
                for chapter, text in enumerate(re.split(r'<chapter\b[^>]*sID="[^"]*"[^>]*/>', osis)):
                    yield f"{path}#{number}.{chapter}", _osis_text(text)


def _osis_text(osis: str) -> str:
    osis = re.sub(r"(?s)<note\b.*?</note>", "", osis)
    osis = re.sub(r"(?s)<title[^>]*>(.*?)</title>", r"\n\n\1\n\n", osis)
    osis = re.sub(r'<div [^>]*eID="[^"]*"[^>]*/>|</?lb/?>|<l [^>]*eID[^>]*/>', "\n", osis)
    text = re.sub(r"[ \t]+", " ", html.unescape(_TAG.sub("", osis)).replace("\x00", ""))
    return re.sub(r"\n{3,}", "\n\n", re.sub(r" ?\n ?", "\n", text)).strip()


def rdata(members: Members) -> Documents:
    """Character vectors in an R lazy-load database (.rdb): a vector is a document, a string a line.

    A record is a big-endian length and a zlib stream of R serialisation version 3: a 14-byte head, the name
    of the encoding, the vector's type and length, then strings of (flags, length, bytes).
    """
    for path, content in members:
        at = 0
        while at < len(content):
            stream = zlib.decompressobj()
            record = stream.decompress(content[at + 4 :])
            start = 14 + 4 + struct.unpack_from(">I", record, 14)[0]
            yield f"{path}@{at}", "\n".join(_r_strings(record, start))
            at = len(content) - len(stream.unused_data)


def _r_strings(record: bytes, start: int) -> Iterator[str]:
    count = struct.unpack_from(">I", record, start + 4)[0]
    at = start + 8
    for _ in range(count):
        length = max(0, struct.unpack_from(">i", record, at + 4)[0])  # -1: not available
        yield record[at + 8 : at + 8 + length].decode("utf-8", "replace")
        at += 8 + length


def factbook(members: Members) -> Documents:
    """The CIA World Factbook as nested JSON: one country a file, `heading: text` a line."""
    for path, content in members:
        yield path, "\n".join(_facts(json.loads(content), 0)).strip()


def _facts(node: dict, depth: int) -> Iterator[str]:
    for key, value in node.items():
        if isinstance(value, dict) and isinstance(value.get("text"), str):
            text = html.unescape(_TAG.sub("", value["text"])).replace("++", "\n").strip()
            if text:
                yield f"{key}: {text}"
        elif isinstance(value, dict):
            yield key if depth else f"\n{key}"
            yield from _facts(value, depth + 1)


READERS = {
    "verses": verses,
    "dictd": dictd,
    "wordnet": wordnet,
    "sword": sword,
    "rdata": rdata,
    "factbook": factbook,
}
