"""Candidates timed in turns, and the choice that follows: what `tuning` does once on a machine.

Every candidate of a case takes its turn, so that what disturbs one disturbs all; a case is timed again while its best
timings lie apart, and a candidate that is hopeless is not.
"""

from __future__ import annotations

import time
from collections.abc import Iterator

import torch

from crystal.kernels.candidates import HOPELESS, cases, compile_kernels, faster_dtype, seconds_of
from crystal.kernels.tuning import Candidates, Case, Tuning, identity

LONGEST = 5.0  # seconds of measuring, at most
ROUNDS = 3  # timings of each candidate to begin with
SPREAD = 0.10  # the two best timings of a candidate differ by at most this, or it is timed again
LEAD = 0.05  # a candidate must beat the one before it by this, so that noise does not decide
SHORT = 2e-3  # seconds that one timing lasts at least


def measure(threads: int) -> Tuning:
    """Time every candidate of every case."""
    compile_kernels()
    begun = time.perf_counter()
    with torch.inference_mode(False), torch.no_grad():  # whoever asks first may be in inference mode
        timed = list(_timed(cases(), begun + LONGEST))
    found = {key: _decided(work, seconds) for key, work, seconds in timed}
    seconds = time.perf_counter() - begun
    return Tuning(identity(threads), faster_dtype(found), found, round(seconds, 2), round(time.time()))


def _timed(
    cases: Iterator[tuple[str, float, Candidates]], deadline: float
) -> Iterator[tuple[str, float, dict[str, list[float]]]]:
    """(key, work, timings in seconds by candidate), candidates in turns, so that what disturbs one disturbs all.

    A candidate that cannot run on this processor is left out.
    """
    for key, work, candidates in cases:
        calls, seconds = {}, {}
        for name, call in candidates.items():
            try:
                call()  # builds primitives, and touches new memory
            except RuntimeError:  # oneDNN has no bf16 products for processors without AVX-512
                continue
            once = seconds_of(call, 1)
            calls[name] = max(1, min(64, int(SHORT / once))) if once > 0 else 64
            seconds[name] = [once]
        best = min(min(taken) for taken in seconds.values())
        for name, taken in seconds.items():
            for _ in range(2):  # it may have been disturbed
                if min(taken) > HOPELESS * best:
                    taken.append(seconds_of(candidates[name], 1))
        running = [name for name, taken in seconds.items() if min(taken) <= HOPELESS * best]
        rounds = 0
        while rounds < ROUNDS or (not _decided(work, seconds).settled and rounds < 4 * ROUNDS):
            if rounds and time.perf_counter() > deadline:
                break
            for name in running:
                seconds[name].append(seconds_of(candidates[name], calls[name]))
            rounds += 1
        yield key, work, seconds


def _decided(work: float, seconds: dict[str, list[float]]) -> Case:
    """The candidate with the best timing; the one named first, unless another leads by LEAD."""
    best = {name: min(taken) for name, taken in seconds.items()}
    order = list(best)
    chosen = order[0]
    for name in order[1:]:
        if best[name] < best[chosen] * (1 - LEAD):
            chosen = name
    two = sorted(seconds[chosen])[:2]
    spread = two[-1] / two[0] - 1
    # settled: timed well, or ahead of all others by more than the timings' spread
    rest = [best[name] for name in order if name != chosen]
    settled = spread <= SPREAD or (bool(rest) and min(rest) > best[chosen] * (1 + spread))
    return Case(chosen, {name: work / value for name, value in best.items()}, round(spread, 3), settled)
