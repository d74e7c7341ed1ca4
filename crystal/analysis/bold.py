"""BOLD (Dhamala et al. 2021, arXiv 2101.11718): beginnings of Wikipedia's sentences, by domain, group and title.

As Analysis360 asks it (safety360/bold): 20 new tokens at temperature 0.1 and top_p 0.9, each text scored by VADER. It
scores prompt and continuation together, so a part of what it finds was in the prompt already; here every text has
three scores: of both, of the continuation alone, and of the prompt alone, which no model can change.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path

import numpy as np

from crystal.analysis.group_gaps import NEGATIVE, POSITIVE, Scores, summary
from crystal.errors import ConfigError, DataError
from crystal.evaluation.choice_sets import NoItems
from crystal.evaluation.task import Metric, Subject
from crystal.evaluation.writing import Sampling, write
from crystal.files import from_json, regular_bytes
from crystal.output.progress import Bar

DOMAINS = ("gender", "race", "religious_ideology", "political_ideology", "profession")
SCORED = ("whole", "continuation", "prompt")
SAMPLING = Sampling(samples=1, temperature=0.1, top_p=0.9, max_new_tokens=20, seed=0)
LICENSE = "CC-BY-SA-4.0"
NO_PROMPTS = (
    "no BOLD prompts: they are in no package; give --items DIR with {file} in it or in DIR/bold "
    "(github.com/amazon-science/bold)"
)


class Bold:
    """One domain's prompts as a task. keys: (group, title) of each; sizes: how many prompts each group has."""

    part = 512

    def __init__(
        self, domain: str, prompts: Sequence[tuple[str, str, str]], source: dict, sampling: Sampling = SAMPLING
    ):
        """prompts: (group, title, text) of each."""
        self.domain, self.name, self.sampling = domain, f"bold-{domain}", sampling
        self.prompts = list(prompts)
        self.keys = [(group, title) for group, title, _ in self.prompts]
        self.sizes: dict[str, int] = {}
        self._ids, seen = [], {}
        for group, title, _ in self.prompts:
            self.sizes[group] = self.sizes.get(group, 0) + 1
            number = seen[group, title] = seen.get((group, title), -1) + 1
            self._ids.append(f"{group}/{title}/{number}")
        self._facts = {
            "kind": "sentiment of what follows a prompt",
            "domain": domain,
            "sampling": sampling.facts(),
            "prompt": "as published, with the space at its end, as Analysis360 reads it",
            "score": f"VADER's compound; positive from {POSITIVE}, negative to {NEGATIVE}",
            "vaderSentiment": version(),
            "source": source,
        }

    def facts(self) -> dict:
        return self._facts

    def ids(self) -> list[str]:
        return self._ids

    def texts(self) -> Iterator[tuple[str, str]]:
        return ((i, text) for i, (_, _, text) in zip(self._ids, self.prompts, strict=True))

    def chosen(self, limit: int | None, seed: int = 0) -> list[int]:
        """Numbers of the prompts to ask: all, or `limit` of them, of every group as many as of another as far as it
        has them; within a group at random, by seed. Those of a smaller limit are among those of a larger one."""
        if limit is None or limit >= len(self.prompts):
            return list(range(len(self.prompts)))
        rng = np.random.default_rng(seed)
        waiting = []
        for group in self.sizes:
            mine = [i for i, (own, _) in enumerate(self.keys) if own == group]
            waiting.append([mine[at] for at in rng.permutation(len(mine))])
        found: list[int] = []
        for turn in range(max(map(len, waiting))):
            found += [own[turn] for own in waiting if turn < len(own)]
            if len(found) >= limit:
                break
        return sorted(found[:limit])

    def answer(self, subject: Subject, chosen: Sequence[int], bar: Bar) -> list[dict]:
        """{id, group, title, prompt, text, ended, tokens, cut, scores: {whole, continuation, prompt}} of each."""
        start, encode = list(subject.start), subject.tokenizer.encode
        asked = [(start + encode(self.prompts[i][2]), self.sampling.seed_of(self._ids[i], 0)) for i in chosen]
        answers: list[dict] = [{} for _ in chosen]
        for batch in write(subject.decoder, subject.tokenizer, asked, (), subject.ends, self.sampling):
            for number, written in batch:
                group, title, prompt = self.prompts[chosen[number]]
                answers[number] = {
                    "id": self._ids[chosen[number]],
                    "group": group,
                    "title": title,
                    "prompt": prompt,
                    "text": written.text,
                    "ended": written.ended,
                    "tokens": len(written.tokens),
                    "cut": written.cut,
                    "scores": {
                        "whole": compound(prompt + written.text),
                        "continuation": compound(written.text),
                        "prompt": compound(prompt),
                    },
                }
            bar.advance(len(batch))
        return answers

    def scores(self, answers: Sequence[dict], scored: str) -> Scores:
        """Of the answers; each group weighs as much as it has prompts, however many of them were asked."""
        values = [answer["scores"][scored] for answer in answers]
        return Scores.of(values, [(answer["group"], answer["title"]) for answer in answers], self.sizes)

    def metrics(self, answers: Sequence[dict]) -> dict[str, Metric]:
        """mean, std, positive, neutral, negative: Analysis360's numbers, of prompt and continuation together; and
        continuation_mean."""
        if not answers:
            return {}
        whole, alone = (summary(self.scores(answers, scored)) for scored in ("whole", "continuation"))
        found = {"mean": Metric(whole["mean"], whole["stderr"]), "std": Metric(whole["std"], None)}
        found |= {name: Metric(whole[name]["share"], None) for name in ("positive", "neutral", "negative")}
        return found | {"continuation_mean": Metric(alone["mean"], alone["stderr"])}


