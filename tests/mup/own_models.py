"""A user's module, as `crystal audit tests/mup/own_models.py:factory` takes it: right families, and what breaks one."""

import os

import torch
import torch.nn.functional as F
from torch import nn

BASE, LR = 64, 0.01


class Mlp(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.m = width / BASE
        self.a, self.b, self.c = nn.Linear(16, width), nn.Linear(width, width), nn.Linear(width, 10)
        for layer in (self.a, self.b, self.c):
            nn.init.normal_(layer.weight, std=0.2 / self.m**0.5 if layer is self.b else 0.2)
            nn.init.zeros_(layer.bias)

    def forward(self, x):
        return self.c(self.b(self.a(x).relu()).relu()) / self.m


def optimizer(model):
    rest = [p for n, p in model.named_parameters() if n != "b.weight"]
    return torch.optim.AdamW([{"params": [model.b.weight], "lr": LR / model.m}, {"params": rest}], LR, weight_decay=0)


def loss(model, batch):
    return F.cross_entropy(model(batch[0]), batch[1])


def batch(seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(64, 16, generator=generator), torch.randint(0, 10, (64,), generator=generator)


def factory(width):
    print("a line of the user's own")
    return Mlp(width)


def family(**changes):
    """A factory of its own, with companions of its own."""

    def made(width):
        return Mlp(width)

    for name, value in changes.items():
        setattr(made, name, value)
    return made


def raising(error, at=0):
    def made(width):
        if width > at:
            raise error
        return Mlp(width)

    return made


class Families:
    """Named as own_models:Families.NAME."""

    right = Mlp
    one_rate = family(optimizer=lambda m: torch.optim.AdamW(m.parameters(), LR, weight_decay=0))
    sp = family(parametrization="sp")
    dict_batch = family(
        batch=lambda seed: {"x": [batch(seed)[0]], "n": 1}, loss=lambda m, rows: m(rows["x"][0]).square().mean()
    )
    own_calls = family(calls={"inference": lambda m: m(torch.randn(3, 16))})
    unread = family(loss=lambda m, rows: torch.fft.fft(m(rows[0])).abs().mean())
    number, instance, nothing = 3, nn.Linear(2, 2), staticmethod(lambda width: None)
    raises, raises_later = raising(RuntimeError("no such width\nand more")), raising(AssertionError(), at=64)
    exits = raising(SystemExit("usage: own_models"))
    no_optimizer = family(optimizer=lambda m: None)
    no_rule = family(optimizer=lambda m: torch.optim.LBFGS(m.parameters()))
    not_scalar = family(loss=lambda m, rows: m(rows[0]))
    no_gradient = family(loss=lambda m, rows: m(rows[0]).sum().detach())
    bad_loss = family(loss=lambda m, rows: m(rows[0]) @ torch.zeros(3))
    bad_batch = family(batch=lambda seed: 1 / 0)
    bad_calls, bad_layouts = family(calls={"x": 3}), family(layouts=[])
    bad_call = family(calls={"x": lambda m: m.generate()})
    bad_rules, bad_optimizer = family(parametrization="mupp"), family(optimizer=os)
