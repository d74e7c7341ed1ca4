"""Parity with the mup package: the same initial weights, optimizer groups, three training steps and slopes."""

import mup
import mup.coord_check
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from crystal.mup.coord_check import coord_check
from crystal.mup.measure import Task
from crystal.mup.plan import make_plan
from crystal.mup.rules import Tuning
from crystal.mup.slopes import fit_slope

VOCAB, BASE, LR, DECAY, STD = 32, 16, 1e-2, 0.1, 0.3


class Net(nn.Module):
    def __init__(self, d: int, readout=nn.Linear, multiplier: float = 1.0):
        super().__init__()
        self.multiplier = multiplier
        self.embed = nn.Embedding(VOCAB, d)
        self.norm = nn.LayerNorm(d)
        self.up, self.down = nn.Linear(d, 4 * d), nn.Linear(4 * d, d)
        self.head = readout(d, VOCAB, bias=False)

    def forward(self, ids):
        x = self.embed(ids)
        x = x + self.down(F.gelu(self.up(self.norm(x))))
        return self.head(x) * self.multiplier


def theirs(width: int) -> Net:
    model = Net(width, mup.MuReadout)
    mup.set_base_shapes(model, Net(BASE, mup.MuReadout), delta=Net(2 * BASE, mup.MuReadout), rescale_params=False)
    for name, p in model.named_parameters():
        if p.ndim == 2:
            (nn.init.normal_ if name == "head.weight" else mup.normal_)(p, std=STD)
        elif name.endswith("bias"):
            nn.init.zeros_(p)
    return model


def plan_of(width: int):
    tuning = Tuning(init_std=STD, weight_decay=DECAY, independent_decay=True, decay_vectors=True)
    with torch.device("meta"):
        return make_plan(Net(width), Net(BASE), Net(2 * BASE), "mup", tuning)


def ours(width: int) -> Net:
    plan = plan_of(width)
    model = Net(width, multiplier=plan.logits_multiplier)
    for row in plan.tensors:
        p = model.get_parameter(row.tensor)
        if row.init == "normal":
            nn.init.normal_(p, std=row.init_std)
        else:
            nn.init.constant_(p, float(row.init == "ones"))
    return model


WIDTH = 64


def test_initial_weights_have_mups_sizes():
    torch.manual_seed(0)
    a, b = theirs(WIDTH), ours(WIDTH)
    for name, p in a.named_parameters():
        other = b.get_parameter(name)
        assert other.std().item() == pytest.approx(p.std().item(), rel=0.05, abs=1e-9), name


def test_optimizer_groups_are_mups():
    model = theirs(WIDTH)
    names = {id(p): n for n, p in model.named_parameters()}
    expected = {
        names[id(p)]: (group["lr"], group["weight_decay"])
        for group in mup.MuAdamW(model.parameters(), lr=LR, weight_decay=DECAY).param_groups
        for p in group["params"]
    }
    found = {
        row.tensor: (group["lr"], group["weight_decay"])
        for group, rows in zip(
            plan_of(WIDTH).parameter_groups(ours(WIDTH), LR), plan_of(WIDTH).groups().values(), strict=True
        )
        for row in rows
    }
    assert found.keys() == expected.keys()
    for name, pair in expected.items():
        assert found[name] == pytest.approx(pair), name


def test_three_steps_are_mups():
    torch.manual_seed(1)
    a = theirs(WIDTH)
    plan = plan_of(WIDTH)
    b = Net(WIDTH, multiplier=plan.logits_multiplier)
    b.load_state_dict(a.state_dict())
    first = mup.MuAdamW(a.parameters(), lr=LR, weight_decay=DECAY)
    second = torch.optim.AdamW(plan.parameter_groups(b, LR))
    ids = torch.randint(0, VOCAB, (4, 17), generator=torch.Generator().manual_seed(0))
    for _ in range(3):
        losses = []
        for model, optimizer in ((a, first), (b, second)):
            optimizer.zero_grad()
            loss = F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        assert losses[1] == pytest.approx(losses[0], rel=1e-5)
    for name, p in a.named_parameters():
        torch.testing.assert_close(b.get_parameter(name), p, rtol=1e-4, atol=1e-5)


def test_slopes_are_mups_where_both_measure():
    """Exponents of mean |output| of every module at the last step, on the same models and batch."""
    widths, seeds, steps = (16, 32, 64), 2, 3
    ids = torch.randint(0, VOCAB, (4, 17), generator=torch.Generator().manual_seed(0))
    frame = mup.coord_check.get_coord_data(
        {w: (lambda w=w: theirs(w)) for w in widths}, [(ids[:, :-1], ids[:, 1:].flatten())] * steps, optimizer="adamw",
        lr=LR, mup=True, nseeds=seeds, nsteps=steps, fix_data=True, cuda=False, flatten_output=True,
        lossfn="xent", show_progress=False,
    )  # fmt: skip

    def same(width: int, seed: int) -> nn.Module:
        state = torch.get_rng_state()
        model = Net(width, multiplier=plan_of(width).logits_multiplier)
        torch.set_rng_state(state)
        model.load_state_dict(theirs(width).state_dict())
        return model

    torch.manual_seed(0)
    task = Task(
        same,
        lambda m: torch.optim.AdamW(plan_of(m.norm.weight.numel()).parameter_groups(m, LR), weight_decay=0),
        lambda m, x: F.cross_entropy(m(x[:, :-1]).flatten(0, 1), x[:, 1:].flatten()),
        lambda seed: ids,
    )
    check = coord_check(task, widths, seeds=seeds, steps=steps)
    mine = {r.name: r.slope for r in check.rows if r.quantity == f"size t={steps}"}
    for module in ("embed", "norm", "up", "down"):
        part = frame[(frame.t == steps) & (frame.module == module)]
        points = {(w, s): v for w, rows in part.groupby("width") for s, v in enumerate(rows["l1"])}
        assert mine[module] == pytest.approx(fit_slope(points).value, abs=0.06), module
