"""FLOPs of a decoder, a token: the one formula that MFU, dry runs, plans and sweeps count with."""

from __future__ import annotations

from typing import Literal

from crystal.zoo.build import parameter_count
from crystal.zoo.config import ModelConfig

Recompute = Literal["none", "attention", "block"]


def flops_per_token(config: ModelConfig, seq_len: int) -> int:
    """6 x parameters that multiply (all but an untied input embedding) + 6 L d T for causal attention scores."""
    embedding = 0 if config.tie_embeddings else config.vocab_size * config.d_model
    return 6 * (parameter_count(config) - embedding) + 6 * config.n_layers * config.d_model * seq_len


def recomputed_flops_per_token(config: ModelConfig, seq_len: int, recompute: Recompute) -> int:
    """FLOPs a token of one block that are done a second time."""
    if recompute == "none":
        return 0
    d, kv = config.d_model, config.kv_heads * config.d_head
    attention = 2 * d * (d + 2 * kv) + 2 * d * seq_len  # q, k, v and causal scores; the forward pass alone
    rest = 2 * d * d + 2 * 3 * d * config.d_ff if recompute == "block" else 0
    return attention + rest
