"""Perplexity: windows, any batch size, by hand on models that are known, beside the mistake and bits per byte."""

import json
import math

import numpy as np
import pytest
import torch
from command import crystal
from hypothesis import given
from hypothesis import strategies as st
from overtrained import bigram, small

from crystal.analysis.perplexity import figures, text_nats, windows
from crystal.evaluation.bits_per_byte import BitsPerByte
from crystal.evaluation.evaluate import Evaluation, where
from crystal.evaluation.items import Items
from crystal.output.progress import Bar


@given(st.integers(1, 200), st.integers(1, 20), st.integers(1, 30), st.data())
def test_windows_score_every_token_once_with_all_the_context_that_fits(length, first, more, data):
    window = first + more
    stride = data.draw(st.integers(1, window))
    own = list(windows(length, first, window, stride))
    scored = [i for w in own for i in range(w.end + 1 - w.new, w.end + 1)]
    assert scored == list(range(first, length))
    for i, w in enumerate(own):
        assert 1 <= w.end - w.begin <= window
        assert w.new <= (window if i == 0 else stride)
        assert w.begin == max(w.end - window, 0)


def test_a_window_that_no_token_fits_in_is_refused():
    for first, window, stride in ((0, 4, 1), (5, 4, 1), (1, 4, 0), (1, 4, 5)):
        with pytest.raises(ValueError, match="expected 1 <= first, stride <= window"):
            list(windows(9, first, window, stride))


def test_a_sliding_window_by_hand():
    """A model that hangs on all it sees, window 4, stride 2, on a text of 9 tokens behind one: seven more windows by
    definition, each token scored from the tokens written out here."""
    model = small()
    start, ids = [7], [3, 1, 4, 1, 5, 9, 2, 6, 5]
    whole = [*start, *ids]
    # token number: the tokens that it is foretold from
    context = {1: (0, 1), 2: (0, 2), 3: (0, 3), 4: (0, 4), 5: (2, 5), 6: (2, 6), 7: (4, 7), 8: (4, 8), 9: (5, 9)}
    expected = 0.0
    for token, (begin, end) in context.items():
        logprobs_V = model(torch.tensor([whole[begin:end]]))[0, -1].log_softmax(-1)
        expected -= float(logprobs_V[whole[token]])
    (found,) = text_nats(model, [(start, ids)], window=4, stride=2, batch_size=3)
    assert found == pytest.approx(expected, rel=1e-5)


def test_stride_1_is_the_definition():
    model, ids, window = small(), np.random.default_rng(0).integers(0, 40, 30).tolist(), 6
    whole = [7, *ids]
    expected = 0.0
    for token in range(1, len(whole)):
        seen = torch.tensor([whole[max(token - window, 0) : token]])
        expected -= float(model(seen)[0, -1].log_softmax(-1)[whole[token]])
    (found,) = text_nats(model, [([7], ids)], window, stride=1, batch_size=5)
    assert found == pytest.approx(expected, rel=1e-5)


def texts(count=5):
    rng = np.random.default_rng(2)
    return [([7], rng.integers(0, 40, rng.integers(1, 45)).tolist()) for _ in range(count)]


@pytest.mark.parametrize("batch_size", [2, 7, 100])
@pytest.mark.parametrize(("window", "stride"), [(32, 16), (32, 32), (5, 1)])
def test_the_number_does_not_hang_on_the_batch_size(batch_size, window, stride):
    model = small()
    one = text_nats(model, texts(), window, stride, 1)
    assert text_nats(model, texts(), window, stride, batch_size) == pytest.approx(one, rel=1e-5)


def analysis360(model, rows, batch_size):
    """Analysis360's script: a batch's mean loss times the length of one row, over the tokens of all."""
    nats, tokens = 0.0, 0
    for first in range(0, len(rows), batch_size):
        ids_BT = torch.tensor(rows[first : first + batch_size])
        logprobs = model(ids_BT)[:, :-1].log_softmax(-1)
        loss = -logprobs.gather(-1, ids_BT[:, 1:, None]).mean()
        nats += float(loss) * (ids_BT.shape[1] - 1)  # times the batch size too, to be right
        tokens += ids_BT[:, 1:].numel()
    return math.exp(nats / tokens)


