"""A diffusion transformer: adaLN-zero conditioning, timestep and class embeddings, bidirectional attention, MSE.

Conditions multiply (1 + scale) and gate branches, so that maps of width d -> 6 d make gains of the stream. Their
weights start at zero, as the last layer's. Timesteps enter by sinusoids of a constant number, noise by the batch.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import (
    BOTH,
    Fault,
    Role,
    abc,
    bias,
    coded,
    families,
    forgotten,
    hidden_init,
    hidden_lr,
    output_mult,
    readout,
    vector_lr,
    wrong_decay,
)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """Apply a condition."""
    return x * (1 + scale.unsqueeze(1)) + shift.unsqueeze(1)


class TimestepEmbedder(nn.Module):
    """Sinusoids through an MLP."""

    def __init__(self, hidden: int, frequencies: int = 32, mult: float = 1.0) -> None:
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(frequencies, hidden), nn.SiLU(), nn.Linear(hidden, hidden))
        self.frequencies, self.mult = frequencies, mult

    def forward(self, t: Tensor) -> Tensor:
        """Embed."""
        half = self.frequencies // 2
        freqs = torch.exp(-math.log(100.0) * torch.arange(half, dtype=torch.float32, device=t.device) / half)
        args = t[:, None] * freqs[None]
        first, act, second = self.mlp
        return second(act(first(torch.cat([torch.cos(args), torch.sin(args)], dim=-1)) * self.mult))


class Block(nn.Module):
    """DiT's block."""

    def __init__(self, hidden: int, scale: float) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.norm2 = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.qkv, self.proj = nn.Linear(hidden, 3 * hidden), nn.Linear(hidden, hidden)
        self.fc1, self.fc2 = nn.Linear(hidden, 2 * hidden), nn.Linear(2 * hidden, hidden)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(hidden, 6 * hidden))
        self.scale = scale

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        """Add gated branches."""
        shift, scale, gate, shift2, scale2, gate2 = self.adaLN_modulation(c).chunk(6, dim=1)
        h = modulate(self.norm1(x), shift, scale)
        q, k, v = self.qkv(h).unflatten(-1, (3, 4, -1)).permute(2, 0, 3, 1, 4)
        h = F.scaled_dot_product_attention(q, k, v, scale=self.scale).transpose(1, 2).flatten(2)
        x = x + gate.unsqueeze(1) * self.proj(h)
        h = modulate(self.norm2(x), shift2, scale2)
        return x + gate2.unsqueeze(1) * self.fc2(F.gelu(self.fc1(h), approximate="tanh"))


class DiT(nn.Module):
    """Two blocks over patches of 8 numbers."""

    def __init__(self, hidden: int, scales: list[float], input_mult: float, output_mult: float) -> None:
        super().__init__()
        self.x_embedder = nn.Linear(8, hidden)
        self.t_embedder = TimestepEmbedder(hidden, mult=input_mult)
        self.y_embedder = nn.Embedding(11, hidden)
        self.pos_embed = nn.Parameter(torch.zeros(1, 16, hidden))
        self.blocks = nn.ModuleList([Block(hidden, scale) for scale in scales])
        self.norm = nn.LayerNorm(hidden, elementwise_affine=False, eps=1e-6)
        self.final = nn.Linear(hidden, 8)
        self.input_mult, self.output_mult = input_mult, output_mult

    def forward(self, x: Tensor, t: Tensor, y: Tensor) -> Tensor:
        """Predict the noise."""
        x = (self.x_embedder(x) + self.pos_embed) * self.input_mult
        c = self.t_embedder(t) + self.y_embedder(y) * self.input_mult
        for block in self.blocks:
            x = block(x, c)
        return self.final(self.norm(x) * self.output_mult)


ROLES = {
    "x_embedder.*": Role("input", 0.2),
    "t_embedder.mlp.0.*": Role("input", 0.2),
    "y_embedder.weight": Role("input"),
    "pos_embed": Role("input", 0.1),
    "*.adaLN_modulation.1.weight": Role("hidden", 0.03),
    "final.weight": Role("output"),
    "final.bias": Role("fixed", start="zeros"),
    "blocks.*.bias": bias(),
    "t_embedder.mlp.2.bias": bias(),
    "*.weight": Role("hidden"),
}
ZERO = ROLES | {
    "*.adaLN_modulation.1.weight": Role("hidden", start="zeros"),
    "final.weight": Role("output", start="zeros"),
}
ZERO = {name: ZERO[name] for name in ROLES}


def build(width: int, form: str, code: str) -> nn.Module:
    """Make a DiT by the form."""
    m, right = width / 64, 4.0 / (width // 4)
    scales = [right, (width // 4) ** -0.5] if code == "scores" else [right, right]
    mult = abc(form, "input", m)[0] * (m**0.5 if code == "inputs" else 1.0)
    return DiT(width, scales, mult, output_mult(form, m, code))


def batch(seed: int) -> dict[str, Tensor]:
    """Return clean data, noise, times and classes."""
    generator = torch.Generator().manual_seed(seed)
    return {
        "x0": torch.randn(8, 16, 8, generator=generator).cumsum(1) / 4,
        "noise": torch.randn(8, 16, 8, generator=generator),
        "t": torch.rand(8, generator=generator),
        "y": torch.randint(0, 11, (8,), generator=generator),
    }


def loss(model: nn.Module, data: dict[str, Tensor]) -> Tensor:
    """Return the error of the velocity."""
    t = data["t"][:, None, None]
    noised = (1 - t) * data["x0"] + t * data["noise"]
    return F.mse_loss(model(noised, 100 * data["t"], data["y"]), data["noise"] - data["x0"])


FAULTS = (
    coded("scores of the last block by 1/sqrt(d_head)", "blocks.1", "scores"),
    coded("inputs' multiplier grows as sqrt(m) too much", "x_embedder", "inputs", BOTH),
    hidden_lr("*.adaLN_modulation.1.weight", tensor="adaLN_modulation"),
    hidden_lr("blocks.*.qkv.weight", "blocks.*.proj.weight", "blocks.*.fc?.weight", tensor="blocks"),
    hidden_init("blocks.0.fc1.weight", "blocks.0.fc1"),
    hidden_init("t_embedder.mlp.2.weight", "t_embedder.mlp.2"),
    vector_lr("*.adaLN_modulation.1.bias", "adaLN_modulation.1.bias"),
    vector_lr("y_embedder.weight", "y_embedder"),
    vector_lr("final.bias", "final.bias"),
    forgotten("pos_embed", "pos_embed"),
    wrong_decay("x_embedder.weight", "x_embedder"),
)
DRAWN_HEAD = (*FAULTS, *readout("final", "final.weight"))
ZERO_HEAD = (
    *FAULTS,
    Fault("the last layer's lr isn't divided by m", "final.weight", BOTH, lr={"final.weight": 1.0}),
)
FAMILIES = [
    *families("dit", build, ROLES, loss, batch, ("table8", "table9"), DRAWN_HEAD),
    *families("dit", build, ZERO, loss, batch, ("table3 zero",), ZERO_HEAD, decay="independent"),
]
