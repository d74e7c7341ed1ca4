"""Meta's own Llama: rotary positions by complex numbers (`view_as_complex`), repeated key-value heads, SwiGLU.

Scores are `torch.matmul(xq, keys.transpose(2, 3)) / math.sqrt(self.head_dim)` there. Here the divisor is given: d_head
at once, or half of it in queries and half in keys ("split"). The feed-forward's size is Meta's own rounding.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import (
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
    wrong_decay,
    wrong_eps,
)


def precompute_freqs_cis(dim: int, end: int, theta: float = 10000.0) -> Tensor:
    """Return e ** i t f, of size 1."""
    freqs = 1.0 / (theta ** (torch.arange(0, dim, 2)[: (dim // 2)].float() / dim))
    freqs = torch.outer(torch.arange(end).float(), freqs)
    return torch.polar(torch.ones_like(freqs), freqs)


def apply_rotary_emb(xq: Tensor, xk: Tensor, freqs_cis: Tensor) -> tuple[Tensor, Tensor]:
    """Turn queries and keys."""
    xq_ = torch.view_as_complex(xq.float().reshape(*xq.shape[:-1], -1, 2))
    xk_ = torch.view_as_complex(xk.float().reshape(*xk.shape[:-1], -1, 2))
    freqs_cis = freqs_cis.view(1, xq_.shape[1], 1, xq_.shape[-1])
    xq_out = torch.view_as_real(xq_ * freqs_cis).flatten(3)
    xk_out = torch.view_as_real(xk_ * freqs_cis).flatten(3)
    return xq_out.type_as(xq), xk_out.type_as(xk)


def repeat_kv(x: Tensor, n_rep: int) -> Tensor:
    """Repeat heads of keys and values."""
    bs, slen, n_kv_heads, head_dim = x.shape
    return x[:, :, :, None, :].expand(bs, slen, n_kv_heads, n_rep, head_dim).reshape(bs, slen, -1, head_dim)


class RMSNorm(nn.Module):
    """Meta's RMSNorm."""

    def __init__(self, dim: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps, self.weight = eps, nn.Parameter(torch.ones(dim))

    def forward(self, x: Tensor) -> Tensor:
        """Norm."""
        return x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps) * self.weight


