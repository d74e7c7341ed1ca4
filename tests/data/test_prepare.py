"""From a corpus to a store: repeatable, complete, never half-written."""

from __future__ import annotations

import io
import json
import random

import numpy as np
import pytest
from rich.console import Console

from crystal.config import parse
from crystal.data import pack
from crystal.data import prepare as prepare_module
from crystal.data.corpus import build as corpus
from crystal.data.prepare import DataConfig, prepare
from crystal.data.store import TokenStore
from crystal.errors import ConfigError, DataError

WORDS = [
    *["the", "a", "of", "model", "tensor", "width", "def", "return", "import", "for", "in", "range", "self"],
    *"xy01():=[]",
]


@pytest.fixture
def recipe(tmp_path, monkeypatch):
    """Two sources of 120 and 60 short documents, in a file recipe, with a cache of their own."""
    monkeypatch.setenv("CRYSTAL_CACHE", str(tmp_path / "cache"))
    rng = random.Random(0)
    for name, count in (("english", 120), ("python", 60)):
        lines = [{"text": " ".join(rng.choices(WORDS, k=rng.randint(30, 80)))} for _ in range(count)]
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    entries = "{%s: {entries: [{files: %s.jsonl, license: MIT}]}}"
    sources = ", ".join((entries % (n, n))[1:-1] for n in ("english", "python"))
    path = tmp_path / "tiny.yaml"
    path.write_text(f"name: tiny\nsources: {{{sources}}}\n")
    return path


def config(recipe, **changes) -> DataConfig:
    tokenizer = {"train": {"vocab_size": 320, "bytes_per_source": 4000}}
    return parse(DataConfig, {"corpus": str(recipe), "tokenizer": tokenizer, "val_fraction": 0.1} | changes, "t.yaml")


def content(directory) -> dict[str, bytes]:
    return {p.relative_to(directory).as_posix(): p.read_bytes() for p in directory.rglob("*") if p.is_file()}


def test_rows_hold_the_documents_in_the_order_of_the_log(recipe):
    """Stream of the log, encoded again from the corpus' texts = the rows."""
    for overlap, bos in ((True, True), (False, False)):
        store = TokenStore.open(prepare(config(recipe, overlap=overlap, bos=bos), 32))
        store.verify()
        tokenizer = store.tokenizer()
        loaded = corpus.load_recipe(str(recipe))
        texts = {d.id: d.text for d in corpus.documents(loaded, "english", prepare_module.cache_dir())}
        seen = []
        for split in ("train", "val"):
            stream = []
            for document in store.documents("english", split):
                seen.append(document["id"])
                assert document["start"] == len(stream)
                assert document["license"] == "MIT"
                assert document["path"].startswith("english.jsonl:")
                assert document["bytes"] == len(texts[document["id"]])
                stream += [1] * bos + tokenizer.encode(texts[document["id"]]) + [2]
            rows = store.rows("english", split)
            assert rows == pack.count_rows(len(stream), 32, overlap) > 0
            step = 32 if overlap else 33
            assert [store.row("english", r, split).tolist() for r in range(rows)] == [
                stream[r * step : r * step + 33] for r in range(rows)
            ]
        assert sorted(seen) == sorted(texts)
        assert store.manifest["sources"]["english"]["text_bytes"] == sum(map(len, texts.values()))
        assert store.manifest["sources"]["english"]["licenses"] == ["MIT"]


def test_same_inputs_same_bytes_wherever_they_lie(recipe, tmp_path):
    one = prepare(config(recipe, dir=str(tmp_path / "one")), 32)
    two = prepare(config(recipe, dir=str(tmp_path / "two")), 32)
    assert one.name == two.name
    assert content(one) == content(two)
    other = prepare(config(recipe, dir=str(tmp_path / "one"), shuffle_seed=1), 32)
    assert other != one
    a, b = TokenStore.open(one), TokenStore.open(other)
    assert [d["id"] for d in a.documents("python")] != [d["id"] for d in b.documents("python")]
    assert {d["id"] for d in a.documents("python")} == {d["id"] for d in b.documents("python")}


def test_an_unchanged_run_finds_its_store_without_reading_the_corpus(recipe, monkeypatch):
    first = prepare(config(recipe), 32)
    monkeypatch.setattr(corpus, "documents", lambda *a: pytest.fail("read the corpus again"))
    monkeypatch.setattr(corpus, "build", lambda *a: pytest.fail("built the corpus again"))
    assert prepare(config(recipe), 32) == first


def test_a_changed_input_is_another_store(recipe):
    base = prepare(config(recipe), 32)
    assert prepare(config(recipe), 16) != base
    for change in ({"bos": False}, {"overlap": False}, {"min_tokens": 50}, {"val_rows": 1}):
        assert prepare(config(recipe, **change), 32) != base
    assert prepare(config(recipe), 32, sources=["python"]) != base
    with (recipe.parent / "python.jsonl").open("a") as file:
        file.write(json.dumps({"text": "one more line of text, long enough to count as a document"}) + "\n")
    assert prepare(config(recipe), 32) != base


