"""transformers' Gemma 2 and Qwen 3: soft-capped scores, sqrt(d) embeddings, (1 + weight) gains; RMS QK-norm.

Gemma multiplies its tied embedding by sqrt(hidden_size). That's right by Table 9 though the tensor is tied: drawn and
trained with m^-1/2, it's used with m^1/2 at the input and, once the head divides by sqrt(m), with m^-1/2 at the output.
The form "table8" takes the multiplier away (embed_scale = 1); `embed_scale` is a buffer, made by a constructor of a
Python float, so on meta its value can only be had from `scalar_embed_scale`. Scores go with query_pre_attn_scalar
** -1/2, whose right value therefore goes with d_head ** 2.
"""

from torch import nn
from transformers import Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from .forms import (
    AUDIT,
    BOTH,
    Role,
    Scaled,
    coded,
    families,
    forgotten,
    gain,
    hf_loss,
    hidden_init,
    hidden_lr,
    output_mult,
    readout,
    tokens,
    vector_lr,
    wrong_decay,
    wrong_eps,
)

GEMMA_ROLES = {
    "model.embed_tokens.weight": Role("input", 0.03),
    "*norm.weight": Role("vector", start="zeros"),
    "*.weight": Role("hidden"),
}
PLAIN_ROLES = GEMMA_ROLES | {"model.embed_tokens.weight": Role("input", 0.2)}
QWEN_ROLES = {
    "model.embed_tokens.weight": Role("input"),
    "lm_head.weight": Role("output"),
    "*norm.weight": gain(),
    "*.weight": Role("hidden"),
}
SMALL = {
    "vocab_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 32,
    "pad_token_id": None,
    "bos_token_id": None,
    "eos_token_id": None,
}


def gemma(width: int, form: str, code: str) -> nn.Module:
    """Make a Gemma 2 of one sliding and one full layer."""
    m, d_head = width / 64, width // 4
    config = Gemma2Config(
        hidden_size=width,
        intermediate_size=2 * width,
        head_dim=d_head,
        query_pre_attn_scalar=d_head if code == "scores" else d_head**2 // 16,
        sliding_window=6,
        tie_word_embeddings=True,
        attn_logit_softcapping=20.0,
        final_logit_softcapping=30.0,
        attn_implementation="eager",
        **SMALL,
    )
    model = Gemma2ForCausalLM(config)
    table = model.model.embed_tokens
    if form.startswith("table8") and code != "embedding":
        model.model.embed_tokens = nn.Embedding(50, width)
    model.lm_head = Scaled(width, 50, bias=False, mult=output_mult(form, m, code))
    model.lm_head.weight = model.model.embed_tokens.weight
    if code == "scores 0":
        model.model.layers[0].self_attn.scaling = 4.0**-1 * m**-0.5
    assert table.scalar_embed_scale == width**0.5
    return model


def qwen(width: int, form: str, code: str) -> nn.Module:
    """Make a Qwen 3 with normed queries and keys."""
    m, d_head = width / 64, width // 4
    config = Qwen3Config(
        hidden_size=width,
        intermediate_size=3 * width,
        head_dim=d_head,
        tie_word_embeddings=False,
        **SMALL,
    )
    model = Qwen3ForCausalLM(config)
    for layer in model.model.layers:
        if code != "scores":
            layer.self_attn.scaling = 2.0 / d_head
    if not form.startswith("table3"):
        model.lm_head = Scaled(width, 50, bias=False, mult=output_mult(form, m, code))
    return model


GEMMA = (
    coded("soft-capped scores by 1/sqrt(d_head)", "self_attn", "scores"),
    coded("scores of the sliding layer by 1/sqrt(d_head)", "layers.0.self_attn", "scores 0"),
    coded("embedding is multiplied by sqrt(hidden_size)", "embed_tokens", "embedding", AUDIT, ("table8",)),
    hidden_lr("*_proj.weight", tensor="proj"),
    hidden_lr("*.0.self_attn.v_proj.weight", tensor="layers.0.self_attn.v_proj"),
    hidden_init("*.1.mlp.gate_proj.weight", "layers.1.mlp.gate_proj"),
    vector_lr("*.pre_feedforward_layernorm.weight", "pre_feedforward_layernorm"),
    *readout("embed_tokens", ""),
)
QWEN = (
    coded("normed queries and keys by 1/sqrt(d_head)", "self_attn", "scores"),
    hidden_lr("*_proj.weight", tensor="proj"),
    hidden_init("*.down_proj.weight", "down_proj"),
    vector_lr("*.q_norm.weight", "q_norm"),
    vector_lr("*.embed_tokens.weight", "embed_tokens", by=BOTH),
    forgotten("*.0.self_attn.k_norm.weight", "layers.0.self_attn.k_norm"),
    wrong_decay("*.embed_tokens.weight", "embed_tokens"),
    wrong_eps(),
    *readout("lm_head", "lm_head.weight"),
)
FAMILIES = [
    *families("gemma2", gemma, GEMMA_ROLES, hf_loss, tokens, ("table9 tied",), GEMMA, lr=2.0**-8),
    *families("gemma2", gemma, PLAIN_ROLES, hf_loss, tokens, ("table8 tied",), GEMMA),
    *families("qwen3", qwen, QWEN_ROLES, hf_loss, tokens, ("table3", "table8"), QWEN),
]
