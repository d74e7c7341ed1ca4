"""transformers' Bloom: ALiBi, scores by `alibi.baddbmm(beta, alpha)`, a LayerNorm on the embedding, a fused qkv.

Tied by Table 8, untied by Table 3. alpha is each layer's `inv_norm_factor`.
"""

from torch import nn
from transformers import BloomConfig, BloomForCausalLM

from .forms import (
    BOTH,
    Fault,
    Role,
    Scaled,
    bias,
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
)

ROLES = {
    "transformer.word_embeddings.weight": Role("input"),
    "lm_head.weight": Role("output"),
    "*layernorm.weight": gain(),
    "*.ln_f.weight": gain(),
    "*.bias": bias(),
    "*.weight": Role("hidden"),
}


def build(width: int, form: str, code: str) -> nn.Module:
    """Make Bloom by the form, alpha = 4/d_head."""
    tied = "tied" in form
    config = BloomConfig(
        vocab_size=50, hidden_size=width, n_layer=2, n_head=4, tie_word_embeddings=tied, bos_token_id=1, eos_token_id=2
    )
    model = BloomForCausalLM(config)
    for i, block in enumerate(model.transformer.h):
        if not (code == "scores" or (code == "scores 1" and i == 1)):
            block.self_attention.inv_norm_factor = 4.0 / block.self_attention.head_dim
    if tied:
        model.lm_head = Scaled(width, 50, bias=False, mult=output_mult(form, width / 64, code))
        model.lm_head.weight = model.transformer.word_embeddings.weight
    return model


FAULTS = (
    coded("alpha is 1/sqrt(d_head)", "self_attention", "scores"),
    coded("alpha is 1/sqrt(d_head) in the last layer", "h.1.self_attention", "scores 1"),
    hidden_lr("*.query_key_value.weight", "*.dense*.weight", tensor="dense"),
    hidden_lr("*.h.0.self_attention.dense.weight", tensor="h.0.self_attention.dense.weight", power=-1.0),
    hidden_init("*.dense_4h_to_h.weight", "dense_4h_to_h"),
    vector_lr("*.word_embeddings_layernorm.weight", "word_embeddings_layernorm.weight"),
    vector_lr("*.dense_h_to_4h.bias", "dense_h_to_4h.bias"),
    forgotten("*.h.1.mlp.dense_h_to_4h.weight", "h.1.mlp.dense_h_to_4h"),
    wrong_decay("*.word_embeddings.weight", "word_embeddings"),
)
TIED = (*FAULTS, *readout("word_embeddings", ""))
UNTIED = (
    *FAULTS,
    *readout("lm_head", "lm_head.weight"),
    Fault("embedding's lr grows with m", "word_embeddings", BOTH, lr={"*.word_embeddings.weight": 1.0}),
)
FAMILIES = [
    *families("bloom", build, ROLES, hf_loss, tokens, ("table8 tied",), TIED),
    *families("bloom", build, ROLES, hf_loss, tokens, ("table3",), UNTIED, eps=-1.0),
]
