"""Recurrent language models: nn.LSTM (two layers) and nn.GRU, and Elman's cell by hand; a tied decoder in one.

All of weight_ih and weight_hh are hidden (their fan_in is the input's size and the state's), biases are vectors.
PyTorch's word-language-model ties its decoder; a tied table is right by Table 8 only. Recurrent nets amplify at long
times, so sequences are short.
"""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .forms import (
    BOTH,
    Role,
    abc,
    bias,
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
    wrong_eps,
)


class RNNModel(nn.Module):
    """The word-language-model example's module."""

    def __init__(self, rnn_type: str, width: int, tie: bool, input_mult: float, output_mult: float) -> None:
        super().__init__()
        self.encoder = nn.Embedding(50, width)
        self.rnn = getattr(nn, rnn_type)(width, width, num_layers=2 if rnn_type == "LSTM" else 1)
        self.decoder = nn.Linear(width, 50)
        if tie:
            self.decoder.weight = self.encoder.weight
        self.input_mult, self.output_mult = input_mult, output_mult

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities, and the last state."""
        output, state = self.rnn(self.encoder(ids.T) * self.input_mult)
        decoded = self.decoder(output * self.output_mult)
        return F.log_softmax(decoded, dim=-1).transpose(0, 1), state


class Elman(nn.Module):
    """h = tanh(W x + U h + b), an embedding of one-hots through a raw matrix."""

    def __init__(self, width: int, output_mult: float) -> None:
        super().__init__()
        self.E = nn.Parameter(torch.empty(width, 50))
        self.W, self.U = nn.Parameter(torch.empty(width, width)), nn.Parameter(torch.empty(width, width))
        self.b = nn.Parameter(torch.zeros(width))
        self.h0 = nn.Parameter(torch.zeros(width))
        self.V, self.c = nn.Parameter(torch.empty(50, width)), nn.Parameter(torch.zeros(50))
        self.output_mult = output_mult

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Return log-probabilities, and the last state."""
        x = F.one_hot(ids, 50).to(self.E.dtype) @ self.E.t()
        h, logits = self.h0.expand(x.shape[0], -1), []
        for t in range(x.shape[1]):
            h = torch.tanh(x[:, t] @ self.W.t() + h @ self.U.t() + self.b)
            logits.append(torch.addmm(self.c, h, self.V.t(), alpha=self.output_mult))
        return torch.stack(logits, 1).log_softmax(-1), h


ROLES = {
    "encoder.weight": Role("input", 0.5),
    "decoder.weight": Role("output"),
    "decoder.bias": Role("fixed", start="zeros"),
    "rnn.weight_*": Role("hidden", start="uniform"),
    "rnn.bias_*": bias(),
}
ELMAN = {
    "E": Role("input", 0.5),
    "[WU]": Role("hidden", 0.1),
    "b": bias(),
    "h0": Role("vector", 0.1),
    "V": Role("output"),
    "c": Role("fixed", start="zeros"),
}


def build(width: int, form: str, code: str) -> nn.Module:
    """Make the model whose cell is the form's second word."""
    m, cell = width / 64, form.split()[1]
    mult = output_mult(form, m, code)
    if cell == "elman":
        return Elman(width, mult)
    grows = m**0.5 if code == "embedding" else 1.0
    return RNNModel(cell, width, "tied" in form, abc(form, "input", m)[0] * grows, mult)


def batch(seed: int) -> Tensor:
    """Return short sequences."""
    return tokens(seed, batch=8, length=9)


def loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the next tokens' negative log-likelihood."""
    return next_token(model(ids)[0], ids)


FAULTS = (
    hidden_lr("rnn.weight_*", tensor="rnn.weight"),
    hidden_lr("rnn.weight_ih_l0", tensor="rnn.weight_ih_l0"),
    hidden_init("rnn.weight_hh_l0", "rnn.weight_hh_l0"),
    vector_lr("rnn.bias_ih_l0", "rnn.bias_ih_l0"),
    vector_lr("decoder.bias", "decoder.bias"),
    vector_lr("encoder.weight", "encoder", by=BOTH),
    forgotten("rnn.bias_hh_l0", "rnn.bias_hh_l0"),
    wrong_eps(),
)
UNTIED = (*FAULTS, *readout("decoder", "decoder.weight"))
TIED = (*FAULTS, *readout("encoder", ""), coded("embedding is multiplied by sqrt(m)", "encoder", "embedding"))
HAND = (
    hidden_lr("W", "U", tensor=""),
    hidden_lr("U", tensor="U"),
    hidden_init("W", "W"),
    vector_lr("h0", "h0"),
    vector_lr("E", "E", by=BOTH),
    vector_lr("b", "b"),
    vector_lr("c", "c"),
    forgotten("h0", "h0"),
    *readout("V", "V"),
)
FAMILIES = [
    *families("lstm", build, ROLES, loss, batch, ("table8 LSTM tied",), TIED),
    *families("lstm", build, ROLES, loss, batch, ("table3 LSTM",), UNTIED),
    *families("gru", build, ROLES, loss, batch, ("table8 GRU", "table9 GRU"), UNTIED, decay="independent"),
    *families("elman", build, ELMAN, loss, batch, ("table8 elman", "table3 elman"), HAND, decay="none"),
]
