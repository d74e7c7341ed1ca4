"""Weights as JAX writers have them: raw Parameters of three dimensions, contracted by einsum, fan_in first.

wo's fan_in is its two first dimensions. By Table 9 heads of 16 coordinates grow in number, the scores' scale is a
constant and the gains of heads are vectors. By Tables 8 and 3 there are 4 heads of growing size, so no dimension of
those gains grows. The output is a tuple of a dict and a number; the embedding is looked up by take_along_dim.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import (
    Role,
    abc,
    coded,
    families,
    forgotten,
    hidden_init,
    hidden_lr,
    next_token,
    output_mult,
    readout,
    tokens,
    vector_lr,
    wrong_decay,
)


class Layer(nn.Module):
    """Attention and a gated MLP by einsum."""

    def __init__(self, d: int, h: int, k: int, scale: float) -> None:
        super().__init__()
        self.ln = nn.Parameter(torch.ones(2, d))
        self.wq, self.wk, self.wv = (nn.Parameter(torch.empty(d, h, k)) for _ in range(3))
        self.wo = nn.Parameter(torch.empty(h, k, d))
        self.head_gain = nn.Parameter(torch.ones(h))
        self.wi = nn.Parameter(torch.empty(2, d, 2 * d))
        self.wf = nn.Parameter(torch.empty(2 * d, d))
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        """Attend, then the MLP."""
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.ln[0]
        q = torch.einsum("btd,dhk->bthk", y, self.wq)
        k = torch.einsum("btd,dhk->bthk", y, self.wk)
        v = torch.einsum("btd,dhk->bthk", y, self.wv)
        scores = torch.einsum("bthk,bshk->bhts", q * self.scale, k)
        t = x.shape[1]
        scores = torch.where(torch.ones(t, t, dtype=torch.bool, device=x.device).tril(), scores, -1e30)
        out = torch.einsum("bhts,bshk->bthk", scores.softmax(-1), v) * self.head_gain[:, None]
        x = x + torch.einsum("bthk,hkd->btd", out, self.wo)
        y = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6) * self.ln[1]
        gate, up = torch.einsum("btd,gdf->gbtf", y, self.wi)
        return x + torch.einsum("btf,fd->btd", F.silu(gate) * up, self.wf)


class Model(nn.Module):
    """Two layers in a ModuleDict."""

    def __init__(self, d: int, h: int, scale: float, input_mult: float, output_mult: float) -> None:
        super().__init__()
        self.params = nn.ParameterDict({"embed": torch.empty(50, d), "unembed": torch.empty(d, 50)})
        self.layers = nn.ModuleDict({f"layer_{i}": Layer(d, h, d // h, scale) for i in range(2)})
        self.input_mult, self.output_mult = input_mult, output_mult

    def forward(self, inputs: dict[str, Tensor]) -> tuple[dict[str, Tensor], int]:
        """Return logits in a dict, and the number of tokens."""
        ids = inputs["ids"]
        x = torch.take_along_dim(self.params["embed"], ids.reshape(-1, 1), 0).view(*ids.shape, -1)
        x = x * self.input_mult
        for layer in self.layers.values():
            x = layer(x)
        x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + 1e-6)
        return {"logits": torch.einsum("btd,dv->btv", x, self.params["unembed"]) * self.output_mult}, ids.numel()


ROLES = {
    "params.embed": Role("input"),
    "params.unembed": Role("output"),
    "*.ln": Role("vector", start="ones"),
    "*.w?": Role("hidden", start="trunc"),
}
GROWING = ROLES | {"*.head_gain": Role("fixed", start="ones")}
NUMEROUS = ROLES | {"*.head_gain": Role("vector", start="ones")}


def build(width: int, form: str, code: str) -> nn.Module:
    """Make a model whose heads grow in size, or in number."""
    m, many = width / 64, "many" in form
    scale = 0.25 if many else 4.0 / (width // 4)
    if code == "scores":
        scale *= m**0.5
    mult = abc(form, "input", m)[0] * (m**0.5 if code == "embedding" else 1.0)
    return Model(width, width // 16 if many else 4, scale, mult, output_mult(form, m, code))


def batch(seed: int) -> dict[str, Tensor]:
    """Return a dict of ids."""
    return {"ids": tokens(seed)}


def loss(model: nn.Module, inputs: dict[str, Tensor]) -> Tensor:
    """Return the next tokens' cross-entropy."""
    return next_token(model(inputs)[0]["logits"], inputs["ids"])


FAULTS = (
    coded("scores off by sqrt(m)", "layer", "scores"),
    coded("embedding is multiplied by sqrt(m)", "embed", "embedding"),
    hidden_lr("*.w?", tensor="layer"),
    hidden_lr("*.layer_0.wo", tensor="layer_0.wo"),
    hidden_init("*.layer_1.wi", "layer_1.wi"),
    hidden_init("*.layer_0.wo", "layer_0.wo", -0.5),
    vector_lr("*.ln", "ln"),
    vector_lr("*.head_gain", "head_gain"),
    forgotten("*.layer_1.wk", "layer_1.wk"),
    wrong_decay("params.embed", "params.embed"),
    *readout("unembed", "params.unembed"),
)
FAMILIES = [
    *families("einsum", build, GROWING, loss, batch, ("table8 big heads", "table3 big heads"), FAULTS),
    *families("einsum", build, NUMEROUS, loss, batch, ("table9 many heads",), FAULTS, decay="independent"),
]
