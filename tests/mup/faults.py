"""The fault matrix: a small decoder in correct muP, and the ways to break it, one rule at a time.

`python -m tests.mup.faults` prints the table of docs/mup.md: who catches what, and in which words.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crystal.mup.audit import audit
from crystal.mup.audit_depth import audit_depth
from crystal.mup.coord_check import coord_check
from crystal.mup.measure import Task
from crystal.mup.plan import make_plan
from crystal.mup.rules import Tuning
from crystal.mup.verdict import Report, Row, summary

VOCAB, BASE, HEADS, LR, STD, ALPHA = 64, 32, 4, 4e-3, 0.125, 0.5
WIDTHS = (32, 64, 128)


class Block(nn.Module):
    def __init__(self, d: int, rule: str, branch: float):
        super().__init__()
        self.rule, self.branch = rule, branch
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q, self.k, self.v, self.o = (nn.Linear(d, d, bias=True) for _ in range(4))
        self.gate, self.up, self.down = (nn.Linear(*s, bias=False) for s in ((d, 2 * d), (d, 2 * d), (2 * d, d)))
        if rule == "raw matrix":
            self.mix = nn.Parameter(torch.empty(d, d))

    def forward(self, x: Tensor) -> Tensor:
        a = self.norm1(x)
        q, k, v = (f(a).unflatten(-1, (HEADS, -1)).transpose(1, 2) for f in (self.q, self.k, self.v))
        d_head = q.shape[-1]
        scale = {"attention 1/sqrt(d)": d_head**-0.5, "attention 1/d^2": d_head**-2}
        scale = scale.get(self.rule, (BASE / HEADS) ** 0.5 / d_head)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)
        x = x + self.o(y.transpose(1, 2).flatten(2)) * self.branch
        a = self.norm2(x)
        x = x + self.down(F.silu(self.gate(a)) * self.up(a)) * self.branch
        return x + a @ self.mix if self.rule == "raw matrix" else x


class Net(nn.Module):
    """Table 8's decoder with heads fixed, so that d_head grows; `rule` names what is broken."""

    def __init__(self, d: int, rule: str = "correct", depth: int = 2, base_depth: int = 2):
        super().__init__()
        m, depth_m = d / BASE, depth / base_depth
        branch = 1.0 if rule == "branch multiplier missing" else 1 / depth_m
        self.rule, self.m, self.depth = rule, m, depth
        self.embed = nn.Embedding(VOCAB, d)
        self.blocks = nn.ModuleList(Block(d, rule, branch) for _ in range(depth))
        self.norm = nn.RMSNorm(d)
        self.head = nn.Linear(d, VOCAB, bias=False)
        if "tied" in rule:
            self.head.weight = self.embed.weight
        self.logits = {
            "logits not / m": 1.0,
            "logits / sqrt(m)": m**-0.5,
            "logits / m twice": m**-2,
            "muP off": 1.0,
        }.get(rule, 1 / m)
        self.alpha = {"embedding multiplier missing": 1.0, "embedding x sqrt(d_model)": ALPHA * m**0.5}.get(rule, ALPHA)
        for name, p in self.named_parameters():
            if name.endswith("bias"):
                nn.init.zeros_(p)
            elif p.ndim == 2:
                nn.init.normal_(p, std=self.sigma(name))
        if rule == "groups lost after sharding":
            self.mark_then_shard()

    def mark_then_shard(self) -> None:
        """Hang the lr factor on each tensor, as mup does with infshape, then do as FSDP2: make parameters anew."""
        for name, p in list(self.named_parameters()):
            p.lr_factor = 1 / self.m if p.ndim == 2 and name.startswith("blocks.") else 1.0
            owner, _, leaf = name.rpartition(".")
            setattr(self.get_submodule(owner), leaf, nn.Parameter(p.detach()))

    def sigma(self, name: str) -> float:
        rule, m = self.rule, self.m
        hidden = "blocks." in name
        if name == "embed.weight" and rule == "tied readout rescaled":
            return STD * m**0.5
        if name == "embed.weight" and rule == "embedding init as hidden":
            return STD * m**-0.5
        if name == "head.weight" and rule == "swapped roles":
            return STD * m**-0.5
        if name == "blocks.0.o.weight" and rule == "swapped roles":
            return STD
        if not hidden or rule in ("hidden init not / sqrt(m)", "muP off"):
            return STD
        if rule == "q and k init alone" and name.split(".")[2] in ("q", "k"):
            return STD
        if rule == "hidden init / m":
            return STD / m
        if rule == "2L counted twice" and name.split(".")[2] in ("o", "down"):
            return STD * m**-0.5 / math.sqrt(2 * self.depth)
        return STD * m**-0.5

    def forward(self, ids: Tensor, training: bool = True) -> Tensor:
        x = self.embed(ids) * self.alpha
        for block in self.blocks:
            x = block(x)
        logits = self.head(self.norm(x))
        skipped = self.rule == "multiplier skipped at inference" and not training
        return logits if skipped else logits * self.logits


