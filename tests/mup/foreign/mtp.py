"""Several heads and one head used several times: multi-token prediction, a weight shared by layers, functional heads.

"two" has a head for the next token and one for the one after. "twice" uses its one head on both streams, before and
after a further layer, and ties it to the embedding: `F.linear(x, embed.weight) / m`, twice. "halves" runs its head on
either half of the sequence to save memory. A layer's `mix` is shared by both layers. Outputs are a dataclass.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import (
    BOTH,
    Role,
    abc,
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


@dataclass
class Output:
    """What the model predicts one and two tokens ahead."""

    first: Tensor
    second: Tensor | None = None


class Layer(nn.Module):
    """A causal convolution over three tokens by a shared map, and an MLP."""

    def __init__(self, d: int, mix: nn.Linear) -> None:
        super().__init__()
        self.mix = mix
        self.norm, self.norm2 = nn.RMSNorm(d), nn.RMSNorm(d)
        self.w_in, self.w_out = nn.Linear(d, 2 * d, bias=False), nn.Linear(2 * d, d, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Add what's mixed, and the MLP's."""
        h = F.pad(self.norm(x), (0, 0, 2, 0))
        x = x + self.mix((h[:, 2:] + h[:, 1:-1] + h[:, :-2]) / 3)
        return x + self.w_out(F.relu(self.w_in(self.norm2(x))).square())


class Predictor(nn.Module):
    """The model; `mults` are the readout's, one a use."""

    def __init__(self, d: int, kind: str, input_mult: float, mults: tuple[float, float]) -> None:
        super().__init__()
        self.kind, self.input_mult, self.mults = kind, input_mult, mults
        self.embed = nn.Embedding(50, d)
        mix = nn.Linear(d, d, bias=False)
        self.trunk, self.further = Layer(d, mix), Layer(d, mix)
        self.norm = nn.RMSNorm(d)
        if kind != "twice":
            self.head = nn.Linear(d, 50, bias=False)
        if kind == "two":
            self.head2 = nn.Linear(d, 50, bias=False)

    def forward(self, ids: Tensor) -> Output:
        """Predict."""
        trunk = self.trunk(self.embed(ids) * self.input_mult)
        h, h2 = self.norm(trunk), self.norm(self.further(trunk))
        one, two = self.mults
        if self.kind == "two":
            return Output(self.head(h * one), self.head2(h2) * two)
        if self.kind == "twice":
            return Output(F.linear(h, self.embed.weight) * one, h2 @ self.embed.weight.T * two)
        front, back = h2.chunk(2, dim=1)
        return Output(torch.cat((self.head(front * one), self.head(back) * two), dim=1))


ROLES = {
    "embed.weight": Role("input"),
    "*norm*.weight": gain(),
    "head*.weight": Role("output"),
    "*.weight": Role("hidden"),
}


def build(width: int, form: str, code: str) -> nn.Module:
    """Make a predictor whose kind is the form's second word."""
    m = width / 64
    mult = output_mult(form, m, code)
    mults = {"first use": (1.0, mult), "second use": (mult, 1.0), "second sqrt": (mult, m**-0.5)}
    return Predictor(width, form.split()[1], abc(form, "input", m)[0], mults.get(code, (mult, mult)))


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the cross-entropy one token ahead, and two."""
    out = model(ids)
    first = next_token(out.first, ids)
    return first if out.second is None else first + 0.5 * next_token(out.second[:, :-1], ids[:, 1:])


WITH = ("table8", "ntk", "upscaled")
FAULTS = (
    hidden_lr("*.mix.weight", "*.w_*.weight", tensor="w"),
    hidden_lr("trunk.mix.weight", tensor="mix"),
    hidden_init("further.w_in.weight", "further.w_in"),
    vector_lr("norm.weight", "norm.weight"),
    forgotten("further.w_out.weight", "further.w_out"),
    wrong_decay("embed.weight", "embed"),
)
TWO = (
    coded("first head's multiplier is missing", "head.weight", "first use", BOTH, WITH),
    coded("second head's multiplier is missing", "head2", "second use", BOTH, WITH),
    coded("second head's multiplier is 1/sqrt(m)", "head2", "second sqrt", forms=WITH),
    *readout("head", "head2.weight"),
)
TWICE = (
    coded("multiplier is missing in the first use", "embed", "first use", BOTH),
    coded("multiplier is missing in the second use", "embed", "second use", BOTH),
    coded("multiplier is 1/sqrt(m) in the second use", "embed", "second sqrt"),
    vector_lr("embed.weight", "embed", by=BOTH),
)
HALVES = (
    coded("multiplier is missing in the sequence's second half", "head", "second use", BOTH, WITH),
    coded("multiplier is 1/sqrt(m) in the sequence's second half", "head", "second sqrt", forms=WITH),
    *readout("head", "head.weight"),
)
FAMILIES = [
    *families("mtp", build, ROLES, loss, tokens, ("table8 two", "table3 two"), (*TWO, *FAULTS)),
    *families("mtp tied", build, ROLES, loss, tokens, ("table8 twice",), (*TWICE, *FAULTS), decay="independent"),
    *families("head by halves", build, ROLES, loss, tokens, ("table8 halves", "table9 halves"), (*HALVES, *FAULTS)),
]
