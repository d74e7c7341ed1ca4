"""transformers' T5: encoder-decoder, unscaled scores, a relative position bias by head, a tied table.

T5 divides by sqrt(d_model) before its tied head (`scale_decoder_outputs`). So with the embedding multiplied by
sqrt(m), and its sigma and lr divided by it, T5 is right by Table 9 as it stands; here heads of 16 coordinates grow in
number, scores keep T5's scale of 1, and relative_attention_bias is finite -> infinite. By Table 8 the head divides by
m itself, heads are 4 at any width, scores go with 1/d_kv and no dimension of relative_attention_bias grows.
"""

import torch
from torch import Tensor, nn
from transformers import T5Config, T5ForConditionalGeneration

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
    hidden_init,
    hidden_lr,
    output_mult,
    readout,
    vector_lr,
    wrong_decay,
)

COMMON = {
    "shared.weight": Role("input"),
    "*norm.weight": gain(),
    "*.q.weight": Role("hidden", 0.06),
    "*.k.weight": Role("hidden", 0.06),
    "*.weight": Role("hidden"),
}
GROWING = {"*.relative_attention_bias.weight": Role("wide")} | COMMON
CONSTANT = {"*.relative_attention_bias.weight": Role("fixed")} | COMMON


def build(width: int, form: str, code: str) -> nn.Module:
    """Make T5 by the form."""
    m, nine = width / 64, form.startswith("table9")
    config = T5Config(
        vocab_size=50,
        d_model=width,
        d_kv=16 if nine else width // 4,
        d_ff=2 * width,
        num_layers=2,
        num_heads=width // 16 if nine else 4,
        relative_attention_num_buckets=8,
        relative_attention_max_distance=16,
        dropout_rate=0.0,
        feed_forward_proj="relu" if nine else "gated-gelu",
        pad_token_id=0,
        eos_token_id=None,
        decoder_start_token_id=0,
    )
    model = T5ForConditionalGeneration(config)
    if nine:
        mult = {"embedding once": 1.0}.get(code, abc(form, "input", m)[0])
        model.set_input_embeddings(ScaledEmbedding(50, width, mult=mult))
        model.lm_head.weight = model.shared.weight
        model.config.scale_decoder_outputs = code != "readout"
        return model
    model.config.scale_decoder_outputs = False
    model.lm_head = Scaled(width, 50, bias=False, mult=output_mult(form, m, code))
    model.lm_head.weight = model.shared.weight
    for name, module in model.named_modules():
        if name.endswith("Attention"):
            cross = code == "cross" and name.endswith("EncDecAttention")
            module.scaling = m**-0.5 if code == "scores" or cross else 1 / m
    return model


def batch(seed: int) -> dict[str, Tensor]:
    """Return source and target."""
    generator = torch.Generator().manual_seed(seed)
    source = torch.randint(1, 50, (4, 12), generator=generator)
    return {"input_ids": source, "labels": torch.randint(1, 50, (4, 9), generator=generator)}


def loss(model: nn.Module, pair: dict[str, Tensor]) -> Tensor:
    """Return T5's own loss."""
    return model(**pair).loss


FAULTS = (
    hidden_lr("*Attention.?.weight", "*.wo.weight", "*.wi*.weight", tensor="Attention"),
    hidden_lr("decoder.*.EncDecAttention.o.weight", tensor="EncDecAttention.o"),
    hidden_init("encoder.block.1.*.wo.weight", "encoder.block.1.layer.1.DenseReluDense.wo"),
    vector_lr("decoder.final_layer_norm.weight", "decoder.final_layer_norm"),
    vector_lr("*.relative_attention_bias.weight", "relative_attention_bias"),
    forgotten("encoder.*.relative_attention_bias.weight", "encoder.block.0"),
    vector_lr("shared.weight", "shared", by=BOTH),
    wrong_decay("shared.weight", "shared"),
)
NINE = (
    *FAULTS,
    coded("embedding's multiplier is missing", "shared", "embedding once", AUDIT),
    coded("T5's division by sqrt(d_model) is missing", "shared", "readout", AUDIT),
)
EIGHT = (
    *FAULTS,
    *readout("shared", ""),
    coded("scores by 1/sqrt(d_kv)", "Attention", "scores"),
    coded("scores of cross-attention by 1/sqrt(d_kv)", "EncDecAttention", "cross"),
    Fault(
        "relative position bias starts with a sigma that goes with m",
        "relative_attention_bias",
        AUDIT,
        init={"*.relative_attention_bias.weight": 0.5},
    ),
)
FAMILIES = [
    *families("t5", build, GROWING, loss, batch, ("table9 tied",), NINE),
    *families("t5", build, CONSTANT, loss, batch, ("table8 tied",), EIGHT),
]
