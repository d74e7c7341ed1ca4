"""Framing, shuffling and cutting: no token is lost or moved, and the arithmetic of rows is exact."""

from __future__ import annotations

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from crystal.data import pack

lengths = st.lists(st.integers(1, 30), max_size=20)
seq_lens = st.integers(1, 12)


def test_frame_puts_bos_and_eos():
    assert pack.frame([5, 6], 1, 2, np.dtype("<u2")).tolist() == [1, 5, 6, 2]
    assert pack.frame([5, 6], None, 2, np.dtype("<u2")).tolist() == [5, 6, 2]


def test_dtype_holds_every_id():
    assert pack.token_dtype(32032) == np.dtype("<u2")
    assert pack.token_dtype(65536) == np.dtype("<u2")
    assert pack.token_dtype(65537) == np.dtype("<u4")


@given(lengths, seq_lens, st.booleans())
def test_rows_are_the_windows_of_the_stream(sizes, seq_len, overlap):
    stream = np.arange(sum(sizes), dtype="<u2")
    documents = np.split(stream, np.cumsum(sizes)[:-1]) if sizes else []
    blocks = list(pack.windows(documents, seq_len, overlap))
    rows = np.concatenate(blocks) if blocks else np.empty((0, seq_len + 1))
    step = seq_len if overlap else seq_len + 1
    expected = [stream[s : s + seq_len + 1].tolist() for s in range(0, len(stream) - seq_len, step)]
    assert rows.tolist() == expected
    assert pack.count_rows(len(stream), seq_len, overlap) == len(expected)
    assert [list(pack.span_of_row(r, seq_len, overlap)) for r in range(len(rows))] == expected


def test_blocks_join_without_a_seam(monkeypatch):
    monkeypatch.setattr(pack, "_BLOCK_TOKENS", 7)
    documents = [np.arange(i, i + 3, dtype="<u2") for i in range(0, 60, 3)]
    for overlap, step in ((True, 4), (False, 5)):
        rows = np.concatenate(list(pack.windows(documents, 4, overlap)))
        assert rows.tolist() == [list(range(s, s + 5)) for s in range(0, 56, step)]


@given(lengths.filter(len), seq_lens, st.booleans())
def test_rows_of_a_span_are_those_that_hold_a_token_of_it(sizes, seq_len, overlap):
    """Against brute force, the shared token included."""
    rows = pack.count_rows(sum(sizes), seq_len, overlap)
    start = 0
    for size in sizes:
        mine = set(range(start, start + size))
        expected = [r for r in range(rows) if mine & set(pack.span_of_row(r, seq_len, overlap))]
        assert list(pack.rows_of_span(start, size, seq_len, overlap, rows)) == expected
        start += size


def spooled(path, ids, seed):
    spool = pack.Spool(path, seed, np.dtype("<u2"))
    for i in ids:
        spool.add({"id": f"doc{i}"}, np.full(1 + i % 5, i, dtype="<u2"))
    return [(record["id"], tokens.tolist()) for record, tokens in spool.shuffled()]


def test_shuffling_keeps_every_document_whole_and_depends_on_the_seed_alone(tmp_path):
    one = spooled(tmp_path / "a", range(500), 1)
    assert sorted(one) == sorted((f"doc{i}", [i] * (1 + i % 5)) for i in range(500))
    assert one == spooled(tmp_path / "b", reversed(range(500)), 1)
    assert one != spooled(tmp_path / "c", range(500), 2)
    assert list(tmp_path.iterdir()) == []


def test_shuffling_is_uniform(tmp_path):
    """The mean rank of the first fifty documents read, over ten seeds, is near the middle."""
    ranks = []
    for seed in range(10):
        order = [document for document, _ in spooled(tmp_path / str(seed), range(400), seed)]
        ranks += [order.index(f"doc{i}") for i in range(50)]
    assert abs(np.mean(ranks) - 199.5) < 5 * 115.5 / 500**0.5


def test_hash_fractions_are_uniform_and_independent_between_purposes():
    a, b = (np.array([pack.hash_fraction(p, str(i)) for i in range(4000)]) for p in ("a", "b"))
    assert ((a >= 0) & (a < 1)).all()
    assert abs(a.mean() - 0.5) < 5 * 0.289 / 4000**0.5
    assert abs(np.corrcoef(a, b)[0, 1]) < 5 / 4000**0.5
