"""Bits per byte: every token of a document once, with context, against plain forward passes."""

import json
import math
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from rich.console import Console
from tiny_subject import run, subject  # noqa: F401

import crystal.evaluation.bits_per_byte as module
from crystal.errors import ConfigError, DataError
from crystal.evaluation.bits_per_byte import BitsPerByte, beginning, windows
from crystal.evaluation.items import Items
from crystal.output.progress import Bar


def bar():
    return Bar(Console(quiet=True))


def write_texts(directory, name, texts):
    (directory / f"{name}.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))


def bits(subject, ids):  # noqa: F811
    with torch.inference_mode():
        logprobs = subject.decoder(torch.tensor([ids]))[0].float().log_softmax(-1)
    return [-logprobs[at - 1, ids[at]].item() / math.log(2) for at in range(1, len(ids))]


@given(st.integers(1, 3), st.integers(0, 300), st.integers(8, 70))
def test_windows_hold_every_token_once_behind_half_a_window(start, length, limit):
    before, ids = [-1] * start, list(range(length))
    found = list(windows(before, ids, limit))
    assert [token for _, new in found for token in new] == ids
    for number, (context, new) in enumerate(found):
        assert context
        assert new
        assert len(context) + len(new) <= limit
        assert number == 0 or len(context) >= limit - limit // 2
        whole = before + ids
        assert whole[start + new[0] - len(context) : start + new[-1] + 1] == context + new
    assert len(found) == (0 if not length else 1 + max(0, math.ceil((length + start - limit) / (limit // 2))))


def test_a_short_document_has_the_bits_of_one_forward_pass(subject, tmp_path):  # noqa: F811
    text = "def return self caf\u00e9"
    write_texts(tmp_path, "notes", [text, "the of and to"])
    task, shown = BitsPerByte(None, Items(tmp_path)), bar()
    first, second = task.answer(subject, [0, 1], shown)
    assert shown.completed == 2
    ids = [subject.tokenizer.bos_id, *subject.tokenizer.encode(text)]
    assert first["bits"] == pytest.approx(sum(bits(subject, ids)), rel=1e-4)
    assert (first["bytes"], first["tokens"], first["windows"]) == (len(text) + 1, len(ids) - 1, 1)
    assert (first["id"], first["source"], second["id"]) == ("notes/1", "notes", "notes/2")
    metrics = task.metrics([first, second])
    expected = (first["bits"] + second["bits"]) / (first["bytes"] + second["bytes"])
    assert metrics["bits_per_byte/notes"].value == pytest.approx(expected)
    assert metrics["bits_per_byte"] == metrics["bits_per_byte/notes"]
    assert metrics["bits_per_byte"].chance is None


@settings(max_examples=5)
@given(st.integers(60, 200))
def test_a_long_document_is_scored_window_by_window(subject, tmp_path_factory, words):  # noqa: F811
    directory = tmp_path_factory.mktemp("long")
    text = " ".join(f"x{i}" for i in range(words))
    write_texts(directory, "long", [text])
    (answer,) = BitsPerByte(None, Items(directory)).answer(subject, [0], bar())
    whole = [subject.tokenizer.bos_id, *subject.tokenizer.encode(text)]
    limit = subject.decoder.config.max_seq_len
    expected, at, stop = 0.0, 1, min(limit, len(whole))
    while at < len(whole):
        low = max(stop - limit, 0)
        expected += sum(bits(subject, whole[low:stop])[at - low - 1 :])
        at, stop = stop, min(stop + limit // 2, len(whole))
    assert answer["bits"] == pytest.approx(expected, rel=1e-4)
    assert (answer["tokens"], answer["bytes"]) == (len(whole) - 1, len(text))


def test_a_runs_sources_are_scored_each_by_itself(run, subject):  # noqa: F811
    task = BitsPerByte(run, Items())
    facts = task.facts()
    assert list(facts["documents"]) == ["english", "html", "python"]
    assert all(facts["documents"].values())
    assert json.loads(json.dumps(facts)) == facts
    answers = task.answer(subject, range(len(task.ids())), bar())
    assert [answer["id"] for answer in answers] == task.ids()
    assert len(set(task.ids())) == len(task.ids())
    metrics = task.metrics(answers)
    assert list(metrics) == ["bits_per_byte", "bits_per_byte/english", "bits_per_byte/html", "bits_per_byte/python"]
    parts = [metrics[name] for name in list(metrics)[1:]]
    assert metrics["bits_per_byte"].value == pytest.approx(sum(part.value for part in parts) / 3)
    assert 0 < metrics["bits_per_byte"].value < facts["uniform"]  # it has learned something
    assert all(metric.stderr > 0 for metric in metrics.values())
    for (name, text), answer in zip(task.texts(), answers, strict=True):
        assert (name, len(text.encode())) == (answer["id"], answer["bytes"])
        assert not {"<s>", "</s>"} & set(text.split())
        assert answer["tokens"] == len(subject.tokenizer.encode(text))
    assert facts["window"] == 32  # the rows it was trained on; the model could see 64
    longest = max(answers, key=lambda answer: answer["tokens"])
    assert longest["windows"] == 1 + math.ceil((longest["tokens"] + 1 - 32) / 16)
    half = task.answer(subject, [2, 0], bar())
    assert [one["bits"] for one in half] == pytest.approx([answers[2]["bits"], answers[0]["bits"]], rel=1e-4)


def test_held_out_texts_are_those_of_the_corpus_and_none_that_was_trained_on(run, corpus):  # noqa: F811
    task = BitsPerByte(run, Items(), per_source=None)
    lines = {s: (corpus / f"{s}.jsonl").read_text().splitlines() for s in ("english", "html", "python")}
    known = {source: {json.loads(line)["text"] for line in lines[source]} for source in lines}
    assert all(text in known[name.split("/")[0]] for name, text in task.texts())
    assert task.facts()["source"]["run"]["split"] == "val"
    few = BitsPerByte(run, Items(), per_source=2)
    assert set(few.ids()) <= set(task.ids())
    assert max(few.facts()["documents"].values()) == 2


def test_uniform_is_what_a_model_that_knows_nothing_has(run, subject, monkeypatch):  # noqa: F811
    task = BitsPerByte(run, Items())
    vocabulary = subject.decoder.config.vocab_size

    def score(decoder, requests):
        return [SimpleNamespace(logprobs=[-math.log(vocabulary)] * len(new)) for _, new in requests]

    monkeypatch.setattr(module, "score_tokens", score)
    answers = task.answer(subject, range(len(task.ids())), bar())
    got = sum(answer["bits"] for answer in answers) / sum(answer["bytes"] for answer in answers)
    assert got == pytest.approx(task.facts()["uniform"])


def test_files_of_the_users_own_stand_beside_the_runs_sources(run, subject, tmp_path):  # noqa: F811
    write_texts(tmp_path, "english", ["the of and"])
    write_texts(tmp_path, "poems", ["a rose is a rose", "half a pair \ud83d"])
    (tmp_path / "humaneval.jsonl").write_text('{"prompt": "no text here"}\n')
    task = BitsPerByte(run, Items(tmp_path), per_source=5)
    assert list(task.facts()["documents"]) == ["english", "html", "python", "english.jsonl", "poems"]
    assert task.facts()["source"]["poems"]["file"].endswith("poems.jsonl")
    last = len(task.ids()) - 1
    (answer,) = task.answer(subject, [last], bar())
    assert (answer["source"], answer["bytes"]) == ("poems", 13)


def test_a_model_without_bos_begins_behind_an_end_token(subject):  # noqa: F811
    eos = subject.tokenizer.eos_id
    assert beginning(subject) == ([subject.tokenizer.bos_id], [])
    assert beginning(replace(subject, start=())) == ([eos], [])
    with pytest.raises(ConfigError, match="expected a BOS or an end token"):
        beginning(replace(subject, start=(), ends=()))
    adds_its_own = SimpleNamespace(encode=lambda text: [9, *map(ord, text)])
    assert beginning(replace(subject, start=(), tokenizer=adds_its_own)) == ([9], [9])


def test_a_bos_that_the_tokenizer_adds_is_no_text(subject, tmp_path):  # noqa: F811
    write_texts(tmp_path, "notes", ["the of and"])
    own = subject.tokenizer
    adds = SimpleNamespace(encode=lambda text: [own.bos_id, *own.encode(text)])
    task = BitsPerByte(None, Items(tmp_path))
    (plain,) = task.answer(subject, [0], bar())
    assert task.answer(replace(subject, start=(), tokenizer=adds), [0], bar()) == [plain]


def test_nothing_to_score_and_a_row_without_a_text_are_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"^bpb: expected a run with held-out documents, or"):
        BitsPerByte(None, Items())
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"other": "two"}\n')
    with pytest.raises(DataError, match=r"bad\.jsonl: item 2: text: expected a text that is not empty$"):
        BitsPerByte(None, Items(tmp_path))
    (tmp_path / "bad.jsonl").write_text('{"text": "one"}\n{"text": 2}\n')
    with pytest.raises(DataError, match="item 2: text"):
        BitsPerByte(None, Items(tmp_path))
    with pytest.raises(ConfigError, match="expected a run directory"):
        BitsPerByte(tmp_path, Items())
