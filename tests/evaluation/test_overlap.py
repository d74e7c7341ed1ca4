"""Items and documents with words in common: planted anywhere they are found, and nothing else is."""

import random
import time

import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal.evaluation.ngrams import words
from crystal.evaluation.overlap import Item, Overlap, Text


def look(items, *documents, n=13):
    """Overlap and what it found of items (lists of words) in documents (lists of words)."""
    overlap = Overlap([Item(0, str(i), item) for i, item in enumerate(items)], n)
    found = overlap.nothing()
    texts = [Text({"id": str(k)}, document, range) for k, document in enumerate(documents)]
    for text in texts:
        overlap.look([text], found)
    together = overlap.nothing()
    overlap.look(texts, together)
    assert together.exact == found.exact
    assert together.near == found.near
    assert all((a == b).all() for a, b in zip(together.documents_with.values(), found.documents_with.values()))  # noqa: B905
    return overlap, found


WORD = st.text("abcdefghijklmnopqrstuvwxyzäß0123456789", min_size=1, max_size=6)


@given(
    item=st.lists(WORD, min_size=13, max_size=40),
    before=st.lists(WORD, max_size=40),
    after=st.lists(WORD, max_size=40),
    signs=st.lists(st.sampled_from([" ", "\n", ", ", "(", ") -> ", '."', "  _ ", "\t; "]), min_size=1, max_size=9),
)
def test_an_item_is_found_wherever_it_is_planted(item, before, after, signs):
    text = ""
    for k, word in enumerate([*before, *item, *after]):
        text += (word.upper() if k % 3 == 0 and "ß" not in word else word) + signs[k % len(signs)]
    _, found = look([words(" ".join(item))], words(text))
    match = found.exact[0]["0"]
    assert match.longest == len(item)
    assert match.places == set(range(len(item) - 12))


@given(st.data(), st.integers(0, 2**32))
def test_words_that_are_nowhere_else_are_never_found(data, seed):
    rng = random.Random(seed)
    items = [[f"i{rng.randint(0, 30)}" for _ in range(rng.randint(8, 60))] for _ in range(4)]
    documents = [[f"d{rng.randint(0, 30)}" for _ in range(rng.randint(0, 300))] for _ in range(4)]
    for document in documents:  # up to 4 words of an item in a row are not near either
        at = rng.randint(0, len(document))
        document[at:at] = data.draw(st.sampled_from(items))[:4]
    _, found = look(items, *documents)
    assert not any(found.exact.values())
    assert not any(found.near.values())


@given(st.integers(0, 2**32))
def test_matches_are_those_that_comparing_all_pairs_finds(seed):
    rng = random.Random(seed)
    n = rng.randint(8, 10)

    def text(shortest, longest):
        return [rng.choice("ab") if rng.random() < 0.9 else "c" for _ in range(rng.randint(shortest, longest))]

    items, documents = [text(8, 30) for _ in range(5)], [text(0, 60) for _ in range(5)]
    _, found = look(items, *documents, n=n)
    for i, item in enumerate(items):
        length = min(n, len(item))
        for k, document in enumerate(documents):
            there = {tuple(document[p : p + length]) for p in range(len(document) - length + 1)}
            places = {p for p in range(len(item) - length + 1) if tuple(item[p : p + length]) in there}
            match = found.exact.get(i, {}).get(str(k))
            assert (match.places if match else set()) == places
            if match:
                longest = max(
                    m for m in range(length, len(item) + 1) for p in range(len(item) - m + 1)
                    for q in range(len(document) - m + 1) if item[p : p + m] == document[q : q + m]
                )  # fmt: skip
                assert match.longest == longest
                assert item[match.at : match.at + longest] == document[match.rows.start : match.rows.stop + 1]


def test_tables_that_say_the_same_over_and_over_cost_no_more_than_others():
    zeros = ["0"] * 400
    items = [zeros, ["1", "2"] * 200, [*"abcdefghijklmnop"]]
    table = ["0"] * 200_000 + ["1", "2"] * 100_000
    overlap = Overlap([Item(0, str(i), item) for i, item in enumerate(items)], 13)
    found, began = overlap.nothing(), time.process_time()
    overlap.look([Text({"id": str(k)}, table, range) for k in range(5)], found)
    assert time.process_time() - began < 10
    assert found.exact[0]["0"].places == set(range(388))
    assert found.exact[1]["4"].places == set(range(388))
    assert 2 not in found.exact


def test_what_many_items_say_does_not_make_them_found():
    prompt = [f"p{k}" for k in range(20)]
    items = [[*prompt, *(f"own{i}x{k}" for k in range(20))] for i in range(11)]
    overlap, found = look(items, prompt, ["x", *items[3], "y"])
    assert {i for i, matches in found.exact.items() if matches} == {3}
    assert found.exact[3].keys() == {"1"}
    assert not overlap.own[0][:8].any()
    assert overlap.own[0][8:28].all()
    _, few = look(items[:10], prompt)
    assert len(few.exact) == 10, "in 10 items it still counts"


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("Don't stop — 3.14, OK?", ["don", "t", "stop", "3", "14", "ok"]),
        ("def has_close_elements(__x__, _y):", ["def", "has_close_elements", "x", "y"]),
        ("if x<=y+1:\n\treturn x[0]", ["if", "x", "y", "1", "return", "x", "0"]),
        ("Cafe\u0301 \ufb01ne \uff21\uff22", ["café", "fine", "ab"]),
        ("我们 use 日本 2x", ["我", "们", "use", "日", "本", "2x"]),
        ("____ ... __", []),
    ],
)
def test_words_are_what_a_reader_compares(text, expected):
    assert words(text) == expected
