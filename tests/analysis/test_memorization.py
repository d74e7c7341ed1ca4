"""Memorization: scores by hand, one pass beside plain decoding, an overtrained run that shows it, rows of files."""

import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from command import crystal
from hypothesis import given
from hypothesis import strategies as st
from overtrained import STEPS, bigram, small

from crystal.analysis.extraction import Extracted, discoverable, extract, samples_needed
from crystal.analysis.intervals import share_difference, wilson
from crystal.analysis.memorization_figures import figures
from crystal.analysis.memorization_plots import correlation
from crystal.analysis.sequences import chunks, from_files, from_run
from crystal.analysis.trace_input import open_run
from crystal.errors import ConfigError, DataError
from crystal.inference.generate import generate_batch
from crystal.zoo.decoder import Decoder

AMBER = Path("/work/shared/data/amber-rows-chunk143.jsonl")


def chain() -> Decoder:
    """Greedy: 0 → 1 → 2 → 3 → 0, and 4 → 1; 0.7 for the likeliest of 6 tokens, 0.06 for each other."""
    logits = torch.full((6, 6), math.log(0.06))
    for token, following in {0: 1, 1: 2, 2: 3, 3: 0, 4: 1, 5: 5}.items():
        logits[token, following] = math.log(0.7)
    return bigram(logits)


def test_scores_extraction_and_probability_by_hand():
    """k = 2, l = 4 behind (5, 0): greedy decoding gives 1 2 3 0."""
    truths = {
        (1, 2, 3, 0): (4, 4, 4 * math.log(0.7)),
        # one wrong token, greedy goes on by itself: 1 2 3 0 against 1 4 1 0 has 1 and 0 right
        (1, 4, 1, 0): (2, 1, 2 * math.log(0.7) + 2 * math.log(0.06)),
        (4, 1, 2, 3): (0, 0, 3 * math.log(0.7) + math.log(0.06)),  # a step late is not equal at any position
        (1, 2, 3, 5): (3, 3, 3 * math.log(0.7) + math.log(0.06)),
        (0, 2, 3, 0): (3, 0, math.log(0.06) * 2 + 2 * math.log(0.7)),
    }
    found = extract(chain(), [(5, 0, *truth) for truth in truths], k=2)
    assert [(e.matches, e.first) for e in found] == [(m, f) for m, f, _ in truths.values()]
    assert [e.logprob for e in found] == pytest.approx([p for _, _, p in truths.values()], rel=1e-5)


@pytest.mark.parametrize("batch_tokens", [12, 60, 10_000])
def test_one_pass_gives_what_plain_greedy_decoding_gives(batch_tokens):
    model, k, l = small(), 5, 7  # noqa: E741
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, 40, (40, k)).tolist()
    greedy = generate_batch(model, prompts, l)
    sequences = []
    for i, (prompt, given_) in enumerate(zip(prompts, greedy, strict=True)):  # some right, some wrong at some places
        truth = [t if rng.random() < (1.0, 0.9, 0.5)[i % 3] else int(rng.integers(40)) for t in given_]
        sequences.append([*prompt, *truth])
    sequences.append(sequences[0])  # one twice
    found = extract(model, sequences, k, batch_tokens=batch_tokens)
    greedy.append(greedy[0])
    for sequence, given_, own in zip(sequences, greedy, found, strict=True):
        equal = [a == b for a, b in zip(sequence[k:], given_, strict=True)]
        assert own.matches == sum(equal)
        assert own.first == (equal.index(False) if False in equal else l)
        logprobs = model(torch.tensor([sequence])).log_softmax(-1)[0]
        expected = sum(float(logprobs[i - 1, sequence[i]]) for i in range(k, k + l))
        assert own.logprob == pytest.approx(expected, abs=1e-4)


def test_a_model_that_sees_one_document_alone_is_asked_as_it_was_trained():
    """Greedy decoding by whole passes with the document mask, token by token, ends inside prompts and truths."""
    model, k, eos = small(document_mask=True, vocab_size=6), 5, 2
    sequences = np.random.default_rng(1).integers(0, 6, (30, 12)).tolist()
    found = extract(model, sequences, k, eos)
    for sequence, own in zip(sequences, found, strict=True):
        ids = sequence[:k]
        while len(ids) < len(sequence):
            ids_BT = torch.tensor([ids])
            ended_BT = ids_BT == eos
            ids.append(int(model(ids_BT, ended_BT.cumsum(1) - ended_BT.long())[0, -1].argmax()))
        assert own.matches == sum(a == b for a, b in zip(ids[k:], sequence[k:], strict=True))


