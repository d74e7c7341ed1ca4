"""The coordinate check: statistics, verdicts, other people's models, depth, compiled and sharded models."""

import html
import json
import math
import shlex

import pytest
import torch
import torch.nn.functional as F
from command import crystal, crystal_process
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from crystal.checks.coord_check import Asked, check_model
from crystal.mup import assert_coordinate_check
from crystal.mup.coord_panels import panels, quantities
from crystal.mup.measure import Task, clean, measure
from crystal.mup.slopes import Slope, decide, fit_slope, student
from crystal.mup.verdict import summary
from tests.mup.faults import Net, batch, loss, optimizer


@given(st.floats(-2, 2), st.lists(st.floats(0.01, 100), min_size=1, max_size=4))
def test_a_power_law_is_found_exactly(power, heights):
    points = {(w, s): h * w**power for w in (64, 128, 512) for s, h in enumerate(heights)}
    slope = fit_slope(points)
    assert slope.value == pytest.approx(power, abs=1e-9)
    assert slope.low <= slope.value <= slope.high


def test_the_interval_covers_as_often_as_it_says():
    generator, covered = torch.Generator().manual_seed(0), 0
    for _ in range(400):
        noise = torch.randn(3, 3, generator=generator) * 0.1
        points = {
            (w, s): math.exp(-0.5 * math.log(w) + noise[i, s].item())
            for i, w in enumerate((8, 16, 32))
            for s in range(3)
        }
        slope = fit_slope(points)
        covered += slope.low <= -0.5 <= slope.high
    assert 0.92 < covered / 400 < 0.98


@pytest.mark.parametrize(("free", "expected"), [(1, 12.706), (4, 2.776), (5, 2.571), (9, 2.262), (30, 2.042)])
def test_student_is_students(free, expected):
    assert student(free) == pytest.approx(expected, rel=2e-3)


def test_too_few_or_dead_points_have_no_slope():
    assert fit_slope({(64, 1): 1.0, (128, 1): 2.0}) is None
    assert fit_slope({(64, 1): 1.0, (128, 1): 0.0, (256, 1): 1.0}) is None


@pytest.mark.parametrize(
    ("interval", "verdict"),
    [((-0.1, 0.1), "PASS"), ((0.2, 0.5), "INCONCLUSIVE"), ((0.4, 0.5), "FAIL"), ((-2, 2), "INCONCLUSIVE")],
)
def test_not_seeing_a_difference_is_not_enough(interval, verdict):
    assert decide(Slope(sum(interval) / 2, *interval), 0.0, 0.0, 0.25) == verdict


def test_the_first_update_is_the_learning_rate():
    """Whatever the gradient: measured per tensor, less weight decay."""
    torch.manual_seed(0)
    found = measure(Task(lambda w, s: Net(w), optimizer, loss, batch), 64, 1, 3)
    rates = {id(p): g["lr"] for m in [Net(64)] for g in optimizer(m).param_groups for p in g["params"]}
    assert rates
    assert found.values["blocks.0.q.weight", "update", 1] == pytest.approx(2e-3, rel=0.01)
    assert found.values["embed.weight", "update", 1] == pytest.approx(4e-3, rel=0.01)


def test_a_key_bias_without_gradient_is_left_out():
    """Softmax ignores it, so Adam turns rounding noise into steps."""
    torch.manual_seed(0)
    found = measure(Task(lambda w, s: Net(w), optimizer, loss, batch), 64, 1, 3)
    assert "blocks.0.k.bias" in found.quiet


def test_a_zero_readout_is_waited_for():
    """With a zero head all other gradients vanish at the first step; their first real update comes at the second."""

    def model(width, seed):
        torch.manual_seed(seed)
        net = Net(width)
        nn.init.zeros_(net.head.weight)
        return net

    found = measure(Task(model, optimizer, loss, batch), 64, 1, 4)
    assert ("head.weight", "update", 1) in found.values
    assert ("blocks.0.q.weight", "update", 2) in found.values


