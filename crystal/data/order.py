"""The order of the data: which row of which source is at which place of a stage, as a pure function.

`StageOrder.sequences(step)` depends on (weights, rows, global batch size, seed, stage, step) and on nothing
else: not on what was asked before, nor on world size, workers or restarts. Resuming needs the step number
only, and a rank takes its slice of the global batch.

Interleaving. After n sequences a source of weight w must have had more than n*w - 1 and fewer than n*w + 1.
That is the chairman assignment problem (Tijdeman 1980), or Pfair scheduling on one processor (Baruah et al.
1996): the j-th sequence of the source may take the slots floor((j-1)/w) ... ceil(j/w) - 1, and earliest
deadline first serves all sources in time. All of it in exact integers: weights are taken as the decimal
fractions they print as, over their sum.

Random access. Earliest deadline first needs what came before, which is slow to rebuild 450 million sequences
into a stage. So slots come in blocks, and what was drawn before a block is computed from its first slot T
alone: n*w rounded up or down, where `_counts_at` chooses the sources to round up such that the slots before
T can hold them and the slots from T on can hold the rest. Inside a block only the draws that belong to it
run, earliest deadline first. Unit jobs with windows have a schedule if no interval is overfull (Hall), which
the choice assures at both ends of a block; earliest deadline first then finds one.

Rows. The i-th draw from a source with R rows is row P(i mod R) of epoch i div R, where P permutes range(R)
afresh for each (seed, stage, source, epoch): an alternating Feistel network on Z_a x Z_b, a*b >= R (Black &
Rogaway 2002), walked until it lands below R. It needs no table, has an inverse, and is vectorised over a
batch.
"""

from __future__ import annotations

import hashlib
import heapq
from collections.abc import Mapping
from fractions import Fraction

import numpy as np

BLOCK = 4096  # slots; more where a weight is below 1 / BLOCK
LARGEST_BLOCK = 2**20
BLOCKS_KEPT = 4
FAR = 2**48  # slots: no stage is that long
ROUNDS = 8  # of the Feistel network: one per 8 bytes of a BLAKE2b digest


