"""Damaged token stores, from a seed: shards, documents, vocabularies, manifests and links, of 0.1.0 and of today.

Each is read as training reads it: opened, checked for the first time, then every row and document. `fine` is what the
undamaged store gives, to the bit.
"""

import hashlib
import itertools
import json
import os
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from random import Random
from unittest.mock import patch

import numpy as np
from hostile.case import Case, Outcome, judged

from crystal.data.store import SPLITS, Manifest, TokenStore

SAMPLE = Path(__file__).parent.parent / "samples" / "store-0.1.0" / "store"
Damage = Callable[[Path, Random], None]
EITHER = ("refused", "fine")
# keys that no other tells: what follows from a corpus that is not there
_ORIGIN = ("corpus", "fingerprint", "seal", "version")


def cases(seed: int, count: int) -> Iterator[Case]:
    """The first `count` cases of a seed, all kinds in turn, half of them stores as 0.1.0 made them."""
    kinds = [(kind, old) for kind in KINDS for old in (False, True)]
    for i, (kind, old) in enumerate(itertools.islice(itertools.cycle(kinds), count)):
        damage, expected = KINDS[kind]
        yield _case(kind, damage, expected, old, f"{seed}:{i}")


def _case(kind: str, damage: Damage, expected: tuple, old: bool, seed: str) -> Case:
    def run(directory: Path) -> Outcome:
        store = directory / "store"
        copy(store, old)
        with patch.dict(os.environ, CRYSTAL_CACHE=str(directory / "cache")):
            if kind.startswith("later"):
                TokenStore.open(store).check()
            damage(store, Random(seed))
            return judged(lambda: read(store), lambda _, found: found == undamaged())

    return Case(kind, f"{kind}, {'0.1.0' if old else 'sealed'} ({seed})", run, expected)


def copy(store: Path, old: bool) -> None:
    """The sample, as it is or with a seal."""
    shutil.copytree(SAMPLE, store)
    if not old:
        seal(store, json.loads((store / "manifest.json").read_text()))


def seal(store: Path, manifest: dict) -> None:
    """Write a manifest of today's version with the seal that fits."""
    sealed = Manifest.model_validate(manifest | {"version": 2, "seal": "0" * 64}).sealed()
    (store / "manifest.json").write_text(sealed.model_dump_json(indent=1) + "\n")


def read(directory: Path) -> str:
    """A hash of all that a store gives."""
    store = TokenStore.open(directory)
    store.check()
    said = {key: value for key, value in store.manifest.items() if key not in _ORIGIN}
    digest = hashlib.sha256(json.dumps(said, sort_keys=True).encode())
    for source, split in itertools.product(store.sources, SPLITS):
        for row in range(store.rows(source, split)):
            digest.update(store.row(source, row, split).tobytes())
        digest.update(json.dumps(list(store.documents(source, split))).encode())
    return digest.hexdigest()


@cache
def undamaged() -> str:
    return read(SAMPLE)


# ---------------------------------------------------------------------------------------------------- files


def _shard(store: Path, rng: Random) -> Path:
    return rng.choice(sorted(store.glob("*/*.bin")))


def _documents(store: Path, rng: Random) -> Path:
    return rng.choice(sorted(store.glob("*/documents.jsonl")))


def _tokenizer(store: Path, rng: Random) -> Path:
    return store / "tokenizer.model"


def _any(store: Path, rng: Random) -> Path:
    return rng.choice(sorted(p for p in store.rglob("*") if p.is_file()))


def deleted(pick: Callable) -> Damage:
    return lambda store, rng: pick(store, rng).unlink()


def rewritten(pick: Callable, change: Callable[[bytes, Random], bytes]) -> Damage:
    def damage(store: Path, rng: Random) -> None:
        file = pick(store, rng)
        file.write_bytes(change(file.read_bytes(), rng))

    return damage


def cut(content: bytes, rng: Random) -> bytes:
    return content[: rng.randrange(len(content))]


def longer(content: bytes, rng: Random) -> bytes:
    return content + rng.randbytes(rng.randint(1, 100))


def flipped(content: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(content))
    return content[:at] + bytes([content[at] ^ 1 << rng.randrange(8)]) + content[at + 1 :]


