"""A right decoder of one block, as somebody might write it, with parts that tests put in or break."""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crystal.mup import Task, audit, coord_check
from crystal.mup.verdict import Report

WORDS, HEADS, LR = 50, 4, 6e-3

Attention = Callable[[Tensor, Tensor, Tensor, float], Tensor]


def sdpa(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    return F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=scale)


class Decoder(nn.Module):
    """Table 8, with heads fixed so that d_head grows."""

    def __init__(self, d: int, attention: Attention = sdpa, scale: Callable[[int], float] = lambda d_head: 4 / d_head):
        super().__init__()
        self.m, self.attention, self.scale = d / 64, attention, scale(d // HEADS)
        self.embed, self.qkv, self.out = nn.Embedding(WORDS, d), nn.Linear(d, 3 * d, bias=False), nn.Linear(d, d, False)
        self.up, self.down, self.head = nn.Linear(d, 4 * d), nn.Linear(4 * d, d), nn.Linear(d, WORDS, bias=False)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(d) for _ in range(3))
        for name, p in self.named_parameters():
            if p.ndim == 2:
                nn.init.normal_(p, std=0.1 if is_outer(name) else 0.1 * self.m**-0.5)
            elif name.endswith("bias"):
                nn.init.zeros_(p)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids)
        q, k, v = self.qkv(self.norm1(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(self.attention(q, k, v, self.scale).transpose(1, 2).flatten(2))
        x = x + self.down(F.gelu(self.up(self.norm2(x))))
        return self.head(self.norm3(x)) / self.m


def is_outer(name: str) -> bool:
    return name.startswith(("embed", "head"))


def hidden(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if p.ndim == 2 and not is_outer(n)]


def others(model: nn.Module) -> list[nn.Parameter]:
    return [p for n, p in model.named_parameters() if p.ndim != 2 or is_outer(n)]


def grouped(kind: Callable, model: nn.Module, lr: float = LR, **options):
    """An optimizer of Adam's kind with muP's groups."""
    return kind([{"params": hidden(model), "lr": lr / model.m}, {"params": others(model), "lr": lr}], **options)


def adamw(model: nn.Module, lr: float = LR, **options) -> torch.optim.AdamW:
    return grouped(torch.optim.AdamW, model, lr, **options)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    return F.cross_entropy(model(ids[:, :-1]).flatten(0, 1), ids[:, 1:].flatten())


def batch(seed: int) -> Tensor:
    return torch.randint(0, WORDS, (4, 17), generator=torch.Generator().manual_seed(seed))


CALLS = {"inference": lambda model: model(torch.zeros(2, 16, dtype=torch.int64))}


def audited(factory=Decoder, optimizer=adamw, **options) -> Report:
    return audit(factory, **({"width": 512, "base_width": 64, "optimizer": optimizer, "calls": CALLS} | options))


def checked(factory=Decoder, optimizer=adamw, **options) -> Report:
    def model(width: int, seed: int) -> nn.Module:
        torch.manual_seed(seed)
        return factory(width)

    return coord_check(Task(model, optimizer, loss, batch), (64, 128, 256), **options)


def reasons(report: Report) -> str:
    """What rows that do not pass say."""
    return "\n".join(row.message for row in report.rows if row.verdict != "PASS")
