"""Words of a text, and the n-grams of many short texts, to be found in one long one.

Words are what Brown et al. 2020 (GPT-3, appendix C) compare: lower case, no punctuation. A word is a run of letters and
digits; underscores inside it stay, so that an identifier of a program is one word however it is spaced, and its
operators and brackets count for nothing. An ideograph or kana is a word of its own, since no spaces part those. Letters
that only look different (ligatures, full-width forms, composed accents) are one: Unicode's NFKC.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Mapping

import numpy as np

_ALONE = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff\U00020000-\U0003ffff"  # scripts without spaces
_PART = rf"[^\W_{_ALONE}]+"
_WORD = re.compile(rf"{_PART}(?:_+{_PART})*|[{_ALONE}]")
_FILTER_BITS = 20


def words(text: str) -> list[str]:
    """The words of a text, in order."""
    return _WORD.findall((text if text.isascii() else unicodedata.normalize("NFKC", text)).lower())


class Ngrams:
    """The distinct n-grams of one length in many lists of words, each word a number from 1.

    An occurrence is a place in one of the lists: `gram`, `item` and `place` say for each which n-gram begins at which
    word of which list (int64 [occurrences] each), sorted by n-gram. `count`: distinct n-grams. `repeats` (int64
    [count]): how often each occurs in the list that repeats it most. Memory is a few times the lists.
    """

    def __init__(self, length: int, items: Mapping[int, np.ndarray]):
        """items: lists of at least `length` words (int32), by number."""
        self.length = length
        windows = [np.lib.stride_tricks.sliding_window_view(ids, length) for ids in items.values()]
        sizes = [len(w) for w in windows]
        stacked = np.concatenate(windows) if windows else np.empty((0, length), np.int32)
        item = np.repeat(np.array([*items], np.int64), sizes)
        place = np.concatenate([np.arange(size) for size in sizes]) if sizes else np.empty(0, np.int64)
        for self._seed in range(1, 100):
            hashes = self._hashes_of_windows(stacked)
            self._hashes, first, gram = np.unique(hashes, return_index=True, return_inverse=True)
            self._windows = stacked[first]
            if (self._windows[gram] == stacked).all():  # else two n-grams share a hash: other hashes
                break
        order = np.argsort(gram, kind="stable")
        self.gram, self.item, self.place = gram[order], item[order], place[order]
        self.count = len(self._hashes)
        many = max(items, default=0) + 1
        pairs, times = np.unique(self.gram * many + self.item, return_counts=True)
        self.repeats = np.zeros(self.count, np.int64)
        np.maximum.at(self.repeats, pairs // many, times)
        self._filter = np.zeros(1 << _FILTER_BITS, bool)
        self._filter[self._hashes >> np.uint64(64 - _FILTER_BITS)] = True

    def find(self, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where in a text (int32 [words], 0 for a word of no list) one of the n-grams stands: (positions, n-grams).

        A hash proposes, the words decide.
        """
        if len(ids) < self.length or not self.count:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        foreign = np.concatenate([[0], np.cumsum(ids == 0)])
        at = np.flatnonzero(foreign[self.length :] == foreign[: -self.length])
        windows = np.lib.stride_tricks.sliding_window_view(ids, self.length)
        hashes = self._hashes_of_text(ids)[at]
        likely = self._filter[hashes >> np.uint64(64 - _FILTER_BITS)]
        at, hashes = at[likely], hashes[likely]
        gram = np.minimum(np.searchsorted(self._hashes, hashes), self.count - 1)
        same = self._hashes[gram] == hashes
        at, gram = at[same], gram[same]
        same = (windows[at] == self._windows[gram]).all(axis=1)
        return at[same], gram[same]

    def occurrences(self, grams: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Where n-grams, as often as they are given, occur: (index into `grams`, occurrence), one for each pair."""
        first, last = np.searchsorted(self.gram, grams), np.searchsorted(self.gram, grams, side="right")
        sizes = last - first
        index = np.repeat(np.arange(len(grams)), sizes)
        inside = np.arange(len(index)) - np.repeat(np.cumsum(sizes) - sizes, sizes)
        return index, first[index] + inside

    def _hashes_of_windows(self, windows: np.ndarray) -> np.ndarray:
        value = np.zeros(len(windows), np.uint64)
        for column in range(self.length):
            value = value * _MULTIPLIER + _scrambled(windows[:, column], self._seed)
        return _scrambled(value, 0)

    def _hashes_of_text(self, ids: np.ndarray) -> np.ndarray:
        mixed, size = _scrambled(ids, self._seed), len(ids) - self.length + 1
        value = np.zeros(size, np.uint64)
        for column in range(self.length):
            value = value * _MULTIPLIER + mixed[column : column + size]
        return _scrambled(value, 0)


_MULTIPLIER = np.uint64(0x9E3779B97F4A7C15)


def _scrambled(values: np.ndarray, seed: int) -> np.ndarray:
    """SplitMix64's finalizer (Steele et al. 2014) of each value: uint64, the bits well mixed."""
    z = values.astype(np.uint64) + np.uint64(seed) * np.uint64(0x632BE59BD9B4E019)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return z ^ (z >> np.uint64(31))
