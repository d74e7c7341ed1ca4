"""Reading a store: every damage is named, and the ledger between rows and documents is exact both ways."""

from __future__ import annotations

import hashlib
import json
import tempfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal.data import pack, store
from crystal.data.store import TokenStore
from crystal.data.tokenizer import Tokenizer, train_tokenizer
from crystal.errors import ConfigError, DataError


def written(directory: Path, tokenizer: Tokenizer, sizes: dict[str, list[int]], seq_len: int, overlap: bool) -> Path:
    """A store of one source 'web'; `sizes` are the documents' tokens by split. Token k of a split's stream is k."""
    (directory / "web").mkdir(parents=True)
    dtype = np.dtype("<u2")
    lines, shards, rows = [], [], {}
    for split in ("train", "val"):
        writer = store.ShardWriter(directory, "web", split, seq_len, dtype)
        writer.rows_per_shard = 3
        start = 0
        for number, size in enumerate(sizes[split]):
            place = {"split": split, "start": start, "tokens": size}
            lines.append({"id": f"{split}{number}", "path": "p", "license": "MIT", "bytes": 1} | place)
            start += size
        for block in pack.windows([np.arange(start, dtype=dtype)], seq_len, overlap):
            writer.write(block)
        writer.close()
        shards += writer.shards
        rows[split] = pack.count_rows(start, seq_len, overlap)
    log = directory / "web" / "documents.jsonl"
    log.write_text("".join(json.dumps(line) + "\n" for line in lines))
    (directory / "tokenizer.model").write_bytes(tokenizer.path.read_bytes())
    entry = store.SourceEntry(
        licenses=["MIT"],
        documents=len(sizes["train"]),
        val_documents=len(sizes["val"]),
        tokens=sum(sizes["train"]),
        val_tokens=sum(sizes["val"]),
        text_bytes=len(lines),
        train_rows=rows["train"],
        val_rows=rows["val"],
        documents_sha256=hashlib.sha256(log.read_bytes()).hexdigest(),
        shards=shards,
    )
    manifest = store.Manifest(
        version=1,
        seq_len=seq_len,
        overlap=overlap,
        bos=True,
        dtype="uint16",
        tokenizer=store.TokenizerEntry(
            sha256=tokenizer.sha256, vocab_size=1024, n_base=1000, added_tokens=True, path="tokenizer.model"
        ),
        corpus=store.CorpusEntry(name="c", fingerprint="f"),
        fingerprint="g",
        sources={"web": entry},
    )
    (directory / "manifest.json").write_text(manifest.model_dump_json())
    return directory


@pytest.fixture
def directory(tmp_path, tokenizer):
    """100 training tokens in 4 documents, 30 validation tokens in 2: 12 and 3 rows of 9, in shards of 3."""
    return written(tmp_path / "s", tokenizer, {"train": [40, 30, 10, 20], "val": [12, 18]}, 8, True)


def test_rows_across_shards(directory, tokenizer):
    opened = TokenStore.open(directory, tokenizer)
    assert (opened.seq_len, opened.overlap, opened.sources) == (8, True, ["web"])
    assert opened.rows("web") == 12
    assert opened.rows("web", "val") == 3
    for r in range(12):
        row = opened.row("web", r)
        assert row.dtype == np.int64
        assert row.tolist() == list(range(8 * r, 8 * r + 9))
    assert opened.row("web", 2, "val").tolist() == list(range(16, 25))
    row[:] = 0  # a copy: the store stays as it is
    assert opened.row("web", 11)[0] == 88
    assert opened.tokenizer().sha256 == tokenizer.sha256
    assert opened.manifest["sources"]["web"]["train_rows"] == 12


def test_rows_that_are_not_there(directory):
    opened = TokenStore.open(directory)
    for index in (12, -1):
        with pytest.raises(IndexError, match=f"web has 12 train rows, there is no row {index}"):
            opened.row("web", index)
        with pytest.raises(IndexError, match="web has 12 train rows"):
            opened.documents_in_row("web", index)
    with pytest.raises(ConfigError, match="no source 'wob'; did you mean 'web'"):
        opened.row("wob", 0)
    with pytest.raises(ConfigError, match="no document nobody"):
        opened.rows_of_document("nobody")


def test_verify_lists_every_file(directory):
    names = TokenStore.open(directory).verify()
    files = {p.relative_to(directory).as_posix() for p in directory.rglob("*") if p.is_file()}
    assert set(names) == files - {"manifest.json"}


