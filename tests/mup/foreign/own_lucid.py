"""lucidrains' way: PyTorch's default initialisers and raw torch.randn, one group a parameter, Adam without decay.

nn.Linear's default is uniform with a sigma of (3 fan_in) ** -1/2, right for hidden maps. A head left at it goes with
m ** -1/2, which is Table 9's output once it's multiplied by m ** -1/2 and so is its lr; in the other form it starts at
zero. nn.Embedding's N(0, 1) is used as it is. Raw Parameters are `torch.randn(...) * sigma`, never touched by nn.init.
"""

from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, einsum, nn

from .family import Broken, Family
from .forms import AUDIT, BOTH, next_token, tokens


class RMSNorm(nn.Module):
    """l2-normalised, times sqrt(dim), times a gain."""

    def __init__(self, dim: int) -> None:
        super().__init__()
        self.scale, self.g = dim**0.5, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Norm."""
        return F.normalize(x, dim=-1) * self.scale * self.g


class Attention(nn.Module):
    """Attention with memory key-values and a null key, one of keys and values for all heads (multi-query)."""

    def __init__(self, dim: int, heads: int, dim_head: int, scale: float, memories: float) -> None:
        super().__init__()
        self.heads, self.scale = heads, scale
        self.norm = RMSNorm(dim)
        self.to_q = nn.Linear(dim, heads * dim_head, bias=False)
        self.to_kv = nn.Linear(dim, dim_head * 2, bias=False)
        self.mem_kv = nn.Parameter(torch.randn(2, 3, dim_head) * memories)
        self.to_out = nn.Linear(heads * dim_head, dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend to memories and to the past."""
        b, n, _ = x.shape
        x = self.norm(x)
        q, (k, v) = self.to_q(x), self.to_kv(x).chunk(2, dim=-1)
        q = q.reshape(b, n, self.heads, -1).permute(0, 2, 1, 3) * self.scale
        k, v = (torch.cat((m.expand(b, -1, -1), t), dim=1) for m, t in zip(self.mem_kv, (k, v), strict=True))
        sim = einsum("b h i d, b j d -> b h i j", q, k)
        causal = torch.ones((n, n + 3), device=x.device, dtype=torch.bool).triu(4)
        attn = sim.masked_fill(causal, -torch.finfo(sim.dtype).max).softmax(dim=-1)
        out = einsum("b h i j, b j d -> b h i d", attn, v)
        return self.to_out(out.transpose(1, 2).reshape(b, n, -1))


class GEGLU(nn.Module):
    """Gate half by half."""

    def forward(self, x: Tensor) -> Tensor:
        """Gate."""
        x, gate = x.chunk(2, dim=-1)
        return F.gelu(gate) * x


def feed_forward(dim: int, mult: int = 2) -> nn.Sequential:
    """Return a gated MLP."""
    return nn.Sequential(
        RMSNorm(dim), nn.Linear(dim, dim * mult * 2, bias=False), GEGLU(), nn.Linear(dim * mult, dim, bias=False)
    )


class Transformer(nn.Module):
    """Depth two; dim_head grows, heads are 4."""

    def __init__(self, dim: int, form: str = "", fault: str = "") -> None:
        super().__init__()
        m, dim_head = dim / 64, dim // 4
        self.m, self.form = m, form
        self.token_emb = nn.Embedding(50, dim)
        self.pos = nn.Parameter(torch.randn(32, dim) * (0.3 * m**-0.5 if fault == "pos" else 0.3))
        scale = dim_head**-0.5 if fault == "scores" else 4 / dim_head
        memories = 0.5 * m**-0.5 if fault == "memories" else 0.5
        layers = [[Attention(dim, 4, dim_head, scale, memories), feed_forward(dim)] for _ in range(2)]
        self.layers = nn.ModuleList([nn.ModuleList(pair) for pair in layers])
        self.norm = RMSNorm(dim)
        self.to_logits = nn.Linear(dim, 50, bias=False)
        if fault == "hidden":
            self.layers[0][1][3].weight = nn.Parameter(0.07 * torch.randn(dim, dim * 2))
        if form == "zero head":
            nn.init.zeros_(self.to_logits.weight)
        self.logit_scale = 2.0 if form == "zero head" or fault == "head" else 2.0 * m**-0.5

    def forward(self, x: Tensor, return_loss: bool = False) -> Tensor:
        """Return logits, or the loss."""
        ids = x
        x = self.token_emb(ids) + self.pos[: ids.shape[1]]
        for attn, ff in self.layers:
            x = attn(x) + x
            x = ff(x) + x
        logits = self.to_logits(self.norm(x)) * self.logit_scale
        return next_token(logits, ids) if return_loss else logits


def optimizer(model: nn.Module, fault: str = "") -> torch.optim.Optimizer:
    """Return Adam with a group for every parameter."""
    groups, m, zero = [], model.m, model.form == "zero head"
    for name, parameter in model.named_parameters():
        lr = 2.0**-7
        if name == "token_emb.weight":
            lr = 2.0**-4 / (m if fault == "embedding" else 1)
        elif name == "to_logits.weight":
            lr = lr / m if zero else lr * m**-0.5
            lr = lr * m if fault == "head lr" else lr
        elif parameter.ndim == 2 and name != "pos" and fault != "lr":
            lr = lr / m
        if fault == "mem_kv" and name.endswith("mem_kv"):
            lr = lr / m
        if not (fault == "kv" and name == "layers.1.0.to_kv.weight"):
            groups.append({"params": [parameter], "lr": lr, "name": name})
    return torch.optim.Adam(groups, lr=2.0**-7, betas=(0.9, 0.99))


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the model's own loss."""
    return model(ids, return_loss=True)


def family(form: str) -> Family:
    """Return the family whose head starts in the form's way."""
    made = {
        "scores": ("scores by 1/sqrt(dim_head)", "layers", AUDIT),
        "pos": ("positions are drawn with a sigma that shrinks", "pos", AUDIT),
        "memories": ("memories are drawn with a sigma that shrinks", "mem_kv", AUDIT),
        "hidden": ("a hidden weight is replaced by one of constant sigma", "layers.0.1.3", BOTH),
    }
    trained = {
        "lr": ("hidden lr isn't divided by m", "layers", BOTH),
        "embedding": ("lr of the embedding is divided by m", "token_emb", BOTH),
        "head lr": ("lr of the head is off by m", "to_logits", BOTH),
        "mem_kv": ("lr of memories is divided by m", "mem_kv", AUDIT),
        "kv": ("to_kv is in no group", "layers.1.0.to_kv", BOTH),
    }
    if form != "zero head":
        made["head"] = ("head's multiplier is missing", "to_logits", AUDIT)
    make = partial(Transformer, form=form)
    broken = [Broken(*words, factory=partial(make, fault=fault)) for fault, words in made.items()]
    broken += [Broken(*words, optimizer=partial(optimizer, fault=fault)) for fault, words in trained.items()]
    return Family("lucidrains", form, make, optimizer, loss, tokens, tuple(broken))


FAMILIES = [family("default head"), family("zero head")]
