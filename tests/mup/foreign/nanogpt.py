"""Karpathy's nanoGPT: fused qkv, bias-free LayerNorm, a tied or untied head, attention by SDPA or by hand.

muP as in EleutherAI's and Cerebras' fork of it: the scores' scale is given to SDPA (or multiplied into q beforehand),
and logits are divided in `forward`. The form "rescaled" is Table 8 with hidden weights drawn with a constant sigma and
multiplied by 1/sqrt(m) (NTK's way of writing them).
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import (
    AUDIT,
    BOTH,
    Fault,
    Role,
    Scaled,
    abc,
    coded,
    families,
    forgotten,
    hidden_init,
    hidden_lr,
    output_mult,
    readout,
    tokens,
    vector_lr,
    wrong_decay,
)


@dataclass
class GPTConfig:
    """nanoGPT's config, with the fork's scales."""

    block_size: int = 32
    vocab_size: int = 50
    n_layer: int = 2
    n_head: int = 4
    n_embd: int = 64
    flash: bool = True
    hidden_mult: float = 1.0
    input_mult: float = 1.0
    output_mult: float = 1.0
    scale: float = 1.0
    tied: bool = True


class LayerNorm(nn.Module):
    """LayerNorm with an optional bias, which PyTorch's had not."""

    def __init__(self, ndim: int, bias: bool = False) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(ndim))
        self.bias = nn.Parameter(torch.zeros(ndim)) if bias else None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise."""
        return F.layer_norm(x, self.weight.shape, self.weight, self.bias, 1e-5)


class CausalSelfAttention(nn.Module):
    """Fused qkv, then SDPA with a scale, or scores by hand from scaled queries."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.c_attn = Scaled(config.n_embd, 3 * config.n_embd, bias=False, mult=config.hidden_mult)
        self.c_proj = Scaled(config.n_embd, config.n_embd, bias=False, mult=config.hidden_mult)
        self.n_head, self.n_embd, self.flash, self.scale = config.n_head, config.n_embd, config.flash, config.scale
        mask = torch.tril(torch.ones(config.block_size, config.block_size))
        self.register_buffer("bias", mask.view(1, 1, config.block_size, config.block_size), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        B, T, C = x.size()
        q, k, v = self.c_attn(x).split(self.n_embd, dim=2)
        k = k.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        q = q.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        v = v.view(B, T, self.n_head, C // self.n_head).transpose(1, 2)
        if self.flash:
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True, scale=self.scale)
        else:
            att = (q * self.scale) @ k.transpose(-2, -1)
            att = att.masked_fill(self.bias[:, :, :T, :T] == 0, float("-inf"))
            y = F.softmax(att, dim=-1) @ v
        return self.c_proj(y.transpose(1, 2).contiguous().view(B, T, C))


class Block(nn.Module):
    """Pre-norm attention and MLP."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.ln_1 = LayerNorm(config.n_embd)
        self.attn = CausalSelfAttention(config)
        self.ln_2 = LayerNorm(config.n_embd)
        self.mlp = nn.Sequential(
            Scaled(config.n_embd, 4 * config.n_embd, bias=False, mult=config.hidden_mult),
            nn.GELU(),
            Scaled(4 * config.n_embd, config.n_embd, bias=False, mult=config.hidden_mult),
        )

    def forward(self, x: Tensor) -> Tensor:
        """Add both to the stream."""
        x = x + self.attn(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))


class GPT(nn.Module):
    """nanoGPT."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.config = config
        self.transformer = nn.ModuleDict(
            {
                "wte": nn.Embedding(config.vocab_size, config.n_embd),
                "wpe": nn.Embedding(config.block_size, config.n_embd),
                "h": nn.ModuleList([Block(config) for _ in range(config.n_layer)]),
                "ln_f": LayerNorm(config.n_embd),
            }
        )
        self.lm_head = nn.Linear(config.n_embd, config.vocab_size, bias=False)
        if config.tied:
            self.transformer.wte.weight = self.lm_head.weight

    def forward(self, idx: Tensor, targets: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
        """Return logits and loss."""
        _, t = idx.size()
        pos = torch.arange(0, t, dtype=torch.long, device=idx.device)
        x = (self.transformer.wte(idx) + self.transformer.wpe(pos)) * self.config.input_mult
        for block in self.transformer.h:
            x = block(x)
        logits = self.lm_head(self.transformer.ln_f(x)) * self.config.output_mult
        if targets is None:
            return logits, None
        return logits, F.cross_entropy(logits.view(-1, logits.size(-1)), targets.reshape(-1), ignore_index=-1)


ROLES = {
    "lm_head.weight": Role("output"),
    "transformer.wte.weight": Role("input"),
    "transformer.wpe.weight": Role("input", 0.05),
    "*.ln_*.weight": Role("vector", start="ones"),
    "*.c_attn.weight": Role("hidden"),
    "*.c_proj.weight": Role("hidden"),
    "*.mlp.?.weight": Role("hidden"),
}


def build(width: int, form: str, code: str) -> nn.Module:
    """Make nanoGPT by the form."""
    m = width / 64
    config = GPTConfig(
        n_embd=width,
        flash="flash" in form,
        hidden_mult=1.0 if code == "hidden mult" else abc(form, "hidden", m)[0],
        input_mult=abc(form, "input", m)[0],
        output_mult=output_mult(form, m, code),
        scale=0.25 * m**-0.5 if code == "scores" else 0.25 / m,
        tied="tied" in form,
    )
    return GPT(config)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return nanoGPT's own loss."""
    return model(ids[:, :-1], ids[:, 1:])[1]


def zero_queries(model: nn.Module) -> None:
    """Start queries at zero; they are Linear's first rows."""
    for block in model.transformer.h:
        nn.init.zeros_(block.attn.c_attn.weight[: model.config.n_embd])


FAULTS = (
    coded("scores by 1/sqrt(d_head)", "attn", "scores"),
    coded("hidden multiplier is missing", "h.0", "hidden mult", BOTH, ("ntk",)),
    hidden_lr("*.c_attn.weight", "*.c_proj.weight", "*.mlp.?.weight", tensor="h."),
    hidden_init("*.h.1.mlp.2.weight", "h.1.mlp.2"),
    vector_lr("*.ln_f.weight", "ln_f"),
    vector_lr("*.wpe.weight", "wpe", 1.0, by=BOTH),
    forgotten("*.wpe.weight", "wpe"),
    Fault("fused qkv's sigma is wrong, queries zeroed", "c_attn", AUDIT, init={"*.c_attn.*": 0.5}, after=zero_queries),
)
TIED = (*FAULTS, *readout("wte", ""), wrong_decay("*.wte.weight", "wte"))
UNTIED = (*FAULTS, *readout("lm_head", "lm_head.weight"))
FAMILIES = [
    *families("nanogpt", build, ROLES, loss, tokens, ("table8 tied flash", "ntk tied"), TIED),
    *families("nanogpt", build, ROLES, loss, tokens, ("table3 flash", "table9"), UNTIED),
]
