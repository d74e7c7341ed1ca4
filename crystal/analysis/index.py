"""A searchable index of a token store's training text: suffix arrays in shards, built in bounded memory.

    STORE/index/manifest.json     what this is, of which store, and the sha256 of every other file; written last
    STORE/index/tokenized.N       the documents of shard N, each behind a separator of 0xff bytes; little-endian ids
                                  of 2 bytes, or 4 where the vocabulary is larger than 65,535
    STORE/index/table.N           the suffix array: the byte position of every token, uint32, in the order of the bytes
                                  that follow it
    STORE/index/offset.N          uint64: the byte at which each document begins, with its separator
    STORE/index/metadata.N        a JSON line a document: its line of documents.jsonl; metaoff.N: where each line begins
    STORE/index/unigram.N         how often each token occurs

This is the layout of the `infini-gram` package (version 4), which reads it too. The text is the stream that the store's
training rows were cut from: every document once, as framed ([BOS] ids EOS), the token that two rows share counted once,
and without the end of the stream that no row holds. A separator is no token, so what is found may cross the end of a
row, and never that of a document. Held-out documents are not in it.

Suffixes are sorted as bytes (divsufsort sorts bytes, unsigned), and those that begin inside a token are left out. That
is not the order of the token ids, which are little-endian, but all suffixes that begin with the same tokens stand
together in it, which is all that looking up needs, as long as it compares bytes too.

Memory: a shard of N tokens and separators of w bytes takes w·N for its text and 4·w·N for the suffixes of all its
bytes: 10·N bytes for w = 2, beside what Python itself takes. A shard ends with a document, so N is --shard-tokens, or
the longest document where that is longer. Each shard is written aside, synced and renamed, then noted in shard.N.json;
a build that was killed goes on after the last one noted, and makes the same files.
"""

from __future__ import annotations

import contextlib
import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from crystal.analysis.shards import LARGEST_BYTES, Shard, damage_of, files_of, plan, sorter, stream_end, write_shard
from crystal.checkpoint.seal_file import DIGEST, digest_of, with_digest
from crystal.config import Strict, parse
from crystal.data.store import TokenStore
from crystal.errors import ConfigError, CrystalError, DataError
from crystal.files import cannot_write, dangling, from_json, locked, regular_bytes, sha256_of, write_whole
from crystal.memory import peak_rss_bytes
from crystal.output.progress import Bar

if TYPE_CHECKING:
    from rich.console import Console

SHARD_TOKENS = 1 << 26  # 0.67 GB of memory
_AGAIN = "`crystal data index RUN` builds it again"


class Header(Strict):
    """What an index is of, and how it was cut; indexes of equal headers have equal files."""

    format: Literal[1] = 1
    store: str
    store_manifest_sha256: str
    tokenizer_sha256: str
    token_bytes: Literal[2, 4]
    shard_tokens: int


class Manifest(Header):
    """manifest.json."""

    shards: list[Shard]


class _Note(Header):
    """shard.N.json: a shard that is finished, of an index that is not."""

    shard: Shard


def index_directory(store: TokenStore) -> Path:
    """Where a store's index is."""
    return store.directory / "index"


def header_of(store: TokenStore, shard_tokens: int) -> Header:
    """What an index made now would say it is of."""
    tokenizer = store.manifest["tokenizer"]
    return Header(
        store=store.manifest["fingerprint"],
        store_manifest_sha256=sha256_of(store.directory / "manifest.json"),
        tokenizer_sha256=tokenizer["sha256"],
        token_bytes=2 if tokenizer["vocab_size"] <= 0xFFFF else 4,  # the largest id is the separator
        shard_tokens=shard_tokens,
    )


def read_manifest(directory: Path) -> Manifest | None:
    """An index's manifest; None where there is none. Raises DataError for one that is no
    manifest, was changed since it was written, or lacks a file of a shard."""
    file = directory / "manifest.json"
    try:
        mapping = from_json(regular_bytes(file))
    except FileNotFoundError:
        return None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}", file=file) from None
    except ValueError:
        raise DataError(f"{file}: expected JSON; {_AGAIN}", file=file) from None
    digest = mapping.pop(DIGEST, None) if isinstance(mapping, dict) else None
    if digest is not None and digest != digest_of(mapping):
        raise DataError(f"{file}: expected what has the {DIGEST} that is in it, it was changed; {_AGAIN}", file=file)
    manifest = parse(Manifest, mapping, str(file))
    for number, shard in enumerate(manifest.shards):
        if set(shard.files) != (names := set(files_of(number))):
            what = f"expected {', '.join(sorted(names))}"
            raise DataError(f"{file}: shards.{number}.files: {what}; {_AGAIN}", file=file)
    return manifest


