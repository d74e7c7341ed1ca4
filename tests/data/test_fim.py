"""FIM on packed rows: exactly the published permutation, and nothing else in the row changes."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from crystal.data.fim import fim_row, split_segments
from crystal.data.tokenizer import Tokenizer

BOS, EOS = 1, 2
PRE, MID, SUF, PAD = 1000, 1001, 1002, 1003

words = st.text(st.sampled_from("ab (\n)=é你😀"), min_size=1, max_size=12)
seeds = st.integers(0, 2**32 - 1)


@st.composite
def rows(draw) -> tuple[list[str], bool, int, int]:
    """Texts of the documents, whether they have BOS, where in their stream the row begins, its length."""
    return (
        draw(st.lists(words, min_size=1, max_size=6)),
        draw(st.booleans()),
        draw(st.integers(0, 8)),
        draw(st.integers(8, 40)),
    )


def packed(tokenizer: Tokenizer, texts: list[str], bos: bool, start: int, length: int) -> np.ndarray:
    """A row cut out of a stream of documents, which are repeated until it is full."""
    stream = [i for text in texts for i in [*([BOS] if bos else []), *tokenizer.encode(text), EOS]]
    return np.array((stream * (2 + (start + length) // len(stream)))[start : start + length], dtype=np.int64)


def is_transformed(segment: list[int]) -> bool:
    return segment[:1] == [PRE]


def inverted(tokenizer: Tokenizer, segment: list[int]) -> bytes:
    """The bytes of the document that a PSM or SPM segment was made from, by reading its sentinels."""
    middle_at, suffix_at = segment.index(MID), segment.index(SUF)
    suffix, rest = segment[suffix_at + 1 : middle_at], segment[middle_at + 1 :]
    if suffix_at > 1 or not rest:
        return spelled(tokenizer, segment[1:suffix_at]) + spelled(tokenizer, rest) + spelled(tokenizer, suffix)
    return b""  # SPM, or PSM with an empty prefix: the border of prefix and middle is not marked


def spelled(tokenizer: Tokenizer, ids: list[int], untouched: bool = False) -> bytes:
    """Bytes of one piece without BOS and without the dummy space.

    After the bytes of a cut character a new piece has a dummy space and an untouched segment has none.
    """
    pieces = [tokenizer.token_bytes[i] for i in ids if i != BOS]
    stray = 0
    while stray < len(pieces) and len(pieces[stray]) == 1 and 0x80 <= pieces[stray][0] < 0xC0:
        stray += 1
    rest = b"".join(pieces[stray:])
    return b"".join(pieces[:stray]) + (rest if stray and untouched else rest.removeprefix(b" "))


@given(rows(), seeds)
def test_rate_zero_is_identity(tokenizer, row, seed):
    row = packed(tokenizer, *row)
    new, mask = fim_row(row, tokenizer, 0.0, 0.5, np.random.default_rng(seed))
    assert new.tolist() == row.tolist()
    assert mask.tolist() == [True] * (len(row) - 1)


@given(rows(), seeds, st.sampled_from([0.3, 0.9, 1.0]), st.sampled_from([0.0, 0.5, 1.0]))
def test_length_is_kept_and_only_padding_is_masked(tokenizer, row, seed, rate, spm):
    row = packed(tokenizer, *row)
    before = row.copy()
    new, mask = fim_row(row, tokenizer, rate, spm, np.random.default_rng(seed))
    assert row.tolist() == before.tolist()
    assert new.shape == row.shape
    assert new.dtype == row.dtype
    assert mask.shape == (len(row) - 1,)
    assert mask.tolist() == (new[1:] != PAD).tolist()
    assert mask.tolist() == sorted(mask.tolist(), reverse=True)


@given(rows(), seeds, st.sampled_from([0.3, 0.9]))
def test_same_generator_same_row(tokenizer, row, seed, rate):
    row = packed(tokenizer, *row)
    one, two = (fim_row(row, tokenizer, rate, 0.5, np.random.default_rng(seed))[0] for _ in range(2))
    assert one.tolist() == two.tolist()


@given(rows(), seeds, st.sampled_from([0.3, 0.7, 1.0]))
def test_each_psm_segment_turns_back_and_each_other_segment_is_untouched(tokenizer, row, seed, rate):
    """Compared by segment up to where the row was cut off."""
    row = packed(tokenizer, *row)
    new, mask = fim_row(row, tokenizer, rate, 0.0, np.random.default_rng(seed))
    old_segments = split_segments(row[:-1], EOS)
    new_segments = split_segments(new[: 1 + mask.sum()], EOS)
    for number, (old, segment) in enumerate(zip(old_segments, new_segments, strict=False)):
        if number >= min(len(old_segments), len(new_segments) - 1):
            break  # the row was cut in here
        if not is_transformed(segment):
            assert segment == old
            continue
        assert segment.count(PRE) == segment.count(SUF) == segment.count(MID) == 1
        assert (BOS in segment) == (BOS in old)
        if BOS in segment:
            assert segment[:2] == [PRE, BOS]
        text = inverted(tokenizer, segment)
        if text:
            assert text == spelled(tokenizer, old, untouched=True)


@given(rows(), seeds)
def test_rows_in_which_nothing_is_chosen_do_not_change(tokenizer, row, seed):
    row = packed(tokenizer, *row)
    new, mask = fim_row(row, tokenizer, 1e-12, 0.5, np.random.default_rng(seed))
    assert new.tolist() == row.tolist()
    assert mask.all()


class Draws:
    """A generator whose numbers the test writes: uniform ones, and pairs of cut points."""

    def __init__(self, uniform: list[float], cuts: list[tuple[int, int]]) -> None:
        self.uniform, self.cuts = iter(uniform), iter(cuts)

    def random(self) -> float:
        return next(self.uniform)

    def integers(self, low: int, high: int, size: int) -> np.ndarray:
        cut = next(self.cuts)
        assert size == 2
        assert low == 0
        assert all(c < high for c in cut)
        return np.array(cut)


def test_psm_and_spm_by_hand(tokenizer):
    """Two documents, 'return x' and 'def f()'; cut points in any order; pieces are encoded apart."""
    e = tokenizer.encode
    row = np.array([BOS, *e("return x"), EOS, BOS, *e("def f()"), EOS, BOS, *e("pass")])
    new, _ = fim_row(row, tokenizer, 0.5, 0.5, Draws([0, 0.9, 0, 0.1, 1], [(6, 2), (3, 5)]))
    psm = [PRE, BOS, *e("re"), SUF, *e(" x"), MID, *e("turn"), EOS]
    spm = [PRE, SUF, *e("()"), MID, BOS, *e("def"), *e(" f"), EOS]
    assert new.tolist() == (psm + spm + [BOS, *e("pass")])[: len(row)]
    roomy = np.concatenate([row, [EOS] * 20])
    new, _ = fim_row(roomy, tokenizer, 0.5, 0.5, Draws([0, 0.9, 0, 0.1] + [1] * 30, [(6, 2), (3, 5)]))
    assert new.tolist()[: len(psm + spm)] == psm + spm


def test_an_empty_prefix_middle_or_suffix_is_possible(tokenizer):
    e = tokenizer.encode
    row = np.array([*e("abc"), EOS, *[5] * 20])
    for cut, expected in [((0, 0), ("", "", "abc")), ((3, 3), ("abc", "", "")), ((0, 3), ("", "abc", ""))]:
        new, _ = fim_row(row, tokenizer, 0.5, 0.5, Draws([0, 1, 1], [cut]))
        prefix, middle, suffix = map(e, expected)
        assert new.tolist()[: len(row) - 20 + 3] == [PRE, *prefix, SUF, *suffix, MID, *middle, EOS]


def test_the_end_of_the_row(tokenizer):
    """EOS ends a transformed last segment, the next token an untouched one; longer rows are cut."""
    e = tokenizer.encode
    word = "return" * 3
    one_by_one = [e("\n" + c)[-1] for c in word]  # 18 tokens, encoded together they are fewer
    short = np.array([*one_by_one, EOS, *e("ab"), 7])
    new, mask = fim_row(short, tokenizer, 0.5, 0.5, Draws([0, 1, 1], [(0, 0)]))
    used = [PRE, SUF, *e(word), MID, EOS, *e("ab"), 7]
    assert len(used) < len(short)
    assert new.tolist() == used + [PAD] * (len(short) - len(used))
    assert mask.sum() == len(used) - 1

    alone = np.array([*one_by_one, 7])
    new, mask = fim_row(alone, tokenizer, 0.5, 0.5, Draws([0, 1], [(0, 0)]))
    used = [PRE, SUF, *e(word), MID, EOS]
    assert new.tolist() == used + [PAD] * (len(alone) - len(used))
    assert mask.sum() == len(used) - 1

    cut = np.array([*e("ab"), 7])
    new, mask = fim_row(cut, tokenizer, 0.5, 0.5, Draws([0, 1], [(1, 1)]))
    assert new.tolist() == [PRE, *e("a"), SUF, *e("b"), MID, EOS][: len(cut)]
    assert mask.all()


def test_a_row_cut_inside_a_character_keeps_its_bytes(tokenizer):
    """Segments that start with the end of one character and end with the start of another, of 3 and 4 bytes."""
    e = tokenizer.encode
    for character in ("\u4e09", "\U0001f680"):
        wide = e(character)[-len(character.encode()) :]
        assert [len(tokenizer.token_bytes[i]) for i in wide] == [1] * len(wide)
        for cut in range(1, len(wide)):
            row = np.array([*wide[cut:], *e("ab"), *wide[:cut], EOS, *[5] * 20])
            new, _ = fim_row(row, tokenizer, 0.5, 0.5, Draws([0, 1, 1], [(2, 2)]))  # cuts are in ' ab'
            expected = [PRE, *wide[cut:], *e(" a"), SUF, *e("b"), *wide[:cut], MID, EOS]
            assert new.tolist()[: len(expected)] == expected
        row = np.array([*e("ab" + character), EOS, *[5] * 20])  # a whole character is text like any other
        new, _ = fim_row(row, tokenizer, 0.5, 0.5, Draws([0, 1, 1], [(2, 3)]))
        expected = [PRE, *e("ab"), SUF, MID, *e(character), EOS]
        assert new.tolist()[: len(expected)] == expected


def test_segments_without_text_or_already_transformed_are_left_alone(tokenizer):
    e = tokenizer.encode
    row = np.array([EOS, BOS, EOS, PRE, *e("a"), SUF, MID, EOS, EOS, BOS, 5])
    new, mask = fim_row(row, tokenizer, 1.0, 0.5, np.random.default_rng(0))
    assert new.tolist() == row.tolist()
    assert mask.all()


def test_shares_are_those_asked_for(tokenizer):
    """1,200 segments at rate 0.9 and SPM share 0.5: binomial, five standard deviations allowed."""
    row = np.array([i for _ in range(12) for i in [*tokenizer.encode("abab"), EOS]] + [EOS] * 150)  # room to grow
    rng = np.random.default_rng(1)
    segments = [s for _ in range(100) for s in split_segments(fim_row(row, tokenizer, 0.9, 0.5, rng)[0], EOS) if s]
    chosen = [s for s in segments if is_transformed(s)]
    assert len(segments) == 1200
    assert abs(len(chosen) - 1080) < 5 * (1200 * 0.09) ** 0.5
    # PSM with an empty prefix has its sentinels where SPM has them
    spm_like = sum(s[1] == SUF for s in chosen)
    empty_prefix = 1 - (4 / 5) ** 2  # the smaller of two uniform cuts in 0..4 is 0
    expected = len(chosen) * (0.5 + 0.5 * empty_prefix)
    assert abs(spm_like - expected) < 5 * (len(chosen) * 0.25) ** 0.5


def test_a_vocabulary_without_fim_tokens_is_refused(tokenizer):
    plain = Tokenizer.load(tokenizer.path, added_tokens=False)
    row = np.array([5, 6, 7])
    assert fim_row(row, plain, 0.0, 0.5, np.random.default_rng(0))[0].tolist() == [5, 6, 7]
    with pytest.raises(ValueError, match="FIM needs"):
        fim_row(row, plain, 0.1, 0.5, np.random.default_rng(0))


def test_a_run_that_wants_fim_of_such_a_vocabulary_hears_of_it_at_once(tokenizer):
    from types import SimpleNamespace

    from crystal.errors import ConfigError
    from crystal.training.batches import Batches

    plain = Tokenizer.load(tokenizer.path, added_tokens=False)
    stages = [SimpleNamespace(fim_rates={"a": rate}, bound=[]) for rate in (0.0, 0.9)]
    store = SimpleNamespace(tokenizer=lambda: plain)
    Batches(SimpleNamespace(stages=stages[:1]), store, 0, 1)
    with pytest.raises(ConfigError, match=r"small\.model: FIM needs a vocabulary with CrystalCoder's added tokens"):
        Batches(SimpleNamespace(stages=stages), store, 0, 1)


def test_a_row_of_2048_takes_milliseconds(published, texts):
    """Of the processor's time, and the least of ten: others may have the machine. About 2 ms where it is idle."""
    import time

    ids = [i for text in texts for i in [BOS, *published.encode(text), EOS]]
    row = np.array((ids * 3)[:2049])

    def seconds(seed):
        start = time.process_time()
        fim_row(row, published, 0.9, 0.5, np.random.default_rng(seed))
        return time.process_time() - start

    assert min(map(seconds, range(10))) < 0.05
