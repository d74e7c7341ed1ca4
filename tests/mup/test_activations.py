"""What the audit says of activations, constants, optimizers and arguments that are not of the usual kind."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crystal.mup import Task, coord_check
from crystal.mup.verdict import CheckError
from tests.mup.small_decoder import LR, WORDS, Decoder, adamw, audited, batch, checked, hidden, others, reasons


def distance(scale):
    """Scores by minus the squared distance of q and k, which is a sum over d_head."""

    def attention(q, k, v, _):
        away = (q.unsqueeze(-2) - k.unsqueeze(-3)).square().sum(-1)
        return (-away * scale(q.shape[-1])).softmax(-1) @ v

    return attention


def cosine(scale):
    def attention(q, k, v, _):
        return (F.cosine_similarity(q.unsqueeze(-2), k.unsqueeze(-3), dim=-1) * scale(q.shape[-1])).softmax(-1) @ v

    return attention


def positive(scale):
    """Scores of features past a nonlinearity, by element."""

    def attention(q, k, v, _):
        return ((q.relu().unsqueeze(-2) * k.relu().unsqueeze(-3)).sum(-1) * scale(q.shape[-1])).softmax(-1) @ v

    return attention


@pytest.mark.parametrize(
    ("attention", "verdict"),
    [
        (distance(lambda d: 16 / d), "PASS"),
        (distance(lambda d: 4 / d**0.5), "FAIL"),
        (cosine(lambda d: 4.0), "PASS"),
        (cosine(lambda d: d**0.5), "FAIL"),
        (positive(lambda d: 16 / d), "PASS"),
        (positive(lambda d: 4 / d**0.5), "FAIL"),
    ],
)
def test_scores_of_any_form_are_judged(attention, verdict):
    report = audited(lambda d: Decoder(d, attention))
    assert report.verdict == verdict, reasons(report)


class Branch(Decoder):
    """The MLP's hidden layer goes on past its nonlinearity times a factor."""

    def __init__(self, d, power):
        super().__init__(d)
        self.power = power

    def forward(self, ids):
        x = self.embed(ids)
        x = x + F.gelu(self.out(self.norm1(x))) * self.m**self.power
        return self.head(self.norm3(x)) / self.m


@pytest.mark.parametrize(("power", "verdict"), [(0, "PASS"), (0.5, "FAIL"), (-1, "FAIL")])
def test_activations_keep_their_size(power, verdict):
    report = audited(lambda d: Branch(d, power), accept=["qkv.*", "up.*", "down.*", "norm2.*"])
    assert report.verdict == verdict, reasons(report)
    assert verdict == "PASS" or "out.weight: what comes from it, past what is not linear" in reasons(report)


@pytest.mark.parametrize("kind", ["buffer", "frozen"])
@pytest.mark.parametrize(("power", "verdict"), [(-1, "PASS"), (0, "FAIL")])
def test_a_multiplier_in_a_tensor_is_read(kind, power, verdict):
    class Held(Decoder):
        def __init__(self, d):
            super().__init__(d)
            held = torch.linspace(0.5, 1.5, WORDS) * self.m**power
            if kind == "buffer":
                self.register_buffer("held", held)
            else:
                self.held = nn.Parameter(held, requires_grad=False)

        def forward(self, ids):
            return super().forward(ids) * self.m * self.held

    report = audited(Held)
    assert report.verdict == verdict, reasons(report)


def test_numbers_that_change_with_width_inside_an_operation_are_inconclusive():
    class Softened(Decoder):
        def forward(self, ids):
            return F.softplus(super().forward(ids), beta=self.m)

    report = audited(Softened)
    assert report.verdict == "INCONCLUSIVE"
    assert "softplus, which is given other numbers at other widths" in reasons(report)


def twice(model):
    return [adamw(model), torch.optim.AdamW(hidden(model), lr=LR)]


def test_a_tensor_in_two_optimizers_fails():
    report = audited(optimizer=twice)
    assert report.verdict == "FAIL"
    assert "is in two optimizer groups" in reasons(report)


