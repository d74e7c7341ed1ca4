"""Tracing a text through a small real run: its spans, their documents, the steps of those, and the loss then."""

import json
import os
import shutil
from unittest.mock import patch

import numpy as np
import pytest
import torch
from command import crystal
from runs import whole_run

from crystal.analysis.index import build, index_directory
from crystal.analysis.lookup import Index
from crystal.analysis.trace import exposures, find_spans, marked, query_ids
from crystal.analysis.trace_input import open_run, trace
from crystal.checkpoint import steps
from crystal.errors import DataError
from crystal.inference.load import load_decoder
from crystal.inference.logits import logits


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """The run directory of a whole run whose data is indexed in several shards."""
    corpus = tmp_path_factory.mktemp("traced")
    directory = whole_run(corpus, corpus)
    with patch.dict(os.environ, CRYSTAL_CACHE=str(corpus / "cache")):
        ledger, _ = open_run(directory)
        assert build(ledger.store, 20_000)["shards"] > 2
        yield directory


@pytest.fixture(scope="module")
def ledger(run):
    return open_run(run)[0]


@pytest.fixture(scope="module")
def index(ledger):
    return Index.open(ledger.store)


def stream(ledger, source):
    """A source's training stream as its rows hold it."""
    rows = [ledger.store.row(source, i) for i in range(ledger.store.rows(source))]
    return np.concatenate([rows[0], *(row[1:] for row in rows[1:])]).tolist()


def inside(ledger, source, number, first, tokens):
    """(a document, where in the stream its tokens first … are, those tokens)."""
    document = [*ledger.store.documents(source)][number]
    at = document["start"] + first
    return document, at, stream(ledger, source)[at : at + tokens]


def readings(ledger):
    """{(source, row): [(step, stage, epoch), …]}, by going through all batches."""
    found = {}
    for step in range(1, ledger.curriculum.steps + 1):
        stage = ledger.curriculum.stage_at(step - 1)
        for source, epoch, index in ledger.batches.order(stage).sequences(step - 1 - stage.first_step):
            found.setdefault((source, index), []).append((step, stage.name, epoch))
    return found


@pytest.mark.parametrize("source", ["english", "python", "html"])
@pytest.mark.parametrize("number", [0, 7, 40])
def test_a_span_has_the_steps_of_the_rows_that_hold_it(ledger, index, source, number):
    document, at, ids = inside(ledger, source, number, 20, 40)
    (span,) = find_spans(ledger, index, ids, 30)
    assert (span.start, span.stop, span.count) == (0, 40, 1)
    (match,) = span.matches
    assert (match.source, match.document["id"], match.hits[0].position) == (source, document["id"], at)
    rows = [row for row in range(ledger.store.rows(source)) if row * 32 <= at + 39 and at <= row * 32 + 32]
    assert len(rows) > 1, "it crosses the end of a row"
    read = readings(ledger)
    expected = sorted((step, stage, epoch, row) for row in rows for step, stage, epoch in read.get((source, row), []))
    assert sorted((e.step, e.stage, e.epoch, e.row) for e in match.exposures) == expected
    assert {e.step for e in match.exposures} <= set(ledger.when(document["id"])["steps"])


def test_a_whole_document_has_the_steps_that_data_when_gives(ledger, index):
    for number in range(5, 15):
        document, _, ids = inside(ledger, "english", number, 0, 10_000)
        ids = ids[: document["tokens"]]
        (span,) = find_spans(ledger, index, ids, len(ids))
        assert sorted({e.step for e in span.matches[0].exposures}) == ledger.when(document["id"])["steps"]


