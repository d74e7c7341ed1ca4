"""A score by group: means, shares, and whether groups differ by more than chance, where texts come in clusters.

What a model writes about one title (a person, a profession) is alike, so titles are what is drawn, not texts: standard
errors are robust to clusters of a title, and the permutation test moves whole titles from one group to another. A group
of fewer than `MIN_TITLES` titles has a mean but no interval, and no part in a gap.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from crystal.analysis.intervals import Z, wilson
from crystal.evaluation.averages import ratio

MIN_TITLES = 4
DRAWS = 2000  # of the permutation test: its least p-value is 1 / (DRAWS + 1)
POSITIVE, NEGATIVE = 0.05, -0.05  # at these and beyond a compound score counts, as VADER's authors and LLM360 have it


@dataclass(frozen=True)
class Scores:
    """Scores of texts, one array entry a text. titles: numbers of clusters, each in one group; groups: numbers into
    names; weight: how much a text counts, where groups were not asked in proportion to their size."""

    values: np.ndarray
    titles: np.ndarray
    groups: np.ndarray
    names: tuple[str, ...]
    weight: np.ndarray

    @classmethod
    def of(
        cls, values: Sequence[float], keys: Sequence[tuple[str, str]], sizes: dict[str, int] | None = None
    ) -> Scores:
        """keys: (group, title) of each text; sizes: how many texts each group has that could have been asked."""
        names = tuple(dict.fromkeys(group for group, _ in keys))
        number, title = {name: i for i, name in enumerate(names)}, {}
        titles = np.array([title.setdefault(key, len(title)) for key in keys], np.int64)
        groups = np.array([number[group] for group, _ in keys], np.int64)
        asked = np.bincount(groups, minlength=len(names))
        whole = asked if sizes is None else np.array([sizes[name] for name in names])
        return cls(np.asarray(values, float), titles, groups, names, (whole / asked)[groups])

    def of_group(self, number: int) -> Scores:
        mine = self.groups == number
        _, titles = np.unique(self.titles[mine], return_inverse=True)
        ones = np.ones(int(mine.sum()))
        return Scores(self.values[mine], titles, np.zeros_like(titles), (self.names[number],), ones)

    @property
    def count(self) -> int:
        """Of titles."""
        return int(self.titles.max()) + 1


def summary(scores: Scores) -> dict:
    """JSON-ready: n, titles, mean with its standard error and 95 % interval, std, shares with 95 % intervals.

    The error of the mean is the delta method's over titles, its interval Student's t, None where no title differs from
    another; a share's interval is Wilson's with as many texts as the clusters leave of them (Kish 1965: n over the
    design effect of the score). std is over texts, with n below the line, as LLM360 has it. zero: texts of score 0,
    most of which have no word that VADER knows.
    """
    sums, counts = (np.bincount(scores.titles, w) for w in (scores.weight * scores.values, scores.weight))
    mean = ratio(sums, counts)
    variance = float(np.average((scores.values - mean.value) ** 2, weights=scores.weight))
    n, titles = len(scores.values), scores.count
    found = {"n": n, "titles": titles, "mean": mean.value, "stderr": None, "interval": None, "std": variance**0.5}
    enough = titles >= MIN_TITLES and mean.stderr is not None
    spread = mean.stderr**2 if enough else 0.0
    if spread < 1e-18:  # rounding
        spread = 0.0
    else:
        reach = student(titles - 1) * mean.stderr
        found |= {"stderr": mean.stderr, "interval": [max(mean.value - reach, -1.0), min(mean.value + reach, 1.0)]}
    alone = min(variance / spread, n) if spread else titles  # so many independent texts would be as exact
    each = {
        "positive": scores.values >= POSITIVE,
        "neutral": (scores.values > NEGATIVE) & (scores.values < POSITIVE),
        "negative": scores.values <= NEGATIVE,
        "zero": scores.values == 0,
    }
    for name, hits in each.items():
        share = float(np.average(hits, weights=scores.weight))
        found[name] = {"share": share, "interval": list(wilson(share * alone, alone)) if enough else None}
    return found


def by_group(scores: Scores) -> dict[str, dict]:
    """`summary` of every group."""
    return {name: summary(scores.of_group(number)) for number, name in enumerate(scores.names)}


def gap(scores: Scores, seed: int = 0, draws: int = DRAWS) -> dict:
    """Differences of groups' means, JSON-ready, over groups of at least MIN_TITLES titles.

    value: the largest mean less the smallest. p: how often titles that are dealt to groups at random give two groups as
    many standard errors apart as the clearest pair is (Welch's t of every pair, the largest; Chung and Romano 2013).
    The 95 % point of those deals makes intervals that hold for all pairs at once, as Tukey's do, so none suffers from
    that its pair was picked: `clearest` has the pair's own; `interval` holds the gap itself, and leaves out 0 just
    where p is below 0.05. So that a small group whose titles happen to be alike is not taken for certain, each group's
    error has one title more, of the spread of all. value: None where fewer than two groups have titles enough; interval
    and clearest: None where no title differs from another.
    """
    titles = [scores.of_group(number).count for number in range(len(scores.names))]
    judged = [number for number, count in enumerate(titles) if count >= MIN_TITLES]
    few = {name: count for name, count in zip(scores.names, titles, strict=True) if count < MIN_TITLES}
    found = {"value": None, "highest": None, "lowest": None, "interval": None, "p": None, "clearest": None, "few": few}
    if len(judged) < 2:
        return found
    names = [scores.names[number] for number in judged]
    dealt = _Dealt([scores.of_group(number) for number in judged])
    means, errors = dealt.estimates(dealt.as_it_is)
    distances, spreads = _pairs(means, errors)
    t, (above, below) = _clearest(means, errors)
    if t == 0 and not errors.any():  # all the same, however it is dealt
        return found | {"value": 0.0, "p": 1.0}
    rng = np.random.default_rng(seed)
    most = np.array([_clearest(*dealt.estimates(dealt.shuffled(rng)))[0] for _ in range(draws)])
    reach = float(np.quantile(most, 0.95))
    value, apart, margin = float(np.ptp(means)), distances[above, below], reach * spreads[above, below]
    return found | {
        "value": value,
        "highest": names[int(means.argmax())],
        "lowest": names[int(means.argmin())],
        "interval": [max(float((distances - reach * spreads).max()), 0.0), _most(distances + reach * spreads)],
        "p": float((1 + np.sum(most >= t * (1 - 1e-9))) / (1 + draws)),
        "clearest": {
            "above": names[above],
            "below": names[below],
            "difference": float(apart),
            "interval": [max(float(apart - margin), -2.0), _most(apart + margin)],
        },
    }


def _most(bounds: np.ndarray) -> float:
    return min(float(np.max(bounds)), 2.0)  # two scores are at most so far apart


def holm(p: Sequence[float | None]) -> list[float | None]:
    """P-values of several tests, each corrected so that all of them together are wrong as seldom as one (Holm 1979)."""
    order = sorted((value, i) for i, value in enumerate(p) if value is not None)
    found, least = list(p), 0.0
    for rank, (value, i) in enumerate(order):
        least = max(least, min(value * (len(order) - rank), 1.0))
        found[i] = least
    return found


def student(freedom: int) -> float:
    """The 97.5 % point of Student's t (Abramowitz and Stegun 26.7.5; within 2 % from 3 degrees of freedom on)."""
    powers = (
        (Z**3 + Z) / 4,
        (5 * Z**5 + 16 * Z**3 + 3 * Z) / 96,
        (3 * Z**7 + 19 * Z**5 + 17 * Z**3 - 15 * Z) / 384,
    )
    return Z + sum(value / freedom ** (i + 1) for i, value in enumerate(powers))


class _Dealt:
    """Titles in groups, and the same titles dealt to the groups at random, each group with as many as it has."""

    def __init__(self, groups: Sequence[Scores]):
        sums = np.concatenate([np.bincount(group.titles, group.values) for group in groups])
        counts = np.concatenate([np.bincount(group.titles) for group in groups])
        self._titles = np.array([group.count for group in groups])
        self._begins = np.cumsum([0, *self._titles[:-1]])
        self._columns = np.stack([sums, counts, sums * sums, sums * counts, counts * counts])
        self.as_it_is = np.arange(len(sums))

    def shuffled(self, rng: np.random.Generator) -> np.ndarray:
        return rng.permutation(self.as_it_is)

    def estimates(self, order: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Means of the groups and their standard errors: those of `averages.ratio` but for the title more."""
        s, c, ss, sc, cc = np.add.reduceat(self._columns[:, order], self._begins, axis=1)
        means = s / c
        squares = np.maximum(ss - 2 * means * sc + means**2 * cc, 0.0)
        squares[squares < 1e-18 * np.maximum(ss, 1)] = 0.0  # rounding, where titles are all alike
        squares = (squares + squares.sum() / self._titles.sum()) * self._titles / (self._titles + 1)
        return means, np.sqrt(self._titles / (self._titles - 1) * squares) / c


def _pairs(means: np.ndarray, errors: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """[G, G]: how far group i is above group j, and the standard error of that."""
    return means[:, None] - means, np.hypot(errors[:, None], errors)


def _clearest(means: np.ndarray, errors: np.ndarray) -> tuple[float, tuple[int, int]]:
    """(t, (i, j)) of the pair that is the most standard errors apart; two groups that do not vary and are not equal
    are a great many apart."""
    distances, spreads = _pairs(means, errors)
    t = np.where(np.abs(distances) < 1e-12, 0.0, distances / np.maximum(spreads, 1e-9))
    at = np.unravel_index(int(t.argmax()), t.shape)
    return float(t[at]), (int(at[0]), int(at[1]))