def domains(directory: Path | None) -> tuple[list[Bold], dict[str, str]]:
    """The domains whose files are in a directory, or in bold/ in it, and what is to be said of the others.

    Raises NoItems where there is none, DataError for a file that is not of BOLD's form, ConfigError without
    vaderSentiment.
    """
    found, left_out = [], {}
    for domain in DOMAINS:
        name = f"{domain}_prompt.json"
        places = [] if directory is None else [directory / name, directory / "bold" / name]
        file = next((place for place in places if place.is_file()), None)
        if file is None:
            left_out[f"bold-{domain}"] = NO_PROMPTS.format(file=name)
        else:
            found.append(_read(domain, file))
    if not found:
        raise NoItems(NO_PROMPTS.format(file=f"{DOMAINS[0]}_prompt.json and the others"), key="items")
    return found, left_out


def _read(domain: str, file: Path) -> Bold:
    """{group: {title: [prompt, …]}}."""
    try:
        content = regular_bytes(file)
        groups = from_json(content)
    except OSError as error:
        raise DataError(f"{file}: cannot be read: {error.strerror}", file=file) from None
    except ValueError as error:
        raise DataError(f"{file}: expected JSON: {error}", file=file) from None
    prompts, empty = [], 0
    for group, titles in _items(groups, file, ()):
        for title, texts in _items(titles, file, (group,)):
            where = f"{file}: {group}.{title}"
            if not isinstance(texts, list) or not all(isinstance(text, str) for text in texts):
                raise DataError(f"{where}: expected a list of prompts", file=file)
            empty += sum(not text.strip() for text in texts)
            # half a surrogate pair has no bytes
            prompts += [(group, title, text.encode("utf-8", "replace").decode()) for text in texts if text.strip()]
    if not prompts:
        raise DataError(f"{file}: expected prompts, there is none", file=file)
    source = {"file": str(file), "sha256": hashlib.sha256(content).hexdigest(), "license": LICENSE}
    if empty:  # five of those published: they name no group
        source |= {"empty_prompts_left_out": empty}
    return Bold(domain, prompts, source)


def _items(value: object, file: Path, path: tuple[str, ...]) -> list[tuple[str, object]]:
    if not isinstance(value, dict):
        where = ": ".join((str(file), *path))
        raise DataError(f"{where}: expected {{group: {{title: [prompt, …]}}}}", file=file, key=".".join(path) or None)
    return list(value.items())


def compound(text: str) -> float:
    """VADER's sentiment of a text, from -1 to 1; 0 where it knows no word of it."""
    return float(_analyzer().polarity_scores(text)["compound"])


def version() -> str:
    """Of vaderSentiment. Raises ConfigError where it is not installed."""
    _analyzer()
    return importlib.metadata.version("vaderSentiment")


@cache
def _analyzer():
    try:
        from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
    except ImportError:
        raise ConfigError("sentiment needs vaderSentiment: pip install 'crystal-zoo[eval]'") from None
    return SentimentIntensityAnalyzer()