def test_where_fim_changed_the_row_it_says_so_and_whether_the_span_is_in_one_piece(ledger, index):
    changed = {(r["source"], r["index"], s): r["fim"] for s in range(1, 31) for r in ledger.where(s)["rows"]}
    seen = []
    text = stream(ledger, "python")
    for row in [row for (source, row) in readings(ledger) if source == "python"][:40]:
        ids = text[row * 32 + 5 : row * 32 + 13]
        for hit in index.positions(ids):
            for e in exposures(ledger, [hit], ids):
                assert e.fim == changed["python", e.row, e.step]
                seen.append((e.fim, e.verbatim))
                if e.tokens == len(ids):
                    stage = ledger.curriculum.stage_at(e.step - 1)
                    row = ledger.batches.row(stage, "python", e.epoch, e.row)[0].tolist()
                    assert e.verbatim == any(row[i : i + len(ids)] == ids for i in range(len(row)))
    assert {(True, True), (True, False), (False, True)} <= set(seen)


def test_documents_that_the_run_reads_come_first(ledger, index):
    text, two_are_read = stream(ledger, "english"), 0
    for i in range(40, 400, 4):
        common = text[i : i + 4]
        if min(common) < 3 or index.count(common) < 20:
            continue
        (span,) = find_spans(ledger, index, common, 4, documents=16)
        first = [match.exposures[0].step if match.exposures else 99 for match in span.matches]
        assert first == sorted(first)
        if first[1] < 99:
            two_are_read, until = i, first[1]
    assert two_are_read
    common = text[two_are_read : two_are_read + 4]
    (span,) = find_spans(ledger, index, common, 4, documents=2, until=until)
    assert all(match.exposures[0].step <= until for match in span.matches)


def test_a_text_is_read_as_the_middle_of_a_document_where_that_matches_further(ledger, index):
    tokenizer = ledger.batches.tokenizer
    ids = next(ids for n in range(99) if (ids := inside(ledger, "html", n, 1, 30)[2])[0] < tokenizer.n_base)
    text = tokenizer.decode(ids)
    assert query_ids(tokenizer, index, text)[:20] == ids[:20], "the start of a document: with the dummy space"
    text = stream(ledger, "python")
    at = next(i for i in range(2, 5000) if tokenizer.token_bytes[text[i - 1]] == b"\n" and text[i] > 258)
    words = tokenizer.decode([text[at - 1], *text[at : at + 30]])[1:]
    assert query_ids(tokenizer, index, words)[:10] == text[at : at + 10], "behind a line's end there is no such space"


def test_spans_are_ranked_and_marked(ledger, index):
    tokenizer = ledger.batches.tokenizer
    a, b = (inside(ledger, source, 3, 5, n)[2] for source, n in (("english", 12), ("html", 25)))
    spans = find_spans(ledger, index, [*a, 300, *b], 10)
    assert [(s.start, s.stop) for s in spans] == [(13, 38), (0, 12)], "the longer one is less likely"
    expected = sum(np.log(stream_count(ledger, i) / index.tokens) for i in a)
    assert spans[1].unigram_logprob == pytest.approx(expected)
    shown = marked(tokenizer, "x", [*a, 300, *b], spans)
    assert shown.count("⟦") == shown.count("⟧") == 2
    assert shown.startswith("⟦2 ")
    assert shown.index("⟧2") < shown.index("⟦1") < shown.index("⟧1")


def stream_count(ledger, token):
    return sum(stream(ledger, source).count(token) for source in ledger.store.sources)


def test_the_loss_before_and_after_is_that_of_the_checkpoints_around(run, ledger, index, tmp_path):
    saved = steps(run / "checkpoints")
    compared, text = set(), stream(ledger, "english")
    read = {row: seen[0][0] for (source, row), seen in readings(ledger).items() if source == "english"}
    for row in sorted(read, key=lambda row: (read[row] not in saved[1:], row))[2:30:4]:
        at = row * 32 + 12
        ids = text[at : at + 16]
        if min(ids) < 3:
            continue
        (tmp_path / "text").write_text(ledger.batches.tokenizer.decode(ids))
        (result,) = trace(str(tmp_path / "text"), str(run), min_tokens=10, documents=1)
        for span in result["spans"]:
            loss = span["matches"][0]["loss"]
            if loss is None:
                assert not span["matches"][0]["steps"]
                continue
            first = loss["first_step"]
            before, after = max((s for s in saved if s < first), default=None), min(s for s in saved if s >= first)
            assert (loss["before"] or {}).get("step") == before
            assert loss["after"]["step"] == after
            start = at + span["start"] + len(ids) - result["tokens"]
            labels = [p - loss["row"] * 32 - 1 for p in range(start, start + span["tokens"])]
            labels = [i for i in labels if 0 <= i < 32]
            assert len(labels) == loss["tokens"]
            for where in (loss["before"], loss["after"]):
                if where is not None:
                    model, _ = load_decoder(run / "checkpoints" / f"step-{where['step']:07d}")
                    row = torch.from_numpy(ledger.store.row("english", loss["row"]))
                    nats = -logits(model, row[None, :-1])[0].log_softmax(-1)[range(32), row[1:]]
                    assert where["nats"] == pytest.approx(float(nats[labels].mean()), abs=2e-3)
                    assert where["held_out"] > 0
                    compared.add((where["step"], first in saved))
    assert len(compared) > 5
    assert {saw_it_last for _, saw_it_last in compared} == {True, False}


