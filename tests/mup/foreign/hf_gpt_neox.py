"""transformers' GPT-NeoX and StableLM: parallel residuals, partial rotary, fused qkv by head; QK-LayerNorm by head.

StableLM's `qk_layernorm` gives every head a LayerNorm of its own, so that queries and keys have coordinates of size 1
and scores go with 1/d_head still.
"""

from torch import nn
from transformers import GPTNeoXConfig, GPTNeoXForCausalLM, StableLmConfig, StableLmForCausalLM

from .forms import (
    AUDIT,
    BOTH,
    Fault,
    Role,
    Scaled,
    ScaledEmbedding,
    abc,
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
    wrong_eps,
)

NEOX_ROLES = {
    "gpt_neox.embed_in.weight": Role("input"),
    "lm_head.weight": Role("output"),
    "*layer_?orm.weight": gain(),
    "*layernorm.weight": gain(),
    "*.bias": bias(),
    "*.weight": Role("hidden"),
}
STABLELM_ROLES = {
    "model.embed_tokens.weight": Role("input"),
    "lm_head.weight": Role("output", start="zeros"),
    "*norm*.weight": gain(),
    "*.bias": bias(),
    "*.weight": Role("hidden", 0.1),
}
SMALL = {
    "vocab_size": 50,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "max_position_embeddings": 32,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": None,
}


def neox(width: int, form: str, code: str) -> nn.Module:
    """Make GPT-NeoX by the form; "sequential" has no parallel residual."""
    m = width / 64
    parallel = "sequential" not in form
    config = GPTNeoXConfig(
        hidden_size=width, intermediate_size=4 * width, use_parallel_residual=parallel, rotary_pct=0.5, **SMALL
    )
    model = GPTNeoXForCausalLM(config)
    for i, layer in enumerate(model.gpt_neox.layers):
        if not (code == "scores" or (code == "scores 0" and i == 0)):
            layer.attention.scaling = 4.0 / layer.attention.head_size
    if not form.startswith("table3"):
        model.lm_head = Scaled(width, 50, bias=False, mult=output_mult(form, m, code))
    return model


def stablelm(width: int, form: str, code: str) -> nn.Module:
    """Make StableLM with normed queries and keys."""
    m = width / 64
    config = StableLmConfig(
        hidden_size=width,
        intermediate_size=2 * width,
        num_key_value_heads=2,
        qk_layernorm=True,
        use_qkv_bias=True,
        pad_token_id=None,
        **SMALL,
    )
    model = StableLmForCausalLM(config)
    for layer in model.model.layers:
        if code != "scores":
            layer.self_attn.scaling = 2.0 / layer.self_attn.head_dim
    if form.startswith("table9"):
        mult = abc(form, "input", m)[0] * (m**0.5 if code == "embedding" else 1.0)
        model.model.embed_tokens = ScaledEmbedding(50, width, mult=mult)
        model.lm_head = Scaled(width, 50, bias=False, mult=output_mult(form, m, code))
    return model


NEOX = (
    coded("scores by 1/sqrt(d_head)", "attention", "scores"),
    coded("scores of the first layer by 1/sqrt(d_head)", "layers.0.attention", "scores 0"),
    hidden_lr("*.query_key_value.weight", "*.dense*.weight", tensor="dense"),
    hidden_lr("*.layers.1.attention.query_key_value.weight", tensor="layers.1.attention.query_key_value.weight"),
    hidden_init("*.layers.0.attention.dense.weight", "layers.0.attention.dense"),
    vector_lr("*.query_key_value.bias", "query_key_value.bias"),
    vector_lr("*.embed_in.weight", "embed_in", by=BOTH),
    vector_lr("*.final_layer_norm.weight", "final_layer_norm.weight"),
    wrong_decay("*.embed_in.weight", "embed_in"),
    *readout("lm_head", "lm_head.weight"),
)
STABLELM = (
    coded("normed queries and keys by 1/sqrt(d_head)", "self_attn", "scores"),
    coded("embedding's multiplier grows as m", "embed_tokens", "embedding", AUDIT, ("table9",)),
    hidden_lr("*_proj.weight", tensor="proj"),
    hidden_lr("lm_head.weight", tensor="lm_head"),
    vector_lr("*.q_layernorm.norms.?.weight", "q_layernorm"),
    vector_lr("*.v_proj.bias", "v_proj.bias"),
    hidden_init("*.0.mlp.up_proj.weight", "layers.0.mlp.up_proj"),
    forgotten("*.1.mlp.down_proj.weight", "layers.1.mlp.down_proj"),
    Fault("weight decay is multiplied by m**2", "proj", AUDIT, decay={"*_proj.weight": 1.0}),
    wrong_eps(),
)
FAMILIES = [
    *families("gpt-neox", neox, NEOX_ROLES, hf_loss, tokens, ("table3", "table8 sequential"), NEOX),
    *families(
        "stablelm qk", stablelm, STABLELM_ROLES, hf_loss, tokens, ("table3", "table9"), STABLELM, decay="independent"
    ),
]