def zeroed(content: bytes, rng: Random) -> bytes:
    at = rng.randrange(len(content) - 1)
    end = rng.randint(at + 1, len(content))
    return content[:at] + bytes(end - at) + content[end:]


def rows_swapped(content: bytes, rng: Random) -> bytes:
    rows = np.frombuffer(content, "<u2").reshape(-1, 33).copy()
    a, b = rng.sample(range(len(rows)), 2)
    rows[[a, b]] = rows[[b, a]]
    return rows.tobytes()


def swapped(store: Path, rng: Random) -> None:
    a, b = rng.sample(sorted(store.glob("*/*.bin")) + sorted(store.glob("*/*.jsonl")), 2)
    first, second = a.read_bytes(), b.read_bytes()
    a.write_bytes(second), b.write_bytes(first)


def directory_instead(store: Path, rng: Random) -> None:
    file = _any(store, rng)
    file.unlink()
    file.mkdir()


def dangling(store: Path, rng: Random) -> None:
    file = _any(store, rng)
    file.unlink()
    file.symlink_to("/nowhere/at/all")


def linked(store: Path, rng: Random) -> None:
    file = _any(store, rng)
    file.rename(store.parent / "elsewhere")
    file.symlink_to(store.parent / "elsewhere")


# ------------------------------------------------------------------------------------------------ documents


def by_lines(change: Callable[[list[bytes], Random], list[bytes]]) -> Damage:
    return rewritten(_documents, lambda content, rng: b"".join(change(content.splitlines(True), rng)))


def _reordered(lines: list[bytes], rng: Random) -> list[bytes]:
    a, b = rng.sample(range(len(lines)), 2)
    lines[a], lines[b] = lines[b], lines[a]
    return lines


def _without_one(lines: list[bytes], rng: Random) -> list[bytes]:
    del lines[rng.randrange(len(lines))]
    return lines


def _one_twice(lines: list[bytes], rng: Random) -> list[bytes]:
    at = rng.randrange(len(lines))
    return [*lines[:at], lines[at], *lines[at:]]


def _another_value(lines: list[bytes], rng: Random) -> list[bytes]:
    at = rng.randrange(len(lines))
    document = json.loads(lines[at])
    key = rng.choice(sorted(document))
    document[key] = rng.choice([v for v in ("x", -1, 7, 1 << 70, None, [], {}, 1.5, True, "") if v != document[key]])
    return [*lines[:at], json.dumps(document).encode() + b"\n", *lines[at + 1 :]]


def _not_json(lines: list[bytes], rng: Random) -> list[bytes]:
    at = rng.randrange(len(lines))
    line = rng.choice([b"[" * 100_000, b"null", b"{}", b"\xff", b"", b"9" * 5000, b"x" * (5 << 20)])
    return [*lines[:at], line + b"\n", *lines[at + 1 :]]


# ------------------------------------------------------------------------------------------------- manifest


def in_manifest(change: Callable[[dict, Random], None]) -> Damage:
    def damage(store: Path, rng: Random) -> None:
        manifest = json.loads((store / "manifest.json").read_text())
        change(manifest, rng)
        (store / "manifest.json").write_text(json.dumps(manifest))

    return damage


def _places(node: dict | list, above: tuple = ()) -> Iterator[tuple]:
    """The path of every value in a manifest."""
    for key, value in node.items() if isinstance(node, dict) else enumerate(node):
        yield (*above, key)
        if isinstance(value, dict | list):
            yield from _places(value, (*above, key))


def _at(manifest: dict, rng: Random) -> tuple:
    """(what holds it, its key) of some value that others tell about."""
    place = rng.choice([p for p in _places(manifest) if p[0] not in ("corpus", "fingerprint")])
    node = manifest
    for key in place[:-1]:
        node = node[key]
    return node, place[-1]


def _other_type(manifest: dict, rng: Random) -> None:
    node, key = _at(manifest, rng)
    others = [None, True, 1.5, "x", [], {}, [[]], -1, 10**400]
    node[key] = rng.choice([v for v in others if type(v) is not type(node[key]) or v == 10**400])


