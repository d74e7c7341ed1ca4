"""QK-norm in three spellings: F.rms_norm with gains, F.normalize with a learned temperature, and by hand.

Normed by rms, queries and keys have coordinates of size 1 and scores go with 1/d_head; normed to unit length, their
dot product is bounded and the scale is a constant (or a learned number a head, which no dimension of grows).
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import (
    AUDIT,
    BOTH,
    Fault,
    Role,
    coded,
    families,
    forgotten,
    hidden_init,
    hidden_lr,
    next_token,
    output_mult,
    readout,
    tokens,
    vector_lr,
    wrong_decay,
)


class Attention(nn.Module):
    """Attention with normed queries and keys; `scale` multiplies the scores."""

    def __init__(self, dim: int, heads: int, style: str, scale: float) -> None:
        super().__init__()
        self.heads, self.d, self.style, self.scale = heads, dim // heads, style, scale
        self.wq, self.wk, self.wv, self.wo = (nn.Linear(dim, dim, bias=False) for _ in range(4))
        if style == "rms":
            self.q_gain, self.k_gain = (nn.Parameter(torch.ones(self.d)) for _ in range(2))
        elif style == "unit":
            self.temperature = nn.Parameter(8.0 * torch.ones(heads, 1, 1))

    def normed(self, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """Norm both in the style."""
        if self.style == "rms":
            return F.rms_norm(q, (self.d,), self.q_gain), F.rms_norm(k, (self.d,), self.k_gain)
        if self.style == "unit":
            return F.normalize(q, dim=-1), F.normalize(k, dim=-1)
        return tuple(x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + 1e-6) for x in (q, k))

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        b, t, c = x.shape
        q, k, v = (w(x).view(b, t, self.heads, self.d).transpose(1, 2) for w in (self.wq, self.wk, self.wv))
        q, k = self.normed(q, k)
        if self.style == "hand":
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        else:
            scores = torch.einsum("bhqd,bhkd->bhqk", q, k) * self.scale
            if self.style == "unit":
                scores = scores * self.temperature
            mask = torch.full((t, t), float("-inf"), device=x.device).triu(1)
            y = (scores + mask).softmax(-1) @ v
        return self.wo(y.transpose(1, 2).reshape(b, t, c))


class LM(nn.Module):
    """Two layers; each norm without gains."""

    def __init__(self, dim: int, styles: list[str], scales: list[float], output_mult: float) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, dim)
        self.attn = nn.ModuleList([Attention(dim, 4, *pair) for pair in zip(styles, scales, strict=True)])
        self.ffn = nn.ModuleList(
            [
                nn.Sequential(nn.Linear(dim, 3 * dim, bias=False), nn.SiLU(), nn.Linear(3 * dim, dim, bias=False))
                for _ in styles
            ]
        )
        self.unembed = nn.Linear(dim, 50, bias=False)
        self.output_mult = output_mult

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits."""
        x = self.embed(ids)
        for attn, ffn in zip(self.attn, self.ffn, strict=True):
            x = x + attn(F.rms_norm(x, x.shape[-1:]))
            x = x + ffn(F.rms_norm(x, x.shape[-1:]))
        return self.output_mult * self.unembed(F.rms_norm(x, x.shape[-1:]))


ROLES = {
    "embed.weight": Role("input"),
    "unembed.weight": Role("output"),
    "*.?_gain": Role("vector", start="ones"),
    "*.temperature": Role("fixed", start="keep"),
    "*.weight": Role("hidden"),
}


def build(width: int, form: str, code: str) -> nn.Module:
    """Make a model whose second word of the form is its style; "mixed" has one layer of rms and one of unit."""
    m = width / 64
    style = form.split()[1]
    styles = ["rms", "unit"] if style == "mixed" else [style, style]
    right = {"rms": 4.0 / (width // 4), "hand": 4.0 / (width // 4), "unit": 1.0}
    wrong = {"rms": (width // 4) ** -0.5, "hand": (width // 4) ** -0.5, "unit": (width // 4) ** 0.5 / 4}
    scales = [right[one] for one in styles]
    if code in ("scores", "scores 1"):
        scales[1] = wrong[styles[1]]
    if code == "scores":
        scales[0] = wrong[styles[0]]
    if code == "scores of unit by 1/d":
        scales[1] = 1 / m
    return LM(width, styles, scales, output_mult(form, m, code))


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the next tokens' cross-entropy."""
    return next_token(model(ids), ids)


FAULTS = (
    hidden_lr("*.w?.weight", tensor="attn"),
    hidden_lr("ffn.0.2.weight", tensor="ffn.0.2"),
    hidden_init("attn.1.wo.weight", "attn.1.wo"),
    hidden_init("ffn.1.0.weight", "ffn.1.0"),
    vector_lr("embed.weight", "embed", by=BOTH),
    forgotten("attn.0.wv.weight", "attn.0.wv"),
    wrong_decay("embed.weight", "embed"),
    *readout("unembed", "unembed.weight"),
)
RMS = (
    coded("scores of rms-normed by 1/sqrt(d_head)", "attn", "scores"),
    coded("scores of the last layer by 1/sqrt(d_head)", "attn.1", "scores 1"),
)
UNIT = (
    coded("scores of unit vectors times sqrt(d_head)", "attn", "scores"),
    coded("scores of unit vectors by 1/d_head in the last layer", "attn.1", "scores of unit by 1/d"),
    vector_lr("*.temperature", "temperature"),
    Fault("temperature's lr grows with m", "temperature", AUDIT, lr={"*.temperature": 1.0}),
)
GAINS = (vector_lr("*.q_gain", "q_gain"), forgotten("attn.0.k_gain", "attn.0.k_gain"))
MIXED = (
    coded("scores wrong in both layers", "attn", "scores"),
    coded("scores of unit vectors times sqrt(d_head)", "attn.1", "scores 1"),
)
FAMILIES = [
    *families("qk-norm", build, ROLES, loss, tokens, ("table3 rms", "table8 rms"), (*RMS, *GAINS, *FAULTS)),
    *families("qk-norm", build, ROLES, loss, tokens, ("table3 unit", "table8 unit"), (*UNIT, *FAULTS)),
    *families("qk-norm", build, ROLES, loss, tokens, ("table3 hand", "table8 hand"), (*RMS, *FAULTS)),
    *families("qk-norm", build, ROLES, loss, tokens, ("table8 mixed",), (*MIXED, *FAULTS), decay="independent"),
]
