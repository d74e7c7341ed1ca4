"""Counterfactual twins: what `train.without` does to a batch and a run, and what a pair of runs shows."""

import json
import shutil

import pytest
import torch
from command import crystal

from crystal import checkpoint
from crystal.analysis.counterfactual import _compared, twin_of
from crystal.analysis.extraction import Extracted
from crystal.analysis.sequences import Sequence
from crystal.analysis.trace_input import open_run
from crystal.errors import ConfigError
from crystal.run import load_run
from crystal.training.batches import Batches
from crystal.training.metrics import read_metrics


def batches(ledger, without, micro=4):
    return Batches(ledger.curriculum, ledger.store, ledger.batches.seed, micro, without)


def test_left_out_rows_keep_their_places_and_the_rest_weighs_for_them(run, cache):
    ledger, _ = open_run(run)
    stage = ledger.curriculum.stages[0]
    for step in range(6):
        whole, rest = (batches(ledger, w).step(step) for w in ((), ("english",)))
        sources = [source for source, _, _ in ledger.batches.order(stage).sequences(step)]
        for key in ("ids_BT", "labels_BT", "documents_BT", "sources_B"):
            assert torch.equal(*(torch.cat([getattr(b, key) for b in own]) for own in (whole, rest)))
        weights_BT = torch.cat([b.weights_BT for b in rest])
        gone = torch.tensor([source == "english" for source in sources])
        assert not weights_BT[gone].any()
        assert weights_BT[~gone].sum() == pytest.approx(1.0)
        assert weights_BT[~gone].unique().numel() == 1


def test_a_documents_rows_are_left_out_and_no_others(run, cache):
    ledger, _ = open_run(run)
    document = next(iter(ledger.store.documents("python")))["id"]
    source, rows = ledger.store.rows_of_document(document)
    own = batches(ledger, (document,))
    left = {(s, i) for s in ledger.store.sources for i in range(ledger.store.rows(s)) if own.left_out(s, i)}
    assert left == {(source, i) for i in rows} != set()
    with pytest.raises(ConfigError, match="no document nobody"):
        batches(ledger, ("nobody",))


def test_each_process_weighs_its_part_as_the_whole_step_does(run, cache):
    ledger, _ = open_run(run)
    own = batches(ledger, ("english",), micro=2)
    whole = torch.cat([b.weights_BT for b in own.step(3)])
    own.parts = 4
    parts = []
    for own.part in range(4):
        parts += [b.weights_BT for b in own.step(3)]
    assert torch.equal(torch.cat(parts), whole)


def test_held_out_rows_are_judged_all_the_same(run, cache):
    ledger, _ = open_run(run)
    both = [[b.weights_BT for b in batches(ledger, w).validation(3)] for w in ((), ("english",))]
    assert all(torch.equal(a, b) for a, b in zip(*both, strict=True))


def test_without_nothing_that_is_read_the_twin_is_the_run_bit_for_bit(make_run, train):
    """A held-out document is in no row: left out, nothing differs."""
    path = make_run()
    first = train(path, until=5).directory
    ledger, _ = open_run(first)
    unread = next(iter(ledger.store.documents("english", "val")))["id"]
    twin = first.with_name("twin")
    second = train(path, f"run_dir={twin}", f"train.without=[{unread!r}]", until=5).directory
    third = train(path, f"run_dir={first.with_name('third')}", "train.without=[english]", until=5).directory
    same, other, gone = ([r for r in read_metrics(d) if r["step"]] for d in (first, second, third))
    assert [(r["loss"], r["grad_norm"]) for r in same] == [(r["loss"], r["grad_norm"]) for r in other]
    # stage 1 is english alone: nothing is left to learn from, and the run goes through it without harm
    assert [(r["loss"], r["grad_norm"], r["applied"]) for r in gone] == [(0.0, 0.0, True)] * 5
    assert load_run(third / "config.yaml").config.train.without == ("english",)


def test_a_twin_keeps_to_the_kernels_that_the_run_chose(make_run, tmp_path):
    """Another product of matrices rounds otherwise, and then something else would differ."""
    from rich.console import Console

    from crystal.kernels import tuning
    from crystal.training.start import start

    chosen = [{"identity": tuning.identity(torch.get_num_threads()), "choices": {"fp32 forward 32": "torch"}}]
    like = tmp_path / "like"
    like.mkdir()
    (like / "manifest.json").write_text(json.dumps({"data": {}, "tuning": chosen}))
    try:
        made = start(load_run(make_run()), None, 1, Console(quiet=True, stderr=True), like=like).directory
    finally:
        tuning.use({})
    assert json.loads((made / "manifest.json").read_text())["tuning"] == chosen