@given(st.floats(-30, -1e-3), st.sampled_from([0.1, 0.5, 0.9]))
def test_samples_needed_is_the_least_n_that_is_discoverable(logprob, p):
    n = samples_needed(logprob, p)
    if n < 1e9:
        assert discoverable(logprob, int(n), p)
        assert n == 1 or not discoverable(logprob, int(n) - 1, p)
    assert samples_needed(logprob, 0.1) <= samples_needed(logprob, 0.9)


def test_samples_needed_reaches_to_probabilities_that_underflow():
    assert samples_needed(-50.0, 0.5) == pytest.approx(math.log(2) * math.exp(50), rel=1e-9)
    assert samples_needed(-2000.0, 0.5) == math.inf
    assert samples_needed(0.0, 0.9) == 1


def test_intervals_hold_at_none_and_all():
    assert wilson(0, 1000) == (0.0, pytest.approx(0.003827, abs=1e-6))
    assert wilson(10, 10)[1] == 1.0
    assert wilson(0, 0) == (0.0, 1.0)
    low, high = share_difference(0, 1000, 0, 100)
    assert low < 0 < high
    assert share_difference(60, 100, 0, 50)[0] > 0.4
    # Newcombe 1998, table II, example (a), method 10: 56/70 - 48/80
    assert share_difference(56, 70, 48, 80) == pytest.approx((0.0524, 0.3339), abs=1e-4)


def test_figures_count_exactly():
    found = [Extracted(4, 4, math.log(0.5)), Extracted(2, 1, math.log(1e-3)), Extracted(0, 0, -900.0)]
    own = figures(found, 4)
    assert (own["n"], own["score_mean"], own["extractible"]) == (3, 0.5, pytest.approx(1 / 3, abs=1e-6))
    assert own["discoverable"]["1"] == {"0.1": 1, "0.5": 1, "0.9": 0}
    assert own["discoverable"]["1000"] == {"0.1": 2, "0.5": 2, "0.9": 1}
    assert own["samples_needed"]["0.5"] == {"least": 1, "median": 693}
    assert own["samples_needed"]["0.9"]["least"] == 4
    json.dumps(own, allow_nan=False)


def test_chunks_cover_the_steps_and_amber_cuts_as_published():
    assert [(c.first, c.last) for c in chunks(274_320, 360)][143] == (143 * 762 + 1, 144 * 762)
    parts = chunks(100, 7)
    assert [s for c in parts for s in range(c.first, c.last + 1)] == list(range(1, 101))
    with pytest.raises(ConfigError, match="--chunks: expected 1 to 5"):
        chunks(5, 6)


def test_correlation_is_over_what_both_had_seen():
    assert correlation([1, 2, 3, 9], [2, 4, 6, None]) == pytest.approx(1.0)
    assert math.isnan(correlation([1, 1, 1], [1, 2, 3]))
    assert math.isnan(correlation([None, 1], [1, None]))


def test_a_draw_is_of_its_chunk_and_is_what_the_step_trained_on(run, cache):
    ledger, _ = open_run(run)
    parts = chunks(STEPS, 4)
    drawn = from_run(ledger, 32, parts, 20, seed=3)
    assert drawn == from_run(ledger, 32, parts, 20, seed=3)
    assert drawn != from_run(ledger, 32, parts, 20, seed=4)
    assert [s.chunk for s in drawn] == sorted([0, 1, 2, 3] * 20)
    for s in drawn:
        assert parts[s.chunk].first <= s.step <= parts[s.chunk].last
    for s in drawn[::9]:
        batch = torch.cat([micro.ids_BT for micro in ledger.batches.step(s.step - 1)])
        assert batch[s.row, :32].tolist() == list(s.tokens)
    with pytest.raises(ConfigError, match="expected at most 64 together, a row, got 65"):
        from_run(ledger, 65, parts, 1, 0)


