"""PASS needs evidence: what is not judged, not moved, not there or not readable is said, by name."""

import math

import pytest
import torch
from torch import nn
from torch.nn.attention.flex_attention import flex_attention
from torch.nn.attention.varlen import varlen_attn

from crystal.mup.init_trace import build, build_on_meta
from crystal.mup.verdict import CheckError
from tests.mup.small_decoder import (
    HEADS,
    LR,
    WORDS,
    Decoder,
    adamw,
    audited,
    checked,
    grouped,
    hidden,
    others,
    reasons,
)  # fmt: skip


def test_the_decoder_that_these_tests_break_is_right():
    assert audited().verdict == "PASS", reasons(audited())
    assert checked().verdict == "PASS", reasons(checked())


# ---- attention that torch does not compute in the open


def flexible(q, k, v, scale):
    return flex_attention(q, k, v, score_mod=lambda score, b, h, i, j: score + (i - j) * 0.1, scale=scale)


def packed(q, k, v, scale):
    flat = [t.transpose(1, 2).reshape(-1, HEADS, t.shape[-1]) for t in (q, k, v)]
    ends = torch.zeros(q.shape[0] + 1, dtype=torch.int32)
    y = varlen_attn(*flat, ends, ends, q.shape[2], q.shape[2], scale=scale)
    return y.reshape(q.shape[0], q.shape[2], HEADS, -1).transpose(1, 2)


@torch.library.custom_op("crystal_tests::attention", mutates_args=())
def unknown_attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> torch.Tensor:
    return (q @ k.transpose(-1, -2) * scale).softmax(-1) @ v


@unknown_attention.register_fake
def _(q, k, v, scale):
    return torch.empty_like(v)


@pytest.mark.parametrize("attention", [flexible, packed])
def test_flex_and_varlen_attention_are_judged(attention):
    assert audited(lambda d: Decoder(d, attention)).verdict == "PASS"
    report = audited(lambda d: Decoder(d, attention, lambda d_head: d_head**-0.5))
    assert report.verdict == "FAIL"
    assert "qkv.weight: scores ∝ d_head^-0.50" in reasons(report)


def test_an_operation_that_is_not_known_is_inconclusive_by_name():
    report = audited(lambda d: Decoder(d, unknown_attention))
    assert report.verdict == "INCONCLUSIVE"
    assert "qkv.weight: what it gives goes into attention, an operation that the trace does not know" in reasons(report)
    accepted = audited(lambda d: Decoder(d, unknown_attention), accept=["qkv.weight", "norm1.*", "embed.weight"])
    assert accepted.verdict == "PASS", reasons(accepted)


# ---- halves that were not given


@pytest.mark.parametrize(
    ("missing", "words"), [("optimizer", "learning rates, weight decay and eps"), ("calls", "forward multipliers")]
)
def test_a_half_that_was_not_given_is_not_passed(missing, words):
    report = audited(**{missing: None})
    assert report.verdict == "INCONCLUSIVE"
    assert f"{words}" in reasons(report)
    assert audited(**{missing: None, "accept": [missing]}).verdict == "PASS"


# ---- tensors that are not trained


def test_a_tensor_that_nothing_uses_is_inconclusive():
    class Spare(Decoder):
        def __init__(self, d):
            super().__init__(d)
            self.spare = nn.Linear(d, d, bias=False)
            nn.init.normal_(self.spare.weight, std=0.1 * self.m**-0.5)

    assert "spare.weight: is used in none of the calls" in reasons(audited(Spare))
    assert "spare.weight: never got a gradient" in reasons(checked(Spare))
    for tool in (audited, checked):
        assert tool(Spare).verdict == "INCONCLUSIVE"
        assert tool(Spare, accept=["spare.*"]).verdict == "PASS"


def test_an_expert_that_no_token_reaches_is_inconclusive():
    class Routed(Decoder):
        def __init__(self, d):
            super().__init__(d)
            self.experts = nn.ModuleList(nn.Linear(d, d, bias=False) for _ in range(2))
            for expert in self.experts:
                nn.init.normal_(expert.weight, std=0.1 * self.m**-0.5)

        def attend(self, x):
            return self.experts[0](x)

        def forward(self, ids):
            x = self.embed(ids)
            return self.head(self.norm3(x + self.attend(self.norm1(x)))) / self.m

    report = checked(Routed)
    assert report.verdict == "INCONCLUSIVE"
    assert "experts.1.weight: never got a gradient" in reasons(report)


def without_last(model):
    made = adamw(model)
    made.param_groups[0]["params"].pop()
    return made


def with_a_still_group(model):
    made = adamw(model)
    made.add_param_group({"params": [made.param_groups[0]["params"].pop()], "lr": 0.0})
    return made


