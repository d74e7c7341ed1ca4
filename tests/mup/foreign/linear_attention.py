"""Attention without a softmax: retention with decays, linear attention by a state, a delta rule with unit keys.

q and k are contracted over d_head all the same, so what multiplies values goes with 1/d_head; where keys and queries
are unit vectors ("delta"), with a constant. In "state" the contraction is of q with a state (d_head, d_head) that sums
k v, so that q and k meet in no product of their own: the scale stands at q.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import (
    AUDIT,
    BOTH,
    Fault,
    Role,
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
    wrong_eps,
)


def retention(q: Tensor, k: Tensor, v: Tensor, scale: float, beta: Tensor) -> Tensor:
    """Weigh values by decayed products."""
    t = q.shape[-2]
    i = torch.arange(t, device=q.device)
    decay = 0.9 ** (i[:, None] - i[None, :]).clamp(min=0) * (i[:, None] >= i[None, :])
    return ((q * scale) @ k.transpose(-1, -2) * decay) @ v


def state(q: Tensor, k: Tensor, v: Tensor, scale: float, beta: Tensor) -> Tensor:
    """Read a state that sums keys times values."""
    kv, out = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], device=k.device), []
    for t in range(q.shape[-2]):
        kv = 0.9 * kv + torch.einsum("bhd,bhe->bhde", k[:, :, t], v[:, :, t])
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t] * scale, kv))
    return torch.stack(out, dim=2)


def delta(q: Tensor, k: Tensor, v: Tensor, scale: float, beta: Tensor) -> Tensor:
    """Correct a state by what it gets wrong; keys and queries are unit vectors, beta the rate."""
    q, k = F.normalize(q, dim=-1) * scale, F.normalize(k, dim=-1)
    memory, out = torch.zeros(*k.shape[:2], k.shape[-1], v.shape[-1], device=k.device), []
    for t in range(q.shape[-2]):
        wrong = v[:, :, t] - torch.einsum("bhd,bhde->bhe", k[:, :, t], memory)
        memory = memory + torch.einsum("bhd,bhe->bhde", k[:, :, t], wrong * beta[:, t, :, None])
        out.append(torch.einsum("bhd,bhde->bhe", q[:, :, t], memory))
    return torch.stack(out, dim=2)


KINDS = {"retention": retention, "state": state, "delta": delta}


class Block(nn.Module):
    """One of the kinds, gated, and an MLP."""

    def __init__(self, d: int, kind: str, scale: float) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.q_proj, self.k_proj, self.v_proj, self.g_proj = (nn.Linear(d, d, bias=False) for _ in range(4))
        self.b_proj = nn.Linear(d, 4) if kind == "delta" else None
        self.o_proj = nn.Linear(d, d, bias=False)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.SiLU(), nn.Linear(2 * d, d))
        self.attend, self.scale = KINDS[kind], scale

    def forward(self, x: Tensor) -> Tensor:
        """Add both."""
        h = self.norm1(x)
        q, k, v = (p(h).unflatten(-1, (4, -1)).transpose(1, 2) for p in (self.q_proj, self.k_proj, self.v_proj))
        beta = None if self.b_proj is None else self.b_proj(h).sigmoid()
        y = self.attend(q, k, v, self.scale, beta).transpose(1, 2).flatten(2)
        x = x + self.o_proj(y * F.silu(self.g_proj(h)))
        return x + self.mlp(self.norm2(x))


class LM(nn.Module):
    """Two blocks."""

    def __init__(self, d: int, kind: str, scales: list[float], output_mult: float) -> None:
        super().__init__()
        self.embeddings = nn.Embedding(50, d)
        self.layers = nn.ModuleList([Block(d, kind, scale) for scale in scales])
        self.norm = nn.RMSNorm(d)
        self.lm_head = nn.Linear(d, 50, bias=False)
        self.output_mult = output_mult

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """Return logits in a dict."""
        x = self.embeddings(ids)
        for layer in self.layers:
            x = layer(x)
        return {"logits": self.lm_head(self.norm(x)) * self.output_mult}


ROLES = {
    "embeddings.weight": Role("input"),
    "lm_head.weight": Role("output"),
    "*norm*.weight": gain(),
    "*.b_proj.weight": Role("narrow"),
    "*.b_proj.bias": Role("fixed", start="zeros"),
    "*.bias": bias(),
    "*.weight": Role("hidden"),
}


def build(width: int, form: str, code: str) -> nn.Module:
    """Make a model whose kind is the form's second word."""
    m, kind = width / 64, form.split()[1]
    right = 1.0 if kind == "delta" else 4.0 / (width // 4)
    wrong = right * m**0.5
    scales = {"scores": [wrong, wrong], "scores 1": [right, wrong]}.get(code, [right, right])
    return LM(width, kind, scales, output_mult(form, m, code))


def batch(seed: int) -> Tensor:
    """Return short sequences, for states go step by step."""
    return tokens(seed, length=12)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the next tokens' cross-entropy."""
    return next_token(model(ids)["logits"], ids)


FAULTS = (
    coded("products of queries and keys are sqrt(m) too large", "layers", "scores"),
    coded("products of the last layer are sqrt(m) too large", "layers.1", "scores 1"),
    hidden_lr("*.?_proj.weight", "*.mlp.?.weight", tensor="layers"),
    hidden_lr("layers.0.g_proj.weight", tensor="layers.0.g_proj"),
    hidden_init("layers.1.mlp.2.weight", "layers.1.mlp.2"),
    vector_lr("embeddings.weight", "embeddings", by=BOTH),
    forgotten("layers.0.mlp.0.weight", "layers.0.mlp.0.weight"),
    wrong_eps(),
    *readout("lm_head", "lm_head.weight"),
)
DELTA = (
    *FAULTS,
    hidden_lr("*.b_proj.weight", tensor="b_proj"),
    vector_lr("*.b_proj.bias", "b_proj.bias"),
    Fault("b_proj is drawn as a hidden weight", "b_proj", AUDIT, init={"*.b_proj.weight": 0.5}),
)
FAMILIES = [
    *families("retention", build, ROLES, loss, tokens, ("table3 retention", "table8 retention"), FAULTS),
    *families("linear attention", build, ROLES, loss, batch, ("table8 state", "table3 state"), FAULTS),
    *families("delta rule", build, ROLES, loss, batch, ("table3 delta", "table8 delta"), DELTA, decay="independent"),
]
