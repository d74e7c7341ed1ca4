"""Models that use Microsoft's mup package: set_base_shapes, MuReadout, MuSharedReadout, mup.init and MuAdamW.

Nothing of forms.py draws or trains these: PyTorch's default initialisers run first, set_base_shapes multiplies
MuReadout's weight and Linear's biases in place by sqrt(m), and MuAdamW makes the groups, a weight
decay of lambda * m where the lr is divided by m among them. Embeddings keep nn.Embedding's N(0, 1), or are drawn by
mup.init.normal_. mup gives every parameter an `infshape`, which is not to be believed.
"""

from functools import partial

import mup
import mup.init
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .family import Broken, Family
from .forms import AUDIT, BOTH, next_token, tokens


class Block(nn.Module):
    """The Transformer example's layer, its scores by 1/d (mup's `attn_mult`) or by 1/sqrt(d)."""

    def __init__(self, d: int, heads: int, standparam: bool) -> None:
        super().__init__()
        self.qkv = nn.Linear(d, 3 * d, bias=False)
        self.out_proj = nn.Linear(d, d)
        self.linear1, self.linear2 = nn.Linear(d, 2 * d), nn.Linear(2 * d, d)
        self.norm1, self.norm2 = nn.LayerNorm(d), nn.LayerNorm(d)
        self.heads, self.standparam = heads, standparam

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        """Attend, then the MLP; norms come after, as in the example."""
        bsz, length, d = x.shape
        head_dim = d // self.heads
        q, k, v = self.qkv(x).chunk(3, dim=-1)
        q, k, v = (y.contiguous().view(bsz, length, self.heads, head_dim).transpose(1, 2) for y in (q, k, v))
        q = q * (float(head_dim) ** -0.5 if self.standparam else 4.0 * float(head_dim) ** -1)
        weights = F.softmax(torch.matmul(q, k.transpose(-2, -1)) + mask, dim=-1)
        y = torch.matmul(weights, v).transpose(1, 2).contiguous().view(bsz, length, d)
        x = self.norm1(x + self.out_proj(y))
        return self.norm2(x + self.linear2(F.relu(self.linear1(x))))


class TransformerModel(nn.Module):
    """The example's model, of one layer."""

    def __init__(self, d: int, fault: str = "", tied: bool = False) -> None:
        super().__init__()
        self.encoder = nn.Embedding(50, d)
        self.pos_encoder = nn.Parameter(torch.zeros(32, d))
        self.layer = Block(d, 4, standparam=fault == "standparam")
        if tied:
            self.decoder = mup.MuSharedReadout(self.encoder.weight, bias=False)
        elif fault == "no MuReadout":
            self.decoder = nn.Linear(d, 50)
        else:
            self.decoder = mup.MuReadout(d, 50, output_mult=2.0)

    def forward(self, src: Tensor) -> Tensor:
        """Return log-probabilities."""
        mask = torch.full((src.shape[1], src.shape[1]), float("-inf"), device=src.device).triu(1)
        x = self.layer(self.encoder(src) + self.pos_encoder[: src.shape[1]], mask)
        return F.log_softmax(self.decoder(x), dim=-1)


class Readme(nn.Module):
    """The README's MLP with default initialisers."""

    def __init__(self, width: int, fault: str = "") -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(32, width), nn.Linear(width, width)
        self.readout = nn.Linear(width, 10) if fault == "no MuReadout" else mup.MuReadout(width, 10)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits."""
        return self.readout(F.relu(self.fc2(F.relu(self.fc1(x)))))


def transformer(width: int, fault: str = "", tied: bool = False) -> nn.Module:
    """Make the example's model, base shapes from widths 64 and 128."""
    make = partial(TransformerModel, fault=fault, tied=tied)
    model = mup.set_base_shapes(make(width), make(64), delta=make(128), rescale_params=not tied, do_assert=False)
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear) and (name != "decoder" or not tied):
            if module.bias is not None:
                module.bias.data.zero_()
            if fault == "torch.init" and name == "layer.linear1":
                nn.init.normal_(module.weight, 0, 0.08)
            elif name != "decoder":
                mup.init.normal_(module.weight, 0, 0.08)
    if tied:
        mup.init.normal_(model.encoder.weight, std=0.1)
    mup.init.uniform_(model.pos_encoder, -0.2, 0.2)
    return model