def scheduled(model):
    made = torch.optim.AdamW([{"params": hidden(model)}, {"params": others(model)}], lr=LR)
    torch.optim.lr_scheduler.LambdaLR(made, [lambda step: 1 / model.m, lambda step: 1.0])
    return made


def test_a_schedule_that_has_the_factor_of_each_group_is_read():
    report = audited(optimizer=scheduled)
    assert report.verdict == "PASS", reasons(report)


def test_a_warm_up_from_0_is_one_line_where_steps_are_taken():
    def warming(model):
        made = adamw(model)
        torch.optim.lr_scheduler.LambdaLR(made, lambda step: min(step / 10, 1.0))
        return made

    assert audited(optimizer=warming).verdict == "PASS"
    with pytest.raises(CheckError, match="a warm-up that starts at 0"):
        checked(optimizer=warming)


def test_radams_first_step_is_not_its_lr():
    def radam(model):
        return torch.optim.RAdam([{"params": hidden(model), "lr": LR / model.m}, {"params": others(model), "lr": LR}])

    report = checked(optimizer=radam)
    assert any("its first step is not one of lr yet" in row.message for row in report.rows)
    assert not any(row.verdict == "FAIL" and row.quantity == "update" for row in report.rows)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"factory": lambda d: Decoder(64)}, "no dimension grows"),
        ({"factory": lambda d: None}, "must return a torch.nn.Module, got NoneType"),
        ({"factory": lambda d: 1 / 0}, "ZeroDivisionError"),
        ({"optimizer": lambda m: None}, "optimizer: expected a torch.optim.Optimizer or a list of them, got NoneType"),
        ({"optimizer": lambda m: torch.optim.AdamW([])}, "optimizer: raised ValueError"),
        ({"width": 0}, "width: expected a positive whole number"),
        ({"base_width": "64"}, "base_width: expected a positive whole number"),
        ({"layouts": {"nothing": (0, 1)}}, "layouts: expected names of tensors, got nothing"),
        ({"layouts": {"out.weight": (0, 7)}}, "layouts: out.weight: expected two of its 2 dimensions"),
        ({"weight_decay": "none"}, "weight_decay: expected coupled, independent or None"),
    ],
)
def test_mistakes_in_an_audit_are_one_line(options, words):
    with pytest.raises(CheckError, match=words) as raised:
        audited(**options)
    assert len(str(raised.value).splitlines()) == 1


def a_task(**parts):
    def model(width, seed):
        torch.manual_seed(seed)
        return Decoder(width)

    usual = {"model": model, "optimizer": adamw, "loss": lambda m, ids: m(ids).mean(), "batch": batch}
    return Task(**(usual | parts))


@pytest.mark.parametrize(
    ("task", "options", "words"),
    [
        (a_task(model=lambda w, s: None), {}, "model: expected a torch.nn.Module at size 64, got NoneType"),
        (a_task(model=lambda w, s: nn.ReLU()), {}, "expected tensors to train at size 64"),
        (a_task(loss=lambda m, ids: 1.0), {}, "loss: expected one number with a gradient, got float"),
        (a_task(loss=lambda m, ids: m(ids)), {}, "loss: expected one number with a gradient"),
        (a_task(loss=lambda m, ids: m.nothing), {}, "loss: raised AttributeError"),
        (a_task(batch=lambda seed: 1 / 0), {}, "batch: raised ZeroDivisionError"),
        (a_task(), {"along": "height"}, "along to be width or depth"),
        (a_task(), {"seeds": 0}, "seeds at least 1"),
        (a_task(), {"sizes": ("64", "128", "256")}, "positive whole numbers"),
    ],
)
def test_mistakes_in_a_check_are_one_line(task, options, words):
    with pytest.raises(CheckError, match=words) as raised:
        coord_check(task, **({"sizes": (64, 128, 256)} | options))
    assert len(str(raised.value).splitlines()) == 1
