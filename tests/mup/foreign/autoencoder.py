"""Bottlenecks of a constant size: a variational autoencoder, and a Perceiver whose latents are raw Parameters.

The VAE's mean and log-variance are infinite -> finite, its decoder's first map finite -> infinite: it's two models of
muP in a row, so its outputs (readouts both) go by the form each, and its noise comes with the batch. The Perceiver's
latents are inputs that nothing looks up; they attend to the data by nn.functional's attention with a scale.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import (
    AUDIT,
    BOTH,
    Role,
    Scaled,
    bias,
    coded,
    families,
    forgotten,
    gain,
    hidden_init,
    hidden_lr,
    output_mult,
    readout,
    vector_lr,
)


class VAE(nn.Module):
    """MLPs on either side of 6 numbers."""

    def __init__(self, h: int, output_mult: float, mean_mult: float) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(24, h), nn.Tanh(), nn.Linear(h, h), nn.Tanh())
        self.mu, self.logvar = Scaled(h, 6, mult=mean_mult), Scaled(h, 6, mult=output_mult)
        self.decoder = nn.Sequential(nn.Linear(6, h), nn.Tanh(), nn.Linear(h, h), nn.Tanh())
        self.out = Scaled(h, 24, mult=output_mult)

    def forward(self, x: Tensor, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Return the reconstruction, mean and log-variance."""
        h = self.encoder(x)
        mu, logvar = self.mu(h), self.logvar(h)
        return self.out(self.decoder(mu + torch.exp(0.5 * logvar) * noise)), mu, logvar


class Perceiver(nn.Module):
    """Latents attend to data, then to each other, and are averaged."""

    def __init__(self, d: int, scales: tuple[float, float]) -> None:
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(5, d))
        self.data = nn.Linear(24, d)
        self.norms = nn.ModuleList([nn.LayerNorm(d) for _ in range(5)])
        self.q, self.kv, self.o = nn.Linear(d, d), nn.Linear(d, 2 * d), nn.Linear(d, d)
        self.qkv, self.o2 = nn.Linear(d, 3 * d), nn.Linear(d, d)
        self.mlp = nn.Sequential(nn.Linear(d, 2 * d), nn.GELU(), nn.Linear(2 * d, d))
        self.out = nn.Linear(d, 24)
        self.scales = scales

    def attend(self, q: Tensor, k: Tensor, v: Tensor, scale: float) -> Tensor:
        """Attend by 4 heads."""
        q, k, v = (y.unflatten(-1, (4, -1)).transpose(1, 2) for y in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2).flatten(2)

    def forward(self, x: Tensor) -> Tensor:
        """Return 24 numbers."""
        z, h = self.latents.expand(x.shape[0], -1, -1), self.norms[0](self.data(x))
        z = z + self.o(self.attend(self.q(self.norms[1](z)), *self.kv(h).chunk(2, -1), self.scales[0]))
        z = z + self.o2(self.attend(*self.qkv(self.norms[2](z)).chunk(3, -1), self.scales[1]))
        z = z + self.mlp(self.norms[3](z))
        return self.out(self.norms[4](z).mean(1))


VAE_ROLES = {
    "encoder.0.weight": Role("input", 0.2, start="uniform"),
    "decoder.0.weight": Role("wide", 0.3, start="uniform"),
    "encoder.2.weight": Role("hidden", start="uniform"),
    "decoder.2.weight": Role("hidden", start="uniform"),
    "mu.weight": Role("output"),
    "logvar.weight": Role("output", start="zeros"),
    "out.weight": Role("output"),
    "mu.bias": Role("fixed", start="zeros"),
    "logvar.bias": Role("fixed", start="zeros"),
    "out.bias": Role("fixed", start="zeros"),
    "*.bias": bias(),
}
PERCEIVER_ROLES = {
    "latents": Role("input", 0.2),
    "data.weight": Role("input", 0.2),
    "norms.?.weight": gain(),
    "out.weight": Role("output"),
    "out.bias": Role("fixed", start="zeros"),
    "*.bias": bias(),
    "*.weight": Role("hidden"),
}


def vae(width: int, form: str, code: str) -> nn.Module:
    """Make a VAE by the form."""
    mult = output_mult(form, width / 64, code)
    return VAE(width, mult, 1.0 if code == "mean" else mult)


def perceiver(width: int, form: str, code: str) -> nn.Module:
    """Make a Perceiver by the form."""
    right, wrong = 4.0 / (width // 4), (width // 4) ** -0.5
    scales = (wrong if code in ("cross", "scores") else right, wrong if code == "scores" else right)
    model = Perceiver(width, scales)
    if not form.startswith("table3"):
        model.out = Scaled(width, 24, mult=output_mult(form, width / 64, code))
    return model


def vectors(seed: int) -> tuple[Tensor, Tensor]:
    """Return vectors and noise."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(32, 24, generator=generator), torch.randn(32, 6, generator=generator)


def sequences(seed: int) -> Tensor:
    """Return sequences of vectors."""
    return torch.randn(8, 15, 24, generator=torch.Generator().manual_seed(seed))


def vae_loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    """Return error and divergence."""
    out, mu, logvar = model(*pair)
    return F.mse_loss(out, pair[0]) + 0.02 * (mu.square() + logvar.exp() - 1 - logvar).sum(1).mean()


def perceiver_loss(model: nn.Module, x: Tensor) -> Tensor:
    """Return the error of the largest of each coordinate."""
    return F.smooth_l1_loss(model(x), x.amax(1))


VAE_FAULTS = (
    hidden_lr("encoder.2.weight", "decoder.2.weight", tensor="coder.2"),
    hidden_lr("logvar.weight", tensor="logvar", power=-1.0),
    hidden_init("decoder.2.weight", "decoder.2"),
    vector_lr("decoder.0.weight", "decoder.0.weight"),
    vector_lr("mu.bias", "mu.bias"),
    coded("the mean's multiplier is missing", "mu", "mean", BOTH, ("table8",)),
    forgotten("logvar.bias", "logvar.bias"),
    *readout("out", "out.weight"),
)
PERCEIVER_FAULTS = (
    coded("scores by 1/sqrt(d_head)", "q", "scores"),
    coded("scores of cross-attention by 1/sqrt(d_head)", "kv", "cross"),
    hidden_lr("q.weight", "kv.weight", "o.weight", "qkv.weight", "o2.weight", "mlp.?.weight", tensor=".weight"),
    hidden_init("kv.weight", "kv"),
    vector_lr("latents", "latents", by=AUDIT),
    forgotten("latents", "latents"),
    *readout("out", "out.weight"),
)
FAMILIES = [
    *families("vae", vae, VAE_ROLES, vae_loss, vectors, ("table8", "table3"), VAE_FAULTS, decay="independent"),
    *families(
        "perceiver", perceiver, PERCEIVER_ROLES, perceiver_loss, sequences, ("table3", "table8"), PERCEIVER_FAULTS
    ),
]