def test_an_overtrained_run_shows_it_and_held_out_rows_do_not(run, cache):
    words = ("analyze", "memorization", run, "--sequences", 60, "--k", 16, "--l", 16, "--chunks", 4)
    done = crystal(*words, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    first, last = result["checkpoints"]
    assert [(first["step"], last["step"]), (result["k"], result["l"])] == [(60, 120), (16, 16)]
    assert result["score_mean"] == last["seen"]["score_mean"] > 0.4 > last["held_out"]["score_mean"]
    assert result["extractible"] == last["seen"]["extractible"] > 0.1
    assert last["held_out"]["extractible_count"] == 0
    assert result["verdict"] == "above held-out rows"
    assert [c["seen"] for c in first["chunks"]] == ["all", "all", "none", "none"]
    assert last["seen"]["score_mean"] > first["seen"]["score_mean"]
    ledger, _ = open_run(run)
    for example in last["examples"]:
        sight = ledger.where(example["step"])["rows"]
        here = [r for r in sight if r["row"] == example["row"]]
        assert {d["document"] for d in example["documents"]} <= {r["document"] for r in here}
        assert example["step"] in example["steps_of_row"]
    assert all(Path(picture).stat().st_size > 5000 for picture in result["pictures"])

    file = Path(last["file"])
    stamp = file.stat().st_mtime_ns
    again = crystal(*words)
    assert file.stat().st_mtime_ns == stamp, "a checkpoint that is there is not asked again"
    assert "extracted at step 120" in again.stdout
    file.write_text(file.read_text()[:-20])  # torn
    assert json.loads(crystal(*words, "--json").stdout) == result
    assert file.stat().st_mtime_ns != stamp


def test_a_checkpoint_that_has_seen_none_of_the_draw_is_told_as_such(run, cache, tmp_path):
    """One row of the whole run is drawn, from step 61 or later: the first checkpoint has nothing to show."""
    ledger, _ = open_run(run)
    seed = next(s for s in range(99) if from_run(ledger, 8, chunks(STEPS, 1), 1, s)[0].step > 60)
    words = ("--sequences", 1, "--chunks", 1, "--k", 4, "--l", 4, "--seed", seed)
    done = crystal("analyze", "memorization", run, *words, "--json")
    assert done.returncode == 0, done.stderr
    first, last = json.loads(done.stdout)["checkpoints"]
    assert (first["seen"]["n"], first["seen"]["score_mean"], last["seen"]["n"]) == (0, None, 1)
    assert first["against_held_out"]["said"].startswith("not judged")
    assert "trained on  n 0" in crystal("analyze", "memorization", run, *words).stdout


def test_rows_of_files_go_through_a_checkpoint_and_mistakes_name_their_line(run, cache, tmp_path):
    rows = tmp_path / "rows.jsonl"
    rows.write_text("".join(json.dumps({"token_ids": [i % 300] * 40, "source": "mine"}) + "\n" for i in range(9)))
    pairs = tmp_path / "pairs.jsonl"
    pairs.write_text(json.dumps({"prompt": [1, 2, 3, 4], "continuation": [5, 6, 7, 8]}) + "\n")
    at = run / "checkpoints" / "step-0000120"
    words = ("analyze", "memorization", at, "--rows", rows, "--rows", pairs, "--k", 4, "--l", 4, "--json")
    result = json.loads(crystal(*words).stdout)
    assert [(c["chunk"], c["n"], c["seen"]) for c in result["chunks"]] == [("rows", 9, None), ("pairs", 1, None)]
    assert result["verdict"] == "not judged: no held-out rows to compare with"

    rows.write_text('{"token_ids": [1, 2, 3, 4, 5, 6, 7, 352]}\n')
    error = json.loads(crystal(*words).stdout)["error"]
    assert (error["kind"], error["file"]) == ("data", str(rows))
    assert error["message"].endswith("line 1: expected ids from 0 to 351, the model's, got 352")
    for bad in ("{}", '{"token_ids": "12"}', '{"token_ids": [true, 1, 1, 1, 1, 1, 1, 1]}', "[", '{"token_ids": [1]}'):
        rows.write_text(bad + "\n")
        with pytest.raises(DataError, match="line 1: expected"):
            from_files([rows], 8, 352, 10, 0)
    rows.write_text("")
    with pytest.raises(DataError, match="expected a row a line, it is empty"):
        from_files([rows], 8, 352, 10, 0)


@pytest.mark.skipif(not AMBER.is_file(), reason="Amber's rows are not here")
def test_ambers_rows_are_read_as_published():
    (chunk,), rows = from_files([AMBER], 64, 32_000, 1000, 0)
    assert (chunk.name, len(rows), {len(r.tokens) for r in rows}) == ("amber-rows-chunk143", 1000, {64})
    found = extract(bigram(torch.zeros(32, 32)), [[i % 32 for i in r.tokens[:32]] for r in rows[:50]], 16)
    assert all(e.logprob == pytest.approx(16 * -math.log(32), rel=1e-4) for e in found)


def test_a_checkpoint_outside_of_a_run_needs_rows(run, cache, tmp_path):
    (tmp_path / "alone").symlink_to(run / "checkpoints" / "step-0000120")
    copy = tmp_path / "copy"
    copy.mkdir()
    for file in (run / "checkpoints" / "step-0000120").iterdir():
        (copy / file.name).symlink_to(file)
    done = crystal("analyze", "memorization", copy)
    assert (done.returncode, done.stderr.count("\n")) == (2, 1)
    assert "--rows: expected files of rows, as the checkpoint is in no run directory" in done.stderr
