"""The index: it finds what looking at every place finds, whatever its shards, and a killed build goes on."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from token_stores import held_documents, naive_places, write_store

from crystal.analysis import lookup
from crystal.analysis.index import build, index_directory, verify_index
from crystal.analysis.lookup import Index
from crystal.errors import ConfigError, DataError, RunError
from crystal.files import locked

HERE = str(Path(__file__).parent)


def places(index, ids, limit=None):
    return [(hit.source, hit.document["id"], hit.offset) for hit in index.positions(ids, limit)]


def test_a_case_worked_out_by_hand(tmp_path):
    """Rows of 4 + 1 tokens that share one: the stream 1 7 8 9 2 1 7 8 2 1 5 2 makes rows 0-4 and 4-8; 1 5 2 is left."""
    store = write_store(tmp_path / "s", {"a": [[1, 7, 8, 9, 2], [1, 7, 8, 2], [1, 5, 2]]}, 4, overlap=True)
    assert store.rows("a") == 2
    facts = build(store)
    assert (facts["tokens"], facts["documents"], facts["shards"]) == (9, 2, 1)
    index = Index.open(store)
    assert index.count([7, 8]) == 2
    assert places(index, [7, 8]) == [("a", "a-d0", 1), ("a", "a-d1", 1)]
    assert [hit.position for hit in index.positions([7, 8])] == [1, 6]
    assert places(index, [8, 9, 2]) == [("a", "a-d0", 2)], "it crosses the end of no document, though a row ends in it"
    assert index.count([2, 1]) == 0, "a match ends where its document does"
    assert index.count([2]) == 2, "the token that two rows share is counted once"
    assert index.count([5]) == 0, "no row holds it"
    assert index.ends([7, 8, 9, 5, 8, 2]) == [3, 3, 3, 3, 6, 6]
    assert index.spans([7, 8, 9, 5, 8, 2], 2) == [(0, 3), (4, 6)]
    assert [index.unigram(i) for i in (1, 7, 9, 5, 65535)] == [2, 2, 1, 0, 0]
    begins = np.fromfile(index.directory / "offset.0", "<u8")
    assert begins.tolist() == [0, 12]
    text = np.fromfile(index.directory / "tokenized.0", "<u2")
    assert text.tolist() == [65535, 1, 7, 8, 9, 2, 65535, 1, 7, 8, 2]
    table = np.fromfile(index.directory / "table.0", "<u4")
    assert table.tolist() == sorted(range(0, 22, 2), key=lambda at: text.tobytes()[at:])


# few tokens make repeats; 256 and 513 differ from 1 and 258 in the order of their bytes alone
TOKENS = st.lists(st.sampled_from([1, 2, 3, 256, 258, 513]), min_size=1, max_size=40)
PERIODIC = st.builds(lambda ids, n: ids * n, st.lists(st.sampled_from([1, 2, 256]), min_size=1, max_size=3),
                     st.integers(1, 12))  # fmt: skip
DOCUMENTS = st.dictionaries(st.sampled_from("abc"), st.lists(TOKENS | PERIODIC, min_size=1, max_size=8), min_size=1)


@settings(max_examples=40)
@given(
    documents=DOCUMENTS, seq_len=st.integers(1, 9), overlap=st.booleans(), shard_tokens=st.integers(1, 60),
    wide=st.booleans(), data=st.data(),
)  # fmt: skip
def test_it_finds_what_looking_at_every_place_finds(documents, seq_len, overlap, shard_tokens, wide, data):
    with tempfile.TemporaryDirectory() as place, patch("crystal.files.sync"):
        if wide:  # 65537 is its own second half and first: a place inside a token looks like one
            documents = {s: [[65537 if i == 1 else i for i in ids] for ids in all_] for s, all_ in documents.items()}
        store = write_store(Path(place, "s"), documents, seq_len, overlap, vocab_size=70_000 if wide else 1024)
        held = held_documents(store, documents)
        if not held:
            return
        build(store, shard_tokens)
        index = Index.open(store)
        assert index.tokens == sum(map(len, held.values()))
        tokens = data.draw(st.sampled_from(sorted(held.values())))
        start = data.draw(st.integers(0, len(tokens) - 1))
        inside = tokens[start : start + data.draw(st.integers(1, 12))]
        for ids in (inside, [*inside, 999], data.draw(TOKENS), tokens[-3:] + tokens[:3]):
            expected = naive_places(held, ids)
            assert index.count(ids) == len(expected)
            assert places(index, ids) == expected
            assert len(places(index, ids, 2)) == min(len(expected), 2)
        query = data.draw(st.lists(st.sampled_from([inside, [999], [2, 1], tokens]), min_size=1, max_size=4))
        query = [i for part in query for i in part]
        with patch.object(lookup, "_FIRST_REACH", 3):
            ends = index.ends(query)
        for i, end in enumerate(ends):
            assert end == i or naive_places(held, query[i:end])
            assert end == len(query) or not naive_places(held, query[i : end + 1])
        assert ends == index._ends_by_counting(query)


@pytest.mark.parametrize("vocab_size", [352, 70_000])
def test_infini_gram_reads_it_and_counts_the_same(tmp_path, vocab_size):
    pytest.importorskip("infini_gram")
    rng = np.random.default_rng(0)
    documents = {"a": [rng.integers(3, 30, 60).tolist() for _ in range(30)]}
    store = write_store(tmp_path / "s", documents, 16, True, vocab_size)
    assert build(store, 125)["shards"] > 11, "more than ten, whose names do not sort like numbers"
    own, theirs = Index.open(store), Index.open(store, engine="infini-gram")
    for _ in range(60):
        ids = documents["a"][rng.integers(30)][: rng.integers(1, 5)]
        assert theirs.count(ids) == own.count(ids) >= 0
        assert places(theirs, ids) == places(own, ids)
    text = [*documents["a"][3][5:30], 999, *documents["a"][7][:20]]
    assert theirs.spans(text, 4) == own.spans(text, 4)


KILLED = """
import os, signal, sys
sys.path.insert(0, {here!r})
from crystal.analysis import index, shards
from crystal.data.store import TokenStore
left = {writes}
original = shards._write
def dying(path, chunks):
    global left
    left -= 1
    if left < 0:
        with path.with_name(".tmp-" + path.name).open("wb") as file:
            file.write(next(iter(chunks))[:5])
        os.kill(os.getpid(), signal.SIGKILL)
    return original(path, chunks)
