"""torch's own nn.TransformerEncoder: fused in_proj_weight, in_proj_bias and out_proj within nn.MultiheadAttention.

MultiheadAttention divides scores by sqrt(d_head) and can't be told otherwise, so heads of a constant size grow in
number (any constant scale is right then). Faults let d_head grow. A second model calls nn.MultiheadAttention itself,
batch first and without biases, with queries that come divided by sqrt(d_head) already: 1/d_head in all, right with
a growing d_head.
"""

import torch
from torch import Tensor, nn

from .forms import (
    AUDIT,
    BOTH,
    Fault,
    Role,
    Scaled,
    abc,
    bias,
    coded,
    families,
    forgotten,
    gain,
    hidden_init,
    hidden_lr,
    next_token,
    output_mult,
    readout,
    tokens,
    vector_lr,
    wrong_decay,
)


class Encoder(nn.Module):
    """PyTorch's word-language-model tutorial: an encoder with a causal mask."""

    def __init__(self, width: int, heads: int, input_mult: float, output_mult: float, norm_first: bool) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.position = nn.Parameter(torch.zeros(32, 1, width))
        layer = nn.TransformerEncoderLayer(width, heads, 2 * width, dropout=0.0, norm_first=norm_first)
        self.encoder = nn.TransformerEncoder(layer, 2, norm=nn.LayerNorm(width), enable_nested_tensor=False)
        self.decoder = Scaled(width, 50, mult=output_mult)
        self.input_mult = input_mult

    def forward(self, ids: Tensor) -> Tensor:
        """Return logits; the encoder takes time first."""
        time = ids.shape[1]
        x = (self.embedding(ids.T) + self.position[:time]) * self.input_mult
        mask = nn.Transformer.generate_square_subsequent_mask(time, device=ids.device)
        return self.decoder(self.encoder(x, mask=mask, is_causal=True)).transpose(0, 1)


class Attending(nn.Module):
    """One layer of nn.MultiheadAttention with its queries scaled, and a gated MLP."""

    def __init__(self, width: int, query_mult: float, output_mult: float) -> None:
        super().__init__()
        self.embedding = nn.Embedding(50, width)
        self.norms = nn.ModuleList([nn.RMSNorm(width) for _ in range(3)])
        self.attention = nn.MultiheadAttention(width, 4, bias=False, batch_first=True)
        self.up, self.down = nn.Linear(width, 4 * width, bias=False), nn.Linear(2 * width, width, bias=False)
        self.head = nn.Linear(width, 50, bias=False)
        self.query_mult, self.output_mult = query_mult, output_mult

    def forward(self, ids: Tensor) -> dict[str, Tensor]:
        """Return logits in a dict."""
        x = self.embedding(ids)
        mask = torch.ones(ids.shape[1], ids.shape[1], dtype=torch.bool, device=ids.device).triu(1)
        h = self.norms[0](x)
        x = x + self.attention(h * self.query_mult, h, h, attn_mask=mask, need_weights=False)[0]
        x = x + self.down(nn.functional.glu(self.up(self.norms[1](x))))
        return {"logits": self.output_mult * self.head(self.norms[2](x))}


ROLES = {
    "embedding.weight": Role("input"),
    "position": Role("input", 0.05),
    "*norm*.weight": gain(),
    "*.in_proj_weight": Role("hidden"),
    "*.in_proj_bias": bias(),
    "decoder.weight": Role("output"),
    "head.weight": Role("output"),
    "decoder.bias": Role("fixed", 0.1),
    "*.bias": bias(),
    "*.weight": Role("hidden"),
}


def encoder(width: int, form: str, code: str) -> nn.Module:
    """Make the tutorial's model with heads of 16 coordinates."""
    m = width / 64
    heads = 4 if code == "heads" else width // 16
    input_mult = abc(form, "input", m)[0] * (m**0.5 if code == "embedding" else 1)
    return Encoder(width, heads, input_mult, output_mult(form, m, code), norm_first="pre" in form)


def attending(width: int, form: str, code: str) -> nn.Module:
    """Make the model with scaled queries, 4 heads at any width."""
    m = width / 64
    return Attending(width, 1.0 if code == "scores" else m**-0.5, output_mult(form, m, code))


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the next tokens' cross-entropy."""
    out = model(ids)
    return next_token(out["logits"] if isinstance(out, dict) else out, ids)


FAULTS = (
    coded("heads don't grow in number, so d_head does, at 1/sqrt(d_head)", "self_attn", "heads"),
    # after post-norm's first LayerNorm an embedding's scale is gone, so this is a fault before pre-norm only
    coded("embedding is multiplied by sqrt(d_model)", "embedding", "embedding", forms=("table8", "table9")),
    hidden_lr("*.in_proj_weight", "*.out_proj.weight", "*.linear?.weight", tensor="layers"),
    hidden_init("*.1.linear1.weight", "layers.1.linear1"),
    vector_lr("*.in_proj_bias", "in_proj_bias"),
    vector_lr("position", "position"),
    vector_lr("decoder.bias", "decoder.bias"),
    forgotten("position", "position"),
    Fault("decoder.bias starts with a sigma that goes with m", "decoder.bias", AUDIT, init={"decoder.bias": 1.0}),
    *readout("decoder", "decoder.weight"),
)
ATTENDING = (
    coded("scores by 1/sqrt(d_head)", "attention", "scores"),
    hidden_lr("attention.in_proj_weight", tensor="attention.in_proj_weight"),
    hidden_lr("down.weight", tensor="down", power=-1.0),
    hidden_init("up.weight", "up"),
    vector_lr("norms.2.weight", "norms.2"),
    wrong_decay("embedding.weight", "embedding"),
    Fault("down's sigma is divided by m", "down", BOTH, init={"down.weight": -0.5}),
    *readout("head", "head.weight"),
)
FAMILIES = [
    *families("torch encoder", encoder, ROLES, loss, tokens, ("table8 pre", "table3 post", "table9 pre"), FAULTS),
    *families("torch attention", attending, ROLES, loss, tokens, ("table8", "table3"), ATTENDING, eps=-1.0),
]
