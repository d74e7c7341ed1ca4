"""The documents that a run has held out for validation, as texts, from the token store that it was made from."""

from __future__ import annotations

import itertools
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from crystal.curriculum.resolve import resolve
from crystal.data.store import TokenStore
from crystal.data.tokenizer import Tokenizer
from crystal.errors import ConfigError
from crystal.evaluation.stored_text import open_store, parts
from crystal.run import load_run

_WHOLE = 1 << 62  # tokens in a part: documents come undivided


@dataclass(frozen=True)
class Document:
    """id: unique in the source; tokens: of its text, in the run's own vocabulary."""

    id: str
    source: str
    text: str
    tokens: int


@dataclass(frozen=True)
class HeldOut:
    """documents: by source, in the store's shuffled order. fim_sources: those that FIM is applied to in some stage.
    facts: JSON-ready, where the documents are from."""

    documents: dict[str, list[Document]]
    fim_sources: list[str]
    store: TokenStore
    facts: dict


def held_out(run: Path, per_source: int | None) -> HeldOut:
    """The first whole held-out documents of every source, at most per_source of them, None: all.

    Raises ConfigError for what is no run directory, DataError where its store is gone.
    """
    if per_source is not None and per_source < 1:
        raise ConfigError(f"per_source: expected at least 1, got {per_source}", key="per_source")
    if not (run / "config.yaml").is_file():
        raise ConfigError(f"{run}: expected a run directory, there is no config.yaml in it", file=run)
    opened = load_run(run / "config.yaml")
    store = open_store(opened, run)
    curriculum = resolve(opened.config.curriculum, opened.source, store.sources)
    fim = sorted({source for stage in curriculum.stages for source, rate in stage.fim_rates.items() if rate > 0})
    facts = {"store": store.manifest["fingerprint"], "split": "val", "documents_per_source": per_source or "all"}
    tokenizer = store.tokenizer()
    documents = {}
    for source in store.sources:
        whole = (
            _document(source, part.document["id"], part.tokens, tokenizer)
            for part in parts(store, source, "val", _WHOLE)
            if len(part.tokens) == part.document["tokens"]
        )
        documents[source] = list(itertools.islice((d for d in whole if d.text), per_source))
    return HeldOut(documents, fim, store, facts)


def _document(source: str, name: str, tokens: np.ndarray, tokenizer: Tokenizer) -> Document:
    ids = tokens[(tokens != tokenizer.bos_id) & (tokens != tokenizer.eos_id)].tolist()  # no text is encoded as these
    return Document(name, source, tokenizer.decode(ids), len(ids))