@pytest.mark.parametrize(
    ("name", "bare"),
    [
        ("_orig_mod.blocks.0.q", "blocks.0.q"),
        ("module.down", "down"),
        ("_orig_mod", ""),
        ("a._checkpoint_wrapped_module.b", "a.b"),
    ],
)
def test_wrappers_are_taken_off_names(name, bare):
    assert clean(name) == bare


class Mlp(nn.Module):
    """Somebody else's model, right or with mup's groups forgotten."""

    def __init__(self, d: int):
        super().__init__()
        self.m = d / 64
        self.a, self.b, self.c = nn.Linear(16, d), nn.Linear(d, d), nn.Linear(d, 10)
        for layer in (self.a, self.b, self.c):
            nn.init.normal_(layer.weight, std=0.2 / self.m**0.5 if layer is self.b else 0.2)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu()) / self.m


def mlp_optimizer(model, scaled=True):
    rest = [p for n, p in model.named_parameters() if n != "b.weight"]
    rate = 0.01 / model.m if scaled else 0.01
    return torch.optim.Adam([{"params": [model.b.weight], "lr": rate}, {"params": rest, "lr": 0.01}])


def mlp_batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, 16, generator=generator), torch.randint(0, 10, (64,), generator=generator)


def mlp_loss(model, rows):
    return F.cross_entropy(model(rows[0]), rows[1])


def test_other_peoples_models_are_checked_in_their_tests():
    check = assert_coordinate_check(Mlp, optimizer=mlp_optimizer, loss=mlp_loss, batch=mlp_batch, widths=(64, 128, 256))
    assert check.verdict == "PASS"
    with pytest.raises(AssertionError, match=r"b.weight: first update .* not divided by the width multiplier"):
        assert_coordinate_check(
            Mlp,
            optimizer=lambda m: mlp_optimizer(m, scaled=False),
            loss=mlp_loss,
            batch=mlp_batch,
            widths=(64, 128, 256),
        )


def test_seeds_are_added_only_while_the_verdict_is_open():
    assert len({m.seed for m in check_model("amber", Asked(), "sp")[0].measured}) == 2
    assert len({m.seed for m in check_model("amber", Asked(seeds=3), "sp")[0].measured}) == 3


@pytest.mark.parametrize(("parametrization", "verdict"), [("completep", "PASS"), ("mup", "FAIL"), ("sp", "FAIL")])
def test_depth_is_judged(parametrization, verdict):
    (check,) = check_model("amber", Asked(depths=(2, 4, 8)), parametrization)
    assert check.along == "depth"
    assert check.verdict == verdict
    if verdict == "FAIL":
        assert any("residual stream grows with depth" in row.message for row in check.failures)


def test_a_fault_of_many_tensors_is_said_once():
    (check,) = check_model("amber", Asked(), "sp")
    lines = summary(check.failures)
    assert len(lines) == 2
    assert lines[0].endswith("square root of the width multiplier, and so 13 more")
    assert "first update ∝ width^0.00, expected width^-1: its LR is not divided" in lines[1]


def test_the_picture_over_depth_has_the_residual_stream():
    (check,) = check_model("amber", Asked(depths=(2, 4, 8), seeds=1), "completep")
    (panel,) = panels(check, ["size t=4"])
    assert {line.name: len(line.values) for line in panel.lines} == {"blocks.last": 3, "output": 3}
    assert "push" not in quantities(check)


def test_a_compiled_model_gives_the_same_verdict():
    asked = Asked(widths=(64, 96, 128), seeds=2, wrap=lambda m: torch.compile(m, backend="eager"))
    compiled = check_model("amber", asked, "mup")[0]
    plain = check_model("amber", Asked(widths=(64, 96, 128), seeds=2), "mup")[0]
    assert compiled.verdict == plain.verdict
    assert [(r.name, r.quantity, r.verdict) for r in compiled.rows] == [
        (r.name, r.quantity, r.verdict) for r in plain.rows
    ]
    for a, b in zip(compiled.rows, plain.rows, strict=True):
        assert a.slope == pytest.approx(b.slope, abs=0.02), a.name


