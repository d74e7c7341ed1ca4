"""The ledger: both questions, answered by the code that training reads with."""

import pytest

from crystal.cli.data import show_text, stats_text, where_text
from crystal.errors import ConfigError
from crystal.run import load_run
from crystal.training.ledger import Ledger


@pytest.fixture
def ledger(make_run):
    return Ledger(load_run(make_run()))


def test_where_and_when_are_each_others_inverse(ledger):
    seen = {}
    for step in range(1, ledger.curriculum.steps + 1):
        for row in ledger.where(step)["rows"]:
            seen.setdefault(row["document"], set()).add(step)
    assert len(seen) > 100
    for document, steps in seen.items():
        assert ledger.when(document)["steps"] == sorted(steps)


def test_a_step_lists_its_rows_as_they_were_trained(ledger):
    import torch

    for step in (3, 15, 27):
        answer = ledger.where(step)
        assert {"row", "stage", "source", "document", "epoch", "fim"} <= set(answer["rows"][0])
        assert {r["row"] for r in answer["rows"]} == set(range(8))
        trained = torch.cat([b.ids_BT for b in ledger.batches.step(step - 1)])
        for row in answer["rows"]:
            plain = ledger.store.row(row["source"], row["index"])[:-1]
            assert row["fim"] == (trained[row["row"]].tolist() != plain.tolist())
        decode = ledger.batches.tokenizer.decode
        for shown, ids in zip(ledger.show(step, 8)["rows"], trained.tolist(), strict=True):
            assert shown["text"].startswith(decode(ids[:-4]))


def test_fim_is_applied_in_the_stages_that_have_it(ledger):
    assert not any(r["fim"] for step in range(1, 11) for r in ledger.where(step)["rows"])
    web = [r["fim"] for step in range(11, 23) for r in ledger.where(step)["rows"]]
    assert 0.5 < sum(web) / len(web) <= 1


def test_stats_count_what_the_run_draws(ledger):
    sources = ledger.stats()["sources"]
    drawn = sum(s["epochs"] * s["train_rows"] for s in sources.values())
    assert drawn == pytest.approx(30 * 8, rel=1e-3)
    assert "english" in stats_text(ledger.stats())
    assert where_text(ledger.where(1)).count("\n") >= 7
    assert show_text(ledger.show(1, 2)).startswith("--- row 0, english")


@pytest.mark.parametrize("step", [0, 31])
def test_a_step_outside_the_run_is_refused(ledger, step):
    with pytest.raises(ConfigError, match=f"--step: expected 1 to 30, the run's last, got {step}"):
        ledger.where(step)


def test_an_unknown_document_is_refused(ledger):
    with pytest.raises(ConfigError, match="no document 0123456789abcdef"):
        ledger.when("0123456789abcdef")