@pytest.mark.proof
def test_the_twin_of_an_overtrained_run_does_not_know_what_it_did_without(run, cache):
    words = ("analyze", "memorization", run, "--counterfactual", "english", "--sequences", 40, "--k", 16, "--l", 16)
    done = crystal(*words, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    left_out, kept, held_out = (result["groups"][name] for name in ("left_out", "kept", "held_out"))
    assert left_out["score"]["interval"][0] > 0.3
    assert left_out["extractible"][0] > 0 == left_out["extractible"][1]
    assert left_out["score"]["mean"] > held_out["score"]["mean"] + 0.3
    assert abs(kept["score"]["mean"]) < left_out["score"]["mean"]
    assert result["left_out_above_held_out"]["score"]["interval"][0] > 0
    assert result["said"].startswith("memorized")
    assert {s["source"] for s in result["sequences"]} == {"english"}
    mean = sum(s["difference"] for s in result["sequences"]) / len(result["sequences"])
    assert mean == pytest.approx(left_out["score"]["mean"], abs=1e-5)

    twin = run.with_name("run-without-english")
    assert load_run(twin / "config.yaml").config.provenance["twin_of"] == "tiny"
    assert all("english" not in r["source_loss"] for r in read_metrics(twin) if "source_loss" in r)
    before = (twin / "metrics.jsonl").stat().st_mtime_ns
    again = crystal(*words)
    assert "left out above held out: score +" in again.stdout
    assert (twin / "metrics.jsonl").stat().st_mtime_ns == before, "it is taken where it is there"
    shutil.rmtree(checkpoint.step_directory(twin / "checkpoints", 120))
    assert json.loads(crystal(*words, "--json").stdout)["groups"] == result["groups"], "or gone on with"


def test_mistakes_are_one_line(run, cache, tmp_path):
    def said(*words):
        done = crystal("analyze", "memorization", *words)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
        return done.stderr

    assert "expected a source of the run (english, python) or a file" in said(run, "--counterfactual", "englisch")
    ids = tmp_path / "ids.txt"
    ids.write_text("nobody\n")
    assert f"{ids}: line 1: " in said(run, "--counterfactual", ids)
    ids.write_text("\n")
    assert "expected an id of a document a line, it is empty" in said(run, "--counterfactual", ids)
    assert "and no --rows" in said(run, "--counterfactual", "english", "--rows", ids)
    ledger, _ = open_run(run)
    unread = next(iter(ledger.store.documents("english", "val")))["id"]
    ids.write_text(unread)
    assert "has read none of its rows" in said(run, "--counterfactual", ids)


def test_a_twin_has_no_twin(run, cache):
    twin = twin_of(run, ["english"], "english")
    assert twin.config.directory == run.resolve().with_name("run-without-english")
    assert twin.config.curriculum == load_run(run / "config.yaml").config.curriculum


def test_differences_by_hand():
    """Two left-out sequences gain 4/4 and 2/4, two held-out ones 0 and 1/4."""
    one, plain = [Extracted(4, 4, -1.0), Extracted(0, 0, -9.0)], Sequence((1, 2), "a", 0)
    parts = {
        "left_out": [(plain, one[0], one[1]), (plain, Extracted(3, 3, -4.0), Extracted(1, 0, -8.0))],
        "kept": [],
        "held_out": [(plain, one[1], one[1]), (plain, Extracted(1, 1, -5.0), one[1])],
    }
    found = _compared(parts, 4)
    parts["left_out"].append((Sequence((1, 2), "a", 1, fim=True), one[0], one[1]))
    assert _compared(parts, 4)["left_out_above_held_out"] == found["left_out_above_held_out"], (
        "FIM's rows are set aside"
    )
    assert found["groups"]["left_out"]["score"]["mean"] == 0.75
    assert found["groups"]["left_out"]["nats_per_token"]["mean"] == 1.5
    assert found["groups"]["left_out"]["extractible"] == [1, 0]
    assert found["groups"]["kept"]["score"] is None
    assert found["left_out_above_held_out"]["score"]["mean"] == 0.625