@pytest.mark.parametrize("under", ["fsdp", "tp"])
@pytest.mark.parametrize(
    ("family", "parametrization", "code"), [("crystalcoder", "crystalcoder", 0), ("amber", "sp", 1)]
)
def test_sharded_models_give_the_same_verdict(under, family, parametrization, code):
    done = crystal_process("coord-check", family, "--parametrization", parametrization, "--under", under, "--json")
    assert done.returncode == code, done.stderr
    result = json.loads(done.stdout)
    assert result["verdict"] == ("FAIL" if code else "PASS")
    if code:
        assert any("blocks.0.mlp.down.weight: first update" in row["message"] for row in result["tensors"])


def test_the_command_writes_json_picture_and_page(tmp_path):
    flags = ("--parametrization", "mup", "--format", "pdf,png", "--out", str(tmp_path), "--json")
    done = crystal("coord-check", "amber", *flags)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["settings"] == {
        "layers": 2, "optimizer": "AdamW", "lr": 0.00125, "dtype": "fp32", "batch": "4 x 64 random words of 256",
    }  # fmt: skip
    assert {"verdict", "seconds", "tensors"} <= result.keys()
    assert {"name", "quantity", "slope", "ci", "expected", "verdict", "rule", "message"} <= result["tensors"][0].keys()
    assert (tmp_path / "coord-check.png").read_bytes()[:4] == b"\x89PNG"
    assert (tmp_path / "coord-check.pdf").read_bytes()[:4] == b"%PDF"
    page = (tmp_path / "coord-check.html").read_text()
    assert "<b>amber, mup: PASS</b>; here all 21 pass" in page
    assert "<b>amber, sp: FAIL (for comparison)</b>; here 14 of 21 fail" in page
    assert html.escape(shlex.join(["crystal", "coord-check", "amber", *flags])) in page
    assert "http" not in page


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("coord-check", "ambr"), "ambr: expected a model or a run file"),
        (("coord-check", "amber", "--widths", "64,128"), "--widths: expected at least three"),
        (("coord-check", "amber", "--widths", "64,x,128"), "--widths: expected positive whole numbers"),
        (("coord-check", "amber", "--widths", "65,128,256"), "width 65: expected a multiple of the head size"),
        (("coord-check", "amber", "--lr", "-1"), "--lr: expected a positive number"),
        (("coord-check", "amber", "--out", "/dev/null/x"), "--out: /dev/null/x cannot be written"),
        (("coord-check", "amber", "--out", ".", "--format", "png,jpeg"), "--format: expected png, pdf, svg, or"),
        (("coord-check", "amber", "--out", ".", "--format", ""), "--format: expected png, pdf, svg, or"),
        (("coord-check", "amber", "--format", "pdf"), "--format: expected --out DIR beside it"),
        (("audit", "amber", "--base", "0"), "--base"),
        (("coord-check", "amber", "--depths", "2,4"), "--depths: expected one depth"),
        (("audit", "nothing.yaml"), "nothing.yaml"),
        (("audit", "amber-7b", "--base", "100"), "width 100: expected a multiple of the head size"),
    ],
)
def test_a_users_mistake_is_one_line(arguments, words):
    done = crystal(*arguments)
    assert done.returncode == 2
    assert words in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1


def test_audit_prints_json_with_the_plan():
    done = crystal("audit", "crystalcoder-w64-l2", "--json")
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)
    assert result["verdict"] == "PASS"
    assert result["plan"]["parametrization"] == "crystalcoder"
    assert crystal("audit", "amber-w64-l2", "--parametrization", "mup").returncode == 1
