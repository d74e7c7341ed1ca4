"""One decoder for every preset: embedding, a list of identical blocks, head.

It knows one device and no backend; sharding, streaming, recomputation and compilation are applied from outside.
muP enters as four plain floats (`Multipliers`), so nothing hangs on tensors and nothing is lost by deepcopy,
meta tensors, functional_call or sharding, and inference applies the same numbers as training.
Only operations that Cerebras' compiler lowers: no boolean indexing, no .item(), no complex numbers.

Shapes in names: B batch, T tokens, D d_model, H heads, K d_head, P rotary pairs, S keys seen, V vocabulary.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from crystal.kernels import (
    add_norm,
    attention,
    document_bounds,
    layer_norm,
    linear,
    linear_cross_entropy,
    rms_norm,
    rope,
    rope_table,
    swiglu,
)
from crystal.zoo.config import ModelConfig


class Multipliers(NamedTuple):
    """muP's forward multipliers; all 1 but `attention` under the standard parametrization."""

    embedding: float  # token embeddings, x this before block 0
    attention: float  # scores q.k, x this before the softmax
    residual: float  # output of each residual branch (CompleteP's m_L^-alpha)
    logits: float  # head(x), x this


class Linear(nn.Linear):
    """nn.Linear, by the product that is fastest on its device."""

    def forward(self, x: Tensor) -> Tensor:
        return linear(x, self.weight, self.bias)


class Norm(nn.Module):
    """LayerNorm with bias, or RMSNorm."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.eps = config.norm_eps
        self.weight = nn.Parameter(torch.empty(config.d_model))
        self.bias = nn.Parameter(torch.empty(config.d_model)) if config.norm == "layernorm" else None

    def forward(self, x_BTD: Tensor, residual_BTD: Tensor | None = None, scale: float = 1.0):
        """norm(x); with a residual, the pair (norm(sum), sum) of sum = residual + scale * x, which CUDA fuses."""
        if residual_BTD is not None:
            return add_norm(x_BTD, residual_BTD, self.weight, self.bias, self.eps, scale)
        if self.bias is None:
            return rms_norm(x_BTD, self.weight, self.eps)
        return layer_norm(x_BTD, self.weight, self.bias, self.eps)


class Attention(nn.Module):
    """Causal self-attention with partial rotary positions and grouped keys and values."""

    def __init__(self, config: ModelConfig, scale: float):
        super().__init__()
        self.d_head, self.style, self.scale = config.d_head, config.rotary_style, scale
        self.groups = config.n_heads // config.kv_heads
        d_kv = config.kv_heads * config.d_head
        self.q = Linear(config.d_model, config.d_model, bias=config.bias)
        self.k = Linear(config.d_model, d_kv, bias=config.bias)
        self.v = Linear(config.d_model, d_kv, bias=config.bias)
        self.out = Linear(config.d_model, config.d_model, bias=config.bias)

    def forward(self, x_BTD: Tensor, table: tuple[Tensor, ...], mask: Tensor | None, cache=None) -> Tensor:
        """table: rotary cos and sin of the T tokens, or of many positions and, third, each token's position [B, T].

        mask: which keys each query sees, [B, T, S], or what `Decoder.mask` gives; None: those up to its own."""

        def heads(y: Tensor) -> Tensor:
            return y.unflatten(-1, (-1, self.d_head)).transpose(1, 2)

        cos, sin, positions = table if len(table) == 3 else (*table, None)
        q_BHTK, k_BHSK, v_BHSK = map(heads, self.projected(x_BTD))
        q_BHTK, k_BHSK = rope(q_BHTK, cos, sin, self.style, k_BHSK, positions=positions)
        if cache is not None:
            k_BHSK, v_BHSK = cache.append(k_BHSK, v_BHSK)
        if self.groups > 1:
            k_BHSK = k_BHSK.repeat_interleave(self.groups, 1)
            v_BHSK = v_BHSK.repeat_interleave(self.groups, 1)
        if mask is not None and mask.dim() == 3:
            mask = mask[:, None]
        y_BHTK = attention(q_BHTK, k_BHSK, v_BHSK, self.scale, mask)
        return self.out(y_BHTK.transpose(1, 2).flatten(2))

    def projected(self, x_BTD: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, the heads of a token one after another."""
        return self.q(x_BTD), self.k(x_BTD), self.v(x_BTD)


