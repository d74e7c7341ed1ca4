"""Token stores written by hand, from token ids; the vocabulary's file is there for its checksum only."""

import hashlib
import json
from pathlib import Path

import numpy as np

from crystal.data import pack
from crystal.data.store import ShardWriter, TokenStore


def write_store(directory: Path, documents: dict[str, list], seq_len: int, overlap: bool, vocab_size: int = 352):
    """A store of the given token ids, {source: [ids of a document, as framed]}; ids are d0, d1 … of each source."""
    directory.mkdir(parents=True)
    (directory / "tokenizer.model").write_bytes(b"none")
    dtype = pack.token_dtype(vocab_size)
    sources = {}
    for source, held in documents.items():
        (directory / source).mkdir()
        lines, start = [], 0
        for i, ids in enumerate(held):
            record = {"id": f"{source}-d{i}", "path": f"{source}.txt", "license": "CC0-1.0", "bytes": 1}
            lines.append(json.dumps(record | {"split": "train", "start": start, "tokens": len(ids)}) + "\n")
            start += len(ids)
        lines.append(json.dumps({"id": f"{source}-v", "split": "val", "start": 0, "tokens": 1}) + "\n")
        index = "".join(lines).encode()
        (directory / source / "documents.jsonl").write_bytes(index)
        writer = ShardWriter(directory, source, "train", seq_len, dtype)
        writer.rows_per_shard = 1 << 14
        for rows in pack.windows([np.asarray(ids, dtype) for ids in held], seq_len, overlap):
            writer.write(rows)
        writer.close()
        sources[source] = {
            "licenses": ["CC0-1.0"], "documents": len(held), "val_documents": 1, "tokens": start, "val_tokens": 1,
            "text_bytes": 1, "train_rows": sum(s.rows for s in writer.shards), "val_rows": 0,
            "documents_sha256": hashlib.sha256(index).hexdigest(), "shards": [s.model_dump() for s in writer.shards],
        }  # fmt: skip
    manifest = {
        "version": 1, "seq_len": seq_len, "overlap": overlap, "bos": True, "dtype": dtype.name,
        "tokenizer": {
            "sha256": hashlib.sha256(b"none").hexdigest(), "vocab_size": vocab_size, "n_base": vocab_size - 32,
            "added_tokens": True, "path": "tokenizer.model",
        },
        "corpus": {"name": "by hand", "fingerprint": "0"}, "fingerprint": "f" * 64, "sources": sources,
    }  # fmt: skip
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return TokenStore.open(directory)


def held_documents(store: TokenStore, documents: dict[str, list]) -> dict[tuple[str, str], list[int]]:
    """{(source, document): its tokens}, as far as rows hold them."""
    held = {}
    for source, all_ids in documents.items():
        step = store.seq_len if store.overlap else store.seq_len + 1
        rows, start = store.rows(source), 0
        end = (rows - 1) * step + store.seq_len + 1 if rows else 0
        for i, ids in enumerate(all_ids):
            if start < end:
                held[source, f"{source}-d{i}"] = list(ids[: end - start])
            start += len(ids)
    return held


def naive_places(held: dict[tuple[str, str], list[int]], ids: list[int]) -> list[tuple[str, str, int]]:
    """(source, document, offset) wherever the tokens stand, by looking at every place."""
    found = []
    for (source, document), tokens in held.items():
        places = range(len(tokens) - len(ids) + 1)
        found += [(source, document, at) for at in places if tokens[at : at + len(ids)] == list(ids)]
    return found
