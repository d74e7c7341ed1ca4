"""Dynamics: noise scale, token curves and norms by hand, and a run's own record and checkpoints."""

import json
import math
from collections import Counter

import numpy as np
import pytest
import torch
from command import crystal
from hypothesis import given
from hypothesis import strategies as st
from overtrained import bigram, small

from crystal import checkpoint
from crystal.analysis.dynamics import recorded
from crystal.analysis.gradient_noise import noise_scale, two_sizes
from crystal.analysis.token_curves import Surprisals, by_rank, curve, curves, first_below, smoothed, surprisals
from crystal.analysis.weight_norms import weight_norms
from crystal.backends.base import MicroBatch
from crystal.training.metrics import read_metrics


def batch(ids, weight=None) -> MicroBatch:
    ids_BT = torch.tensor(ids)
    B, T = len(ids_BT), ids_BT.shape[1] - 1
    weights_BT = torch.full((B, T), 1 / (B * T)) if weight is None else torch.tensor(weight)
    zeros_BT = torch.zeros(B, T, dtype=torch.long)
    return MicroBatch(ids_BT[:, :-1].contiguous(), ids_BT[:, 1:].contiguous(), weights_BT, zeros_BT[:, 0], zeros_BT)


def test_two_batch_sizes_give_signal_and_noise_exactly():
    """Of expected squares: |G_B|^2 = |G|^2 + tr(S) / B."""
    signal, noise = 3.0, 40.0
    found = two_sizes(signal + noise / 2, signal + noise / 16, 2, 16)
    assert found == pytest.approx((signal, noise))


def test_the_noise_scale_is_that_of_the_gradients_of_single_rows():
    """One block's estimate from full sums by hand, and no noise where all rows are equal."""
    model = small()
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 40, (32, 9)).tolist()
    found = noise_scale(model, [batch([row]) for row in rows], blocks=4)
    gradients = []
    for row in rows:
        model.requires_grad_(True)
        loss = model.loss(*(getattr(batch([row]), key) for key in ("ids_BT", "labels_BT", "weights_BT")))[0]
        gradients.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]).double())
    model.requires_grad_(False)
    estimates = []
    for first in range(0, 32, 8):
        own = torch.stack(gradients[first : first + 8])
        small_square, large = float(own.square().sum(1).mean()), own.mean(0)
        estimates.append(two_sizes(small_square, float(large.square().sum()), 1, 8))
        # tr(S) is the unbiased sample covariance's trace
        assert estimates[-1][1] == pytest.approx(float(own.var(0, unbiased=True).sum()), rel=1e-5)
    expected = sum(noise for _, noise in estimates) / sum(signal for signal, _ in estimates)
    assert found["sequences"] == pytest.approx(expected, rel=1e-3)
    assert found["tokens"] == pytest.approx(8 * found["sequences"])
    assert found["interval"] is None or found["interval"][0] < found["sequences"] < found["interval"][1]
    assert all(p.grad is None and not p.requires_grad for p in model.parameters())

    alike = noise_scale(model, [batch([rows[0]])] * 8, blocks=2)
    assert alike["noise"] == pytest.approx(0, abs=1e-5 * alike["gradient_square"])
    with pytest.raises(ValueError, match="at least 2 blocks of 2"):
        noise_scale(model, [batch([rows[0]])] * 3, blocks=2)


def test_surprisals_are_summed_by_token_and_source_and_masked_labels_do_not_count():
    model = bigram(torch.tensor(np.log([[0.5, 0.5], [0.9, 0.1]]).astype(np.float32)))
    found = surprisals(model, [batch([[0, 1, 1, 0]], [[0.1, 0.0, 0.1]])], ["only"])
    assert found.tokens == {1: [pytest.approx(math.log(2)), 1], 0: [pytest.approx(-math.log(0.9)), 1]}
    assert found.sources == {"only": [pytest.approx(math.log(2) - math.log(0.9)), 2]}


def test_ranks_are_of_ten_and_ninety_and_the_rest():
    classes = by_rank(Counter({i: 1000 - i for i in range(150)}))
    counts = Counter(classes.values())
    assert counts == {"1-10": 10, "11-100": 90, "101-1000": 50}
    assert (classes[0], classes[9], classes[10], classes[99], classes[100]) == (
        "1-10", "1-10", "11-100", "11-100", "101-1000",
    )  # fmt: skip


def test_acquisition_is_where_a_curve_first_falls_below_half_the_way_in_log_steps():
    own = curve([10, 100, 1000], [(80.0, 10), (60.0, 10), (20.0, 10)], chance=8.0)
    assert own["nats"] == [8.0, 6.0, 2.0]
    # half of the way from 8 to 2 is 5: a quarter of the way from 6 to 2, between 100 and 1000
    assert own["acquired"]["0.5"] == {"step": round(10**2.25, 1), "bound": "at"}
    assert own["acquired"]["0.25"]["step"] == pytest.approx(10**1.75, abs=0.1)
    assert curve([10, 100], [(90.0, 10), (85.0, 10)], chance=8.0)["acquired"] is None, "never better than chance"
    assert first_below([10, 20], [1.0, 0.5], 2.0) == {"step": 10.0, "bound": "at most"}
    assert first_below([10, 20], [3.0, 2.5], 2.0) is None


