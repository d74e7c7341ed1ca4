"""Documents + tokenizer → token store: what `crystal prepare RUN.yaml` does.

A store lives in a directory named by a fingerprint of all it depends on, so preparing an unchanged run
finds it and returns. It is written beside its place, synced, and renamed: what is killed half-way never
opens. One process prepares a given store at a time; a second one waits and then finds it.

Memory is bounded whatever the corpus: documents go through in batches, tokens go to disk as they come
(`crystal.data.pack.Spool`), and rows are cut from the spool in shuffled order.

Validation documents are chosen by a hash of their id, so a document is validation in every store or in none
as long as the fraction is the same. When `val_rows` are full the remaining chosen documents are training
documents.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import os
import shutil
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Self

import numpy as np
from pydantic import Field, model_validator

from crystal.config import Seed, Strict, Tally, cache_dir, nearest, within
from crystal.data import holdout, pack, store, store_check
from crystal.data.cached import expect_checksum, made_aside, only_one, write_checksum
from crystal.data.corpus import build as corpus
from crystal.data.corpus import user_files
from crystal.data.tokenizer import Tokenizer, VocabularyError, padded, train_tokenizer
from crystal.errors import ConfigError, CrystalError, DataError
from crystal.files import sha256_of, writing
from crystal.output.progress import Bar, note

if TYPE_CHECKING:
    from rich.console import Console

    from crystal.data.corpus.build import Document, Recipe

_FORMAT = 2  # part of a store's fingerprint: raise it when the same inputs give other rows
_TOKENIZER_FORMAT = 1  # the same for a vocabulary trained here
_BATCH_CHARS = 1 << 21


class TrainTokenizer(Strict):
    """A vocabulary trained here, on a sample of every source."""

    vocab_size: int = Field(ge=300, le=1 << 20, description="pieces to train, before added tokens and padding")
    bytes_per_source: Tally = Field(default=10_000_000, description="text of each source to train on")


class TokenizerConfig(Strict):
    """`train:` one, or the `path:` of a published one (sentencepiece `.model` or `tokenizer.json`)."""

    train: TrainTokenizer | None = None
    path: Path | None = Field(None, description="file of a published vocabulary; null: one is trained")
    added_tokens: bool = Field(True, description="whether CrystalCoder's 22 added tokens follow the vocabulary")

    @model_validator(mode="after")
    def _one_of_two(self) -> Self:
        if (self.train is None) == (self.path is None):
            raise ValueError("expected either train: or path:")
        return self


class DataConfig(Strict):
    """`data:` of a run. The row length comes from the curriculum, the sources from its stages."""

    corpus: str = Field(description="a recipe file, or the name of a packaged one")
    tokenizer: TokenizerConfig
    bos: bool = Field(True, description="whether a document starts with the BOS token")
    overlap: bool = Field(True, description="whether a row starts with the last token of the row before")
    min_tokens: Annotated[int, within(0, 1 << 48)] = Field(
        default=10, ge=0, description="shorter documents are left out"
    )
    val_fraction: float = Field(default=0.01, ge=0, lt=1, description="share of documents held out for validation")
    val_rows: Annotated[int, within(0, 1 << 31)] = Field(
        default=256, ge=0, description="validation rows of each source at most"
    )
    shuffle_seed: Seed = Field(0, description="of the order in which documents are packed into rows")
    dir: Path | None = Field(None, description="where token stores are kept; null: in the cache")
    verify: store.Verify = Field(
        "first", description="when a token store's files are compared with their checksums: on first use, always, never"
    )


def vocab_size(config: TokenizerConfig) -> int | None:
    """How many ids the tokenizer has or will have, added tokens and padding counted; None where its file is missing."""
    if config.train is not None:
        return padded(config.train.vocab_size, config.added_tokens)
    return Tokenizer.load(config.path, added_tokens=config.added_tokens).vocab_size if config.path.is_file() else None


def prepare(
    data: DataConfig,
    seq_len: int,
    *,
    sources: list[str] | None = None,
    where: str = "config",
    console: Console | None = None,
    repair: bool = True,
) -> Path:
    """Make the token store of a run, unless it is there, check it as `data.verify` says, and return its directory.

    seq_len: tokens a row (a stored row has one more, the last label). sources: those to prepare, all by
    default; a tokenizer trained here is trained on them. where: the run's file, for messages. console:
    progress (stderr). repair: a store whose manifest or files are not whole is made again, else left as it
    is. Raises ConfigError for an unknown source, a source too small for one row, or anything wrong with the
    corpus, DataError for a store that does not hold what it should.
    """
    recipe = corpus.load_recipe(data.corpus)
    known = list(recipe.sources)
    names = sorted(set(known if sources is None else sources))
    for name in names:
        if name not in known:
            raise ConfigError(f"{where}: data.corpus: '{data.corpus}' has no source '{name}'{nearest(name, known)}")
    corpus_fingerprint = corpus.fingerprint(recipe, console)
    tokenizer = _tokenizer(data.tokenizer, recipe, corpus_fingerprint, names, where, console)
    for line in tokenizer.notes if console is not None else ():
        note(console, f"{tokenizer.path}: {line}")
    parts = [_FORMAT, corpus_fingerprint, tokenizer.sha256, tokenizer.added_tokens, seq_len, names]
    fingerprint = _digest([*parts, *tokenizer.notes, data.model_dump(exclude={"corpus", "tokenizer", "dir", "verify"})])
    directory = (data.dir or cache_dir() / "stores") / f"{recipe.name}-{seq_len}-{fingerprint[:16]}"
    with only_one(directory, console):
        origin = store.CorpusEntry(name=recipe.name, fingerprint=corpus_fingerprint)
        wanted = {"seq_len": seq_len, "bos": data.bos, "overlap": data.overlap, "fingerprint": fingerprint}
        if not _is_there(directory, tokenizer, wanted | {"corpus": origin.model_dump()}, repair, console):
            corpus.build(recipe, cache_dir(), names, console=console)
            with Bar(console) as bar, made_aside(directory) as partial:
                build = _Build(data, seq_len, recipe, tokenizer, partial, where, bar)
                entries = {name: build.source(name) for name in names}
                build.seal(entries, origin, fingerprint)
        if data.verify != "never":
            _check(store.TokenStore.open(directory, tokenizer), data.verify, console)
    return directory


def _tokenizer(
    config: TokenizerConfig,
    recipe: Recipe,
    corpus_fingerprint: str,
    names: list[str],
    where: str,
    console: Console | None,
) -> Tokenizer:
    """The published vocabulary, or the one trained on the sources `names` (now, if it is not in the cache)."""
    if config.path is not None:
        return Tokenizer.load(config.path, added_tokens=config.added_tokens)
    key = _digest([_TOKENIZER_FORMAT, corpus_fingerprint, names, config.train.model_dump()])
    path = cache_dir() / "tokenizers" / f"{recipe.name}-{config.train.vocab_size}-{key[:16]}.model"
    with only_one(path, console):
        if not path.is_file():
            corpus.build(recipe, cache_dir(), names, console=console)
            with Bar(console) as bar, writing(path):
                texts = _sample(recipe, names, config.train.bytes_per_source, bar)
                try:
                    train_tokenizer(texts, config.train.vocab_size, path, bar)
                except VocabularyError as error:
                    raise ConfigError(f"{where}: data.tokenizer.train: {error}") from None
            write_checksum(path)
        expect_checksum(path)
    return Tokenizer.load(path, added_tokens=config.added_tokens)


def _digest(value: object) -> str:
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


def _sample(recipe: Recipe, sources: list[str], budget: int, bar: Bar) -> Iterator[str]:
    """Texts to train a vocabulary on: of each source those with the smallest hash, up to `budget` bytes."""
    for source in sources:
        bar.begin(f"sampling {source} for the tokenizer", 1)
        reading = user_files.Reading()
        held: list[tuple[float, str, str]] = []  # a heap with the largest hash on top
        size, limit = 0, 1.0
        for number, document in enumerate(corpus.documents(recipe, source, cache_dir(), reading), 1):
            bar.shown = f"{number:,} documents"
            bar.reach(reading.share)
            key = pack.hash_fraction("tokenizer sample", document.id)
            if key >= limit:
                continue
            heapq.heappush(held, (-key, document.id, document.text))
            size += len(document.text.encode("utf-8", "replace"))
            while size > budget and len(held) > 1:
                largest, _, text = heapq.heappop(held)
                size, limit = size - len(text.encode("utf-8", "replace")), -largest
        yield from (text for _, _, text in sorted(held, reverse=True))


class _Build:
    """One store in the making, in the directory `partial`."""

    def __init__(
        self,
        data: DataConfig,
        seq_len: int,
        recipe: Recipe,
        tokenizer: Tokenizer,
        partial: Path,
        where: str,
        bar: Bar,
    ) -> None:
        self.data, self.seq_len, self.recipe, self.tokenizer = data, seq_len, recipe, tokenizer
        self.partial, self.where, self.bar = partial, where, bar
        self.dtype = pack.token_dtype(tokenizer.vocab_size)

    def source(self, name: str) -> store.SourceEntry:
        """Tokenize, shuffle and pack one source; returns its manifest entry."""
        data, seq_len, overlap = self.data, self.seq_len, self.data.overlap
        (self.partial / name).mkdir()
        train = pack.Spool(self.partial / f".{name}.train", data.shuffle_seed, self.dtype)
        val = pack.Spool(self.partial / f".{name}.val", data.shuffle_seed, self.dtype)
        small = holdout.Small()
        bos = self.tokenizer.bos_id if data.bos else None
        for document, ids in self._tokenized(name):
            if len(ids) < data.min_tokens:
                continue
            record = {"id": document.id, "path": document.path, "license": document.license}
            record["bytes"] = len(document.text.encode("utf-8", "replace"))
            fraction = pack.hash_fraction("validation", document.id)
            tokens = pack.frame(ids, bos, self.tokenizer.eos_id, self.dtype)
            (val if fraction < data.val_fraction else train).add(record, tokens)
            if val.tokens <= seq_len and fraction >= data.val_fraction:
                small.add(fraction, document.id, len(tokens))

        if data.val_fraction and data.val_rows and val.tokens <= seq_len:
            train, said = holdout.hold_out(train, val, small, seq_len + 1)
            self.bar.note(f"{name}: {said}")
        wanted = pack.span_of_row(data.val_rows - 1, seq_len, overlap).stop if data.val_rows else 0
        held_out, taken = [], 0
        enough = val.tokens > seq_len  # fewer would be no row: then all are training documents
        for record, tokens in val.shuffled():
            if enough and taken < wanted:
                held_out.append((record, tokens))
                taken += len(tokens)
            else:
                train.add(record, tokens)

        log = _Log(self.partial / name / "documents.jsonl")
        self.bar.begin(f"{name}: packing", train.tokens + taken)
        shards = self._write(name, "train", log.each("train", train.shuffled()), None)
        shards += self._write(name, "val", log.each("val", held_out), data.val_rows)
        log.close()
        rows = {s: sum(shard.rows for shard in shards if f"/{s}-" in shard.file) for s in store.SPLITS}
        if not rows["train"]:
            raise DataError(
                f"{self.where}: data.corpus: source '{name}' of '{data.corpus}' has {train.tokens} tokens, "
                f"expected at least the {seq_len + 1} of one row"
            )
        self.bar.note(
            f"{name}: train {log.documents['train']:,} documents, {log.tokens['train']:,} tokens, "
            f"{rows['train']:,} rows; val {log.documents['val']:,} documents, {rows['val']:,} rows"
        )
        return store.SourceEntry(
            licenses=sorted(log.licenses),
            documents=log.documents["train"],
            val_documents=log.documents["val"],
            tokens=log.tokens["train"],
            val_tokens=log.tokens["val"],
            text_bytes=log.text_bytes,
            train_rows=rows["train"],
            val_rows=rows["val"],
            documents_sha256=sha256_of(log.path),
            shards=shards,
        )

    def seal(self, entries: dict[str, store.SourceEntry], origin: store.CorpusEntry, fingerprint: str) -> None:
        """Put the vocabulary and, last, the manifest in place."""
        name = f"tokenizer{self.tokenizer.path.suffix}"
        shutil.copyfile(self.tokenizer.path, self.partial / name)
        with open(self.partial / name, "rb") as file:
            os.fsync(file.fileno())
        manifest = store.Manifest(
            version=store.VERSION,
            seq_len=self.seq_len,
            overlap=self.data.overlap,
            bos=self.data.bos,
            dtype=self.dtype.name,
            tokenizer=store.TokenizerEntry(
                sha256=self.tokenizer.sha256,
                vocab_size=self.tokenizer.vocab_size,
                n_base=self.tokenizer.n_base,
                added_tokens=self.tokenizer.added_tokens,
                path=name,
            ),
            corpus=origin,
            fingerprint=fingerprint,
            sources=entries,
        ).sealed()
        with open(self.partial / "manifest.json", "w", encoding="utf-8") as file:
            file.write(manifest.model_dump_json(indent=1) + "\n")
            store.flush(file)

    def _tokenized(self, name: str) -> Iterator[tuple[Document, list[int]]]:
        """Documents with their ids; one batch is tokenized while the next is read."""
        self.bar.begin(f"{name}: tokenizing", 1)
        reading, read = user_files.Reading(), 0
        pool = ThreadPoolExecutor(1)
        try:
            waiting: tuple[list[Document], Future] | None = None
            for batch in _batches(corpus.documents(self.recipe, name, cache_dir(), reading)):
                ahead = batch, pool.submit(self.tokenizer.encode_many, [document.text for document in batch])
                if waiting:
                    yield from zip(waiting[0], waiting[1].result(), strict=True)
                waiting = ahead
                read += len(batch)
                self.bar.shown = f"{read:,} documents"
                self.bar.reach(reading.share)
            if waiting:
                yield from zip(waiting[0], waiting[1].result(), strict=True)
            if reading.skipped:
                self.bar.note(f"{name}: {reading.skipped:,} without text passed over; the first: {reading.first}")
        finally:
            pool.shutdown(wait=False, cancel_futures=True)  # whoever interrupts does not wait for a batch

    def _write(self, name: str, split: str, stream: Iterable[np.ndarray], limit: int | None) -> list[store.Shard]:
        writer = store.ShardWriter(self.partial, name, split, self.seq_len, self.dtype)
        written = 0
        for rows in pack.windows(stream, self.seq_len, self.data.overlap):
            kept = rows if limit is None else rows[: limit - written]
            writer.write(kept)
            written += len(kept)
            self.bar.reach(min(self.bar.completed + kept.size, self.bar.total))  # rows overlap by a token
        writer.close()
        return writer.shards


class _Log:
    """Writes documents.jsonl while the documents pass by on their way into rows."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.documents = dict.fromkeys(store.SPLITS, 0)
        self.tokens = dict.fromkeys(store.SPLITS, 0)
        self.text_bytes = 0
        self.licenses: set[str] = set()
        self._file = open(path, "w", encoding="utf-8")  # noqa: SIM115  closed by close()

    def each(self, split: str, documents: Iterable[tuple[dict, np.ndarray]]) -> Iterator[np.ndarray]:
        for record, tokens in documents:
            place = {"split": split, "start": self.tokens[split], "tokens": len(tokens)}
            self._file.write(json.dumps(record | place, ensure_ascii=False) + "\n")
            self.documents[split] += 1
            self.tokens[split] += len(tokens)
            self.text_bytes += record["bytes"]
            self.licenses.add(record["license"])
            yield tokens

    def close(self) -> None:
        store.flush(self._file)
        self._file.close()