def test_validation_documents_are_chosen_by_id_and_never_trained_on(recipe):
    wide = TokenStore.open(prepare(config(recipe), 32))
    again = TokenStore.open(prepare(config(recipe, shuffle_seed=5), 16))
    ids = {split: {d["id"] for d in wide.documents("english", split)} for split in ("train", "val")}
    assert ids["val"] == {d["id"] for d in again.documents("english", "val")}
    assert not ids["val"] & ids["train"]
    assert ids["val"] == {i for i in ids["val"] | ids["train"] if pack.hash_fraction("validation", i) < 0.1}


def test_validation_rows_are_capped_and_the_rest_is_trained_on(recipe):
    full = TokenStore.open(prepare(config(recipe), 32))
    capped = TokenStore.open(prepare(config(recipe, val_rows=2), 32))
    assert full.rows("english", "val") > 2
    assert capped.rows("english", "val") == 2
    entries = [s.manifest["sources"]["english"] for s in (full, capped)]
    assert entries[1]["documents"] > entries[0]["documents"]
    assert entries[0]["documents"] + entries[0]["val_documents"] == 120
    assert entries[1]["documents"] + entries[1]["val_documents"] == 120
    none = TokenStore.open(prepare(config(recipe, val_rows=0), 32))
    assert (none.rows("english", "val"), none.manifest["sources"]["english"]["documents"]) == (0, 120)


def prepare_and_listen(data, seq_len) -> tuple[TokenStore, str]:
    """The store, and what the console was told on the way."""
    console = Console(file=io.StringIO(), width=40)
    return TokenStore.open(prepare(data, seq_len, console=console)), console.file.getvalue()


def test_a_small_source_holds_out_the_documents_that_come_first_and_says_so(recipe):
    """A share of a thousandth is no document here; what is held out does not depend on the shuffle or the row."""
    held = []
    for changes, seq_len in (({}, 32), ({}, 100), ({"shuffle_seed": 3}, 100)):
        store, said = prepare_and_listen(config(recipe, val_fraction=0.001, **changes), seq_len)
        ids = {s: {d["id"] for d in store.documents("python", s)} for s in ("train", "val")}
        assert store.rows("python", "val") >= 1
        assert len(ids["train"] | ids["val"]) == 60
        assert not ids["train"] & ids["val"]
        order = sorted(ids["train"] | ids["val"], key=lambda i: pack.hash_fraction("validation", i))
        assert ids["val"] == set(order[: len(ids["val"])])
        held.append(ids["val"])
        assert "python: a small source: documents with" in said
    assert held[0] <= held[1] == held[2]


def test_a_source_of_few_documents_keeps_at_least_as_much_for_training(recipe, tmp_path):
    lines = [json.dumps({"text": " ".join(WORDS[:12]) * n}) for n in (60, 2, 3, 4)]
    (tmp_path / "python.jsonl").write_text("\n".join(lines))
    store = TokenStore.open(prepare(config(recipe, val_fraction=0.001), 16))
    sizes = {s: [d["tokens"] for d in store.documents("python", s)] for s in ("train", "val")}
    assert store.rows("python", "val") >= 1
    assert sum(sizes["val"]) <= sum(sizes["train"])
    assert max(sizes["train"]) > max(sizes["val"])
    (tmp_path / "python.jsonl").write_text(lines[0])
    store, said = prepare_and_listen(config(recipe, val_fraction=0.001), 16)
    assert store.rows("python", "val") == 0
    assert "python: too little text to hold a row of it out: all of it is trained on" in said


def test_too_little_for_a_validation_row_is_trained_on(recipe):
    for changes in ({"val_fraction": 0}, {"val_rows": 0}):
        store = TokenStore.open(prepare(config(recipe, **changes), 32))
        assert store.manifest["sources"]["python"]["val_documents"] == 0
    store = TokenStore.open(prepare(config(recipe), 4000))
    assert store.manifest["sources"]["python"]["val_documents"] == 0
    assert store.manifest["sources"]["python"]["documents"] == 60


def test_documents_without_text_are_counted_and_a_bad_row_is_not_the_tokenizers_fault(recipe, tmp_path):
    with (tmp_path / "python.jsonl").open("a") as file:
        file.write('{"text": ""}\n{"text": " \\n"}\n')
    _, said = prepare_and_listen(config(recipe), 32)
    assert "python: 2 without text passed over; the first: python.jsonl:61: an empty document" in said
    with (tmp_path / "python.jsonl").open("a") as file:
        file.write('{"text": null}\n')
    with pytest.raises(DataError, match=rf"^{tmp_path}/python.jsonl:63: expected text under 'text', found null"):
        prepare(config(recipe), 32)
    (tmp_path / "python.jsonl").write_text('{"text": ""}\n')
    with pytest.raises(DataError, match=r"^source python: all of its 1 documents are without text; the first: pyth"):
        prepare(config(recipe), 32)
    (tmp_path / "python.jsonl").write_text("")
    with pytest.raises(DataError, match=rf"^source python: no document in {tmp_path}/python.jsonl"):
        prepare(config(recipe), 32)