def no_manifest(path, content):
    if path.name == "manifest.json":
        os.kill(os.getpid(), signal.SIGKILL)
    whole(path, content)
whole = index.write_whole
shards._write, index.write_whole = dying, no_manifest
index.build(TokenStore.open({store!r}), 100)
"""


@pytest.mark.parametrize("writes", [0, 15, 1000], ids=["at once", "in the third shard", "before the manifest"])
def test_a_build_that_is_killed_goes_on_and_makes_the_same_files(tmp_path, writes):
    rng = np.random.default_rng(1)
    documents = {s: [rng.integers(3, 300, 40).tolist() for _ in range(8)] for s in "ab"}
    whole, killed = (write_store(tmp_path / name, documents, 8, overlap=False) for name in ("whole", "killed"))
    build(whole, 100)
    script = KILLED.format(here=HERE, writes=writes, store=str(killed.directory))
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -signal.SIGKILL
    with pytest.raises(DataError, match="no index yet"):
        Index.open(killed)
    facts = build(killed, 100)
    assert facts["built"] == facts["shards"] - min(writes // 6, facts["shards"])
    names = {path.name for path in index_directory(whole).iterdir()}
    assert {path.name for path in index_directory(killed).iterdir()} == names
    for name in names:
        assert (index_directory(killed) / name).read_bytes() == (index_directory(whole) / name).read_bytes(), name


MEASURED = """
import sys
sys.path.insert(0, {here!r})
from crystal.analysis.index import build
from crystal.data.store import TokenStore
from crystal.memory import peak_rss_bytes
import pydivsufsort
store = TokenStore.open({store!r})
before = peak_rss_bytes()
print(build(store, {tokens})["peak_rss_bytes"] - before)
"""


def test_memory_is_that_of_a_shard_not_of_the_text(tmp_path):
    """10 bytes a token of a shard, beside the mapped store and what is copied at a time."""
    ids = np.random.default_rng(0).zipf(1.3, 2_000_000) % 30_000 + 3
    store = write_store(tmp_path / "s", {"a": np.split(ids, 500)}, 256, overlap=True, vocab_size=32_000)
    peaks = {}
    for tokens in (250_000, 2_100_000):
        script = MEASURED.format(here=HERE, store=str(store.directory), tokens=tokens)
        run = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
        peaks[tokens] = int(run.stdout)
    besides = 2 * 2_000_000 + 12e6
    assert peaks[250_000] < 10 * 250_000 + besides
    assert 8 * 2_000_000 < peaks[2_100_000] < 10 * 2_000_500 + besides


@pytest.fixture
def indexed(tmp_path):
    store = write_store(tmp_path / "s", {"a": [[5, 6, 7, 8] * 10, [9, 6, 7] * 20]}, 8, overlap=True)
    build(store, 50)
    return store


def test_building_again_only_checks(indexed):
    before = {p.name: p.stat().st_mtime_ns for p in index_directory(indexed).glob("table.*")}
    facts = build(indexed)
    assert (facts["built"], facts["shards"]) == (0, 2)
    assert {p.name: p.stat().st_mtime_ns for p in index_directory(indexed).glob("table.*")} == before
    assert build(indexed, 1000)["shards"] == 1, "another shard size is another index"
    assert not (index_directory(indexed) / "table.1").exists()


def test_a_damaged_shard_is_named_and_built_again(indexed):
    file = index_directory(indexed) / "table.1"
    good = file.read_bytes()
    file.write_bytes(good[:8] + bytes(4) + good[12:])
    with pytest.raises(DataError, match=r"table\.1: expected sha256 .*; `crystal data index demo` builds it again"):
        Index.open(indexed, "demo")
    file.write_bytes(good[:-4])
    with pytest.raises(DataError, match=rf"table\.1: expected {len(good)} bytes, got {len(good) - 4}"):
        Index.open(indexed)
    file.unlink()
    with pytest.raises(DataError, match=r"table\.1: missing from the index"):
        Index.open(indexed)
    assert build(indexed)["built"] == 1
    assert file.read_bytes() == good
    assert Index.open(indexed).count([6, 7]) == 29


def test_a_large_index_is_compared_by_size_and_says_so(indexed, monkeypatch):
    assert Index.open(indexed).verified
    monkeypatch.setattr(lookup, "CHECKED_BYTES", 10)
    assert not Index.open(indexed).verified


def test_a_store_that_changed_makes_it_stale(indexed):
    file = indexed.directory / "manifest.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"fingerprint": "e" * 64}))
    store = type(indexed).open(indexed.directory)
    with pytest.raises(DataError, match=r"stale: store: expected the store's eeee.*`crystal data index demo` builds"):
        Index.open(store, "demo")
    assert build(store)["built"] == 2
    assert Index.open(store).count([5, 6]) == 10


def _first_shard(mapping):
    return mapping["shards"][0]


CHANGES = {
    "a file that is not listed": lambda m: _first_shard(m)["files"].pop("table.0"),
    "a size": lambda m: _first_shard(m)["files"]["table.0"].update(bytes=1),
    "a shard gone": lambda m: m["shards"].pop(),
    "a shard's tokens": lambda m: _first_shard(m)["parts"][0].update(tokens=7),
    "shards in another order": lambda m: m["shards"].reverse(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_a_manifest_that_was_changed_is_refused_and_built_again(indexed, change):
    file = index_directory(indexed) / "manifest.json"
    good = file.read_bytes()
    mapping = json.loads(good)
    CHANGES[change](mapping)
    file.write_text(json.dumps(mapping))
    for read in (Index.open, verify_index):
        with pytest.raises(DataError, match=r"index/manifest\.json: .*sha256.*`crystal data index RUN`"):
            read(indexed)
    build(indexed, 50)
    assert file.read_bytes() == good


def test_a_manifest_without_a_digest_is_read_and_must_list_all_files(indexed):
    """Those of 0.1.0 have none."""
    file = index_directory(indexed) / "manifest.json"
    mapping = json.loads(file.read_text())
    del mapping["sha256"]
    file.write_text(json.dumps(mapping))
    assert len(verify_index(indexed)) == 12
    del mapping["shards"][1]["files"]["offset.1"]
    file.write_text(json.dumps(mapping))
    with pytest.raises(DataError, match=r"manifest\.json: shards\.1\.files: expected .*offset\.1"):
        verify_index(indexed)


@pytest.mark.parametrize("lose", [os.remove, lambda file: (file.unlink(), file.symlink_to("nowhere"))],
                         ids=["gone", "a link to nothing"])  # fmt: skip
def test_an_index_that_lost_its_manifest_does_not_pass_for_none(indexed, lose):
    lose(index_directory(indexed) / "manifest.json")
    with pytest.raises(DataError, match=r"index/manifest\.json: expected the index's manifest"):
        verify_index(indexed)


@pytest.mark.parametrize("content", ["{", "{}", '{"format": 9}', "[]"])
def test_a_manifest_that_is_none_is_refused_and_replaced(indexed, content):
    (index_directory(indexed) / "manifest.json").write_text(content)
    with pytest.raises((DataError, ConfigError), match=r"index/manifest\.json"):
        Index.open(indexed)
    build(indexed)
    assert Index.open(indexed).count([5, 6]) == 10


def test_a_second_build_waits_for_the_first(indexed):
    with locked(index_directory(indexed) / ".lock"):
        waiting = threading.Thread(target=build, args=(indexed,))
        waiting.start()
        waiting.join(0.5)
        assert waiting.is_alive()
    waiting.join(20)
    assert not waiting.is_alive()


def test_tokens_outside_the_vocabulary_are_nowhere(indexed):
    index = Index.open(indexed)
    assert [index.count([i]) for i in (-1, 65535, 65536, 1 << 40)] == [0, 0, 0, 0]
    assert index.ends([5, 6, 1 << 40, 6, 7]) == [2, 2, 2, 5, 5]
    with pytest.raises(ValueError, match="at least one token"):
        index.count([])


def test_what_cannot_be_built_says_why(indexed, tmp_path, monkeypatch):
    with pytest.raises(ConfigError, match=r"--shard-tokens: expected 1 to 1,073,741,823, got 2,000,000,000"):
        build(indexed, 2_000_000_000)
    with (
        patch.dict(sys.modules, {"pydivsufsort": None}),
        pytest.raises(ConfigError, match="pip install pydivsufsort"),
    ):
        build(indexed, 51)
    assert Index.open(indexed).count([5, 6]) == 10, "what was there is there"
    with patch.dict(sys.modules, {"infini_gram.engine": None}):
        build(indexed, 51)
        with pytest.raises(ConfigError, match="pip install infini-gram"):
            Index.open(indexed, engine="infini-gram")
    shutil.rmtree(index_directory(indexed))
    with (
        patch.object(os, "replace", side_effect=OSError(28, "No space left on device")),
        pytest.raises(RunError, match=r"index/metadata\.0: the index cannot be written: no space left on device"),
    ):
        build(indexed)
    assert not [p for p in index_directory(indexed).iterdir() if p.name != ".lock"], "nothing half-written is left"