def _batches(documents: Iterable[Document]) -> Iterator[list[Document]]:
    batch: list[Document] = []
    size = 0
    for document in documents:
        batch.append(document)
        size += len(document.text)
        if size >= _BATCH_CHARS:
            yield batch
            batch, size = [], 0
    if batch:
        yield batch


def _is_there(directory: Path, tokenizer: Tokenizer, wanted: dict, repair: bool, console: Console | None) -> bool:
    """Whether the store is there with its files, made of what is `wanted`; one that is not is made again."""
    if not repair or not directory.exists():
        return directory.exists()
    try:
        manifest = store.TokenStore.open(directory, tokenizer).manifest
        for key, value in wanted.items():
            if manifest[key] != value:
                raise DataError(f"{directory / 'manifest.json'}: {key}: expected {value}, got {manifest[key]}")
    except CrystalError as error:
        if console is not None:
            note(console, f"{error}: the token store is made again")
        return False
    return True


def _check(made: store.TokenStore, verify: store.Verify, console: Console | None) -> None:
    if verify == "first" and made.bytes > store_check.WHOLE_BYTES:  # each shard is checked when it is first read
        return
    try:
        made.check(verify == "always", console)
    except DataError as error:
        again = f"delete {made.directory} and `crystal prepare RUN.yaml` makes it again"
        raise DataError(f"{error}; {again}", file=error.file) from None
