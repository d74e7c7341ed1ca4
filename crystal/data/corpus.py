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
import signal
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

from pydantic import Field

from crystal.config import ConfigError, Strict, cache_dir, find, load_yaml, nearest, parse
from crystal.data import extract, filters, local, packages
from crystal.data.recipe import Entry, Source


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

    name: str = Field(pattern=r"^[\w.-]+$")
    sources: dict[Annotated[str, Field(pattern=r"^[\w.-]+$")], Source] = Field(min_length=1)

    @property
    def fingerprint(self) -> str:
        """Hex sha256 of the recipe and of every archive and file it reads; fetches what is missing."""
        fetch(self, cache_dir())
        parts = {name: _source_fingerprint(source, cache_dir()) for name, source in self.sources.items()}
        return _digest([self.name, parts])


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
    return entry.model_copy(update={"files": os.path.normpath(base / Path(entry.files).expanduser())})


def fetch(recipe: Recipe, cache: Path) -> None:
    """Have every archive of the recipe in cache/packages, each checked; asks no index for what is there."""
    _fetch(recipe, recipe.sources.values(), cache)


def _fetch(recipe: Recipe, sources: Iterable[Source], cache: Path) -> None:
    packages.fetch([entry for source in sources for entry in source.entries], cache, recipe.name)


def documents(
    recipe: Recipe, source: str, cache: Path, note: Callable[[str], None] = lambda text: None
) -> Iterator[Document]:
    """The documents of one source, in an order that depends on nothing but the recipe and its archives.

    Fetches and extracts what is not yet in the cache. note: is told, at the end, what of the user's own files was
    passed over. Raises ConfigError for an unknown source, for what cannot be fetched or read, and for a source that
    turns out empty.
    """
    if source not in recipe.sources:
        raise ConfigError(f"corpus {recipe.name}: no source '{source}'{nearest(source, recipe.sources)}")
    if not _copied(recipe.sources[source]):
        return _made(source, recipe.sources[source], cache, note)
    build(recipe, cache, [source])
    return _read(_built(source, recipe.sources[source], cache))


def build(recipe: Recipe, cache: Path, sources: list[str] | None = None, processes: int = 1) -> None:
    """Fetch the recipe's packages and extract its sources (or some of them) into cache/corpora.

    With several processes the sources are made side by side. A source that is there already is left alone.
    """
    chosen = {name: recipe.sources[name] for name in sources or recipe.sources}
    _fetch(recipe, chosen.values(), cache)
    missing = [name for name, source in chosen.items() if _copied(source) and not _built(name, source, cache).exists()]
    if not missing:
        return
    from rich.console import Console
    from rich.progress import Progress

    folder = cache / "corpora"
    folder.mkdir(parents=True, exist_ok=True)
    with (
        Progress(console=Console(stderr=True), transient=True) as bar,
        tempfile.TemporaryDirectory(prefix=".partial-", dir=folder) as aside,
    ):
        task = bar.add_task(f"extracting {recipe.name}: {', '.join(missing)}", total=len(missing))
        jobs = [(name, chosen[name], cache, Path(aside) / name) for name in missing]
        for _ in _built_by_workers(jobs, processes) if processes > 1 else map(_build, jobs):
            bar.advance(task)


def _built_by_workers(jobs: list[tuple], processes: int) -> Iterator[None]:
    # spawn: the parent may run threads, which fork does not survive
    spawn = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(processes, spawn, _die_of_interrupt) as pool:
        waiting = {pool.submit(_build, job): job for job in jobs}
        try:
            for done in as_completed(waiting):
                yield done.result()
        except BrokenProcessPool:  # one was killed for its memory, or could not import the main module
            yield from (_build(job) for job in jobs if not _built(*job[:3]).exists())
        finally:
            pool.shutdown(wait=False, cancel_futures=True)