def test_a_source_is_read_up_to_its_max_bytes(recipe):
    whole = TokenStore.open(prepare(config(recipe), 32)).manifest["sources"]["english"]["text_bytes"]
    recipe.write_text(recipe.read_text().replace("{entries", "{max_bytes: 5000, entries"))
    held = TokenStore.open(prepare(config(recipe), 32)).manifest["sources"]["english"]["text_bytes"]
    assert 4000 < held <= 5000 < whole


def test_short_documents_are_dropped(recipe):
    store = TokenStore.open(prepare(config(recipe, min_tokens=130), 32))
    sizes = [d["tokens"] for d in store.documents("english")]
    assert min(sizes) >= 132
    assert len(sizes) < 100


class KilledError(BaseException):
    """Stands for the end of the process."""


@pytest.mark.parametrize("where", ["windows", "sha256_of", "seal"])
def test_a_killed_prepare_leaves_nothing_that_opens_and_the_next_one_finishes(recipe, monkeypatch, where):
    def killed(*args, **kwargs):
        raise KilledError

    with monkeypatch.context() as patch:
        owner = {"windows": pack, "sha256_of": prepare_module, "seal": prepare_module._Build}[where]
        patch.setattr(owner, where, killed)
        patch.setattr(prepare_module.shutil, "rmtree", lambda *a, **k: None)  # as if there were no time for it
        with pytest.raises(KilledError):
            prepare(config(recipe), 32)
    stores = prepare_module.cache_dir() / "stores"
    for left in stores.iterdir():
        if left.is_dir():
            with pytest.raises(DataError):
                TokenStore.open(left)
    directory = prepare(config(recipe), 32)
    TokenStore.open(directory).verify()
    assert [p for p in stores.iterdir() if p.is_dir()] == [directory]


def test_a_damaged_store_is_made_again(recipe):
    directory = prepare(config(recipe), 32)
    before = content(directory)
    (directory / "english" / "train-00000.bin").write_bytes(b"short")
    assert prepare(config(recipe), 32) == directory
    assert content(directory) == before


def test_a_large_source_is_several_shards(recipe, monkeypatch):
    whole = TokenStore.open(prepare(config(recipe), 32))
    monkeypatch.setattr(prepare_module.store, "_SHARD_BYTES", 66 * 50)
    split = TokenStore.open(prepare(config(recipe, dir=str(recipe.parent / "split")), 32))
    assert len(split.manifest["sources"]["english"]["shards"]) > 3
    split.verify()
    rows = split.rows("english")
    assert rows == whole.rows("english")
    for r in range(rows):
        assert np.array_equal(split.row("english", r), whole.row("english", r))


def test_small_batches_give_the_same_store(recipe, monkeypatch):
    whole = content(prepare(config(recipe), 32))
    monkeypatch.setattr(prepare_module, "_BATCH_CHARS", 500)
    assert content(prepare(config(recipe, dir=str(recipe.parent / "again")), 32)) == whole


def test_a_published_tokenizer_is_used_as_it_is(recipe, tokenizer):
    path = {"path": str(tokenizer.path)}
    directory = prepare(config(recipe, tokenizer=path), 32)
    assert TokenStore.open(directory, tokenizer).tokenizer().sha256 == tokenizer.sha256
    plain = prepare(config(recipe, tokenizer=path | {"added_tokens": False}), 32)
    assert plain != directory
    assert TokenStore.open(plain).tokenizer().fim_prefix is None


def test_mistakes_are_one_line(recipe):
    with pytest.raises(ConfigError, match=r"^run\.yaml: data\.corpus: .* no source 'pyhton'; did you mean 'python'"):
        prepare(config(recipe), 32, sources=["pyhton"], where="run.yaml")
    with pytest.raises(DataError, match=r"^run\.yaml: data\.corpus: source 'english' .* expected at least the 100000"):
        prepare(config(recipe), 99_999, where="run.yaml")
    with pytest.raises(ConfigError, match=r"^t\.yaml: tokenizer: .*expected either train: or path:"):
        config(recipe, tokenizer={})
    with pytest.raises(ConfigError, match=r"train: a vocabulary of 9999 .*: this text can fill at most \d+$"):
        prepare(config(recipe, tokenizer={"train": {"vocab_size": 9999, "bytes_per_source": 4000}}), 32, where="t.yaml")
    assert not [p for p in (prepare_module.cache_dir() / "stores").glob("*") if p.is_dir()]
