"""manifest.json of a token store: what it says, the bounds that it keeps to, and the seal over all of it.

Version 2 carries a seal, the sha256 of every other key. Stores of 0.1.0 (version 1) have none and are read as they are:
what follows from the rest is compared all the same, here and with the documents (`crystal.data.store_check`).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path, PurePosixPath
from typing import Annotated, Literal

from pydantic import AfterValidator, Field

from crystal.config import Name, Strict, parse
from crystal.data import pack
from crystal.errors import ConfigError, DataError
from crystal.files import from_json

VERSION = 2
SPLITS = ("train", "val")
MAX_BYTES = 1 << 27  # of a manifest; 130 bytes a shard of 268 MB
Amount = Annotated[int, Field(ge=0, lt=1 << 63)]
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]


class Shard(Strict):
    file: str
    rows: Annotated[int, Field(ge=1, lt=1 << 48)]
    sha256: Sha256


class SourceEntry(Strict):
    """One source: counts over its train and val documents; `text_bytes` are UTF-8 bytes of text."""

    licenses: list[str]
    documents: Amount
    val_documents: Amount
    tokens: Amount
    val_tokens: Amount
    text_bytes: Amount
    train_rows: Amount
    val_rows: Amount
    documents_sha256: Sha256
    shards: list[Shard]


def _inside(name: str) -> str:
    if PurePosixPath(name).name != name or not name.startswith("tokenizer"):
        raise ValueError("expected the name of a file in the store, tokenizer.model or tokenizer.json")
    return name


class TokenizerEntry(Strict):
    """The vocabulary of a store; `path` is inside the store."""

    sha256: Sha256
    vocab_size: Annotated[int, Field(ge=1, lt=1 << 32)]
    n_base: Annotated[int, Field(ge=1, lt=1 << 32)]
    added_tokens: bool
    path: Annotated[str, AfterValidator(_inside)]


class CorpusEntry(Strict):
    name: str
    fingerprint: str


class Manifest(Strict):
    """manifest.json."""

    version: Literal[1, 2]
    seq_len: Annotated[int, Field(ge=1, lt=1 << 31)]
    overlap: bool
    bos: bool
    dtype: Literal["uint16", "uint32"]
    tokenizer: TokenizerEntry
    corpus: CorpusEntry
    fingerprint: str
    sources: dict[Name, SourceEntry]
    seal: Sha256 | None = None

    def sealed(self) -> Manifest:
        """This manifest with the seal that it should have."""
        return self.model_copy(update={"seal": self._digest()})

    def problem(self) -> str | None:
        """What does not go together in it, None for nothing."""
        if (self.version == 1) != (self.seal is None):
            return f"version: expected {'1 without' if self.seal is None else '2 with'} a seal, got {self.version}"
        if self.version > 1 and self.seal != self._digest():
            return f"seal: expected {self._digest()}, got {self.seal}: the manifest was changed after it was written"
        if self.dtype != (wanted := pack.token_dtype(self.tokenizer.vocab_size).name):
            return f"dtype: expected {wanted} for {self.tokenizer.vocab_size:,} ids, got {self.dtype}"
        if self.tokenizer.n_base > self.tokenizer.vocab_size:
            return f"tokenizer.n_base: expected at most {self.tokenizer.vocab_size}, got {self.tokenizer.n_base}"
        return self._first_wrong(_shards_wrong)

    def miscount(self) -> str | None:
        """Which rows of a source are not as many as its tokens give, None for none."""
        return self._first_wrong(lambda _, entry: _rows_wrong(entry, self.seq_len, self.overlap))

    def _first_wrong(self, wrong: Callable[[str, SourceEntry], str | None]) -> str | None:
        found = ((name, wrong(name, entry)) for name, entry in self.sources.items())
        return next((f"sources.{name}: {said}" for name, said in found if said), None)

    def _digest(self) -> str:
        said = self.model_dump(mode="json", exclude={"seal"})
        return hashlib.sha256(json.dumps(said, sort_keys=True).encode("utf-8", "surrogatepass")).hexdigest()


def _shards_wrong(name: str, entry: SourceEntry) -> str | None:
    """What is wrong with a source's shards: their rows, or a name that is not the next one."""
    named: dict[str, list[Shard]] = {split: [] for split in SPLITS}
    for shard in entry.shards:
        split = next((s for s in SPLITS if shard.file.startswith(f"{name}/{s}-")), None)
        if split is None:
            return f"shards: expected {name}/train-NNNNN.bin or {name}/val-NNNNN.bin, got {shard.file!r}"
        named[split].append(shard)
    for split, said in (("train", entry.train_rows), ("val", entry.val_rows)):
        if (rows := sum(shard.rows for shard in named[split])) != said:
            return f"expected shards with {said} {split} rows, got {rows}"
        for number, shard in enumerate(named[split]):
            if shard.file != (wanted := f"{name}/{split}-{number:05d}.bin"):
                return f"shards: expected {wanted}, got {shard.file!r}"
    return None


def _rows_wrong(entry: SourceEntry, seq_len: int, overlap: bool) -> str | None:
    most = pack.count_rows(entry.tokens, seq_len, overlap)
    if entry.train_rows != most:
        return f"train_rows: expected {most} of {entry.tokens} tokens, got {entry.train_rows}"
    most = pack.count_rows(entry.val_tokens, seq_len, overlap)
    if entry.val_rows > most:
        return f"val_rows: expected at most {most} of {entry.val_tokens} tokens, got {entry.val_rows}"
    return None


def read_manifest(file: Path) -> Manifest:
    """Read and check manifest.json. Raises DataError naming the file, and the key where it is one."""
    try:
        with file.open("rb") as stream:
            content = stream.read(MAX_BYTES + 1)
        if len(content) > MAX_BYTES:
            raise DataError(f"{file}: expected at most {MAX_BYTES:,} bytes of JSON", file=file)
        mapping = from_json(content.decode("utf-8"))
    except FileNotFoundError:
        raise DataError(f"{file}: not found; `crystal prepare RUN.yaml` makes it", file=file) from None
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}", file=file) from None
    except ValueError:
        raise DataError(f"{file}: expected JSON; run `crystal prepare` again", file=file) from None
    try:
        manifest = parse(Manifest, mapping, str(file))
    except ConfigError as error:  # it is no config of the user's
        raise DataError(str(error), file=file, key=error.key) from None
    if wrong := manifest.problem():
        raise DataError(f"{file}: {wrong}", file=file)
    return manifest