def _die_of_interrupt() -> None:
    signal.signal(signal.SIGINT, signal.SIG_DFL)  # without a word: the parent speaks


def _copied(source: Source) -> bool:
    return any(entry.package for entry in source.entries)


def _built(name: str, source: Source, cache: Path) -> Path:
    return cache / "corpora" / f"{name}-{_source_fingerprint(source, cache)[:16]}.jsonl.zst"


def _build(job: tuple[str, Source, Path, Path]) -> None:
    """Write one source to the file `aside`, then rename it: what is killed half-way is not taken for whole."""
    import zstandard

    name, source, cache, aside = job
    with aside.open("wb") as file:
        with zstandard.ZstdCompressor(level=3).stream_writer(file, closefd=False) as stream:
            for document in _made(name, source, cache):
                stream.write(json.dumps(asdict(document), ensure_ascii=False).encode("utf-8") + b"\n")
        file.flush()
        os.fsync(file.fileno())
    aside.replace(_built(name, source, cache))


def _read(file: Path) -> Iterator[Document]:
    entry = Entry(license="as recorded", files=str(file))
    for _, row in local.read(file, entry):
        yield Document(**row)


def _made(
    name: str, source: Source, cache: Path, note: Callable[[str], None] = lambda text: None
) -> Iterator[Document]:
    """The documents of a source, made from its archives and files."""
    seen = filters.Seen() if _copied(source) else None
    skipped, unfit, total = local.Skipped(), 0, 0
    for entry in source.entries:
        size = 0
        for path, text, license_ in _package(entry, source, cache) if entry.package else local.rows(entry, skipped):
            text = text.encode("utf-8", "replace").decode("utf-8")  # a lone surrogate cannot be written
            if not text.strip():
                skipped.add(f"{path}: an empty document")
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
            ident = hashlib.sha256(f"{name}\0{path}\0{text}".encode()).hexdigest()[:16]
            yield Document(ident, text, name, path, license_)
    if not total:
        raise ConfigError(f"source {name}: {_nothing(source, skipped, unfit)}")
    if skipped.count and not seen:
        note(f"{name}: {skipped.count:,} without text passed over; the first: {skipped.first}")


def _nothing(source: Source, skipped: local.Skipped, unfit: int) -> str:
    if unfit:
        return f"none of its {unfit + skipped.count} documents passes its filter '{source.filter}'"
    if skipped.count:
        return f"all of its {skipped.count} documents are without text; the first: {skipped.first}"
    return f"no document in {', '.join(entry.files or entry.package for entry in source.entries)}"


def _package(entry: Entry, source: Source, cache: Path) -> Iterator[tuple[str, str, str]]:
    file = packages.archive(entry, cache)
    package = "==".join(packages.name_and_version(entry, file))
    excludes = [pattern for pattern in (source.exclude, entry.exclude) if pattern]
    found = packages.members(file, entry.include, excludes)
    if not found:
        raise ConfigError(f"{entry.package}: no member matches include '{entry.include}'")
    if entry.max_bytes:  # only a part is wanted: one spread over the package, not its first letters
        found.sort(key=lambda member: hashlib.sha256(member[0].encode("utf-8", "replace")).digest())
    for path, text in extract.extract(entry, found):
        yield f"{package}/{path}", text, entry.license


def _source_fingerprint(source: Source, cache: Path) -> str:
    """Hex sha256 of what a source is made of. Where the user's files lie does not count, what they hold does."""
    parts = [extract.VERSION, source.model_dump(exclude={"entries"})]
    for entry in source.entries:
        read = [("", packages.archive(entry, cache))] if entry.package else local.files(entry)
        hashes = [(name, packages.sha256(file, cache)) for name, file in read]
        # a key younger than the first corpora counts where it is set, or they would all be made again
        young = set() if entry.skip_bad else {"skip_bad"}
        parts.append([entry.model_dump(exclude={"files", "sha256"} | young), hashes])
    return _digest(parts)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()