def verify_index(store: TokenStore) -> list[str]:
    """Compare every file of a store's index with its sha256; their names, none where there is no index.

    Raises DataError for the first that is damaged.
    """
    directory = index_directory(store)
    manifest = read_manifest(directory)
    if manifest is None and any(directory.glob("table.*")):
        file = directory / "manifest.json"
        what = dangling(file) or "it is not there: the index is unfinished, or lost it"
        raise DataError(f"{file}: expected the index's manifest: {what}; {_AGAIN}", file=file)
    files = {name: file for shard in manifest.shards for name, file in shard.files.items()} if manifest else {}
    for name, file in files.items():
        if damage := damage_of(directory / name, file):
            message = f"{directory / name}: {damage}; {_AGAIN}"
            raise DataError(message, file=directory / name)
    return list(files)


def build(store: TokenStore, shard_tokens: int | None = None, console: Console | None = None) -> dict:
    """Build the index of a store, or what is missing, damaged or out of date of it; JSON-ready facts about it.

    shard_tokens: most tokens and separators of a shard; None: as many as the index that is there has, or SHARD_TOKENS.
    console: progress. A second process waits for the first. Raises ConfigError for an impossible shard_tokens,
    DataError for a document that is too long, RunError where nothing can be written.
    """
    began, directory = time.perf_counter(), index_directory(store)
    sorter()  # if it is missing, what is there stays
    try:
        directory.mkdir(exist_ok=True)
        with _alone(directory, console):
            header = header_of(store, shard_tokens or _shard_tokens_there(directory))
            most = LARGEST_BYTES // header.token_bytes
            if not 1 <= header.shard_tokens <= most:
                raise ConfigError(f"--shard-tokens: expected 1 to {most:,}, got {header.shard_tokens:,}")
            with Bar(console, "indexing", sum(stream_end(store, source) for source in store.sources)) as bar:
                shards, built = _shards(store, header, directory, bar)
            manifest = Manifest(**header.model_dump(), shards=shards)
            write_whole(directory / "manifest.json", json.dumps(with_digest(manifest.model_dump()), indent=1))
            for note in directory.glob("shard.*.json"):
                note.unlink()
    except OSError as error:
        raise cannot_write(directory, error, "the index") from None
    return {
        "index": str(directory),
        "store": str(store.directory),
        "tokens": sum(shard.tokens for shard in shards),
        "documents": sum(shard.documents for shard in shards),
        "shards": len(shards),
        "built": built,
        "bytes": sum(file.bytes for shard in shards for file in shard.files.values()),
        "seconds": round(time.perf_counter() - began, 3),
        "peak_rss_bytes": peak_rss_bytes(),
    }


@contextlib.contextmanager
def _alone(directory: Path, console: Console | None) -> Iterator[None]:
    """Hold the index's lock; a process that dies lets go of it."""
    lock = directory / ".lock"
    with contextlib.ExitStack() as held:
        try:
            held.enter_context(locked(lock, wait=False))
        except BlockingIOError:
            with Bar(console, "waiting for another process, which builds the index"):
                held.enter_context(locked(lock))
        yield


def _shard_tokens_there(directory: Path) -> int:
    try:
        manifest = read_manifest(directory)
    except CrystalError:  # it is built again
        manifest = None
    return manifest.shard_tokens if manifest else SHARD_TOKENS


def _shards(store: TokenStore, header: Header, directory: Path, bar: Bar) -> tuple[list[Shard], int]:
    """All shards, those that are there and whole as they are; and how many were built."""
    there = _finished(directory, header)
    if there is None:
        _clear(directory)
        there = {}
    shards: list[Shard] = []
    built = 0
    for number, parts in enumerate(plan(store, header.shard_tokens, header.token_bytes)):
        shard = there.get(number)
        if shard is None or shard.parts != parts or not _intact(directory, shard, bar, number):
            bar.what = f"indexing shard {number + 1}"
            shard = Shard(parts=parts, files=write_shard(store, parts, header.token_bytes, directory, number))
            note = _Note(**header.model_dump(), shard=shard)
            write_whole(directory / f"shard.{number}.json", json.dumps(note.model_dump()))
            built += 1
        shards.append(shard)
        bar.advance(shard.tokens)
    return shards, built


def _finished(directory: Path, header: Header) -> dict[int, Shard] | None:
    """The shards that a finished or a killed build of the same header left; None where there is another's, or none."""
    try:
        manifest = read_manifest(directory)
        if manifest is not None:
            same = all(getattr(manifest, key) == value for key, value in header.model_dump().items())
            return dict(enumerate(manifest.shards)) if same else None
        found = {}
        for file in directory.glob("shard.*.json"):
            note = parse(_Note, from_json(regular_bytes(file)), str(file))
            if any(getattr(note, key) != value for key, value in header.model_dump().items()):
                return None
            found[int(file.name.split(".")[1])] = note.shard
    except (CrystalError, ValueError):
        return None
    return found or None


def _clear(directory: Path) -> None:
    """Take everything away but the lock, that which makes it an index first."""
    (directory / "manifest.json").unlink(missing_ok=True)
    for file in directory.iterdir():
        if file.name != ".lock" and file.is_file():
            file.unlink()


def _intact(directory: Path, shard: Shard, bar: Bar, number: int) -> bool:
    bar.what = f"checking shard {number + 1}"
    return not any(damage_of(directory / name, file) for name, file in shard.files.items())
