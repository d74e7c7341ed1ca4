"""The MLP of mup's README, in Adam and in SGD, and a chain of Linears without norms or nonlinearities."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import (
    BOTH,
    Fault,
    Role,
    abc,
    coded,
    families,
    forgotten,
    hidden_init,
    hidden_lr,
    output_mult,
    readout,
    vector_lr,
    wrong_eps,
)


class MuReadout(nn.Linear):
    """mup's readout, which multiplies its input."""

    def __init__(self, *args, output_mult: float = 1.0, **kwargs) -> None:
        super().__init__(*args, **kwargs)
        self.output_mult = output_mult

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        return super().forward(self.output_mult * x)


class MLP(nn.Module):
    """mup's README's MLP; `input_mult` is Table 9's."""

    def __init__(self, width: int, input_mult: float, output_mult: float, d_in: int = 48, d_out: int = 10) -> None:
        super().__init__()
        self.fc_1 = nn.Linear(d_in, width, bias=False)
        self.fc_2 = nn.Linear(width, width, bias=True)
        self.fc_3 = MuReadout(width, d_out, output_mult=output_mult)
        self.input_mult = input_mult
        self.nonlin = F.relu

    def forward(self, x: Tensor) -> Tensor:
        """Return the logits."""
        out = self.nonlin(self.fc_1(x) * self.input_mult)
        out = self.nonlin(self.fc_2(out))
        return self.fc_3(out)


class Chain(nn.Sequential):
    """Linears, nothing else."""

    def __init__(self, width: int, output_mult: float) -> None:
        layers = [nn.Linear(48, width, bias=False)]
        layers += [nn.Linear(width, width, bias=False) for _ in range(3)]
        super().__init__(*layers, nn.Linear(width, 10, bias=False))
        self.output_mult = output_mult

    def forward(self, x: Tensor) -> Tensor:
        """Return the scaled outputs."""
        return super().forward(x) * self.output_mult


MLP_ROLES = {
    "fc_1.weight": Role("input", 0.2),
    "fc_2.weight": Role("hidden", 0.18),
    "fc_3.weight": Role("output"),
    "fc_2.bias": Role("vector", start="zeros"),
    "fc_3.bias": Role("fixed", start="zeros"),
}
CHAIN_ROLES = {
    "0.weight": Role("input", 0.15, start="uniform"),
    "4.weight": Role("output", start="uniform"),
    "*.weight": Role("hidden", start="uniform"),
}


def mlp(width: int, form: str, code: str) -> nn.Module:
    """Make mup's MLP."""
    m = width / 64
    return MLP(width, m**0.5 if code == "input" else abc(form, "input", m)[0], output_mult(form, m, code))


def chain(width: int, form: str, code: str) -> nn.Module:
    """Make a chain."""
    return Chain(width, output_mult(form, width / 64, code))


def batch(seed: int) -> tuple[Tensor, Tensor]:
    """Return images and classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 48, generator=generator), torch.randint(0, 10, (16,), generator=generator)


def loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    """Return the classes' cross-entropy."""
    return F.cross_entropy(model(pair[0]), pair[1])


ADAM = (
    hidden_lr("fc_2.weight", tensor="fc_2.weight"),
    hidden_init("fc_2.weight", "fc_2.weight"),
    hidden_lr("fc_2.weight", tensor="fc_2.weight", power=-1.0),
    coded("input's multiplier grows as sqrt(m)", "fc_1", "input", BOTH, ("table8", "table3")),
    vector_lr("fc_1.weight", "fc_1.weight", by=BOTH),
    vector_lr("fc_3.bias", "fc_3.bias"),
    vector_lr("fc_2.bias", "fc_2.bias"),
    wrong_eps(),
    *readout("fc_3.weight", "fc_3.weight"),
)
SGD = (
    hidden_lr("fc_2.weight", tensor="fc_2.weight"),
    hidden_init("fc_2.weight", "fc_2.weight"),
    vector_lr("fc_1.weight", "fc_1.weight", by=BOTH),
    Fault("lr of the readout isn't multiplied by m", "fc_3.weight", BOTH, lr={"fc_3.weight": -1.0}, forms=("sgd8",)),
    forgotten("fc_1.weight", "fc_1.weight"),
)
CHAIN = (
    hidden_lr("[123].weight", tensor=".weight"),
    hidden_lr("2.weight", tensor="2.weight"),
    hidden_init("1.weight", "1.weight", -0.5),
    vector_lr("0.weight", "0.weight", by=BOTH),
    *readout("4.weight", "4.weight"),
)
FAMILIES = [
    *families("mup mlp", mlp, MLP_ROLES, loss, batch, ("table8", "table3", "table9"), ADAM, decay="none"),
    *families("mup mlp sgd", mlp, MLP_ROLES, loss, batch, ("sgd8", "sgd9"), SGD, decay="none", lr=0.1),
    *families("linear chain", chain, CHAIN_ROLES, loss, batch, ("table8", "table3"), CHAIN, decay="independent"),
]
