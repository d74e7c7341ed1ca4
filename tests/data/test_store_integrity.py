"""What a token store is made of is checked on first use, remembered, and refused where it is not what it was."""

from __future__ import annotations

import json
import os
import random
import shutil
from pathlib import Path

import pytest
from command import crystal
from hostile.stores import SAMPLE, copy

from crystal.config import parse
from crystal.data import store_check
from crystal.data.corpus import build as corpus
from crystal.data.corpus.user_files import Reading
from crystal.data.prepare import DataConfig, prepare
from crystal.data.store import SPLITS, TokenStore
from crystal.errors import ConfigError, DataError

WORDS = [*"the a of model tensor width def return import for in range self".split(), *"xy01():=[]"]


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch) -> Path:
    monkeypatch.setenv("CRYSTAL_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def recipe(tmp_path) -> Path:
    rng = random.Random(0)
    lines = [json.dumps({"text": " ".join(rng.choices(WORDS, k=rng.randint(30, 80)))}) + "\n" for _ in range(80)]
    (tmp_path / "english.jsonl").write_text("".join(lines))
    (tmp_path / "tiny.yaml").write_text(
        "name: tiny\nsources: {english: {entries: [{files: english.jsonl, license: MIT}]}}\n"
    )
    return tmp_path / "tiny.yaml"


def prepared(recipe: Path, **changes) -> Path:
    tokenizer = {"train": {"vocab_size": 320, "bytes_per_source": 4000}}
    mapping = {"corpus": str(recipe), "tokenizer": tokenizer, "val_fraction": 0.1} | changes
    return prepare(parse(DataConfig, mapping, "t.yaml"), 32)


def flip(file: Path, at: int = 5) -> None:
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


@pytest.fixture
def reads(monkeypatch) -> list[Path]:
    """The shards that are read from end to end."""
    seen: list[Path] = []
    real = store_check.expect_shard

    def noted(file, *args, **kwargs):
        seen.append(file)
        return real(file, *args, **kwargs)

    monkeypatch.setattr(store_check, "expect_shard", noted)
    return seen


# ------------------------------------------------------------------------------------------------- of 0.1.0


@pytest.mark.parametrize("sealed", [False, True])
def test_a_store_of_0_1_0_gives_what_0_1_0_read_from_it(tmp_path, sealed):
    copy(tmp_path / "store", old=not sealed)
    store = TokenStore.open(tmp_path / "store")
    assert store.manifest["version"] == (2 if sealed else 1)
    assert store.check()
    for source, splits in json.loads((SAMPLE.parent / "expected.json").read_text()).items():
        for split in SPLITS:
            expected = splits[split]
            rows = range(store.rows(source, split))
            assert [store.row(source, r, split).tolist() for r in rows] == expected["rows"]
            found = [[d["id"] for d in store.documents_in_row(source, r, split)] for r in rows]
            assert found == expected["documents_in_row"]
            assert list(store.documents(source, split)) == expected["documents"]
            for ident, rows_of in expected["rows_of_document"].items():
                assert list(store.rows_of_document(ident, split)[1]) == rows_of


def test_a_run_goes_on_with_its_store_of_0_1_0(recipe):
    directory = prepared(recipe)
    manifest = json.loads((directory / "manifest.json").read_text())
    del manifest["seal"]
    content = json.dumps(manifest | {"version": 1}, indent=1)
    (directory / "manifest.json").write_text(content)
    assert prepared(recipe) == directory
    assert (directory / "manifest.json").read_text() == content


# ---------------------------------------------------------------------------------------------- the manifest


def test_what_prepare_makes_is_sealed(recipe):
    directory = prepared(recipe)
    manifest = json.loads((directory / "manifest.json").read_text())
    assert manifest["version"] == 2
    for key in ("bos", "overlap"):
        (directory / "manifest.json").write_text(json.dumps(manifest | {key: False}))
        with pytest.raises(DataError, match=r"manifest\.json: seal: expected .*: the manifest was changed after"):
            TokenStore.open(directory)


@pytest.mark.parametrize("key", ["bos", "overlap", "fingerprint", "corpus"])
def test_a_store_of_0_1_0_whose_manifest_says_another_thing_is_made_again(recipe, key):
    directory = prepared(recipe)
    whole = (directory / "manifest.json").read_bytes()
    manifest = json.loads(whole) | {"version": 1}
    del manifest["seal"]
    manifest[key] = {"fingerprint": "0" * 64, "corpus": {"name": "a", "fingerprint": "b"}}.get(key, False)
    (directory / "manifest.json").write_text(json.dumps(manifest))
    assert prepared(recipe) == directory
    assert (directory / "manifest.json").read_bytes() == whole


# ---------------------------------------------------------------------------------------------------- checks


@pytest.mark.parametrize("file", ["english/train-00000.bin", "english/documents.jsonl", "tokenizer.model"])
def test_what_is_damaged_is_refused_when_it_is_next_used(recipe, file):
    directory = prepared(recipe)
    flip(directory / file)
    before = (directory / file).read_bytes()
    for _ in range(2):
        with pytest.raises(DataError, match=rf"{file}: expected sha256 .*; delete .* makes it again"):
            prepared(recipe)
    with pytest.raises(DataError, match=rf"{file}: expected sha256"):
        prepared(recipe, verify="always")
    assert prepared(recipe, verify="never") == directory
    assert (directory / file).read_bytes() == before
    shutil.rmtree(directory)
    assert prepared(recipe) == directory


def test_a_store_is_read_once_and_then_remembered(recipe, reads):
    directory = prepared(recipe)
    assert len(reads) == 2
    prepared(recipe)
    assert not TokenStore.open(directory).check()
    assert len(reads) == 2
    prepared(recipe, verify="always")
    assert len(reads) == 4
    os.utime(directory / "english" / "val-00000.bin")
    prepared(recipe)
    assert len(reads) == 6


def test_a_large_store_is_read_shard_by_shard_when_each_is_needed(recipe, monkeypatch, reads):
    monkeypatch.setattr(store_check, "WHOLE_BYTES", 0)
    monkeypatch.setattr(store_check, "_SMALL", 0)
    directory = prepared(recipe)
    flip(directory / "english" / "val-00000.bin")
    assert prepared(recipe) == directory
    assert not reads
    for _ in range(2):
        store = TokenStore.open(directory)
        store.row("english", 0)
        store.row("english", 1)
        with pytest.raises(DataError, match=r"val-00000\.bin: expected sha256"):
            store.row("english", 0, "val")
    unchecked = TokenStore.open(directory, verify="never")
    assert len(unchecked.row("english", 0, "val")) == 33
    assert [file.name for file in reads] == ["train-00000.bin", "val-00000.bin"] * 2


def test_what_was_read_is_not_read_again_unless_it_changed(tmp_path, monkeypatch):
    monkeypatch.setattr(store_check, "_SMALL", 0)
    copy(tmp_path / "store", old=True)
    file = tmp_path / "store" / "english" / "documents.jsonl"
    TokenStore.open(tmp_path / "store").documents_file("english")
    monkeypatch.setattr(store_check, "sha256_of", lambda _: pytest.fail("read again"))
    assert TokenStore.open(tmp_path / "store").documents_file("english") == file
    monkeypatch.undo()
    stat = file.stat()
    flip(file)
    os.utime(file, ns=(stat.st_atime_ns, stat.st_mtime_ns))  # the same size and time
    with pytest.raises(DataError, match=r"documents\.jsonl: expected sha256"):
        TokenStore.open(tmp_path / "store").documents_file("english")


def test_a_cache_that_cannot_be_written_remembers_nothing_and_harms_nothing(tmp_path, cache):
    cache.write_text("a file")
    copy(tmp_path / "store", old=False)
    assert TokenStore.open(tmp_path / "store").check()
    assert TokenStore.open(tmp_path / "store").check()


def test_how_a_store_is_checked_makes_no_other_store(recipe):
    assert prepared(recipe) == prepared(recipe, verify="always") == prepared(recipe, verify="never")
    with pytest.raises(ConfigError, match=r"t\.yaml: verify: expected .*first.*always.*never"):
        prepared(recipe, verify="sometimes")


# --------------------------------------------------------------------------------------------- what it is of


def test_a_damaged_vocabulary_in_the_cache_is_refused(recipe, cache):
    directory = prepared(recipe)
    (file,) = (cache / "tokenizers").glob("*.model")
    flip(file, at=40)
    with pytest.raises(DataError, match=rf"{file.name}: expected sha256 .*; delete it to have it made again"):
        prepared(recipe)
    assert [p for p in directory.parent.iterdir() if p.is_dir()] == [directory]
    file.unlink()
    assert prepared(recipe) == directory


def extracted(recipe: Path, cache: Path, monkeypatch) -> tuple[corpus.Recipe, Path]:
    """A corpus as if it came from packages: extracted into cache/corpora."""
    monkeypatch.setattr(corpus, "_copied", lambda source: True)
    loaded = corpus.load_recipe(recipe)
    assert len(list(corpus.documents(loaded, "english", cache))) == 80
    (file,) = (cache / "corpora").glob("*.zst")
    return loaded, file


def test_every_damage_to_an_extracted_corpus_is_found_by_whoever_reads_it(recipe, cache, monkeypatch):
    loaded, file = extracted(recipe, cache, monkeypatch)
    assert corpus.verify(loaded, ["english"], cache) == [str(file)]
    whole, rng = file.read_bytes(), random.Random(1)
    for _ in range(100):
        flip(file, at=rng.randrange(len(whole)))
        with pytest.raises(DataError, match=r"english-\w+\.jsonl\.zst"):
            list(corpus.documents(loaded, "english", cache))
        file.write_bytes(whole)


def test_an_extracted_corpus_of_0_1_0_is_compared_document_by_document(recipe, cache, monkeypatch):
    """It has no checksum of the whole, but each document's id is one."""
    import zstandard

    loaded, file = extracted(recipe, cache, monkeypatch)
    documents = list(corpus.documents(loaded, "english", cache))
    content = zstandard.ZstdDecompressor().stream_reader(file.read_bytes()).read()
    file.write_bytes(zstandard.compress(content))
    assert list(corpus.documents(loaded, "english", cache)) == documents
    file.write_bytes(zstandard.compress(content.replace(b"tensor", b"sensor", 1)))
    with pytest.raises(DataError, match=r"zst:\d+: expected a document of english and its id, found another"):
        list(corpus.documents(loaded, "english", cache))
    file.write_bytes(zstandard.compress(content.replace(b'"license"', b'"licence"', 1)))
    with pytest.raises(DataError, match=r"zst:1: expected a document of english"):
        corpus.verify(loaded, ["english"], cache)


def test_reading_tells_how_far_it_is(recipe, cache, monkeypatch):
    loaded, _ = extracted(recipe, cache, monkeypatch)
    reading = Reading()
    list(corpus.documents(loaded, "english", cache, reading))
    assert reading.share == 1.0


# --------------------------------------------------------------------------------------------- `data verify`


def test_data_verify_repairs_nothing_and_gives_a_verdict(tmp_path, cache):
    from runs import write_run

    run = write_run(tmp_path, tmp_path)
    assert "PASS" in crystal("data", "verify", run).stdout
    (directory,) = (p for p in (tmp_path / "stores").iterdir() if p.is_dir())
    for damage, message in (
        (lambda: flip(directory / "english" / "train-00000.bin"), "train-00000.bin: expected sha256"),
        (lambda: (directory / "english" / "val-00000.bin").unlink(), "val-00000.bin: missing"),
        (lambda: flip(directory / "manifest.json", at=14), "manifest.json"),
    ):
        damage()
        for _ in range(2):
            result = crystal("data", "verify", run, "--json")
            answer = json.loads(result.stdout)
            assert (result.returncode, answer["verdict"], answer["store"]) == (1, "FAIL", str(directory))
            assert message in answer["message"]
