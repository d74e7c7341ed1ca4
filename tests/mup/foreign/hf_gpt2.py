"""transformers' GPT-2: Conv1D weights (fan_in first), a fused c_attn, learned positions; untied and tied.

Untied it goes by Table 3, which needs no multiplier at all, and by Table 8 with a readout that divides its input.
Tied it goes by Table 8, the head's division once before it and once after it; here scores are made by baddbmm
(`reorder_and_upcast_attn`). Four heads at any width, so scores go with 1/d_head.
"""

import torch
from torch import Tensor, nn
from transformers import GPT2Config, GPT2LMHeadModel

from .forms import (
    AUDIT,
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
    wrong_eps,
)

ROLES = {
    "transformer.wte.weight": Role("input"),
    "transformer.wpe.weight": Role("input", 0.05),
    "*.ln_?.weight": gain(),
    "*.ln_f.weight": gain(),
    "*.bias": bias(),
    "*.c_attn.weight": Role("hidden"),
    "*.c_fc.weight": Role("hidden"),
    "*.c_proj.weight": Role("hidden", 0.08),
    "lm_head.weight": Role("output"),
}


class After(nn.Linear):
    """A head that divides what it gives."""

    mult = 1.0

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled logits."""
        return super().forward(x) * self.mult


def build(width: int, form: str, code: str) -> nn.Module:
    """Make GPT-2 of four heads, its scores by 1/d_head and its head by the form."""
    tied, m = "tied" in form, width / 64
    config = GPT2Config(
        vocab_size=50,
        n_positions=32,
        n_embd=width,
        n_layer=2,
        n_head=4,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        tie_word_embeddings=tied,
        reorder_and_upcast_attn=tied,
        bos_token_id=None,
        eos_token_id=None,
        attn_implementation="eager" if tied else "sdpa",
    )
    model = GPT2LMHeadModel(config)
    for layer, block in enumerate(model.transformer.h):
        if not (code == "scores" or (code == "last scores" and layer == 1)):
            block.attn.scaling = 4 / block.attn.head_dim
    if not form.startswith("table3"):
        model.lm_head = (After if "after" in form else Scaled)(width, 50, bias=False)
        model.lm_head.mult = output_mult(form, m, code)
        if tied:
            model.lm_head.weight = model.transformer.wte.weight
    return model


def zero_queries(model: nn.Module) -> None:
    """Start queries at zero, as Tensor Programs V suggests; Conv1D's outputs are its columns."""
    with torch.no_grad():
        for block in model.transformer.h:
            block.attn.c_attn.weight[:, : block.attn.embed_dim].zero_()


FAULTS = (
    coded("scores by 1/sqrt(d_head)", "attn", "scores"),
    coded("scores by 1/sqrt(d_head) in the last layer only", "h.1.attn", "last scores"),
    hidden_lr("*.c_attn.weight", "*.c_fc.weight", "*.c_proj.weight", tensor="c_"),
    hidden_lr("*.h.1.mlp.c_proj.weight", tensor="h.1.mlp.c_proj.weight", power=-1.0),
    hidden_init("*.h.0.mlp.c_fc.weight", "h.0.mlp.c_fc.weight"),
    vector_lr("*.wpe.weight", "wpe.weight"),
)
UNTIED = (*FAULTS, *readout("lm_head", "lm_head.weight"), forgotten("*.h.0.attn.c_attn.bias", "h.0.attn.c_attn.bias"))
TIED = (
    *FAULTS,
    *readout("wte", ""),
    wrong_decay("*.wte.weight", "wte.weight"),
    wrong_eps(),
    Fault(
        "c_attn's sigma isn't divided by sqrt(m), and its queries are zeroed after",
        "c_attn",
        AUDIT,
        init={"*.c_attn.weight": 0.5},
        after=zero_queries,
    ),
)
FAMILIES = [
    *families("gpt2", build, ROLES, hf_loss, tokens, ("table3", "table8 before"), UNTIED, decay="independent"),
    *families("gpt2", build, ROLES, hf_loss, tokens, ("table8 tied before", "table8 tied after"), TIED),
]