def readme(width: int, fault: str = "", kaiming: bool = False) -> nn.Module:
    """Make the README's MLP: defaults that set_base_shapes rescales, or mup's kaiming_normal_."""
    model = mup.set_base_shapes(
        Readme(width, fault),
        Readme(64, fault),
        delta=Readme(128, fault),
        rescale_params=fault != "not rescaled",
        do_assert=False,
    )
    if kaiming:
        for module in (model.fc1, model.fc2):
            init = nn.init if fault == "torch.init" and module is model.fc2 else mup.init
            if init is nn.init:
                init.normal_(module.weight, std=0.18)
            else:
                init.kaiming_normal_(module.weight, nonlinearity="relu")
            module.bias.data.fill_(0)
    elif fault == "bias":
        model.fc2.reset_parameters()
    return model


def optimizer(model: nn.Module, fault: str = "") -> torch.optim.Optimizer:
    """Let mup make the groups, or not."""
    parameters = list(model.parameters())
    if fault == "plain AdamW":
        return torch.optim.AdamW(parameters, lr=2.0**-7, weight_decay=0.01)
    if fault == "twice":
        for parameter in parameters:
            if parameter.infshape.ninf() == 2:
                break
        rate = 2.0**-7 / parameter.infshape.width_mult()
        return mup.MuAdamW(parameters, lr=rate, weight_decay=0.01)
    return mup.MuAdamW(parameters, lr=2.0**-7, weight_decay=0.01)


def lm_loss(model: nn.Module, ids: Tensor) -> Tensor:
    """Return the next tokens' cross-entropy."""
    return next_token(model(ids), ids)


def images(seed: int) -> tuple[Tensor, Tensor]:
    """Return vectors and classes."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(16, 32, generator=generator), torch.randint(0, 10, (16,), generator=generator)


def image_loss(model: nn.Module, pair: tuple[Tensor, Tensor]) -> Tensor:
    """Return the classes' cross-entropy."""
    return F.cross_entropy(model(pair[0]), pair[1])


def broken(name: str, tensor: str, by: tuple[str, ...], make, fault: str, **kwargs) -> Broken:
    """Return a fault of both the model and its optimizer, each taking what concerns it."""
    return Broken(name, tensor, by, partial(make, fault=fault, **kwargs), partial(optimizer, fault=fault))


def transformers(form: str, tied: bool) -> Family:
    """Return the Transformer's family."""
    plant = partial(broken, make=transformer, tied=tied)
    faults = [
        plant("standparam: scores by 1/sqrt(d)", "layer", AUDIT, fault="standparam"),
        plant("AdamW in place of MuAdamW", "layer", BOTH, fault="plain AdamW"),
        plant("all lrs are divided by m once more", "encoder", BOTH, fault="twice"),
        plant("torch's init in place of mup's", "layer.linear1", BOTH, fault="torch.init"),
    ]
    if not tied:
        faults.append(plant("nn.Linear in place of MuReadout", "decoder", BOTH, fault="no MuReadout"))
    return Family(
        "mup package transformer",
        form,
        partial(transformer, tied=tied),
        optimizer,
        lm_loss,
        tokens,
        tuple(faults),
    )


def mlps(form: str, kaiming: bool) -> Family:
    """Return the MLP's family."""
    plant = partial(broken, make=readme, kaiming=kaiming)
    faults = [
        plant("AdamW in place of MuAdamW", "fc2", BOTH, fault="plain AdamW"),
        plant("all lrs are divided by m once more", "fc1", BOTH, fault="twice"),
        plant("nn.Linear in place of MuReadout", "readout", BOTH, fault="no MuReadout"),
        plant("MuReadout isn't rescaled, so its init goes with m ** -3/2", "readout", AUDIT, fault="not rescaled"),
    ]
    if kaiming:
        faults.append(plant("torch's init in place of mup's", "fc2", BOTH, fault="torch.init"))
    else:
        faults.append(plant("fc2 is reset after set_base_shapes, so its bias shrinks", "fc2.bias", AUDIT, fault="bias"))
    return Family(
        "mup package mlp", form, partial(readme, kaiming=kaiming), optimizer, image_loss, images, tuple(faults)
    )


FAMILIES = [
    transformers("table8 MuReadout", tied=False),
    transformers("table8 MuSharedReadout", tied=True),
    mlps("table8 rescaled", kaiming=False),
    mlps("table8 kaiming", kaiming=True),
]