@given(st.lists(st.floats(0, 20), min_size=1, max_size=12))
def test_smoothing_keeps_ends_and_range(values):
    own = smoothed(values)
    assert (len(own), own[0], own[-1]) == (len(values), values[0], values[-1])
    assert min(values) - 1e-9 <= min(own) <= max(own) <= max(values) + 1e-9


def test_curves_go_over_steps_in_order_and_name_rare_tokens():
    found = {20: Surprisals({1: [30.0, 30], 2: [9.0, 3]}, {"a": [39.0, 33]}),
             10: Surprisals({1: [60.0, 30], 2: [12.0, 3]}, {"a": [72.0, 33]})}  # fmt: skip
    own = curves(found, {1: "1-10"}, 100)
    assert own["ranks"]["1-10"]["nats"] == [2.0, 1.0]
    assert own["ranks"]["in no sampled row"]["nats"] == [4.0, 3.0]
    assert [token["id"] for token in own["tokens"]] == [1], "a token with few places is not told about alone"
    assert own["sources"]["a"]["n"] == 33


def test_norms_by_role_are_those_of_the_tensors(run):
    first, last = (checkpoint.read(checkpoint.step_directory(run / "checkpoints", step)) for step in (60, 120))
    own = weight_norms(last, first)
    then, now = dict(first.tensors("model")), dict(last.tensors("model"))
    assert own["embedding"]["rms"] == pytest.approx(now["embed.weight"].square().mean().sqrt().item(), rel=1e-5)
    moved = (now["embed.weight"] - then["embed.weight"]).norm() / then["embed.weight"].norm()
    assert own["embedding"]["moved"] == pytest.approx(moved.item(), rel=1e-5)
    assert sum(role["numbers"] for role in own.values()) == sum(t.numel() for t in now.values())
    assert all(role["moved"] is None for role in weight_norms(first, None).values())


def test_a_runs_dynamics_are_its_records_and_resume(run, cache):
    words = ("analyze", "dynamics", run, "--rows", 4, "--noise-rows", 32)
    done = crystal(*words, "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    records = [r for r in read_metrics(run) if "loss" in r]
    assert result["record"]["loss"]["values"] == [r["loss"] for r in records]
    assert result["record"]["grad_norm"]["last"] == records[-1]["grad_norm"]
    assert [c["step"] for c in result["checkpoints"]] == [60, 120]
    validated = [r for r in read_metrics(run) if r.get("val_loss")][-1]["val_loss"]
    for source, own in result["learned"]["sources"].items():
        assert own["nats"][-1] == pytest.approx(validated[source], rel=1e-3), "as training validated it"
    noise = result["checkpoints"][0]["noise"]
    assert (noise["trained_on"], result["checkpoints"][1]["noise"]["trained_on"]) == (False, True)
    assert (noise["small"], noise["large"]) == (2, 4)
    files = sorted((run / "analysis").glob("dynamics-*.png"))
    assert {file.stem for file in files} >= {"dynamics-loss", "dynamics-norms", "dynamics-tokens"}

    file = run / "analysis" / "dynamics-step-0000060.json"
    stamp = file.stat().st_mtime_ns
    assert "half-way" in crystal(*words).stdout
    assert file.stat().st_mtime_ns == stamp
    assert json.loads(crystal("analyze", "dynamics", run, "--rows", 4, "--noise-rows", 0, "--json").stdout)[
        "checkpoints"
    ][0]["noise"] is None  # fmt: skip


def test_a_step_made_again_counts_as_it_was_made_last_and_torn_lines_do_not_count(tmp_path):
    lines = ['{"step": 1, "loss": 3.0}', '{"step": 1, "loss": 2.0}', '{"step": 0, "val_loss": {"a": 1}}', "[1]", '{"st']
    (tmp_path / "metrics.jsonl").write_text("\n".join(lines))
    assert recorded(tmp_path) == [{"step": 0, "val_loss": {"a": 1}}, {"step": 1, "loss": 2.0}]


def test_mistakes_are_one_line(run, cache):
    at = run / "checkpoints"
    for words, said in (
        ((run, "--noise-rows", 5), "--noise-rows: expected 0, or at least 32, got 5"),
        ((at,), "expected a checkpoint, or a run directory"),
    ):
        done = crystal("analyze", "dynamics", *words)
        assert (done.returncode, done.stderr.count("\n"), done.stdout) == (2, 1, "")
        assert said in done.stderr
