"""Scores as people dress them: ALiBi by hand, baddbmm with alpha and beta, tanh soft-capping, a sliding window.

One small model, its attention one of five functions of q, k, v and a scale.
"""

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import (
    BOTH,
    Fault,
    Role,
    abc,
    bias,
    coded,
    families,
    forgotten,
    gain,
    hidden_init,
    hidden_lr,
    next_token,
    output_mult,
    readout,
    tokens,
    vector_lr,
    wrong_decay,
)


def causal(t: int, device: torch.device, window: int | None = None) -> Tensor:
    """Return what may be attended to."""
    i = torch.arange(t, device=device)
    allowed = i[:, None] >= i[None, :]
    return allowed if window is None else allowed & (i[:, None] - i[None, :] < window)


def slopes(heads: int, t: int, device: torch.device) -> Tensor:
    """Return ALiBi's bias."""
    i = torch.arange(t, device=device)
    slope = torch.tensor([2.0 ** (-8 * (h + 1) / heads) for h in range(heads)], device=device)
    return slope.view(heads, 1, 1) * (i[None, :] - i[:, None]).view(1, t, t)


def alibi(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Add ALiBi to scaled scores."""
    t = q.shape[-2]
    scores = q @ k.transpose(-1, -2) * scale + slopes(q.shape[1], t, q.device)
    return scores.masked_fill(~causal(t, q.device), -1e4).softmax(-1) @ v


def baddbmm(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Let baddbmm scale scores and add ALiBi."""
    b, h, t, d = q.shape
    added = slopes(h, t, q.device).repeat(b, 1, 1)
    scores = torch.baddbmm(added, q.reshape(b * h, t, d), k.reshape(b * h, t, d).transpose(1, 2), beta=0.5, alpha=scale)
    scores = scores.view(b, h, t, t).masked_fill(~causal(t, q.device), torch.finfo(q.dtype).min)
    return torch.bmm(scores.softmax(-1).view(b * h, t, t), v.reshape(b * h, t, d)).view(b, h, t, d)


def softcap(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Cap scores smoothly."""
    scores = 15.0 * torch.tanh((q * scale) @ k.mT / 15.0)
    return scores.where(causal(q.shape[-2], q.device), -torch.inf).softmax(-1) @ v


def window(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Attend to the last five, by SDPA with an additive mask."""
    mask = torch.zeros(q.shape[-2], q.shape[-2], device=q.device)
    mask = mask.masked_fill(causal(q.shape[-2], q.device, 5).logical_not(), float("-inf"))
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, scale=scale)


def sink(q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
    """Let scores be absorbed by a constant in the softmax's denominator."""
    scores = torch.mul(torch.einsum("...qd,...kd->...qk", q, k), scale)
    scores = scores.masked_fill(~causal(q.shape[-2], q.device), -torch.inf)
    top = scores.amax(-1, keepdim=True).detach()
    weights = torch.exp(scores - top)
    return weights / (weights.sum(-1, keepdim=True) + torch.exp(-top)) @ v


KINDS = {one.__name__: one for one in (alibi, baddbmm, softcap, window, sink)}


class Block(nn.Module):
    """Attention of a kind and an MLP in parallel."""

    def __init__(self, d: int, attend: Callable[..., Tensor], scale: float, heads: int = 4) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(d)
        self.to_qkv, self.to_out = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.fc_in, self.fc_out = nn.Linear(d, 3 * d), nn.Linear(3 * d, d)
        self.attend, self.scale, self.heads = attend, scale, heads

    def forward(self, x: Tensor) -> Tensor:
        """Add both branches."""
        h = self.norm(x)
        q, k, v = (y.unflatten(-1, (self.heads, -1)).transpose(1, 2) for y in self.to_qkv(h).chunk(3, dim=-1))
        y = self.attend(q, k, v, self.scale).transpose(1, 2).flatten(2)
        return x + self.to_out(y) + self.fc_out(F.gelu(self.fc_in(h), approximate="tanh"))


class LM(nn.Module):
    """Two blocks."""

    def __init__(self, d: int, attend: Callable[..., Tensor], scales: list[float], mults: tuple[float, float]) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(50, d), nn.Embedding(32, d)
        self.blocks = nn.Sequential(*[Block(d, attend, scale) for scale in scales])
        self.final = nn.LayerNorm(d)
        self.to_logits = nn.Linear(d, 50)
        self.input_mult, self.output_mult = mults

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits."""
        x = self.token(ids) * self.input_mult + self.position.weight[: ids.shape[1]]
        return self.to_logits(self.final(self.blocks(x)) * self.output_mult)


ROLES = {
    "token.weight": Role("input"),
    "position.weight": Role("wide", 0.05),
    "blocks.?.norm.weight": gain(),
    "final.weight": gain(),
    "to_logits.bias": Role("fixed", start="zeros"),
    "to_logits.weight": Role("output"),
    "*.bias": bias(),
    "*.weight": Role("hidden"),
}


def build(width: int, form: str, code: str) -> nn.Module:
    """Make a model whose attention is the form's second word."""
    m, right, wrong = width / 64, 4.0 / (width // 4), 1 / math.sqrt(width // 4)
    scales = {"scores": [wrong, wrong], "scores 1": [right, wrong]}.get(code, [right, right])
    mults = (abc(form, "input", m)[0] * (m**0.5 if code == "embedding" else 1), output_mult(form, m, code))
    return LM(width, KINDS[form.split()[1]], scales, mults)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the next tokens' cross-entropy."""
    return next_token(model(ids), ids)


SCORES = (
    coded("scores by 1/sqrt(d_head)", "blocks", "scores"),
    coded("scores of the last block by 1/sqrt(d_head)", "blocks.1", "scores 1"),
)
OTHERS = (
    coded("embedding is multiplied by sqrt(m)", "token", "embedding"),
    hidden_lr("*.to_*.weight", "*.fc_*.weight", tensor="blocks"),
    forgotten("*.0.fc_out.weight", "blocks.0.fc_out"),
    vector_lr("position.weight", "position"),
    hidden_lr("*.0.fc_in.weight", tensor="blocks.0.fc_in", power=-1.0),
    hidden_init("*.1.to_out.weight", "blocks.1.to_out"),
    vector_lr("*.to_qkv.bias", "to_qkv.bias"),
    Fault("a bias' lr grows with m", "fc_in.bias", BOTH, lr={"*.fc_in.bias": 1.0}),
    wrong_decay("position.weight", "position"),
    *readout("to_logits", "to_logits.weight"),
)
FORMS = {
    "alibi": ("table3", "table9"),
    "baddbmm": ("table8", "table3"),
    "softcap": ("table3", "table8"),
    "window": ("table9", "table8"),
    "sink": ("table3", "table9"),
}
FAMILIES = []
for start, (kind, tables) in enumerate(FORMS.items()):  # every kind has its scores' faults and a third of the others
    forms = [f"{table} {kind}" for table in tables]
    FAMILIES += families("scores", build, ROLES, loss, tokens, forms, (*SCORES, *OTHERS[start % 3 :: 3]))
