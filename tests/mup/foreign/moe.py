"""Mixtures of experts: experts as one tensor (E, d, f), by einsum or by bmm, and a router that is infinite -> finite.

`MoEinsum` takes all experts with gates that are zero but for the best two; `MoEBmm` sends every token everywhere by
bmm and weighs by softmax. The output is a tuple of logits and the load-balancing loss.
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
    gain,
    hidden_init,
    hidden_lr,
    next_token,
    output_mult,
    readout,
    tokens,
    vector_lr,
)


class MoEinsum(nn.Module):
    """Mixtral's kind: the best two experts, SwiGLU."""

    def __init__(self, d: int, f: int, experts: int = 4, top: int = 2) -> None:
        super().__init__()
        self.gate = nn.Linear(d, experts, bias=False)
        self.w1 = nn.Parameter(torch.empty(experts, d, f))
        self.w3 = nn.Parameter(torch.empty(experts, d, f))
        self.w2 = nn.Parameter(torch.empty(experts, f, d))
        self.top = top

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixture and how uneven its load is."""
        logits = self.gate(x)
        weights, chosen = torch.topk(logits, self.top, dim=-1)
        gates = torch.zeros_like(logits).scatter(-1, chosen, weights.softmax(-1))
        h = F.silu(torch.einsum("btd,edf->btef", x, self.w1)) * torch.einsum("btd,edf->btef", x, self.w3)
        y = torch.einsum("btef,efd,bte->btd", h, self.w2, gates)
        load = (gates > 0).float().mean((0, 1)) * logits.softmax(-1).mean((0, 1))
        return y, load.sum() * logits.shape[-1]


class MoEBmm(nn.Module):
    """All experts by bmm, a softmax over them."""

    def __init__(self, d: int, f: int, experts: int = 4) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.empty(d, experts))
        self.up = nn.Parameter(torch.empty(experts, d, f))
        self.down = nn.Parameter(torch.empty(experts, f, d))

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """Return the mixture and how uneven its load is."""
        flat = x.flatten(0, 1)
        probs = (flat @ self.router).softmax(-1)
        h = torch.bmm(flat.unsqueeze(0).expand(self.up.shape[0], -1, -1), self.up)
        y = torch.bmm(F.gelu(h), self.down)
        return (probs.T.unsqueeze(-1) * y).sum(0).view_as(x), probs.mean(0).pow(2).sum() * probs.shape[-1]


class Model(nn.Module):
    """Causal means in place of attention, then experts."""

    def __init__(self, d: int, kind: type[nn.Module], output_mult: float, branch: float) -> None:
        super().__init__()
        self.tok = nn.Embedding(50, d)
        self.mix = nn.ModuleList([nn.Linear(d, d, bias=False) for _ in range(2)])
        self.moe = nn.ModuleList([kind(d, 2 * d) for _ in range(2)])
        self.ln = nn.ModuleList([nn.LayerNorm(d) for _ in range(5)])
        self.out = nn.Linear(d, 50, bias=False)
        self.output_mult, self.branch = output_mult, branch

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return logits and the auxiliary loss."""
        x, aux = self.tok(ids), 0.0
        count = torch.arange(1, ids.shape[1] + 1, device=ids.device).view(1, -1, 1)
        for i, (mix, moe) in enumerate(zip(self.mix, self.moe, strict=True)):
            x = x + mix(self.ln[2 * i](x).cumsum(1) / count)
            y, uneven = moe(self.ln[2 * i + 1](x))
            x, aux = x + self.branch * y, aux + uneven
        return self.out(self.ln[4](x)) * self.output_mult, aux


COMMON = {
    "tok.weight": Role("input"),
    "ln.*.weight": gain(),
    "ln.*.bias": Role("vector", start="zeros"),
    "out.weight": Role("output"),
    "mix.*.weight": Role("hidden"),
}
EINSUM = COMMON | {"moe.*.gate.weight": Role("narrow"), "moe.*.w?": Role("hidden")}
BMM = COMMON | {"moe.*.router": Role("narrow", start="zeros"), "moe.*": Role("hidden", start="trunc")}


def build_einsum(width: int, form: str, code: str) -> nn.Module:
    """Make a model of the best two experts."""
    return build(width, form, code, MoEinsum)


def build_bmm(width: int, form: str, code: str) -> nn.Module:
    """Make a model of all experts."""
    return build(width, form, code, MoEBmm)


def build(width: int, form: str, code: str, kind: type[nn.Module]) -> nn.Module:
    """Make a model by the form."""
    m = width / 64
    return Model(width, kind, output_mult(form, m, code), m**0.5 if code == "branch" else 1.0)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the next tokens' cross-entropy and a little of the load's."""
    logits, aux = model(ids)
    return next_token(logits, ids) + 0.01 * aux


SHARED = (
    vector_lr("tok.weight", "tok", by=BOTH),
    vector_lr("ln.4.bias", "ln.4.bias"),
    coded("experts' branch grows as sqrt(m)", "moe", "branch", BOTH),
    *readout("out", "out.weight"),
)
EINSUM_FAULTS = (
    hidden_lr("moe.*.w?", tensor="moe"),
    hidden_lr("moe.1.w2", tensor="moe.1.w2", power=-1.0),
    hidden_lr("moe.*.gate.weight", tensor="gate"),
    hidden_init("moe.*.gate.weight", "gate", by=AUDIT),
    hidden_init("moe.0.w3", "moe.0.w3"),
    forgotten("moe.1.w1", "moe.1.w1"),
    *SHARED,
)
BMM_FAULTS = (
    hidden_lr("moe.*.up", "moe.*.down", tensor="moe"),
    hidden_lr("moe.*.router", tensor="router"),
    hidden_init("moe.*.up", "up"),
    Fault("experts' sigma takes d * f for fan_in", "down", BOTH, init={"moe.0.down": -0.5}),
    forgotten("moe.0.router", "moe.0.router"),
    *SHARED,
)
FAMILIES = [
    *families("moe einsum", build_einsum, EINSUM, loss, tokens, ("table8", "table3"), EINSUM_FAULTS),
    *families("moe bmm", build_bmm, BMM, loss, tokens, ("table8", "table3"), BMM_FAULTS, decay="independent"),
]
