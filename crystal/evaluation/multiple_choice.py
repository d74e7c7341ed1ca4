"""Rank classification: the answer that a model finds likeliest among those that are given.

Contexts and answers are encoded as lm-eval does it: both together, and what comes after the context's own tokens is
the answer. `acc`: the likeliest answer is right. `acc_norm`: likeliest per character. `mc2` (TruthfulQA): the share of
probability on the right ones. `bits_per_byte` of the right answer moves long before any of them leaves chance, so it is
what tells small models apart.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from crystal.errors import ConfigError
from crystal.evaluation.averages import mean_over_groups
from crystal.evaluation.scorer import Scored, score_tokens
from crystal.evaluation.task import Metric, Subject
from crystal.output.progress import Bar


@dataclass(frozen=True)
class Question:
    """pairs: (context, continuation) of each answer, as the model reads them. right: which answers are; lengths: in
    characters, of what acc_norm divides by. text: for people. group: a subject, whose mean counts as one."""

    id: str
    pairs: tuple[tuple[str, str], ...]
    right: tuple[int, ...]
    lengths: tuple[int, ...]
    text: str
    group: str | None = None


class MultipleChoice:
    """A set of questions. metric: the one to plot, `acc`, `acc_norm` or `mc2`; shots: examples before each question;
    details: what else its numbers depend on, and its source."""

    part = 256

    def __init__(self, name: str, questions: Sequence[Question], metric: str, shots: int, details: dict):
        self.name, self.questions, self.metric = name, list(questions), metric
        self._facts = {"kind": "rank classification", "shots": shots, "metric": metric, **details}
        if twice := _repeated([q.id for q in self.questions]):
            source = details.get("source")
            where = source.get("file", name) if isinstance(source, dict) else name
            raise ConfigError(f"{where}: expected items with ids of their own, got {twice} twice")

    def facts(self) -> dict:
        return self._facts

    def ids(self) -> list[str]:
        return [question.id for question in self.questions]

    def texts(self) -> Iterator[tuple[str, str]]:
        return ((question.id, question.text) for question in self.questions)

    def answer(self, subject: Subject, chosen: Sequence[int], bar: Bar) -> list[dict]:
        """{id, right, logprobs, tokens, greedy, cut, bytes, group?} of each question, one number an answer."""
        asked = [self.questions[i] for i in chosen]
        pairs = [pair for question in asked for pair in question.pairs]
        left = [len(question.pairs) for question in asked]

        def done(requests: int) -> None:
            while left and requests >= left[0]:
                requests -= left.pop(0)
                bar.advance()
            if left:
                left[0] -= requests

        scored = iter(score_tokens(subject.decoder, encoded(subject, pairs), done))
        return [_answered(question, [next(scored) for _ in question.pairs]) for question in asked]

    def metrics(self, answers: Sequence[dict]) -> dict[str, Metric]:
        """The one to plot first, then the others; of groups the mean over groups, and each by itself behind it."""
        if not answers:
            return {}
        chance = [len(a["right"]) / len(a["logprobs"]) for a in answers]
        right = {
            "acc": [_best(a["logprobs"]) in a["right"] for a in answers],
            "acc_norm": [_best(np.divide(a["logprobs"], a["lengths"])) in a["right"] for a in answers],
            "mc2": [float(_shares(a)[a["right"]].sum()) for a in answers],
        }
        several = [name for name in right if name == self.metric or (name != "mc2" and self.metric != "mc2")]
        ordered = sorted(several, key=lambda name: name != self.metric)
        groups = [a.get("group") for a in answers]
        guess = mean_over_groups(chance, groups).value
        found = {name: replace(mean_over_groups(right[name], groups), chance=guess) for name in ordered}
        found["bits_per_byte"] = mean_over_groups([_bits_per_byte(a) for a in answers], groups)
        for group in dict.fromkeys(g for g in groups if g is not None):
            mine = [i for i, g in enumerate(groups) if g == group]
            guess = mean_over_groups([chance[i] for i in mine], [group] * len(mine)).value
            values = [right[self.metric][i] for i in mine]
            found[f"{self.metric}/{group}"] = replace(mean_over_groups(values, [group] * len(mine)), chance=guess)
        return found


def encoded(subject: Subject, pairs: Sequence[tuple[str, str]]) -> list[tuple[list[int], list[int]]]:
    """(context ids, continuation ids) of texts. Spaces that end a context go to the continuation; an empty context is
    BOS, or else an end token, as in lm-eval."""
    encode, start = subject.tokenizer.encode, list(subject.start)
    contexts: dict[str, list[int]] = {}
    found = []
    for context, continuation in pairs:
        spaces = len(context) - len(context.rstrip())
        if spaces:
            context, continuation = context[:-spaces], context[-spaces:] + continuation
        if context not in contexts:
            contexts[context] = start + encode(context) if context else start or list(subject.ends[:1]) or [0]
        before = contexts[context]
        whole = start + encode(context + continuation) if context else before + encode(continuation)
        found.append((before, whole[len(before) :]))  # the context's own tokens, where the answer would merge with it
    return found


def _answered(question: Question, scored: list[Scored]) -> dict:
    answer = {
        "id": question.id,
        "right": list(question.right),
        "logprobs": [s.total for s in scored],
        "tokens": [len(s.logprobs) for s in scored],
        "greedy": [s.greedy for s in scored],
        "lengths": list(question.lengths),
        "bytes": [len(continuation.strip().encode("utf-8", "replace")) for _, continuation in question.pairs],
        "cut": max(s.cut for s in scored),
    }
    return answer if question.group is None else {**answer, "group": question.group}


def _best(scores: Sequence[float]) -> int:
    return int(np.argmax(scores))


def _shares(answer: dict) -> np.ndarray:
    """Probabilities of the answers, as shares of their sum."""
    logprobs = np.array(answer["logprobs"])
    p = np.exp(logprobs - logprobs.max())
    return p / p.sum()


def _bits_per_byte(answer: dict) -> float:
    """Of the right answer; of several, the likeliest."""
    return min(-answer["logprobs"][i] / math.log(2) / max(answer["bytes"][i], 1) for i in answer["right"])


def _repeated(ids: Sequence[str]) -> str | None:
    seen: set[str] = set()
    return next((i for i in ids if i in seen or seen.add(i)), None)