class Interleave:
    """Which source each slot n = 0, 1, … draws from.

    Weights are scaled to sum to 1; those of 0 are never drawn. Raises ValueError for negative ones or none.
    block: slots per block; the default lets no window reach over a whole block. Weights under about 1e-6
    would make blocks too long: then all slots are run from slot 0 on, and access at slot n costs O(n) the
    first time.
    """

    def __init__(self, weights: Mapping[str, float], block: int | None = None):
        exact = {name: Fraction(repr(float(w))) for name, w in sorted(weights.items())}
        total = sum(exact.values())
        if min(exact.values(), default=0) < 0 or total == 0:
            raise ValueError("expected weights >= 0, one of them > 0")
        shares = {name: w / total for name, w in exact.items() if w}
        self.names = list(shares)
        self._ratios = [(w.numerator, w.denominator) for w in shares.values()]
        longest = max(-(-den // num) for num, den in self._ratios) + 1
        self.block = block or BLOCK << max(0, (longest - 1).bit_length() - BLOCK.bit_length() + 1)
        self._restarts = longest <= self.block <= LARGEST_BLOCK
        if not self._restarts:
            self.block = block or BLOCK
        self._run_counts = [[0] * len(self.names)]  # without restarts: counts at the blocks met so far
        self._kept_counts: dict[int, list[int]] = {}
        self._kept: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def slots(self, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """Of the slots start … stop-1 the source (index into `names`) and its draw, from 0; int64[n] each."""
        parts = []
        for number in range(start // self.block, -(-stop // self.block)):
            first = number * self.block
            part = slice(max(start - first, 0), min(stop - first, self.block))
            parts.append([a[part] for a in self._block(number)])
        if not parts:
            return np.empty(0, np.int64), np.empty(0, np.int64)
        return np.concatenate([p[0] for p in parts]), np.concatenate([p[1] for p in parts])

    def counts(self, n: int) -> dict[str, int]:
        """How often each source was drawn in the slots before n."""
        number, inside = divmod(n, self.block)
        counts = np.array(self._counts(number), np.int64)
        if inside:
            counts += np.bincount(self._block(number)[0][:inside], minlength=len(counts))
        return dict(zip(self.names, counts.tolist(), strict=True))

    def slot_of(self, name: str, draw: int) -> int:
        """The slot of the draw number `draw` (from 0) of a source: the inverse of `slots`."""
        source = self.names.index(name)
        num, den = self._ratios[source]
        start, stop = draw * den // num, -(-(draw + 1) * den // num)
        sources, draws = self.slots(start, stop)
        return start + int(np.flatnonzero((sources == source) & (draws == draw))[0])

    def earliest_slot(self, name: str, draw: int) -> int:
        """The first slot that a draw of a source may have (the start of its window)."""
        num, den = self._ratios[self.names.index(name)]
        return draw * den // num

    def _counts(self, number: int) -> list[int]:
        """Draws of each source before the first slot of a block."""
        if self._restarts:
            if number not in self._kept_counts:
                while len(self._kept_counts) >= BLOCKS_KEPT:
                    del self._kept_counts[next(iter(self._kept_counts))]
                self._kept_counts[number] = self._counts_at(number * self.block)
            return self._kept_counts[number]
        while len(self._run_counts) <= number:
            self._block(len(self._run_counts) - 1)
        return self._run_counts[number]

    def _counts_at(self, T: int) -> list[int]:
        """Draws of each source before slot T, so that both the slots before T and those from T on have a
        schedule.

        A draw whose window reaches over T belongs on either side. Those taken in before T must leave every
        interval [a, T) no more draws than slots (a nested matroid), those left over must do so for every [T,
        b). Taking the earliest deadlines that still fit takes as many as any choice can from every set
        {deadline <= b}, so it serves the second condition too; a choice that meets both exists, because
        sharing every draw between the sides in proportion does, and two chains of sets make a totally
        unimodular system.
        """
        counts = [T * num // den for num, den in self._ratios]
        places = T - sum(counts)
        if places == 0:
            return counts
        open_draws = []  # (deadline, source, release)
        for s, (num, den) in enumerate(self._ratios):
            if T * num % den:
                open_draws.append((-(-(counts[s] + 1) * den // num), s, counts[s] * den // num))
        a0 = min(release for _, _, release in open_draws)
        contained = np.zeros(T - a0 + 1, np.int64)  # draws with their window in [a0, T), by release
        for s, (num, den) in enumerate(self._ratios):
            releases, _ = self._window_edges(s, -(-a0 * num // den), counts[s])
            contained += np.bincount(releases - a0, minlength=len(contained))
        slack = np.arange(T - a0, -1, -1) - contained[::-1].cumsum()[::-1]  # of [a, T), by a - a0
        for _, s, release in sorted(open_draws):
            before = slack[: release - a0 + 1]
            if places and before.min() >= 1:
                before -= 1
                counts[s] += 1
                places -= 1
        assert places == 0, "a choice exists for all weights"
        return counts

    def _block(self, number: int) -> tuple[np.ndarray, np.ndarray]:
        """`slots` of a whole block; the last few are kept."""
        if number not in self._kept:
            counts = self._counts(number)
            sources = self._earliest_deadline_first(number, counts)
            order = np.argsort(sources, kind="stable")
            drawn = np.bincount(sources, minlength=len(self.names))
            rank = np.empty(len(sources), np.int64)
            rank[order] = np.arange(len(sources)) - (drawn.cumsum() - drawn)[sources[order]]
            if not self._restarts and len(self._run_counts) == number + 1:
                self._run_counts.append([c + d for c, d in zip(counts, drawn.tolist(), strict=True)])
            while len(self._kept) >= BLOCKS_KEPT:
                del self._kept[next(iter(self._kept))]
            self._kept[number] = sources, rank + np.array(counts, np.int64)[sources]
        return self._kept[number]

    def _earliest_deadline_first(self, number: int, begin: list[int]) -> np.ndarray:
        """The source of every slot of a block, int64[block]. Of equal deadlines the first name goes first.

        begin: draws of each source before the block.
        """
        first, stop, n = number * self.block, (number + 1) * self.block, len(self.names)
        released = [-(-stop * num // den) for num, den in self._ratios]
        end = self._counts(number + 1) if self._restarts else released
        releases_by_source, keys_by_source = [], []
        for s in range(n):
            floors, ceilings = self._window_edges(s, begin[s], end[s] + 1)
            releases_by_source.append(floors[:-1])
            # deadline and source in one integer, to compare at once
            keys_by_source.append(ceilings[1:] * n + s)
        all_releases = np.concatenate(releases_by_source)
        by_release = np.argsort(all_releases, kind="stable")
        releases = [*all_releases[by_release].tolist(), stop]
        keys = np.concatenate(keys_by_source)[by_release].tolist()
        waiting: list[int] = []
        taken = []
        i = 0
        for slot in range(first, stop):
            while releases[i] <= slot:
                heapq.heappush(waiting, keys[i])
                i += 1
            taken.append(heapq.heappop(waiting))
        return np.array(taken) % n

    def _window_edges(self, source: int, start: int, stop: int) -> tuple[np.ndarray, np.ndarray]:
        """floor(i/w) and ceil(i/w) for i in range(start, stop), exactly, int64[stop - start].

        In doubles, counted from the first, and again in integers wherever those come near a whole number.
        Edges behind FAR (weights near 0) are cut there.
        """
        num, den = self._ratios[source]
        if (stop - start) * den >= num << 30 or stop * den >= num * FAR:  # doubles would be too coarse
            exact = [(i * den // num, -(-i * den // num)) for i in range(start, stop)]
            edges = np.array([[min(e, FAR) for e in pair] for pair in exact], np.int64).reshape(-1, 2)
            return edges[:, 0], edges[:, 1]
        base, rest = divmod(start * den, num)
        x = rest / num + np.arange(stop - start) * (den / num)
        floors = np.floor(x).astype(np.int64) + base
        ceilings = floors + 1
        for k in np.flatnonzero(np.abs(x - np.rint(x)) < 1e-5).tolist():
            floors[k], remainder = divmod((start + k) * den, num)
            ceilings[k] = floors[k] + (remainder > 0)
        return floors, ceilings


class StageOrder:
    """The rows of a stage in order.

    weights: by entry, scaled to sum to 1. An entry is a source, or a source with a note in brackets
    (`english[0.0-0.5]`) where several parts of one are drawn from. rows: for each entry how many rows, or
    which `range` of them. stage: a name or number; together with seed, entry and epoch it picks the
    permutation.
    """

    def __init__(
        self,
        weights: Mapping[str, float],
        rows: Mapping[str, int | range],
        global_batch_size: int,
        seed: int,
        stage: int | str,
    ):
        self.interleave = Interleave(weights)
        self.global_batch_size = global_batch_size
        self._identity = (seed, stage)
        ranges = [rows[name] for name in self.interleave.names]
        self._ranges = [r if isinstance(r, range) else range(r) for r in ranges]
        for name, r in zip(self.interleave.names, self._ranges, strict=True):
            if len(r) == 0:
                raise ValueError(f"{name}: expected at least one row")
        self._sizes = np.array([len(r) for r in self._ranges], np.int64)
        self._firsts = np.array([r.start for r in self._ranges], np.int64)
        self._sources = [name.partition("[")[0] for name in self.interleave.names]

    def sequences(self, step: int) -> list[tuple[str, int, int]]:
        """The global batch of a step (from 0), in order: global_batch_size times (source, epoch, row)."""
        start = step * self.global_batch_size
        entries, draws = self.interleave.slots(start, start + self.global_batch_size)
        sizes = self._sizes[entries]
        epochs, places = np.divmod(draws, sizes)
        indices = permute(places, sizes, self._keys(entries, epochs)) + self._firsts[entries]
        sources = [self._sources[e] for e in entries.tolist()]
        return list(zip(sources, epochs.tolist(), indices.tolist(), strict=True))

    def counts_at(self, step: int) -> dict[str, int]:
        """Sequences drawn from each entry before a step."""
        return self.interleave.counts(step * self.global_batch_size)

    def steps_of(self, source: str, index: int, steps: int) -> list[tuple[int, int, int]]:
        """Where a row is read in the first `steps` steps: (step, place in the batch, epoch), in order."""
        found = []
        for e, name in enumerate(self.interleave.names):
            if self._sources[e] != source or index not in self._ranges[e]:
                continue
            size, epoch = len(self._ranges[e]), 0
            row = np.array([index - self._ranges[e].start])
            while self.interleave.earliest_slot(name, epoch * size) < steps * self.global_batch_size:
                keys = self._keys(np.array([e]), np.array([epoch]))
                place = int(unpermute(row, np.array([size]), keys)[0])
                slot = self.interleave.slot_of(name, epoch * size + place)
                if slot < steps * self.global_batch_size:
                    found.append((*divmod(slot, self.global_batch_size), epoch))
                epoch += 1
        return sorted(found)

    def _keys(self, entries: np.ndarray, epochs: np.ndarray) -> np.ndarray:
        """Feistel keys of each (entry, epoch), uint64[n, ROUNDS]."""
        names = self.interleave.names
        pairs, which = np.unique(epochs * len(names) + entries, return_inverse=True)
        split = [divmod(pair, len(names)) for pair in pairs.tolist()]
        return np.stack([permutation_key(*self._identity, names[e], epoch) for epoch, e in split])[which]


def permutation_key(*identity: int | str) -> np.ndarray:
    """Round keys uint64[ROUNDS] from what the permutation belongs to."""
    digest = hashlib.blake2b(repr(identity).encode(), digest_size=8 * ROUNDS).digest()
    return np.frombuffer(digest, "<u8")


def permute(places: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """Element-wise P(place) in range(size), int64[n]; for one size and key, a bijection of range(size).

    places, sizes: int64[n], 0 <= place < size < 2**52; keys: uint64[n, ROUNDS].
    """
    return _walk(places, sizes, keys, range(ROUNDS), 1)


def unpermute(rows: np.ndarray, sizes: np.ndarray, keys: np.ndarray) -> np.ndarray:
    """The inverse of `permute`: the place at which each row comes."""
    return _walk(rows, sizes, keys, range(ROUNDS)[::-1], -1)


def _walk(x: np.ndarray, sizes: np.ndarray, keys: np.ndarray, rounds: range, sign: int) -> np.ndarray:
    result = np.empty(len(x), np.int64)
    todo = np.arange(len(x))
    round_keys = np.ascontiguousarray(keys.T)
    while len(todo):  # a*b - size <= sqrt(size) values lie outside: few walk on
        size = sizes[todo]
        a = np.ceil(np.sqrt(size)).astype(np.int64)
        b = -(-size // a)
        left, right = np.divmod(x, b)
        for r in rounds:
            key = round_keys[r, todo]
            if r % 2 == 0:
                left = _wrap(left + sign * _scramble(right, key, a), a)
            else:
                right = _wrap(right + sign * _scramble(left, key, b), b)
        x = left * b + right
        inside = x < size
        result[todo[inside]] = x[inside]
        todo, x = todo[~inside], x[~inside]
    return result


def _wrap(x: np.ndarray, modulus: np.ndarray) -> np.ndarray:
    """x mod modulus for -modulus <= x < 2 * modulus, without a division."""
    return np.where(x < 0, x + modulus, np.where(x < modulus, x, x - modulus))


def _scramble(half: np.ndarray, key: np.ndarray, modulus: np.ndarray) -> np.ndarray:
    """A number below modulus < 2**32 from half and key: SplitMix64's finalizer (Steele et al. 2014)."""
    z = half.astype(np.uint64) * np.uint64(0x9E3779B97F4A7C15) + key
    z = (z ^ (z >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    z ^= z >> np.uint64(31)
    return ((z >> np.uint64(32)) * modulus.astype(np.uint64) >> np.uint64(32)).astype(np.int64)
