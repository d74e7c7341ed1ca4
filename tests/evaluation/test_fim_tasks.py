"""Fill-in-the-middle: prompts as training rows have them, the published infilling items, and lines of held-out code."""

import itertools
import json
import math
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from programs_run import plainly, unconfined  # noqa: F401
from rich.console import Console
from test_code_tasks import ADD
from tiny_subject import run, subject  # noqa: F401

import crystal.evaluation.code_tasks as code_tasks
import crystal.evaluation.fim_tasks as fim_tasks
from crystal.data.fim import fim_row
from crystal.data.tokenizer import Tokenizer
from crystal.errors import ConfigError, DataError
from crystal.evaluation.fim_tasks import FimHeldOut, FimHumanEval, psm, similarity
from crystal.evaluation.items import Items
from crystal.evaluation.writing import Written
from crystal.output.progress import Bar

TWO = ADD | {"canonical_solution": "    c = a\n\n    return c + b\n"}


def bar():
    return Bar(Console(quiet=True))


def writes(monkeypatch, module, texts):
    asked = []

    def write(decoder, tokenizer, prompts, stops, ends, sampling):
        asked.append((prompts, stops, ends))
        yield [(i, Written(*texts[i], [5], 0)) for i in range(len(prompts))]

    monkeypatch.setattr(module, "write", write)
    return asked


# -- prompts ------------------------------------------------------------------------------------------------------


@given(st.text("ab =()\n\u00e9\u4e2d", min_size=1, max_size=40), st.data())
def test_a_prompt_and_its_middle_are_a_training_row(subject, text, data):  # noqa: F811
    tokenizer = subject.tokenizer
    low = data.draw(st.integers(0, len(text)))
    high = data.draw(st.integers(low, len(text)))
    segment, ends = [tokenizer.bos_id, *tokenizer.encode(text)], [tokenizer.eos_id] * 12
    drawn = SimpleNamespace(  # the document is chosen for FIM, not for SPM, and cut there; what follows is empty
        random=itertools.chain([0.0], itertools.repeat(1.0)).__next__, integers=lambda *_, size: np.array([high, low])
    )
    expected, _ = fim_row(np.array(segment + ends), tokenizer, 0.5, 0.5, drawn)
    prompt, cut = psm(tokenizer, subject.start, text[:low], text[high:], 10_000)
    whole = [*prompt, *tokenizer.encode(text[low:high]), tokenizer.eos_id]
    assert cut == 0
    assert expected.tolist()[: len(whole)] == whole


@given(st.integers(0, 60), st.integers(0, 60), st.integers(4, 80))
def test_a_prompt_without_room_keeps_what_is_next_to_the_middle(before, after, limit):
    tokenizer = SimpleNamespace(
        fim_prefix=-1, fim_suffix=-2, fim_middle=-3, encode=lambda text: [int(word) for word in text.split()]
    )
    prefix, suffix = " ".join(map(str, range(before))), " ".join(map(str, range(100, 100 + after)))
    ids, cut = psm(tokenizer, (7777,), prefix, suffix, limit)
    assert len(ids) <= limit
    assert (ids[0], ids[-1]) == (-1, -3)
    middle = ids.index(-2)
    kept, rest = ids[1:middle], ids[middle + 1 : -1]
    whole = [7777, *range(before)]
    assert kept == whole[len(whole) - len(kept) :]
    assert rest == list(range(100, 100 + len(rest)))
    assert cut == len(whole) + after - len(kept) - len(rest)
    assert cut == 0 or len(ids) == limit  # no room is left unused


# -- humaneval ----------------------------------------------------------------------------------------------------


def test_the_1033_published_lines_are_made_from_humaneval(plainly):  # noqa: F811
    task = FimHumanEval(Items())
    ids = task.ids()
    assert (len(ids), len(set(ids))) == (1033, 1033)
    assert ids[:2] == ["SingleLineInfilling/HumanEval/0/L0", "SingleLineInfilling/HumanEval/0/L1"]
    # blank lines count: named in the published results of others
    assert {"SingleLineInfilling/HumanEval/11/L6", "SingleLineInfilling/HumanEval/25/L12"} <= set(ids)
    assert "made from HumanEval" in task.facts()["made"]


