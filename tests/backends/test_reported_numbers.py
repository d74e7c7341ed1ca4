"""What a run reports does not depend on how many processes share its rows: every number of every backend that has
ranks, against the `cpu` backend in one process."""

import json
import math
from pathlib import Path

import pytest
import reported
import torch.distributed as dist
from layouts import together

# sums in another order, over a few steps; a number that is one process' alone is off by per cents (28.292 for 27.696)
REL = 1e-3


@pytest.fixture(scope="module")
def path(corpus, tmp_path_factory):
    from runs import write_run

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CRYSTAL_CACHE", str(corpus / "cache"))
        yield write_run(corpus, tmp_path_factory.mktemp("reported"))


@pytest.fixture(scope="module")
def expected(path, tmp_path_factory):
    """By the width of the MLP: tensor parallelism needs an even one."""
    root = tmp_path_factory.mktemp("one")
    return {
        d_ff: reported.numbers(path, root / str(d_ff), [*reported.ONE, f"model.d_ff={d_ff}"]) for d_ff in (85, 86)
    }


def same(found: dict, whole: dict) -> None:
    assert found["left_out"] == whole["left_out"] == [reported.BAD]
    assert found["peak"] > 0
    assert len(found["scores"]) == len(whole["scores"]) == 1
    assert found["scores"][0] == pytest.approx(whole["scores"][0], rel=REL)
    assert whole["scores"][0]
    assert [record["step"] for record in found["steps"]] == list(range(reported.STEPS + 1))
    for record, other in zip(found["steps"], whole["steps"], strict=True):
        assert set(record) == set(other)
        for key in set(other) - {"tokens_per_second"}:
            if other[key] is None or isinstance(other[key], bool | int):
                assert record[key] == other[key], key
            else:
                assert record[key] == pytest.approx(other[key], rel=REL), (key, record["step"])
    keys = {key for record in whole["steps"] for key in record}
    assert keys >= {"loss", "grad_norm", "source_loss", "val_loss", "val_loss_mean", "applied", "tokens"}
    for (nll, tokens), (nll_of_one, tokens_of_one) in zip(found["sums"], whole["sums"], strict=True):
        assert tokens == tokens_of_one
        assert [math.isfinite(x) for x in nll] == [math.isfinite(x) for x in nll_of_one]
        assert nll == pytest.approx(nll_of_one, rel=REL)


def check(processes: int, path: Path, root: Path, expected: dict) -> None:
    together(processes, reported.worker, processes, path, root)
    for name, overrides in reported.CASES[processes].items():
        whole = expected[86 if "model.d_ff=86" in overrides else 85]
        ranks = [json.loads((root / f"{processes}-{name}-{rank}.json").read_text()) for rank in range(processes)]
        same(ranks[0], whole)
        for other in ranks[1:]:  # and none of them knows another number, but those that were not asked
            assert other["peak"] == ranks[0]["peak"]
            assert str(other["sums"]) == str(ranks[0]["sums"])


def test_two_processes_report_what_one_does(path, tmp_path, expected):
    check(2, path, tmp_path, expected)


def test_one_process_of_each_backend_reports_the_same(path, tmp_path, expected):
    for name, overrides in reported.CASES[1].items():
        same(reported.numbers(path, tmp_path / name, overrides), expected[85])
        if dist.is_initialized():
            dist.destroy_process_group()


@pytest.mark.proof
def test_four_processes_report_what_one_does(path, tmp_path, expected):
    check(4, path, tmp_path, expected)