class Attention(nn.Module):
    """Meta's attention, without its cache."""

    def __init__(self, dim: int, n_heads: int, n_kv_heads: int, divisor: float, split: bool) -> None:
        super().__init__()
        self.n_heads, self.n_kv_heads, self.head_dim = n_heads, n_kv_heads, dim // n_heads
        self.divisor, self.split = divisor, split
        self.wq = nn.Linear(dim, n_heads * self.head_dim, bias=False)
        self.wk = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wv = nn.Linear(dim, n_kv_heads * self.head_dim, bias=False)
        self.wo = nn.Linear(n_heads * self.head_dim, dim, bias=False)

    def forward(self, x: Tensor, freqs_cis: Tensor, mask: Tensor) -> Tensor:
        """Attend."""
        bsz, seqlen, _ = x.shape
        xq = self.wq(x).view(bsz, seqlen, self.n_heads, self.head_dim)
        xk = self.wk(x).view(bsz, seqlen, self.n_kv_heads, self.head_dim)
        xv = self.wv(x).view(bsz, seqlen, self.n_kv_heads, self.head_dim)
        xq, xk = apply_rotary_emb(xq, xk, freqs_cis)
        keys, values = (repeat_kv(y, self.n_heads // self.n_kv_heads).transpose(1, 2) for y in (xk, xv))
        xq = xq.transpose(1, 2)
        if self.split:
            root = math.sqrt(self.divisor)
            scores = torch.matmul(xq / root, keys.transpose(2, 3) / root)
        else:
            scores = torch.matmul(xq, keys.transpose(2, 3)) / self.divisor
        output = torch.matmul(F.softmax((scores + mask).float(), dim=-1).type_as(xq), values)
        return self.wo(output.transpose(1, 2).contiguous().view(bsz, seqlen, -1))


class FeedForward(nn.Module):
    """SwiGLU of a rounded size."""

    def __init__(self, dim: int, hidden_dim: int) -> None:
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim, bias=False)
        self.w2 = nn.Linear(hidden_dim, dim, bias=False)
        self.w3 = nn.Linear(dim, hidden_dim, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Gate."""
        return self.w2(F.silu(self.w1(x)) * self.w3(x))


class Transformer(nn.Module):
    """Meta's Transformer."""

    def __init__(self, dim: int, divisors: list[float], split: bool, output_mult: float) -> None:
        super().__init__()
        self.tok_embeddings = nn.Embedding(50, dim)
        self.layers = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention": Attention(dim, 4, 2, divisor, split),
                    "feed_forward": FeedForward(dim, ffn_dim(dim)),
                    "attention_norm": RMSNorm(dim),
                    "ffn_norm": RMSNorm(dim),
                }
            )
            for divisor in divisors
        )
        self.norm = RMSNorm(dim)
        self.output = nn.Linear(dim, 50, bias=False)
        self.output_mult = output_mult
        self.freqs_cis = precompute_freqs_cis(dim // 4, 64)

    def forward(self, tokens: Tensor) -> Tensor:
        """Return logits."""
        _, seqlen = tokens.shape
        h = self.tok_embeddings(tokens)
        freqs_cis = self.freqs_cis.to(h.device)[:seqlen]
        mask = torch.full((seqlen, seqlen), float("-inf"), device=tokens.device).triu(1)
        for layer in self.layers:
            h = h + layer["attention"](layer["attention_norm"](h), freqs_cis, mask)
            h = h + layer["feed_forward"](layer["ffn_norm"](h))
        return self.output(self.norm(h) * self.output_mult).float()


def ffn_dim(dim: float) -> int:
    """Return Meta's size: two thirds of 4 d, rounded up to a multiple of 48."""
    return 48 * ((int(8 * dim / 3) + 47) // 48)


ROLES = {
    "tok_embeddings.weight": Role("input"),
    "*norm.weight": gain(),
    "output.weight": Role("output", start="trunc"),
    "*.w2.weight": Role("hidden", start="trunc", ratio=lambda m: ffn_dim(64 * m) / ffn_dim(64)),
    "*.weight": Role("hidden", start="trunc"),
}


def build(width: int, form: str, code: str) -> nn.Module:
    """Make Meta's Llama by the form."""
    right, wrong = (width // 4) / 4, math.sqrt(width // 4)
    divisors = {"scores": [wrong, wrong], "scores 0": [wrong, right]}.get(code, [right, right])
    return Transformer(width, divisors, "split" in form, output_mult(form, width / 64, code))


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the next tokens' cross-entropy."""
    return next_token(model(ids), ids)


FAULTS = (
    coded("scores by 1/sqrt(head_dim)", "attention", "scores"),
    coded("scores of the first layer by 1/sqrt(head_dim)", "layers.0.attention", "scores 0"),
    hidden_lr("*.w?.weight", tensor="layers"),
    hidden_lr("layers.1.feed_forward.w2.weight", tensor="layers.1.feed_forward.w2", power=-1.0),
    hidden_init("layers.0.attention.wv.weight", "layers.0.attention.wv"),
    vector_lr("*.ffn_norm.weight", "ffn_norm"),
    Fault("embedding's sigma is divided by sqrt(m)", "tok_embeddings", BOTH, init={"tok_embeddings.weight": -0.5}),
    forgotten("layers.1.attention.wq.weight", "layers.1.attention.wq"),
    wrong_decay("output.weight", "output", 2.0),
    wrong_eps(),
    *readout("output", "output.weight"),
)
FAMILIES = [
    *families("meta llama", build, ROLES, loss, tokens, ("table3", "table8 split"), FAULTS, decay="independent")
]