@pytest.mark.parametrize(
    ("file", "message"),
    [
        ("manifest.json", "manifest.json: not found; `crystal prepare"),
        ("tokenizer.model", "tokenizer.model: missing"),
        ("web/documents.jsonl", "web/documents.jsonl: missing"),
        ("web/train-00001.bin", "web/train-00001.bin: missing"),
    ],
)
def test_a_missing_file_is_named_on_opening(directory, file, message):
    (directory / file).unlink()
    with pytest.raises(DataError, match=message):
        TokenStore.open(directory)


def test_a_wrong_size_is_named_on_opening(directory):
    file = directory / "web" / "val-00000.bin"
    file.write_bytes(file.read_bytes()[:-2])
    with pytest.raises(DataError, match=r"web/val-00000\.bin: expected 54 bytes, got 52"):
        TokenStore.open(directory)


@pytest.mark.parametrize("file", ["web/train-00002.bin", "web/documents.jsonl", "tokenizer.model"])
def test_a_flipped_bit_is_named_by_verify(directory, file):
    content = bytearray((directory / file).read_bytes())
    content[5] ^= 1
    (directory / file).write_bytes(content)
    opened = TokenStore.open(directory)
    with pytest.raises(DataError, match=f"{file}: expected sha256"):
        opened.verify()


def test_a_damaged_manifest_is_named(directory):
    file = directory / "manifest.json"
    good = json.loads(file.read_text())
    for change, message in [
        ({"version": 2}, r"manifest\.json: version"),
        ({"seq_lem": 8}, r"manifest\.json: seq_lem: unknown key; did you mean 'seq_len'"),
        ({"seq_len": 9}, r"train-00000\.bin: expected 60 bytes, got 54"),
    ]:
        file.write_text(json.dumps(good | change))
        with pytest.raises((ConfigError, DataError), match=message):
            TokenStore.open(directory)
    good["sources"]["web"]["shards"].pop(1)
    file.write_text(json.dumps(good))
    with pytest.raises(DataError, match=r"manifest\.json: sources\.web: expected shards with 12 train rows, got 9"):
        TokenStore.open(directory)
    file.write_text("{")
    with pytest.raises(DataError, match=r"manifest\.json: expected JSON"):
        TokenStore.open(directory)


def test_another_tokenizer_is_refused(directory, tokenizer, tmp_path):
    plain = Tokenizer.load(tokenizer.path, added_tokens=False)
    with pytest.raises(DataError, match=r"small\.model: expected the tokenizer of .*added tokens True.*got .*False"):
        TokenStore.open(directory, plain)
    other = train_tokenizer(["another text with other words"], 280, tmp_path / "other.model")
    with pytest.raises(DataError, match=r"other\.model: expected the tokenizer of"):
        TokenStore.open(directory, other)


@settings(max_examples=40, deadline=None)
@given(
    st.lists(st.integers(1, 25), min_size=1, max_size=12),
    st.lists(st.integers(1, 25), max_size=4),
    st.integers(1, 9),
    st.booleans(),
)
def test_the_ledger_is_exact_both_ways(tokenizer, train, val, seq_len, overlap):
    """By brute force: token k of the stream is k, so a row's tokens say which documents it holds."""
    with tempfile.TemporaryDirectory() as folder:
        opened = TokenStore.open(written(Path(folder) / "s", tokenizer, {"train": train, "val": val}, seq_len, overlap))
        for split, sizes in (("train", train), ("val", val)):
            ends = np.cumsum(sizes)
            rows = {r: set(opened.row("web", r, split)) for r in range(opened.rows("web", split))}
            owned = {f"{split}{i}": set(range(e - s, e)) for i, (e, s) in enumerate(zip(ends, sizes, strict=True))}
            assert [d["id"] for d in opened.documents("web", split)] == list(owned)
            for r, tokens in rows.items():
                expected = [i for i, mine in owned.items() if mine & tokens]
                assert [d["id"] for d in opened.documents_in_row("web", r, split)] == expected
            for i, mine in owned.items():
                source, found = opened.rows_of_document(i, split)
                assert source == "web"
                assert list(found) == [r for r, tokens in rows.items() if mine & tokens]
                other = "val" if split == "train" else "train"
                assert opened.rows_of_document(i, other) == ("web", [])
