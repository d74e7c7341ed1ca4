"""transformers' Llama: a padded vocabulary whose padding row is zero, d_ff rounded up, and fixed key-value heads.

The d_ff of a Llama is 8/3 d_model rounded up to a multiple of 32, so that down_proj's fan_in isn't quite proportional
to width. The variant with fixed key-value heads grows query heads of 16 coordinates: k_proj and v_proj then are
infinite -> finite, and any constant scale of scores is right.
"""

import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from .forms import (
    AUDIT,
    BOTH,
    Fault,
    Role,
    Scaled,
    ScaledEmbedding,
    abc,
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


def d_ff(width: float) -> int:
    """Return Llama's d_ff, a multiple of 32."""
    return -(-int(8 * width / 3) // 32) * 32


COMMON = {
    "model.embed_tokens.weight": Role("input"),
    "*norm.weight": gain(),
    "lm_head.weight": Role("output"),
    "*.q_proj.weight": Role("hidden"),
    "*.o_proj.weight": Role("hidden"),
    "*.gate_proj.weight": Role("hidden"),
    "*.up_proj.weight": Role("hidden"),
    "*.down_proj.weight": Role("hidden", 0.08, ratio=lambda m: d_ff(64 * m) / d_ff(64)),
}
ROLES = COMMON | {"*.k_proj.weight": Role("hidden"), "*.v_proj.weight": Role("hidden")}
FIXED = COMMON | {"*.k_proj.weight": Role("narrow"), "*.v_proj.weight": Role("narrow")}


def build(width: int, form: str, code: str) -> nn.Module:
    """Make a Llama by the form: four heads at any width, or heads of 16 coordinates with two of keys and values."""
    fixed, m = "fixed" in form, width / 64
    config = LlamaConfig(
        vocab_size=50,
        hidden_size=width,
        intermediate_size=d_ff(width),
        num_hidden_layers=2,
        num_attention_heads=width // 16 if fixed else 4,
        num_key_value_heads=2,
        max_position_embeddings=32,
        pad_token_id=0,
        bos_token_id=None,
        eos_token_id=None,
        tie_word_embeddings=False,
        attn_implementation="eager" if fixed else "sdpa",
    )
    model = LlamaForCausalLM(config)
    for layer in model.model.layers:
        if not fixed and code != "scores":
            layer.self_attn.scaling = 4 / layer.self_attn.head_dim
        if code == "scores grow":
            layer.self_attn.scaling = m * layer.self_attn.head_dim**-0.5
    if form.startswith("table9"):
        mult = {"embedding": 1.0}.get(code, abc(form, "input", m)[0])
        model.set_input_embeddings(ScaledEmbedding(50, width, padding_idx=0, mult=mult))
    if not form.startswith("table3"):
        model.lm_head = Scaled(width, 50, bias=False, mult=output_mult(form, m, code))
    return model


def zero_padding(model: nn.Module) -> None:
    """Zero the padding's row after the draw, as transformers' own initialiser does."""
    table = model.get_input_embeddings()
    with torch.no_grad():
        table.weight[table.padding_idx].zero_()


FAULTS = (
    hidden_lr("*_proj.weight", tensor="proj"),
    hidden_lr("*.0.mlp.gate_proj.weight", tensor="layers.0.mlp.gate_proj", power=-1.0),
    hidden_init("*.down_proj.weight", "down_proj"),
    vector_lr("*.embed_tokens.weight", "embed_tokens", by=BOTH),
    vector_lr("*.input_layernorm.weight", "input_layernorm"),
    forgotten("*.1.self_attn.o_proj.weight", "layers.1.self_attn.o_proj"),
    wrong_decay("*.embed_tokens.weight", "embed_tokens"),
    *readout("lm_head", "lm_head.weight"),
)
GROWING = (
    *FAULTS,
    coded("scores by 1/sqrt(d_head)", "self_attn", "scores"),
    coded("Table 9's embedding without its multiplier", "embed_tokens", "embedding", AUDIT, ("table9",)),
    Fault(
        "embedding's sigma grows as sqrt(m), and its padding row is zero",
        "embed_tokens",
        BOTH,
        init={"*.embed_tokens.weight": 0.5},
    ),
)
CONSTANT = (
    *FAULTS,
    coded("scores grow with m though d_head is constant", "self_attn", "scores grow"),
    hidden_lr("*.k_proj.weight", tensor="k_proj"),
    hidden_init("*.v_proj.weight", "v_proj", by=AUDIT),
    Fault("k_proj's sigma isn't divided by m", "layers.1.self_attn.k_proj", BOTH, init={"*.1.*.k_proj.weight": 1.0}),
)
FAMILIES = [
    *families("llama padded", build, ROLES, hf_loss, tokens, ("table9", "table8"), GROWING, after=zero_padding),
    *families(
        "llama fixed kv",
        build,
        FIXED,
        hf_loss,
        tokens,
        ("table3 fixed", "table8 fixed"),
        CONSTANT,
        after=zero_padding,
        eps=-1.0,
    ),
]