def test_a_line_is_asked_for_between_its_neighbours_and_the_whole_is_run(own, subject, monkeypatch, plainly):  # noqa: F811
    task = FimHumanEval(own("humaneval", [TWO]))
    assert task.ids() == ["SingleLineInfilling/HumanEval/0/L0", "SingleLineInfilling/HumanEval/0/L2"]
    asked = writes(monkeypatch, code_tasks, [("    c = a", "stop"), ("   return b + c", "eos")])
    monkeypatch.setattr(fim_tasks, "room", lambda *_: 1000)
    shown = bar()
    first, second = task.answer(subject, [0, 1], shown)
    assert shown.completed == 2
    ((prompts, stops, ends),) = asked
    tokenizer = subject.tokenizer
    before, after = f"{TWO['prompt']}    c = a\n\n", ""
    assert prompts[1][0] == [
        tokenizer.fim_prefix, tokenizer.bos_id, *tokenizer.encode(before),
        tokenizer.fim_suffix, *tokenizer.encode(after), tokenizer.fim_middle,
    ]  # fmt: skip
    assert stops == ("\n",)
    assert {tokenizer.eos_id, tokenizer.fim_middle, tokenizer.fim_pad} <= set(ends)
    assert plainly[0] == f"{TWO['prompt']}    c = a\n\n    return c + b\n\n{TWO['test']}\ncheck(add)\n"
    assert (first["passed"], first["exact"], first["n"], first["cut"]) == (1, 1, 1, 0)
    assert (second["passed"], second["exact"]) == (0, 0)  # its indentation is wrong
    metrics = task.metrics([first, second])
    assert (list(metrics), metrics["pass@1"].value) == (["pass@1", "exact_match"], 0.5)
    assert json.loads(json.dumps([first, second])) == [first, second]


def test_a_line_without_its_newline_runs_into_the_suffix(own, subject, monkeypatch, plainly):  # noqa: F811
    """The published harness joins prompt, completion and suffix as they are."""
    task = FimHumanEval(own("humaneval", [TWO]))
    writes(monkeypatch, code_tasks, [("    c = a", "eos")])
    (answer,) = task.answer(subject, [0], bar())
    assert f"{TWO['prompt']}    c = a\n    return c + b" in plainly[0]  # the blank line has become its end
    assert (answer["exact"], answer["passed"]) == (1, 1)


def test_the_published_file_comes_first(own, subject, monkeypatch, plainly):  # noqa: F811
    published = {
        "task_id": "SingleLineInfilling/HumanEval/0/L0",
        "prompt": "def return1():\n",
        "suffix": "",
        "canonical_solution": "    return 1\n",
        "test": "def check(candidate):\n    assert candidate() == 1",
        "entry_point": "return1",
    }
    own("humaneval", [TWO])
    task = FimHumanEval(own("humaneval_infilling", [published]))
    writes(monkeypatch, code_tasks, [("    return 1", "stop")])
    assert task.facts()["made"] == "the published infilling file"
    assert task.answer(subject, [0], bar())[0]["passed"] == 1
    with pytest.raises(DataError, match=r"humaneval_infilling\.jsonl: item 1: suffix: expected a text"):
        FimHumanEval(own("humaneval_infilling", [published | {"suffix": None}]))


def test_what_the_model_writes_really_ends_with_its_line(own, subject, plainly):  # noqa: F811
    (answer,) = FimHumanEval(own("humaneval", [TWO]), max_new_tokens=8).answer(subject, [1], bar())
    assert "\n" not in answer["samples"][0]["text"]
    assert answer["samples"][0]["ended"] in ("stop", "eos", "length")
    assert answer["cut"] >= 0


def test_without_fim_tokens_or_confinement_it_is_one_line_at_once(own, subject, monkeypatch, unconfined):  # noqa: F811
    monkeypatch.setattr(code_tasks, "write", lambda *args: pytest.fail("it wrote"))
    task = FimHumanEval(own("humaneval", [TWO]))
    with pytest.raises(ConfigError, match=r"^programs cannot be confined here"):
        task.answer(subject, [0], bar())
    amber = Tokenizer.load(subject.tokenizer.path, added_tokens=False)
    for tokenizer in (amber, SimpleNamespace(encode=None)):
        with pytest.raises(ConfigError, match=r"FIM needs a vocabulary with CrystalCoder's added tokens$"):
            task.answer(replace(subject, tokenizer=tokenizer), [0], bar())


# -- held-out code ------------------------------------------------------------------------------------------------


def test_held_out_lines_come_from_the_sources_with_fim(run):  # noqa: F811
    task = FimHeldOut(run)
    assert task.facts()["sources"] == ["english", "html", "python"]  # those of the stages with a rate
    assert {name.split("/")[0] for name in task.ids()} == {"python"}  # the others' documents have one line each
    assert task.facts()["documents_without_a_line"] > 0
    assert json.loads(json.dumps(task.facts())) == task.facts()
    again, other = FimHeldOut(run), FimHeldOut(run, seed=1)
    assert list(again.texts()) == list(task.texts())
    assert [gap.middle for gap in again._gaps] == [gap.middle for gap in task._gaps]
    assert [gap.middle for gap in other._gaps] != [gap.middle for gap in task._gaps]
    for gap in task._gaps:
        assert gap.prefix.endswith("\n")
        assert gap.middle.strip()
        assert "\n" not in gap.middle[:-1]
    assert len(FimHeldOut(run, per_source=3)._gaps) <= 3