def _other_value(manifest: dict, rng: Random) -> None:
    node, key = _at(manifest, rng)
    value = node[key]
    if isinstance(value, bool):
        node[key] = not value
    elif isinstance(value, int):
        node[key] = rng.choice([v for v in (0, 1, 2, value + 1, value - 1, -value, value * 2, 1 << 62) if v != value])
    elif isinstance(value, str):
        node[key] = rng.choice(["", value + "x", value[:-1], "../../etc/passwd", "/etc/passwd", "\0"])
    else:
        value.clear()


def _without(manifest: dict, rng: Random) -> None:
    node, key = _at(manifest, rng)
    del node[key]


def _another_key(manifest: dict, rng: Random) -> None:
    rng.choice([manifest, manifest["tokenizer"], manifest["sources"]["english"]])["sealed"] = 1


def _outside(manifest: dict, rng: Random) -> None:
    path = rng.choice(["../store/tokenizer.model", "english/../tokenizer.model", "/etc/passwd", "..", ".", "a\0b"])
    shard = rng.choice(manifest["sources"]["english"]["shards"])
    if rng.random() < 0.5:
        manifest["tokenizer"]["path"] = path
    elif rng.random() < 0.5:
        shard["file"] = f"english/train-../../english/{shard['file'].rpartition('/')[2]}"
    else:
        manifest["sources"] = {"../store/english": manifest["sources"]["english"]}


def _framing(manifest: dict, rng: Random) -> None:
    key = rng.choice(["bos", "overlap"])
    manifest[key] = not manifest[key]


def _origin(manifest: dict, rng: Random) -> None:
    if rng.random() < 0.5:
        manifest["fingerprint"] = "0" * 64
    else:
        manifest["corpus"][rng.choice(["name", "fingerprint"])] = "other"


def _no_seal(manifest: dict, rng: Random) -> None:
    """As if it were one of 0.1.0, and another value with it."""
    manifest.pop("seal", None)
    manifest["version"] = 1
    rng.choice([_other_value, _framing])(manifest, rng)
    manifest["version"] = 1


def _no_json(content: bytes, rng: Random) -> bytes:
    return rng.choice([b"", b"null", b"[]", b"{", b"[" * 100_000, b"\xff\xfe", b'"x"', b"9" * 5000, b"{}", b"\0" * 99])


def layout(store: Path, rng: Random) -> None:
    """The same values, laid out otherwise."""
    manifest = json.loads((store / "manifest.json").read_text())
    keys = rng.sample(sorted(manifest), len(manifest))
    (store / "manifest.json").write_text(json.dumps({key: manifest[key] for key in keys}, indent=rng.choice([0, 2, 8])))


# ------------------------------------------------------- forged: every checksum is right, and the seal too


def forged(change: Callable[[Path, dict, Random], None]) -> Damage:
    def damage(store: Path, rng: Random) -> None:
        manifest = json.loads((store / "manifest.json").read_text())
        change(store, manifest, rng)
        for name, entry in manifest["sources"].items():
            content = (store / name / "documents.jsonl").read_bytes()
            entry["documents_sha256"] = hashlib.sha256(content).hexdigest()
            for shard in entry["shards"]:
                shard["sha256"] = hashlib.sha256((store / shard["file"]).read_bytes()).hexdigest()
        if manifest["version"] == 1:
            (store / "manifest.json").write_text(json.dumps(manifest))
        else:
            seal(store, manifest)

    return damage


def _ids_outside(store: Path, manifest: dict, rng: Random) -> None:
    file = _shard(store, rng)
    ids = np.fromfile(file, "<u2")
    ids[rng.randrange(len(ids))] = rng.choice([352, 353, 65535])
    file.write_bytes(ids.tobytes())


def _sizes_exchanged(store: Path, manifest: dict, rng: Random) -> None:
    """Two neighbours of documents.jsonl with each other's number of tokens: all sums are right."""
    file = store / "english" / "documents.jsonl"
    documents = [json.loads(line) for line in file.read_text().splitlines()]
    pairs = [i for i in range(44) if documents[i]["tokens"] != documents[i + 1]["tokens"]]
    a, b = documents[(at := rng.choice(pairs))], documents[at + 1]
    a["tokens"], b["tokens"] = b["tokens"], a["tokens"]
    b["start"] = a["start"] + a["tokens"]
    file.write_text("".join(json.dumps(document) + "\n" for document in documents))