def optimizer(model: Net, lr: float = LR) -> torch.optim.AdamW:
    """AdamW with muP's groups, broken as the model's rule says. Weight decay is independent: lambda * m on hidden."""
    rule, m = model.rule, model.m
    groups: dict[tuple, list] = {}
    for name, p in model.named_parameters():
        hidden = p.ndim == 2 and name.startswith("blocks.")
        factor = 1 / m if hidden else 1.0
        if rule in ("hidden lr not / m", "muP off"):
            factor = 1.0
        elif rule == "groups lost after sharding":
            factor = getattr(p, "lr_factor", 1.0)
        elif rule == "hidden lr / m twice" and hidden:
            factor = m**-2
        elif (
            (rule == "one matrix lr not / m" and name == "blocks.0.down.weight")
            or (rule == "one layer lr not / m" and name.startswith("blocks.1."))
            or (rule == "swapped roles" and name == "blocks.0.o.weight")
        ):
            factor = 1.0
        elif (
            (rule == "embedding lr / m" and name == "embed.weight")
            or (rule in ("readout lr / m", "swapped roles") and name == "head.weight")
            or (rule == "gain lr / m" and "norm" in name)
            or (rule == "biases in the scaled group" and name.endswith("bias"))
        ):
            factor = 1 / m
        decay = 0.0 if p.ndim < 2 else 0.1 * (m if hidden and rule != "weight decay not transferred" else 1.0)
        if rule == "tensor left out" and name == "blocks.1.up.weight":
            continue
        groups.setdefault((lr * factor, decay), []).append(p)
    listed = [{"params": ps, "lr": rate, "weight_decay": decay} for (rate, decay), ps in groups.items()]
    return torch.optim.AdamW(listed, eps=1e-6 if rule == "eps drifted" else 1e-8)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def batch(seed: int) -> Tensor:
    return torch.randint(0, VOCAB, (4, 33), generator=torch.Generator().manual_seed(seed))


def audited(rule: str, width: int = 256) -> Report:
    """The static audit of one rule's family, over width; over depth where the rule is about depth."""
    calls = {
        "training": lambda model: model(torch.zeros(1, 4, dtype=torch.int64)),
        "inference": lambda model: model(torch.zeros(1, 4, dtype=torch.int64), training=False),
    }
    if rule in ("2L counted twice", "branch multiplier missing"):
        return audit_depth(
            lambda depth: Net(64, rule, depth),
            depths=(2, 8),
            optimizer=lambda model: optimizer(model, 1.0),
            calls=calls,
            residual_out=("o.weight", "down.weight"),
        )
    tuning = Tuning(init_std=STD, embedding_multiplier=ALPHA, weight_decay=0.1, independent_decay=True)
    correct = "tied" if "tied" in rule else "correct"
    with torch.device("meta"):
        plan = make_plan(Net(width, correct), Net(BASE, correct), Net(2 * BASE, correct), "mup", tuning)
    return audit(
        lambda w: Net(w, rule),
        width=width,
        base_width=BASE,
        parametrization="mup",
        optimizer=lambda model: optimizer(model, 1.0),
        calls=calls,
        weight_decay="independent",
        plan=plan,
    )


def coordinates(rule: str, first_seed: int = 1) -> Report:
    """The coordinate check of one rule's family."""

    def model(width: int, seed: int) -> Net:
        torch.manual_seed(seed)
        return Net(width, rule)

    layouts = {f"blocks.{i}.mix": (0, 1) for i in range(2)}
    return coord_check(Task(model, optimizer, loss, batch), WIDTHS, first_seed=first_seed, layouts=layouts)