def test_held_out_answers_hold_what_the_metrics_need(run, subject):  # noqa: F811
    task, shown = FimHeldOut(run), bar()
    chosen = list(range(len(task.ids())))
    answers = task.answer(subject, chosen, shown)
    assert shown.completed == len(chosen)
    assert [answer["id"] for answer in answers] == task.ids()
    assert json.loads(json.dumps(answers)) == answers
    metrics = task.metrics(answers)
    assert list(metrics)[:2] == ["exact_match", "edit_similarity"]
    gain = metrics["bits_per_byte_left_only"].value - metrics["bits_per_byte"].value
    assert metrics["bits_per_byte_gain"].value == pytest.approx(gain)
    assert all(metric.chance is None for metric in metrics.values())
    parts = task.answer(subject, chosen[3:], bar()) + task.answer(subject, chosen[:3], bar())
    for one, other in zip(answers, parts[-3:] + parts[:-3], strict=True):
        assert one["bits"] == pytest.approx(other["bits"], rel=1e-4)
        assert one["text"] == other["text"]


def test_bits_of_a_middle_are_those_of_a_plain_forward_pass(run, subject):  # noqa: F811
    task = FimHeldOut(run)
    (gap,) = [gap for gap in task._gaps if gap.middle.endswith("\n")][:1]
    gap = replace(gap, prefix="def f\n", middle="return x\n", suffix="print")
    task._gaps = [gap]
    (answer,) = task.answer(subject, [0], bar())
    tokenizer = subject.tokenizer
    middle, plain = tokenizer.encode(gap.middle), tokenizer.encode(gap.prefix + gap.middle)
    context, cut = psm(tokenizer, subject.start, gap.prefix, gap.suffix, task.facts()["window"])
    head = [*subject.start, *tokenizer.encode(gap.prefix)]
    assert (cut, [*subject.start, *plain][: len(head)]) == (0, head)
    for key, ids, count in (
        ("bits", context + middle, len(middle)),
        ("bits_left_only", [*subject.start, *plain], len(plain) + 1 - len(head)),
    ):
        with torch.inference_mode():
            logprobs = subject.decoder(torch.tensor([ids]))[0].float().log_softmax(-1)
        nats = sum(logprobs[at - 1, ids[at]].item() for at in range(len(ids) - count, len(ids)))
        assert answer[key] == pytest.approx(-nats / math.log(2), rel=1e-4)
    assert answer["bytes"] == 9


def test_a_model_that_sees_the_suffix_gains_by_it(run, subject, monkeypatch):  # noqa: F811
    """Planted: a scorer to which every token costs a bit less behind FIM's prompt."""
    task = FimHeldOut(run)
    fim = subject.tokenizer.fim_middle

    def score(decoder, requests):
        return [
            SimpleNamespace(logprobs=[-math.log(2) * (0.5 if fim in context else 1.5)] * len(continuation))
            for context, continuation in requests
        ]

    monkeypatch.setattr(fim_tasks, "score_tokens", score)
    metrics = task.metrics(task.answer(subject, range(len(task.ids())), bar()))
    assert metrics["bits_per_byte_gain"].value > 0.2
    assert metrics["bits_per_byte_gain"].stderr > 0


def test_no_run_no_documents_and_no_fim_tokens_are_one_line(run, tmp_path, monkeypatch):  # noqa: F811
    monkeypatch.setattr(fim_tasks, "no_fim", lambda tokenizer: "another vocabulary")
    with pytest.raises(ConfigError, match=r"run: FIM needs another vocabulary$"):
        FimHeldOut(run)
    monkeypatch.undo()
    monkeypatch.setattr(fim_tasks, "_gap", lambda document, seed: None)
    with pytest.raises(DataError, match="run: expected held-out documents of english, html, python with two lines"):
        FimHeldOut(run)
    with pytest.raises(ConfigError, match=r"expected a run directory, there is no config\.yaml in it"):
        FimHeldOut(tmp_path)
    with pytest.raises(ConfigError, match="per_source: expected at least 1, got 0"):
        FimHeldOut(run, per_source=0)


@given(st.text("abc ", max_size=9), st.text("abc ", max_size=9))
def test_similarity_is_one_less_the_share_of_edits(a, b):
    def distance(a, b):
        if not a or not b:
            return len(a) + len(b)
        return min(distance(a[1:], b) + 1, distance(a, b[1:]) + 1, distance(a[1:], b[1:]) + (a[0] != b[0]))

    a, b = a[:5], b[:5]
    assert similarity(a, b) == pytest.approx(1 - distance(a, b) / max(len(a), len(b), 1))
    assert similarity(a, a) == 1
