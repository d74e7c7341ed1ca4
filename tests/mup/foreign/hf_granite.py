"""transformers' Granite, whose config has muP's multipliers as fields: embedding, attention, residual and logits.

Tied by Table 8 (logits_scaling = m, a constant embedding_multiplier), and untied by Table 9, where the embedding's
multiplier grows with sqrt(m) and its sigma and lr make up for it.
"""

from torch import nn
from transformers import GraniteConfig, GraniteForCausalLM

from .forms import (
    AUDIT,
    BOTH,
    Role,
    abc,
    coded,
    families,
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

ROLES = {
    "model.embed_tokens.weight": Role("input", 0.1),
    "*norm.weight": gain(),
    "lm_head.weight": Role("output", 0.1),
    "*_proj.weight": Role("hidden", 0.1),
}


def build(width: int, form: str, code: str) -> nn.Module:
    """Make a Granite whose config holds the form's multipliers."""
    m, heads = width / 64, 4
    embedding = {"embedding sqrt": m**0.5, "embedding once": 1.0}.get(code, abc(form, "input", m)[0])
    scores = {"scores": (width / heads) ** -0.5, "scores constant": 0.25}.get(code, 4 / (width / heads))
    return GraniteForCausalLM(
        GraniteConfig(
            vocab_size=50,
            hidden_size=width,
            intermediate_size=2 * width,
            num_hidden_layers=2,
            num_attention_heads=heads,
            num_key_value_heads=heads,
            max_position_embeddings=32,
            tie_word_embeddings="tied" in form,
            embedding_multiplier=3.0 * embedding,
            attention_multiplier=scores,
            residual_multiplier={"residual": 0.5 * m**0.5}.get(code, 0.5),
            logits_scaling=0.5 / output_mult(form, m, code),
            bos_token_id=None,
            eos_token_id=None,
        )
    )


FAULTS = (
    coded("attention_multiplier is 1/sqrt(d_head)", "self_attn", "scores"),
    coded("attention_multiplier is a constant", "self_attn", "scores constant"),
    hidden_lr("*_proj.weight", tensor="proj"),
    hidden_init("*.mlp.up_proj.weight", "mlp.up_proj"),
    vector_lr("model.norm.weight", "model.norm"),
    wrong_eps(),
)
TIED = (
    *FAULTS,
    *readout("embed_tokens", ""),
    coded("embedding_multiplier grows as sqrt(m)", "embed_tokens", "embedding sqrt"),
    coded("residual_multiplier grows as sqrt(m)", "proj", "residual", BOTH),
    vector_lr("*.embed_tokens.weight", "embed_tokens", by=BOTH),
)
UNTIED = (
    *FAULTS,
    *readout("lm_head", "lm_head.weight"),
    coded("embedding_multiplier is missing in Table 9", "embed_tokens", "embedding once", AUDIT),
    wrong_decay("*.q_proj.weight", "q_proj", -2.0),
)
FAMILIES = [
    *families("granite", build, ROLES, hf_loss, tokens, ("table8 tied multipliers",), TIED),
    *families("granite", build, ROLES, hf_loss, tokens, ("table9 multipliers",), UNTIED, decay="independent"),
]