@pytest.mark.parametrize("optimizer", [without_last, with_a_still_group])
def test_a_tensor_that_gets_a_gradient_and_does_not_move_fails(optimizer):
    for report in (audited(optimizer=optimizer), checked(optimizer=optimizer)):
        assert report.verdict == "FAIL"
        assert "down.weight: " in reasons(report)
        assert "never updated" in reasons(report)


@pytest.mark.parametrize("grouped_too", [True, False])
def test_frozen_tensors_are_said_and_not_judged(grouped_too):
    class Frozen(Decoder):
        def __init__(self, d):
            super().__init__(d)
            nn.init.normal_(self.embed.weight, std=0.1 * self.m)  # wrong, if it were trained
            self.embed.weight.requires_grad = False

    def optimizer(model):
        rest = [p for p in others(model) if grouped_too or p.requires_grad]
        return torch.optim.AdamW([{"params": hidden(model), "lr": LR / model.m}, {"params": rest, "lr": LR}])

    report = audited(Frozen, optimizer)
    assert report.verdict == "PASS", reasons(report)
    assert any("embed.weight: frozen" in note for note in report.notes)


# ---- tensors that none of the widths shows


@pytest.mark.parametrize("what", ["init", "lr", "weight decay"])
def test_a_tensor_without_a_growing_dimension_is_the_same_at_every_width(what):
    class Scaled(Decoder):
        def __init__(self, d):
            super().__init__(d)
            self.gain = nn.Parameter(torch.full((HEADS,), 1 / self.m if what == "init" else 1.0))

        def forward(self, ids):
            return super().forward(ids) * self.gain.mean()

    def optimizer(model):
        rest = [p for p in others(model) if p is not model.gain]
        own = {"lr": LR / model.m if what == "lr" else LR, "weight_decay": model.m if what == "weight decay" else 0.01}
        return torch.optim.AdamW(
            [{"params": hidden(model), "lr": LR / model.m}, {"params": rest, "lr": LR}, {"params": [model.gain], **own}]
        )

    report = audited(Scaled, optimizer)
    assert report.verdict == "FAIL"
    assert f"gain: {what} is" in reasons(report)
    assert "none of its dimensions grows" in reasons(report)


# ---- eps, lr


@pytest.mark.parametrize(("power", "verdict"), [(0, "PASS"), (-1, "PASS"), (2, "FAIL"), (-2, "FAIL")])
def test_eps_is_compared_by_rule_without_a_plan(power, verdict):
    report = audited(optimizer=lambda model: adamw(model, eps=1e-8 * model.m**power))
    assert report.verdict == verdict
    assert verdict == "PASS" or "expected a constant or m^-1" in reasons(report)


def test_an_eps_that_hides_every_update_does_not_pass():
    for eps in (1e-3, 10.0):
        report = checked(optimizer=lambda model, eps=eps: adamw(model, eps=eps))
        assert report.verdict != "PASS"
        assert f"its eps of {eps:g}" in reasons(report)


@pytest.mark.parametrize(("lr", "words"), [(0.5, "updates dominate init"), (1e-9, "updates vanish beside init")])
def test_an_lr_far_off_says_so(lr, words):
    report = checked(optimizer=lambda model: adamw(model, lr=lr))
    assert report.verdict == "INCONCLUSIVE"
    assert words in reasons(report)
    assert "more seeds" not in reasons(report)


def test_an_lr_of_0_is_one_line():
    for tool in (audited, checked):
        with pytest.raises(CheckError, match=r"lr is 0 .*warm-up"):
            tool(optimizer=lambda model: adamw(model, lr=0.0))


# ---- optimizers


class Lion(torch.optim.Optimizer):
    def __init__(self, params, lr=1e-3):
        super().__init__(params, {"lr": lr})

    @torch.no_grad()
    def step(self):
        for group in self.param_groups:
            for p in group["params"]:
                if p.grad is not None:
                    p.add_(p.grad.sign(), alpha=-group["lr"])


class Shampoo(Lion):
    pass


def muon(how, power):
    def optimizers(model):
        matrices = torch.optim.Muon(hidden(model), lr=0.02 * model.m**power, weight_decay=0.0, adjust_lr_fn=how)
        return [matrices, torch.optim.AdamW(others(model), lr=LR)]

    return optimizers


def sgd(model, right=True):
    vectors = 5 * model.m if right else 5
    return torch.optim.SGD([{"params": hidden(model), "lr": 5}, {"params": others(model), "lr": vectors}])


@pytest.mark.parametrize(
    ("optimizer", "verdict"),
    [
        (lambda m: grouped(Lion, m), "PASS"),
        (lambda m: grouped(torch.optim.RMSprop, m), "PASS"),
        (muon("original", 0), "PASS"),
        (muon("match_rms_adamw", -0.5), "PASS"),
        (muon("match_rms_adamw", 0), "FAIL"),
        (muon("original", -1), "FAIL"),
        (sgd, "PASS"),
        (lambda m: sgd(m, False), "FAIL"),
    ],
)
def test_optimizers_are_judged_by_their_own_rule(optimizer, verdict):
    report = audited(optimizer=optimizer)
    assert report.verdict == verdict, reasons(report)