@dataclass(frozen=True)
class Fault:
    """rule: what is broken; by: who catches it; tensor: a name that must be given; words: part of the message;
    trained: what the coordinate check says instead, where it sees only the effect."""

    rule: str
    by: tuple[str, ...]
    tensor: str
    words: str
    trained: str = ""

    def named(self, rows: list[Row]) -> bool:
        return any(self.tensor in row.message and self.words in row.message for row in rows if row.verdict == "FAIL")


BOTH, AUDIT = ("audit", "coord-check"), ("audit",)
FAULTS = (
    Fault("muP off", BOTH, "blocks.0.q.weight", "LR is not divided by the width multiplier"),
    Fault("hidden lr not / m", BOTH, "blocks.0.down.weight", "LR is not divided by the width multiplier"),
    Fault("hidden lr / m twice", BOTH, "blocks.1.q.weight", "divided by the width multiplier twice"),
    Fault("one matrix lr not / m", BOTH, "blocks.0.down.weight", "LR is not divided by the width multiplier"),
    Fault("one layer lr not / m", BOTH, "blocks.1.up.weight", "LR is not divided by the width multiplier"),
    Fault("embedding lr / m", BOTH, "embed.weight", "which is for hidden matrices only"),
    Fault("readout lr / m", BOTH, "head.weight", "which is for hidden matrices only"),
    Fault("gain lr / m", BOTH, "blocks.0.norm1.weight", "which is for hidden matrices only"),
    Fault("biases in the scaled group", BOTH, "blocks.0.o.bias", "which is for hidden matrices only"),
    Fault("groups lost after sharding", BOTH, "blocks.0.q.weight", "LR is not divided by the width multiplier"),
    Fault("swapped roles", BOTH, "blocks.0.o.weight", "LR is not divided by the width multiplier"),
    Fault("hidden init not / sqrt(m)", BOTH, "blocks.0.v.weight", "init sigma is not divided by the square root"),
    Fault("hidden init / m", BOTH, "blocks.0.v.weight", "divided by the width multiplier, its square root is wanted"),
    Fault("q and k init alone", BOTH, "blocks.1.k.weight", "init sigma is not divided by the square root"),
    Fault("embedding init as hidden", BOTH, "embed.weight", "which is for hidden matrices only"),
    Fault("tied readout rescaled", BOTH, "embed.weight", "set_base_shapes"),
    Fault("logits not / m", BOTH, "head.weight", "are not divided by the width multiplier", "output: size"),
    Fault("logits / sqrt(m)", AUDIT, "head.weight", "square root of the width multiplier, the multiplier itself"),
    Fault("logits / m twice", BOTH, "head.weight", "divided by the width multiplier twice", "output: size"),
    Fault("attention 1/sqrt(d)", AUDIT, "blocks.0.q.weight", "scaled by 1/sqrt(d_head), muP wants 1/d_head"),
    Fault("attention 1/d^2", AUDIT, "blocks.0.q.weight", "scores' scale is off"),
    Fault("embedding multiplier missing", AUDIT, "embed.weight", "the plan says 0.5"),
    Fault("embedding x sqrt(d_model)", AUDIT, "embed.weight", "forward multiplier scales with the wrong power"),
    Fault("multiplier skipped at inference", AUDIT, "head.weight", "one skips a multiplier"),
    Fault("weight decay not transferred", AUDIT, "blocks.0.q.weight", "weight decay scales with the wrong power"),
    Fault("eps drifted", AUDIT, "blocks.0.q.weight", "eps is 1e-06, the plan says 1e-08"),
    Fault("tensor left out", BOTH, "blocks.1.up.weight", "never updated"),
    Fault("raw matrix", AUDIT, "blocks.0.mix", "cannot be classified"),
    Fault("2L counted twice", AUDIT, "blocks.0.down.weight", "depth is counted twice"),
    Fault("branch multiplier missing", AUDIT, "blocks.0.o.weight", "not multiplied by m_L^-alpha"),
)


def main() -> None:
    print("| what is broken | audit | coord-check | in its words |\n|---|---|---|---|")
    for fault in (Fault("correct", (), "", ""), *FAULTS):
        static = audited(fault.rule)
        trained = coordinates(fault.rule)
        first = next((r for r in (static, trained) if any(fault.named([row]) for row in r.failures)), static)
        said = [r.message for r in first.failures if fault.named([r])]
        columns = [fault.rule, static.verdict, trained.verdict, (said or summary(first.failures) or [""])[0]]
        print(f"| {' | '.join(columns)} |", flush=True)


if __name__ == "__main__":
    main()