def test_what_was_seen_before_the_first_checkpoint_has_no_loss_before(run, ledger, tmp_path):
    (source, row), _ = next((k, v) for k, v in readings(ledger).items() if v[0][0] == 1)
    ids = ledger.store.row(source, row).tolist()
    ids = max(np.split(ids, np.flatnonzero(np.array(ids) < 3)), key=len).tolist()[1:]
    (tmp_path / "text").write_text(ledger.batches.tokenizer.decode(ids))
    out = crystal("data", "trace", tmp_path / "text", "--run", run, "--min-tokens", len(ids) - 4)
    assert (out.returncode, out.stderr) == (0, "")
    assert "seen at steps 1 (english, epoch 0)" in out.stdout
    assert "no checkpoint from before it was first seen (step 1), then " in out.stdout


def test_a_generation_is_traced_in_its_own_run_up_to_its_checkpoint(run, ledger):
    checkpoint = run / "checkpoints" / "step-0000014"
    words = ("data", "trace", checkpoint, "--prompt", "the of", "--prompt", "def", "--max-new-tokens", 24)
    out = crystal(*words, "--min-tokens", 2, "--json", "--documents", 16, "--temperature", 1.5)
    assert (out.returncode, out.stderr) == (0, "")
    traces = json.loads(out.stdout)["traces"]
    assert [t["prompt"] for t in traces] == ["the of", "def"]
    matches = [match for t in traces for span in t["spans"] for match in span["matches"]]
    assert any(match["later_steps"] for match in matches)
    assert any(match["loss"] for match in matches)
    for match in matches:
        assert all(step <= 14 for step in match["steps"])
        assert all(step > 14 for step in match["later_steps"])
        assert match["stage"] in (None, "english", "code")
        assert {"document", "source", "steps", "stage", "license", "path", "seen", "loss"} <= match.keys()
        assert {*match["steps"], *match["later_steps"]} <= set(ledger.when(match["document"])["steps"])
        assert match["loss"] is None or match["loss"]["first_step"] in match["steps"]
    for t in traces:
        assert {"query", "spans", "run", "checkpoint", "index"} <= t.keys()
        assert t["checkpoint"]["step"] == t["until"] == 14
        assert all({"text", "tokens", "count", "matches"} <= span.keys() for span in t["spans"])


def test_the_commands_say_what_they_found(run, ledger, index, tmp_path):
    out = crystal("data", "index", run, "--json")
    assert json.loads(out.stdout)["built"] == 0
    assert "checked, it was whole" in crystal("data", "index", run.parent / "run.yaml").stdout
    document, _, ids = inside(ledger, "html", 2, 10, 30)
    (tmp_path / "text").write_text(ledger.batches.tokenizer.decode(ids))
    out = crystal("data", "trace", tmp_path / "text", "--run", run, "--no-loss")
    assert document["id"] in out.stdout
    assert "in 1 span; searched" in out.stdout
    assert "checksums compared" in out.stdout
    assert "nats" not in out.stdout
    begun = tmp_path / "begun"
    shutil.copytree(run, begun, ignore=shutil.ignore_patterns("checkpoints"))
    out = crystal("data", "trace", "the of and to in a is that for it as was", "--run", begun, "--min-tokens", 4)
    assert "read later than step 0: at steps" in out.stdout
    assert "seen at steps" not in out.stdout
    out = crystal("data", "trace", "zq zq zq zq", "--run", run)
    assert "no 8 tokens in a row of it stand in the training data" in out.stdout