@pytest.mark.parametrize(("power", "verdict"), [(0, "PASS"), (-1, "FAIL")])
def test_the_first_update_of_muon_is_an_orthogonal_matrix(power, verdict):
    report = checked(optimizer=muon("original", power))
    assert report.verdict == verdict, reasons(report)
    assert verdict == "PASS" or "for Muon" in reasons(report)


@pytest.mark.parametrize(
    ("optimizer", "name"),
    [
        (lambda m: Shampoo(m.parameters()), "Shampoo"),
        (lambda m: torch.optim.LBFGS(m.parameters()), "LBFGS"),
        (lambda m: torch.optim.Adafactor(m.parameters()), "Adafactor"),
    ],
)
def test_optimizers_without_a_rule_are_refused_by_name(optimizer, name):
    for tool in (audited, checked):
        with pytest.raises(CheckError, match=f"optimizer {name}: "):
            tool(optimizer=optimizer)


# ---- parameters that come late


class Lazy(Decoder):
    def __init__(self, d):
        super().__init__(d)
        self.head = nn.LazyLinear(WORDS, bias=False)


class Late(Decoder):
    def forward(self, ids):
        if not hasattr(self, "extra"):
            self.extra = nn.Parameter(torch.zeros(4))
        return super().forward(ids)


class Replaced(Decoder):
    def forward(self, ids):
        self.out.weight = nn.Parameter(self.out.weight.detach())
        return super().forward(ids)


@pytest.mark.parametrize(("factory", "name"), [(Lazy, "head.weight"), (Late, "extra")])
def test_a_parameter_that_is_made_late_is_refused_by_name(factory, name):
    for tool in (audited, checked):
        with pytest.raises(CheckError, match=name):
            tool(factory)


def test_a_parameter_that_is_replaced_is_refused_by_name():
    with pytest.raises(CheckError, match=r"out.weight: is replaced in the forward pass"):
        checked(Replaced)
    assert "out.weight: is used in none of the calls" in reasons(audited(Replaced))


# ---- initialisers


@pytest.mark.parametrize(
    ("fill", "text"),
    [
        (lambda w: w[:2].zero_(), "0 | normal 0.5"),
        (lambda w: w[:, 3:].zero_(), "normal 0.5 | 0"),
        (lambda w: w[2:4].mul_(2), "normal 0.5 | normal 1 | normal 0.5"),
        (lambda w: w[1].normal_(0, 0.1), "normal 0.5 | normal 0.1 | normal 0.5"),
        (lambda w: w.copy_(torch.cat([torch.randn(4, 16), torch.zeros(4, 16)])), "normal 1 | 0"),
        (lambda w: w[:4].normal_(0, 0.5), "normal 0.5"),
    ],
)
@pytest.mark.parametrize("device", ["meta", "cpu"])
def test_parts_that_are_written_apart_are_read_apart(fill, text, device):
    def factory():
        layer = nn.Linear(16, 8, bias=False)
        fill(layer.weight.data.normal_(0, 0.5))
        return layer

    assert str(build(factory, torch.device(device))[1]["weight"]) == text


def test_a_padding_row_does_not_hide_the_rest():
    assert str(build_on_meta(lambda: nn.Embedding(10, 4, padding_idx=0))[1]["weight"]) == "0 | normal 1"


@pytest.mark.parametrize(("right", "verdict"), [(True, "PASS"), (False, "FAIL")])
def test_an_initialiser_that_cannot_be_read_is_drawn(right, verdict):
    class Orthogonal(Decoder):
        def __init__(self, d):
            super().__init__(d)
            nn.init.orthogonal_(self.out.weight, gain=1.0 if right else math.sqrt(d))

    report = audited(Orthogonal)
    assert report.verdict == verdict, reasons(report)
    row = next(r for r in report.rows if r.name == "out.weight" and r.quantity == "init")
    assert row.slope == pytest.approx(-0.5 if right else 0.0, abs=0.02)


def test_a_name_of_a_parametrization_that_is_not_there_has_its_nearest():
    for tool in (audited, checked):
        with pytest.raises(CheckError, match=r"got mu-p; did you mean mup\?"):
            tool(parametrization="mu-p")


def test_a_multiplier_that_only_the_target_has_is_seen():
    """At base and at twice the base the scores' scale is right, at the target it is not."""
    report = audited(lambda d: Decoder(d, scale=lambda d_head: 4 / min(d_head, 64)))
    assert report.verdict == "FAIL"
