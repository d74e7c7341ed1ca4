"""A Mamba block with its selective scan in plain torch.

in_proj and out_proj are hidden; conv1d is depthwise, its filters vectors though drawn as a matrix; x_proj gives a
constant number of coordinates (dt_rank + 2 d_state), so it's infinite -> finite; dt_proj comes back from dt_rank.
A_log, D and dt_proj.bias start in ways of their own, alike at all widths.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import (
    AUDIT,
    BOTH,
    Fault,
    Role,
    Scaled,
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


class Mamba(nn.Module):
    """The block, its names those of mamba_ssm."""

    def __init__(self, d_model: int, d_state: int = 4, d_conv: int = 4, expand: int = 2, dt_rank: int = 4) -> None:
        super().__init__()
        self.d_state, self.dt_rank, self.d_conv = d_state, dt_rank, d_conv
        d_inner = expand * d_model
        self.in_proj = nn.Linear(d_model, d_inner * 2, bias=False)
        self.conv1d = nn.Conv1d(d_inner, d_inner, bias=True, kernel_size=d_conv, groups=d_inner, padding=d_conv - 1)
        self.x_proj = nn.Linear(d_inner, dt_rank + d_state * 2, bias=False)
        self.dt_proj = nn.Linear(dt_rank, d_inner, bias=True)
        dt = torch.exp(torch.rand(d_inner) * (math.log(0.5) - math.log(0.05)) + math.log(0.05))
        with torch.no_grad():
            self.dt_proj.bias.copy_(dt + torch.log(-torch.expm1(-dt)))
        A = torch.arange(1, d_state + 1, dtype=torch.float32).repeat(d_inner, 1).contiguous()
        self.A_log = nn.Parameter(torch.log(A))
        self.D = nn.Parameter(torch.ones(d_inner))
        self.out_proj = nn.Linear(d_inner, d_model, bias=False)

    def forward(self, hidden: Tensor) -> Tensor:
        """Mix along the sequence."""
        length = hidden.shape[1]
        x, z = self.in_proj(hidden).transpose(1, 2).chunk(2, dim=1)
        x = F.silu(self.conv1d(x)[..., :length])
        dt, B, C = torch.split(self.x_proj(x.transpose(1, 2)), [self.dt_rank, self.d_state, self.d_state], dim=-1)
        dt = F.softplus(self.dt_proj(dt)).transpose(1, 2)
        y = selective_scan(x, dt, -torch.exp(self.A_log.float()), B, C, self.D)
        return self.out_proj((y * F.silu(z)).transpose(1, 2))


def selective_scan(u: Tensor, delta: Tensor, A: Tensor, B: Tensor, C: Tensor, D: Tensor) -> Tensor:
    """Scan step by step, as mamba_ssm's reference does."""
    decay = torch.exp(torch.einsum("bdl,dn->bdln", delta, A))
    inputs = torch.einsum("bdl,bln,bdl->bdln", delta, B, u)
    state = torch.zeros_like(decay[:, :, 0])
    ys = []
    for i in range(u.shape[2]):
        state = decay[:, :, i] * state + inputs[:, :, i]
        ys.append(torch.einsum("bdn,bn->bd", state, C[:, i]))
    return torch.stack(ys, dim=2) + u * D.unsqueeze(-1)


class MambaLM(nn.Module):
    """Two blocks between an embedding and a head."""

    def __init__(self, d_model: int, output_mult: float, residual: float = 1.0, vocab: int = 50) -> None:
        super().__init__()
        self.embedding = nn.Embedding(vocab, d_model)
        self.layers = nn.ModuleList([Mamba(d_model) for _ in range(2)])
        self.norms = nn.ModuleList([nn.RMSNorm(d_model, eps=1e-5) for _ in range(2)])
        self.norm_f = nn.RMSNorm(d_model, eps=1e-5)
        self.lm_head = Scaled(d_model, vocab, bias=False, mult=output_mult)
        self.residual = residual

    def forward(self, input_ids: Tensor) -> Tensor:
        """Return logits."""
        x = self.embedding(input_ids)
        for norm, layer in zip(self.norms, self.layers, strict=True):
            x = x + layer(norm(x)) * self.residual
        return self.lm_head(self.norm_f(x))


ROLES = {
    "embedding.weight": Role("input"),
    "*norm*.weight": gain(),
    "lm_head.weight": Role("output"),
    "*.conv1d.weight": Role("vector", 0.3, start="uniform"),
    "*.conv1d.bias": bias(),
    "*.x_proj.weight": Role("narrow"),
    "*.dt_proj.weight": Role("wide", 0.3, start="uniform"),
    "*.dt_proj.bias": Role("vector", start="keep"),
    "*.A_log": Role("vector", start="keep"),
    "*.D": Role("vector", start="keep"),
    "*.in_proj.weight": Role("hidden"),
    "*.out_proj.weight": Role("hidden"),
}


def build(width: int, form: str, code: str) -> nn.Module:
    """Make the language model by the form."""
    m = width / 64
    return MambaLM(width, output_mult(form, m, code), m**0.5 if code == "residual" else 1.0)


def batch(seed: int) -> Tensor:
    """Return short sequences, for the scan is slow."""
    return tokens(seed, length=12)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the next tokens' cross-entropy."""
    return next_token(model(ids), ids)


FAULTS = (
    hidden_lr("*.in_proj.weight", "*.out_proj.weight", tensor="layers"),
    hidden_lr("*.x_proj.weight", tensor="x_proj"),
    hidden_init("*.x_proj.weight", "x_proj", by=AUDIT),
    hidden_init("layers.1.out_proj.weight", "layers.1.out_proj"),
    vector_lr("*.conv1d.weight", "conv1d.weight"),
    vector_lr("*.A_log", "A_log"),
    vector_lr("*.D", "D"),
    vector_lr("*.dt_proj.weight", "dt_proj.weight"),
    Fault("dt_proj's sigma is divided by sqrt(m)", "dt_proj.weight", AUDIT, init={"*.dt_proj.weight": -0.5}),
    forgotten("*.A_log", "A_log"),
    coded("branches grow as sqrt(m)", "out_proj", "residual", BOTH),
    wrong_decay("*.dt_proj.weight", "dt_proj.weight"),
    *readout("lm_head", "lm_head.weight"),
)
FAMILIES = [*families("mamba", build, ROLES, loss, batch, ("table8", "table3"), FAULTS, decay="independent")]