def _told_otherwise(store: Path, manifest: dict, rng: Random) -> None:
    entry = rng.choice(list(manifest["sources"].values()))
    if rng.random() < 0.5:
        entry["licenses"] = ["GPL-3.0-only"]
    else:
        entry["text_bytes"] += rng.choice([-1, 1])


def _documents_damaged(store: Path, manifest: dict, rng: Random) -> None:
    rng.choice([by_lines(c) for c in (_without_one, _one_twice, _reordered, _not_json, lambda *_: [])])(store, rng)


REFUSED = ("refused",)
KINDS: dict[str, tuple[Damage, tuple]] = {
    "shard deleted": (deleted(_shard), REFUSED),
    "shard cut": (rewritten(_shard, cut), REFUSED),
    "shard longer": (rewritten(_shard, longer), REFUSED),
    "shard bit flipped": (rewritten(_shard, flipped), REFUSED),
    "shard zeroed": (rewritten(_shard, zeroed), EITHER),  # a zero byte may have been there
    "rows swapped": (rewritten(_shard, rows_swapped), REFUSED),
    "files swapped": (swapped, REFUSED),
    "later: shard bit flipped": (rewritten(_shard, flipped), REFUSED),
    "later: documents bit flipped": (rewritten(_documents, flipped), REFUSED),
    "later: vocabulary bit flipped": (rewritten(_tokenizer, flipped), REFUSED),
    "documents emptied": (rewritten(_documents, lambda *_: b""), REFUSED),
    "documents deleted": (deleted(_documents), REFUSED),
    "documents cut": (rewritten(_documents, cut), REFUSED),
    "documents bit flipped": (rewritten(_documents, flipped), REFUSED),
    "documents reordered": (by_lines(_reordered), REFUSED),
    "document left out": (by_lines(_without_one), REFUSED),
    "document twice": (by_lines(_one_twice), REFUSED),
    "document of other values": (by_lines(_another_value), REFUSED),
    "document no JSON": (by_lines(_not_json), REFUSED),
    "vocabulary deleted": (deleted(_tokenizer), REFUSED),
    "vocabulary of another": (rewritten(_tokenizer, lambda content, rng: rng.randbytes(len(content))), REFUSED),
    "vocabulary bit flipped": (rewritten(_tokenizer, flipped), REFUSED),
    "manifest no JSON": (rewritten(lambda s, _: s / "manifest.json", _no_json), REFUSED),
    "manifest cut": (rewritten(lambda s, _: s / "manifest.json", lambda c, rng: cut(c[:-2], rng)), REFUSED),
    "manifest bit flipped": (rewritten(lambda s, _: s / "manifest.json", flipped), EITHER),  # where a blank is
    "manifest deleted": (deleted(lambda s, _: s / "manifest.json"), REFUSED),
    "manifest of other types": (in_manifest(_other_type), REFUSED),
    "manifest of other values": (in_manifest(_other_value), REFUSED),
    "manifest without a key": (in_manifest(_without), REFUSED),
    "manifest with another key": (in_manifest(_another_key), REFUSED),
    "manifest: bos, overlap": (in_manifest(_framing), REFUSED),
    "manifest: paths outside": (in_manifest(_outside), REFUSED),
    "manifest: origin": (in_manifest(_origin), EITHER),  # of 0.1.0: the rows are the same; `prepare` compares it
    "manifest without its seal": (in_manifest(_no_seal), REFUSED),
    "manifest laid out otherwise": (layout, ("fine",)),
    "a directory for a file": (directory_instead, REFUSED),
    "a link to nothing": (dangling, REFUSED),
    "a link to the file": (linked, ("fine",)),
    "forged: ids outside the vocabulary": (forged(_ids_outside), REFUSED),
    "forged: bos, overlap": (forged(lambda _, manifest, rng: _framing(manifest, rng)), REFUSED),
    "forged: sizes of documents": (forged(_sizes_exchanged), REFUSED),
    "forged: documents damaged": (forged(_documents_damaged), REFUSED),
    "forged: licences, bytes": (forged(_told_otherwise), REFUSED),
}
