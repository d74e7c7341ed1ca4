"""Token learning curves: the surprisal of tokens of held-out rows, checkpoint by checkpoint (arXiv 2308.15419).

A curve is the mean surprisal, in nats, of all places where a token of a class stands, over the checkpoints' steps. It
is smoothed over neighbouring checkpoints, (1, 2, 1) / 4, where there are five or more. A class is acquired where its
curve first falls below the middle between chance, ln(vocabulary), and its own least value; a quarter and three
quarters of the way are told too. Steps are interpolated between checkpoints in log(step), as the paper fits its curves;
before the first checkpoint nothing is known, and it is said so.

Smoothing takes the edge off a fall between two checkpoints, as where a stage begins: a step of acquisition is known no
better than to the checkpoints around it.

Classes are tokens by how often they stand in the training rows (ranks 1-10, 11-100, …), tokens one by one, and sources.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch

from crystal.backends.base import MicroBatch
from crystal.zoo.decoder import Decoder

THRESHOLDS = (0.25, 0.5, 0.75)  # of the way from chance to a curve's least value
LEAST = 20  # places of a token that is told about by itself
_MOST = 500  # tokens


@dataclass
class Surprisals:
    """Sums of nats and counts of places: by token id, and by source."""

    tokens: dict[int, list[float]]
    sources: dict[str, list[float]]

    @classmethod
    def read(cls, content: Mapping) -> Surprisals:
        return cls({int(k): v for k, v in content["tokens"].items()}, dict(content["sources"]))


@torch.inference_mode()
def surprisals(decoder: Decoder, batches: Sequence[MicroBatch], sources: Sequence[str]) -> Surprisals:
    """Of every label that weighs something."""
    found = Surprisals({}, {})
    device = decoder.embed.weight.device
    for batch in batches:
        parts = (batch.ids_BT, batch.labels_BT, batch.weights_BT, batch.documents_BT)
        _, nats_BT = decoder.loss(*(part.to(device) for part in parts))
        nats, counted = nats_BT.double().cpu().numpy(), batch.weights_BT.numpy() > 0
        ids = batch.labels_BT.numpy()[counted]
        sums, counts = np.bincount(ids, nats[counted]), np.bincount(ids)
        for i in np.flatnonzero(counts).tolist():
            _add(found.tokens, i, sums[i], counts[i])
        for row, source in enumerate(batch.sources_B.tolist()):
            if counted[row].any():
                _add(found.sources, sources[source], nats[row][counted[row]].sum(), counted[row].sum())
    return found


def _add(sums: dict, key, nats: float, count: int) -> None:
    own = sums.setdefault(key, [0.0, 0])
    own[0] += float(nats)
    own[1] += int(count)


def by_rank(trained: Counter) -> dict[int, str]:
    """Token id → its class, by its place among the tokens of training rows; those in none are the rarest."""
    classes = {}
    for rank, (token, _) in enumerate(sorted(trained.items(), key=lambda item: (-item[1], item[0])), 1):
        power = len(str(rank - 1))
        classes[token] = f"{10 ** (power - 1) + 1 if power > 1 else 1}-{10**power}"
    return classes


def curves(found: Mapping[int, Surprisals], classes: Mapping[int, str], vocab_size: int) -> dict:
    """{chance, ranks: {class: curve}, sources: {source: curve}, tokens: [{id, …curve}]}, JSON-ready.

    found: by step. A curve: {n, steps, nats, smoothed, least, acquired: {share of the way: {step, bound}}}.
    """
    steps, chance = sorted(found), math.log(vocab_size)
    ids = sorted(set().union(*(s.tokens for s in found.values())))
    unseen = "in no sampled row"
    members: dict[str, list[int]] = {}
    for i in ids:
        members.setdefault(classes.get(i, unseen), []).append(i)
    order = sorted(members, key=lambda name: (name == unseen, len(name), name))
    ranks = {name: curve(steps, [_sum(found[s].tokens, members[name]) for s in steps], chance) for name in order}
    names = sorted(set().union(*(s.sources for s in found.values())))
    sources = {name: curve(steps, [_sum(found[s].sources, [name]) for s in steps], chance) for name in names}
    common = [i for i in ids if found[steps[-1]].tokens.get(i, [0, 0])[1] >= LEAST]
    common.sort(key=lambda i: -found[steps[-1]].tokens[i][1])
    tokens = [{"id": i} | curve(steps, [_sum(found[s].tokens, [i]) for s in steps], chance) for i in common[:_MOST]]
    return {"chance": chance, "ranks": ranks, "sources": sources, "tokens": tokens}


def _sum(sums: Mapping, keys: Sequence) -> tuple[float, int]:
    own = [sums[key] for key in keys if key in sums]
    return math.fsum(nats for nats, _ in own), sum(count for _, count in own)


def curve(steps: Sequence[int], sums: Sequence[tuple[float, int]], chance: float) -> dict:
    """One class over the checkpoints; see `curves`."""
    nats = [total / max(count, 1) for total, count in sums]
    smooth = smoothed(nats)
    least = min(smooth)
    acquired = {str(t): first_below(steps, smooth, chance + t * (least - chance)) for t in THRESHOLDS}
    return {"n": sums[-1][1], "steps": list(steps), "nats": nats, "smoothed": smooth, "least": least,
            "acquired": acquired if least < chance else None}  # fmt: skip


def smoothed(values: Sequence[float]) -> list[float]:
    """(1, 2, 1) / 4 over neighbours, the ends as they are; under five values all as they are."""
    if len(values) < 5:
        return list(values)
    middle = [(a + 2 * b + c) / 4 for a, b, c in zip(values, values[1:], values[2:], strict=False)]
    return [values[0], *middle, values[-1]]


def first_below(steps: Sequence[int], values: Sequence[float], threshold: float) -> dict | None:
    """Where a curve first reaches a threshold from above: {step, bound}; None where it never does.

    bound: "at" between two checkpoints, "at most" where the first is below already.
    """
    for i, value in enumerate(values):
        if value <= threshold:
            if i == 0:
                return {"step": float(steps[0]), "bound": "at most"}
            share = (values[i - 1] - threshold) / (values[i - 1] - value)
            low, high = math.log(max(steps[i - 1], 1)), math.log(steps[i])
            return {"step": round(math.exp(low + share * (high - low)), 1), "bound": "at"}
    return None
