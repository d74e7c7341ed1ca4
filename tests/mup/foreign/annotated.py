"""The Annotated Transformer: an encoder-decoder with cross-attention, deep-copied Linears and sqrt(d_model) embeddings.

Its `Embeddings` multiply by sqrt(d_model), which is Table 9's input multiplier: right once sigma and lr are divided by
sqrt(m). The other form, Table 3, has no multiplier there. Positions are sinusoids in a buffer.
"""

import copy
import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import (
    AUDIT,
    BOTH,
    Role,
    bias,
    coded,
    families,
    forgotten,
    gain,
    hidden_init,
    hidden_lr,
    output_mult,
    readout,
    vector_lr,
    wrong_decay,
)


def clones(module: nn.Module, number: int) -> nn.ModuleList:
    """Return copies of a module."""
    return nn.ModuleList([copy.deepcopy(module) for _ in range(number)])


def attention(query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """Attend with given scale."""
    scores = torch.matmul(query, key.transpose(-2, -1)) * scale
    if mask is not None:
        scores = scores.masked_fill(mask == 0, -1e9)
    return torch.matmul(scores.softmax(dim=-1), value)


class MultiHeadedAttention(nn.Module):
    """Four Linears with biases."""

    def __init__(self, h: int, d_model: int, scale: float) -> None:
        super().__init__()
        self.d_k, self.h, self.scale = d_model // h, h, scale
        self.linears = clones(nn.Linear(d_model, d_model), 4)

    def forward(self, query: Tensor, key: Tensor, value: Tensor, mask: Tensor | None = None) -> Tensor:
        """Attend."""
        batches = query.size(0)
        query, key, value = [
            linear(x).view(batches, -1, self.h, self.d_k).transpose(1, 2)
            for linear, x in zip(self.linears, (query, key, value), strict=False)
        ]
        x = attention(query, key, value, mask, self.scale)
        return self.linears[-1](x.transpose(1, 2).contiguous().view(batches, -1, self.h * self.d_k))


class Layer(nn.Module):
    """An encoder's layer, or with `source` a decoder's."""

    def __init__(self, d_model: int, scale: float, cross: float | None) -> None:
        super().__init__()
        self.self_attn = MultiHeadedAttention(4, d_model, scale)
        self.src_attn = MultiHeadedAttention(4, d_model, cross) if cross is not None else None
        self.feed_forward = nn.Sequential(nn.Linear(d_model, 2 * d_model), nn.ReLU(), nn.Linear(2 * d_model, d_model))
        self.norms = clones(nn.LayerNorm(d_model), 2 if cross is None else 3)

    def forward(self, x: Tensor, mask: Tensor | None = None, memory: Tensor | None = None) -> Tensor:
        """Add sublayers to the stream."""
        h = self.norms[0](x)
        x = x + self.self_attn(h, h, h, mask)
        if self.src_attn is not None:
            x = x + self.src_attn(self.norms[2](x), memory, memory)
        return x + self.feed_forward(self.norms[1](x))


class Embeddings(nn.Module):
    """A look-up table times a number."""

    def __init__(self, d_model: int, vocab: int, mult: float) -> None:
        super().__init__()
        self.lut = nn.Embedding(vocab, d_model)
        self.mult = mult
        position = torch.arange(0, 32).unsqueeze(1)
        term = torch.exp(torch.arange(0, d_model, 2) * -(math.log(10000.0) / d_model))
        pe = torch.stack((torch.sin(position * term), torch.cos(position * term)), dim=-1).flatten(1)
        self.register_buffer("pe", 0.3 * pe.unsqueeze(0))

    def forward(self, x: Tensor) -> Tensor:
        """Embed tokens and positions."""
        return self.lut(x) * self.mult + self.pe[:, : x.size(1)].requires_grad_(False)


class EncoderDecoder(nn.Module):
    """One layer each."""

    def __init__(self, d_model: int, embed: float, scale: float, cross: float, output_mult: float) -> None:
        super().__init__()
        self.src_embed, self.tgt_embed = Embeddings(d_model, 50, embed), Embeddings(d_model, 50, embed)
        self.encoder, self.decoder = Layer(d_model, scale, None), Layer(d_model, scale, cross)
        self.norm, self.memory_norm = nn.LayerNorm(d_model), nn.LayerNorm(d_model)
        self.generator = nn.Linear(d_model, 50)
        self.output_mult = output_mult

    def forward(self, src: Tensor, tgt: Tensor) -> Tensor:
        """Return log-probabilities of the target."""
        memory = self.memory_norm(self.encoder(self.src_embed(src)))
        mask = torch.ones(1, 1, tgt.size(1), tgt.size(1), device=tgt.device).tril()
        out = self.decoder(self.tgt_embed(tgt), mask, memory)
        return F.log_softmax(self.generator(self.norm(out) * self.output_mult), dim=-1)


ROLES = {
    "*.lut.weight": Role("input"),
    "*norm*.weight": gain(),
    "generator.bias": Role("fixed", start="zeros"),
    "generator.weight": Role("output"),
    "*.bias": bias(),
    "*.weight": Role("hidden"),
}


def build(width: int, form: str, code: str) -> nn.Module:
    """Make the model by the form: four heads at any width."""
    m, scale = width / 64, 4 / (width // 4)
    wrong = (width // 4) ** -0.5
    embed = 8.0**-1 * math.sqrt(width) if form.startswith("table9") or code == "embedding" else 1.0
    if code == "embedding once":
        embed = 1.0
    return EncoderDecoder(
        width,
        embed,
        wrong if code == "scores" else scale,
        wrong if code in ("scores", "cross") else scale,
        output_mult(form, m, code),
    )


def batch(seed: int) -> dict[str, Tensor]:
    """Return source and target."""
    generator = torch.Generator().manual_seed(seed)
    src = torch.randint(1, 50, (4, 13), generator=generator)
    return {"src": src, "tgt": torch.randint(1, 50, (4, 9), generator=generator)}


def loss(model: nn.Module, pair: dict[str, Tensor]) -> Tensor:
    """Return the target's cross-entropy."""
    out = model(pair["src"], pair["tgt"][:, :-1])
    return F.nll_loss(out.flatten(0, 1), pair["tgt"][:, 1:].flatten())


FAULTS = (
    coded("all scores by 1/sqrt(d_head)", "attn", "scores"),
    coded("scores of cross-attention by 1/sqrt(d_head)", "src_attn", "cross"),
    coded("embedding is multiplied by sqrt(d_model)", "lut", "embedding", AUDIT, ("table3",)),
    coded("embedding isn't multiplied by sqrt(d_model)", "lut", "embedding once", AUDIT, ("table9",)),
    hidden_lr("*.linears.?.weight", "*.feed_forward.?.weight", tensor="linears"),
    hidden_lr("decoder.src_attn.linears.1.weight", tensor="src_attn.linears.1"),
    hidden_init("encoder.feed_forward.2.weight", "encoder.feed_forward.2"),
    vector_lr("*.linears.3.bias", "linears.3.bias"),
    vector_lr("src_embed.lut.weight", "src_embed.lut", by=BOTH),
    forgotten("decoder.self_attn.linears.3.weight", "decoder.self_attn.linears.3.weight"),
    wrong_decay("tgt_embed.lut.weight", "tgt_embed.lut"),
    *readout("generator", "generator.weight"),
)
FAMILIES = [*families("annotated transformer", build, ROLES, loss, batch, ("table3", "table9"), FAULTS)]