def test_analysis360s_script_is_right_for_batch_1_and_too_low_beyond():
    model = bigram(torch.eye(8))  # each token foretells itself, a little
    rows = np.random.default_rng(0).integers(0, 8, (8, 20)).tolist()
    nats = {b: sum(text_nats(model, [(row[:1], row[1:]) for row in rows], 32, 16, b)) for b in (1, 4)}
    ours = {b: math.exp(own / (8 * 19)) for b, own in nats.items()}
    assert ours[1] == pytest.approx(ours[4])
    assert analysis360(model, rows, 1) == pytest.approx(ours[1], rel=1e-5)
    assert analysis360(model, rows, 4) == pytest.approx(ours[1] ** 0.25, rel=1e-5)
    assert analysis360(model, rows, 4) < 2 < 6 < ours[1]


def test_a_known_models_perplexity_is_exact():
    uniform = bigram(torch.zeros(8, 8))
    nats = text_nats(uniform, [([0], [1, 2, 3]), ([0], [4] * 50)], 16, 8, 4)
    assert nats == pytest.approx([3 * math.log(8), 50 * math.log(8)], rel=1e-6)
    own = figures([{"nats": n, "tokens": t, "bytes": 2 * t} for n, t in zip(nats, (3, 50), strict=True)])
    assert (own["perplexity"], own["by_document"]) == (pytest.approx(8), pytest.approx(8))
    assert own["bits_per_byte"] == pytest.approx(1.5)
    own = figures([{"nats": 0.0, "tokens": 3, "bytes": 3}, {"nats": math.log(16), "tokens": 1, "bytes": 1}])
    assert own["perplexity"] == pytest.approx(2)  # over tokens: exp(ln 16 / 4)
    assert own["by_document"] == pytest.approx((1 + 16) / 2)
    assert figures([{"nats": 1.0, "tokens": 3, "bytes": 3}])["interval"] is None


def test_it_agrees_with_bits_per_byte_over_the_same_windows(run, cache):
    """`crystal eval --suite bpb` counts a window with its last label: the rows' 63 there are 62 here, half of it 31."""
    done = crystal("analyze", "perplexity", run, "--every", 2, "--window", 62, "--stride", 31, "--json")
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout)["checkpoints"][-1]
    places = where(run, 2)
    evaluation = Evaluation(places.checkpoints[120], places)
    task = BitsPerByte(run, Items(None, None))
    answers = task.answer(evaluation.subject, range(len(task.ids())), Bar(None))
    metrics = task.metrics(answers)
    assert set(last["sources"]) == {"english", "python"}
    for source, own in last["sources"].items():
        assert own["bits_per_byte"] == pytest.approx(metrics[f"bits_per_byte/{source}"].value, rel=1e-5)
        assert own["tokens"] == sum(a["tokens"] for a in answers if a["source"] == source)
        low, high = own["interval"]
        assert low < own["perplexity"] < high


def test_the_users_own_texts_are_a_source_and_what_is_there_is_not_asked_again(run, cache, tmp_path):
    items = tmp_path / "items"
    items.mkdir()
    (items / "mine.jsonl").write_text('{"text": "the of and to in"}\n{"text": "zzzz qqqq"}\n')
    words = ("analyze", "perplexity", run, "--items", items, "--documents", 3, "--batch-size", 2)
    result = json.loads(crystal(*words, "--json").stdout)
    assert [c["step"] for c in result["checkpoints"]] == [60, 120]
    sources = result["checkpoints"][-1]["sources"]
    assert list(sources) == ["english", "python", "mine"]
    assert {name: own["documents"] for name, own in sources.items()} == {"english": 3, "python": 3, "mine": 2}
    file = run / "analysis" / "perplexity-step-0000120.json"
    stamp = file.stat().st_mtime_ns
    assert "mine            perplexity" in crystal(*words).stdout
    assert file.stat().st_mtime_ns == stamp
    (items / "mine.jsonl").write_text('{"text": "the of and to in"}\n{"text": "zzzz qqqx"}\n')
    changed = json.loads(crystal(*words, "--json").stdout)["checkpoints"][-1]["sources"]
    assert changed["mine"]["nats_per_token"] != sources["mine"]["nats_per_token"], "texts changed are asked anew"
    assert changed["english"] == sources["english"]


def test_mistakes_are_one_line(run, cache):
    for words, said in (
        (("--window", 65), "--window: expected 1 to 64, the model's max_seq_len, got 65"),
        (("--window", 8, "--stride", 9), "--stride: expected 1 to 8, the window, got 9"),
        (("--items", "nowhere"), "nowhere: expected a directory"),
    ):
        done = crystal("analyze", "perplexity", run, *words)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
        assert said in done.stderr
