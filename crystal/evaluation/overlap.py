"""Which items have words in common with which documents, found in one pass over the documents.

Items are all known before, so that only their n-grams are held; a document is looked at once, with many others at a
time, and forgotten. What is kept of it is what it has in common with items.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from crystal.evaluation.ngrams import Ngrams

SHORTEST = 8  # words of an item that can be judged
SHINGLE = 5  # words of the n-grams that find near copies
NEAR = 0.6  # of an item's words
WIDTH = 2  # times an item's words: a near copy is looked for in as long a passage
_PAIRS = 4096  # of places in an item and in a text at which one n-gram is looked at; only tables of numbers have more
COMMON = 10  # what is in more documents than this, or in more items of a task, is common


@dataclass(frozen=True)
class Item:
    """An item of an evaluation task: the task's number, its own name, its words."""

    task: int
    id: str
    words: list[str]


@dataclass
class Match:
    """What an item has in common with a document. places: words of the item at which n-grams begin that are in both.

    longest: words in a row, from word `at` of the item on; 0 for a near copy. rows: those that hold the longest, or the
    near copy's passage.
    """

    document: dict
    places: set[int]
    longest: int
    at: int
    rows: range


@dataclass
class Found:
    """What a pass over some documents found, by item and document's id."""

    documents_with: dict[int, np.ndarray]  # n-gram length → documents that each n-gram is in, int64
    exact: dict[int, dict[str, Match]] = field(default_factory=dict)
    near: dict[int, dict[str, Match]] = field(default_factory=dict)  # COMMON + 1 documents at most
    documents: int = 0
    _last: dict[int, np.ndarray] = field(default_factory=dict)  # the newest document that each n-gram is in


@dataclass(frozen=True)
class Text:
    """A document, or a part of one. rows: of its words from one number to another; cut: whether its first and its last
    word may be parts of words."""

    document: dict
    words: list[str]
    rows: Callable[[int, int], range]
    begins: bool = True
    ends: bool = True


class Overlap:
    """Items with their n-grams. Of item number i:

    `tasks[i]`: its task (int64). `length[i]`: words of the n-grams that it is judged by, n or all that it has; 0: it
    has too few. `own[i]` (bool [words]): places at which n-grams begin that are not common among items. `own_words[i]`:
    how many of its words lie in 5-grams that are not.
    """

    def __init__(self, items: Sequence[Item], n: int):
        self.items = items
        vocabulary: dict[str, int] = {}
        ids = [np.array([vocabulary.setdefault(w, len(vocabulary) + 1) for w in i.words], np.int32) for i in items]
        self._vocabulary = vocabulary
        self.length = [min(n, len(i.words)) if len(i.words) >= SHORTEST else 0 for i in items]
        self.grams = {
            length: Ngrams(length, {i: ids[i] for i, judged in enumerate(self.length) if judged == length})
            for length in sorted({*self.length} - {0})
        }
        self._shingles = Ngrams(SHINGLE, {i: ids[i] for i, judged in enumerate(self.length) if judged})
        self.tasks = tasks = np.array([i.task for i in items], np.int64)
        self.shared = {length: _shared(grams, tasks) for length, grams in self.grams.items()}
        self._shared_shingles = _shared(self._shingles, tasks)
        self.own = [np.zeros(len(i.words), bool) for i in items]
        for length, grams in self.grams.items():
            _mark(self.own, grams, ~self.shared[length], 1)
        covered = [np.zeros(len(i.words), bool) for i in items]
        _mark(covered, self._shingles, ~self._shared_shingles, SHINGLE)
        self.own_words = [int(c.sum()) for c in covered]
        self._need = np.array([max(SHORTEST, math.ceil(NEAR * count)) for count in self.own_words], np.int64)

    def nothing(self) -> Found:
        """What has been found before the first document."""
        return Found({length: np.zeros(grams.count, np.int64) for length, grams in self.grams.items()})

    def look(self, texts: Sequence[Text], found: Found) -> None:
        """Note what the texts have in common with the items. A document's parts come one after the other."""
        ids, starts = self._ids(texts)
        numbers = []
        for text in texts:
            found.documents += text.begins
            numbers.append(found.documents)
        document = np.array(numbers, np.int64)
        for length, grams in self.grams.items():
            at, gram, text = _found(grams, ids, starts)
            self._count(found, length, gram, document[text])
            rare = found.documents_with[length] <= COMMON
            index, occurrence = grams.occurrences(gram)
            wanted = rare[gram[index]] & ~self.shared[length][occurrence]
            for i, t, hits in _groups(grams.item[occurrence], text[index], wanted):
                place, position = grams.place[occurrence[hits]], at[index[hits]] - starts[t]
                _note_exact(found.exact.setdefault(i, {}), texts[t], place, position, length)
        at, gram, text = _found(self._shingles, ids, starts)
        index, occurrence = self._shingles.occurrences(gram)
        kept = ~self._shared_shingles[occurrence]
        index, occurrence = index[kept], occurrence[kept]
        for i, t, hits in _groups(self._shingles.item[occurrence], text[index], None, self._need):
            matches = found.near.setdefault(i, {})
            if len(matches) <= COMMON:
                place, position = self._shingles.place[occurrence[hits]], at[index[hits]] - starts[t]
                self._note_near(matches, i, texts[t], place, position)

    def _ids(self, texts: Sequence[Text]) -> tuple[np.ndarray, np.ndarray]:
        """The words of all texts as numbers, a 0 behind each text, and where each begins."""
        number, pieces = self._vocabulary.get, []
        for text in texts:
            ids = np.array([number(word, 0) for word in (*text.words, "")], np.int32)
            if not text.begins:
                ids[0] = 0
            if not text.ends:
                ids[-2:] = 0
            pieces.append(ids)
        sizes = [len(piece) for piece in pieces]
        return np.concatenate(pieces), np.concatenate([[0], np.cumsum(sizes)[:-1]])

    def _count(self, found: Found, length: int, gram: np.ndarray, document: np.ndarray) -> None:
        last = found._last.setdefault(length, np.zeros(self.grams[length].count, np.int64))
        pairs = np.unique(np.stack([gram, document]), axis=1)
        new = pairs[1] != last[pairs[0]]  # the first document may have been counted in its part before
        np.add.at(found.documents_with[length], pairs[0][new], 1)
        np.maximum.at(last, pairs[0], pairs[1])

    def _note_near(self, matches: dict, i: int, text: Text, place: np.ndarray, position: np.ndarray) -> None:
        width = WIDTH * len(self.items[i].words)
        covered, first, last = _passage(position.tolist(), place.tolist(), width)
        if covered < self._need[i]:
            return
        places = set(place[first : last + 1].tolist())
        before = matches.get(text.document["id"])
        if before is None or len(before.places) < len(places):
            rows = text.rows(int(position[first]), int(position[last]) + SHINGLE - 1)
            matches[text.document["id"]] = Match(text.document, places, 0, min(places), rows)


