"""The data order: every source in proportion at every prefix, every row once an epoch, always the same."""

from fractions import Fraction

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from crystal.data.order import Interleave, StageOrder, permutation_key, permute, unpermute

STAGE2 = {
    "ArXiv": 0.016083857723861224,
    "Book": 0.015358576352403003,
    "C4": 0.09909981505117808,
    "CommonCrawl": 0.1983897689052003,
    "Github": 0.018454606218343703,
    "StackExchange": 0.011784941022274698,
    "Wikipedia": 0.012710859995188247,
    "StarCoder": 0.6281175747315507,
}

PINNED_ROWS = [568966, 772968, 332645, 117307, 20147, 591584, 909993, 243078]
PINNED_BATCH = [
    ("english", 0, 96),
    ("english", 0, 598),
    ("python", 1, 59),
    ("english", 0, 573),
    ("english", 0, 82),
    ("python", 1, 63),
    ("english", 0, 628),
    ("english", 0, 60),
]

weight = st.one_of(
    st.floats(1e-3, 1),
    st.integers(1, 30).map(float),
    st.sampled_from([0.9, 0.45, 0.3, 0.05, 0.01]),
    st.just(0.0),
)
weight_vectors = (
    st.lists(weight, min_size=1, max_size=12).filter(any).map(lambda ws: {f"source{i}": w for i, w in enumerate(ws)})
)


def assert_prefixes_in_proportion(weights, interleave, start, n):
    """Strictly within one draw of weight * prefix, in exact arithmetic, from slot `start` on."""
    exact = {name: Fraction(repr(float(w))) for name, w in weights.items()}
    total = sum(exact.values())
    sources, draws = interleave.slots(start, start + n)
    counts = interleave.counts(start)
    assert sum(counts.values()) == start
    assert set(interleave.names) == {name for name, w in weights.items() if w > 0}
    for i, name in enumerate(interleave.names):
        share = exact[name] / total
        num, den = share.numerator, share.denominator
        drawn = [counts[name], *(counts[name] + (sources == i).cumsum()).tolist()]
        assert all(-den < c * den - (start + k) * num < den for k, c in enumerate(drawn))
        mine = draws[sources == i].tolist()
        assert mine == list(range(counts[name], counts[name] + len(mine)))


@given(weight_vectors, st.integers(1, 600))
def test_every_prefix_holds_every_source_within_one_sequence(weights, n):
    assert_prefixes_in_proportion(weights, Interleave(weights), 0, n)


@settings(max_examples=300)
@given(weight_vectors, st.integers(0, 10), st.one_of(st.integers(0, 10**4), st.integers(0, 10**10)))
def test_blocks_join_without_a_seam(weights, more, start):
    # the shortest blocks that are allowed, so that a few hundred slots cross many of them
    shortest = int(sum(weights.values()) / min(w for w in weights.values() if w)) + 3 + more
    assert_prefixes_in_proportion(weights, Interleave(weights, block=shortest), start, min(4 * shortest, 600))


@pytest.mark.parametrize("weights", [{"a": 1.0}, {"a": 1.0, "b": 1e-9}, {"a": 1e-300, "b": 0.3, "c": 0.7}])
def test_extreme_weights(weights):
    assert_prefixes_in_proportion(weights, Interleave(weights), 0, 10_000)


def test_weights_too_small_for_blocks_keep_their_counts():
    weights = {"rare": 1e-7, "often": 0.4, "more": 0.6 - 1e-7}
    jumped, walked = Interleave(weights), Interleave(weights)
    for start in range(0, 60_000, 7_000):
        walked.slots(start, start + 7_000)
    assert jumped.counts(50_001) == walked.counts(50_001)
    assert_prefixes_in_proportion(weights, jumped, 49_000, 3_000)
    assert_prefixes_in_proportion(weights, jumped, 1_000, 3_000)


def test_the_end_of_crystalcoder_stage_2_is_in_reach():
    last = 214_387 * 2112
    assert_prefixes_in_proportion(STAGE2, Interleave(STAGE2), last - 30_000, 30_000)


def test_the_order_of_the_weights_has_no_say():
    turned = dict(reversed(STAGE2.items()))
    a, b = Interleave(STAGE2), Interleave(turned)
    assert a.names == b.names
    assert np.array_equal(a.slots(0, 5000), b.slots(0, 5000))


@given(weight_vectors, st.integers(0, 10**6))
def test_slot_of_is_the_inverse_of_slots(weights, start):
    interleave = Interleave(weights)
    sources, draws = interleave.slots(start, start + 3)
    for k, (source, draw) in enumerate(zip(sources.tolist(), draws.tolist(), strict=True)):
        assert interleave.slot_of(interleave.names[source], draw) == start + k


@pytest.mark.parametrize("weights", [{}, {"a": 0.0}, {"a": 1.0, "b": -0.1}])
def test_weights_that_cannot_be_drawn_from(weights):
    with pytest.raises(ValueError, match="expected weights"):
        Interleave(weights)


@given(st.integers(1, 700), st.integers(0, 2**32))
def test_permutation_is_a_bijection_with_an_inverse(size, seed):
    places = np.arange(size)
    keys = np.tile(permutation_key(seed), (size, 1))
    rows = permute(places, np.full(size, size), keys)
    assert sorted(rows.tolist()) == list(range(size))
    assert unpermute(rows, np.full(size, size), keys).tolist() == places.tolist()