class MLP(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x))."""

    def __init__(self, config: ModelConfig):
        super().__init__()
        self.gate = Linear(config.d_model, config.d_ff, bias=config.bias)
        self.up = Linear(config.d_model, config.d_ff, bias=config.bias)
        self.down = Linear(config.d_ff, config.d_model, bias=config.bias)

    def forward(self, x_BTD: Tensor) -> Tensor:
        return self.down(swiglu(*self.projected(x_BTD)))

    def projected(self, x_BTD: Tensor) -> tuple[Tensor, Tensor]:
        """gate(x) and up(x)."""
        return self.gate(x_BTD), self.up(x_BTD)


class Block(nn.Module):
    """Pre-norm residual block: x += attn(norm(x)); x += mlp(norm(x))."""

    def __init__(self, config: ModelConfig, multipliers: Multipliers):
        super().__init__()
        self.residual = multipliers.residual
        self.attn_norm = Norm(config)
        self.attn = Attention(config, multipliers.attention)
        self.mlp_norm = Norm(config)
        self.mlp = MLP(config)

    def forward(self, x_BTD: Tensor, table: tuple[Tensor, ...], mask: Tensor | None = None, cache=None):
        """table and mask: those of `Attention`."""
        y_BTD = self.attn(self.attn_norm(x_BTD), table, mask, cache)
        y_BTD, x_BTD = self.mlp_norm(y_BTD, x_BTD, self.residual)
        y_BTD = self.mlp(y_BTD)
        return x_BTD + (y_BTD if self.residual == 1 else y_BTD * self.residual)


class Decoder(nn.Module):
    """Token ids to logits, or with labels to losses. Built on whatever device is the default (usually meta)."""

    def __init__(self, config: ModelConfig, multipliers: Multipliers):
        super().__init__()
        self.config, self.multipliers = config, multipliers
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.blocks = nn.ModuleList(Block(config, multipliers) for _ in range(config.n_layers))
        self.norm = Norm(config)
        self.head = None if config.tie_embeddings else Linear(config.d_model, config.vocab_size, bias=False)

    @property
    def head_weight(self) -> Tensor:
        """[V, D]; the embedding itself when tied."""
        return self.embed.weight if self.head is None else self.head.weight

    def embedded(self, ids_BT: Tensor, weight_VD: Tensor | None = None) -> Tensor:
        """Token embeddings times their multiplier; weight_VD: rows to look up in instead of its own."""
        x_BTD = self.embed(ids_BT) if weight_VD is None else F.embedding(ids_BT, weight_VD)
        return x_BTD if self.multipliers.embedding == 1 else x_BTD * self.multipliers.embedding

    def table(self, start: int, length: int, device: torch.device) -> tuple[Tensor, Tensor]:
        """Rotary cos and sin for positions start … start+length-1, fp32 [T, P]."""
        positions = torch.arange(start, start + length, device=device)
        return rope_table(positions, self.config.rotary_dim, self.config.rotary_base)

    def hidden(self, ids_BT: Tensor, documents_BT: Tensor | None = None, cache=None) -> Tensor:
        """Final normalised states x_BTD. documents_BT numbers each token's document (used by `document_mask`)."""
        start = 0 if cache is None else cache.length
        table = self.table(start, ids_BT.shape[1], ids_BT.device)
        mask = self.mask(documents_BT) if cache is None else cache.mask(ids_BT.shape[1], ids_BT.device)
        x_BTD = self.embedded(ids_BT)
        for i, block in enumerate(self.blocks):
            x_BTD = block(x_BTD, table, mask, None if cache is None else cache.layers[i])
        return self.norm(x_BTD)

    def mask(self, documents_BT: Tensor | None) -> Tensor | None:
        """What keeps documents from seeing each other, or None for plain causal: they do, as published.

        `document_bounds` where it is eager torch that asks; to compilers and other devices a mask [B, T, T]."""
        if documents_BT is None or not self.config.document_mask:
            return None
        if documents_BT.device.type in ("cpu", "cuda") and not torch.compiler.is_compiling():
            return document_bounds(documents_BT)
        same_BTS = documents_BT[:, :, None] == documents_BT[:, None, :]
        return same_BTS.tril()

    def forward(self, ids_BT: Tensor, documents_BT: Tensor | None = None, cache=None) -> Tensor:
        """Logits [B, T, V] in the weights' dtype, muP's logit multiplier applied."""
        x_BTD = self.hidden(ids_BT, documents_BT, cache)
        logits_BTV = linear(x_BTD, self.embed.weight) if self.head is None else self.head(x_BTD)
        return logits_BTV * self.multipliers.logits

    def loss(self, ids_BT, labels_BT, weights_BT, documents_BT=None) -> tuple[Tensor, Tensor]:
        """Weighted sum of the tokens' cross-entropies and each token's own, fp32 nats: (scalar, [B, T])."""
        return self.score(self.hidden(ids_BT, documents_BT), self.head_weight, labels_BT, weights_BT)

    def score(self, x_BTD: Tensor, weight_VD: Tensor, labels_BT: Tensor, weights_BT: Tensor) -> tuple[Tensor, Tensor]:
        """`loss` from the final states on, with the given head weight."""
        loss, nll_N = linear_cross_entropy(
            x_BTD.flatten(0, 1), weight_VD, labels_BT.flatten(), weights_BT.flatten(), self.multipliers.logits
        )
        return loss, nll_N.view_as(labels_BT)