def words_covered(places: set[int], length: int) -> set[int]:
    """The words of an item that n-grams of `length` words at these places hold."""
    return {place + k for place in places for k in range(length)}


def _found(grams: Ngrams, ids: np.ndarray, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Where n-grams stand in the texts that begin at `starts`: (positions, n-grams, texts).

    In a text that says the same over and over (a table of zeros), the first places only: an item that does so too
    would pair each of its places with all of them.
    """
    at, gram = grams.find(ids)
    text = np.searchsorted(starts, at, side="right") - 1
    order = np.lexsort((at, gram, text))
    changes = (np.diff(gram[order]) != 0) | (np.diff(text[order]) != 0)
    begins = np.concatenate([[0], np.flatnonzero(changes) + 1])
    rank = np.arange(len(at)) - np.repeat(begins, np.diff(np.concatenate([begins, [len(at)]])))
    few = rank < np.maximum(_PAIRS // grams.repeats[gram[order]], 1)
    kept = np.sort(order[few])
    return at[kept], gram[kept], text[kept]


def _shared(grams: Ngrams, tasks: np.ndarray) -> np.ndarray:
    """For each occurrence whether its n-gram is in more than COMMON items of the same task: bool [occurrences]."""
    if not grams.count:
        return np.zeros(0, bool)
    task = tasks[grams.item]
    many = int(tasks.max()) + 1
    pairs = np.unique(np.stack([grams.gram * many + task, grams.item]), axis=1)[0]
    keys, counts = np.unique(pairs, return_counts=True)
    return np.isin(grams.gram * many + task, keys[counts > COMMON])


def _mark(marks: list[np.ndarray], grams: Ngrams, wanted: np.ndarray, width: int) -> None:
    for item, place in zip(grams.item[wanted].tolist(), grams.place[wanted].tolist(), strict=True):
        marks[item][place : place + width] = True


def _groups(item: np.ndarray, text: np.ndarray, wanted: np.ndarray | None, need: np.ndarray | None = None):
    """(item, text, which hits) of every pair that has a wanted hit, or enough 5-grams to cover the words it needs."""
    many = int(text.max()) + 1 if len(text) else 1
    key = item * many + text
    order = np.argsort(key, kind="stable")
    keys, first, counts = np.unique(key[order], return_index=True, return_counts=True)
    chosen = counts * SHINGLE >= need[keys // many] if wanted is None else np.isin(keys, key[wanted])
    for k in np.flatnonzero(chosen).tolist():
        i, t = divmod(int(keys[k]), many)
        yield i, t, order[first[k] : first[k] + counts[k]]


def _note_exact(matches: dict, text: Text, place: np.ndarray, position: np.ndarray, length: int) -> None:
    """place, position: where in the item and in the text the n-grams begin that both have."""
    order = np.lexsort((position, position - place))
    place, position = place[order], position[order]
    breaks = (np.diff(position - place) != 0) | (np.diff(position) != 1)
    starts = np.concatenate([[0], np.flatnonzero(breaks) + 1])
    sizes = np.diff(np.concatenate([starts, [len(place)]]))
    best = int(sizes.argmax())
    longest, at = int(sizes[best]) + length - 1, int(starts[best])
    before = matches.get(text.document["id"])
    places = set(place.tolist()) | (before.places if before else set())
    if before and before.longest >= longest:
        before.places = places
        return
    begin = int(position[at])
    rows = text.rows(begin, begin + longest - 1)
    matches[text.document["id"]] = Match(text.document, places, longest, int(place[at]), rows)


def _passage(position: list[int], place: list[int], width: int) -> tuple[int, int, int]:
    """Of all passages of `width` words the one whose 5-grams cover the most words of the item: (how many, its first
    and its last 5-gram). position: in rising order."""
    covered: Counter[int] = Counter()
    best, left = (0, 0, 0), 0
    for right, start in enumerate(place):
        covered.update(range(start, start + SHINGLE))
        while position[right] + SHINGLE - position[left] > width:
            for word in range(place[left], place[left] + SHINGLE):
                covered[word] -= 1
                if not covered[word]:
                    del covered[word]
            left += 1
        if len(covered) > best[0]:
            best = len(covered), left, right
    return best