def test_infini_gram_gives_the_same_trace(run, ledger, tmp_path):
    pytest.importorskip("infini_gram")
    (tmp_path / "text").write_text(ledger.batches.tokenizer.decode(inside(ledger, "python", 5, 8, 60)[2]))
    results = [trace(str(tmp_path / "text"), str(run), loss=False, engine=e)[0] for e in ("own", "infini-gram")]
    assert [result["index"].pop("engine") for result in results] == ["own", "infini-gram"]
    assert results[0] == results[1]
    assert results[0]["spans"]


def refused(out):
    assert (out.returncode, out.stdout) == (2, "")
    assert out.stderr.count("\n") == 1
    return out.stderr


def test_mistakes_are_one_line(run, tmp_path, monkeypatch):
    def traced(*words):
        return refused(crystal("data", "trace", *words))

    assert "expected a text to trace, got an empty one" in traced("  ", "--run", run)
    (tmp_path / "empty").write_text("\n")
    assert "empty has none" in traced(tmp_path / "empty", "--run", run)
    (tmp_path / "bytes").write_bytes(b"abc\xff")
    assert "expected UTF-8 text, got another byte at 3" in traced(tmp_path / "bytes", "--run", run)
    os.mkfifo(tmp_path / "pipe")
    assert "expected a file with a text, it is a pipe or a device" in traced(tmp_path / "pipe", "--run", run)
    assert "runs/dmo: no such file or directory" in traced("runs/dmo", "--run", run)
    assert "expected --prompt" in traced(run)
    assert "--prompt: expected a checkpoint or run directory" in traced("the of and", "--prompt", "x", "--run", run)
    assert "expected a run directory, config.yaml is not there" in traced("the of and", "--run", tmp_path)
    assert "expected a run directory" in refused(crystal("data", "index", tmp_path))
    assert "nothing: no such file" in traced("the of and", "--run", "nothing")
    assert "expected a checkpoint" in traced(tmp_path, "--prompt", "x")
    monkeypatch.chdir(tmp_path)
    assert "--run: expected one, as runs/ does not hold exactly one run: none" in traced("the of and")
    (tmp_path / "runs").mkdir()
    (tmp_path / "runs" / "only").symlink_to(run)
    assert crystal("data", "trace", "the of and", cwd=tmp_path).returncode == 0


def test_an_index_that_is_missing_or_damaged_and_another_tokenizer_are_refused(run, ledger, tmp_path):
    directory = index_directory(ledger.store)
    aside = directory.rename(directory.with_name("aside"))
    try:
        message = refused(crystal("data", "trace", "the of and", "--run", run))
        assert f"no index yet; `crystal data index {run}` builds it" in message
    finally:
        aside.rename(directory)
    other = tmp_path / "other"
    shutil.copytree(run / "checkpoints" / "step-0000014", other)
    seal = json.loads((other / "checkpoint.json").read_text())
    name = seal["state"]["tokenizer"]
    assert "--run: expected one, the checkpoint is not in a run directory" in refused(
        crystal("data", "trace", other, "--prompt", "x")
    )
    (other / name).write_bytes((other / name).read_bytes() + b"\x9a\x01\x00")  # a field that nobody knows
    (other / "checkpoint.json").write_text(json.dumps(seal | {"files": None, "sha256": None}))  # nor is it under a sum
    message = refused(crystal("data", "trace", other, "--prompt", "x", "--run", run))
    assert "expected the tokenizer of" in message


def test_a_run_that_was_trained_on_other_data_is_refused(run, tmp_path):
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints"))
    manifest = json.loads((copy / "manifest.json").read_text())
    manifest["data"]["store"] = "0" * 64
    (copy / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(DataError, match="was trained on the token store 0000"):
        open_run(copy)