@given(st.integers(2, 2**48), st.data())
def test_large_permutations_stay_in_range_and_invert(size, data):
    places = np.array(data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=20, unique=True)))
    keys = np.tile(permutation_key("large"), (len(places), 1))
    rows = permute(places, np.full(len(places), size), keys)
    assert ((rows >= 0) & (rows < size)).all()
    assert len(set(rows.tolist())) == len(places)
    assert unpermute(rows, np.full(len(places), size), keys).tolist() == places.tolist()


@pytest.mark.parametrize("size", [5, 7, 100])
def test_every_place_gets_every_row_equally_often(size):
    trials = 400 * size
    keys = np.stack([permutation_key("uniform", k) for k in range(trials)])
    for place in (0, size // 2, size - 1):
        rows = permute(np.full(trials, place), np.full(trials, size), keys)
        expected = trials / size
        chi2 = ((np.bincount(rows, minlength=size) - expected) ** 2 / expected).sum()
        assert chi2 < size - 1 + 5 * np.sqrt(2 * (size - 1))  # five sigma


def test_permutation_is_pinned():
    """The order is part of a run's identity: these rows may never change, on any machine."""
    keys = np.tile(permutation_key(1, "stage1", "english", 0), (8, 1))
    assert permute(np.arange(8), np.full(8, 1_000_003), keys).tolist() == PINNED_ROWS
    order = StageOrder({"english": 0.7, "python": 0.3}, {"english": 1000, "python": 70}, 8, seed=1, stage="stage1")
    assert order.sequences(50) == PINNED_BATCH


def small(seed=1, stage="s", rows=None, weights=None, batch=6):
    return StageOrder(weights or {"a": 0.5, "b": 0.3, "c": 0.2}, rows or {"a": 11, "b": 40, "c": 3}, batch, seed, stage)


@settings(max_examples=40)
@given(st.integers(0, 2**63), st.tuples(*[st.integers(1, 60)] * 3), st.integers(1, 9))
def test_every_epoch_reads_every_row_once_and_epochs_follow_each_other(seed, rows, batch):
    rows = dict(zip("abc", rows, strict=True))
    order = small(seed, rows=rows, batch=batch)
    read = [entry for step in range(-(-400 // batch)) for entry in order.sequences(step)]
    for source, size in rows.items():
        mine = [(epoch, index) for s, epoch, index in read if s == source]
        assert [epoch for epoch, _ in mine] == [i // size for i in range(len(mine))]
        for epoch in range(len(mine) // size):
            assert sorted(index for e, index in mine if e == epoch) == list(range(size))


@settings(max_examples=30)
@given(st.lists(st.integers(0, 5000), min_size=1, max_size=8))
def test_a_batch_does_not_depend_on_what_was_asked_before(steps):
    order = small()
    assert [order.sequences(s) for s in steps] == [small().sequences(s) for s in steps]


def test_batches_are_cuts_of_one_stream():
    one = [entry for step in range(60) for entry in small(batch=1).sequences(step)]
    assert [entry for step in range(4) for entry in small(batch=15).sequences(step)] == one


@pytest.mark.parametrize("other", [{"seed": 2}, {"stage": "t"}, {"stage": 0}])
def test_seed_and_stage_change_the_rows_but_not_the_mix(other):
    rows = {"a": 1000, "b": 1000, "c": 1000}
    one, two = small(rows=rows).sequences(3), small(rows=rows, **other).sequences(3)
    assert one != two
    assert [s for s, _, _ in one] == [s for s, _, _ in two]


def test_sources_and_epochs_have_permutations_of_their_own():
    size = 200
    order = StageOrder({"a": 0.5, "b": 0.5}, {"a": size, "b": size}, 4 * size, 1, "s")
    batch = order.sequences(0)
    orders = {(s, e): tuple(i for t, f, i in batch if (t, f) == (s, e)) for s in "ab" for e in (0, 1)}
    assert all(len(rows) == size for rows in orders.values())
    assert len(set(orders.values())) == 4


def test_row_ranges_of_one_source_stay_apart():
    entries = {"english[0.0-0.5]": 0.6, "english[0.5-1.0]": 0.2, "python": 0.2}
    rows = {"english[0.0-0.5]": range(50), "english[0.5-1.0]": range(50, 100), "python": 7}
    order = StageOrder(entries, rows, 100, 1, "s")
    read = order.sequences(0)
    english = [index for source, epoch, index in read if source == "english" and epoch == 0]
    assert {source for source, _, _ in read} == {"english", "python"}
    assert sum(index < 50 for index in english) == 50
    assert sum(index >= 50 for index in english) == 20
    assert len(set(english)) == 70


def test_where_a_row_was_read():
    order = small()
    found: dict = {}
    for step in range(30):
        for place, (source, epoch, index) in enumerate(order.sequences(step)):
            found.setdefault((source, index), []).append((step, place, epoch))
    for source, size in {"a": 11, "b": 40, "c": 3}.items():
        for index in range(size):
            assert order.steps_of(source, index, 30) == found.get((source, index), [])
    assert order.steps_of("a", 11, 30) == []


def test_counts_before_a_step():
    order = small()
    read = [source for step in range(17) for source, _, _ in order.sequences(step)]
    assert order.counts_at(17) == {source: read.count(source) for source in "abc"}
    assert order.counts_at(0) == {"a": 0, "b": 0, "c": 0}


def test_a_source_without_rows():
    with pytest.raises(ValueError, match="b: expected at least one row"):
        small(rows={"a": 1, "b": 0, "c": 1})
    assert {s for s, _, _ in small(rows={"a": 5, "c": 5}, weights={"a": 0.5, "b": 0.0, "c": 0.5}).sequences(0)} == {
        "a",
        "c",
    }
